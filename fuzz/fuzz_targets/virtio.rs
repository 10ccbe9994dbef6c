//! A driver that does anything: configuration space, base addresses, device registers, and what lies
//! in the rings of a disk, a console and an entropy device. The devices answer or ask for a reset;
//! they neither panic nor keep a thread busy for ever.
#![no_main]
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use trapgate_memory::{GuestMemory, RamRange};
use trapgate_pci::{Bus, ECAM_BASE, InterruptLine, Message, MessageSink};
use trapgate_virtio::{
    Block, Console, ConsoleHandle, Device, Disk, Entropy, PortConfig, PortOutput, VirtioPci,
};

const RAM: u64 = 1 << 20;
/// Rings lie from here on, [`RING_BYTES`] for each queue; buffers behind those of a console.
const RINGS: u64 = 0x1_0000;
const RING_BYTES: u64 = 0x1_0000;
/// Offsets in a queue's part.
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
/// A console with two ports has the most.
const QUEUES: usize = 6;
const QUEUE_SIZE: u16 = 16;
const VERSION_1: u64 = 1 << 32;
/// Configuration space of the device, which is the first on the bus after the host bridge.
const SLOT: u64 = 1 << 15;
const BUFFERS: u64 = 0x8_0000;
const DISK_BYTES: u64 = 64 * 512;

/// Registers of the common structure (virtio 1.2, 4.1.4.3).
mod common {
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const STATUS: u64 = 20;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
}

#[derive(Arbitrary, Debug)]
struct Input {
    device: DeviceKind,
    /// Features of a driver that has set the device up before the rest happens.
    started: Option<u64>,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum DeviceKind {
    Disk { read_only: bool },
    Console,
    Ports,
    Entropy,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// Configuration space by ECAM.
    Config(u8, u16, u8, Option<u64>),
    /// Configuration space by ports.
    Port(u8, u8, Option<u32>),
    /// A structure in the device's window, and any address.
    Window(u8, u16, u8, Option<u64>),
    Mmio(u32, u8, Option<u64>),
    /// A field of the common structure.
    Common(u8, u8, u64),
    /// Guest memory.
    Memory(u32, Vec<u8>),
    Descriptor(u8, u8, Piece, u16, u16),
    /// A chain that is well-formed but for its pieces, offered and rung.
    Chain(u8, Vec<Piece>),
    /// A disk's request header, at the start of the buffers.
    Header(u8, u8),
    Offer(u8, u16),
    Ring(u8),
    Start(u64),
    HostInput(u8, Vec<u8>),
    HostClose(u8),
    HostResize(u16, u16),
    Pause,
    Resume,
    Reset,
    /// Lets the device's threads run.
    Yield,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Piece {
    place: Place,
    length: Length,
    device_writes: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Header,
    Buffer(u16),
    /// In the rings.
    Ring(u8, u16),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Length {
    Byte,
    Header,
    Sector,
    Short(u16),
    Any(u32),
}

struct Nowhere;

impl MessageSink for Nowhere {
    fn send(&self, _message: Message) {}
}

impl InterruptLine for Nowhere {
    fn set(&self, _asserted: bool) {}
}

impl PortOutput for Nowhere {
    fn write(&mut self, data: &[u8]) {
        assert!(!data.is_empty());
    }
}

static DISK: LazyLock<File> = LazyLock::new(|| {
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).expect("memory for the disk"));
    file.set_len(DISK_BYTES).expect("memory for the disk");
    file
});

struct Machine {
    bus: Bus,
    memory: Arc<GuestMemory>,
    console: Option<ConsoleHandle>,
    /// Where the device's structures lie while nobody moves its window, by type.
    structures: [u64; 6],
    /// How many chains were offered, by queue.
    available: [u16; QUEUES],
}

fuzz_target!(|input: Input| {
    let mut machine = Machine::new(&input.device);
    if let Some(features) = input.started {
        machine.start(features);
    }
    for step in &input.steps {
        machine.take(step);
    }
    machine.bus.resume();
    thread::yield_now();
    // Dropping the machine waits for the device's threads.
});

fn behind_pci(device: impl Device + 'static, memory: &Arc<GuestMemory>) -> VirtioPci {
    let memory = Arc::clone(memory);
    VirtioPci::new(device, memory, Arc::new(Nowhere), Arc::new(Nowhere))
}

fn console(ports: &[(&str, bool)]) -> Console {
    let config = |&(name, is_console): &(&str, bool)| PortConfig {
        name: name.into(),
        is_console,
        output: Box::new(Nowhere),
    };
    Console::new(ports.iter().map(config).collect()).expect("the host has threads")
}

impl Machine {
    fn new(device: &DeviceKind) -> Self {
        let ram = RamRange {
            start: 0,
            length: RAM,
        };
        let memory = Arc::new(GuestMemory::new(&[ram]).expect("the host has memory"));
        let mut handle = None;
        let function = match device {
            DeviceKind::Disk { read_only } => {
                let path = format!("/proc/self/fd/{}", DISK.as_raw_fd());
                let disk = Disk::open(path, *read_only).expect("the disk is one");
                behind_pci(
                    Block::new(disk, "fuzz").expect("the host has threads"),
                    &memory,
                )
            }
            DeviceKind::Console | DeviceKind::Ports => {
                let console = match device {
                    DeviceKind::Console => console(&[("terminal", true)]),
                    _ => console(&[("terminal", true), ("data", false)]),
                };
                handle = Some(console.handle());
                behind_pci(console, &memory)
            }
            DeviceKind::Entropy => {
                behind_pci(Entropy::new().expect("the host has threads"), &memory)
            }
        };
        let bus = Bus::new();
        bus.add(function).expect("the bus has room");
        let mut machine = Self {
            bus,
            memory,
            console: handle,
            structures: [0; 6],
            available: [0; QUEUES],
        };
        machine.walk_capabilities();
        machine
    }

