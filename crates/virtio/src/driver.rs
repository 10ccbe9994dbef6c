//! The other side of a device, for tests: a small driver that finds the device on its bus, as a
//! kernel does, and lays its rings out in guest memory.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use trapgate_memory::{GuestMemory, RamRange};
use trapgate_pci::{Bus, BusState, ECAM_BASE, InterruptLine, Message, MessageSink};

use crate::{Device, Notifier, VirtioPci};

/// Long enough for any machine; only a test that fails waits for it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// RAM of the test machine.
pub(crate) const RAM: u64 = 16 << 20;
/// Where tests put their buffers; rings are below.
pub(crate) const BUFFERS: u64 = 4 << 20;

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_INDEX: u64 = 1 << 29;
pub(crate) const INDIRECT: u64 = 1 << 28;

pub(crate) const NEEDS_RESET: u8 = 0x40;

/// Waits until `condition` holds.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_micros(100));
    }
}

/// Catches messages.
#[derive(Default)]
pub(crate) struct Sink {
    data: Mutex<Vec<u32>>,
    arrived: Condvar,
}

impl MessageSink for Sink {
    fn send(&self, message: Message) {
        // As interrupt controllers do with what is no interrupt message.
        if message.address == 0xfee0_0000 {
            self.data.lock().unwrap().push(message.data);
            self.arrived.notify_all();
        }
    }
}

impl Sink {
    pub(crate) fn take(&self) -> Vec<u32> {
        std::mem::take(&mut self.data.lock().unwrap())
    }

    /// Waits for a message with this data, and takes all of that kind.
    #[track_caller]
    pub(crate) fn wait(&self, data: u32) {
        let (mut caught, result) = self
            .arrived
            .wait_timeout_while(self.data.lock().unwrap(), PATIENCE, |caught| {
                !caught.contains(&data)
            })
            .unwrap();
        assert!(!result.timed_out(), "no message {data}");
        caught.retain(|caught| *caught != data);
    }
}

/// The level of a line.
#[derive(Default)]
pub(crate) struct Line(Mutex<bool>);

impl InterruptLine for Line {
    fn set(&self, asserted: bool) {
        *self.0.lock().unwrap() = asserted;
    }
}

impl Line {
    pub(crate) fn level(&self) -> bool {
        *self.0.lock().unwrap()
    }
}

/// Offsets of the fields of the common structure.
pub(crate) mod common {
    pub(crate) const DEVICE_FEATURE_SELECT: u64 = 0;
    pub(crate) const DEVICE_FEATURE: u64 = 4;
    pub(crate) const DRIVER_FEATURE_SELECT: u64 = 8;
    pub(crate) const DRIVER_FEATURE: u64 = 12;
    pub(crate) const CONFIG_VECTOR: u64 = 16;
    pub(crate) const NUM_QUEUES: u64 = 18;
    pub(crate) const STATUS: u64 = 20;
    pub(crate) const GENERATION: u64 = 21;
    pub(crate) const QUEUE_SELECT: u64 = 22;
    pub(crate) const QUEUE_SIZE: u64 = 24;
    pub(crate) const QUEUE_VECTOR: u64 = 26;
    pub(crate) const QUEUE_ENABLE: u64 = 28;
    pub(crate) const QUEUE_NOTIFY: u64 = 30;
    pub(crate) const QUEUE_DESC: u64 = 32;
    pub(crate) const QUEUE_DRIVER: u64 = 40;
    pub(crate) const QUEUE_DEVICE: u64 = 48;
}

/// A piece of a chain to be: address, length, whether the device writes it.
pub(crate) type Piece = (u64, u32, bool);

#[derive(Clone, Copy, Default)]
pub(crate) struct Ring {
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    next: u16,
    seen: u16,
}

pub(crate) struct Driver {
    pub(crate) bus: Arc<Bus>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) sink: Arc<Sink>,
    pub(crate) line: Arc<Line>,
    pub(crate) notifier: Arc<Notifier>,
    pub(crate) slot: u64,
    /// Guest-physical places of the structures, by type.
    pub(crate) structures: HashMap<u8, u64>,
    /// Offsets of capabilities, by id (the last of each) and of virtio's by 0x100 + type.
    pub(crate) capabilities: HashMap<u16, u64>,
    pub(crate) stride: u64,
    pub(crate) msix_table: u64,
    pub(crate) rings: Vec<Ring>,
}

