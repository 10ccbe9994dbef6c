//! What is booted: chosen by the command line, read from files, and checked as far as that needs no machine.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use trapgate_boot::{BootError, BzImage, Kind, detect};
use trapgate_image::COMMAND_LINE;
use trapgate_vmm::{Content, MachineError};

use crate::arguments::RunArguments;
use crate::failure::Failure;
use crate::{size, status};

/// No kernel and no initrd is larger.
const LARGEST_FILE: u64 = 2 << 30;
/// Enough of a file to tell what it is; a multiboot header is in the first 8 KiB, an ISO's mark at 32 KiB.
const HEAD: usize = 64 << 10;
/// The least memory in which the stock kernel unpacks its initramfs and starts a shell.
const LEAST_FOR_STOCK: u64 = 96 << 20;

/// For every Linux that gets our words: on the serial port, and a panic resets the machine at once, which ends
/// the run. By default it would stand still for ever.
const LINUX: &str = "console=ttyS0 panic=-1";
/// What the command line names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The distribution's kernel, with an initramfs of ours or another.
    Stock {
        /// In place of ours.
        initrd: Option<PathBuf>,
    },
    /// The guest that is part of this program.
    Builtin,
    /// A kernel of the person's.
    Kernel {
        /// The kernel.
        kernel: PathBuf,
        /// Its initial RAM disk.
        initrd: Option<PathBuf>,
    },
}

/// What is booted.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    /// What to call it in a message: `Linux 6.1.0`, or the name of a file.
    pub(crate) name: String,
    /// The kernel's file.
    pub(crate) kernel: Content,
    /// Initial RAM disks.
    pub(crate) initrds: Vec<Content>,
    /// The kernel's command line.
    pub(crate) command_line: String,
}

impl Source {
    /// # Errors
    /// Arguments that contradict each other.
    pub(crate) fn of(run: &RunArguments) -> Result<Self, Failure> {
        let initrd = run.initrd.clone();
        let source = match (run.image.as_deref(), &run.kernel) {
            (Some(image), Some(kernel)) => {
                return Err(usage(format!(
                    "the image `{}` and the kernel `{}` can't both be booted",
                    image.to_string_lossy(),
                    kernel.display()
                ))
                .fix("leave one of them out"));
            }
            (None, None) => Self::Stock { initrd },
            (None, Some(kernel)) => Self::Kernel {
                kernel: kernel.clone(),
                initrd,
            },
            (Some(image), None) if image == "linux" => Self::Stock { initrd },
            (Some(image), None) if image == "builtin" => {
                if initrd.is_some() {
                    return Err(usage("the built-in guest takes no initrd")
                        .fix("leave `--initrd` out, or pass a kernel with `--kernel`"));
                }
                Self::Builtin
            }
            (Some(image), None) => Self::Kernel {
                kernel: known_file(image)?,
                initrd,
            },
        };
        if !run.command.is_empty() && !source.has_init() {
            let what = match source {
                Self::Builtin => "the built-in guest runs no commands",
                _ => "a command needs trapgate's own initramfs",
            };
            return Err(usage(what).fix(
                "run the command in the stock Linux: `trapgate run -- COMMAND`; \
                 or leave it out and use the guest's console",
            ));
        }
        Ok(source)
    }

    /// Whether the guest runs our init, and has its console on virtio ports rather than the serial port.
    pub(crate) fn has_init(&self) -> bool {
        matches!(self, Self::Stock { initrd: None })
    }

    /// What can be said before anything is read or fetched.
    ///
    /// # Errors
    /// Too little memory for a kernel that is known.
    pub(crate) fn check_memory(&self, bytes: u64) -> Result<(), Failure> {
        if matches!(self, Self::Stock { .. }) && bytes < LEAST_FOR_STOCK {
            return Err(usage(format!(
                "Linux needs more memory than {}",
                size::show(bytes)
            ))
            .cause(format!(
                "the stock kernel and its initramfs take about {}",
                size::show(LEAST_FOR_STOCK)
            ))
            .fix("give the guest more: `--memory 256M`"));
        }
        Ok(())
    }
}

/// A file that an IMAGE names; the message knows what people may have meant.
fn known_file(image: &OsStr) -> Result<PathBuf, Failure> {
    let path = PathBuf::from(image);
    if path.exists() {
        return Ok(path);
    }
    let text = image.to_string_lossy();
    Err(Failure::new(
        status::INPUT,
        format!("there is no image and no file called `{text}`"),
    )
    .cause("an image is `linux`, `builtin`, or a kernel's file")
    .fix(format!(
        "check the name; to run a command in Linux put it behind two hyphens: `trapgate run -- {text}`"
    )))
}

impl Guest {
    /// The built-in guest.
    pub(crate) fn builtin(run: &RunArguments) -> Self {
        Self {
            name: "the built-in guest".to_owned(),
            kernel: trapgate_guests::BUILTIN.into(),
            initrds: Vec::new(),
            command_line: run.cmdline.clone().unwrap_or_default(),
        }
    }

