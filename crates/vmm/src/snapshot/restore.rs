//! Going on from a snapshot.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use trapgate_chipset::Chipset;
use trapgate_chipset::saved::LATEST;
use trapgate_memory::{GuestMemory, SavedChunk, pc_ram_ranges};
use trapgate_virtio::Disk;

use super::config::{SavedConfig, modified};
use super::header::{Header, Profile, read_section};
use super::parts::Reader;
use super::state::{MachineState, Sections};
use crate::{Choice, Hooks, Host, MachineConfig, MachineError, SnapshotError, engines, pc};

/// Names of the parts that are not sections.
pub(super) const CONFIG: &str = "machine.json";
pub(super) const MEMORY: &str = "memory";
pub(super) const MEMORY_LIST: &str = "memory.json";

pub(super) const CONFIG_VERSION: u32 = 1;
pub(super) const MEMORY_LIST_VERSION: u32 = 1;

/// Which parts of the memory's file have something in them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct MemoryList {
    /// Bytes of a chunk.
    pub(super) chunk_bytes: u64,
    /// Place in the file, and CRC-32.
    pub(super) chunks: Vec<(u64, u32)>,
}

/// A snapshot that a machine can go on from: everything in it has been read but the memory and the
/// files that the guest was booted from.
#[derive(Debug)]
pub struct Snapshot {
    directory: PathBuf,
    header: Header,
    saved: SavedConfig,
    config: MachineConfig,
    state: MachineState,
    memory: File,
    chunks: Vec<SavedChunk>,
    warnings: Vec<String>,
}

impl Snapshot {
    /// Opens a snapshot and checks what can be checked without a machine: version, profile, memory
    /// size, lengths, checksums of sections, and the shape of each. Memory is not read.
    ///
    /// # Errors
    /// Any [`SnapshotError`].
    pub fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let reader = Reader::open(directory)?;
        let header = &reader.header;
        let saved: SavedConfig =
            read_section(CONFIG, CONFIG_VERSION, &reader.read(CONFIG, false)?)?;
        check_unchanged(header, &saved)?;

        let mut sections = Sections::new();
        let mut others = Vec::new();
        for name in header.parts.keys() {
            if name.starts_with("state/") {
                sections.insert(name.clone(), reader.read(name, true)?);
            } else {
                others.push(name.as_str());
            }
        }
        let state = MachineState::read(sections, header.cpus)?;
        let list: MemoryList = read_section(
            MEMORY_LIST,
            MEMORY_LIST_VERSION,
            &reader.read(MEMORY_LIST, true)?,
        )?;
        let chunks = list.chunks()?;
        let (memory, _) = reader.file(MEMORY)?;

