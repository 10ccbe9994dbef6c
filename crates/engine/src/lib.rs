#![forbid(unsafe_code)]
//! The seam between a machine and the engines that run its processors: what a vCPU is, what it may
//! ask of the world, and why it stopped.
//!
//! The seam speaks the processor's language: addresses, ports, vectors. It has no file
//! descriptors, memory slots or interrupt routes in it, so an engine can be anything that moves a
//! [`CpuState`] forward.

mod bare;
mod counters;
mod level;
pub mod probe;
mod signals;

use std::sync::Arc;

pub use bare::NoDevices;
pub use counters::{Cost, Costs, Counter, Measure, Observe};
pub use signals::{Signal, Signals};
use trapgate_x86::CpuState;

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// HLT, with nothing pending that would end it.
    Halted,
    /// Someone raised [`Signal::Kick`].
    Kicked,
    /// A triple fault.
    ShutDown,
    /// A debugger's event: [`Vcpu::step`] has run its instruction.
    Debug,
    /// What the engine runs on failed it, or does not know an instruction. The state is that before
    /// the instruction.
    Failed(Failure),
}

/// Why an engine could not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What happened, for a person.
    pub what: &'static str,
    /// The host's code for it.
    pub code: u64,
    /// RIP.
    pub rip: u64,
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { what, code, rip } = self;
        write!(f, "{what} at RIP {rip:#x} (code {code:#x})")
    }
}

/// An access that the machine refuses; the instruction raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused;

/// What a vCPU asks of the machine around it while it runs. One object serves one vCPU, which owns
/// it.
pub trait World: Send {
    /// Reads 1 to 8 bytes of guest-physical addresses that are not RAM.
    fn read_memory(&mut self, gpa: u64, data: &mut [u8]);
    /// Writes 1 to 8 bytes of guest-physical addresses that are not RAM.
    fn write_memory(&mut self, gpa: u64, data: &[u8]);
    /// Reads a port; `size` is 1, 2 or 4 bytes.
    fn read_port(&mut self, port: u16, size: u8) -> u32;
    /// Writes a port; `size` is 1, 2 or 4 bytes.
    fn write_port(&mut self, port: u16, size: u8, value: u32);
    /// Acknowledges the highest pending interrupt that the task priority lets through and gives
    /// its vector, or `None` if there is none (any more).
    fn take_interrupt(&mut self) -> Option<u8>;
    /// Reads an MSR of the local APIC: IA32_APIC_BASE, IA32_TSC_DEADLINE, the x2APIC's range.
    fn read_apic_msr(&mut self, index: u32) -> Result<u64, Refused>;
    /// Writes an MSR of the local APIC.
    fn write_apic_msr(&mut self, index: u32, value: u64) -> Result<(), Refused>;
    /// CR8: bits 7 to 4 of the local APIC's task priority.
    fn task_priority(&mut self) -> u8;
    /// Sets CR8.
    fn set_task_priority(&mut self, priority: u8);
    /// Nanoseconds of VM time. Stands still while the VM is paused.
    fn clock(&mut self) -> u64;
    /// Time of day when VM time was zero: nanoseconds since 1970-01-01 UTC.
    fn epoch(&mut self) -> u64;
    /// The TSC of this processor was moved: what the local APIC's deadline timer compares with is
    /// `clock × frequency + offset`.
    fn set_tsc_offset(&mut self, offset: u64);
}

/// A state that an engine cannot run.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A register has bits that the profile does not admit.
    #[error("{register} has the value {value:#x}, which the CPU profile does not admit")]
    Register {
        /// Name of the register.
        register: &'static str,
        /// Its value.
        value: u64,
    },
    /// What the engine runs on does not take it.
    #[error("{what}: {reason}")]
    Host {
        /// Which part of the state.
        what: &'static str,
        /// What the host said.
        reason: String,
    },
}

/// A virtual processor of some engine.
pub trait Vcpu: Send {
    /// Runs until something outside the processor must act.
    fn run(&mut self) -> Exit;
    /// Runs one instruction, or delivers one event.
    fn step(&mut self) -> Exit;
    /// The complete architectural state.
    fn state(&mut self) -> CpuState;
    /// Replaces the complete architectural state.
    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError>;
    /// The word by which other threads reach the running processor.
    fn signals(&self) -> Arc<Signals>;
    /// Guest instructions executed since the vCPU was made, as far as the engine counts them.
    fn instructions(&self) -> u64;
    /// Numbers that the engine keeps of this processor beside its instructions. Asked for once, before it runs; every
    /// processor of a machine has the same.
    fn counters(&self) -> Vec<Counter> {
        Vec::new()
    }
    /// Gives back what memory it keeps code in that it has decoded or translated: the machine starts anew.
    fn forget_code(&mut self) {}
    /// After [`Exit::Failed`]: what there is to say beyond one line, given once.
    fn explain(&mut self) -> Option<String> {
        None
    }

    /// What the engine spends host time on, if it knows. Asked for once, before it runs.
    fn costs(&self) -> Option<Arc<dyn Costs>> {
        None
    }
}
