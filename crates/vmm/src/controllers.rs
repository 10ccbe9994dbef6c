//! Interrupt controllers that are an engine's: a host kernel's, which interrupts guests without leaving
//! them.
//!
//! They are lent to it while the machine runs, and are the chipset's while it stands still. So
//! whoever saves a machine finds them where they always are.

use std::error::Error;

use trapgate_chipset::pit::PitState;
use trapgate_chipset::{ControllersState, LentPit};
use trapgate_kvm::{KvmError, KvmMachine};

/// What went wrong, for a person.
type Failure = Box<dyn Error + Send + Sync>;

/// Interrupt controllers that somebody else runs.
pub(crate) trait Controllers: Send + Sync {
    /// Whether it has an interval timer as well, which is lent before them, and taken back before them.
    fn has_pit(&self) -> bool;
    /// Takes the interval timer as it is at `now`, nanoseconds of VM time, which stands until this returns.
    fn give_pit(&self, pit: &LentPit, now: u64) -> Result<(), Failure>;
    /// Gives the interval timer back as it is at `now`, nanoseconds of VM time, which stands. The processors stand still.
    fn take_pit(&self, now: u64) -> Result<PitState, Failure>;
    /// Lets the interval timer interrupt, or no longer.
    fn connect_pit(&self, connected: bool) -> Result<(), Failure>;
    /// Takes them, at `now`, nanoseconds of VM time, with the GSIs that are high, a bit each. The
    /// processors stand still.
    fn give(&self, state: &ControllersState, levels: u32, now: u64) -> Result<(), Failure>;
    /// Gives them back. The processors stand still.
    fn take(&self) -> Result<ControllersState, Failure>;
    /// Sets the level of a GSI.
    fn set_line(&self, gsi: u32, level: bool) -> Result<(), Failure>;
    /// Sends a message-signalled interrupt.
    fn send_message(&self, address: u64, data: u32) -> Result<(), Failure>;
}

impl Controllers for KvmMachine {
    fn has_pit(&self) -> bool {
        self.in_kernel().pit
    }

    fn give_pit(&self, pit: &LentPit, now: u64) -> Result<(), Failure> {
        let LentPit {
            state,
            connected,
            heard,
        } = pit;
        // The phase of an interrupt that nobody hears is not worth the wait.
        KvmMachine::give_pit(self, state, now, *connected, *heard).map_err(boxed)
    }

    fn take_pit(&self, now: u64) -> Result<PitState, Failure> {
        KvmMachine::take_pit(self, now).map_err(boxed)
    }

    fn connect_pit(&self, connected: bool) -> Result<(), Failure> {
        KvmMachine::connect_pit(self, connected).map_err(boxed)
    }

    fn give(&self, state: &ControllersState, levels: u32, now: u64) -> Result<(), Failure> {
        self.give_controllers(state, levels, now).map_err(boxed)
    }

    fn take(&self) -> Result<ControllersState, Failure> {
        self.take_controllers().map_err(boxed)
    }

    fn set_line(&self, gsi: u32, level: bool) -> Result<(), Failure> {
        KvmMachine::set_line(self, gsi, level).map_err(boxed)
    }

    fn send_message(&self, address: u64, data: u32) -> Result<(), Failure> {
        KvmMachine::send_message(self, address, data).map_err(boxed)
    }
}

fn boxed(error: KvmError) -> Failure {
    Box::new(error)
}
