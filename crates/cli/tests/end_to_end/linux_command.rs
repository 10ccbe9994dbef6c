//! `trapgate run -- COMMAND`: the command's streams and status are ours.

use std::process::Stdio;

use rustix::process::Signal;

use crate::harness::{collect, finish, finish_with, linux, start, stderr_of, stdout_of, trapgate};

#[test]
fn output_error_and_status_are_the_commands() {
    let Some(_turn) = linux() else { return };
    let run = finish(trapgate(&[
        "run",
        "--",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 7",
    ]));
    assert_eq!(run.code(), Some(7), "{run:?}");
    assert_eq!(run.out(), "out\n");
    let (ours, theirs) = run.stderr.split_once('\n').unwrap();
    assert!(
        ours.starts_with("trapgate: ") && ours.contains(", Linux "),
        "{ours}"
    );
    assert!(ours.contains(", init after "), "{ours}");
    assert_eq!(theirs, "err\n");
}

#[test]
fn every_byte_passes_both_ways() {
    let Some(_turn) = linux() else { return };
    let bytes: Vec<u8> = (0..200_000_u32).map(|n| (n ^ n >> 8) as u8).collect();
    let run = finish_with(trapgate(&["run", "-q", "--", "cat"]), &bytes);
    assert_eq!(run.code(), Some(0), "{}", run.stderr);
    assert!(run.stdout == bytes, "{} bytes came back", run.stdout.len());
    assert_eq!(run.stderr, "");
}

#[test]
fn arguments_arrive_as_they_are() {
    let Some(_turn) = linux() else { return };
    let run = finish(trapgate(&[
        "run", "-q", "--", "printf", "<%s>", "a b", "", "$HOME", "'\"\\",
    ]));
    assert_eq!(run.out(), "<a b><><$HOME><'\"\\>", "{run:?}");
}

#[test]
fn what_cannot_run_has_the_status_of_shells() {
    let Some(_turn) = linux() else { return };
    for (command, status) in [("no-such-program", 127), ("/etc", 126)] {
        let run = finish(trapgate(&["run", "-q", "--", command]));
        assert_eq!(run.code(), Some(status), "{run:?}");
        assert!(!run.stderr.is_empty(), "{command}");
    }
}

#[test]
fn script_on_standard_input_runs_in_a_shell() {
    let Some(_turn) = linux() else { return };
    let run = finish_with(trapgate(&["run", "-q"]), b"echo $((6 * 7))\nexit 3\n");
    assert_eq!(
        (run.code(), run.out().as_str()),
        (Some(3), "42\n"),
        "{run:?}"
    );
}

#[test]
fn guest_is_the_machine_that_was_asked_for() {
    let Some(_turn) = linux() else { return };
    let script = "uname -s; grep -c ^processor /proc/cpuinfo; cat /proc/cmdline; ls /sys/bus/virtio/devices; date +%s";
    let run = finish(trapgate(&[
        "run",
        "-q",
        "--cpus",
        "2",
        "--memory",
        "256M",
        "--cmdline",
        "trapgate.word=1",
        "--",
        "sh",
        "-c",
        script,
    ]));
    assert_eq!(run.code(), Some(0), "{run:?}");
    let out = run.out();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..2], ["Linux", "2"], "{out}");
    assert!(lines[2].contains("trapgate.word=1"), "{out}");
    assert!(lines.contains(&"virtio0"), "{out}");
    let guest: u64 = lines.last().unwrap().parse().unwrap();
    let host = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(host.abs_diff(guest) <= 30, "{guest} against {host}");
}

#[test]
fn nobody_who_listens_ends_the_machine() {
    let Some(_turn) = linux() else { return };
    let mut child = start(trapgate(&["run", "-q", "--", "yes"]));
    {
        let mut out = stdout_of(&mut child);
        out.expect("y\ny\n");
    }
    let run = collect(child);
    assert_eq!(
        (run.code(), run.stderr.as_str()),
        (Some(141), ""),
        "{run:?}"
    );
}

#[test]
fn interrupt_at_every_stage_ends_it() {
    let Some(_turn) = linux() else { return };
    // While the machine is made, while it boots, while the command runs
    for stage in ["", "Run /init", "here"] {
        let mut command = trapgate(&[
            "run",
            "--verbose",
            "--",
            "sh",
            "-c",
            "echo here >&2; sleep 1000",
        ]);
        command.stdin(Stdio::piped());
        let mut child = start(command);
        let mut screen = stderr_of(&mut child);
        if stage.is_empty() {
            // As soon as it has set itself up to take signals.
            let status = format!("/proc/{}/task", child.pid().as_raw_nonzero());
            while std::fs::read_dir(&status).unwrap().count() < 2 {
                std::thread::yield_now();
            }
        } else {
            screen.expect(stage);
        }
        child.signal(Signal::INT);
        let run = collect(child);
        assert_eq!(run.code(), Some(130), "at `{stage}`: {run:?}");
    }
}

#[test]
fn panic_of_the_kernel_is_told_with_its_reason() {
    let Some(_turn) = linux() else { return };
    let run = finish(trapgate(&[
        "run",
        "-q",
        "--",
        "sh",
        "-c",
        "echo c >/proc/sysrq-trigger; sleep 100",
    ]));
    assert_eq!(run.code(), Some(123), "{run:?}");
    assert!(
        run.stderr
            .contains("error: the guest's kernel panicked\n  cause: sysrq"),
        "{run:?}"
    );
}

#[test]
fn kernel_without_a_root_gets_advice() {
    let Some(_turn) = linux() else { return };
    // Given an initrd that is none
    let initrd = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(initrd.path(), [1; 4096]).unwrap();
    let path = initrd.path().to_str().unwrap();

    let run = finish(trapgate(&["run", "--initrd", path]));

    assert_eq!(run.code(), Some(123), "{run:?}");
    assert!(run.stderr.contains("--initrd"), "{}", run.stderr);
}

#[test]
fn poweroff_in_the_guest_ends_well() {
    let Some(_turn) = linux() else { return };
    let run = finish(trapgate(&[
        "run",
        "-q",
        "--",
        "sh",
        "-c",
        "poweroff; sleep 100",
    ]));
    assert_eq!(run.code(), Some(0), "{run:?}");
}
