//! Parts as files: written to a temporary directory that becomes the snapshot, and read with the
//! length and checksum that the header knows.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use super::header::{self, Header, Part};
use crate::{Content, SnapshotError};

/// Directories within a snapshot.
const DIRECTORIES: [&str; 2] = ["state", "boot"];
/// No part that is read whole is longer: kernels and initial RAM disks are the longest.
const LONGEST: u64 = 4 << 30;

fn write_failed(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.into();
    move |source| SnapshotError::Write { path, source }
}

fn read_failed(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.into();
    move |source| SnapshotError::Read { path, source }
}

/// A snapshot while it is written. Dropping it before [`Self::finish`] removes what there is of it.
#[derive(Debug)]
pub(super) struct Writer {
    /// What it is to be.
    target: PathBuf,
    /// What it is.
    temporary: PathBuf,
    parts: BTreeMap<String, Part>,
    finished: bool,
}

impl Writer {
    /// Makes the temporary directory beside `target`, of which there must be nothing.
    pub(super) fn new(target: &Path) -> Result<Self, SnapshotError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        if target.symlink_metadata().is_ok() {
            return Err(SnapshotError::Exists {
                path: target.to_owned(),
            });
        }
        let Some(name) = target.file_name() else {
            let source = io::Error::from(io::ErrorKind::InvalidInput);
            return Err(write_failed(target)(source));
        };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}-{number}.partial", std::process::id()));
        let temporary = target.with_file_name(hidden);
        // Guest memory has secrets in it.
        let mut private = DirBuilder::new();
        private.mode(0o700);
        private.create(&temporary).map_err(write_failed(target))?;
        let writer = Self {
            target: target.to_owned(),
            temporary,
            parts: BTreeMap::new(),
            finished: false,
        };
        for directory in DIRECTORIES {
            let path = writer.temporary.join(directory);
            private.create(&path).map_err(write_failed(&path))?;
        }
        Ok(writer)
    }

    /// Where a person will find a part.
    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.target.join(name)
    }

    /// Makes the file of a part. Nobody is to change it but through the configuration.
    pub(super) fn create(&self, name: &str) -> Result<File, SnapshotError> {
        let editable = name == super::restore::CONFIG;
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(if editable { 0o600 } else { 0o400 })
            .open(self.temporary.join(name))
            .map_err(write_failed(self.path(name)))
    }

    /// Adds a part that is written already.
    pub(super) fn add(&mut self, name: &str, part: Part) {
        self.parts.insert(name.to_owned(), part);
    }

    /// Writes a part.
    pub(super) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), SnapshotError> {
        let failed = write_failed(self.path(name));
        self.create(name)?.write_all(bytes).map_err(failed)?;
        self.add(name, Part::of(bytes));
        Ok(())
    }

    /// Writes a file that the guest was booted from; one that came from a snapshot is copied from it
    /// unread, by the file system if it can.
    pub(super) fn write_content(
        &mut self,
        name: &str,
        content: &Content,
    ) -> Result<(), SnapshotError> {
        let Some(saved) = content.saved_file() else {
            return self.write(name, content.bytes()?);
        };
        let file = self.create(name)?;
        if !copied(&saved.file, saved.length, &file) {
            // Another file system, or one that can't.
            let bytes = saved.bytes()?;
            file.write_all_at(bytes, 0)
                .map_err(write_failed(self.path(name)))?;
        }
        self.add(name, Part::summed(saved.length, saved.checksum));
        Ok(())
    }

    /// Writes the header, brings everything to the disk, and gives it its name. Tells how many bytes
    /// it takes there.
    pub(super) fn finish(mut self, header: Header) -> Result<u64, SnapshotError> {
        let header = Header {
            parts: std::mem::take(&mut self.parts),
            ..header
        };
        let names: Vec<String> = header.parts.keys().cloned().collect();
        // Plain data with text for keys.
        let mut bytes = serde_json::to_vec_pretty(&header).unwrap_or_default();
        bytes.push(b'\n');
        self.write(header::NAME, &bytes)?;

        let mut size = 0;
        for name in names.iter().map(String::as_str).chain([header::NAME]) {
            let failed = || write_failed(self.path(name));
            let file = File::open(self.temporary.join(name)).map_err(failed())?;
            file.sync_all().map_err(failed())?;
            size += file.metadata().map_err(failed())?.blocks() * 512;
        }
        for directory in DIRECTORIES.into_iter().chain([""]) {
            let path = self.temporary.join(directory);
            sync_directory(&path).map_err(write_failed(self.target.join(directory)))?;
        }
        let renamed = renameat_with(
            CWD,
            &self.temporary,
            CWD,
            &self.target,
            RenameFlags::NOREPLACE,
        );
        match renamed {
            Ok(()) => {}
            Err(Errno::EXIST | Errno::NOTEMPTY) => {
                return Err(SnapshotError::Exists {
                    path: self.target.clone(),
                });
            }
            // A file system that knows no such flag: who makes a directory of the name in this very
            // moment loses an empty one.
            Err(Errno::INVAL | Errno::NOSYS) => {
                if self.target.symlink_metadata().is_ok() {
                    return Err(SnapshotError::Exists {
                        path: self.target.clone(),
                    });
                }
                fs::rename(&self.temporary, &self.target)
                    .map_err(write_failed(self.target.as_path()))?;
            }
            Err(error) => return Err(write_failed(self.target.as_path())(error.into())),
        }
        self.finished = true;
        let above = match self.target.parent() {
            Some(above) if above != Path::new("") => above,
            _ => Path::new("."),
        };
        // It is there; whether its name outlives a loss of power is all that this may fail to do.
        let _ = sync_directory(above);
        Ok(size)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished {
            // What can't be removed stays under a name that says what it is.
            let _ = fs::remove_dir_all(&self.temporary);
        }
    }
}