    /// A kernel of the person's.
    ///
    /// # Errors
    /// A file that can't be read, or is no kernel.
    pub(crate) fn from_files(
        run: &RunArguments,
        kernel: &Path,
        initrd: Option<&Path>,
    ) -> Result<Self, Failure> {
        let bytes = read_kernel(kernel)?;
        let is_linux = detect(&bytes) == Kind::BzImage;
        let version = BzImage::parse(&bytes)
            .ok()
            .and_then(|image| image.version());
        let default = if is_linux { LINUX } else { "" };
        Ok(Self {
            name: match version {
                Some(version) => format!("Linux {}", first_word(&version)),
                None => format!("`{}`", kernel.display()),
            },
            kernel: bytes.into(),
            initrds: initrd.map(read_initrd).transpose()?.into_iter().collect(),
            command_line: run.cmdline.clone().unwrap_or_else(|| default.to_owned()),
        })
    }

    /// The stock kernel with these initial RAM disks.
    ///
    /// # Errors
    /// A file of the cache that can't be read any more.
    pub(crate) fn stock(
        run: &RunArguments,
        version: &str,
        kernel: &Path,
        initrds: Vec<Content>,
    ) -> Result<Self, Failure> {
        let quiet = if run.verbose { "" } else { " quiet" };
        let more = run.cmdline.as_deref().unwrap_or_default();
        Ok(Self {
            name: format!("Linux {version}"),
            kernel: read_kernel(kernel)?.into(),
            initrds,
            command_line: format!("{LINUX}{quiet} {COMMAND_LINE} {more}")
                .trim_end()
                .to_owned(),
        })
    }
}

fn first_word(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or(text)
}

/// Reads a kernel, after a look at what it is: a disk image of many GiB need not be read to be refused.
///
/// # Errors
/// A file that can't be read, or is no kernel.
fn read_kernel(path: &Path) -> Result<Vec<u8>, Failure> {
    let name = format!("`{}`", path.display());
    let mut file = open("kernel", path)?;
    let unreadable =
        |error| Failure::new(status::INPUT, format!("cannot read the kernel {name}")).cause(error);
    let mut bytes = Vec::new();
    file.by_ref()
        .take(HEAD as u64)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    let refused = |error: BootError| Failure::machine(&name, &MachineError::Boot(error));
    match detect(&bytes) {
        Kind::Empty => return Err(refused(BootError::Empty)),
        Kind::Foreign(found) => return Err(refused(BootError::Architecture { found })),
        Kind::Other(found) => {
            let failure = refused(BootError::NotAKernel { found });
            return Err(
                if found.contains("disk image") || found.contains("file system") {
                    failure.fix(format!(
                        "attach it as a disk, beside a kernel: `trapgate run --disk path={}`",
                        path.display()
                    ))
                } else {
                    failure
                },
            );
        }
        _ => {}
    }
    file.take(LARGEST_FILE)
        .read_to_end(&mut bytes)
        .map_err(unreadable)?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(too_large("kernel", path));
    }
    Ok(bytes)
}

/// Reads an initial RAM disk. What is in it is between the kernel and it.
///
/// # Errors
/// A file that can't be read, or is empty.
pub(crate) fn read_initrd(path: &Path) -> Result<Content, Failure> {
    let mut bytes = Vec::new();
    let read = open("initrd", path)?
        .take(LARGEST_FILE + 1)
        .read_to_end(&mut bytes);
    read.map_err(|error| {
        Failure::new(
            status::INPUT,
            format!("cannot read the initrd `{}`", path.display()),
        )
        .cause(error)
    })?;
    if bytes.is_empty() {
        return Err(Failure::new(
            status::INPUT,
            format!("the initrd `{}` is empty", path.display()),
        )
        .fix("make it again, or leave `--initrd` out"));
    }
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(too_large("initrd", path));
    }
    Ok(bytes.into())
}

fn too_large(what: &str, path: &Path) -> Failure {
    Failure::new(
        status::INPUT,
        format!(
            "the {what} `{}` is larger than {}",
            path.display(),
            size::show(LARGEST_FILE)
        ),
    )
    .fix(format!("check that it is a {what}"))
}

fn open(what: &str, path: &Path) -> Result<File, Failure> {
    let failed = |cause: String| {
        Failure::new(
            status::INPUT,
            format!("cannot open the {what} `{}`", path.display()),
        )
        .cause(cause)
        .fix("check the path, and that you may read it")
    };
    let file = File::open(path).map_err(|error| failed(error.to_string()))?;
    match file.metadata() {
        Ok(metadata) if metadata.is_dir() => Err(failed("it is a directory".to_owned())),
        Ok(_) => Ok(file),
        Err(error) => Err(failed(error.to_string())),
    }
}

