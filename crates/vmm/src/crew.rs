//! The processors' threads as a crew: whether they are to run, and what each is told.

use std::collections::VecDeque;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};

use trapgate_engine::{Signal, Signals};
use trapgate_x86::CpuState;

use crate::lock;

/// What a processor's thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activity {
    /// Runs the guest, or sleeps for the guest, or does what a message says.
    Running,
    /// Waits for the crew to go on.
    Paused,
    /// Has ended.
    Finished,
}

/// What a processor's thread is told. It acts on it between two runs, or while it is paused.
pub(crate) enum Message {
    /// An INIT signal.
    Init,
    /// A start-up IPI with this vector.
    StartUp(u8),
    /// The machine starts: take this state and forget what was signalled before.
    Start(Box<CpuState>),
    /// Give back the memory that holds code, and say when it is done.
    ForgetCode(Sender<()>),
    /// Give your state.
    Report(Sender<(usize, CpuState)>),
}

/// What a processor's thread does next.
pub(crate) enum Next {
    /// Runs the guest.
    Run,
    /// Acts on a message and asks again.
    Message(Message),
    /// Ends.
    Finish,
}

struct State {
    /// How many want the crew to stand still.
    stops: usize,
    /// Something happened that ends or resets the machine, and the supervisor is on its way.
    held: bool,
    finish: bool,
    members: Vec<Member>,
}

struct Member {
    activity: Activity,
    mail: VecDeque<Message>,
}

/// The processors' threads.
pub(crate) struct Crew {
    state: Mutex<State>,
    changed: Condvar,
    signals: OnceLock<Vec<Arc<Signals>>>,
}

impl Crew {
    /// A crew that stands still, with one stop to be taken back by [`Self::go`].
    pub(crate) fn new(count: usize) -> Self {
        let members = (0..count).map(|_| Member {
            activity: Activity::Paused,
            mail: VecDeque::new(),
        });
        Self {
            state: Mutex::new(State {
                stops: 1,
                held: false,
                finish: false,
                members: members.collect(),
            }),
            changed: Condvar::new(),
            signals: OnceLock::new(),
        }
    }

    /// Says how the members' processors are reached. Only once; before, nobody is.
    pub(crate) fn set_signals(&self, signals: Vec<Arc<Signals>>) {
        // A second call is a defect of the caller and changes nothing.
        let _ = self.signals.set(signals);
    }

    /// Raises a signal on a processor.
    pub(crate) fn raise(&self, cpu: usize, signal: Signal) {
        if let Some(signals) = self.signals.get().and_then(|all| all.get(cpu)) {
            signals.raise(signal);
        }
    }

    fn kick_all(&self) {
        for signals in self.signals.get().into_iter().flatten() {
            signals.raise(Signal::Kick);
        }
    }

    /// Leaves a message for a processor's thread; one that has ended gets none.
    pub(crate) fn post(&self, cpu: usize, message: Message) {
        if let Some(member) = lock(&self.state).members.get_mut(cpu)
            && member.activity != Activity::Finished
        {
            member.mail.push_back(message);
        }
        self.changed.notify_all();
        self.raise(cpu, Signal::Kick);
    }

    /// Makes the crew stand still as soon as it can, without waiting for it. Undone by
    /// [`Self::release`].
    pub(crate) fn hold(&self) {
        lock(&self.state).held = true;
        self.kick_all();
    }

    /// Undoes [`Self::hold`].
    pub(crate) fn release(&self) {
        lock(&self.state).held = false;
        self.changed.notify_all();
    }

    /// Whether something happened that the supervisor has not dealt with.
    pub(crate) fn is_held(&self) -> bool {
        lock(&self.state).held
    }

    /// Makes the crew stand still, and waits until it does. Undone by [`Self::go`].
    pub(crate) fn stop(&self) {
        lock(&self.state).stops += 1;
        self.kick_all();
        let state = lock(&self.state);
        let running = |state: &mut State| {
            state
                .members
                .iter()
                .any(|member| member.activity == Activity::Running)
        };
        drop(
            self.changed
                .wait_while(state, running)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Undoes one [`Self::stop`].
    pub(crate) fn go(&self) {
        let mut state = lock(&self.state);
        state.stops = state.stops.saturating_sub(1);
        drop(state);
        self.changed.notify_all();
    }

    /// Ends the threads.
    pub(crate) fn finish(&self) {
        lock(&self.state).finish = true;
        self.changed.notify_all();
        self.kick_all();
    }

    /// The thread of a processor has ended.
    pub(crate) fn finished(&self, cpu: usize) {
        if let Some(member) = lock(&self.state).members.get_mut(cpu) {
            member.activity = Activity::Finished;
            // Whoever waits for an answer to a message learns that there is none.
            member.mail.clear();
        }
        self.changed.notify_all();
    }

    /// What the thread of a processor is to do; waits while the crew stands still.
    pub(crate) fn next(&self, cpu: usize) -> Next {
        let mut state = lock(&self.state);
        loop {
            let still = state.stops > 0 || state.held;
            let finish = state.finish;
            let Some(member) = state.members.get_mut(cpu) else {
                return Next::Finish;
            };
            if finish {
                return Next::Finish;
            }
            let message = member.mail.pop_front();
            if message.is_some() || !still {
                member.activity = Activity::Running;
                return message.map_or(Next::Run, Next::Message);
            }
            if member.activity != Activity::Paused {
                member.activity = Activity::Paused;
                self.changed.notify_all();
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    fn crew(count: usize) -> Arc<Crew> {
        let crew = Arc::new(Crew::new(count));
        crew.set_signals((0..count).map(|_| Arc::default()).collect());
        crew
    }

    #[test]
    fn messages_arrive_in_order_even_while_the_crew_stands_still() {
        let crew = crew(1);
        crew.post(0, Message::Init);
        crew.post(0, Message::StartUp(9));
        assert!(matches!(crew.next(0), Next::Message(Message::Init)));
        assert!(matches!(crew.next(0), Next::Message(Message::StartUp(9))));
        crew.go();
        assert!(matches!(crew.next(0), Next::Run));
    }

    #[test]
    fn stop_returns_when_every_member_is_out_of_the_guest() {
        let crew = crew(2);
        crew.go();
        let (entered, wait) = mpsc::channel();
        let members: Vec<_> = (0..2)
            .map(|cpu| {
                let crew = Arc::clone(&crew);
                let entered = entered.clone();
                thread::spawn(move || {
                    let mut runs = 0_u64;
                    while let Next::Run = crew.next(cpu) {
                        runs += 1;
                        if runs == 1 {
                            entered.send(()).unwrap();
                        }
                    }
                })
            })
            .collect();
        wait.recv().unwrap();
        wait.recv().unwrap();
        crew.stop();
        let paused = lock(&crew.state)
            .members
            .iter()
            .all(|member| member.activity == Activity::Paused);
        crew.finish();
        for member in members {
            member.join().unwrap();
        }
        assert!(paused);
    }

    #[test]
    fn member_that_died_is_not_waited_for() {
        let crew = crew(1);
        crew.go();
        assert!(matches!(crew.next(0), Next::Run));
        let (answer, answers) = mpsc::channel();
        crew.post(0, Message::Report(answer));
        crew.finished(0);
        crew.stop();
        assert!(answers.recv().is_err());
    }
}
