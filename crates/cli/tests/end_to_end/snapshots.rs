//! Machines that are saved, and go on from what was saved.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::process::{Resource, Rlimit, Signal, prlimit};

use crate::harness::{
    close_stdin_of, collect, finish, finish_with, linux, skipped, start, stdout_of, trapgate,
    type_into,
};
use crate::machines::Place;

/// A directory with nothing in it, and a name there.
struct Saved {
    directory: tempfile::TempDir,
}

impl Saved {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("saved")
    }

    fn name(&self) -> String {
        self.path().to_str().unwrap().to_owned()
    }

    /// How many files there are, hidden ones too.
    fn count(&self) -> usize {
        std::fs::read_dir(self.directory.path()).unwrap().count()
    }
}

#[test]
fn built_in_guest_goes_on_from_a_snapshot_as_often_as_one_likes_and_as_if_nothing_had_been() {
    let (place, saved) = (Place::new(), Saved::new());
    place.done("run --detach --quiet --name a builtin");
    let mut console = place.on_terminal("console a");
    console.screen.expect("> ");
    console.press("\u{1d}");
    assert_eq!(console.end(), Some(0));

    let snapshot = place.done(&format!("snapshot a {}", saved.name()));

    assert!(snapshot.stderr.contains("saved `a`"), "{snapshot:?}");
    for engine in ["auto", "interp"] {
        let restore = place.command(&format!("restore {} --engine {engine}", saved.name()));
        let run = finish_with(restore, b"6 * (3 + 4)\n");
        assert_eq!(
            (run.code(), run.out().contains("42\r\n")),
            (Some(0), true),
            "{run:?}"
        );
        // What it said before it was saved was said then.
        assert!(!run.out().contains("hello"), "{run:?}");
        assert!(run.stderr.contains("the built-in guest"), "{run:?}");
    }
    assert_eq!(saved.count(), 1);
    // The one that was saved has noticed nothing.
    let console = finish_with(place.command("console a"), b"100 + 1\n");
    assert!(console.out().contains("101"), "{console:?}");
}

#[test]
fn restored_machine_has_a_name_and_is_saved_again() {
    let (place, saved, again) = (Place::new(), Saved::new(), Saved::new());
    place.done("run --detach --quiet --name a builtin");
    place.done(&format!("snapshot a {}", saved.name()));
    let run = place.done(&format!(
        "restore --detach --name b --check {}",
        saved.name()
    ));
    assert_eq!(run.out(), "b\n");
    assert_eq!(place.machines().len(), 2);
    place.done(&format!("snapshot b {}", again.name()));
    place.done("stop --now a");
    place.done("stop --now b");
    let run = finish_with(
        place.command(&format!("restore -q {}", again.name())),
        b"1 + 2\n",
    );
    assert!(run.out().contains("3\r\n"), "{run:?}");
    assert_eq!(run.stderr, "");
}

/// The lines under "Save a machine" in the README.
fn lines_of_the_readme() -> Vec<&'static str> {
    let readme = include_str!("../../../../README.md");
    let block = readme
        .split("```sh\n")
        .map(|rest| rest.split("```").next().unwrap_or(""))
        .find(|block| block.contains("trapgate snapshot"));
    block.expect("the README shows how").lines().collect()
}

#[test]
fn what_the_readme_says_of_saving_and_restoring_works() {
    let Some(_turn) = linux() else { return };
    let place = Place::new();
    let lines = lines_of_the_readme();
    let [run, snapshot, restore] = lines[..] else {
        panic!("{lines:?}");
    };
    let arguments = |line: &'static str| line.strip_prefix("trapgate ").expect("a command of ours");
    for line in [run, snapshot] {
        let mut command = place.command(arguments(line));
        command.current_dir(place.runtime());
        let done = finish(command);
        assert_eq!(done.code(), Some(0), "{line}: {done:?}");
    }

    let mut restored = place.on_terminal(arguments(restore));

    restored.screen.expect("Ctrl-] leaves");
    restored.wait_until_raw(true);
    // It may have been saved before its shell was there, or after its prompt was.
    restored.press("\r");
    restored.screen.expect("# ");
    restored.press("echo it is 6*7=$((6 * 7)); exit 5\r");
    restored.screen.expect("it is 6*7=42");
    assert_eq!(restored.end(), Some(5));
}

