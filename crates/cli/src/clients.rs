//! `trapgate ps`, `pause`, `resume`, `stop` and `snapshot`: what is asked of machines that run.

use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use serde_json::{Value, json};
use trapgate_api::client::{Client, ClientError};
use trapgate_api::data::{Info, Nothing, SnapshotRequest, StateAnswer, StopRequest};
use trapgate_api::directory::{Found, Name, RuntimeDirectory};
use trapgate_api::operation::{GetInfo, Operation, Pause, Resume, Snapshot, Stop};
use trapgate_api::problem::ProblemKind;

use crate::arguments::{PsArguments, SnapshotArguments, StopArguments};
use crate::failure::Failure;
use crate::{size, status, terminal};

/// How long a machine may take to say what it is.
const INFO: Duration = Duration::from_secs(2);
/// How long it may take to stand still or to go on.
const CHANGE: Duration = Duration::from_secs(30);
/// What it may take longer to stop than the guest was given.
const STOP: Duration = Duration::from_secs(30);

/// A line of the list.
#[derive(Debug)]
enum Listed {
    Known(Box<Info>),
    /// It is there and says nothing.
    Silent(Found),
}

/// Lists the machines that run.
///
/// # Errors
/// The directory of the sockets can't be used.
pub(crate) fn ps(arguments: &PsArguments) -> Result<u8, Failure> {
    let found = open()?
        .machines()
        .map_err(|error| Failure::directory(&error))?;
    // One that does not answer does not hold the others up.
    let threads: Vec<_> = found
        .into_iter()
        .map(|found| thread::spawn(move || look(found)))
        .collect();
    let mut machines = Vec::new();
    for thread in threads {
        let listed = thread
            .join()
            .map_err(|_| Failure::defect("a thread that asked a machine ended unexpectedly"))??;
        machines.extend(listed);
    }
    print(&if arguments.json {
        let values: Vec<Value> = machines.iter().map(value).collect();
        format!("{:#}\n", Value::from(values))
    } else {
        table(&machines)
    })
}

/// What a machine says that it is; `None` if it has ended meanwhile.
fn look(found: Found) -> Result<Option<Listed>, Failure> {
    match client(&found.name)?.call::<GetInfo>(&Nothing {}, Some(INFO)) {
        Ok(info) => Ok(Some(Listed::Known(Box::new(info)))),
        Err(ClientError::NoSuchMachine { .. } | ClientError::Ended { .. }) => Ok(None),
        Err(_) => Ok(Some(Listed::Silent(found))),
    }
}

fn value(listed: &Listed) -> Value {
    match listed {
        // Strings and numbers always are JSON.
        Listed::Known(info) => serde_json::to_value(info).unwrap_or_default(),
        Listed::Silent(found) => json!({
            "name": found.name.as_str(),
            "pid": found.pid,
            "state": "unresponsive",
        }),
    }
}

fn table(machines: &[Listed]) -> String {
    let heading = [
        "NAME", "PID", "STATE", "ENGINE", "CPUS", "MEMORY", "UPTIME", "GUEST",
    ];
    let mut rows = vec![heading.map(str::to_owned)];
    rows.extend(machines.iter().map(|listed| {
        match listed {
            Listed::Known(info) => [
                printable(&info.name),
                info.pid.to_string(),
                info.state.to_string(),
                printable(&info.engine.name),
                info.cpus.to_string(),
                size::show(info.memory_bytes),
                duration(info.uptime_seconds),
                printable(&info.guest),
            ],
            Listed::Silent(found) => [
                found.name.to_string(),
                found
                    .pid
                    .map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
                "unresponsive".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
                "-".to_owned(),
            ],
        }
    }));
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths);
        let line: String = cells
            .map(|(cell, width)| format!("{cell:width$}  "))
            .collect();
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// A kernel's version is whatever its file says: nothing in it is to act on a terminal.
pub(crate) fn printable(text: &str) -> String {
    let shown = |c: char| if c.is_control() { '\u{b7}' } else { c };
    text.chars().map(shown).collect()
}

