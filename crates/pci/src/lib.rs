#![forbid(unsafe_code)]
//! One PCI bus: its configuration mechanisms, the routing of memory accesses to the functions on
//! it, and what every function has (header, capability list, MSI-X).
//!
//! # Locks
//! Every function has its own lock, so that processors that use different devices do not meet. The
//! order is **bus configuration → function → what the function locks → [`MessageSink`] and
//! [`InterruptLine`]** (which lock the interrupt controllers). So whoever implements a sink or a
//! line never calls into the bus from it, nor while it holds what the sink locks.

mod bus;
mod config;
mod doorbell;
mod function;
mod host_bridge;
mod interrupt;
mod layout;
mod msix;
mod saved;

pub use bus::{Bus, PciError};
pub use config::{BarKind, ConfigSpace, Identity, register};
pub use doorbell::{Doorbell, DoorbellListener};
pub use function::{DOORBELL_BYTES, Function, Window};
pub use host_bridge::HostBridge;
pub use interrupt::{InterruptLine, Message, MessageSink, WiredOr};
pub use layout::{ECAM_BASE, ECAM_LAST_BUS, ECAM_SIZE, MMIO_BASE, MMIO_SIZE, SLOTS, slot_gsi};
pub use msix::Msix;
pub use saved::{BusState, ConfigSpaceState, MsixState, SavedFunction, StateError, VectorState};
