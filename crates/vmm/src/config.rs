//! What a machine is built from, as plain data.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use trapgate_engine::Observe;
use trapgate_engine::probe::EngineKind;
use trapgate_x86::profile::Level;

use crate::snapshot::SavedFile;
use crate::{MachineError, SnapshotError};

const MIB: u64 = 1 << 20;
/// Physical addresses have 40 bits (`trapgate_x86::profile::PHYSICAL_ADDRESS_BITS`), of which the upper half is left
/// to devices.
const MAX_MEMORY: u64 = 512 << 30;
/// The least memory that is taken: below it not even a loader has room.
const MIN_MEMORY: u64 = 4 * MIB;
/// Most processors: as many as xAPIC IDs, less what the firmware tables have no room for.
const MAX_CPUS: u32 = 128;

/// The bytes of a file, kept as long as the machine may reset: a `Vec`, a `&'static [u8]`, whatever
/// else gives bytes, or a file of a snapshot that is read when it is needed.
#[derive(Clone)]
pub struct Content(Bytes);

#[derive(Clone)]
enum Bytes {
    Here(Arc<dyn AsRef<[u8]> + Send + Sync>),
    Saved(Arc<SavedFile>),
}

impl Content {
    /// Wraps bytes.
    pub fn new(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Self(Bytes::Here(Arc::new(bytes)))
    }

    /// A file of a snapshot.
    pub(crate) fn saved(file: SavedFile) -> Self {
        Self(Bytes::Saved(Arc::new(file)))
    }

    /// The file of the snapshot that it came from.
    pub(crate) fn saved_file(&self) -> Option<&SavedFile> {
        match &self.0 {
            Bytes::Here(_) => None,
            Bytes::Saved(file) => Some(file),
        }
    }

    /// The bytes.
    ///
    /// # Errors
    /// For a file of a snapshot that cannot be read any more.
    pub fn bytes(&self) -> Result<&[u8], SnapshotError> {
        match &self.0 {
            Bytes::Here(bytes) => Ok((**bytes).as_ref()),
            Bytes::Saved(file) => file.bytes(),
        }
    }

    /// How many bytes there are.
    pub fn length(&self) -> u64 {
        match &self.0 {
            Bytes::Here(bytes) => (**bytes).as_ref().len() as u64,
            Bytes::Saved(file) => file.length(),
        }
    }
}

impl Default for Content {
    fn default() -> Self {
        Self::new([])
    }
}

impl From<Vec<u8>> for Content {
    fn from(bytes: Vec<u8>) -> Self {
        Self::new(bytes)
    }
}

impl From<&'static [u8]> for Content {
    fn from(bytes: &'static [u8]) -> Self {
        Self::new(bytes)
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.length())
    }
}

/// A module for a kernel that takes several files.
#[derive(Clone, Debug, Default)]
pub struct ModuleConfig {
    /// The file.
    pub content: Content,
    /// Its command line.
    pub command_line: String,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// A raw image or a block device.
    pub path: PathBuf,
    /// Whether the guest may not write.
    pub read_only: bool,
}

/// Which engine runs the processors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// The best that the host and this version have; see [`crate::choose`].
    #[default]
    Auto,
    /// This one or none.
    Only(EngineKind),
}

impl FromStr for EngineChoice {
    type Err = MachineError;

    /// `auto`, `kvm`, `jit`, `interp` or `lockstep`.
    fn from_str(name: &str) -> Result<Self, MachineError> {
        if name == "auto" {
            return Ok(Self::Auto);
        }
        EngineKind::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .map(Self::Only)
            .ok_or_else(|| MachineError::NoSuchEngine {
                name: name.to_owned(),
            })
    }
}

/// What becomes of the machine when the guest resets it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReset {
    /// It boots again.
    #[default]
    Restart,
    /// It ends with [`crate::Outcome::Reset`].
    End,
}

/// What becomes of the machine when a processor has a triple fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnTripleFault {
    /// It ends with [`crate::Outcome::TripleFault`], since that is hardly ever what a guest wants.
    #[default]
    Report,
    /// As on a PC: like any other reset.
    Reset,
}

