//! Doorbells of devices that ring without their processor leaving the guest, where an engine can do that.
//!
//! A doorbell rings by an event of the host's kernel from its second ring on: the first one left the guest, came
//! through the bus, and had the event made. So what nobody rings costs nothing, and neither starting a machine nor
//! restoring one takes longer. A thread rings the devices.
//!
//! Whatever was rung before a pause is with its device when the pause begins ([`Doorbells::drain`]); a doorbell whose
//! window moves rings what was rung until then, and is forgotten.

use std::collections::HashMap;
use std::error::Error;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, Weak};

use trapgate_kvm::KvmMachine;
use trapgate_pci::{Bus, Doorbell, DoorbellListener};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::lock;
use crate::world::CHIPSET_MEMORY;

/// An engine that signals an event when the guest writes a doorbell.
pub(crate) trait Ringer: Send + Sync {
    /// From now on it does, for a write of [`trapgate_pci::DOORBELL_BYTES`] at `gpa`.
    fn ring_by_event(&self, gpa: u64, event: &EventFd) -> Result<(), Box<dyn Error>>;
    /// From now on it does not.
    fn ring_by_exit(&self, gpa: u64, event: &EventFd) -> Result<(), Box<dyn Error>>;
}

impl Ringer for KvmMachine {
    fn ring_by_event(&self, gpa: u64, event: &EventFd) -> Result<(), Box<dyn Error>> {
        Ok(KvmMachine::ring_by_event(self, gpa, event)?)
    }

    fn ring_by_exit(&self, gpa: u64, event: &EventFd) -> Result<(), Box<dyn Error>> {
        Ok(KvmMachine::ring_by_exit(self, gpa, event)?)
    }
}

/// The most of them: a file descriptor each. Others leave the guest.
const MOST: usize = 256;
/// What the epoll set calls the event that ends the thread.
const END: u64 = 0;

struct Bell {
    doorbell: Doorbell,
    event: EventFd,
}

impl Bell {
    /// Rings the device if the doorbell has rung since the last time.
    fn answer(&self, bus: &Bus) {
        if self.event.read().is_ok() {
            bus.ring(self.doorbell);
        }
    }
}

struct State {
    /// By what the epoll set calls them.
    bells: HashMap<u64, Bell>,
    /// The next name.
    next: u64,
    /// One was refused since windows last moved.
    full: bool,
    ended: bool,
}

/// The doorbells of a machine that ring by events.
///
/// The state's lock comes after the bus's configuration and before functions, which are rung with it held: so whoever
/// has it knows that nothing is halfway between event and device.
pub(crate) struct Doorbells {
    ringer: Arc<dyn Ringer>,
    bus: Weak<Bus>,
    epoll: Epoll,
    end: EventFd,
    state: Mutex<State>,
}

impl Doorbells {
    /// Listens to the doorbells of a bus. [`Self::run`] is to have a thread.
    pub(crate) fn new(bus: &Arc<Bus>, ringer: Arc<dyn Ringer>) -> io::Result<Arc<Self>> {
        let epoll = Epoll::new()?;
        let end = EventFd::new(EFD_NONBLOCK)?;
        watch(&epoll, &end, END)?;
        let doorbells = Arc::new(Self {
            ringer,
            bus: Arc::downgrade(bus),
            epoll,
            end,
            state: Mutex::new(State {
                bells: HashMap::new(),
                next: END + 1,
                full: false,
                ended: false,
            }),
        });
        bus.listen_to_doorbells(Arc::clone(&doorbells) as Arc<dyn DoorbellListener>);
        Ok(doorbells)
    }

    /// Rings devices until [`Self::end`]. The body of the thread.
    ///
    /// # Errors
    /// Nobody can wait for events any more.
    pub(crate) fn run(&self) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 16];
        loop {
            let ready = match self.epoll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let state = lock(&self.state);
            let Some(bus) = self.bus.upgrade().filter(|_| !state.ended) else {
                return Ok(());
            };
            for event in &events[..ready] {
                // It may be gone since, and was answered then.
                if let Some(bell) = state.bells.get(&event.data()) {
                    bell.answer(&bus);
                }
            }
        }
    }

    /// Rings every device whose doorbell has rung until now. No processor runs.
    pub(crate) fn drain(&self) {
        let state = lock(&self.state);
        if let Some(bus) = self.bus.upgrade() {
            for bell in state.bells.values() {
                bell.answer(&bus);
            }
        }
    }

    /// Ends the thread.
    pub(crate) fn end(&self) {
        lock(&self.state).ended = true;
        // The counter cannot be full.
        let _ = self.end.write(1);
    }

    fn hang(&self, state: &mut State, doorbell: Doorbell) -> Result<(), Box<dyn Error>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        watch(&self.epoll, &event, state.next)?;
        // The epoll set forgets an event that is closed.
        self.ringer.ring_by_event(doorbell.gpa, &event)?;
        state.bells.insert(state.next, Bell { doorbell, event });
        state.next += 1;
        Ok(())
    }

    /// How many doorbells ring by events.
    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        lock(&self.state).bells.len()
    }
}

