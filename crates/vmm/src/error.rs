//! Why there is no machine.

use std::io;

use trapgate_boot::BootError;
use trapgate_engine::StateError;
use trapgate_engine::probe::EngineKind;
use trapgate_memory::MemoryError;
use trapgate_pci::PciError;
use trapgate_virtio::DiskError;

use crate::{Level, SnapshotError};

const MIB: u64 = 1 << 20;

/// Why a machine cannot be built, or cannot go on. [`Self::fix`] says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No processor, or too many.
    #[error("a machine has 1 to {most} processors, not {cpus}")]
    Cpus {
        /// What was asked for.
        cpus: u32,
        /// What there can be.
        most: u32,
    },
    /// Too little memory, or too much.
    #[error(
        "a machine has {} MiB to {} GiB of memory, not {} MiB",
        least / MIB, most >> 30, bytes / MIB
    )]
    MemorySize {
        /// What was asked for.
        bytes: u64,
        /// The least there can be.
        least: u64,
        /// The most there can be.
        most: u64,
    },
    /// A part of a page.
    #[error("the memory size of {bytes} bytes is not a multiple of 4096")]
    MemoryGranularity {
        /// What was asked for.
        bytes: u64,
    },
    /// A TSC that CPUID cannot tell.
    #[error("the time-stamp counter runs at 1 MHz to 1 THz, not {hz} Hz")]
    TscRate {
        /// What was asked for.
        hz: u64,
    },
    /// More named ports than a console device has.
    #[error("a machine has at most 31 named ports, not {ports}")]
    Ports {
        /// What was asked for.
        ports: usize,
    },
    /// A name that no engine has.
    #[error("there is no engine called `{name}`")]
    NoSuchEngine {
        /// The name.
        name: String,
    },
    /// The engine that was asked for cannot run here.
    #[error("the engine `{engine}` cannot be used: {reason}")]
    Engine {
        /// Which one.
        engine: EngineKind,
        /// Why not.
        reason: String,
    },
    /// The host's processor is less than the guest's.
    #[error("this host's processor cannot run {}: it lacks {}", level.name(), lacks.join(", "))]
    Level {
        /// The guest's level.
        level: Level,
        /// Instructions that are not there.
        lacks: Vec<&'static str>,
    },
    /// KVM cannot run the machine.
    #[error("KVM cannot run this machine")]
    Kvm(#[from] trapgate_kvm::KvmError),
    /// The translator cannot make a processor.
    #[error(transparent)]
    Jit(#[from] trapgate_jit::JitError),
    /// The engine does not take the state in which a kernel is entered, or that was saved.
    #[error("the engine `{engine}` refused the state of processor {cpu}: {source}")]
    State {
        /// Which engine.
        engine: EngineKind,
        /// Index of the processor.
        cpu: usize,
        /// What is wrong with the state.
        source: StateError,
    },
    /// The engine would take the state, and not on this host as it is now.
    #[error("the engine `{engine}` cannot go on with processor {cpu} on this host: {source}")]
    StateHere {
        /// Which engine.
        engine: EngineKind,
        /// Index of the processor.
        cpu: usize,
        /// What the host lacks.
        source: StateError,
    },
    /// Guest memory cannot be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A file of the snapshot that the machine was restored from cannot be read any more.
    #[error(transparent)]
    Snapshot(#[from] Box<SnapshotError>),
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// There are more devices than the bus takes.
    #[error(transparent)]
    Bus(#[from] PciError),
    /// The chipset cannot be built.
    #[error(transparent)]
    Chipset(#[from] trapgate_chipset::ConfigError),
    /// The host gives no more threads.
    #[error("cannot start a thread for {what}")]
    Thread {
        /// What the thread was for.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

impl From<SnapshotError> for MachineError {
    fn from(error: SnapshotError) -> Self {
        Self::Snapshot(Box::new(error))
    }
}

impl MachineError {
    /// An engine has refused the state of a processor.
    pub(crate) fn refused(engine: EngineKind, cpu: usize, source: StateError) -> Self {
        match source {
            StateError::Host { .. } => Self::StateHere {
                engine,
                cpu,
                source,
            },
            StateError::Register { .. } => Self::State {
                engine,
                cpu,
                source,
            },
        }
    }

    /// What to do about it, as a sentence for a person, where there is something to do.
    pub fn fix(&self) -> Option<String> {
        match self {
            Self::Cpus { most, .. } => {
                Some(format!("pass `--cpus` with a number from 1 to {most}"))
            }
            Self::MemorySize { .. } => {
                Some("pass another size with `--memory`, for example `--memory 512M`".to_owned())
            }
            Self::MemoryGranularity { bytes } => Some(format!(
                "round it, for example to `--memory {}M`",
                bytes.div_ceil(MIB)
            )),
            Self::TscRate { .. } => Some("use the default of 1 GHz".to_owned()),
            Self::Ports { .. } => Some("use fewer ports".to_owned()),
            Self::NoSuchEngine { .. } => {
                let names = EngineKind::ALL.map(EngineKind::name).join("`, `");
                Some(format!("pass `--engine` with `auto`, `{names}`"))
            }
            Self::Level {
                level: Level::V3, ..
            } => Some(
                "give a new machine `--cpu v2`; one that was saved with v3 needs a host with it"
                    .to_owned(),
            ),
            Self::Level { .. } => Some("use a host with it".to_owned()),
            Self::Engine { .. } | Self::Kvm(_) | Self::Jit(_) => Some(
                "leave `--engine` out, and see `trapgate doctor` for what this host offers"
                    .to_owned(),
            ),
            Self::Memory(MemoryError::Reserve { .. }) => {
                Some("give the guest less memory with `--memory`".to_owned())
            }
            Self::Snapshot(error) => error.fix(),
            Self::Boot(error) => Some(error.fix()),
            Self::Disk(error) => error.fix(),
            Self::Bus(_) => Some("use fewer disks".to_owned()),
            Self::Thread { .. } => Some(
                "use fewer processors or disks, or raise the limit on threads (`ulimit -u`)"
                    .to_owned(),
            ),
            Self::StateHere { .. } => Some(
                "go on from it on another engine, for example with `--engine jit`, or on another host"
                    .to_owned(),
            ),
            Self::State { .. } | Self::Memory(_) | Self::Chipset(_) => {
                Some("this is a defect of trapgate: please report it".to_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_that_only_this_host_refuses_is_no_defect() {
        let error = MachineError::refused(
            EngineKind::Kvm,
            0,
            StateError::Host {
                what: "KVM does not take this state",
                reason: "the TSC would go back".to_owned(),
            },
        );
        assert!(
            error.to_string().contains("the TSC would go back"),
            "{error}"
        );
        assert!(error.fix().unwrap().contains("--engine jit"));
    }

    #[test]
    fn state_that_no_processor_can_have_is_a_defect() {
        let error = MachineError::refused(
            EngineKind::Kvm,
            0,
            StateError::Register {
                register: "CR4",
                value: u64::MAX,
            },
        );
        assert!(error.fix().unwrap().contains("report it"));
    }
}
