//! How a machine ended, and what it did until then.

use std::fmt;

use trapgate_x86::CpuState;
use trapgate_x86::registers::{cr0, efer};

use crate::MachineError;

/// How a machine ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest powered it off.
    PoweredOff,
    /// The guest wrote the debug-exit port (0xf4): `value << 1 | 1`.
    Exited(u32),
    /// The guest reset it, and [`crate::OnReset::End`] was configured.
    Reset(ResetCause),
    /// A processor had a triple fault, and [`crate::OnTripleFault::Report`] was configured.
    TripleFault(Box<TripleFault>),
    /// [`crate::Machine::stop`] was called.
    Stopped,
    /// It could not go on: it could not be loaded again after a reset, its engine's host failed it, or
    /// a thread of ours died, which is a defect of trapgate.
    Failed(Failure),
}

/// How the guest reset the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetCause {
    /// Through the chipset.
    Chipset(trapgate_chipset::ResetCause),
    /// By an INIT signal to the boot processor.
    Init,
    /// By a triple fault.
    TripleFault,
}

/// Why a machine could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The guest reset the machine, and it could not be started again.
    #[error("the machine could not be started again after a reset")]
    Restart(#[source] MachineError),
    /// What the engine runs on failed it, or does not know one of the guest's instructions.
    #[error("processor {cpu} could not go on: {failure}")]
    Engine {
        /// Index of the processor.
        cpu: usize,
        /// What happened.
        failure: trapgate_engine::Failure,
        /// What else there is to say, in lines.
        details: Option<String>,
    },
    /// The host kernel's interrupt controllers refused something.
    #[error("the interrupt controllers could not go on: {message}")]
    Controllers {
        /// What they said.
        message: String,
    },
    /// The file of a snapshot from which the guest's memory is mapped was cut short, or can't be read any more. Threads of
    /// the machine stand still until the process ends, for what they would read might reach a disk.
    #[error(
        "a part of the guest's memory is gone: the snapshot's memory file was cut short, or its disk fails"
    )]
    MemoryGone,
    /// A thread of ours ended by itself.
    #[error("the thread of {thread} ended unexpectedly: {message}")]
    Thread {
        /// What the thread was for.
        thread: String,
        /// What it said.
        message: String,
    },
}

/// A processor that could not deliver an exception, nor the double fault that followed.
#[derive(Clone, Debug)]
pub struct TripleFault {
    /// Index of the processor.
    pub cpu: usize,
    /// Its state.
    pub state: CpuState,
}

impl TripleFault {
    /// What is most likely wrong, as a sentence for a person.
    pub fn hint(&self) -> &'static str {
        let system = &self.state.system;
        if system.idtr.limit == 0 || system.idtr.base == 0 && system.cr0 & cr0::PE != 0 {
            "it had no interrupt descriptor table yet, so that its first exception was its last"
        } else {
            "its exception handlers, its stack or its page tables were not where it said; if it meant to reboot, let a triple fault reset the machine"
        }
    }
}

impl fmt::Display for TripleFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let system = &self.state.system;
        let mode = if system.efer & efer::LMA != 0 {
            "long mode"
        } else if system.cr0 & cr0::PE != 0 {
            "protected mode"
        } else {
            "real mode"
        };
        write!(
            f,
            "the guest's processor {} had a triple fault in {mode} at RIP {:#x}, CR3 {:#x}, CR2 {:#x}, RSP {:#x}",
            self.cpu, self.state.rip, system.cr3, system.cr2, self.state.gpr[4]
        )
    }
}

/// What one processor did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessorCounters {
    /// Guest instructions.
    pub instructions: u64,
    /// Times it halted.
    pub halts: u64,
    /// Times it was called out of the guest.
    pub kicks: u64,
}

/// What a machine did until now. While it runs, the numbers are those of each processor's last
/// exit; while it is paused they are exact.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// By processor.
    pub processors: Vec<ProcessorCounters>,
    /// Nanoseconds of VM time since the start or the last reset.
    pub clock: u64,
    /// Resets by the guest.
    pub resets: u64,
}

impl Counters {
    /// Instructions of all processors.
    pub fn instructions(&self) -> u64 {
        self.processors
            .iter()
            .map(|processor| processor.instructions)
            .sum()
    }
}
