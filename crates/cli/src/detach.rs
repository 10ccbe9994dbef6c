//! `trapgate run --detach` and `trapgate restore --detach`: a machine that goes on when its terminal and its shell are gone.
//!
//! We start ourselves once more, as a child with the same arguments. Until its machine runs the child has our terminal
//! for what it has to say, belongs to our session, and so ends with Ctrl-C. Then it becomes a session of its own, its messages go to
//! a file beside its socket, and it tells its name on a pipe: we print it and end. If the pipe ends without a name the
//! child's end is ours.

use std::io::Read;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, write};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout, stdout};
use trapgate_api::directory::{Claim, Name};

use crate::failure::Failure;
use crate::{signals, status, terminal};

/// Set for the child.
const CHILD: &str = "TRAPGATE_DETACHED";

/// Whether we are the child.
pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Starts the child, and waits until its machine runs or can't.
///
/// # Errors
/// It can't be started.
pub(crate) fn launch(quiet: bool) -> Result<u8, Failure> {
    let failed = |error: std::io::Error| {
        Failure::new(status::HOST, "cannot start a process in the background").cause(error)
    };
    // By its name, which people look for in `top`; or as the program that we are, if that has another name by now.
    let program = std::env::current_exe()
        .ok()
        .filter(|path| path.exists())
        .unwrap_or_else(|| "/proc/self/exe".into());
    let mut child = Command::new(program)
        .args(std::env::args_os().skip(1))
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let mut told = String::new();
    if let Some(pipe) = &mut child.stdout {
        // Much longer than a name; more would be somebody else's.
        pipe.take(256).read_to_string(&mut told).map_err(failed)?;
    }
    let Ok(name) = told.trim_end().parse::<Name>() else {
        let status = child.wait().map_err(failed)?;
        // What was wrong it has said itself.
        return Ok(
            match (
                status.code(),
                std::os::unix::process::ExitStatusExt::signal(&status),
            ) {
                (Some(code), _) => u8::try_from(code).unwrap_or(status::DEFECT),
                (None, Some(signal)) => signals::exit_status(signal),
                (None, None) => status::DEFECT,
            },
        );
    };
    print_name(&name)?;
    if !quiet {
        terminal::say(&format!(
            "trapgate: `{name}` runs in the background; `trapgate console {name}` attaches, `trapgate stop {name}` stops it"
        ));
    }
    Ok(status::SUCCESS)
}

fn print_name(name: &Name) -> Result<(), Failure> {
    let line = format!("{name}\n");
    match write(stdout(), line.as_bytes()) {
        // A pipe that nobody reads: the machine runs all the same.
        Ok(_) | Err(Errno::PIPE) => Ok(()),
        Err(error) => Err(Failure::new(
            status::HOST,
            format!("`{name}` runs, but its name cannot be written to standard output"),
        )
        .cause(error)),
    }
}

/// The machine runs and can be reached: leaves the terminal and the session, and tells the parent.
///
/// # Errors
/// There is no place for messages.
pub(crate) fn ready(claim: &Claim) -> Result<(), Failure> {
    let name = claim.name();
    let log = claim.create_log().map_err(|error| {
        let path = claim.directory().log_path(name);
        Failure::new(
            status::HOST,
            format!("cannot write messages to `{}`", path.display()),
        )
        .cause(error)
    })?;
    let failed = |error: Errno| {
        Failure::new(status::HOST, "cannot leave the terminal for the background").cause(error)
    };
    let nothing = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed)?;
    // Fails if we lead a process group, as when a shell started us as the child of nobody; then there is no terminal to leave.
    let _ = rustix::process::setsid();
    let line = format!("{name}\n");
    // The parent may have been killed meanwhile: the machine runs all the same.
    let _ = write(stdout(), line.as_bytes());
    dup2_stdin(&nothing).map_err(failed)?;
    dup2_stdout(&nothing).map_err(failed)?;
    dup2_stderr(&log).map_err(failed)
}
