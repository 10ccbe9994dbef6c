#![forbid(unsafe_code)]
//! The x86-64 architecture as data and pure functions: registers, descriptors, page table entries,
//! exceptions, the complete state of a processor, and the CPU profiles that guests see.
//!
//! Nothing here runs an instruction, and nothing knows of virtual machines.
//!
//! Sources: *Intel 64 and IA-32 Architectures Software Developer's Manual* ("SDM"),
//! *AMD64 Architecture Programmer's Manual* ("APM").

pub mod descriptor;
pub mod exception;
mod hexadecimal;
pub mod msr;
pub mod paging;
pub mod profile;
pub mod pvclock;
pub mod registers;
pub mod state;
pub mod stored_msr;

pub use descriptor::{Descriptor, Segment, TableRegister};
pub use exception::{Exception, Vector};
pub use profile::{CpuProfile, CpuidResult};
pub use state::{Activity, CpuState, InterruptShadow, SystemState, XsaveImage};
