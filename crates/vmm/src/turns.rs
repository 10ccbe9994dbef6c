//! One processor at a time, for engines that cannot yet run several at once.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use trapgate_engine::{Signal, Signals};

use crate::lock;

/// How long a processor runs while another waits. Short against the guest's own timeslices, long
/// against what a switch costs.
const SLICE: Duration = Duration::from_millis(1);

struct State {
    holder: Option<usize>,
    since: Instant,
    waiting: VecDeque<usize>,
}

/// A lock that is given in the order of asking, and whose holder is kicked out of the guest when it has
/// had its slice. It costs nothing while only one processor has something to do.
pub(crate) struct Turns {
    state: Mutex<State>,
    /// One for each processor.
    wake: Vec<Condvar>,
    signals: Vec<Arc<Signals>>,
}

/// The turn is given back when this is dropped.
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    pub(crate) fn new(signals: Vec<Arc<Signals>>) -> Self {
        Self {
            state: Mutex::new(State {
                holder: None,
                since: Instant::now(),
                waiting: VecDeque::new(),
            }),
            wake: signals.iter().map(|_| Condvar::new()).collect(),
            signals,
        }
    }

    /// Waits for the turn.
    pub(crate) fn take(&self, cpu: usize) -> Turn<'_> {
        let mut state = lock(&self.state);
        state.waiting.push_back(cpu);
        loop {
            let first = state.waiting.front() == Some(&cpu);
            match state.holder {
                None if first => {
                    state.waiting.pop_front();
                    state.holder = Some(cpu);
                    state.since = Instant::now();
                    self.wake_first(&state);
                    return Turn(self);
                }
                // The first in the queue sees to it that the holder's slice ends.
                Some(holder) if first => {
                    let left = SLICE.saturating_sub(state.since.elapsed());
                    if left.is_zero() {
                        self.signals[holder].raise(Signal::Kick);
                    }
                    // A kick may have been taken for another's, and is then repeated.
                    let left = if left.is_zero() { SLICE } else { left };
                    state = self.wake[cpu]
                        .wait_timeout(state, left)
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
                _ => {
                    state = self.wake[cpu]
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn wake_first(&self, state: &State) {
        if let Some(&first) = state.waiting.front() {
            self.wake[first].notify_one();
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.holder = None;
        self.0.wake_first(&state);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    fn turns(count: usize) -> Arc<Turns> {
        Arc::new(Turns::new((0..count).map(|_| Arc::default()).collect()))
    }

    #[test]
    fn turn_goes_round_among_processors_that_never_rest() {
        let turns = turns(3);
        let (ran, runs) = mpsc::channel();
        let threads: Vec<_> = (0..3)
            .map(|cpu| {
                let (turns, ran) = (Arc::clone(&turns), ran.clone());
                thread::spawn(move || {
                    for _ in 0..5 {
                        let _turn = turns.take(cpu);
                        ran.send(cpu).unwrap();
                        // Runs until it is kicked; the last one left is not, so it has a limit.
                        turns.signals[cpu].sleep(Some(Duration::from_millis(50)));
                        turns.signals[cpu].take(Signal::Kick);
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        drop(ran);
        let order: Vec<usize> = runs.iter().collect();
        assert_eq!(order.len(), 15);
        for cpu in 0..3 {
            assert_eq!(order.iter().filter(|&&ran| ran == cpu).count(), 5);
        }
    }

    #[test]
    fn holder_is_alone() {
        let turns = turns(2);
        let turn = turns.take(0);
        let (taken, wait) = mpsc::channel();
        let other = {
            let turns = Arc::clone(&turns);
            thread::spawn(move || {
                let _turn = turns.take(1);
                taken.send(()).unwrap();
            })
        };
        // The other asks for the turn by a kick, and does not get it before it is given.
        turns.signals[0].sleep(None);
        assert!(turns.signals[0].is_raised(Signal::Kick));
        assert!(wait.try_recv().is_err());
        drop(turn);
        wait.recv().unwrap();
        other.join().unwrap();
    }
}
