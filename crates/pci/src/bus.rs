//! The bus: configuration accesses by port and by memory, and memory accesses to open windows.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use crate::layout::{ECAM_BASE, ECAM_SIZE, MMIO_BASE, MMIO_SIZE, SLOTS, slot_gsi};
use crate::{
    BusState, DOORBELL_BYTES, Doorbell, DoorbellListener, Function, HostBridge, StateError,
    register,
};

/// The address port of configuration mechanism #1 (PCI 3.0, 3.2.2.3.2).
const ADDRESS_PORT: u16 = 0xcf8;
/// Its four data ports start here.
const DATA_PORT: u16 = 0xcfc;
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Enable, bus, device, function and doubleword; the rest reads as zero.
const ADDRESS_BITS: u32 = 0x80ff_fffc;
/// Windows are at least a page apart, so that a guest can map each on its own.
const WINDOW_ALIGNMENT: u64 = 4096;

/// Why a function cannot be put on the bus.
#[derive(Debug, thiserror::Error)]
pub enum PciError {
    /// All device numbers are taken.
    #[error("the PCI bus is full: it has {SLOTS} slots; give the machine fewer devices")]
    Full,
    /// The windows do not fit below 4 GiB.
    #[error("no {length:#x} bytes are left of the PCI memory window of {MMIO_SIZE:#x} bytes")]
    NoSpace {
        /// Bytes wanted.
        length: u64,
    },
}

type Shared = Arc<Mutex<dyn Function>>;

/// An open window, and who is behind it.
struct Route {
    base: u64,
    length: u64,
    slot: u8,
    bar: u8,
    function: Shared,
}

/// What an address in an open window means.
struct Place {
    slot: u8,
    bar: u8,
    offset: u64,
    function: Shared,
}

/// A function and the base addresses that "firmware" gave it.
struct Slot {
    function: Shared,
    bars: Vec<Assigned>,
}

#[derive(Clone, Copy)]
struct Assigned {
    offset: u16,
    wide: bool,
    base: u64,
}

/// Bus 0, the only one, with a [`HostBridge`] in slot 0. Every method may be called from any
/// thread; only accesses to the same function wait for each other.
pub struct Bus {
    /// What was last written to port 0xcf8.
    address: AtomicU32,
    slots: RwLock<Vec<Slot>>,
    /// First free address of the memory window. Held as well while a configuration write may
    /// move windows, so that `routes` follows the registers in the order of their writes.
    configuration: Mutex<u64>,
    /// Sorted by base.
    routes: RwLock<Vec<Route>>,
    doorbells: OnceLock<Arc<dyn DoorbellListener>>,
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while a function was locked leaves it in whatever state it had; the guest may see
    // a confused device, which is better than losing the others too.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Bus {
    fn default() -> Self {
        Self::new()
    }
}

impl Bus {
    /// A bus with only the host bridge.
    pub fn new() -> Self {
        Self {
            address: AtomicU32::new(0),
            slots: RwLock::new(vec![Slot {
                function: Arc::new(Mutex::new(HostBridge::default())),
                bars: Vec::new(),
            }]),
            configuration: Mutex::new(MMIO_BASE),
            routes: RwLock::default(),
            doorbells: OnceLock::new(),
        }
    }

    /// Tells `listener` of doorbells from now on. Only once.
    pub fn listen_to_doorbells(&self, listener: Arc<dyn DoorbellListener>) {
        // A second call is a defect of the caller and changes nothing.
        let _ = self.doorbells.set(listener);
    }

    /// Rings a doorbell that rang for the listener: what a write to its address would have done when it was
    /// made.
    pub fn ring(&self, doorbell: Doorbell) {
        let Doorbell {
            slot, bar, offset, ..
        } = doorbell;
        if let Some(function) = self.function(slot) {
            lock(&function).bar_write(bar, offset, &[0; DOORBELL_BYTES]);
        }
    }

    /// The slot that the next [`Self::add`] gives, for [`slot_gsi`].
    pub fn next_slot(&self) -> u8 {
        self.slots
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .len() as u8
    }

