//! Runs workloads, each in a process of its own, so that one that fails takes no other with it.

use std::fmt::Display;
use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio, exit};

use crate::libc::{SIGKILL, alarm, kill, now, stay_on_one_processor};
use crate::{NotRun, Setting, prepare};

/// A workload runs until it has run as often as this,
const MOST_RUNS: usize = 5;
/// or so many nanoseconds in all.
const ENOUGH: u64 = 1_000_000_000;

pub(crate) fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        [program, "all", names, work, busybox, scale, seconds] => {
            let rest = [work, busybox, scale, seconds];
            say(format_args!("@clock {}", now()));
            for name in names.split(',').filter(|name| !name.is_empty()) {
                wait();
                say(one_apart(program, name, &rest));
            }
            wait();
            say(format_args!("@clock {}", now()));
            say("@end");
        }
        [_, "one", name, work, busybox, scale, seconds] => {
            let (Ok(scale), Ok(seconds)) = (scale.parse(), seconds.parse()) else {
                exit(2);
            };
            // SAFETY: a signal that ends this process.
            unsafe { alarm(seconds) };
            let setting = Setting {
                work: work.into(),
                busybox: busybox.into(),
                scale,
            };
            say(one(name, &setting));
        }
        _ => {
            eprintln!("usage: workloads all|one NAME[,NAME…] WORK BUSYBOX SCALE SECONDS");
            exit(2);
        }
    }
}

/// A line to whoever listens; if nobody does any more there is nothing to do.
fn say(line: impl Display) {
    let mut out = std::io::stdout().lock();
    if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
        exit(1);
    }
}

/// Waits for a line, whatever is in it, if standard input has one.
fn wait() {
    // At its end there is nobody who would tell.
    let _ = std::io::stdin().read_line(&mut String::new());
}

/// Runs a workload in a process of its own; gives the line with what came of it.
fn one_apart(program: &str, name: &str, rest: &[&str; 4]) -> String {
    let work = format!("{}/{name}", rest[0]);
    // What an earlier run left there, if anything.
    let _ = fs::remove_dir_all(&work);
    if let Err(error) = fs::create_dir_all(&work) {
        return format!("@fail {name} cannot make {work}: {error}");
    }
    let started = Command::new(program)
        .args(["one", name, &work])
        .args(&rest[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn();
    let child = match started {
        Ok(child) => child,
        Err(error) => return format!("@fail {name} cannot start: {error}"),
    };
    let group = -(child.id() as i32);
    let ended = child.wait_with_output();
    // SAFETY: a signal to the group that was made above: what the workload started ends with it.
    unsafe { kill(group, SIGKILL) };
    let _ = fs::remove_dir_all(&work);
    match ended {
        Ok(ended) => {
            let said = String::from_utf8_lossy(&ended.stdout);
            match said.lines().find(|line| line.starts_with('@')) {
                Some(line) if ended.status.success() => line.to_owned(),
                _ => format!("@fail {name} it ended with {}", ended.status),
            }
        }
        Err(error) => format!("@fail {name} {error}"),
    }
}

/// Runs a workload as often as it needs; gives the line with what came of it.
fn one(name: &str, setting: &Setting) -> String {
    stay_on_one_processor();
    let mut work = match prepare(name, setting) {
        Ok(work) => work,
        Err(NotRun::Lacks(what)) => return format!("@skip {name} {what}"),
        Err(NotRun::Failed(reason)) => return format!("@fail {name} {}", one_line(&reason)),
    };
    let (mut times, mut first) = (Vec::new(), None);
    while times.len() < MOST_RUNS && times.iter().sum::<u64>() < ENOUGH {
        let begun = now();
        let done = work();
        times.push(now() - begun);
        match (done, first) {
            (Ok(check), None) => first = Some(check),
            (Ok(check), Some(expected)) if check == expected => {}
            (Ok(check), Some(expected)) => {
                return format!("@fail {name} computed {check:x}, and before {expected:x}");
            }
            (Err(reason), _) => return format!("@fail {name} {}", one_line(&reason)),
        }
    }
    let times: Vec<String> = times.iter().map(u64::to_string).collect();
    format!("@done {name} {:x} {}", first.unwrap_or(0), times.join(","))
}

fn one_line(text: &str) -> String {
    text.lines().collect::<Vec<_>>().join("; ")
}
