//! What a server needs of a machine.

use std::path::Path;

use tokio::sync::watch;

use crate::data::{Counters, Info, SnapshotAnswer, State, StateAnswer};
use crate::problem::Problem;
use crate::terminal::Terminal;

/// A machine, to those who control it. May outlive the machine, and then answers that it has ended.
///
/// Methods are called on threads that never run a virtual processor.
pub trait Control: Send + Sync + 'static {
    /// What it is. Must not wait.
    fn info(&self) -> Info;

    /// Its state, and how to hear of changes. [`State::Ended`] is the last.
    fn states(&self) -> &States;

    /// What it counted until now. May wait a few milliseconds for processors to tell.
    ///
    /// # Errors
    /// The machine has ended.
    fn counters(&self) -> Result<Counters, Problem>;

    /// Stands it still, and waits until it does. One that is paused stays paused.
    ///
    /// # Errors
    /// The machine has ended.
    fn pause(&self) -> Result<StateAnswer, Problem>;

    /// Lets it go on. One that runs goes on running.
    ///
    /// # Errors
    /// The machine has ended.
    fn resume(&self) -> Result<StateAnswer, Problem>;

    /// Presses the power button. Must not wait.
    ///
    /// # Errors
    /// The machine has ended.
    fn press_power_button(&self) -> Result<(), Problem>;

    /// Stops it as if its power cord were pulled; [`Self::states`] tells when it has. Must not wait.
    fn stop(&self);

    /// Saves it to a directory that is made; afterwards it runs if it ran before.
    ///
    /// # Errors
    /// It has ended, it can't be saved, or the directory can't be written; then there is no such directory.
    fn snapshot(&self, directory: &Path) -> Result<SnapshotAnswer, Problem>;

    /// The guest's terminal, if it has one.
    fn terminal(&self) -> Option<Terminal>;
}

/// A machine's state, with those who wait for it to change.
#[derive(Debug)]
pub struct States(watch::Sender<State>);

impl States {
    /// A machine in this state.
    pub fn new(state: State) -> Self {
        Self(watch::Sender::new(state))
    }

    /// The state.
    pub fn get(&self) -> State {
        *self.0.borrow()
    }

    /// Changes the state; whether it was another. After [`State::Ended`] nothing comes.
    pub fn set(&self, state: State) -> bool {
        self.0.send_if_modified(|present| {
            let change = *present != state && *present != State::Ended;
            if change {
                *present = state;
            }
            change
        })
    }

    /// Waits for [`State::Ended`].
    pub(crate) async fn ended(&self) {
        // Fails only if the sender is gone, which is `self`.
        let _ = self
            .0
            .subscribe()
            .wait_for(|state| *state == State::Ended)
            .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_is_final_and_setting_the_same_state_is_no_change() {
        let states = States::new(State::Running);
        assert!(!states.set(State::Running));
        assert!(states.set(State::Paused));
        assert!(states.set(State::Ended));
        assert!(!states.set(State::Running));
        assert_eq!(states.get(), State::Ended);
    }
}
