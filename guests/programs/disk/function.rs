//! A virtio disk as a PCI function (virtio 1.2, 4.1): configuration space, window, MSI-X.

use runtime::{port, println};

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

/// A virtio disk's vendor and device id.
const DISK: u32 = 0x1042_1af4;
const COMMAND: u8 = 0x04;
const MEMORY_ON: u32 = 2;
const BAR0: u8 = 0x10;
const CAPABILITIES: u8 = 0x34;
const VIRTIO: u32 = 0x09;
const MSIX: u32 = 0x11;
const MSIX_ON: u32 = 1 << 31;

/// The places that the window has turns with: above what firmware gives out.
const PLACES: [u32; 3] = [0xc800_0000, 0xc900_0000, 0xca00_8000];

/// The structures in the window, by their number in virtio.
#[derive(Clone, Copy)]
pub enum Structure {
    Common = 1,
    Notify = 2,
    Device = 4,
}

pub struct Function {
    slot: u32,
    /// Guest-physical start of the window.
    base: u64,
    moves: usize,
    structures: [u32; 5],
    /// Where the MSI-X table and the pending bits are in the window.
    table: u32,
    pending: u32,
}

impl Function {
    /// The first disk on the bus.
    pub fn find() -> Option<Function> {
        let slot = (0..32).find(|&slot| read(slot, 0) == DISK)?;
        let mut function = Function {
            slot,
            base: u64::from(read(slot, BAR0) & !0xf),
            moves: 0,
            structures: [0; 5],
            table: 0,
            pending: 0,
        };
        let mut at = read(slot, CAPABILITIES) as u8;
        while at != 0 {
            let head = read(slot, at);
            match head & 0xff {
                VIRTIO => {
                    let kind = (head >> 24) as usize;
                    if let Some(offset) = function.structures.get_mut(kind) {
                        *offset = read(slot, at + 8);
                    }
                }
                MSIX => {
                    function.table = read(slot, at + 4) & !7;
                    function.pending = read(slot, at + 8) & !7;
                    write(slot, at, head | MSIX_ON);
                }
                _ => {}
            }
            at = (head >> 8) as u8;
        }
        write(slot, COMMAND, read(slot, COMMAND) | MEMORY_ON | 4);
        Some(function)
    }

    fn address(&self, offset: u32) -> u64 {
        self.base + u64::from(offset)
    }

    pub fn structure(&self, structure: Structure, offset: u32) -> u64 {
        self.address(self.structures[structure as usize] + offset)
    }

    /// Gives the window another place. What was at the old one reads as ones.
    pub fn move_window(&mut self) {
        let old = self.base;
        let place = PLACES[self.moves % PLACES.len()];
        self.moves += 1;
        write(self.slot, BAR0, place);
        self.base = place.into();
        if read32(old) != u32::MAX {
            println!("disk: the window is still at {old:#x}");
        }
    }

    /// As a driver does that wants to know its length.
    pub fn switch_window_off_and_on(&mut self) {
        let command = read(self.slot, COMMAND);
        write(self.slot, COMMAND, command & !MEMORY_ON);
        write(self.slot, BAR0, u32::MAX);
        write(self.slot, BAR0, self.base as u32);
        if read32(self.base) != u32::MAX {
            println!("disk: the window is not off");
        }
        write(self.slot, COMMAND, command);
    }

    /// Gives the first entry of the table a vector, as Linux does: masked meanwhile.
    pub fn set_vector(&mut self, vector: u8) {
        self.mask(true);
        write32(self.address(self.table), 0xfee0_0000);
        write32(self.address(self.table + 4), 0);
        write32(self.address(self.table + 8), vector.into());
        self.mask(false);
    }

    pub fn mask(&mut self, masked: bool) {
        write32(self.address(self.table + 12), masked.into());
    }

    /// Whether the first interrupt waits for its mask to go.
    pub fn is_pending(&self) -> bool {
        read32(self.address(self.pending)) & 1 != 0
    }
}

fn select(slot: u32, offset: u8) {
    port::write32(ADDRESS, 1 << 31 | slot << 11 | u32::from(offset & !3));
}

fn read(slot: u32, offset: u8) -> u32 {
    select(slot, offset);
    port::read32(DATA)
}

fn write(slot: u32, offset: u8, value: u32) {
    select(slot, offset);
    port::write32(DATA, value);
}

macro_rules! memory {
    ($read:ident, $write:ident, $type:ty) => {
        #[allow(dead_code)]
        pub fn $read(address: u64) -> $type {
            // SAFETY: the first 4 GiB are mapped one to one, and no object of the program is there.
            unsafe { (address as *const $type).read_volatile() }
        }

        #[allow(dead_code)]
        pub fn $write(address: u64, value: $type) {
            // SAFETY: as above.
            unsafe { (address as *mut $type).write_volatile(value) }
        }
    };
}

memory!(read8, write8, u8);
memory!(read16, write16, u16);
memory!(read32, write32, u32);
memory!(read64, write64, u64);
