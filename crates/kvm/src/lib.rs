//! The KVM engine: the processor's own virtualization hardware, through the host kernel.
//!
//! [`KvmMachine`] is one virtual machine of the kernel's; [`KvmVcpu`] is an engine's vCPU as
//! `trapgate-engine` wants it.
//!
//! # Who answers what
//! The hardware runs instructions. What an instruction asks of the world (ports, memory that is not
//! RAM, the local APIC's registers) goes through `World`, as with every engine. CPUID answers
//! come from our CPU profile. Of the MSRs the kernel keeps those that the hardware switches or must
//! see (`msrs::KERNELS`); every other one leaves the guest and is answered by the
//! code that the interpreter uses (`trapgate_x86::stored_msr`), so that a guest cannot tell the engines
//! apart by them. The paravirtual clock is among those.
//!
//! # Time
//! The guest's TSC is the host's, offset and perhaps scaled, and goes on while a machine is paused: see
//! `pace` for how it is brought back to VM time.
//!
//! # Unsafe
//! `unsafe` is in `calls` (what `kvm-ioctls` has no call for), `kick` (a signal handler), `memory` (handing
//! guest RAM to the kernel) and one call in `transfer`.

mod calls;
mod controllers;
mod cpuid;
mod error;
mod events;
mod facts;
mod image;
mod kick;
mod machine;
mod memory;
mod msr_exits;
mod msrs;
mod pace;
mod registers;
mod state;
mod transfer;
mod tsc;
mod vcpu;

#[cfg(test)]
#[path = "../tests/bench/skipped.rs"]
mod skipped;

pub use cpuid::Lacks;
pub use error::KvmError;
pub use facts::{Facts, InKernel};
pub use machine::KvmMachine;
pub use vcpu::KvmVcpu;
