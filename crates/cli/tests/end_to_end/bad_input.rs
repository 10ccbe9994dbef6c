//! Whatever is wrong is said with its fix, and has an exit status of its own; nothing is on standard output.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::harness::{collect, finish, start, stderr_of, trapgate};

const USAGE: i32 = 120;
const INPUT: i32 = 121;
const HOST: i32 = 122;

fn check(arguments: &[&str], status: i32, complaints: &[&str]) {
    let run = finish(trapgate(arguments));
    assert_eq!(run.code(), Some(status), "{arguments:?}: {run:?}");
    assert_eq!(run.out(), "", "{arguments:?}");
    assert!(
        run.stderr.starts_with("error: "),
        "{arguments:?}: {}",
        run.stderr
    );
    assert!(
        !run.stderr.contains("panicked at"),
        "{arguments:?}: {}",
        run.stderr
    );
    for complaint in complaints {
        assert!(
            run.stderr.contains(complaint),
            "{complaint} is not in: {}",
            run.stderr
        );
    }
}

#[test]
fn command_lines_that_make_no_sense() {
    for (arguments, complaints) in [
        (
            &["run", "--memroy", "1G"][..],
            &["--memroy", "--memory"][..],
        ),
        (&["rum"], &["run"]),
        (&["run", "--memory", "512"], &["512M"]),
        (
            &["run", "--memory", "1M", "builtin"],
            &["4 MiB", "fix:", "--memory"],
        ),
        (
            &["run", "--memory", "9999T", "builtin"],
            &["fix:", "--memory"],
        ),
        (&["run", "--memory", "16M"], &["16 MiB", "fix:", "--memory"]),
        (&["run", "--cpus", "0"], &["0"]),
        (
            &["run", "--cpus", "100000", "builtin"],
            &["100000", "fix:", "--cpus"],
        ),
        (&["run", "--engine", "tcg"], &["tcg", "interp"]),
        (&["run", "builtin", "--", "ls"], &["built-in", "fix:"]),
        (&["run", "builtin", "--kernel", "k"], &["fix:"]),
        (&["run", "--kernel", "k", "--", "ls"], &["fix:"]),
    ] {
        check(arguments, USAGE, complaints);
    }
}

#[test]
fn files_that_are_no_kernels() {
    let directory = TempDir::new().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let this_program = fs::read(env!("CARGO_BIN_EXE_trapgate")).unwrap();
    let mut foreign = this_program[..4096].to_vec();
    foreign[18] = 183; // e_machine: EM_AARCH64
    let mut linux = vec![0; 4096];
    linux[0x1f1] = 4;
    linux[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    linux[0x202..0x206].copy_from_slice(b"HdrS");
    linux[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());

    let missing = directory.path().join("missing");
    let missing = missing.to_str().unwrap();
    for (path, complaint) in [
        (missing, "No such file"),
        (directory.path().to_str().unwrap(), "directory"),
        (&file("empty", b""), "is empty"),
        (&file("text", b"not a kernel\n"), "a text file"),
        (&file("foreign", &foreign), "aarch64"),
        (&file("truncated", &linux), "probably incomplete"),
        (&file("program", &this_program), "no way to boot"),
        (&file("zeros", &[0; 100_000]), "zero bytes"),
    ] {
        check(
            &["run", "--kernel", path],
            INPUT,
            &[complaint, path, "fix:"],
        );
    }
    check(
        &["run", "no-such-image"],
        INPUT,
        &["no-such-image", "builtin", "-- no-such-image"],
    );
    let empty = file("empty", b"");
    check(
        &["run", "--initrd", &empty],
        INPUT,
        &["initrd", "is empty", "fix:"],
    );
    check(
        &["run", "--initrd", missing],
        INPUT,
        &["initrd", missing, "fix:"],
    );
}

#[test]
fn disks_that_cannot_be_used() {
    let directory = TempDir::new().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("odd"), [0; 1000]).unwrap();
    fs::write(path("empty"), []).unwrap();
    fs::write(path("good"), [0; 1024]).unwrap();
    for (disk, status, complaints) in [
        (
            format!("path={}", path("missing")),
            INPUT,
            &["does not exist", "truncate"][..],
        ),
        (
            format!("path={}", path("odd")),
            INPUT,
            &["1000 bytes", "truncate -s 1024"],
        ),
        (path("empty"), INPUT, &["is empty"]),
        (path(""), INPUT, &["directory"]),
        (format!("{},rw", path("good")), USAGE, &["`rw`"]),
    ] {
        check(&["run", "builtin", "--disk", &disk], status, complaints);
    }
    let good = path("good");
    check(
        &["run", "builtin", "--disk", &good, "--disk", &good],
        USAGE,
        &["twice", "fix:"],
    );
}

#[test]
fn cache_that_cannot_be_made() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    let mut command = trapgate(&["run", "--", "true"]);
    command.env("XDG_CACHE_HOME", file.join("below"));

    let run = finish(command);

    assert_eq!(run.code(), Some(HOST), "{run:?}");
    assert_eq!(run.out(), "");
    assert!(
        run.stderr.contains("cause:") && run.stderr.contains("XDG_CACHE_HOME"),
        "{}",
        run.stderr
    );
}

#[test]
fn host_without_packages_is_told_of_the_kernel_option() {
    let directory = TempDir::new().unwrap();
    let mut command = trapgate(&["run", "--", "true"]);
    // Nothing is in PATH: neither apt-get nor a busybox to go with a kernel of the host's.
    command
        .env("XDG_CACHE_HOME", directory.path())
        .env("PATH", directory.path());

    let run = finish(command);

    assert_eq!(run.code(), Some(HOST), "{run:?}");
    assert!(run.stderr.contains("--kernel"), "{}", run.stderr);
}

/// A package manager that never finishes.
fn stuck_apt(directory: &TempDir) {
    for name in ["apt-get", "apt-cache"] {
        let path = directory.path().join(name);
        let script = match name {
            "apt-cache" => "#!/bin/sh\nexit 0\n",
            _ => "#!/bin/sh\necho \"$$\" >\"${0%/*}/pid\"\nexec sleep 1000\n",
        };
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn interrupted_download_leaves_nothing_behind() {
    for (signal, status) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        // Given a download that takes for ever
        let directory = TempDir::new().unwrap();
        stuck_apt(&directory);
        let path = format!("{}:/usr/bin:/bin", directory.path().display());
        let cache = directory.path().join("cache");
        let mut command = trapgate(&["run", "--", "true"]);
        command.env("PATH", path).env("XDG_CACHE_HOME", &cache);
        let mut child = start(command);
        let mut screen = stderr_of(&mut child);
        screen.expect("reading package lists");
        let pid = loop {
            let text = fs::read_to_string(directory.path().join("pid")).unwrap_or_default();
            if let Some(pid) = text.strip_suffix('\n') {
                break pid.to_owned();
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        };

        // When it is interrupted
        child.signal(signal);
        let run = collect(child);

        // Then there is no half of anything, and nothing still runs
        assert_eq!(run.code(), Some(status), "{run:?}");
        assert_eq!(run.out(), "");
        let left: Vec<_> = fs::read_dir(cache.join("trapgate/tmp")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        assert_eq!(
            fs::read_dir(cache.join("trapgate/images")).unwrap().count(),
            0
        );
        assert!(
            !std::path::Path::new("/proc").join(pid).exists(),
            "apt-get still runs"
        );
    }
}
