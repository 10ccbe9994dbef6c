//! The guest that needs no download, with pipes in the place of a terminal.

use std::process::Stdio;

use rustix::process::Signal;

use crate::harness::{close_stdout_of, collect, finish, finish_with, start, stdout_of, trapgate};

#[test]
fn says_hello_computes_and_powers_off() {
    let run = finish_with(trapgate(&["run", "builtin"]), b"6 * (3 + 4)\n");
    assert_eq!(run.code(), Some(0), "{run:?}");
    assert!(
        run.out().contains("hello from trapgate's built-in guest"),
        "{run:?}"
    );
    assert!(run.out().lines().any(|line| line == "42"), "{run:?}");
    assert!(run.stderr.starts_with("trapgate: "), "{run:?}");
    assert_eq!(run.stderr.lines().count(), 1, "{run:?}");
}

/// The line that says what runs says which engine, and why that one.
#[test]
fn engine_is_named_with_its_reason() {
    for engine in ["interp", "jit", "lockstep"] {
        let run = finish(trapgate(&["run", "--engine", engine, "builtin"]));
        let line = format!("trapgate: {engine} (asked for), the built-in guest\n");
        assert_eq!((run.code(), &run.stderr), (Some(0), &line), "{run:?}");
    }
    let doctor = finish(trapgate(&["doctor", "--json"]));
    let report: serde_json::Value = serde_json::from_slice(&doctor.stdout).unwrap();
    let chosen = report["chosen_engine"].as_str().unwrap();
    let run = finish(trapgate(&["run", "builtin"]));
    let reason = run.stderr.strip_prefix(&format!("trapgate: {chosen} ("));
    let reason = reason.and_then(|rest| rest.strip_suffix("), the built-in guest\n"));
    assert!(
        reason.is_some_and(|reason| reason.contains("kvm")),
        "{run:?}"
    );
}

#[test]
fn quiet_says_nothing_of_its_own() {
    let run = finish_with(trapgate(&["run", "-q", "builtin"]), b"1\n");
    assert_eq!((run.code(), run.stderr.as_str()), (Some(0), ""), "{run:?}");
}

#[test]
fn end_of_input_ends_it() {
    let run = finish(trapgate(&["run", "builtin"]));
    assert_eq!(run.code(), Some(0), "{run:?}");
    assert!(run.out().contains("goodbye"), "{run:?}");
}

#[test]
fn sees_the_machine_that_was_asked_for() {
    let line = &[
        "run",
        "builtin",
        "--memory",
        "64M",
        "--cmdline",
        "some words",
    ];
    let run = finish(trapgate(line));
    assert!(run.out().contains("memory: 63 MiB"), "{run:?}");
    assert!(run.out().contains("command line: some words"), "{run:?}");
}

#[test]
fn interrupt_ends_the_machine_and_us() {
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        // Given a guest that waits for input which never comes
        let mut command = trapgate(&["run", "builtin"]);
        command.stdin(Stdio::piped());
        let mut child = start(command);
        stdout_of(&mut child).expect("> ");

        child.signal(signal);

        let run = collect(child);
        assert_eq!(run.code(), Some(status), "{run:?}");
    }
}

#[test]
fn nobody_who_listens_ends_the_machine() {
    // Given a guest whose output nobody reads any more
    let mut command = trapgate(&["run", "-q", "builtin"]);
    command.stdin(Stdio::piped());
    let mut child = start(command);
    close_stdout_of(&mut child);

    let run = collect(child);

    assert_eq!(
        (run.code(), run.stderr.as_str()),
        (Some(141), ""),
        "{run:?}"
    );
}

#[test]
fn full_disk_behind_standard_output_is_an_error() {
    let mut command = trapgate(&["run", "-q", "builtin"]);
    command.stdout(std::fs::File::create("/dev/full").unwrap());
    let run = finish(command);
    assert_eq!(run.code(), Some(122), "{run:?}");
    assert!(run.stderr.contains("standard output"), "{run:?}");
}