/// Lets the file system copy a file, which may share the blocks; whether it did.
fn copied(from: &File, length: u64, to: &File) -> bool {
    let (mut read, mut written) = (0, 0);
    while written < length {
        let left = usize::try_from(length - written).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(from, Some(&mut read), to, Some(&mut written), left) {
            Ok(1..) => {}
            Ok(_) | Err(_) => return false,
        }
    }
    true
}

fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// A file of a snapshot that is read when it is needed. It stays open, so that it is there also if the
/// snapshot is removed meanwhile.
#[derive(Debug)]
pub(crate) struct SavedFile {
    part: String,
    path: PathBuf,
    file: File,
    length: u64,
    checksum: u32,
    bytes: OnceLock<Vec<u8>>,
}

impl SavedFile {
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Its bytes, which are read and checked the first time.
    pub(crate) fn bytes(&self) -> Result<&[u8], SnapshotError> {
        if let Some(bytes) = self.bytes.get() {
            return Ok(bytes);
        }
        let mut bytes = vec![0; self.length as usize];
        self.file
            .read_exact_at(&mut bytes, 0)
            .map_err(read_failed(&self.path))?;
        if crc32fast::hash(&bytes) != self.checksum {
            return Err(SnapshotError::Checksum {
                part: self.part.clone(),
            });
        }
        Ok(self.bytes.get_or_init(|| bytes))
    }
}

/// A snapshot that is read.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) directory: PathBuf,
    pub(super) header: Header,
}

