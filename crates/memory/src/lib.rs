//! Guest-physical memory, mapped into the process, with trace flags on every page: zeros at first, or
//! what was saved in a file, of which a copy is made page by page as the guest writes.
//!
//! Everything that writes guest memory goes through one of two doors, and both honour the traces
//! (`DESIGN.md`, idea 3): an engine, which looks a page's [`Traces`] up before it builds a writable
//! translation and reports its writes to flagged pages itself; and devices, which use the
//! [`vm_memory`] interfaces of [`GuestMemory::space`], where the traces sit in the place of the
//! dirty bitmap.
//!
//! This crate knows nothing of virtual machines or processors.

mod access;
mod gone;
mod guest;
mod pages;
mod saved;
mod trace;

pub use access::HostAddress;
pub use gone::Watch;
pub use guest::{GuestMemory, GuestSpace, MemoryError, RamRange, pc_ram_ranges};
pub use saved::{CHUNK, SavedChunk};
pub use trace::{PageTraces, TraceFlags, TraceListener, Traces};

/// Bytes in the smallest page of the architecture, the unit of tracing.
pub const PAGE_SIZE: u64 = 4096;