fn watch(epoll: &Epoll, event: &EventFd, name: u64) -> io::Result<()> {
    let readable = EpollEvent::new(EventSet::IN, name);
    epoll.ctl(ControlOperation::Add, event.as_raw_fd(), readable)
}

impl DoorbellListener for Doorbells {
    fn rung(&self, doorbell: Doorbell) {
        let mut state = lock(&self.state);
        let known = |bell: &Bell| bell.doorbell.gpa == doorbell.gpa;
        // What the chipset may claim is not the bus's alone.
        let shared = CHIPSET_MEMORY.contains(&doorbell.gpa);
        let full = state.full || state.bells.len() >= MOST;
        if state.ended || shared || full || state.bells.values().any(known) {
            return;
        }
        // No descriptors are left, or the kernel has no room, or it has something of its own there: it goes
        // on as it did.
        state.full = self.hang(&mut state, doorbell).is_err();
    }

    fn moved(&self, stays: &dyn Fn(Doorbell) -> bool) {
        let mut state = lock(&self.state);
        state.full = false;
        let bus = self.bus.upgrade();
        state.bells.retain(|_, bell| {
            if stays(bell.doorbell) {
                return true;
            }
            // The kernel takes back what it was given, from whom it was given it.
            let _ = self.ringer.ring_by_exit(bell.doorbell.gpa, &bell.event);
            if let Some(bus) = &bus {
                bell.answer(bus);
            }
            false
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    use trapgate_pci::{
        BarKind, ConfigSpace, DOORBELL_BYTES, Function, Identity, SavedFunction, StateError, Window,
    };

    use super::*;

    /// A function with a doorbell where its window begins.
    struct Device {
        space: ConfigSpace,
        rung: Arc<AtomicU64>,
    }

    impl Function for Device {
        fn config_read(&mut self, offset: u16, data: &mut [u8]) {
            self.space.read(offset, data);
        }
        fn config_write(&mut self, offset: u16, data: &[u8]) {
            self.space.write(offset, data);
        }
        fn windows(&self) -> Vec<Window> {
            self.space.windows()
        }
        fn bar_read(&mut self, _bar: u8, _offset: u64, _data: &mut [u8]) {}
        fn bar_write(&mut self, _bar: u8, offset: u64, _data: &[u8]) {
            self.rung.fetch_add(u64::from(offset == 0), Relaxed);
        }
        fn is_doorbell(&self, _bar: u8, offset: u64) -> bool {
            offset == 0
        }
        fn reset(&mut self) {}
        fn save(&mut self) -> SavedFunction {
            SavedFunction::new("device", 1, &())
        }
        fn restore(&mut self, _saved: &SavedFunction) -> Result<(), StateError> {
            Ok(())
        }
    }

    /// Listens to addresses as the host's kernel does: one event for each.
    #[derive(Default)]
    struct Kernel(Mutex<HashMap<u64, EventFd>>);

    impl Ringer for Kernel {
        fn ring_by_event(&self, gpa: u64, event: &EventFd) -> Result<(), Box<dyn Error>> {
            let mut events = lock(&self.0);
            if events.contains_key(&gpa) {
                return Err("the place is taken".into());
            }
            events.insert(gpa, event.try_clone()?);
            Ok(())
        }

        fn ring_by_exit(&self, gpa: u64, _event: &EventFd) -> Result<(), Box<dyn Error>> {
            lock(&self.0).remove(&gpa).ok_or("nobody listens")?;
            Ok(())
        }
    }

    /// Two devices, whose windows the guest may place, in the slots 1 and 2.
    struct Bench {
        bus: Arc<Bus>,
        kernel: Arc<Kernel>,
        doorbells: Arc<Doorbells>,
        rung: [Arc<AtomicU64>; 2],
    }

    const PLACES: [u64; 3] = [0xc800_0000, 0xc900_0000, 0xca00_0000];

    fn bench() -> Bench {
        let bus = Arc::new(Bus::new());
        let kernel = Arc::<Kernel>::default();
        let doorbells = Doorbells::new(&bus, Arc::clone(&kernel) as Arc<dyn Ringer>).unwrap();
        let rung = <[Arc<AtomicU64>; 2]>::default();
        for rung in &rung {
            let mut space = ConfigSpace::new(Identity {
                vendor: 0x1234,
                device: 1,
                revision: 0,
                class: 0xff_00_00,
                subsystem_vendor: 0,
                subsystem: 0,
            });
            space.add_bar(0, BarKind::Memory32, 0x1000);
            let rung = Arc::clone(rung);
            bus.add(Device { space, rung }).unwrap();
        }
        let bench = Bench {
            bus,
            kernel,
            doorbells,
            rung,
        };
        bench.place(1, PLACES[0]);
        bench.place(2, PLACES[1]);
        bench
    }

    impl Bench {
        fn place(&self, slot: u32, gpa: u64) {
            let select = 1 << 31 | slot << 11 | 0x10;
            self.bus.port_write(0xcf8, &select.to_le_bytes());
            self.bus.port_write(0xcfc, &(gpa as u32).to_le_bytes());
        }

        /// What the guest does; whether the kernel kept it to itself.
        fn write(&self, gpa: u64) -> bool {
            if let Some(event) = lock(&self.kernel.0).get(&gpa) {
                event.write(1).unwrap();
                return true;
            }
            self.bus.memory_write(gpa, &[0; DOORBELL_BYTES]);
            false
        }

        /// How often each device was rung.
        fn rung(&self) -> [u64; 2] {
            self.rung.each_ref().map(|rung| rung.load(Relaxed))
        }
    }

    #[test]
    fn doorbell_rings_by_event_from_the_second_time_on() {
        let bench = bench();
        assert!(!bench.write(PLACES[0]));
        assert!(bench.write(PLACES[0]));
        assert_eq!(bench.rung(), [1, 0]);
        bench.doorbells.drain();
        assert_eq!(bench.rung(), [2, 0]);
        bench.doorbells.drain();
        assert_eq!(bench.rung(), [2, 0]);
    }

    #[test]
    fn window_that_moves_takes_what_was_rung_with_it() {
        let bench = bench();
        bench.write(PLACES[0]);
        assert!(bench.write(PLACES[0]));
        bench.place(1, PLACES[2]);
        assert_eq!(bench.rung(), [2, 0]);
        assert!(!bench.write(PLACES[0]));
        assert!(!bench.write(PLACES[2]));
        assert!(bench.write(PLACES[2]));
        bench.doorbells.drain();
        assert_eq!((bench.rung(), bench.doorbells.count()), ([4, 0], 1));
    }

    #[test]
    fn window_over_another_has_its_rings_until_it_goes() {
        let bench = bench();
        bench.write(PLACES[0]);
        bench.write(PLACES[1]);
        assert!(bench.write(PLACES[0]) && bench.write(PLACES[1]));
        bench.place(2, PLACES[0]);
        assert_eq!((bench.rung(), bench.doorbells.count()), ([2, 2], 0));
        assert!(!bench.write(PLACES[0]));
        assert!(bench.write(PLACES[0]));
        bench.place(2, PLACES[1]);
        assert_eq!(bench.rung(), [2, 4]);
        assert!(!bench.write(PLACES[0]));
        assert!(bench.write(PLACES[0]));
        bench.doorbells.drain();
        assert_eq!(bench.rung(), [4, 4]);
    }

    #[test]
    fn doorbell_that_the_kernel_refuses_rings_as_before_and_is_tried_again_after_a_move() {
        let bench = bench();
        let taken = EventFd::new(EFD_NONBLOCK).unwrap();
        // Refused for the write that is under way, and heard by the bus.
        bench.kernel.ring_by_event(PLACES[0], &taken).unwrap();
        for _ in 0..3 {
            bench.bus.memory_write(PLACES[0], &[0; DOORBELL_BYTES]);
            assert!(!bench.write(PLACES[1]));
        }
        assert_eq!((bench.rung(), bench.doorbells.count()), ([3, 3], 0));
        bench.place(1, PLACES[2]);
        assert!(!bench.write(PLACES[1]));
        assert!(bench.write(PLACES[1]));
        bench.doorbells.drain();
        assert_eq!(bench.rung(), [3, 5]);
    }
}
