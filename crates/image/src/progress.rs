//! How long work is reported to whoever shows it.

use std::fmt;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// Another process is making the image; the total is unknown.
    Waiting,
    /// The package manager's lists are read, and fetched where they are missing; the total is unknown.
    Lists,
    /// Packages are fetched.
    Download,
    /// The kernel, its modules and busybox are taken out of the packages.
    Unpack,
    /// The image is written to the cache.
    Write,
}

impl fmt::Display for Phase {
    /// A few words for a person, such as `fetching packages`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting => "waiting for another trapgate that prepares the image",
            Self::Lists => "reading package lists",
            Self::Download => "fetching packages",
            Self::Unpack => "unpacking the kernel",
            Self::Write => "writing the image",
        })
    }
}

/// Is told how far long work has come. Called a few times a second, from the thread that asked for the work.
/// Nothing is reported where the image is in the cache. It may unwind (`std::panic::resume_unwind`) to abandon the
/// work: commands are ended and half-made files removed on the way.
pub trait Progress {
    /// `done` of `total` bytes of this phase are done; `total` is `None` where nobody knows.
    fn report(&mut self, phase: Phase, done: u64, total: Option<u64>);
}

impl<F: FnMut(Phase, u64, Option<u64>)> Progress for F {
    fn report(&mut self, phase: Phase, done: u64, total: Option<u64>) {
        self(phase, done, total);
    }
}