    /// Finds the device's structures as a driver does (virtio 1.2, 4.1.4).
    fn walk_capabilities(&mut self) {
        let base = u64::from(self.config(0x10) & !0xf);
        let mut at = self.config(0x34) & 0xff;
        while at != 0 {
            let head = self.config(at);
            if head & 0xff == 0x09 {
                let kind = (head >> 24) as usize;
                self.structures[kind] = base + u64::from(self.config(at + 8));
            }
            at = head >> 8 & 0xff;
        }
    }

    fn config(&self, offset: u32) -> u32 {
        let mut bytes = [0; 4];
        let gpa = ECAM_BASE + SLOT + u64::from(offset);
        assert!(self.bus.memory_read(gpa, &mut bytes));
        u32::from_le_bytes(bytes)
    }

    fn access(&self, gpa: u64, length: u8, write: Option<u64>) {
        let length = usize::from(length % 8) + 1;
        match write {
            Some(value) => self.bus.memory_write(gpa, &value.to_le_bytes()[..length]),
            None => self.bus.memory_read(gpa, &mut [0; 8][..length]),
        };
    }

    fn set_common(&self, field: u64, bytes: &[u8]) {
        self.bus.memory_write(self.structures[1] + field, bytes);
    }

    fn set_status(&self, status: u8) {
        self.set_common(common::STATUS, &[status]);
    }

    /// Sets the device up, as far as it lets itself be.
    fn start(&mut self, features: u64) {
        for status in [0, 0b0001, 0b0011] {
            self.set_status(status);
        }
        for select in 0..2_u32 {
            self.set_common(common::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            let half = ((features | VERSION_1) >> (32 * select)) as u32;
            self.set_common(common::DRIVER_FEATURE, &half.to_le_bytes());
        }
        self.set_status(0b1011);
        self.available = [0; QUEUES];
        for queue in 0..QUEUES as u16 {
            let ring = ring(queue as u8);
            self.set_common(common::QUEUE_SELECT, &queue.to_le_bytes());
            self.set_common(common::QUEUE_SIZE, &QUEUE_SIZE.to_le_bytes());
            for (field, gpa) in [
                (common::QUEUE_DESC, ring),
                (common::QUEUE_DRIVER, ring + AVAILABLE),
                (common::QUEUE_DEVICE, ring + USED),
            ] {
                self.set_common(field, &(gpa as u32).to_le_bytes());
                self.set_common(field + 4, &((gpa >> 32) as u32).to_le_bytes());
            }
            self.set_common(common::QUEUE_VECTOR, &(queue + 1).to_le_bytes());
            self.set_common(common::QUEUE_ENABLE, &1_u16.to_le_bytes());
            self.write(ring + AVAILABLE, &[0; 4]);
        }
        self.set_status(0b1111);
    }

    /// Writes guest memory, as far as there is any.
    fn write(&self, gpa: u64, bytes: &[u8]) {
        let room = RAM.saturating_sub(gpa).min(bytes.len() as u64) as usize;
        self.memory
            .write(gpa.min(RAM), &bytes[..room])
            .expect("it was cut to what is RAM");
    }

    fn describe(&self, queue: u8, index: u16, piece: Piece, flags: u16, next: u16) {
        let length = match piece.length {
            Length::Byte => 1,
            Length::Header => 16,
            Length::Sector => 512,
            Length::Short(length) => length.into(),
            Length::Any(length) => length,
        };
        let gpa = match piece.place {
            Place::Header => BUFFERS,
            Place::Buffer(offset) => BUFFERS + u64::from(offset) * 4,
            Place::Ring(queue, offset) => ring(queue) + u64::from(offset),
            Place::Any(gpa) => gpa,
        };
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&u32::to_le_bytes(length));
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(ring(queue) + 16 * u64::from(index), &bytes);
    }

