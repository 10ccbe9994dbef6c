//! The thread that acts on what ends or resets a machine.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use trapgate_boot::Entry;
use trapgate_chipset::PowerRequest;
use trapgate_memory::GuestMemory;
use trapgate_pci::Bus;

use crate::board::Board;
use crate::clock::time_of_day;
use crate::config::{OnReset, OnTripleFault};
use crate::crew::{Crew, Message};
use crate::doorbells::Doorbells;
use crate::machine::Threads;
use crate::outcome::{Failure, ResetCause, TripleFault};
use crate::pc::{self, Consoles};
use crate::serial::SerialOutput;
use crate::{MachineConfig, MachineError, Outcome, lock};

/// How long the end of a machine waits for the owners of its outputs.
const DRAIN: Duration = Duration::from_secs(2);

/// What a thread said when it panicked.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "it panicked".to_owned())
}

/// What happened in the guest that ends or resets the machine.
#[derive(Debug)]
pub(crate) enum Event {
    /// The chipset was asked for it.
    Power(PowerRequest),
    /// A reset that did not come from the chipset.
    Reset(ResetCause),
    /// A processor shut down.
    TripleFault(Box<TripleFault>),
    /// What a processor's engine runs on failed it.
    Engine {
        /// Index of the processor.
        cpu: usize,
        /// What happened.
        failure: trapgate_engine::Failure,
        /// What else there is to say.
        details: Option<String>,
    },
    /// Interrupt controllers that are not the chipset's refused something.
    Controllers {
        /// What they said.
        message: String,
    },
    /// A thread ended by itself.
    Died {
        /// What the thread was for.
        thread: String,
        /// What it said.
        message: String,
    },
}

#[derive(Default)]
struct Items {
    stop: bool,
    event: Option<Event>,
}

/// What the supervisor has to act on: the first event since the machine started or was reset, and the
/// owner's wish to stop it, which goes before.
#[derive(Default)]
pub(crate) struct Agenda {
    items: Mutex<Items>,
    changed: Condvar,
}

impl Agenda {
    /// Adds an event; later ones count for nothing until the first is acted on.
    pub(crate) fn add(&self, event: Event) {
        lock(&self.items).event.get_or_insert(event);
        self.changed.notify_all();
    }

    /// The machine is to stop.
    pub(crate) fn stop(&self) {
        lock(&self.items).stop = true;
        self.changed.notify_all();
    }

    /// Waits for an event; `None` to stop. It stays on the agenda.
    fn wait(&self) -> Option<Event> {
        let nothing = |items: &mut Items| !items.stop && items.event.is_none();
        let mut items = self
            .changed
            .wait_while(lock(&self.items), nothing)
            .unwrap_or_else(PoisonError::into_inner);
        if items.stop {
            return None;
        }
        items.event.take()
    }

    /// Forgets an event that came while the processors were being stopped.
    fn clear(&self) {
        lock(&self.items).event = None;
    }
}

/// Stands a machine still: processors, devices, clock.
pub(crate) struct Brake {
    depth: Mutex<usize>,
    /// Held by whoever changes a machine that stands still, or needs it not to be changed.
    changes: Mutex<()>,
    crew: Arc<Crew>,
    bus: Arc<Bus>,
    pub(crate) doorbells: Option<Arc<Doorbells>>,
    board: Arc<Board>,
}

impl Brake {
    /// A brake that is engaged once.
    pub(crate) fn new(
        crew: Arc<Crew>,
        bus: Arc<Bus>,
        doorbells: Option<Arc<Doorbells>>,
        board: Arc<Board>,
    ) -> Self {
        Self {
            depth: Mutex::new(1),
            changes: Mutex::new(()),
            crew,
            bus,
            doorbells,
            board,
        }
    }

    /// Stops the processors; devices know all that these did.
    fn stop_processors(&self) {
        self.crew.stop();
        if let Some(doorbells) = &self.doorbells {
            doorbells.drain();
        }
    }

    /// Keeps others from changing the machine while it stands still: several may want it to, and a
    /// reset is not to come into the middle of a snapshot. To be held before [`Self::engage`].
    pub(crate) fn hold_changes(&self) -> MutexGuard<'_, ()> {
        lock(&self.changes)
    }

    /// Stands the machine still, and waits until it does.
    pub(crate) fn engage(&self) {
        let mut depth = lock(&self.depth);
        if *depth == 0 {
            self.stop_processors();
            self.bus.pause();
            self.board.pause();
        }
        *depth += 1;
    }

    /// Undoes one [`Self::engage`]; the last one lets the machine go on.
    pub(crate) fn release(&self) {
        let mut depth = lock(&self.depth);
        *depth -= 1;
        if *depth == 0 {
            self.board.resume();
            self.bus.resume();
            self.crew.go();
        }
    }
}

/// How the machine ended, once it has.
#[derive(Default)]
pub(crate) struct Ending {
    outcome: OnceLock<Outcome>,
    ended: Mutex<bool>,
    changed: Condvar,
}

impl Ending {
    /// The first counts: there is one supervisor, which sets this last, and who watches over the memory.
    pub(crate) fn set(&self, outcome: Outcome) {
        let _ = self.outcome.set(outcome);
        *lock(&self.ended) = true;
        self.changed.notify_all();
    }