        let kernel = match header.parts.contains_key("boot/kernel") {
            true => reader.later("boot/kernel")?,
            false => crate::Content::default(),
        };
        let initrds = reader.numbered("boot/initrd-")?;
        let modules = reader.numbered("boot/module-")?;
        let known = |name: &&str| {
            [CONFIG, MEMORY, MEMORY_LIST, "boot/kernel"].contains(name)
                || initrds.iter().chain(&modules).any(|file| file == name)
        };
        if let Some(unknown) = others.iter().find(|name| !known(name)) {
            return Err(SnapshotError::Unknown {
                part: (*unknown).to_owned(),
            });
        }
        if modules.len() != saved.modules.len() {
            return Err(SnapshotError::Changed {
                what: "the number of modules",
                configured: saved.modules.len().to_string(),
                saved: modules.len().to_string(),
            });
        }
        let later = |names: &[String]| -> Result<Vec<_>, SnapshotError> {
            names.iter().map(|name| reader.later(name)).collect()
        };
        let (initrds, modules) = (later(&initrds)?, later(&modules)?);
        let config = saved.config(&reader.directory, kernel, initrds, modules);
        config.validate()?;
        let warnings = warnings(&config, &saved);
        Ok(Self {
            directory: directory.to_owned(),
            header: reader.header,
            saved,
            config,
            state,
            memory,
            chunks,
            warnings,
        })
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The engine that [`crate::Machine::restore`] takes on `host`, and why.
    ///
    /// # Errors
    /// [`crate::MachineError::Engine`] if the one that was asked for cannot go on from this snapshot.
    pub fn choose_engine(&self, host: &Host) -> Result<Choice, MachineError> {
        Ok(engines::take_saved(&self.config, host)?.0)
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The machine's configuration. Only the engine and what it observes are the caller's to change.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// The engine to go on with; the best there is unless this is called.
    pub fn set_engine(&mut self, engine: crate::EngineChoice) {
        self.config.engine = engine;
    }

    /// What the engine is to find out beside its counters; nothing unless this is called.
    pub fn set_observe(&mut self, observe: crate::Observe) {
        self.config.observe = observe;
    }

    /// Whether the machine has a terminal, for which [`Hooks::terminal`] must be there.
    pub fn has_terminal(&self) -> bool {
        self.saved.terminal
    }

    /// Names of the ports that must be in [`Hooks::ports`], in this order.
    pub fn ports(&self) -> &[String] {
        &self.saved.ports
    }

    /// What a person should know before the machine goes on, in sentences.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Reads all of the saved memory and compares it with its checksums.
    ///
    /// # Errors
    /// For the first part that is damaged.
    pub fn check_memory(&self) -> Result<(), SnapshotError> {
        let ranges = pc_ram_ranges(self.config.memory_bytes);
        Ok(GuestMemory::check_saved(
            &ranges,
            &self.memory,
            &self.chunks,
        )?)
    }

    /// Refuses other connections than the machine had.
    fn check_hooks(&self, hooks: &Hooks) -> Result<(), SnapshotError> {
        let present: Vec<&str> = hooks.ports.iter().map(|port| port.name.as_str()).collect();
        if hooks.terminal.is_some() == self.saved.terminal && present == self.saved.ports {
            return Ok(());
        }
        let describe = |terminal: bool, ports: &[&str]| {
            let terminal = if terminal {
                "a terminal"
            } else {
                "no terminal"
            };
            match ports {
                [] => format!("{terminal} and no ports"),
                ports => format!("{terminal} and the ports `{}`", ports.join("`, `")),
            }
        };
        let saved: Vec<&str> = self.saved.ports.iter().map(String::as_str).collect();
        Err(SnapshotError::Connections {
            saved: describe(self.saved.terminal, &saved),
            present: describe(hooks.terminal.is_some(), &present),
        })
    }

    /// Everything that the machine is made of, but the processors and what the state says of them.
    pub(crate) fn materials(&self, hooks: &Hooks) -> Result<Materials, SnapshotError> {
        self.check_hooks(hooks)?;
        let config = &self.config;
        let disks = pc::open_disks(config)?;
        for (disk, saved) in disks.iter().zip(&self.saved.disks) {
            let found = disk.sectors().saturating_mul(512);
            if found != saved.bytes {
                return Err(SnapshotError::DiskSize {
                    path: saved.path.clone(),
                    found,
                    expected: saved.bytes,
                });
            }
        }
        let clock = &self.state.clock;
        if clock.now > LATEST || clock.now < self.state.chipset.board.now {
            return Err(SnapshotError::Clock { now: clock.now });
        }
        let chipset =
            Chipset::restore(pc::chipset_config(config, clock.epoch), &self.state.chipset)?;
        let ranges = pc_ram_ranges(config.memory_bytes);
        let memory = GuestMemory::restore(&ranges, &self.memory, &self.chunks)?;
        Ok(Materials {
            disks,
            chipset,
            memory,
        })
    }

    pub(crate) fn state(&self) -> &MachineState {
        &self.state
    }
}

/// See [`Snapshot::materials`].
pub(crate) struct Materials {
    pub(crate) disks: Vec<Disk>,
    pub(crate) chipset: Chipset,
    pub(crate) memory: GuestMemory,
}

/// Refuses a configuration that says something else than the header.
fn check_unchanged(header: &Header, saved: &SavedConfig) -> Result<(), SnapshotError> {
    let same = |what, configured: String, saved: String| {
        if configured == saved {
            return Ok(());
        }
        Err(SnapshotError::Changed {
            what,
            configured,
            saved,
        })
    };
    let Profile {
        level,
        tsc_hz,
        // They are the program's: nobody can configure others.
        version: _,
        cpuid_crc32: _,
    } = &header.profile;
    same(
        "memory_bytes",
        saved.memory_bytes.to_string(),
        header.memory_bytes.to_string(),
    )?;
    same("cpus", saved.cpus.to_string(), header.cpus.to_string())?;
    same("level", format!("{:?}", saved.level), format!("{level:?}"))?;
    same("tsc_hz", saved.tsc_hz.to_string(), tsc_hz.to_string())
}

/// Disks that are not as they were.
fn warnings(config: &MachineConfig, saved: &SavedConfig) -> Vec<String> {
    let disks = config.disks.iter().zip(&saved.disks);
    disks
        .filter(|(disk, saved)| saved.modified.is_some() && modified(&disk.path) != saved.modified)
        .map(|(disk, _)| {
            format!(
                "the disk `{}` has been written to since the snapshot was taken: what the guest knows of it may be wrong",
                disk.path.display()
            )
        })
        .collect()
}