impl Driver {
    pub(crate) fn new(device: impl Device + 'static) -> Self {
        let memory = GuestMemory::new(&[RamRange {
            start: 0,
            length: RAM,
        }]);
        let memory = Arc::new(memory.unwrap());
        let sink = Arc::new(Sink::default());
        let line = Arc::new(Line::default());
        let function = VirtioPci::new(
            device,
            Arc::clone(&memory),
            Arc::clone(&sink) as _,
            Arc::clone(&line) as _,
        );
        let notifier = Arc::clone(function.notifier());
        let bus = Arc::new(Bus::new());
        let slot = u64::from(bus.add(function).unwrap());
        let mut driver = Self {
            bus,
            memory,
            sink,
            line,
            notifier,
            slot,
            structures: HashMap::new(),
            capabilities: HashMap::new(),
            stride: 0,
            msix_table: 0,
            rings: Vec::new(),
        };
        driver.walk_capabilities();
        driver
    }

    /// Saves the machine, which then ends, and restores it around the device that `make` gives. Its
    /// state is written and read on the way. It stands still until its bus is let go on.
    #[track_caller]
    pub(crate) fn moved<D: Device + 'static>(self, make: impl FnOnce() -> D) -> Self {
        self.bus.pause();
        let state = self.bus.save();
        let ram = self.read(0, RAM as usize);
        let (rings, sent) = (self.rings.clone(), self.sink.take());
        drop(self);

