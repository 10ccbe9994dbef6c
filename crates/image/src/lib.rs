//! Where the guest's kernel and initramfs come from.
//!
//! [`stock`] gives the distribution's own, unmodified kernel and an initramfs that this crate writes:
//! busybox, the kernel's virtio modules, and an init. The packages come from the host's package manager
//! ([`Origin`]), are unpacked here, and the result is kept in a [`CacheDir`], so that only the first run needs
//! a network. This crate prints nothing: it reports to a [`Progress`].
//!
//! # The init protocol
//!
//! What the init in the initramfs expects of the VMM, and what it gives.
//!
//! **Session.** The VMM appends the archive made by [`session_archive`] to the initramfs (Linux unpacks
//! concatenated archives in order; the initramfs is padded so that nothing need be inserted between). It holds
//! - `/trapgate/command`: the command to run, absent for an interactive shell. It is a line of shell that sets the
//!   positional parameters, so that every byte of every argument arrives as it is.
//! - `/trapgate/env`: environment variables of the session, likewise. `COLUMNS` and `LINES` become the size of the
//!   terminal and are not exported.
//! - `/trapgate/tty`: present if a command is to run on the terminal.
//!
//! An initramfs without it starts an interactive shell.
//!
//! **Consoles.** The serial port is `/dev/console` (pass `console=ttyS0 quiet`) and carries what the kernel says.
//! The session is on a virtio-console (virtio 1.2, 5.3) with `VIRTIO_CONSOLE_F_MULTIPORT`:
//!
//! | port | named | carries |
//! | --- | --- | --- |
//! | 0, announced with `CONSOLE_PORT` | | `/dev/hvc0`, the terminal: an interactive shell, or a command with `/trapgate/tty` |
//! | any | [`STATUS_PORT`] | lines from the guest, see below |
//! | any | [`STDIN_PORT`], [`STDOUT_PORT`], [`STDERR_PORT`] | the streams of a command without `/trapgate/tty`, binary clean |
//!
//! The VMM must announce each of the ports with `PORT_ADD`, then `PORT_NAME`, and connect it with `PORT_OPEN` 1 before the
//! guest opens it: a driver waits for ever when it writes to a port that is not connected, and reads end of file from
//! it. It must not send bytes on the standard input's port before the guest has opened it (`PORT_OPEN` 1 from the guest):
//! the driver discards them. At the end of standard input it sends `PORT_OPEN` 0 *after* the last bytes are in the
//! receive queue; the guest reads them and then end of file. When nobody reads our output any more the VMM should end the
//! machine, or go on accepting and discarding: a disconnected port blocks its writer.
//!
//! **Status.** On [`STATUS_PORT`], in this order, each followed by a newline:
//! - `init`, as soon as the port exists: the kernel has booted, the first program runs.
//! - the exit status of the command or shell in decimal: 127 if the command was not found, 126 if it can't be executed,
//!   128+n if signal n ended it. By then all of its output has been taken by the VMM, and what it left running was killed.
//!   A `poweroff` from within the session ends the machine without this line.
//!
//! Without a virtio-console that has this port the same lines go to the serial port, each with the prefix
//! [`STATUS_PREFIX`]. Without a virtio-console at all the session too is on the serial port, `/dev/ttyS0`.
//!
//! After the status the guest syncs, unmounts, and powers off. `poweroff`, `halt` and `reboot` work from the shell, and the
//! ACPI power button (fixed or control method) does the same as `poweroff`.
#![forbid(unsafe_code)]

mod apt;
mod cache;
mod deb;
mod error;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod fuzzing;
mod host;
mod initramfs;
mod modules;
mod packages;
mod progress;
mod session;

pub use cache::CacheDir;
pub use error::ImageError;
pub use progress::{Phase, Progress};
pub use session::{
    STATUS_PORT, STATUS_PREFIX, STDERR_PORT, STDIN_PORT, STDOUT_PORT, Session, session_archive,
};

use std::fmt;
use std::path::{Path, PathBuf};