    /// Puts a function into the next free slot and does what firmware does: gives its windows
    /// addresses, opens them, and notes its interrupt line.
    pub fn add(&self, function: impl Function + 'static) -> Result<u8, PciError> {
        let function: Shared = Arc::new(Mutex::new(function));
        let mut free = lock(&self.configuration);
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= SLOTS {
            return Err(PciError::Full);
        }
        let number = slots.len() as u8;
        let bars = assign(&mut *lock(&function), &mut free)?;
        configure(&mut *lock(&function), number, &bars);
        slots.push(Slot {
            function: Arc::clone(&function),
            bars,
        });
        drop(slots);
        self.reroute(number, &function);
        Ok(number)
    }

    /// Resets every function and gives it its first addresses again.
    pub fn reset(&self) {
        let _configuration = lock(&self.configuration);
        self.address.store(0, Ordering::Relaxed);
        for (number, function, bars) in self.all() {
            {
                let mut function = lock(&function);
                function.reset();
                configure(&mut *function, number, &bars);
            }
            self.reroute(number, &function);
        }
    }

    /// Stops the threads of every function; when it returns none touches guest memory.
    pub fn pause(&self) {
        for (_, function, _) in self.all() {
            lock(&function).pause();
        }
    }

    /// Goes on after [`Self::pause`].
    pub fn resume(&self) {
        for (_, function, _) in self.all() {
            lock(&function).resume();
        }
    }

    /// The state of the bus and of every function, after [`Self::pause`].
    pub fn save(&self) -> BusState {
        let Self {
            address,
            slots: _,
            // Follow from the functions.
            configuration: _,
            routes: _,
            // The machine's.
            doorbells: _,
        } = self;
        let save = |(_, function, _): (u8, Shared, Vec<Assigned>)| lock(&function).save();
        BusState {
            address: address.load(Ordering::Relaxed),
            functions: self.all().into_iter().map(save).collect(),
        }
    }

    /// Gives the functions, which were just put on the bus, their states. After an error the bus is not
    /// to be used.
    ///
    /// # Errors
    /// For the state of another bus, and one that a function can't be in.
    pub fn restore(&self, state: &BusState) -> Result<(), StateError> {
        let BusState { address, functions } = state;
        let _configuration = lock(&self.configuration);
        let all = self.all();
        if all.len() != functions.len() {
            return Err(StateError::Functions {
                saved: functions.len(),
                present: all.len(),
            });
        }
        let valid = address & !ADDRESS_BITS == 0;
        StateError::check(valid, "bus", "the address register", *address)?;
        self.address.store(*address, Ordering::Relaxed);
        for ((number, function, _), saved) in all.into_iter().zip(functions) {
            lock(&function).restore(saved)?;
            self.reroute(number, &function);
        }
        Ok(())
    }