impl Reader {
    /// Reads the header, and checks that every part that it names is there in its length.
    pub(super) fn open(directory: &Path) -> Result<Self, SnapshotError> {
        let not_a_snapshot = |reason: &str| SnapshotError::NotASnapshot {
            path: directory.to_owned(),
            reason: reason.to_owned(),
        };
        let metadata = directory.metadata().map_err(read_failed(directory))?;
        if !metadata.is_dir() {
            return Err(not_a_snapshot("it is no directory"));
        }
        let path = directory.join(header::NAME);
        let file = match open_file(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(not_a_snapshot("it has no `snapshot.json`"));
            }
            Err(error) => return Err(read_failed(&path)(error)),
        };
        let mut bytes = Vec::new();
        file.take(header::LONGEST)
            .read_to_end(&mut bytes)
            .map_err(read_failed(&path))?;
        let reader = Self {
            // Disks are named from here, whatever becomes of our working directory.
            directory: std::path::absolute(directory).unwrap_or_else(|_| directory.to_owned()),
            header: Header::parse(&bytes)?,
        };
        for (name, part) in &reader.header.parts {
            check_name(name)?;
            let found = reader.file(name)?.1;
            if found != part.length && name != super::restore::CONFIG {
                return Err(SnapshotError::Length {
                    part: name.clone(),
                    found,
                    expected: part.length,
                });
            }
        }
        Ok(reader)
    }

    fn part(&self, name: &str) -> Result<&Part, SnapshotError> {
        let part = self.header.parts.get(name);
        part.ok_or_else(|| SnapshotError::Missing {
            part: name.to_owned(),
        })
    }

    /// Opens a part that the header names, and tells its length.
    pub(super) fn file(&self, name: &str) -> Result<(File, u64), SnapshotError> {
        self.part(name)?;
        let path = self.directory.join(name);
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => SnapshotError::Missing {
                part: name.to_owned(),
            },
            _ => read_failed(&path)(error),
        };
        let file = open_file(&path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        Ok((file, length))
    }

    /// Reads a part whole; `checked` says whether it must be as it was written.
    pub(super) fn read(&self, name: &str, checked: bool) -> Result<Vec<u8>, SnapshotError> {
        let part = self.part(name)?;
        let (file, length) = self.file(name)?;
        let too_long = || SnapshotError::Unreadable {
            part: name.to_owned(),
            reason: format!("{length} bytes are too many"),
        };
        // Sections are a few KiB each, but for input that waits; memory's list grows with it.
        if length > 256 << 20 {
            return Err(too_long());
        }
        let mut bytes = Vec::with_capacity(length as usize);
        let path = self.directory.join(name);
        file.take(length)
            .read_to_end(&mut bytes)
            .map_err(read_failed(&path))?;
        if checked && crc32fast::hash(&bytes) != part.checksum(name)? {
            return Err(SnapshotError::Checksum {
                part: name.to_owned(),
            });
        }
        Ok(bytes)
    }

    /// A part to be read later.
    pub(super) fn later(&self, name: &str) -> Result<Content, SnapshotError> {
        let part = self.part(name)?;
        let (file, length) = self.file(name)?;
        if length > LONGEST {
            return Err(SnapshotError::Unreadable {
                part: name.to_owned(),
                reason: format!("{length} bytes are too many"),
            });
        }
        Ok(Content::saved(SavedFile {
            part: name.to_owned(),
            path: self.directory.join(name),
            file,
            length,
            checksum: part.checksum(name)?,
            bytes: OnceLock::new(),
        }))
    }

    /// The parts whose names are `start` and a number, in the order of their numbers.
    pub(super) fn numbered(&self, start: &str) -> Result<Vec<String>, SnapshotError> {
        let parts = self.header.parts.keys();
        let count = parts
            .filter_map(|name| name.strip_prefix(start))
            .filter(|number| number.parse::<u32>().is_ok())
            .count();
        let names = (0..count).map(|number| format!("{start}{number}"));
        names.map(|name| self.part(&name).map(|_| name)).collect()
    }
}

/// Opens a file, and nothing else that may lie there: a pipe would never end.
fn open_file(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::other("it is no file"))
    }
}

/// Refuses names that lead out of the directory; which of the others are known is for whoever reads
/// them to say.
fn check_name(name: &str) -> Result<(), SnapshotError> {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte))
    };
    let known = match name.split_once('/') {
        Some((directory, file)) => DIRECTORIES.contains(&directory) && plain(file),
        None => plain(name),
    };
    if known {
        Ok(())
    } else {
        Err(SnapshotError::Unknown {
            part: name.to_owned(),
        })
    }
}
