//! Virtio 1.2 devices behind the PCI transport: disk, console, and entropy.
//!
//! A [`Device`] knows its configuration space and its queues; [`VirtioPci`] is the PCI function in
//! front of it. Devices work on threads of their own, so that the virtual processor that rang a
//! doorbell goes on at once.
//!
//! # Hostile guests
//! Everything in a queue is the guest's to choose, and may change while it is read. So a chain is
//! read once into a [`Chain`], whose buffers have been found to lie in RAM; its length, the memory
//! and the work that it may cost are bounded. What breaks the protocol puts the device into
//! `DEVICE_NEEDS_RESET` (virtio 1.2, 2.1.2), and nothing worse.
//!
//! # Locks
//! In the order PCI function → what the device's worker works on → [`Notifier`] → the sink and
//! the line, which lock the interrupt controllers. No lock is held while a console's output
//! writes to the host.

pub mod block;
pub mod console;
mod device;
mod entropy;
mod notifier;
mod queue;
mod scatter;
mod transport;
mod worker;

#[cfg(test)]
mod driver;

pub use block::{Block, BlockState, Disk, DiskError};
pub use console::{Console, ConsoleHandle, ConsoleState, PortConfig, PortOutput};
pub use device::{Activation, Device, DeviceState, DeviceType, SavedDevice};
pub use entropy::Entropy;
pub use notifier::Notifier;
pub use queue::{Buffer, Chain, ProtocolError, QueuePosition, Virtqueue};
pub use transport::VirtioPci;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, whether or not a thread panicked while it held the lock: the guest may then see a
/// confused device, which is better than losing the whole machine.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