    fn all(&self) -> Vec<(u8, Shared, Vec<Assigned>)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        (0..)
            .zip(slots.iter())
            .map(|(number, slot)| (number, Arc::clone(&slot.function), slot.bars.clone()))
            .collect()
    }

    fn function(&self, slot: u8) -> Option<Shared> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        slots
            .get(usize::from(slot))
            .map(|slot| Arc::clone(&slot.function))
    }

    /// Brings the routes to a function up to date. The caller holds `configuration`.
    fn reroute(&self, slot: u8, function: &Shared) {
        let windows = lock(function).windows();
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        routes.retain(|route| route.slot != slot);
        routes.extend(windows.iter().map(|window| Route {
            base: window.base,
            length: window.length,
            slot,
            bar: window.bar,
            function: Arc::clone(function),
        }));
        routes.sort_by_key(|route| route.base);
        drop(routes);
        if let Some(listener) = self.doorbells.get() {
            listener.moved(&|doorbell| self.is_there(doorbell));
        }
    }

    /// Whether a write to a doorbell's address is one to the doorbell.
    fn is_there(&self, doorbell: Doorbell) -> bool {
        let Doorbell {
            gpa,
            slot,
            bar,
            offset,
        } = doorbell;
        !in_ecam(gpa, DOORBELL_BYTES)
            && self
                .route(gpa, DOORBELL_BYTES)
                .is_some_and(|place| (place.slot, place.bar, place.offset) == (slot, bar, offset))
    }

    /// Reads ports 0xcf8 to 0xcff. `false` for an access that is not the bus's (port 0xcf9 is the
    /// PC's reset control register, for one); `data` is then unchanged.
    pub fn port_read(&self, port: u16, data: &mut [u8]) -> bool {
        if port == ADDRESS_PORT && data.len() == 4 {
            let address = self.address.load(Ordering::Relaxed);
            data.copy_from_slice(&address.to_le_bytes());
            return true;
        }
        let Some((slot, offset)) = self.port_target(port, data.len()) else {
            return false;
        };
        self.config_read(slot, offset, data);
        true
    }

    /// Writes ports 0xcf8 to 0xcff. `false` for an access that is not the bus's.
    pub fn port_write(&self, port: u16, data: &[u8]) -> bool {
        if port == ADDRESS_PORT
            && let Ok(bytes) = data.try_into()
        {
            let address = u32::from_le_bytes(bytes) & ADDRESS_BITS;
            self.address.store(address, Ordering::Relaxed);
            return true;
        }
        let Some((slot, offset)) = self.port_target(port, data.len()) else {
            return false;
        };
        self.config_write(slot, offset, data);
        true
    }

    /// Slot (none where there can be no function) and offset that an access to the data ports
    /// means; `None` where it is no such access.
    fn port_target(&self, port: u16, length: usize) -> Option<(Option<u8>, u16)> {
        let byte = port.checked_sub(DATA_PORT)?;
        if length == 0 || usize::from(byte) + length > 4 {
            return None;
        }
        let address = self.address.load(Ordering::Relaxed);
        let offset = (address & 0xfc) as u16 + byte;
        // Bus and function are 0 or nobody answers.
        let answered = address & ADDRESS_ENABLE != 0 && address & 0x00ff_0700 == 0;
        let slot = answered.then_some((address >> 11 & 0x1f) as u8);
        Some((slot, offset))
    }

    fn config_read(&self, slot: Option<u8>, offset: u16, data: &mut [u8]) {
        match slot.and_then(|slot| self.function(slot)) {
            Some(function) => lock(&function).config_read(offset, data),
            // The bus ends an access that nobody claims with all ones (PCI 3.0, 6.1).
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, slot: Option<u8>, offset: u16, data: &[u8]) {
        let Some(slot) = slot else { return };
        let Some(function) = self.function(slot) else {
            return;
        };
        if offset >= 0x40 {
            lock(&function).config_write(offset, data);
            return;
        }
        let _configuration = lock(&self.configuration);
        lock(&function).config_write(offset, data);
        self.reroute(slot, &function);
    }

    /// Reads 1 to 8 bytes of guest-physical memory that is not RAM. `false` where no open window
    /// and no configuration space is; `data` is then unchanged.
    pub fn memory_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        if in_ecam(gpa, data.len()) {
            let mut done = 0;
            for length in pieces(gpa, data.len()) {
                let (slot, offset) = ecam_target(gpa + done as u64);
                self.config_read(slot, offset, &mut data[done..done + length]);
                done += length;
            }
            return true;
        }
        let Some(place) = self.route(gpa, data.len()) else {
            return false;
        };
        data.fill(0);
        lock(&place.function).bar_read(place.bar, place.offset, data);
        true
    }

    /// Writes 1 to 8 bytes of guest-physical memory that is not RAM. `false` where no open window
    /// and no configuration space is.
    pub fn memory_write(&self, gpa: u64, data: &[u8]) -> bool {
        if in_ecam(gpa, data.len()) {
            let mut done = 0;
            for length in pieces(gpa, data.len()) {
                let (slot, offset) = ecam_target(gpa + done as u64);
                self.config_write(slot, offset, &data[done..done + length]);
                done += length;
            }
            return true;
        }
        let Some(place) = self.route(gpa, data.len()) else {
            return false;
        };
        let Place {
            slot,
            bar,
            offset,
            function,
        } = place;
        let mut function = lock(&function);
        function.bar_write(bar, offset, data);
        if let Some(listener) = self.doorbells.get()
            && data.len() == DOORBELL_BYTES
            && function.is_doorbell(bar, offset)
        {
            drop(function);
            let doorbell = Doorbell {
                gpa,
                slot,
                bar,
                offset,
            };
            let _configuration = lock(&self.configuration);
            if self.is_there(doorbell) {
                listener.rung(doorbell);
            }
        }
        true
    }

    fn route(&self, gpa: u64, length: usize) -> Option<Place> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let candidates = routes.partition_point(|route| route.base <= gpa);
        // The nearest start below is the one, unless a guest let windows overlap.
        routes[..candidates].iter().rev().find_map(|route| {
            let offset = gpa - route.base;
            let fits = offset < route.length && length as u64 <= route.length - offset;
            fits.then(|| Place {
                slot: route.slot,
                bar: route.bar,
                offset,
                function: Arc::clone(&route.function),
            })
        })
    }
}