    fn offer(&mut self, queue: u8, head: u16) {
        let next = &mut self.available[usize::from(queue) % QUEUES];
        let entry = 4 + 2 * u64::from(*next % QUEUE_SIZE);
        *next = next.wrapping_add(1);
        let index = next.to_le_bytes();
        let available = ring(queue) + AVAILABLE;
        self.write(available + entry, &head.to_le_bytes());
        self.write(available + 2, &index);
    }

    fn ring(&self, queue: u8) {
        let queue = u16::from(queue) % QUEUES as u16;
        let doorbell = self.structures[2] + 4 * u64::from(queue);
        self.bus.memory_write(doorbell, &queue.to_le_bytes());
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::Config(slot, offset, length, write) => {
                let slot = u64::from(slot % 3) << 15;
                let offset = u64::from(offset & 0xfff);
                self.access(ECAM_BASE + slot + offset, length, write);
            }
            Step::Port(offset, length, write) => {
                let port = 0xcf8 + u16::from(offset & 7);
                let length = [1, 2, 4][usize::from(length % 3)];
                match write {
                    Some(value) => self.bus.port_write(port, &value.to_le_bytes()[..length]),
                    None => self.bus.port_read(port, &mut [0; 4][..length]),
                };
            }
            Step::Window(structure, offset, length, write) => {
                let structure = self.structures[usize::from(structure) % self.structures.len()];
                self.access(structure + u64::from(offset), length, write);
            }
            Step::Mmio(gpa, length, write) => self.access(gpa.into(), length, write),
            Step::Common(field, length, value) => {
                let field = self.structures[1] + u64::from(field & 0x3f);
                self.access(field, length, Some(value));
            }
            Step::Memory(gpa, ref bytes) => self.write(gpa.into(), bytes),
            Step::Descriptor(queue, index, piece, flags, next) => {
                self.describe(queue, index.into(), piece, flags, next);
            }
            Step::Chain(queue, ref pieces) => {
                let last = pieces.len().min(usize::from(QUEUE_SIZE)).saturating_sub(1) as u16;
                for (index, piece) in (0..=last).zip(pieces) {
                    let flags = u16::from(index < last) | u16::from(piece.device_writes) << 1;
                    self.describe(queue, index, *piece, flags, index + 1);
                }
                self.offer(queue, 0);
                self.ring(queue);
            }
            Step::Header(kind, sector) => {
                let mut header = [0; 16];
                header[0] = kind & 15;
                header[8] = sector;
                self.write(BUFFERS, &header);
            }
            Step::Offer(queue, head) => self.offer(queue, head),
            Step::Ring(queue) => self.ring(queue),
            Step::Start(features) => self.start(features),
            Step::HostInput(port, ref bytes) => self.host(|console| {
                console.input(usize::from(port & 1), bytes);
            }),
            Step::HostClose(port) => {
                self.host(|console| console.close_input(usize::from(port & 1)))
            }
            Step::HostResize(columns, rows) => self.host(|console| console.resize(columns, rows)),
            Step::Pause => self.bus.pause(),
            Step::Resume => self.bus.resume(),
            Step::Reset => self.bus.reset(),
            Step::Yield => thread::sleep(Duration::from_micros(50)),
        }
    }

    fn host(&self, act: impl FnOnce(&ConsoleHandle)) {
        if let Some(console) = &self.console {
            act(console);
        }
    }
}

/// Where a queue's rings lie.
fn ring(queue: u8) -> u64 {
    RINGS + RING_BYTES * (u64::from(queue) % QUEUES as u64)
}
