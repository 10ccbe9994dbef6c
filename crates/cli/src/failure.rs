//! What is said to people when something went wrong: what, why, and what to do about it.

use std::error::Error;
use std::fmt;
use std::path::Path;

use trapgate_image::ImageError;
use trapgate_vmm::{DiskError, MachineError};

use crate::status;

/// The end of a run, with all that a person needs to know, and our exit status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The exit status, see [`status`].
    pub(crate) status: u8,
    /// What was wrong, with what.
    message: String,
    causes: Vec<String>,
    fix: Option<String>,
    log: Vec<String>,
}

impl Failure {
    /// `message` is what stands after `error:`.
    pub(crate) fn new(status: u8, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            causes: Vec::new(),
            fix: None,
            log: Vec::new(),
        }
    }

    /// Adds why; the last one added is the deepest.
    pub(crate) fn cause(mut self, cause: impl fmt::Display) -> Self {
        self.causes.push(cause.to_string());
        self
    }

    /// Adds an error and what caused it.
    pub(crate) fn chain(mut self, error: &dyn Error) -> Self {
        let mut next = Some(error);
        while let Some(error) = next {
            let text = error.to_string();
            // `#[error(transparent)]` and errors that print their source would say it twice.
            if self.causes.last().is_none_or(|last| !last.ends_with(&text)) {
                self.causes.push(text);
            }
            next = error.source();
        }
        self
    }

    /// Says what to do about it.
    pub(crate) fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// Adds the last lines that the guest's kernel printed.
    pub(crate) fn log(mut self, lines: Vec<String>) -> Self {
        self.log = lines;
        self
    }

    /// There is no image.
    pub(crate) fn image(error: &ImageError) -> Self {
        let status = match error {
            ImageError::BadSession { .. } => status::USAGE,
            _ => status::HOST,
        };
        Self::new(status, "there is no Linux to boot")
            .chain(error)
            .fix(error.fix())
    }

    /// A disk can't be used.
    pub(crate) fn disk(path: &Path, error: &DiskError) -> Self {
        let failure = Self::new(
            status::INPUT,
            format!("cannot use the disk `{}`", path.display()),
        )
        .chain(error);
        match error.fix() {
            Some(fix) => failure.fix(fix),
            None => failure,
        }
    }

    /// There is no machine. `kernel` says what was to be booted, in words for a person.
    pub(crate) fn machine(kernel: &str, error: &MachineError) -> Self {
        let (status, message) = match error {
            MachineError::Boot(_) | MachineError::Snapshot(_) => {
                (status::INPUT, format!("cannot boot {kernel}"))
            }
            MachineError::Disk(_) => (status::INPUT, "cannot use a disk".to_owned()),
            MachineError::Cpus { .. }
            | MachineError::MemorySize { .. }
            | MachineError::MemoryGranularity { .. }
            | MachineError::NoSuchEngine { .. } => {
                (status::USAGE, "there is no such machine".to_owned())
            }
            MachineError::Memory(_)
            | MachineError::Engine { .. }
            | MachineError::Level { .. }
            | MachineError::Kvm(_)
            | MachineError::Jit(_)
            | MachineError::StateHere { .. }
            | MachineError::Bus(_)
            | MachineError::Thread { .. } => (status::HOST, "cannot make the machine".to_owned()),
            _ => (status::DEFECT, "cannot make the machine".to_owned()),
        };
        let failure = Self::new(status, message).chain(error);
        match error.fix() {
            Some(fix) => failure.fix(fix),
            None => failure,
        }
    }

    /// Something that can't happen, unless trapgate is wrong.
    pub(crate) fn defect(what: impl Into<String>) -> Self {
        Self::new(status::DEFECT, what)
            .fix("this is a defect of trapgate: please report it, with the command line")
    }
}

impl fmt::Display for Failure {
    /// Lines without a final newline.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.log.is_empty() {
            writeln!(f, "The last lines of the guest's kernel:")?;
            for line in &self.log {
                writeln!(f, "  | {line}")?;
            }
        }
        write!(f, "error: {}", self.message)?;
        for cause in &self.causes {
            write!(f, "\n  cause: {cause}")?;
        }
        if let Some(fix) = &self.fix {
            write!(f, "\n  fix: {fix}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn failure_reads_as_error_cause_and_fix() {
        let failure = Failure::new(status::INPUT, "cannot boot `x`")
            .cause("it is empty")
            .fix("copy it again");
        assert_eq!(
            failure.to_string(),
            "error: cannot boot `x`\n  cause: it is empty\n  fix: copy it again"
        );
    }

    #[test]
    fn chain_of_errors_is_printed_once() {
        // Given an error that has a source, and one that is wrapped transparently
        let io = DiskError::Open {
            path: "d".into(),
            source: io::Error::from_raw_os_error(5),
        };

        let failure = Failure::machine("it", &MachineError::Disk(io)).to_string();

        assert_eq!(failure.matches("cannot open").count(), 1, "{failure}");
        assert_eq!(failure.matches("os error 5").count(), 1, "{failure}");
    }

    #[test]
    fn kinds_of_failures_have_statuses_of_their_own() {
        let no_space = ImageError::NoSpace {
            dir: "/c".into(),
            need: 1,
            free: 0,
        };
        assert_eq!(Failure::image(&no_space).status, status::HOST);
        let cpus = MachineError::Cpus { cpus: 0, most: 9 };
        assert_eq!(Failure::machine("it", &cpus).status, status::USAGE);
        let level = MachineError::Level {
            level: trapgate_vmm::Level::V3,
            lacks: vec!["avx2"],
        };
        assert_eq!(Failure::machine("it", &level).status, status::HOST);
        let empty = MachineError::Boot(trapgate_boot::BootError::Empty);
        assert_eq!(Failure::machine("it", &empty).status, status::INPUT);
    }

    #[test]
    fn log_stands_before_the_error_so_that_the_error_is_read_last() {
        let text = Failure::new(1, "it panicked")
            .log(vec!["a".into(), "b".into()])
            .to_string();
        assert!(text.ends_with("  | a\n  | b\nerror: it panicked"), "{text}");
    }
}