fn in_ecam(gpa: u64, length: usize) -> bool {
    gpa.checked_sub(ECAM_BASE)
        .is_some_and(|offset| offset < ECAM_SIZE && length as u64 <= ECAM_SIZE - offset)
}

/// Slot (none where there can be no function) and offset of an ECAM address (PCIe 5.0, 7.2.2).
fn ecam_target(gpa: u64) -> (Option<u8>, u16) {
    let offset = gpa - ECAM_BASE;
    let slot = (offset >> 12 & 7 == 0).then_some((offset >> 15 & 0x1f) as u8);
    (slot, (offset & 0xfff) as u16)
}

/// Cuts an access at the doublewords of configuration space.
fn pieces(gpa: u64, length: usize) -> impl Iterator<Item = usize> {
    let first = (4 - gpa as usize % 4).min(length);
    let rest = length - first;
    std::iter::once(first)
        .chain(std::iter::repeat_n(4, rest / 4))
        .chain((!rest.is_multiple_of(4)).then_some(rest % 4))
}

/// Sizes the base address registers of a function as firmware does, and reserves addresses.
fn assign(function: &mut dyn Function, free: &mut u64) -> Result<Vec<Assigned>, PciError> {
    let mut bars = Vec::new();
    let mut index = 0;
    let mut next = *free;
    while index < 6 {
        let offset = register::BAR0 + 4 * index;
        let low = size(function, offset);
        let wide = low & 0b111 == 0b100;
        let high = match (wide, index < 5) {
            (true, true) => size(function, offset + 4),
            _ => u32::MAX,
        };
        index += if wide { 2 } else { 1 };
        // An unused register, or an I/O window, which no function here has.
        if low & !0xf == 0 && (high == u32::MAX || high == 0) || low & 1 != 0 {
            continue;
        }
        let mask = u64::from(high) << 32 | u64::from(low & !0xf);
        let length = (!mask).wrapping_add(1);
        let no_space = PciError::NoSpace { length };
        let base = next
            .checked_next_multiple_of(length.max(WINDOW_ALIGNMENT))
            .filter(|base| length <= (MMIO_BASE + MMIO_SIZE).saturating_sub(*base))
            .ok_or(no_space)?;
        next = base + length;
        bars.push(Assigned { offset, wide, base });
    }
    *free = next;
    Ok(bars)
}