/// Seconds, in at most two units.
fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, ..) => format!("{hours}h {}m", minutes % 60),
        _ => format!("{days}d {}h", hours % 24),
    }
}

/// Stands a machine still.
///
/// # Errors
/// What went wrong, for a person.
pub(crate) fn pause(name: &Name) -> Result<u8, Failure> {
    change::<Pause>(name, "pause", "was paused already")
}

/// Lets a machine go on.
///
/// # Errors
/// What went wrong, for a person.
pub(crate) fn resume(name: &Name) -> Result<u8, Failure> {
    change::<Resume>(name, "resume", "was running already")
}

fn change<O: Operation<Request = Nothing, Answer = StateAnswer>>(
    name: &Name,
    verb: &str,
    already: &str,
) -> Result<u8, Failure> {
    let answer = client(name)?
        .call::<O>(&Nothing {}, Some(CHANGE))
        .map_err(|error| Failure::client(verb, name, &error))?;
    if !answer.changed {
        terminal::say(&format!("trapgate: `{name}` {already}"));
    }
    Ok(status::SUCCESS)
}

/// Stops a machine.
///
/// # Errors
/// What went wrong, for a person.
pub(crate) fn stop(arguments: &StopArguments) -> Result<u8, Failure> {
    let StopArguments { name, now, grace } = arguments;
    let request = StopRequest {
        grace_seconds: if *now { 0.0 } else { (*grace).into() },
    };
    let limit = Duration::from_secs_f64(request.grace_seconds) + STOP;
    match client(name)?.call::<Stop>(&request, Some(limit)) {
        Ok(answer) => {
            if answer.forced && !now {
                terminal::say(&format!(
                    "trapgate: the guest of `{name}` did not shut down within {grace} s, and was stopped"
                ));
            }
            Ok(status::SUCCESS)
        }
        // Which is what was wanted.
        Err(ClientError::Ended { .. }) => Ok(status::SUCCESS),
        Err(error) => Err(Failure::client("stop", name, &error)),
    }
}

/// Saves a machine.
///
/// # Errors
/// What went wrong, for a person.
pub(crate) fn snapshot(arguments: &SnapshotArguments) -> Result<u8, Failure> {
    let SnapshotArguments { name, directory } = arguments;
    let request = SnapshotRequest {
        directory: absolute(directory)?,
    };
    // As long as the disk takes.
    let saved = client(name)?
        .call::<Snapshot>(&request, None)
        .map_err(|error| Failure::client("save", name, &error))?;
    terminal::say(&format!(
        "trapgate: saved `{name}` to `{}`, {} MiB; the guest stood still for {:.3} s",
        directory.display(),
        saved.bytes.div_ceil(1 << 20),
        saved.paused_ns as f64 / 1e9
    ));
    Ok(status::SUCCESS)
}

/// The machine has another working directory, and takes text.
fn absolute(directory: &Path) -> Result<String, Failure> {
    let unusable = || {
        Failure::new(
            status::USAGE,
            format!("cannot save to `{}`", directory.display()),
        )
    };
    let absolute = std::path::absolute(directory).map_err(|error| unusable().cause(error))?;
    absolute.into_os_string().into_string().map_err(|_| {
        unusable()
            .cause("the path is not UTF-8")
            .fix("choose another directory")
    })
}

pub(crate) fn open() -> Result<RuntimeDirectory, Failure> {
    RuntimeDirectory::open().map_err(|error| Failure::directory(&error))
}

/// A client of the machine of this name.
///
/// # Errors
/// There is no place where its socket could be.
pub(crate) fn client(name: &Name) -> Result<Client, Failure> {
    Client::new(open()?, name.clone()).map_err(|error| Failure::client("reach", name, &error))
}

