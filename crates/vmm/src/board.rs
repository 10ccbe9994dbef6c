//! The chipset with everything that its effects reach.

use std::collections::VecDeque;
use std::error::Error;
use std::num::NonZeroU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use trapgate_chipset::{Chipset, ChipsetState, CpuSignal, Effects};
use trapgate_engine::Signal;
use trapgate_pci::{InterruptLine, Message as MsiMessage, MessageSink};

use crate::clock::Clock;
use crate::controllers::Controllers;
use crate::crew::{Crew, Message};
use crate::lock;
use crate::serial::SerialOutput;
use crate::supervisor::{Agenda, Event};

/// Bytes of serial input that wait for the guest.
const SERIAL_BUFFER: usize = 64 << 10;
/// The shortest sleep until a timer: what a deadline that has passed and yet stays costs.
const SHORTEST_SLEEP: Duration = Duration::from_micros(20);

struct Cell {
    chipset: Chipset,
    /// Kept for its buffers.
    effects: Effects,
    /// When the timer thread is going to look next.
    armed: u64,
    /// Input that the guest's receiver has had no room for.
    serial_input: VecDeque<u8>,
    /// Timers fire.
    running: bool,
    ended: bool,
}

/// The chipset, its clock, and whom it signals. Everything reaches the chipset through
/// [`Self::operate`].
pub(crate) struct Board {
    pub(crate) clock: Clock,
    cell: Mutex<Cell>,
    timer: Condvar,
    serial_room: Condvar,
    crew: Arc<Crew>,
    agenda: Arc<Agenda>,
    serial: Arc<SerialOutput>,
    /// Whoever has the interrupt controllers while the machine runs, if the chipset has not.
    controllers: OnceLock<Arc<dyn Controllers>>,
    /// They are there now. Whoever reads it keeps them there meanwhile; it is written with the cell locked.
    are_lent: RwLock<bool>,
}

impl Board {
    /// A board whose timers stand still.
    pub(crate) fn new(
        chipset: Chipset,
        clock: Clock,
        crew: Arc<Crew>,
        agenda: Arc<Agenda>,
        serial: Arc<SerialOutput>,
    ) -> Self {
        Self {
            clock,
            cell: Mutex::new(Cell {
                chipset,
                effects: Effects::default(),
                armed: u64::MAX,
                serial_input: VecDeque::new(),
                running: false,
                ended: false,
            }),
            timer: Condvar::new(),
            serial_room: Condvar::new(),
            crew,
            agenda,
            serial,
            controllers: OnceLock::new(),
            are_lent: RwLock::default(),
        }
    }

    /// From now on the interrupt controllers are somebody else's whenever the machine runs. It stands
    /// still.
    pub(crate) fn lend_controllers_to(&self, controllers: Arc<dyn Controllers>) {
        // A second call is a defect of the caller and changes nothing.
        let _ = self.controllers.set(controllers);
    }

    fn lend_controllers(&self, cell: &mut Cell) {
        let Some(controllers) = self.controllers.get() else {
            return;
        };
        let now = self.clock.now();
        let (state, levels) = cell.chipset.lend_controllers(now);
        self.check(controllers.give(&state, levels, now));
        self.set_lent(true);
        self.settle(cell, now);
    }

    fn take_back_controllers(&self, cell: &mut Cell) {
        let Some(controllers) = self.controllers.get() else {
            return;
        };
        if !cell.chipset.controllers_are_lent() {
            return;
        }
        let now = self.clock.now();
        self.set_lent(false);
        let taken = controllers.take().and_then(|state| {
            cell.chipset
                .take_back_controllers(&state, now)
                .map_err(Into::into)
        });
        self.check(taken);
        self.settle(cell, now);
    }

    fn set_lent(&self, are_lent: bool) {
        *self
            .are_lent
            .write()
            .unwrap_or_else(PoisonError::into_inner) = are_lent;
    }