fn usage(message: impl Into<String>) -> Failure {
    Failure::new(status::USAGE, message)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::arguments::{Action, Arguments};

    fn arguments(line: &[&str]) -> RunArguments {
        let all = ["trapgate", "run"].iter().chain(line);
        match Arguments::parse_from(all).action {
            Action::Run(run) => run,
            other => panic!("{other:?}"),
        }
    }

    fn source(line: &[&str]) -> Result<Source, Failure> {
        Source::of(&arguments(line))
    }

    #[test]
    fn what_is_named_is_what_boots() {
        let stock = Source::Stock { initrd: None };
        assert_eq!(source(&[]).unwrap(), stock);
        assert_eq!(source(&["linux", "--", "ls"]).unwrap(), stock);
        assert_eq!(source(&["builtin"]).unwrap(), Source::Builtin);
        let kernel = |kernel: &str, initrd: Option<&str>| Source::Kernel {
            kernel: kernel.into(),
            initrd: initrd.map(Into::into),
        };
        assert_eq!(source(&["--kernel", "k"]).unwrap(), kernel("k", None));
        assert_eq!(
            source(&["--kernel", "k", "--initrd", "i"]).unwrap(),
            kernel("k", Some("i"))
        );
        assert_eq!(
            source(&["/proc/self/exe"]).unwrap(),
            kernel("/proc/self/exe", None)
        );
    }

    #[test]
    fn contradictions_are_refused() {
        for (line, status) in [
            (&["linux", "--kernel", "k"][..], status::USAGE),
            (&["builtin", "--initrd", "i"], status::USAGE),
            (&["builtin", "--", "ls"], status::USAGE),
            (&["--kernel", "k", "--", "ls"], status::USAGE),
            (&["--initrd", "i", "--", "ls"], status::USAGE),
            (&["no-such-file"], status::INPUT),
        ] {
            assert_eq!(source(line).unwrap_err().status, status, "{line:?}");
        }
    }

    #[test]
    fn forgotten_hyphens_are_guessed() {
        let text = source(&["uname"]).unwrap_err().to_string();
        assert!(text.contains("trapgate run -- uname"), "{text}");
    }

    #[test]
    fn too_little_memory_for_linux_is_told_at_once() {
        let stock = Source::Stock { initrd: None };
        assert!(stock.check_memory(8 << 20).is_err());
        assert!(stock.check_memory(256 << 20).is_ok());
        assert!(Source::Builtin.check_memory(8 << 20).is_ok());
    }

    #[test]
    fn files_that_are_no_kernels_are_refused_with_their_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        let mut disk = vec![0; 4096];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        for (bytes, complaint) in [
            (&b""[..], "is empty"),
            (b"hello, world", "a text file"),
            (b"QFI\xfb\0\0\0\x03", "--disk"),
            (&disk, "--disk"),
            (&[0; 4096], "zero bytes"),
        ] {
            std::fs::write(&path, bytes).unwrap();
            let failure = Guest::from_files(&arguments(&[]), &path, None).unwrap_err();
            let text = failure.to_string();
            assert_eq!(failure.status, status::INPUT, "{text}");
            assert!(text.contains(complaint), "{text}");
            assert!(text.contains(path.to_str().unwrap()), "{text}");
            assert!(text.contains("fix:"), "{text}");
        }
    }

    #[test]
    fn files_that_cannot_be_read_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        for path in [directory.path(), &directory.path().join("missing")] {
            let text = Guest::from_files(&arguments(&[]), path, None)
                .unwrap_err()
                .to_string();
            assert!(text.starts_with("error: cannot open the kernel"), "{text}");
            let text = read_initrd(path).unwrap_err().to_string();
            assert!(text.starts_with("error: cannot open the initrd"), "{text}");
        }
    }

    #[test]
    fn endless_files_are_refused_at_once() {
        let zero = Path::new("/dev/zero");
        assert!(Guest::from_files(&arguments(&[]), zero, None).is_err());
    }

    #[test]
    fn empty_initrd_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = read_initrd(file.path()).unwrap_err().to_string();
        assert!(text.contains("is empty"), "{text}");
    }

    #[test]
    fn words_for_the_kernel_come_after_ours_or_instead_of_them() {
        // Given a file that passes for a bzImage
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut bytes = vec![0; 0x1000];
        bytes[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        std::fs::write(file.path(), bytes).unwrap();
        let words = arguments(&["--cmdline", "quiet=no single"]);

        let stock = Guest::stock(&words, "6.1", file.path(), Vec::new()).unwrap();
        let own = Guest::from_files(&words, file.path(), None).unwrap();
        let silent = Guest::from_files(&arguments(&[]), file.path(), None).unwrap();

        assert!(stock.command_line.starts_with("console=ttyS0 panic=-1"));
        assert!(stock.command_line.ends_with(" quiet=no single"));
        assert_eq!(own.command_line, "quiet=no single");
        assert_eq!(silent.command_line, "console=ttyS0 panic=-1");
    }
}