impl Failure {
    /// A machine that runs did not do what it was asked for.
    pub(crate) fn client(verb: &str, name: &Name, error: &ClientError) -> Self {
        let status = match error {
            ClientError::NoSuchMachine { .. } => status::USAGE,
            ClientError::Slow { .. } | ClientError::Host { .. } => status::HOST,
            ClientError::Ended { .. } => status::REFUSED,
            ClientError::Refused(problem) => match problem.kind {
                ProblemKind::Host => status::HOST,
                ProblemKind::Defect => status::DEFECT,
                _ => status::REFUSED,
            },
            ClientError::Nonsense { .. } => status::DEFECT,
        };
        let mut failure = Self::new(status, format!("cannot {verb} `{name}`")).chain(error);
        if matches!(error, ClientError::NoSuchMachine { .. })
            && let Ok(directory) = RuntimeDirectory::open()
            && let log = directory.log_path(name)
            && log.exists()
        {
            failure = failure.cause(format!(
                "it ran before; what it said last is in `{}`",
                log.display()
            ));
        }
        match error.fix() {
            Some(fix) => failure.fix(fix),
            None => failure,
        }
    }
}

/// Writes to standard output, and gives the exit status.
pub(crate) fn print(text: &str) -> Result<u8, Failure> {
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        match rustix::io::write(rustix::stdio::stdout(), rest) {
            Ok(count) => rest = &rest[count..],
            Err(Errno::INTR) => {}
            // As a program that SIGPIPE (13) ends.
            Err(Errno::PIPE) => return Ok(status::SIGNAL + 13),
            Err(error) => {
                return Err(
                    Failure::new(status::HOST, "cannot write to standard output").cause(error),
                );
            }
        }
    }
    Ok(status::SUCCESS)
}

#[cfg(test)]
mod tests {
    use trapgate_api::data::{Engine, State};

    use super::*;

    fn info(name: &str) -> Listed {
        Listed::Known(Box::new(Info {
            name: name.to_owned(),
            pid: 7,
            state: State::Running,
            guest: "Linux\u{1b}[2J 6.1".to_owned(),
            engine: Engine {
                name: "interp".to_owned(),
                reason: "a test".to_owned(),
            },
            cpus: 2,
            memory_bytes: 512 << 20,
            started_unix_seconds: 0,
            uptime_seconds: 75.4,
            has_terminal: true,
            version: "0".to_owned(),
        }))
    }

    fn silent() -> Listed {
        Listed::Silent(Found {
            name: "stuck".parse().unwrap(),
            pid: Some(12345),
        })
    }

    #[test]
    fn table_has_a_line_for_each_machine_and_columns_that_stand_under_each_other() {
        let text = table(&[info("a-rather-long-name"), silent()]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "NAME                PID    STATE         ENGINE  CPUS  MEMORY   UPTIME  GUEST",
                "a-rather-long-name  7      running       interp  2     512 MiB  1m 15s  Linux\u{b7}[2J 6.1",
                "stuck               12345  unresponsive  -       -     -        -       -",
            ]
        );
    }

    #[test]
    fn json_has_what_the_machine_says_and_names_those_that_say_nothing() {
        let known = value(&info("x"));
        assert_eq!(
            (&known["state"], &known["cpus"]),
            (&json!("running"), &json!(2))
        );
        let unknown = value(&silent());
        assert_eq!(
            (&unknown["state"], &unknown["pid"]),
            (&json!("unresponsive"), &json!(12345))
        );
    }

    #[test]
    fn times_are_told_in_two_units() {
        for (seconds, text) in [
            (-1.0, "0s"),
            (0.9, "0s"),
            (59.9, "59s"),
            (60.0, "1m 0s"),
            (3599.0, "59m 59s"),
            (3600.0, "1h 0m"),
            (90061.0, "1d 1h"),
        ] {
            assert_eq!(duration(seconds), text);
        }
    }
}