/// What a machine is built from.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Virtual processors.
    pub cpus: u32,
    /// RAM in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// The kernel's file: a bzImage, an ELF executable, or a multiboot kernel.
    pub kernel: Content,
    /// Initial RAM disks, which the kernel sees as one.
    pub initrds: Vec<Content>,
    /// The kernel's command line.
    pub command_line: String,
    /// Modules, for a multiboot or PVH kernel.
    pub modules: Vec<ModuleConfig>,
    /// Disks, in the order in which the guest finds them (`/dev/vda`, `/dev/vdb`, …).
    pub disks: Vec<DiskConfig>,
    /// The engine.
    pub engine: EngineChoice,
    /// Instructions that the guest's processors have.
    pub level: Level,
    /// Ticks of the guest's TSC in a second, where the engine is free to choose: KVM on hardware that cannot
    /// scale it gives a new machine the host's frequency.
    pub tsc_hz: u64,
    /// Time of day at the start, nanoseconds since 1970-01-01 UTC; `None` for the host's.
    pub epoch: Option<u64>,
    /// Whether there is a device that gives entropy.
    pub entropy: bool,
    /// What a reset by the guest does.
    pub on_reset: OnReset,
    /// What a triple fault does.
    pub on_triple_fault: OnTripleFault,
    /// What its engine is to find out beside its counters; not part of a snapshot.
    pub observe: Observe,
    /// What the machine's owner wants to find again in a snapshot of it; nothing here reads it.
    pub notes: BTreeMap<String, String>,
}

impl Default for MachineConfig {
    /// One x86-64-v2 processor, 256 MiB, no kernel.
    fn default() -> Self {
        Self {
            cpus: 1,
            memory_bytes: 256 * MIB,
            kernel: Content::default(),
            initrds: Vec::new(),
            command_line: String::new(),
            modules: Vec::new(),
            disks: Vec::new(),
            engine: EngineChoice::Auto,
            level: Level::V2,
            tsc_hz: 1_000_000_000,
            epoch: None,
            entropy: true,
            on_reset: OnReset::Restart,
            on_triple_fault: OnTripleFault::Report,
            observe: Observe::default(),
            notes: BTreeMap::new(),
        }
    }
}

impl MachineConfig {
    /// Checks what can be checked without the host; [`crate::Machine::start`] does so first.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), MachineError> {
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(MachineError::Cpus {
                cpus: self.cpus,
                most: MAX_CPUS,
            });
        }
        if !(MIN_MEMORY..=MAX_MEMORY).contains(&self.memory_bytes) {
            return Err(MachineError::MemorySize {
                bytes: self.memory_bytes,
                least: MIN_MEMORY,
                most: MAX_MEMORY,
            });
        }
        if !self.memory_bytes.is_multiple_of(trapgate_memory::PAGE_SIZE) {
            return Err(MachineError::MemoryGranularity {
                bytes: self.memory_bytes,
            });
        }
        // CPUID leaf 0x15 gives the rate in kHz, in 32 bits.
        if !(1_000_000..=1_000_000_000_000).contains(&self.tsc_hz) {
            return Err(MachineError::TscRate { hz: self.tsc_hz });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(change: impl FnOnce(&mut MachineConfig)) -> MachineError {
        let mut config = MachineConfig::default();
        change(&mut config);
        config.validate().unwrap_err()
    }

    #[test]
    fn default_is_valid_and_each_number_out_of_range_is_refused_with_a_fix() {
        MachineConfig::default().validate().unwrap();
        for error in [
            error(|config| config.cpus = 0),
            error(|config| config.cpus = 4000),
            error(|config| config.memory_bytes = 0),
            error(|config| config.memory_bytes = u64::MAX),
            error(|config| config.memory_bytes += 1),
            error(|config| config.tsc_hz = 0),
        ] {
            assert!(error.fix().is_some(), "{error}");
        }
    }

    #[test]
    fn engines_are_known_by_their_names_only() {
        assert_eq!("auto".parse::<EngineChoice>().unwrap(), EngineChoice::Auto);
        for kind in EngineKind::ALL {
            let choice: EngineChoice = kind.name().parse().unwrap();
            assert_eq!(choice, EngineChoice::Only(kind));
        }
        let error = "tcg".parse::<EngineChoice>().unwrap_err();
        assert!(error.fix().unwrap().contains("interp"));
    }
}
