//! What can be wrong with a snapshot.

use std::io;
use std::path::PathBuf;

use trapgate_memory::MemoryError;

use crate::MachineError;

/// Why a snapshot cannot be taken, or nothing can go on from it. [`Self::fix`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// There is something of the name already.
    #[error("`{}` exists already", path.display())]
    Exists {
        /// The directory that was to be made.
        path: PathBuf,
    },
    /// A file or directory cannot be made or written.
    #[error("cannot write `{}`", path.display())]
    Write {
        /// What was to be written.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The guest's memory cannot be written.
    #[error("cannot write `{}`", path.display())]
    WriteMemory {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: MemoryError,
    },
    /// The machine ended, or is about to.
    #[error("the machine has ended")]
    Ended,
    /// A disk's name is no text, and the configuration is.
    #[error("the name of the disk `{}` is not UTF-8", path.display())]
    DiskName {
        /// The disk.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// There is no header, or one that is of something else.
    #[error("`{}` is not a snapshot: {reason}", path.display())]
    NotASnapshot {
        /// The directory.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The format is another version's.
    #[error("the snapshot has format version {found}, and this program reads version {known}")]
    Version {
        /// The version of the snapshot.
        found: u64,
        /// The version that is known.
        known: u32,
    },
    /// The processors are another version's.
    #[error(
        "the snapshot's processors are {level} of version {found}, and this program has version {known}"
    )]
    ProfileVersion {
        /// The profile's name.
        level: &'static str,
        /// Its version.
        found: u32,
        /// The version that is known.
        known: u32,
    },
    /// The processors say of themselves what those of this program do not, though their version is the same.
    #[error("the snapshot's processors are not to be had: {reason}")]
    Profile {
        /// What is different.
        reason: String,
    },
    /// Header and configuration contradict each other.
    #[error("`machine.json` has {what} {configured}, and the snapshot was taken with {saved}")]
    Changed {
        /// What was changed.
        what: &'static str,
        /// What the configuration says.
        configured: String,
        /// What the header says.
        saved: String,
    },
    /// A part is not there.
    #[error("the snapshot lacks its part `{part}`")]
    Missing {
        /// Its name.
        part: String,
    },
    /// A part is there that nothing is known of.
    #[error("the snapshot has a part `{part}`, of which this program knows nothing")]
    Unknown {
        /// Its name.
        part: String,
    },
    /// A part is longer or shorter than it was.
    #[error("the snapshot's part `{part}` has {found} bytes, and had {expected}")]
    Length {
        /// Its name.
        part: String,
        /// How long it is.
        found: u64,
        /// How long it was.
        expected: u64,
    },
    /// A part has changed.
    #[error("the snapshot's part `{part}` is damaged: its checksum is wrong")]
    Checksum {
        /// Its name.
        part: String,
    },
    /// A part cannot be understood.
    #[error("the snapshot's part `{part}` cannot be read: {reason}")]
    Unreadable {
        /// Its name.
        part: String,
        /// What is wrong.
        reason: String,
    },
    /// A section has another version.
    #[error(
        "the snapshot's part `{part}` has version {found}, and this program reads version {known}"
    )]
    SectionVersion {
        /// Its name.
        part: String,
        /// Its version.
        found: u64,
        /// The version that is known.
        known: u32,
    },
    /// No machine can be in the state.
    #[error("the state in the snapshot cannot be: {0}")]
    Chipset(#[from] trapgate_chipset::RestoreError),
    /// No device can be in the state.
    #[error("the state in the snapshot cannot be: {0}")]
    Device(#[from] trapgate_pci::StateError),
    /// No clock shows the time.
    #[error("the clock in the snapshot shows {now} ns, which it cannot")]
    Clock {
        /// What it shows.
        now: u64,
    },
    /// Memory can't be mapped, or is not what it was.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A disk has another size.
    #[error("the disk `{}` has {found} bytes, and had {expected}", path.display())]
    DiskSize {
        /// The disk.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// Its size when the snapshot was taken.
        expected: u64,
    },
    /// Whoever restores it has other terminals or ports than it was taken with.
    #[error("the snapshot was taken with {saved}, and is restored with {present}")]
    Connections {
        /// Terminal and ports then.
        saved: String,
        /// Terminal and ports now.
        present: String,
    },
    /// The machine cannot be built.
    #[error(transparent)]
    Machine(Box<MachineError>),
}

impl From<MachineError> for SnapshotError {
    fn from(error: MachineError) -> Self {
        match error {
            MachineError::Snapshot(error) => *error,
            error => Self::Machine(Box::new(error)),
        }
    }
}

impl SnapshotError {
    /// What to do about it, as a sentence for a person, where there is something to do.
    pub fn fix(&self) -> Option<String> {
        let fix = match self {
            Self::Exists { .. } => "choose another name, or remove it",
            Self::Write { source, .. } => return write_fix(source),
            Self::WriteMemory {
                source: MemoryError::Save { source },
                ..
            } => return write_fix(source),
            Self::Read { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "restore it as the user who took it, or change the permissions"
            }
            Self::NotASnapshot { .. } => "pass a directory that `trapgate snapshot` made",
            Self::Version { .. }
            | Self::SectionVersion { .. }
            | Self::ProfileVersion { .. }
            | Self::Profile { .. }
            | Self::Unknown { .. } => {
                "use the version of trapgate that took it; `snapshot.json` names it"
            }
            Self::Changed { .. } => {
                "change it back: only a machine that starts anew can have another"
            }
            Self::Missing { .. }
            | Self::Length { .. }
            | Self::Checksum { .. }
            | Self::Unreadable { .. }
            | Self::Memory(_) => {
                "copy it again from where it came (with `cp -a --sparse=always` or `tar -S`), or take another"
            }
            Self::DiskName { .. } => "give the disk another name, or a symbolic link that has one",
            Self::DiskSize { .. } => {
                "put the disk back as it was, or name it in the snapshot's `machine.json`"
            }
            Self::Device(trapgate_pci::StateError::Environment { .. }) => {
                "put it back as it was when the snapshot was taken"
            }
            Self::Machine(error) => return error.fix(),
            Self::WriteMemory { .. }
            | Self::Ended
            | Self::Read { .. }
            | Self::Chipset(_)
            | Self::Device(_)
            | Self::Clock { .. }
            | Self::Connections { .. } => return None,
        };
        Some(fix.to_owned())
    }
}

fn write_fix(source: &io::Error) -> Option<String> {
    let fix = match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "make room there, or save it elsewhere; the machine goes on"
        }
        io::ErrorKind::FileTooLarge => {
            "raise the limit on the size of files (`ulimit -f`); the machine goes on"
        }
        io::ErrorKind::NotFound => "make the directory above it first",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "save it where you may write"
        }
        _ => return None,
    };
    Some(fix.to_owned())
}
