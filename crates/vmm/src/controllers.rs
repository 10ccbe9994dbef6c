//! Interrupt controllers that are an engine's: a host kernel's, which interrupts guests without leaving
//! them.
//!
//! They are lent to it while the machine runs, and are the chipset's while it stands still. So
//! whoever saves a machine finds them where they always are.

use std::error::Error;

use trapgate_chipset::ControllersState;
use trapgate_kvm::{KvmError, KvmMachine};

/// What went wrong, for a person.
type Failure = Box<dyn Error + Send + Sync>;

/// Interrupt controllers that somebody else runs.
pub(crate) trait Controllers: Send + Sync {
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