    pub(crate) fn wait(&self) -> &Outcome {
        self.outcome.wait()
    }

    pub(crate) fn wait_for(&self, limit: Duration) -> Option<&Outcome> {
        let ended = lock(&self.ended);
        drop(
            self.changed
                .wait_timeout_while(ended, limit, |ended| !*ended),
        );
        self.outcome.get()
    }
}

/// What the supervisor works with.
pub(crate) struct Supervisor {
    pub(crate) config: Arc<MachineConfig>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) board: Arc<Board>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) crew: Arc<Crew>,
    pub(crate) agenda: Arc<Agenda>,
    pub(crate) brake: Arc<Brake>,
    pub(crate) serial: Arc<SerialOutput>,
    pub(crate) consoles: Arc<Consoles>,
    pub(crate) ending: Arc<Ending>,
    pub(crate) resets: Arc<AtomicU64>,
    pub(crate) threads: Threads,
}

impl Supervisor {
    /// The body of the thread.
    pub(crate) fn run(self) {
        // Whoever waits for the end must hear of it, whatever is wrong with us.
        let work = catch_unwind(AssertUnwindSafe(|| {
            let outcome = loop {
                if let Some(outcome) = self.next() {
                    break outcome;
                }
            };
            self.drain();
            outcome
        }));
        let outcome = work.unwrap_or_else(|panic| {
            Outcome::Failed(Failure::Thread {
                thread: "the supervisor".to_owned(),
                message: panic_message(&*panic),
            })
        });
        let Self {
            threads,
            bus,
            ending,
            ..
        } = self;
        drop(threads);
        // Disks finish what they have begun.
        bus.pause();
        ending.set(outcome);
    }

    /// Acts on one event; gives the outcome if the machine is to end.
    fn next(&self) -> Option<Outcome> {
        let reset = |cause| match self.config.on_reset {
            OnReset::End => Some(Outcome::Reset(cause)),
            OnReset::Restart => self
                .restart()
                .err()
                .map(|error| Outcome::Failed(Failure::Restart(error))),
        };
        let Some(event) = self.agenda.wait() else {
            return Some(Outcome::Stopped);
        };
        match event {
            Event::Power(PowerRequest::Off) => Some(Outcome::PoweredOff),
            Event::Power(PowerRequest::Exit(status)) => Some(Outcome::Exited(status)),
            Event::Power(PowerRequest::Reset(cause)) => reset(ResetCause::Chipset(cause)),
            Event::Reset(cause) => reset(cause),
            Event::TripleFault(fault) => match self.config.on_triple_fault {
                OnTripleFault::Report => Some(Outcome::TripleFault(fault)),
                OnTripleFault::Reset => reset(ResetCause::TripleFault),
            },
            Event::Engine {
                cpu,
                failure,
                details,
            } => Some(Outcome::Failed(Failure::Engine {
                cpu,
                failure,
                details,
            })),
            Event::Controllers { message } => {
                Some(Outcome::Failed(Failure::Controllers { message }))
            }
            Event::Died { thread, message } => {
                Some(Outcome::Failed(Failure::Thread { thread, message }))
            }
        }
    }

    /// Does what the reset line of a PC and its firmware do.
    fn restart(&self) -> Result<(), MachineError> {
        let _changes = self.brake.hold_changes();
        self.brake.engage();
        // Nothing moves now: whatever else was reported belongs to the machine as it was.
        self.agenda.clear();
        self.bus.reset();
        self.memory.zero()?;
        self.forget_code();
        let epoch = time_of_day();
        self.board.reset(pc::chipset(&self.config, epoch)?, epoch);
        let entry = pc::load_kernel(&self.config, &self.memory)?;
        start_processors(&self.config, &self.crew, entry);
        self.resets.fetch_add(1, Ordering::Relaxed);
        self.crew.release();
        self.brake.release();
        Ok(())
    }

    /// Has the processors give back the memory of code that is gone: what unpacks the kernel needs some now.
    fn forget_code(&self) {
        let (done, all_done) = mpsc::channel();
        for cpu in 0..self.config.cpus as usize {
            self.crew.post(cpu, Message::ForgetCode(done.clone()));
        }
        drop(done);
        // It ends when each has said so, or ended.
        all_done.iter().count();
    }

    /// Stops the processors and lets the guest's last words out.
    fn drain(&self) {
        self.brake.stop_processors();
        let until = Instant::now() + DRAIN;
        let left = || until.saturating_duration_since(Instant::now());
        let Consoles {
            terminal, ports, ..
        } = &*self.consoles;
        for console in [terminal, ports].into_iter().flatten() {
            console.drain(left());
        }
        self.serial.drain(left());
    }
}

/// Gives every processor the state that firmware leaves it in: the first about to run the kernel, the
/// others waiting.
pub(crate) fn start_processors(config: &MachineConfig, crew: &Crew, entry: Entry) {
    crew.post(0, Message::Start(Box::new(entry.cpu)));
    for cpu in 1..config.cpus as usize {
        let state = trapgate_boot::application_processor();
        crew.post(cpu, Message::Start(Box::new(state)));
    }
}