#[test]
fn machine_on_kvm_is_saved_and_goes_on_there_and_on_the_interpreter() {
    let place = Place::new();
    let line = "run --engine kvm --detach --name a builtin";
    let run = place.finish(line);
    if run.code() != Some(0) {
        assert_eq!(run.code(), Some(120), "{run:?}");
        return skipped(&run.stderr);
    }
    place.done("stop --now a");
    let typed = finish_with(place.command("run --engine kvm builtin"), b"6 * 7\n");
    assert!(
        typed.stderr.starts_with("trapgate: kvm (asked for), "),
        "{typed:?}"
    );
    assert_eq!(
        (
            typed.code(),
            typed.out().contains("42\r\n") || typed.out().contains("\n42\n")
        ),
        (Some(0), true),
        "{typed:?}"
    );

    place.done(line);
    let saved = Saved::new();
    place.done(&format!("snapshot a {}", saved.name()));
    for engine in ["kvm", "interp"] {
        let restore = place.command(&format!("restore {} --engine {engine}", saved.name()));
        let run = finish_with(restore, b"6 * (3 + 4)\n");
        assert_eq!(
            (run.code(), run.out().contains("42")),
            (Some(0), true),
            "{run:?}"
        );
        let line = format!("trapgate: {engine} (asked for), ");
        assert!(run.stderr.contains(&line), "{run:?}");
    }
}

/// Memory is not read unless somebody asks for it: then one byte is enough.
#[test]
fn snapshot_whose_memory_was_damaged_is_found_by_check() {
    let (place, saved) = (Place::new(), Saved::new());
    place.done("run --detach --quiet --name a builtin");
    place.done(&format!("snapshot a {}", saved.name()));
    let memory = saved.path().join("memory");
    let mut bytes = std::fs::read(&memory).unwrap();
    let at = bytes.iter().position(|&byte| byte != 0).unwrap();
    bytes[at] ^= 0x10;
    std::fs::remove_file(&memory).unwrap();
    std::fs::write(&memory, bytes).unwrap();

    let run = place.finish(&format!("restore --check {}", saved.name()));

    assert_eq!(run.code(), Some(121), "{run:?}");
    assert!(run.stderr.contains("saved memory is damaged"), "{run:?}");
    assert!(run.stderr.contains("fix: "), "{run:?}");
    assert_eq!(run.out(), "");
}

#[test]
fn what_is_no_snapshot_is_refused_with_what_to_do() {
    let saved = Saved::new();
    let directory = saved.directory.path().to_str().unwrap();
    for (path, complaint) in [
        (saved.name(), "cannot read"),
        (directory.to_owned(), "is not a snapshot"),
        ("/proc/self/exe".to_owned(), "is not a snapshot"),
    ] {
        let run = finish(trapgate(&["restore", &path]));
        assert_eq!(run.code(), Some(121), "{run:?}");
        assert!(run.stderr.contains(complaint), "{run:?}");
        assert!(run.stderr.contains(&path), "{run:?}");
    }
}

#[test]
fn snapshot_over_something_that_exists_is_refused() {
    let (place, saved) = (Place::new(), Saved::new());
    place.done("run --detach --quiet --name a builtin");
    std::fs::create_dir(saved.path()).unwrap();
    let run = place.finish(&format!("snapshot a {}", saved.name()));
    assert_eq!(run.code(), Some(122), "{run:?}");
    assert!(run.stderr.contains("exists already"), "{run:?}");
    assert!(run.stderr.contains("fix:"), "{run:?}");
    assert_eq!(
        (
            saved.count(),
            std::fs::read_dir(saved.path()).unwrap().count()
        ),
        (1, 0)
    );
}

#[test]
fn snapshot_of_which_a_file_may_not_grow_leaves_nothing_and_the_machine_goes_on() {
    let (place, saved) = (Place::new(), Saved::new());
    let mut child = start(typed_to(
        place.command("run -q --name a --memory 64M builtin"),
    ));
    let mut screen = stdout_of(&mut child);
    screen.expect("> ");
    // Less than the guest's memory, more than all else. The machine's own memory is there already.
    let limit = Rlimit {
        current: Some(1 << 20),
        maximum: Some(1 << 20),
    };
    prlimit(Some(child.pid()), Resource::Fsize, limit).unwrap();

    let run = place.finish(&format!("snapshot a {}", saved.name()));

    assert_eq!(run.code(), Some(122), "{run:?}");
    assert!(run.stderr.contains("memory"), "{run:?}");
    assert!(run.stderr.contains("ulimit -f"), "{run:?}");
    assert_eq!(saved.count(), 0, "nothing is left of it");
    type_into(&mut child, b"6 * 7\n");
    screen.expect("42");
    close_stdin_of(&mut child);
    assert_eq!(collect(child).code(), Some(0));
}