/// What to add to the stock kernel's command line so that it boots faster.
/// - `mitigations=off`: there is one guest in this machine, and what it runs is its own;
/// - `no_timer_check`, `tsc=reliable`: there is nothing to find out about our clocks;
/// - `i8042.*`, `8250.nr_uarts`: do not look for what is not there;
/// - `random.trust_cpu=on`: RDRAND is the host's;
/// - `cryptomgr.notests`: ciphers need not be tested again at every boot;
/// - `rcupdate.rcu_expedited=1`: do not wait for timers where one may ask.
pub const COMMAND_LINE: &str = "mitigations=off no_timer_check tsc=reliable random.trust_cpu=on cryptomgr.notests \
     i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd 8250.nr_uarts=1 rcupdate.rcu_expedited=1";

/// A kernel and the initramfs that goes with it, as files in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StockImage {
    /// A bzImage.
    pub kernel: PathBuf,
    /// An uncompressed cpio archive ("newc") to which a [`session_archive`] may be appended.
    pub initramfs: PathBuf,
    /// What `uname -r` says in the guest, such as `6.1.0-56-cloud-amd64`.
    pub kernel_version: String,
    /// Where the kernel was taken from.
    pub origin: Origin,
}

/// Where a kernel was taken from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A package of the host's distribution.
    Package {
        /// Its name, such as `linux-image-6.1.0-56-cloud-amd64`.
        name: String,
        /// Its version, such as `6.1.192-2`.
        version: String,
    },
    /// A kernel that is installed on the host.
    Host {
        /// The file it was copied from.
        path: PathBuf,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Package { name, version } => write!(f, "package {name} {version}"),
            Self::Host { path } => write!(f, "the host's {}", path.display()),
        }
    }
}

/// What an image is made of, in memory.
pub(crate) struct Parts {
    pub(crate) kernel: Vec<u8>,
    pub(crate) kernel_version: String,
    pub(crate) busybox: Vec<u8>,
    pub(crate) modules: modules::ModuleSet,
    pub(crate) origin: Origin,
}

/// The stock image: from the cache if it is there and intact (no network, no package manager, a few milliseconds),
/// else made anew from packages that are still in the cache, else from packages that are fetched first.
///
/// Several processes may call this at once: one does the work and the others wait for it. A process that is
/// killed at any moment leaves no half-written image behind.
///
/// # Errors
/// Any [`ImageError`]; [`ImageError::fix`] says what to do about it.
pub fn stock(cache: &CacheDir, progress: &mut dyn Progress) -> Result<StockImage, ImageError> {
    cache::open_or_make(cache, progress, &mut acquire)
}

/// Like [`stock`], with the kernel that this package depends on, such as `linux-image-rt-amd64`, and no other.
/// `cache` must hold images of this package only, since what is in it is not asked which package it is of:
/// a directory of its own, say below the one for [`stock`].
///
/// # Errors
/// Any [`ImageError`]; [`ImageError::fix`] says what to do about it.
pub fn stock_of(
    package: &str,
    cache: &CacheDir,
    progress: &mut dyn Progress,
) -> Result<StockImage, ImageError> {
    cache::open_or_make(
        cache,
        progress,
        &mut |cache, work, progress| match apt::kept(cache, progress)? {
            Some(parts) => Ok(parts),
            None => apt::fetch(&[package], cache, work, progress),
        },
    )
}

/// The image that [`stock`] would give without making one, if the cache holds an intact one.
pub fn cached(cache: &CacheDir) -> Option<StockImage> {
    cache::find(cache)
}

/// Gets the parts by way of the package manager, or from the host where there is none. `work` is a private
/// directory that is removed afterwards.
fn acquire(
    cache: &CacheDir,
    work: &Path,
    progress: &mut dyn Progress,
) -> Result<Parts, ImageError> {
    if let Some(parts) = apt::kept(cache, progress)? {
        return Ok(parts);
    }
    match apt::fetch(packages::KERNELS, cache, work, progress) {
        Err(why @ (ImageError::NoPackageManager | ImageError::NoSuchPackage { .. })) => {
            host::parts(progress, why)
        }
        result => result,
    }
}