        let mut state_read = state.clone();
        for function in &mut state_read.functions {
            let text = function.state.to_string();
            function.state = serde_json::from_str(&text).unwrap();
        }
        let restored = Self::new(make());
        restored.memory.write(0, &ram).unwrap();
        restored.sink.data.lock().unwrap().extend(sent);
        restored.bus.restore(&state_read).unwrap();
        assert_eq!(restored.bus.save(), state);
        Self { rings, ..restored }
    }

    /// Tries to restore around another device a state in which a number was replaced; whether that
    /// was let in.
    pub(crate) fn takes_changed<D: Device + 'static>(
        &self,
        mut index: usize,
        to: u64,
        make: impl FnOnce() -> D,
    ) -> Option<Self> {
        let mut state: BusState = self.bus.save();
        assert!(change_number(&mut state.functions[1].state, &mut index, to));
        let other = Self::new(make());
        let ram = self.read(0, RAM as usize);
        other.memory.write(0, &ram).unwrap();
        other.bus.restore(&state).ok()?;
        let rings = self.rings.clone();
        Some(Self { rings, ..other })
    }

    fn walk_capabilities(&mut self) {
        let base = u64::from(self.config(0x10) & !0xf);
        let mut at = u64::from(self.config(0x34) & 0xff);
        while at != 0 {
            let head = self.config(at);
            let (id, next) = (head as u8, head >> 8 & 0xff);
            self.capabilities.insert(id.into(), at);
            match id {
                0x09 => {
                    let kind = (head >> 24) as u8;
                    self.capabilities.insert(0x100 + u16::from(kind), at);
                    assert_eq!(self.config(at + 4) & 0xff, 0);
                    let offset = u64::from(self.config(at + 8));
                    self.structures.insert(kind, base + offset);
                    if kind == 2 {
                        self.stride = self.config(at + 16).into();
                    }
                }
                0x11 => self.msix_table = base + u64::from(self.config(at + 4) & !7),
                other => panic!("capability {other:#x}"),
            }
            at = u64::from(next);
        }
    }

    pub(crate) fn config_gpa(&self, offset: u64) -> u64 {
        ECAM_BASE + (self.slot << 15) + offset
    }

    pub(crate) fn config(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.peek(self.config_gpa(offset)))
    }

    pub(crate) fn set_config(&self, offset: u64, data: &[u8]) {
        assert!(self.bus.memory_write(self.config_gpa(offset), data));
    }

    #[track_caller]
    pub(crate) fn peek<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0xa5; N];
        assert!(self.bus.memory_read(gpa, &mut bytes));
        bytes
    }

    #[track_caller]
    pub(crate) fn poke(&self, gpa: u64, data: &[u8]) {
        assert!(self.bus.memory_write(gpa, data));
    }

    pub(crate) fn common<const N: usize>(&self, field: u64) -> [u8; N] {
        self.peek(self.structures[&1] + field)
    }

    pub(crate) fn set_common(&self, field: u64, data: &[u8]) {
        self.poke(self.structures[&1] + field, data);
    }

    pub(crate) fn device_config<const N: usize>(&self, offset: u64) -> [u8; N] {
        self.peek(self.structures[&4] + offset)
    }

    pub(crate) fn isr(&self) -> u8 {
        self.peek::<1>(self.structures[&3])[0]
    }

    pub(crate) fn status(&self) -> u8 {
        self.common::<1>(common::STATUS)[0]
    }

    pub(crate) fn set_status(&self, status: u8) {
        self.set_common(common::STATUS, &[status]);
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.set_common(common::DEVICE_FEATURE_SELECT, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.common(common::DEVICE_FEATURE)))
        };
        half(0) | half(1) << 32
    }

    pub(crate) fn set_features(&self, features: u64) {
        for select in 0..2_u32 {
            self.set_common(common::DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            let half = (features >> (32 * select)) as u32;
            self.set_common(common::DRIVER_FEATURE, &half.to_le_bytes());
        }
    }

    /// Programs MSI-X so that vector `v` sends `0x40 + v`, and switches it on.
    pub(crate) fn enable_msix(&self) {
        let at = self.capabilities[&0x11];
        let vectors = u64::from(self.config(at) >> 16 & 0x7ff) + 1;
        for vector in 0..vectors {
            let entry = self.msix_table + 16 * vector;
            self.poke(entry, &0xfee0_0000_u64.to_le_bytes());
            let data_and_unmask = 0x40 + vector;
            self.poke(entry + 8, &data_and_unmask.to_le_bytes());
        }
        self.set_config(at + 2, &0x8000_u16.to_le_bytes());
    }

    /// Everything up to DRIVER_OK, with all queues, each with its vector: queue `q` has message
    /// `0x41 + q`, configuration changes 0x40.
    #[track_caller]
    pub(crate) fn start(&mut self, features: u64) {
        self.enable_msix();
        self.start_without_msix(features);
    }

    #[track_caller]
    pub(crate) fn start_without_msix(&mut self, features: u64) {
        self.prepare(features);
        self.set_queues_up(u16::MAX);
        self.set_status(0b1111);
        assert_eq!(self.status(), 0b1111);
    }

    /// Up to FEATURES_OK.
    #[track_caller]
    pub(crate) fn prepare(&self, features: u64) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.set_status(0b0001);
        self.set_status(0b0011);
        self.set_features(features | VERSION_1);
        self.set_status(0b1011);
        assert_eq!(self.status(), 0b1011);
    }

    /// Sets every queue up, with at most `largest` entries.
    pub(crate) fn set_queues_up(&mut self, largest: u16) {
        self.set_common(common::CONFIG_VECTOR, &0_u16.to_le_bytes());
        self.rings.clear();
        let queues = u16::from_le_bytes(self.common(common::NUM_QUEUES));
        for queue in 0..queues {
            self.set_common(common::QUEUE_SELECT, &queue.to_le_bytes());
            let size = u16::from_le_bytes(self.common(common::QUEUE_SIZE)).min(largest);
            assert_ne!(size, 0);
            let base = 0x1_0000 * (u64::from(queue) + 1);
            let ring = Ring {
                size,
                desc: base,
                avail: base + 0x4000,
                used: base + 0x8000,
                next: 0,
                seen: 0,
            };
            self.memory.write(base, &vec![0; 0x1_0000]).unwrap();
            self.set_common(common::QUEUE_SIZE, &size.to_le_bytes());
            // As two halves, as the standard wants it.
            for (field, value) in [
                (common::QUEUE_DESC, ring.desc),
                (common::QUEUE_DRIVER, ring.avail),
                (common::QUEUE_DEVICE, ring.used),
            ] {
                self.set_common(field, &(value as u32).to_le_bytes());
                self.set_common(field + 4, &((value >> 32) as u32).to_le_bytes());
            }
            self.set_common(common::QUEUE_VECTOR, &(queue + 1).to_le_bytes());
            self.set_common(common::QUEUE_ENABLE, &1_u16.to_le_bytes());
            self.rings.push(ring);
        }
    }

    pub(crate) fn set_descriptor(
        &self,
        table: u64,
        index: u16,
        (gpa, length): (u64, u32),
        (flags, next): (u16, u16),
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = table + 16 * u64::from(index);
        self.memory.write(at, &bytes).unwrap();
    }

    /// Writes a chain into the descriptor table from entry `first` on.
    pub(crate) fn describe(&self, table: u64, first: u16, pieces: &[Piece]) {
        for (index, &(gpa, length, write)) in (first..).zip(pieces) {
            let last = usize::from(index - first) + 1 == pieces.len();
            let flags = u16::from(!last) | u16::from(write) << 1;
            self.set_descriptor(table, index, (gpa, length), (flags, index + 1));
        }
    }

    /// Makes the chain that starts at `head` available, without ringing.
    pub(crate) fn offer(&mut self, queue: u16, head: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let at = ring.avail + 4 + 2 * u64::from(ring.next % ring.size);
        self.memory.write(at, &head.to_le_bytes()).unwrap();
        ring.next = ring.next.wrapping_add(1);
        let index = ring.next.to_le_bytes();
        self.memory.write(ring.avail + 2, &index).unwrap();
    }

    pub(crate) fn ring(&self, queue: u16) {
        self.set_common(common::QUEUE_SELECT, &queue.to_le_bytes());
        let notify = u16::from_le_bytes(self.common(common::QUEUE_NOTIFY));
        let doorbell = self.structures[&2] + u64::from(notify) * self.stride;
        self.poke(doorbell, &queue.to_le_bytes());
    }

    /// Sends a chain (from descriptor `first` on) and rings.
    pub(crate) fn send(&mut self, queue: u16, first: u16, pieces: &[Piece]) {
        self.describe(self.rings[usize::from(queue)].desc, first, pieces);
        self.offer(queue, first);
        self.ring(queue);
    }

    pub(crate) fn used_index(&self, queue: u16) -> u16 {
        let mut index = [0; 2];
        let at = self.rings[usize::from(queue)].used + 2;
        self.memory.read(at, &mut index).unwrap();
        u16::from_le_bytes(index)
    }

    /// The next used chain, if there is one: its head, and how much was written.
    pub(crate) fn take_used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let index = self.used_index(queue);
        let ring = &mut self.rings[usize::from(queue)];
        if ring.seen == index {
            return None;
        }
        let at = ring.used + 4 + 8 * u64::from(ring.seen % ring.size);
        let mut element = [0; 8];
        self.memory.read(at, &mut element).unwrap();
        ring.seen = ring.seen.wrapping_add(1);
        // Under EVENT_IDX: tell me of the next one.
        let used_event = ring.avail + 4 + 2 * u64::from(ring.size);
        self.memory
            .write(used_event, &ring.seen.to_le_bytes())
            .unwrap();
        let [a, b, _, _, e, f, g, h] = element;
        Some((u16::from_le_bytes([a, b]), u32::from_le_bytes([e, f, g, h])))
    }

    #[track_caller]
    pub(crate) fn wait_used(&mut self, queue: u16) -> (u16, u32) {
        let mut used = None;
        eventually("a used buffer", || {
            used = self.take_used(queue);
            used.is_some()
        });
        used.unwrap()
    }

    /// Sends a chain and waits for it to come back; gives how much was written.
    #[track_caller]
    pub(crate) fn request(&mut self, queue: u16, pieces: &[Piece]) -> u32 {
        self.send(queue, 0, pieces);
        let (head, written) = self.wait_used(queue);
        assert_eq!(head, 0);
        written
    }

    pub(crate) fn read(&self, gpa: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read(gpa, &mut bytes).unwrap();
        bytes
    }

    #[track_caller]
    pub(crate) fn wait_for_failure(&self) -> crate::ProtocolError {
        eventually("DEVICE_NEEDS_RESET", || self.status() & NEEDS_RESET != 0);
        self.notifier.failure().unwrap()
    }
}

/// Replaces the `index`th number, and tells whether there was one.
fn change_number(value: &mut serde_json::Value, index: &mut usize, to: u64) -> bool {
    use serde_json::Value;
    let inner: Vec<&mut Value> = match value {
        Value::Number(_) if *index == 0 => {
            *value = to.into();
            return true;
        }
        Value::Number(_) => {
            *index -= 1;
            return false;
        }
        Value::Array(items) => items.iter_mut().collect(),
        Value::Object(fields) => fields.values_mut().collect(),
        _ => Vec::new(),
    };
    inner
        .into_iter()
        .any(|value| change_number(value, index, to))
}

/// Numbers that look random and are the same every time (xorshift64*).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }
}
