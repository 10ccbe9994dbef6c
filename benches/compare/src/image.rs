//! The files that everything runs from: the stock kernel, an initramfs with the workloads, and the same programs for
//! the host.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use cpio::newc::{Builder, Reader, trailer};
use tempfile::TempDir;
use trapgate_image::{COMMAND_LINE, CacheDir, Phase, Session, session_archive, stock};

use crate::Failure;
use crate::arguments::Arguments;

/// The workloads' program, which the build script made; empty if it could not.
const WORKLOADS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/workloads"));
/// Why it could not.
const PROBLEM: &str = include_str!(concat!(env!("OUT_DIR"), "/problem.txt"));

/// Where the program is in the guest.
const IN_GUEST: &str = "workloads";
/// The stock initramfs's busybox.
const BUSYBOX: &str = "bin/busybox";

/// Everything that is the same for every run.
pub(crate) struct Image {
    /// A bzImage.
    pub(crate) kernel: PathBuf,
    /// What `uname -r` says, and where it comes from.
    pub(crate) kernel_name: String,
    /// The kernel's command line.
    pub(crate) command_line: String,
    /// The initramfs but for the session.
    base: Vec<u8>,
    scale: u32,
    limit: u32,
    /// Holds what follows.
    directory: TempDir,
    /// On the host, the workloads' directory: on a file system in memory, as in the guest, if there is one.
    work: TempDir,
}

/// Makes the files.
///
/// # Errors
/// A file cannot be had or written; the text says what to do about it.
pub(crate) fn prepare(arguments: &Arguments) -> Result<Image, Failure> {
    if WORKLOADS.is_empty() {
        return Err(format!(
            "the workloads were not built: {PROBLEM}\n  fix: install a C compiler with a static C library \
             (`apt-get install gcc libc6-dev`), then `touch benches/compare/build.rs`"
        )
        .into());
    }
    let mut last = None;
    let mut progress = |phase: Phase, _: u64, _: Option<u64>| {
        if last.replace(phase) != Some(phase) {
            eprintln!("{phase}");
        }
    };
    let image = CacheDir::from_env()
        .and_then(|cache| stock(&cache, &mut progress))
        .map_err(|error| format!("{error}\n  fix: {}", error.fix()))?;
    let mut base = fs::read(&image.initramfs)?;
    let busybox = member(&base, BUSYBOX)?;
    base.extend(archive(IN_GUEST, WORKLOADS)?);

    let directory = TempDir::new()?;
    let write = |name: &str, content: &[u8]| -> Result<(), Failure> {
        let path = directory.path().join(name);
        fs::write(&path, content)?;
        Ok(fs::set_permissions(path, Permissions::from_mode(0o755))?)
    };
    write("workloads", WORKLOADS)?;
    write("busybox", &busybox)?;
    let work = TempDir::new_in("/dev/shm").or_else(|_| TempDir::new())?;
    Ok(Image {
        kernel: image.kernel,
        kernel_name: format!("{} ({})", image.kernel_version, image.origin),
        command_line: format!("console=ttyS0 panic=-1 quiet {COMMAND_LINE}"),
        base,
        scale: arguments.scale(),
        limit: arguments.limit,
        directory,
        work,
    })
}

impl Image {
    /// The program and its arguments to run workloads of these names on the host.
    pub(crate) fn on_host(&self, names: &[&str]) -> Vec<String> {
        let path = |name| self.directory.path().join(name).display().to_string();
        let work = self.work.path().display().to_string();
        self.arguments(names, path("workloads"), work, path("busybox"))
    }

    /// An initramfs that runs workloads of these names in the guest.
    ///
    /// # Errors
    /// It cannot be written.
    pub(crate) fn initramfs(&self, names: &[&str]) -> Result<PathBuf, Failure> {
        let command = self.arguments(
            names,
            format!("/{IN_GUEST}"),
            "/tmp".to_owned(),
            format!("/{BUSYBOX}"),
        );
        let session = session_archive(&Session {
            command: command.into_iter().map(Into::into).collect(),
            ..Session::default()
        })?;
        let path = self.directory.path().join("initramfs");
        let mut file = fs::File::create(&path)?;
        file.write_all(&self.base)?;
        file.write_all(&session)?;
        Ok(path)
    }

    fn arguments(
        &self,
        names: &[&str],
        program: String,
        work: String,
        busybox: String,
    ) -> Vec<String> {
        vec![
            program,
            "all".to_owned(),
            names.join(","),
            work,
            busybox,
            self.scale.to_string(),
            self.limit.to_string(),
        ]
    }
}

/// A file in a cpio archive.
fn member(archive: &[u8], path: &str) -> Result<Vec<u8>, Failure> {
    let mut rest = archive;
    loop {
        let mut reader = Reader::new(rest)?;
        if reader.entry().is_trailer() {
            return Err(format!("there is no `{path}` in the stock initramfs").into());
        }
        if Path::new(reader.entry().name()) == Path::new(path) {
            let mut content = Vec::new();
            reader.read_to_end(&mut content)?;
            return Ok(content);
        }
        rest = reader.finish()?;
    }
}

/// A cpio archive with one program, as long as archives must be for another to follow.
fn archive(path: &str, content: &[u8]) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let size = u32::try_from(content.len())?;
    let mut writer = Builder::new(path)
        .ino(1)
        .nlink(1)
        .mode(0o100_755)
        .write(&mut bytes, size);
    writer.write_all(content)?;
    writer.finish()?;
    trailer(&mut bytes)?;
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_into_an_archive_is_found_in_it() {
        let bytes = archive("a/program", b"its code").unwrap();
        assert_eq!(bytes.len() % 512, 0);
        assert_eq!(member(&bytes, "a/program").unwrap(), b"its code");
        assert!(member(&bytes, "another").is_err());
    }
}