fn size(function: &mut dyn Function, offset: u16) -> u32 {
    let mut bytes = [0; 4];
    function.config_write(offset, &[0xff; 4]);
    function.config_read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Writes the registers that firmware leaves set for the operating system.
fn configure(function: &mut dyn Function, slot: u8, bars: &[Assigned]) {
    for bar in bars {
        let base = bar.base.to_le_bytes();
        function.config_write(bar.offset, &base[..4]);
        if bar.wide {
            function.config_write(bar.offset + 4, &base[4..]);
        }
    }
    function.config_write(register::INTERRUPT_LINE, &[slot_gsi(slot) as u8]);
    // Memory space on, if there is any.
    if !bars.is_empty() {
        function.config_write(register::COMMAND, &[0x02, 0]);
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;
    use crate::{BarKind, ConfigSpace, ConfigSpaceState, Identity, SavedFunction, Window};

    /// Register, offset and data of a write.
    type Heard = Arc<Mutex<Vec<(u8, u64, Vec<u8>)>>>;

    /// Notes writes to its windows, and answers every read with the same byte.
    struct Probe {
        space: ConfigSpace,
        heard: Heard,
        answer: u8,
    }

    impl Probe {
        fn new(answer: u8) -> Self {
            let mut space = ConfigSpace::new(Identity {
                vendor: 0x1234,
                device: u16::from(answer),
                revision: 0,
                class: 0xff_00_00,
                subsystem_vendor: 0,
                subsystem: 0,
            });
            space.add_bar(0, BarKind::Memory32, 0x100);
            space.add_bar(2, BarKind::Memory64, 0x1_0000);
            Self {
                space,
                heard: Arc::default(),
                answer,
            }
        }
    }

    impl Function for Probe {
        fn config_read(&mut self, offset: u16, data: &mut [u8]) {
            self.space.read(offset, data);
        }
        fn config_write(&mut self, offset: u16, data: &[u8]) {
            self.space.write(offset, data);
        }
        fn windows(&self) -> Vec<Window> {
            self.space.windows()
        }
        fn bar_read(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
            data.fill(self.answer);
        }
        fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
            self.heard
                .lock()
                .unwrap()
                .push((bar, offset, data.to_vec()));
        }
        fn reset(&mut self) {
            self.space.reset();
        }
        fn save(&mut self) -> SavedFunction {
            SavedFunction::new("probe", 1, &self.space.save())
        }
        fn restore(&mut self, saved: &SavedFunction) -> Result<(), StateError> {
            self.space = self.space.restored(&saved.read("probe", 1)?, "probe")?;
            Ok(())
        }
    }

    fn two_probes() -> Bus {
        let bus = Bus::new();
        bus.add(Probe::new(7)).unwrap();
        bus.add(Probe::new(9)).unwrap();
        bus
    }

    proptest! {
        #[test]
        fn a_restored_bus_reads_saves_and_routes_as_the_one_that_was_saved(
            writes in vec((0u8..4, 0u16..0x100, any::<u32>(), any::<bool>()), 0..40),
        ) {
            let bus = two_probes();
            for (slot, offset, value, on) in writes {
                bus.config_write(Some(slot), offset & !3, &value.to_le_bytes());
                // Often enough memory space is on, and the windows are somewhere.
                bus.config_write(Some(slot), register::COMMAND, &[if on { 2 } else { 0 }, 0]);
                select(&bus, slot.into(), (offset & 0xfc).into());
            }
            let state = bus.save();

            let restored = two_probes();
            restored.restore(&state).unwrap();

            prop_assert_eq!(restored.save(), state);
            for slot in 0..4 {
                for offset in (0..0x100).step_by(4) {
                    let read = |bus: &Bus| {
                        let mut bytes = [0; 4];
                        bus.config_read(Some(slot), offset, &mut bytes);
                        bytes
                    };
                    prop_assert_eq!(read(&restored), read(&bus));
                }
            }
            let routes = |bus: &Bus| -> Vec<_> {
                bus.routes.read().unwrap().iter().map(|route| (route.base, route.slot)).collect()
            };
            prop_assert_eq!(routes(&restored), routes(&bus));
        }

        #[test]
        fn a_state_with_any_byte_changed_is_refused_or_does_no_harm(
            slot in 0usize..3,
            at in 0usize..256,
            byte in any::<u8>(),
            gpa in any::<u64>(),
        ) {
            let mut state = two_probes().save();
            let mut space: ConfigSpaceState =
                serde_json::from_value(state.functions[slot].state.clone()).unwrap();
            space.bytes[at] = byte;
            state.functions[slot].state = serde_json::to_value(&space).unwrap();
            let bus = two_probes();
            if bus.restore(&state).is_ok() {
                bus.memory_read(gpa, &mut [0; 8]);
                bus.memory_write(u64::from(u32::MAX) - 3, &[0; 8]);
            }
        }
    }

    #[test]
    fn the_state_of_another_bus_is_refused() {
        type Change = fn(&mut BusState);
        let cases: &[(&str, Change)] = &[
            ("2 PCI functions", |s| s.functions.truncate(2)),
            ("`probe`", |s| s.functions.swap(0, 1)),
            ("version 9", |s| s.functions[1].version = 9),
            ("cannot be read", |s| s.functions[1].state = Value::Null),
            ("read-only", |s| {
                s.functions[1].state = serde_json::json!({ "bytes": "00".repeat(256) })
            }),
            ("address register", |s| s.address = 1),
        ];
        let state = two_probes().save();
        for (complaint, change) in cases {
            let mut changed = state.clone();
            change(&mut changed);
            let error = two_probes().restore(&changed).unwrap_err().to_string();
            assert!(error.contains(complaint), "{complaint}: {error}");
        }
    }

    fn select(bus: &Bus, slot: u32, offset: u32) {
        let address = ADDRESS_ENABLE | slot << 11 | offset;
        assert!(bus.port_write(0xcf8, &address.to_le_bytes()));
    }

    fn port_dword(bus: &Bus, slot: u32, offset: u32) -> u32 {
        let mut bytes = [0; 4];
        select(bus, slot, offset);
        assert!(bus.port_read(0xcfc, &mut bytes));
        u32::from_le_bytes(bytes)
    }

    fn ecam_dword(bus: &Bus, slot: u64, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        assert!(bus.memory_read(ECAM_BASE + (slot << 15) + offset, &mut bytes));
        u32::from_le_bytes(bytes)
    }

    fn memory_byte(bus: &Bus, gpa: u64) -> Option<u8> {
        let mut byte = [0];
        bus.memory_read(gpa, &mut byte).then_some(byte[0])
    }

    #[test]
    fn scan_finds_the_bridge_and_the_functions_and_ones_elsewhere() {
        let bus = Bus::new();
        assert_eq!(bus.next_slot(), 1);
        assert_eq!(bus.add(Probe::new(7)).unwrap(), 1);
        assert_eq!(port_dword(&bus, 0, 8) >> 8, 0x06_00_00);
        assert_eq!(port_dword(&bus, 1, 0), 0x0007_1234);
        assert_eq!(ecam_dword(&bus, 1, 0), 0x0007_1234);
        assert_eq!(port_dword(&bus, 2, 0), u32::MAX);
        assert_eq!(ecam_dword(&bus, 2, 0), u32::MAX);
        // Function 1 of slot 1, and bus 1.
        assert_eq!(port_dword(&bus, 1, 0x100), u32::MAX);
        assert_eq!(port_dword(&bus, 1, 0x1_0000), u32::MAX);
        assert_eq!(ecam_dword(&bus, 1, 0x1000), u32::MAX);
    }

    #[test]
    fn data_ports_reach_bytes_and_words_of_the_selected_doubleword() {
        let bus = Bus::new();
        bus.add(Probe::new(7)).unwrap();
        select(&bus, 1, 0);
        let mut byte = [0];
        let mut word = [0; 2];
        assert!(bus.port_read(0xcfd, &mut byte));
        assert!(bus.port_read(0xcfe, &mut word));
        assert_eq!((byte, word), ([0x12], [0x07, 0x00]));
    }

    #[test]
    fn accesses_that_are_not_the_bus_s_are_left_to_others() {
        let bus = Bus::new();
        assert!(!bus.port_write(0xcf9, &[6]));
        assert!(!bus.port_read(0xcf8, &mut [0]));
        assert!(!bus.port_read(0xcff, &mut [0; 2]));
        assert!(!bus.port_read(0xd00, &mut [0]));
        assert!(!bus.memory_read(ECAM_BASE - 1, &mut [0; 4]));
        assert!(!bus.memory_read(u64::MAX, &mut [0; 8]));
    }

    #[test]
    fn disabled_address_reads_ones() {
        let bus = Bus::new();
        bus.port_write(0xcf8, &[0; 4]);
        let mut bytes = [0; 4];
        assert!(bus.port_read(0xcfc, &mut bytes));
        assert_eq!(bytes, [0xff; 4]);
    }

    #[test]
    fn added_function_gets_aligned_windows_that_work_at_once() {
        let bus = Bus::new();
        let probe = Probe::new(9);
        let heard = Arc::clone(&probe.heard);
        bus.add(Probe::new(5)).unwrap();
        bus.add(probe).unwrap();
        assert_eq!(port_dword(&bus, 2, 4) & 2, 2);
        assert_eq!(port_dword(&bus, 2, 0x3c) & 0xff, slot_gsi(2));
        let base = u64::from(port_dword(&bus, 2, 0x10));
        let wide = u64::from(port_dword(&bus, 2, 0x18) & !0xf);
        assert_eq!((base % 0x1000, wide % 0x1_0000), (0, 0));
        assert_eq!(memory_byte(&bus, base + 0xff), Some(9));
        assert_eq!(memory_byte(&bus, MMIO_BASE), Some(5));

        assert!(bus.memory_write(wide + 0x10, &[1, 2, 3]));
        assert_eq!(*heard.lock().unwrap(), [(2, 0x10, vec![1, 2, 3])]);
        // Across the end, or beyond it, there is nobody.
        assert!(!bus.memory_read(base + 0xfe, &mut [0; 4]));
        assert_eq!(memory_byte(&bus, base + 0x100), None);
    }

    #[test]
    fn moved_window_answers_only_at_its_new_place_until_reset() {
        let bus = Bus::new();
        bus.add(Probe::new(9)).unwrap();
        let old = u64::from(port_dword(&bus, 1, 0x10));
        select(&bus, 1, 0x10);
        bus.port_write(0xcfc, &0xd000_0000_u32.to_le_bytes());
        assert_eq!(memory_byte(&bus, old), None);
        assert_eq!(memory_byte(&bus, 0xd000_0000), Some(9));

        // Above 4 GiB, through ECAM with one 64-bit write.
        let register = ECAM_BASE + (1 << 15) + 0x18;
        bus.memory_write(register, &0x12_0000_0000_u64.to_le_bytes());
        assert_eq!(memory_byte(&bus, 0x12_0000_ffff), Some(9));

        select(&bus, 1, 4);
        bus.port_write(0xcfc, &[0]);
        assert_eq!(memory_byte(&bus, 0xd000_0000), None);
        bus.reset();
        assert_eq!(memory_byte(&bus, old), Some(9));
        assert_eq!(memory_byte(&bus, 0xd000_0000), None);
    }

    #[test]
    fn small_window_inside_a_large_one_does_not_hide_the_rest() {
        let bus = Bus::new();
        bus.add(Probe::new(1)).unwrap();
        bus.add(Probe::new(2)).unwrap();
        let large = u64::from(port_dword(&bus, 1, 0x18) & !0xf);
        select(&bus, 2, 0x10);
        bus.port_write(0xcfc, &((large + 0x100) as u32).to_le_bytes());
        assert_eq!(memory_byte(&bus, large + 0x80), Some(1));
        assert_eq!(memory_byte(&bus, large + 0x180), Some(2));
        assert_eq!(memory_byte(&bus, large + 0x280), Some(1));
    }

    #[test]
    fn full_bus_and_full_window_are_refused() {
        let bus = Bus::new();
        for _ in 1..SLOTS {
            bus.add(Probe::new(1)).unwrap();
        }
        assert!(matches!(bus.add(Probe::new(1)), Err(PciError::Full)));

        let mut huge = Probe::new(1);
        huge.space.add_bar(4, BarKind::Memory64, 1 << 40);
        assert!(matches!(
            Bus::new().add(huge),
            Err(PciError::NoSpace { length }) if length == 1 << 40
        ));
    }

    #[test]
    fn window_at_the_end_of_the_address_space_is_reached_and_not_overrun() {
        let bus = Bus::new();
        bus.add(Probe::new(3)).unwrap();
        for offset in [0x18, 0x1c] {
            select(&bus, 1, offset);
            bus.port_write(0xcfc, &[0xff; 4]);
        }
        assert_eq!(memory_byte(&bus, u64::MAX), Some(3));
        assert!(!bus.memory_read(u64::MAX, &mut [0; 2]));
    }
}