    /// What the interrupt controllers refuse ends the machine: it would hang.
    fn check(&self, result: Result<(), Box<dyn Error + Send + Sync>>) {
        if let Err(error) = result {
            let mut message = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                message += &format!(": {error}");
                cause = error.source();
            }
            self.report(Event::Controllers { message });
        }
    }

    /// Does something with the chipset, at the present time, and lets its effects happen.
    pub(crate) fn operate<R>(&self, operation: impl FnOnce(&mut Chipset, u64) -> R) -> R {
        let mut cell = lock(&self.cell);
        let now = self.clock.now();
        let result = operation(&mut cell.chipset, now);
        self.settle(&mut cell, now);
        result
    }

    /// As [`Self::operate`], for a processor's port write: waits a little if it made serial output that
    /// the host is slow to take.
    pub(crate) fn operate_port<R>(&self, operation: impl FnOnce(&mut Chipset, u64) -> R) -> R {
        let mut cell = lock(&self.cell);
        let now = self.clock.now();
        let result = operation(&mut cell.chipset, now);
        let sent = self.settle(&mut cell, now);
        drop(cell);
        if sent {
            self.serial.throttle();
        }
        result
    }

    /// Lets the effects of an operation happen; whether there was serial output among them.
    fn settle(&self, cell: &mut Cell, now: u64) -> bool {
        let mut sent = false;
        while cell.chipset.has_effects() {
            let Cell {
                chipset, effects, ..
            } = cell;
            chipset.swap_effects(effects);
            for signal in &effects.signals {
                match signal.kind {
                    CpuSignal::Interrupt => self.crew.raise(signal.cpu, Signal::Interrupt),
                    CpuSignal::Nmi => self.crew.raise(signal.cpu, Signal::Nmi),
                    CpuSignal::Init => self.crew.post(signal.cpu, Message::Init),
                    CpuSignal::Sipi(vector) => {
                        self.crew.post(signal.cpu, Message::StartUp(vector));
                    }
                }
            }
            if let Some(controllers) = self.controllers.get() {
                for &(gsi, level) in &effects.lines {
                    self.check(controllers.set_line(gsi, level));
                }
                for &(address, data) in &effects.messages {
                    self.check(controllers.send_message(address, data));
                }
            }
            if let Some(request) = effects.power {
                self.report(Event::Power(request));
            }
            let output = &effects.serial[0];
            if !output.is_empty() {
                self.serial.push(output);
                sent = true;
            }
            if effects.serial_room[0] {
                self.feed(cell, now);
            }
        }
        if let Some(deadline) = cell.chipset.next_deadline()
            && deadline < cell.armed
            && cell.running
        {
            cell.armed = deadline;
            self.timer.notify_one();
        }
        sent
    }

    /// Something happened that ends or resets the machine. The processors stop as soon as they can;
    /// the supervisor does the rest.
    pub(crate) fn report(&self, event: Event) {
        self.crew.hold();
        self.agenda.add(event);
    }

    // Time

    /// Fires timers when they are due, until [`Self::end`]. The body of the timer thread.
    pub(crate) fn run_timer(&self) {
        // The kernel may let a sleeper of no special kind be late by 50 µs, to save wake-ups. A guest
        // sees that in its own timers.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        let mut cell = lock(&self.cell);
        while !cell.ended {
            if !cell.running {
                cell.armed = u64::MAX;
                cell = self.wait_timer(cell, None);
                continue;
            }
            self.fire(&mut cell);
            let deadline = cell.chipset.next_deadline();
            cell.armed = deadline.unwrap_or(u64::MAX);
            let limit = deadline.map(|deadline| self.until(deadline));
            cell = self.wait_timer(cell, limit);
        }
    }

    /// How long it is until the local APIC timer of a processor is due; `None` if it is not armed, or time stands still.
    /// A processor that waits for nothing else may sleep so long and then call [`Self::fire_timers`].
    pub(crate) fn until_own_timer(&self, cpu: usize) -> Option<Duration> {
        let cell = lock(&self.cell);
        let deadline = cell.chipset.own_deadline(cpu).filter(|_| cell.running)?;
        Some(self.until(deadline))
    }

    /// Fires what is due, as the timer thread would in a moment.
    pub(crate) fn fire_timers(&self) {
        let mut cell = lock(&self.cell);
        if cell.running {
            self.fire(&mut cell);
        }
    }

    fn fire(&self, cell: &mut Cell) {
        let now = self.clock.now();
        cell.chipset.advance(now);
        self.settle(cell, now);
    }

    fn until(&self, deadline: u64) -> Duration {
        let left = deadline.saturating_sub(self.clock.now());
        Duration::from_nanos(left).max(SHORTEST_SLEEP)
    }

    fn wait_timer<'a>(
        &self,
        cell: MutexGuard<'a, Cell>,
        limit: Option<Duration>,
    ) -> MutexGuard<'a, Cell> {
        match limit {
            None => self
                .timer
                .wait(cell)
                .unwrap_or_else(PoisonError::into_inner),
            Some(limit) => {
                self.timer
                    .wait_timeout(cell, limit)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        }
    }

    /// Stops the clock and the timers.
    pub(crate) fn pause(&self) {
        let mut cell = lock(&self.cell);
        cell.running = false;
        self.clock.pause();
        self.take_back_controllers(&mut cell);
    }

    /// Lets clock and timers go on.
    pub(crate) fn resume(&self) {
        let mut cell = lock(&self.cell);
        let away = self.clock.resume();
        let now = self.clock.now();
        cell.chipset.time_of_day_went_on(away, now);
        self.settle(&mut cell, now);
        self.lend_controllers(&mut cell);
        cell.running = true;
        self.timer.notify_one();
    }

    /// The state of the chipset, and the input that waits for COM1.
    pub(crate) fn save(&self) -> (ChipsetState, Vec<u8>) {
        let cell = lock(&self.cell);
        let Cell {
            chipset,
            // Emptied with each operation.
            effects: _,
            // Of the threads, which are not saved.
            armed: _,
            running: _,
            ended: _,
            serial_input,
        } = &*cell;
        (chipset.save(), serial_input.iter().copied().collect())
    }

    /// Takes back input that waited for COM1; no more than there is room for.
    pub(crate) fn restore_serial_input(&self, waiting: &[u8]) {
        let waiting = waiting.iter().take(SERIAL_BUFFER);
        lock(&self.cell).serial_input = waiting.copied().collect();
    }

    /// Puts another chipset into the place of the one that was there, and the clock, which stands
    /// still, to zero.
    pub(crate) fn reset(&self, chipset: Chipset, epoch: u64) {
        let mut cell = lock(&self.cell);
        self.clock.restart(epoch);
        cell.chipset = chipset;
        cell.effects.clear();
        cell.armed = u64::MAX;
        cell.serial_input.clear();
        self.serial_room.notify_all();
    }

    /// Ends the timer thread, and serial input.
    pub(crate) fn end(&self) {
        lock(&self.cell).ended = true;
        self.timer.notify_all();
        self.serial_room.notify_all();
    }

    // Serial input

    fn feed(&self, cell: &mut Cell, now: u64) {
        let Cell {
            chipset,
            serial_input,
            ..
        } = cell;
        if serial_input.is_empty() {
            return;
        }
        let taken = chipset.serial_receive(0, serial_input.make_contiguous(), now);
        serial_input.drain(..taken);
        self.serial_room.notify_all();
    }

    /// Takes input for COM1; how many bytes of it.
    pub(crate) fn serial_input(&self, data: &[u8]) -> usize {
        let mut cell = lock(&self.cell);
        if cell.ended {
            return 0;
        }
        let taken = data.len().min(SERIAL_BUFFER - cell.serial_input.len());
        cell.serial_input.extend(&data[..taken]);
        let now = self.clock.now();
        self.feed(&mut cell, now);
        self.settle(&mut cell, now);
        taken
    }

    /// Waits until there is room for serial input; `false` if there never will be again.
    pub(crate) fn wait_for_serial_room(&self) -> bool {
        let cell = lock(&self.cell);
        let full = |cell: &mut Cell| !cell.ended && cell.serial_input.len() >= SERIAL_BUFFER;
        let cell = self
            .serial_room
            .wait_while(cell, full)
            .unwrap_or_else(PoisonError::into_inner);
        !cell.ended
    }
}

impl MessageSink for Board {
    fn send(&self, message: MsiMessage) {
        // Past the chipset, which would only pass it on.
        if let Some(controllers) = self.controllers.get() {
            let are_lent = self.are_lent.read().unwrap_or_else(PoisonError::into_inner);
            if *are_lent {
                self.check(controllers.send_message(message.address, message.data));
                return;
            }
        }
        self.operate(|chipset, _| chipset.send_msi(message.address, message.data));
    }
}

/// A line from outside of the chipset to an interrupt controller's input.
pub(crate) struct Line {
    pub(crate) board: Arc<Board>,
    pub(crate) gsi: u32,
}

impl InterruptLine for Line {
    fn set(&self, asserted: bool) {
        self.board
            .operate(|chipset, now| chipset.set_line(self.gsi, asserted, now));
    }
}
