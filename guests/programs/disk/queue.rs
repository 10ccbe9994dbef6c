//! The disk's one queue (virtio 1.2, 2.7 and 5.2).

use core::mem::offset_of;
use core::sync::atomic::{Ordering::SeqCst, fence};

use crate::function::{
    Function, Structure, read8, read16, read64, write8, write16, write32, write64,
};

const SIZE: usize = 8;
const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// What device and driver share.
#[repr(C, align(4096))]
struct Shared {
    descriptors: [Descriptor; SIZE],
    available_flags: u16,
    available_index: u16,
    available: [u16; SIZE],
    event: u16,
    /// The used ring is aligned to four bytes.
    padding: u16,
    used_flags: u16,
    used_index: u16,
    used: [[u32; 2]; SIZE],
    header: [u64; 2],
    status: u8,
}

/// What a sector is read into: alone in its page, so that nobody but the device writes there.
#[repr(C, align(4096))]
struct Sector([u64; 512]);

static mut SECTOR: Sector = Sector([0; 512]);

static mut SHARED: Shared = Shared {
    descriptors: [Descriptor {
        address: 0,
        length: 0,
        flags: 0,
        next: 0,
    }; SIZE],
    available_flags: 0,
    available_index: 0,
    available: [0; SIZE],
    event: 0,
    padding: 0,
    used_flags: 0,
    used_index: 0,
    used: [[0; 2]; SIZE],
    header: [0; 2],
    status: 0,
};

/// How the doorbell is rung.
pub enum Ring {
    /// The queue's number, two bytes.
    Usual,
    /// Four bytes.
    Long,
    /// One byte.
    Byte,
}

pub struct Disk {
    pub function: Function,
    asked: u16,
}

/// The address of a field of [`SHARED`], which the device sees at the same.
macro_rules! place {
    ($field:ident) => {
        (&raw const SHARED) as u64 + offset_of!(Shared, $field) as u64
    };
}

fn sector_at() -> u64 {
    (&raw const SECTOR) as u64
}

/// What a sector begins with, as a number: MOV EAX, its number; RET.
fn program(sector: u64) -> u64 {
    0xC3 << 40 | sector << 8 | 0xB8
}

impl Disk {
    pub fn new(function: Function) -> Disk {
        Disk { function, asked: 0 }
    }

    fn common(&self, offset: u32) -> u64 {
        self.function.structure(Structure::Common, offset)
    }

    /// Initialization (3.1.1), with the interrupt's first vector.
    pub fn start(&mut self, vector: u8) {
        self.function.set_vector(vector);
        write8(self.common(20), 1);
        write8(self.common(20), 3);
        // VIRTIO_F_VERSION_1 and nothing else.
        for (select, features) in [(0, 0), (1, 1)] {
            write32(self.common(8), select);
            write32(self.common(12), features);
        }
        write8(self.common(20), 11);
        write16(self.common(22), 0);
        write16(self.common(24), SIZE as u16);
        write16(self.common(26), 0);
        for index in [place!(available_index), place!(used_index)] {
            write16(index, 0);
        }
        self.asked = 0;
        write64(self.common(32), place!(descriptors));
        write64(self.common(40), place!(available_flags));
        write64(self.common(48), place!(used_flags));
        write16(self.common(28), 1);
        write8(self.common(20), 15);
    }

    /// Resets the device.
    pub fn stop(&mut self) {
        write8(self.common(20), 0);
        while read8(self.common(20)) != 0 {}
    }

    pub fn sectors(&self) -> u64 {
        read64(self.function.structure(Structure::Device, 0))
    }

    /// Forgets what was read.
    pub fn clear(&mut self) {
        for word in 0..64 {
            write64(sector_at() + 8 * word, u64::MAX);
        }
    }

    /// Puts a request for a sector into the queue.
    pub fn ask(&mut self, sector: u64) {
        write64(place!(header), 0);
        write64(place!(header) + 8, sector);
        write8(place!(status), 0xff);
        let chain = [
            (place!(header), 16, NEXT, 1),
            (sector_at(), 512, NEXT | DEVICE_WRITES, 2),
            (place!(status), 1, DEVICE_WRITES, 0),
        ];
        for ((address, length, flags, next), at) in
            chain.into_iter().zip((place!(descriptors)..).step_by(16))
        {
            write64(at, address);
            write32(at + 8, length);
            write16(at + 12, flags);
            write16(at + 14, next);
        }
        let slot = u64::from(self.asked) % SIZE as u64;
        write16(place!(available) + 2 * slot, 0);
        self.asked = self.asked.wrapping_add(1);
        fence(SeqCst);
        write16(place!(available_index), self.asked);
        fence(SeqCst);
    }

    pub fn ring(&self, how: Ring) {
        let doorbell = self.function.structure(Structure::Notify, 0);
        match how {
            Ring::Usual => write16(doorbell, 0),
            Ring::Long => write32(doorbell, 0),
            Ring::Byte => write8(doorbell, 0),
        }
    }

    /// Waits for the answer, without an interrupt.
    pub fn wait(&self) {
        while read16(place!(used_index)) != self.asked {}
    }

    /// Whether the answer is there, and is what the sector is to hold.
    pub fn is_right(&self, sector: u64) -> bool {
        read16(place!(used_index)) == self.asked
            && read8(place!(status)) == 0
            && read64(sector_at()) == program(sector)
            && (1..64).all(|word| read64(sector_at() + 8 * word) == sector * 64 + word)
    }

    /// Calls what was read, which is right, and gives what it returns.
    pub fn call(&self) -> u64 {
        // SAFETY: `is_right` has found MOV EAX and RET there, which keep to the convention.
        let number = unsafe { core::mem::transmute::<u64, extern "C" fn() -> u32>(sector_at())() };
        number.into()
    }
}
