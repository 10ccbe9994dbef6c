//! The machine's configuration in a snapshot: for people to read, and in parts to change.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use trapgate_x86::profile::Level;

use crate::{
    Content, DiskConfig, EngineChoice, MachineConfig, ModuleConfig, OnReset, OnTripleFault,
    SnapshotError,
};

/// A disk. A path that is not absolute is meant from the snapshot's directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedDisk {
    pub(super) path: PathBuf,
    pub(super) read_only: bool,
    /// Its size when the snapshot was taken.
    pub(super) bytes: u64,
    /// When it was last written to before, nanoseconds since 1970; for a file, not a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) modified: Option<u64>,
}

/// The configuration without the files that it boots, which are parts of the snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SavedConfig {
    pub(super) cpus: u32,
    pub(super) memory_bytes: u64,
    pub(super) level: Level,
    pub(super) tsc_hz: u64,
    pub(super) command_line: String,
    /// Command lines of modules, whose files are `boot/module-N`.
    pub(super) modules: Vec<String>,
    pub(super) disks: Vec<SavedDisk>,
    pub(super) entropy: bool,
    /// Whether there is a terminal, `/dev/hvc0`.
    pub(super) terminal: bool,
    /// Names of the console's ports.
    pub(super) ports: Vec<String>,
    pub(super) on_reset: OnReset,
    pub(super) on_triple_fault: OnTripleFault,
    pub(super) notes: BTreeMap<String, String>,
}

impl SavedConfig {
    pub(super) fn of(
        config: &MachineConfig,
        terminal: bool,
        ports: &[String],
    ) -> Result<Self, SnapshotError> {
        let MachineConfig {
            cpus,
            memory_bytes,
            // Parts of their own.
            kernel: _,
            initrds: _,
            command_line,
            modules,
            disks,
            // Whoever restores it chooses.
            engine: _,
            level,
            tsc_hz,
            // The clock's section has it.
            epoch: _,
            entropy,
            on_reset,
            on_triple_fault,
            // Of the one who started it.
            observe: _,
            notes,
        } = config;
        let command_line_of = |module: &ModuleConfig| module.command_line.clone();
        Ok(Self {
            cpus: *cpus,
            memory_bytes: *memory_bytes,
            level: *level,
            tsc_hz: *tsc_hz,
            command_line: command_line.clone(),
            modules: modules.iter().map(command_line_of).collect(),
            disks: disks.iter().map(saved_disk).collect::<Result<_, _>>()?,
            entropy: *entropy,
            terminal,
            ports: ports.to_vec(),
            on_reset: *on_reset,
            on_triple_fault: *on_triple_fault,
            notes: notes.clone(),
        })
    }

    /// As a machine is built from, in a snapshot in `directory` that has these files.
    pub(super) fn config(
        &self,
        directory: &Path,
        kernel: Content,
        initrds: Vec<Content>,
        modules: Vec<Content>,
    ) -> MachineConfig {
        let Self {
            cpus,
            memory_bytes,
            level,
            tsc_hz,
            command_line,
            modules: command_lines,
            disks,
            entropy,
            // What the hooks must have.
            terminal: _,
            ports: _,
            on_reset,
            on_triple_fault,
            notes,
        } = self;
        let module = |(content, command_line): (Content, &String)| ModuleConfig {
            content,
            command_line: command_line.clone(),
        };
        let disk = |disk: &SavedDisk| DiskConfig {
            path: directory.join(&disk.path),
            read_only: disk.read_only,
        };
        MachineConfig {
            cpus: *cpus,
            memory_bytes: *memory_bytes,
            kernel,
            initrds,
            command_line: command_line.clone(),
            modules: modules.into_iter().zip(command_lines).map(module).collect(),
            disks: disks.iter().map(disk).collect(),
            engine: EngineChoice::Auto,
            level: *level,
            tsc_hz: *tsc_hz,
            epoch: None,
            entropy: *entropy,
            on_reset: *on_reset,
            on_triple_fault: *on_triple_fault,
            observe: trapgate_engine::Observe::default(),
            notes: notes.clone(),
        }
    }
}

/// When a file was last written to, nanoseconds since 1970; `None` for what is no file.
pub(super) fn modified(path: &Path) -> Option<u64> {
    let metadata = path.metadata().ok().filter(std::fs::Metadata::is_file)?;
    let since = metadata
        .modified()
        .ok()?
        .duration_since(std::time::UNIX_EPOCH);
    u64::try_from(since.ok()?.as_nanos()).ok()
}

fn saved_disk(disk: &DiskConfig) -> Result<SavedDisk, SnapshotError> {
    let DiskConfig { path, read_only } = disk;
    // Whoever restores it may stand elsewhere.
    let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
    if path.to_str().is_none() {
        return Err(SnapshotError::DiskName { path });
    }
    Ok(SavedDisk {
        modified: modified(&path),
        path,
        read_only: *read_only,
        // Filled in from what the device says.
        bytes: 0,
    })
}
