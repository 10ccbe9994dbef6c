//! The thread of a processor.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use trapgate_engine::{Costs, Counter, Exit, Signal, Signals, Vcpu};
use trapgate_x86::{Activity, CpuState};

use crate::alarm::Alarm;
use crate::board::Board;
use crate::crew::{Crew, Message, Next};
use crate::outcome::{ProcessorCounters, ResetCause, TripleFault};
use crate::supervisor::Event;
use crate::turns::Turns;

/// What a processor did, for others to read. Brought up to date at every exit.
#[derive(Default)]
pub(crate) struct Tally {
    instructions: AtomicU64,
    halts: AtomicU64,
    kicks: AtomicU64,
    /// Runs the guest: its numbers are those of its last exit.
    inside: AtomicBool,
    exits: AtomicU64,
    /// What the engine keeps.
    pub(crate) engine: Vec<Counter>,
    /// What the engine spends time on.
    pub(crate) costs: Option<Arc<dyn Costs>>,
}

impl Tally {
    pub(crate) fn of(vcpu: &dyn Vcpu) -> Self {
        Self {
            engine: vcpu.counters(),
            costs: vcpu.costs(),
            ..Self::default()
        }
    }

    /// How often the processor has left the guest, if it is in it.
    pub(crate) fn inside(&self) -> Option<u64> {
        let exits = self.exits.load(Ordering::Acquire);
        self.inside.load(Ordering::Acquire).then_some(exits)
    }

    /// Whether the processor has told its numbers since it had left the guest so many times.
    pub(crate) fn told_since(&self, exits: u64) -> bool {
        self.exits.load(Ordering::Acquire) != exits
    }

    pub(crate) fn read(&self) -> ProcessorCounters {
        ProcessorCounters {
            instructions: self.instructions.load(Ordering::Relaxed),
            halts: self.halts.load(Ordering::Relaxed),
            kicks: self.kicks.load(Ordering::Relaxed),
        }
    }
}

/// Says that a processor's thread has ended.
struct Finished {
    crew: Arc<Crew>,
    index: usize,
}

impl Drop for Finished {
    fn drop(&mut self) {
        self.crew.finished(self.index);
    }
}

/// A processor and what its thread needs.
pub(crate) struct Processor {
    pub(crate) index: usize,
    pub(crate) vcpu: Box<dyn Vcpu>,
    pub(crate) signals: Arc<Signals>,
    pub(crate) board: Arc<Board>,
    pub(crate) crew: Arc<Crew>,
    /// Where several processors may not run at once.
    pub(crate) turns: Option<Arc<Turns>>,
    pub(crate) tally: Arc<Tally>,
    /// For its local APIC's timer, while it is halted.
    pub(crate) alarm: Alarm,
}

impl Processor {
    /// The body of the thread.
    pub(crate) fn run(mut self) {
        // Also if it panics: nobody must wait for this thread then.
        let _finished = Finished {
            crew: Arc::clone(&self.crew),
            index: self.index,
        };
        // As the timer thread: this one wakes for timers as well.
        let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
        self.work();
    }

    fn work(&mut self) {
        loop {
            match self.crew.next(self.index) {
                Next::Finish => return,
                Next::Message(message) => self.obey(message),
                Next::Run => self.enter(),
            }
        }
    }

    fn enter(&mut self) {
        let exit = {
            let _turn = self.turns.as_deref().map(|turns| turns.take(self.index));
            self.tally.inside.store(true, Ordering::Release);
            self.vcpu.run()
        };
        let Tally {
            instructions,
            halts,
            kicks,
            inside,
            exits,
            ..
        } = &*self.tally;
        instructions.store(self.vcpu.instructions(), Ordering::Relaxed);
        inside.store(false, Ordering::Release);
        exits.fetch_add(1, Ordering::Release);
        match exit {
            Exit::Halted => {
                halts.fetch_add(1, Ordering::Relaxed);
                match self.board.until_own_timer(self.index) {
                    None => self.signals.sleep(None),
                    // Left to the timer thread it would take two of the host's wake-ups, one after the other.
                    Some(limit) => {
                        self.alarm.sleep(&self.signals, limit);
                        if !self.signals.any() {
                            self.board.fire_timers();
                        }
                    }
                }
            }
            Exit::Kicked | Exit::Debug => {
                kicks.fetch_add(1, Ordering::Relaxed);
            }
            Exit::ShutDown => {
                let state = self.vcpu.state();
                self.board.report(Event::TripleFault(Box::new(TripleFault {
                    cpu: self.index,
                    state,
                })));
            }
            Exit::Failed(failure) => self.board.report(Event::Engine {
                cpu: self.index,
                failure,
                details: self.vcpu.explain(),
            }),
        }
    }

    fn obey(&mut self, message: Message) {
        match message {
            // The boot processor would go on at the reset vector, in firmware, which is not there.
            // What firmware makes of it is a reset.
            Message::Init if self.index == 0 => {
                self.board.report(Event::Reset(ResetCause::Init));
            }
            Message::Init => {
                let state = self.vcpu.state().init(false);
                self.change(&state);
            }
            Message::StartUp(vector) => {
                let mut state = self.vcpu.state();
                if state.system.activity == Activity::WaitForSipi {
                    state.start_up(vector);
                    self.change(&state);
                }
            }
            Message::Start(state) => {
                for signal in [Signal::Interrupt, Signal::Nmi] {
                    self.signals.take(signal);
                }
                self.change(&state);
            }
            Message::ForgetCode(done) => {
                self.vcpu.forget_code();
                // Whoever asked may have gone.
                let _ = done.send(());
            }
            Message::Report(answer) => {
                let mut state = self.vcpu.state();
                // Signalled, and not yet noticed.
                if self.signals.take(Signal::Nmi) {
                    state.system.nmi_pending = true;
                    self.signals.raise(Signal::Nmi);
                }
                // Whoever asked may have gone.
                let _ = answer.send((self.index, state));
            }
        }
    }

    fn change(&mut self, state: &CpuState) {
        if let Err(error) = self.vcpu.set_state(state) {
            self.board.report(Event::Died {
                thread: format!("processor {}", self.index),
                message: format!("its engine refused a state: {error}"),
            });
            return;
        }
        // Memory may be another's than the one that translations were made of, and an interrupt that
        // was signalled to the old state may still wait.
        self.signals.raise(Signal::Flush);
        if self
            .board
            .operate(|chipset, _| chipset.interrupt_pending(self.index))
        {
            self.signals.raise(Signal::Interrupt);
        }
    }
}