/// The sizes are such that the disk is full in different places.
#[test]
fn snapshot_on_a_full_disk_leaves_nothing_and_the_machine_goes_on() {
    const KIB: [u32; 5] = [4, 40, 100, 200, 300];
    let (place, saved) = (Place::new(), Saved::new());
    let disk = |size: u32| saved.directory.path().join(size.to_string());
    let mut script = String::new();
    for size in KIB {
        std::fs::create_dir(disk(size)).unwrap();
        let path = disk(size);
        script += &format!(
            "mount -t tmpfs -o size={size}k tmpfs {} || exit 77; ",
            path.display()
        );
    }
    script += "exec \"$@\"";
    let mut command = Command::new("unshare");
    command
        .args(["--map-root-user", "--mount", "sh", "-c", &script, "sh"])
        .arg(env!("CARGO_BIN_EXE_trapgate"))
        .args(["run", "-q", "--name", "a", "--memory", "64M", "builtin"])
        .env("XDG_RUNTIME_DIR", place.runtime());
    let mut child = start(typed_to(command));
    let mut screen = stdout_of(&mut child);
    if !screen.comes("> ") {
        skipped("this host lets nobody mount a file system of his own");
        return;
    }
    let mut full = 0;
    for size in KIB {
        let run = place.finish(&format!("snapshot a {}/saved", disk(size).display()));
        // As the machine sees it.
        let there = format!(
            "/proc/{}/root{}",
            child.pid().as_raw_pid(),
            disk(size).display()
        );
        let left = std::fs::read_dir(there).unwrap().count();
        if run.code() == Some(0) {
            assert_eq!(left, 1);
            continue;
        }
        full += 1;
        assert_eq!((run.code(), left), (Some(122), 0), "{size}: {run:?}");
        assert!(run.stderr.contains("No space left"), "{run:?}");
        assert!(run.stderr.contains("the machine goes on"), "{run:?}");
    }
    assert!(full >= 3, "{full} were too small");
    type_into(&mut child, b"6 * 7\n");
    screen.expect("42");
    close_stdin_of(&mut child);
    assert_eq!(collect(child).code(), Some(0));
}

fn typed_to(mut command: Command) -> Command {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[test]
fn shell_on_a_terminal_is_there_again() {
    let Some(_turn) = linux() else { return };
    let (place, saved) = (Place::new(), Saved::new());
    let mut first = place.on_terminal("run --name a");
    first.screen.expect("# ");
    first.press("x=42; cd /tmp; echo re''ady\r");
    first.screen.expect("ready");
    place.done(&format!("snapshot a {}", saved.name()));
    first.press("echo goes o''n\r");
    first.screen.expect("goes on");
    first.press("exit\r");
    assert_eq!(first.end(), Some(0));

    let mut second = place.on_terminal(&format!("restore {}", saved.name()));
    second.screen.expect("Ctrl-] leaves");
    second.wait_until_raw(true);
    second.press("echo x is $x in $PWD\r");
    second.screen.expect("x is 42 in /tmp");
    second.resize(90, 20);
    second.press("while ! stty size | grep -q '^20 90'; do sleep 0.1; done; echo re''sized\r");
    second.screen.expect("resized");
    second.press("exit 5\r");
    assert_eq!(second.end(), Some(5), "{}", second.screen.so_far());

    let mut third = place.on_terminal(&format!("restore {}", saved.name()));
    third.screen.expect("Ctrl-] leaves");
    third.wait_until_raw(true);
    third.press("\u{1d}");
    assert_eq!(third.end(), Some(0));
}

#[test]
fn command_goes_on_with_the_streams_of_whoever_restores_it() {
    let Some(_turn) = linux() else { return };
    let (place, saved) = (Place::new(), Saved::new());
    let mut command = place.command("run --name a -- sh -c");
    command
        .arg("echo before; read line; echo got $line; echo oops >&2; wc -c; exit 3")
        .stdin(Stdio::piped());
    let mut child = start(command);
    stdout_of(&mut child).expect("before\n");
    place.done(&format!("snapshot a {}", saved.name()));
    child.signal(Signal::TERM);
    child.wait();

    let mut input = b"this\n".to_vec();
    input.extend([0; 100_000]);
    let run = finish_with(place.command(&format!("restore {}", saved.name())), &input);

    assert_eq!(run.code(), Some(3), "{run:?}");
    assert_eq!(run.out(), "got this\n100000\n");
    assert!(run.stderr.contains("oops\n"), "{run:?}");
}
