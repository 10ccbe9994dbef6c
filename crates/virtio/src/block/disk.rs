//! The file or block device behind a disk.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

/// Bytes of a sector, the unit of addresses and sizes of a virtio disk.
pub const SECTOR: u64 = 512;

/// Why a disk image cannot be used. [`Self::fix`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// There is no such file.
    #[error("the disk image `{}` does not exist", path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
    /// It is a directory, a pipe, a socket or a terminal.
    #[error("`{}` is {kind}, not a disk image or block device", path.display())]
    Kind {
        /// The path.
        path: PathBuf,
        /// What it is, with its article.
        kind: &'static str,
    },
    /// It has no bytes.
    #[error("the disk image `{}` is empty", path.display())]
    Empty {
        /// The path.
        path: PathBuf,
    },
    /// Its size is not a multiple of the sector size.
    #[error(
        "the disk image `{}` has {size} bytes, which is not a multiple of {SECTOR}",
        path.display()
    )]
    OddSize {
        /// The path.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// The host does not let us read it, or write it.
    #[error("no permission to {} the disk image `{}`", access(*read_only), path.display())]
    Permission {
        /// The path.
        path: PathBuf,
        /// Whether it was to be read only.
        read_only: bool,
    },
    /// Another process has it open as a disk.
    #[error("the disk image `{}` is in use by another virtual machine", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
        /// Whether it was to be read only.
        read_only: bool,
    },
    /// Something else went wrong.
    #[error("cannot open the disk image `{}`", path.display())]
    Open {
        /// The path.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

fn access(read_only: bool) -> &'static str {
    if read_only { "read" } else { "write" }
}

impl DiskError {
    /// What a person can do about it.
    pub fn fix(&self) -> Option<String> {
        match self {
            Self::Missing { path } => Some(format!(
                "check the path, or make an empty disk with `truncate -s 1G {}`",
                quoted(path)
            )),
            Self::Kind { .. } => Some("pass a file or a block device".to_owned()),
            Self::Empty { path } => {
                Some(format!("give it a size: `truncate -s 1G {}`", quoted(path)))
            }
            Self::OddSize { path, size } => Some(format!(
                "pad it with zeros: `truncate -s {} {}`",
                size.next_multiple_of(SECTOR),
                quoted(path)
            )),
            Self::Permission {
                read_only: false, ..
            } => Some("change its permissions, or add `,ro` to use it read-only".to_owned()),
            Self::Permission {
                read_only: true, ..
            } => Some("change its permissions".to_owned()),
            Self::InUse { .. } => Some(
                "stop the other machine or use a copy; several may share it only if all add `,ro`"
                    .to_owned(),
            ),
            Self::Open { .. } => None,
        }
    }
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let path = path.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:@%".contains(c);
    if !path.is_empty() && path.chars().all(plain) {
        path
    } else {
        format!("'{}'", path.replace('\'', r"'\''"))
    }
}

/// A raw disk image or a block device, locked as long as it is open: many readers or one writer.
#[derive(Debug)]
pub struct Disk {
    file: File,
    read_only: bool,
    sectors: u64,
}

impl Disk {
    /// Opens and locks the file at `path`.
    pub fn open(path: impl AsRef<Path>, read_only: bool) -> Result<Self, DiskError> {
        let path = path.as_ref();
        let failed = |source: io::Error| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound => DiskError::Missing { path },
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    DiskError::Permission { path, read_only }
                }
                _ => DiskError::Open { path, source },
            }
        };
        // Before opening, which would wait for a writer if it were a pipe.
        check_kind(path, std::fs::metadata(path).map_err(failed)?.file_type())?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(failed)?;
        check_kind(path, file.metadata().map_err(failed)?.file_type())?;
        let locked = if read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match locked {
            // Some file systems have no locks; that is no reason not to use them.
            Ok(()) | Err(TryLockError::Error(_)) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(DiskError::InUse {
                    path: path.to_owned(),
                    read_only,
                });
            }
        }
        // The end, not the metadata: these know no size of a block device.
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if size == 0 {
            return Err(DiskError::Empty {
                path: path.to_owned(),
            });
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(DiskError::OddSize {
                path: path.to_owned(),
                size,
            });
        }
        Ok(Self {
            file,
            read_only,
            sectors: size / SECTOR,
        })
    }

    /// Whether writing is refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Its size in [`SECTOR`]s.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Where `length` bytes from a sector on start, if they are all within the disk.
    pub(super) fn offset(&self, sector: u64, length: u64) -> Option<u64> {
        let end = sector.checked_add(length.div_ceil(SECTOR))?;
        (length.is_multiple_of(SECTOR) && end <= self.sectors).then(|| sector * SECTOR)
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Makes what was written safe against a power failure of the host.
    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Frees a range, as far as the host can: what is then read there may be anything.
    pub(super) fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, punch, offset, length) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Fills a range with zeros; its space may be freed if `unmap`.
    pub(super) fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        match fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, length) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            result => return Ok(result?),
        }
        static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
        let mut done = 0;
        while done < length {
            let piece = ZEROS.len().min((length - done) as usize);
            self.file.write_all_at(&ZEROS[..piece], offset + done)?;
            done += piece as u64;
        }
        Ok(())
    }
}

