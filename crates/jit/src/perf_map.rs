//! What translated code belongs to, for `perf`: `/tmp/perf-PID.map`, with a line for each piece of code.
//!
//! `perf` looks there for names of code in mappings that are of no file: anonymous memory, or what the kernel calls
//! `/dev/zero`. The latter is what [`crate::code_memory`] then uses, so that even so no mapping is writable and
//! executable. The file has no times in it, so an address must not get a second meaning: code memory is not used
//! again but when all of it was.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// The file belongs to the process: all its vCPUs, and those of machines that come later, write to it.
static FILE: Mutex<Option<File>> = Mutex::new(None);

/// Writes to the file.
#[derive(Debug)]
pub(crate) struct PerfMap(());

impl PerfMap {
    /// Where the file is.
    pub(crate) fn path() -> PathBuf {
        format!("/tmp/perf-{}.map", std::process::id()).into()
    }

    /// Makes the file, if there is none of this process yet.
    pub(crate) fn open() -> io::Result<Self> {
        let mut file = FILE.lock().unwrap_or_else(PoisonError::into_inner);
        if file.is_none() {
            let path = Self::path();
            // Of a process that had our number before. The directory is anybody's: never write through a link.
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let mut options = File::options();
            options.write(true).create_new(true).mode(0o600);
            *file = Some(options.open(path)?);
        }
        Ok(Self(()))
    }

    /// Names pieces of code: first address, bytes, name.
    pub(crate) fn add(&self, pieces: impl IntoIterator<Item = (u64, u64, String)>) {
        let mut text = String::new();
        for (address, bytes, name) in pieces {
            text += &line(address, bytes, &name);
        }
        let mut file = FILE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = file.as_mut() {
            // A full disk costs names in a profile, no more.
            let _ = file.write_all(text.as_bytes());
        }
    }
}

/// A line of the file (`tools/perf/Documentation/jit-interface.txt` of Linux).
fn line(address: u64, bytes: u64, name: &str) -> String {
    format!("{address:x} {bytes:x} {name}\n")
}

/// Name of a unit: whose code, where, and for a user, whose address spaces are many, the page in memory.
pub(crate) fn unit(user: bool, rip: u64, gpa: u64) -> String {
    if user {
        format!("user {rip:x} @{:x}", gpa | rip & 0xfff)
    } else {
        format!("kernel {rip:x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_has_a_line_for_each_piece_in_hexadecimal() {
        let map = PerfMap::open().unwrap();
        map.add([
            (0x7f00_1234, 0x20, unit(true, 0x40_1abc, 0x9f000)),
            (
                0x7f00_1260,
                0x100,
                unit(false, 0xffff_ffff_8100_0000, 0x100_0000),
            ),
        ]);
        // Another vCPU of this process.
        PerfMap::open().unwrap().add([(1, 2, "stub".to_owned())]);
        let text = std::fs::read_to_string(PerfMap::path()).unwrap();
        std::fs::remove_file(PerfMap::path()).unwrap();
        assert_eq!(
            text,
            "7f001234 20 user 401abc @9fabc\n7f001260 100 kernel ffffffff81000000\n1 2 stub\n"
        );
    }
}
