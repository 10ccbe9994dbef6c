//! A machine from a configuration: builds it, runs its virtual processors, pauses it, resets it.
//!
//! [`Machine::start`] takes a [`MachineConfig`], which is plain data, and [`Hooks`], which say where
//! the guest's output goes. [`Machine::wait`] says how the machine ended.
//!
//! # Threads
//! Every virtual processor has a thread, and so have the timers, the serial port's output, every
//! virtio device, and the supervisor, which resets the machine and ends it. All of them sleep when
//! there is nothing to do: an idle guest costs no host CPU time.
//!
//! # Several processors on the interpreter
//! The interpreter does not yet see another processor's self-modifying code, so several processors
//! take turns: one runs at a time, for a slice of about a millisecond if others wait, and a halted one
//! gives its turn away at once. See [`EngineKind::Interp`].
//!
//! # Locks
//! In the order PCI configuration → function → device → chipset → everything else. What is locked
//! under the chipset's lock (signals, mailboxes, queues of output) locks nothing further, and no lock
//! is held while the host writes output.
#![forbid(unsafe_code)]

mod alarm;
mod board;
mod clock;
mod config;
mod control;
mod controllers;
mod crew;
mod doorbells;
mod engines;
mod error;
mod machine;
mod outcome;
mod pc;
mod processor;
mod serial;
mod snapshot;
mod supervisor;
mod turns;
mod world;

#[cfg(test)]
mod crossing;
#[cfg(test)]
mod in_kernel;
#[cfg(test)]
#[path = "../tests/boot/skipped.rs"]
mod skipped;
#[cfg(test)]
mod testing;

pub use config::{
    Content, DiskConfig, EngineChoice, MachineConfig, ModuleConfig, OnReset, OnTripleFault,
};
pub use control::{Identity, RemoteControl};
pub use engines::{Choice, EngineReport, choose, engines};
pub use error::MachineError;
pub use machine::{Hooks, Machine, MachineHandle, Pause, Port, PortHandle, SerialSink};
pub use outcome::{Counters, Failure, Outcome, ProcessorCounters, ResetCause, TripleFault};
pub use serial::SerialHandle;
pub use snapshot::{
    FORMAT_VERSION, Header, PROFILE_VERSION, Part, Profile, Snapshot, SnapshotError, SnapshotReport,
};
pub use trapgate_boot::{BootError, Protocol};
pub use trapgate_chipset::ResetCause as ChipsetReset;
pub use trapgate_engine::probe::{self, EngineKind, Host};
pub use trapgate_engine::{Failure as EngineFailure, Observe};
pub use trapgate_virtio::{DiskError, PortOutput};
pub use trapgate_x86::profile::Level;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, whether or not a thread panicked while it held the lock: the guest may then see a confused
/// device, which is better than losing the whole machine.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