fn check_kind(path: &Path, found: std::fs::FileType) -> Result<(), DiskError> {
    let kind = if found.is_file() || found.is_block_device() {
        return Ok(());
    } else if found.is_dir() {
        "a directory"
    } else if found.is_fifo() {
        "a pipe"
    } else if found.is_socket() {
        "a socket"
    } else {
        "a character device"
    };
    Err(DiskError::Kind {
        path: path.to_owned(),
        kind,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn image(size: u64) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(size).unwrap();
        image
    }

    #[test]
    fn image_of_odd_size_is_refused_with_the_command_that_helps() {
        let image = image(1000);
        let error = Disk::open(image.path(), false).unwrap_err();
        assert!(error.to_string().contains("has 1000 bytes"));
        let fix = error.fix().unwrap();
        assert!(fix.contains("truncate -s 1024"), "{fix}");
        assert!(fix.contains(image.path().to_str().unwrap()), "{fix}");
    }

    #[test]
    fn what_is_no_disk_is_refused_for_what_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("none");
        let open = |path: &Path| Disk::open(path, true).unwrap_err();
        assert!(matches!(open(&missing), DiskError::Missing { .. }));
        assert!(matches!(
            open(directory.path()),
            DiskError::Kind {
                kind: "a directory",
                ..
            }
        ));
        assert!(matches!(
            open(Path::new("/dev/null")),
            DiskError::Kind {
                kind: "a character device",
                ..
            }
        ));
        assert!(matches!(open(image(0).path()), DiskError::Empty { .. }));
        // A path through a file.
        let through = image(512).path().join("x");
        assert!(matches!(
            open(&through),
            DiskError::Open { .. } | DiskError::Missing { .. }
        ));
    }

    #[test]
    fn image_without_permission_is_refused_with_a_fix() {
        let image = image(512);
        let readable = std::fs::Permissions::from_mode(0o400);
        image.as_file().set_permissions(readable).unwrap();
        match Disk::open(image.path(), false) {
            Err(error) => {
                assert!(matches!(error, DiskError::Permission { .. }), "{error}");
                assert!(error.fix().unwrap().contains(",ro"));
            }
            // Root may write whatever it likes.
            Ok(_) => assert!(rustix::process::geteuid().is_root()),
        }
        Disk::open(image.path(), true).unwrap();
    }

    #[test]
    fn image_has_many_readers_or_one_writer() {
        let image = image(512);
        let writer = Disk::open(image.path(), false).unwrap();
        for read_only in [false, true] {
            assert!(matches!(
                Disk::open(image.path(), read_only),
                Err(DiskError::InUse { .. })
            ));
        }
        drop(writer);
        let _first = Disk::open(image.path(), true).unwrap();
        let _second = Disk::open(image.path(), true).unwrap();
        assert!(matches!(
            Disk::open(image.path(), false),
            Err(DiskError::InUse { .. })
        ));
    }

    #[test]
    fn ranges_beyond_the_end_have_no_offset() {
        let image = image(4096);
        let disk = Disk::open(image.path(), true).unwrap();
        assert_eq!(disk.offset(7, 512), Some(3584));
        assert_eq!(disk.offset(8, 0), Some(4096));
        for (sector, length) in [(7, 1024), (8, 512), (0, 100), (u64::MAX, 512), (9, 0)] {
            assert_eq!(disk.offset(sector, length), None, "{sector} {length}");
        }
    }

    #[test]
    fn paths_are_quoted_for_the_shell() {
        assert_eq!(quoted(Path::new("a/b-1.img")), "a/b-1.img");
        assert_eq!(quoted(Path::new("it's")), r"'it'\''s'");
    }
}
