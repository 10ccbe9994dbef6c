//! What can go wrong, and what a person does about it.

use std::io;
use std::path::{Path, PathBuf};

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// Neither `XDG_CACHE_HOME` nor `HOME` names an absolute path.
    #[error(
        "there is no place for the cache: neither XDG_CACHE_HOME nor HOME is set to an absolute path"
    )]
    NoCacheDir,
    /// The cache directory can't be used.
    #[error("cannot use the cache: {action} `{}`: {source}", path.display())]
    Cache {
        /// What was tried, such as `cannot write`.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The file system of the cache directory is full, or would be.
    #[error("no space for the image in `{}`: about {} MiB are needed, {} MiB are free", dir.display(), need.div_ceil(1 << 20), free >> 20)]
    NoSpace {
        /// The cache directory.
        dir: PathBuf,
        /// Bytes needed for the rest of the work, an estimate from above.
        need: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// This host has no `apt-get` and `apt-cache`.
    #[error("no package manager that can fetch a kernel was found (apt-get, apt-cache)")]
    NoPackageManager,
    /// The package manager works but knows no package of this kind.
    #[error("the package manager knows no package of {names}")]
    NoSuchPackage {
        /// The names that were tried.
        names: String,
    },
    /// A package manager's command failed.
    #[error("`{command}` failed: {detail}")]
    Command {
        /// The command and its main arguments.
        command: String,
        /// What it said, or how it ended.
        detail: String,
    },
    /// A package is damaged or not what it should be.
    #[error("the package `{}` is damaged: {detail}", file.display())]
    Package {
        /// The .deb file.
        file: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The packages lack something that an image needs.
    #[error("{what} is not in {place}")]
    Missing {
        /// What is missing, such as `/bin/busybox`.
        what: String,
        /// Where it was looked for.
        place: String,
    },
    /// The host offers no kernel either.
    #[error("{because}; and of the host's own kernels none can be used: {detail}")]
    NoHostKernel {
        /// Why the host's kernels were looked at.
        because: Box<ImageError>,
        /// What was looked for, and what was wrong with it.
        detail: String,
    },
    /// A kernel file is not an x86 bzImage.
    #[error("`{}` is not a Linux kernel for x86 (bzImage): {detail}", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What gave it away.
        detail: String,
    },
    /// A kernel module can't be read.
    #[error("the kernel module `{path}` is damaged: {detail}")]
    Module {
        /// Its path in the package.
        path: String,
        /// What is wrong with it.
        detail: String,
    },
    /// A session that can't be told to the guest.
    #[error("{what}")]
    BadSession {
        /// What is wrong with it.
        what: String,
    },
}

impl ImageError {
    /// What a person can do about it, as one sentence without a full stop.
    pub fn fix(&self) -> String {
        match self {
            Self::NoCacheDir => "set XDG_CACHE_HOME to a directory that you may write to".into(),
            Self::Cache { .. } => "make the directory writable, or set XDG_CACHE_HOME to one that is".into(),
            Self::NoSpace { .. } => "free some space, or set XDG_CACHE_HOME to a directory on another disk".into(),
            Self::NoPackageManager | Self::NoSuchPackage { .. } | Self::NoHostKernel { .. } => {
                "pass a kernel of your own: `--kernel FILE`, with `--initrd FILE` if it needs one".into()
            }
            Self::Command { .. } => "check that this machine reaches its package mirrors (`apt-get update` tells), \
                                     or pass a kernel of your own: `--kernel FILE --initrd FILE`"
                .into(),
            Self::Package { .. } | Self::Missing { .. } | Self::Module { .. } => {
                "run it again to fetch the package anew, or pass a kernel of your own: `--kernel FILE --initrd FILE`"
                    .into()
            }
            Self::NotAKernel { .. } => "pass another kernel: `--kernel FILE`".into(),
            Self::BadSession { .. } => "leave it out".into(),
        }
    }

    /// An error of the file system under the cache. A full disk has an error of its own.
    pub(crate) fn cache(action: &'static str, path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let dir = path.parent().unwrap_or(path);
                Self::NoSpace {
                    dir: dir.into(),
                    need: crate::cache::NEED,
                    free: crate::cache::free_space(dir),
                }
            }
            _ => Self::Cache {
                action,
                path: path.into(),
                source,
            },
        }
    }
}
