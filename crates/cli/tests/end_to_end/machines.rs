//! Machines that run, and the commands that reach them by their control sockets.

use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::harness::{
    Finished, OnTerminal, collect, finish, finish_with, start, stderr_of, stdout_of, trapgate,
};

const LONG: Duration = Duration::from_secs(60);

/// A directory for control sockets. The machines in it end with it.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn runtime(&self) -> &std::path::Path {
        self.0.path()
    }

    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = trapgate(&line.split_whitespace().collect::<Vec<_>>());
        command.env("XDG_RUNTIME_DIR", self.runtime());
        command
    }

    pub(crate) fn finish(&self, line: &str) -> Finished {
        finish(self.command(line))
    }

    /// Runs it; it must be all right.
    pub(crate) fn done(&self, line: &str) -> Finished {
        let run = self.finish(line);
        assert_eq!(run.code(), Some(0), "{line}: {run:?}");
        run
    }

    /// On a terminal.
    pub(crate) fn on_terminal(&self, line: &str) -> OnTerminal {
        let line: Vec<_> = line.split_whitespace().collect();
        OnTerminal::start_in(self.runtime(), &line)
    }

    /// Starts the built-in guest in the background.
    fn start(&self, name: &str) {
        self.done(&format!("run --detach --quiet --name {name} builtin"));
    }

    /// What `ps --json` says, by name.
    pub(crate) fn machines(&self) -> Vec<Value> {
        serde_json::from_slice(&self.done("ps --json").stdout).unwrap()
    }

    fn machine(&self, name: &str) -> Value {
        let machines = self.machines();
        let found = machines.iter().find(|machine| machine["name"] == name);
        found.unwrap_or_else(|| panic!("{machines:?}")).clone()
    }

    fn pid(&self, name: &str) -> Pid {
        let pid = self.machine(name)["pid"].as_i64().unwrap();
        Pid::from_raw(pid as i32).unwrap()
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.0.path().join("trapgate").join(format!("{name}.sock"))
    }

    fn files(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.0.path().join("trapgate")) else {
            return Vec::new();
        };
        let mut files: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        files
    }

    /// Waits until there is no machine any more.
    fn wait_until_empty(&self) {
        let deadline = Instant::now() + LONG;
        while !self.machines().is_empty() {
            assert!(Instant::now() < deadline, "{:?}", self.machines());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let listed = finish(self.command("ps --json"));
        let machines: Vec<Value> = serde_json::from_slice(&listed.stdout).unwrap_or_default();
        for machine in machines {
            let pid = machine["pid"]
                .as_i64()
                .and_then(|pid| Pid::from_raw(pid as i32));
            if let Some(pid) = pid {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// What a client that speaks for itself is answered.
fn ask(place: &Place, name: &str, request: &[u8]) -> String {
    let mut stream = UnixStream::connect(place.socket(name)).unwrap();
    // It may be answered and cut off before it has sent everything.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn machines_are_listed_with_what_they_are_and_then_no_more() {
    let place = Place::new();
    assert_eq!(place.done("ps").out().lines().count(), 1);
    assert_eq!(place.machines(), Vec::<Value>::new());

    place.done("run -dq --name web --memory 64M builtin");
    let machine = place.machine("web");
    for (member, value) in [
        ("state", Value::from("running")),
        ("cpus", 1.into()),
        ("memory_bytes", (64 << 20).into()),
        ("guest", "the built-in guest".into()),
        ("has_terminal", true.into()),
    ] {
        assert_eq!(machine[member], value, "{machine}");
    }
    let pid = machine["pid"].to_string();
    let table = place.done("ps").out();
    let line = table.lines().nth(1).unwrap();
    assert!(table.starts_with("NAME "), "{table}");
    for part in ["web", "running", "64 MiB", &pid] {
        assert!(line.contains(part), "{part}: {table}");
    }

    place.done("stop --now web");
    assert_eq!(place.machines(), Vec::<Value>::new());
    place.wait_until_empty();
}

#[test]
fn names_are_given_or_short_and_never_taken_twice() {
    let place = Place::new();
    let run = place.done("run -d builtin");
    assert_eq!(run.out(), "vm1\n");
    assert!(run.stderr.contains("trapgate console vm1"), "{run:?}");
    assert_eq!(place.done("run -dq builtin").out(), "vm2\n");

    for line in ["run --name vm1 builtin", "run -d --name vm1 builtin"] {
        let taken = place.finish(line);
        assert_eq!(taken.code(), Some(120), "{taken:?}");
        assert!(taken.stderr.contains("called `vm1` already"), "{taken:?}");
        assert!(taken.stderr.contains("trapgate stop vm1"), "{taken:?}");
    }
    for name in ["..", "a/b", "-x", ""] {
        let mut command = trapgate(&["run", "builtin"]);
        command.arg(format!("--name={name}"));
        let bad = finish(command);
        assert_eq!(bad.code(), Some(120), "{bad:?}");
    }
    assert_eq!(place.machines().len(), 2);

    place.done("stop --now vm1");
    assert_eq!(place.done("run -dq builtin").out(), "vm1\n");
}

#[test]
fn machine_in_the_foreground_has_a_socket_too_and_takes_it_away() {
    let place = Place::new();
    let mut command = place.command("run --name front builtin");
    command.stdin(Stdio::piped());
    let mut child = start(command);
    stdout_of(&mut child).expect("> ");
    assert_eq!(place.pid("front"), child.pid());

    place.done("stop --now front");

    let run = collect(child);
    assert_eq!(run.code(), Some(143), "{run:?}");
    assert!(run.stderr.contains("stopped by `trapgate stop`"), "{run:?}");
    assert_eq!(place.files(), Vec::<String>::new());
}

#[test]
fn directory_is_for_us_alone_and_one_that_is_not_is_refused() {
    let place = Place::new();
    place.start("x");
    let directory = place.runtime().join("trapgate");
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&directory), 0o700);
    place.done("stop --now x");

    std::fs::set_permissions(&directory, Permissions::from_mode(0o755)).unwrap();
    for line in ["ps", "run --name x builtin", "run -d builtin", "stop x"] {
        let refused = place.finish(line);
        assert_eq!(refused.code(), Some(122), "{line}: {refused:?}");
        assert!(refused.stderr.contains("chmod 700"), "{line}: {refused:?}");
    }
    // A machine for which nobody wants a socket runs without.
    let run = place.done("run builtin");
    assert!(
        run.out().contains("goodbye") && run.stderr.contains("no control socket"),
        "{run:?}"
    );
}

#[test]
fn without_a_runtime_directory_sockets_are_among_the_temporary_files() {
    let place = Place::new();
    let in_tmp = |line: &str| {
        let mut command = place.command(line);
        command
            .env_remove("XDG_RUNTIME_DIR")
            .env("TMPDIR", place.runtime());
        finish(command)
    };
    assert_eq!(in_tmp("run -dq builtin").out(), "vm1\n");
    let user = rustix::process::geteuid().as_raw();
    let socket = place.runtime().join(format!("trapgate-{user}/vm1.sock"));
    assert!(socket.exists());
    assert_eq!(in_tmp("stop --now vm1").code(), Some(0));
}

#[test]
fn paused_guest_does_nothing_until_it_is_resumed() {
    let place = Place::new();
    place.start("x");
    let said = |run: &Finished, text: &str| assert!(run.stderr.contains(text), "{run:?}");
    said(&place.done("resume x"), "running already");
    assert_eq!(place.done("pause x").stderr, "");
    said(&place.done("pause x"), "paused already");
    assert_eq!(place.machine("x")["state"], "paused");

    // Given what was typed while it stood still
    let mut console = place.command("console x");
    console.stdin(Stdio::piped());
    let console = thread::spawn(move || finish_with(console, b"6 * 7\n"));
    thread::sleep(Duration::from_millis(300));
    assert!(!console.is_finished());

    assert_eq!(place.done("resume x").stderr, "");

    let run = console.join().unwrap();
    assert!(run.out().contains("42"), "{run:?}");
    assert!(run.stderr.contains("`x` has ended"), "{run:?}");
    place.wait_until_empty();
    assert_eq!(place.files(), Vec::<String>::new());
}

#[test]
fn paused_machine_stays_paused_when_it_is_saved_and_its_likeness_runs() {
    let place = Place::new();
    place.start("x");
    place.done("pause x");
    let mut snapshot = place.command("snapshot x saved");
    snapshot.current_dir(place.runtime());

    let run = finish(snapshot);

    assert_eq!(run.code(), Some(0), "{run:?}");
    assert!(run.stderr.contains("stood still for 0.000 s"), "{run:?}");
    assert_eq!(place.machine("x")["state"], "paused");
    let saved = place.runtime().join("saved");
    let again = place.finish(&format!("snapshot x {}", saved.display()));
    assert_eq!(again.code(), Some(122), "{again:?}");
    assert_eq!(place.machine("x")["state"], "paused");
    place.done(&format!(
        "restore --detach --quiet --name y {}",
        saved.display()
    ));
    assert_eq!(place.machine("y")["state"], "running");
    place.done("resume x");
    place.done("stop --now x");
}

#[test]
fn guest_that_ignores_its_power_button_is_stopped_by_force_even_if_it_was_paused() {
    let place = Place::new();
    for paused in [false, true] {
        place.start("x");
        if paused {
            place.done("pause x");
        }
        let run = place.done("stop --grace 1 x");
        assert!(
            run.stderr.contains("did not shut down within 1 s"),
            "{run:?}"
        );
        assert_eq!(place.machines(), Vec::<Value>::new());
        assert_eq!(place.files(), Vec::<String>::new());
    }
}

#[test]
fn commands_for_a_machine_that_is_not_there_say_so() {
    let place = Place::new();
    for line in [
        "pause x",
        "resume x",
        "stop x",
        "snapshot x /tmp/x",
        "console x",
    ] {
        let run = place.finish(line);
        assert_eq!(run.code(), Some(120), "{run:?}");
        assert!(
            run.stderr.contains("no running machine called `x`"),
            "{run:?}"
        );
        assert!(run.stderr.contains("trapgate ps"), "{run:?}");
    }
}

#[test]
fn what_a_killed_machine_left_is_cleaned_up_by_the_next_command() {
    let place = Place::new();
    let kill = || {
        place.start("x");
        kill_process(place.pid("x"), Signal::KILL).unwrap();
        // Its process is gone when nobody answers any more.
        while UnixStream::connect(place.socket("x")).is_ok() {
            thread::sleep(Duration::from_millis(5));
        }
        assert!(
            place.files().contains(&"x.sock".to_owned()),
            "{:?}",
            place.files()
        );
    };
    kill();
    assert_eq!(place.finish("pause x").code(), Some(120));
    assert_eq!(place.machines(), Vec::<Value>::new());
    // What it said last stays: nobody knows why it ended.
    assert_eq!(place.files(), ["x.log"]);

    kill();
    place.start("x");
    assert_eq!(place.machine("x")["state"], "running");
}

#[test]
fn machine_whose_process_stands_still_is_named_and_the_others_answer() {
    let place = Place::new();
    place.start("good");
    place.start("stuck");
    let pid = place.pid("stuck");
    kill_process(pid, Signal::STOP).unwrap();

    // Its threads stop a moment later.
    let deadline = Instant::now() + LONG;
    let mut stuck = place.machine("stuck");
    while stuck["state"] != "unresponsive" {
        assert!(Instant::now() < deadline, "{stuck}");
        stuck = place.machine("stuck");
    }
    assert_eq!(stuck["pid"], pid.as_raw_nonzero().get());
    assert_eq!(place.machine("good")["state"], "running");

    kill_process(pid, Signal::CONT).unwrap();
    assert_eq!(place.machine("stuck")["state"], "running");
}

#[test]
fn console_shows_what_was_said_before_takes_keys_and_is_left_by_its_key() {
    let place = Place::new();
    place.start("x");
    for prompt in ["> ", "> he"] {
        let mut console = place.on_terminal("console x");
        console.screen.expect("Ctrl-] detaches");
        console
            .screen
            .expect("hello from trapgate's built-in guest");
        console.screen.expect(prompt);
        assert!(console.is_raw());
        console.press("he");
        console.screen.expect("he");
        console.press("\u{1d}");
        assert_eq!(console.end(), Some(0));
        console.screen.expect("detached from `x`, which goes on");
    }
    assert_eq!(place.machine("x")["state"], "running");

    // Two at once see and type the same.
    let mut one = place.on_terminal("console x");
    let mut two = place.on_terminal("console x");
    for console in [&mut one, &mut two] {
        console.screen.expect("hehe");
    }
    one.press("\u{8}\u{8}\u{8}\u{8}1000");
    two.screen.expect("1000");
    two.press(" + 1\r");
    for console in [&mut one, &mut two] {
        console.screen.expect("1001");
        console.screen.expect("`x` has ended");
        assert_eq!(console.end(), Some(0));
    }
}

#[test]
fn console_gives_the_terminal_back_however_it_ends() {
    let place = Place::new();
    place.start("x");
    for (signal, status) in [(Signal::TERM, 143), (Signal::HUP, 129), (Signal::QUIT, 131)] {
        let mut console = place.on_terminal("console x");
        console.screen.expect("> ");
        assert!(console.is_raw());
        console.child.signal(signal);
        assert_eq!(console.end(), Some(status));
    }
    // The machine is killed under it
    let mut console = place.on_terminal("console x");
    console.screen.expect("> ");
    kill_process(place.pid("x"), Signal::KILL).unwrap();
    assert_eq!(console.end(), Some(0));
    console.screen.expect("`x` has ended");
}

#[test]
fn console_beside_the_terminal_that_a_machine_was_started_on() {
    let place = Place::new();
    let mut session = place.on_terminal("run --name x builtin");
    session.screen.expect("> ");
    let mut console = place.on_terminal("console x");
    console.screen.expect("> ");
    console.press("6 * 7\r");
    session.screen.expect("42");
    console.screen.expect("42");
    assert_eq!((session.end(), console.end()), (Some(0), Some(0)));
}

#[test]
fn machine_in_the_background_outlives_its_terminal() {
    let place = Place::new();
    let mut session = place.on_terminal("run --detach --name x builtin");
    assert_eq!(session.end(), Some(0));
    session.hang_up();
    drop(session);
    assert_eq!(place.machine("x")["state"], "running");
}

#[test]
fn what_goes_wrong_before_the_machine_runs_is_said_at_once() {
    let place = Place::new();
    let run = place.finish("run --detach --kernel /dev/null");
    assert_eq!(run.code(), Some(121), "{run:?}");
    assert!(run.stderr.contains("cannot boot `/dev/null`"), "{run:?}");
    assert_eq!((run.out(), place.files()), (String::new(), Vec::new()));
}

#[test]
fn what_goes_wrong_afterwards_is_in_a_file_beside_the_socket() {
    // Given a multiboot kernel whose only instruction is none (UD2), so that it has a triple fault
    let place = Place::new();
    let words: [u32; 8] = [
        0x1bad_b002,
        1 << 16,
        0xe452_4ffe_u32.wrapping_sub(1 << 16),
        0x10_0000,
        0x10_0000,
        0,
        0,
        0x10_0020,
    ];
    let mut kernel: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    kernel.extend([0x0f, 0x0b]);
    let file = place.runtime().join("crash");
    std::fs::write(&file, kernel).unwrap();

    place.done(&format!("run --detach --name x {}", file.display()));
    place.wait_until_empty();

    let log = std::fs::read_to_string(place.runtime().join("trapgate/x.log")).unwrap();
    assert!(log.contains("triple fault"), "{log}");
    let run = place.finish("console x");
    assert!(run.stderr.contains("x.log"), "{run:?}");
}

#[test]
fn machine_goes_on_whatever_is_sent_to_its_socket() {
    // Given a guest that computes
    let place = Place::new();
    place.start("x");
    let mut console = place.command("console x");
    console.stdin(Stdio::piped());
    let computing = thread::spawn(move || finish_with(console, b"primes 10000000\n"));

    // When ten clients at once send what is good and what is not, until it is done
    let sent = [
        &b"GET /v1/vm HTTP/1.1\r\n\r\n"[..],
        b"GET /v1/vm/counters HTTP/1.1\r\n\r\n",
        b"\0\xff\xfe nonsense \r\n\r\n",
        b"POST /v1/vm/stop HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
        b"POST /v1/vm/stop HTTP/1.1\r\nContent-Length: 5\r\n\r\n{{{{{",
        b"DELETE / HTTP/1.1\r\n\r\n",
    ];
    thread::scope(|scope| {
        for client in 0..10 {
            let (place, computing) = (&place, &computing);
            scope.spawn(move || {
                for turn in 0.. {
                    // At least once round, though the guest be quick.
                    if turn > sent.len() && computing.is_finished() {
                        return;
                    }
                    let request = sent[(client + turn) % sent.len()];
                    if let Ok(mut stream) = UnixStream::connect(place.socket("x")) {
                        let _ = stream.write_all(request);
                        if turn % 3 != 0 {
                            let _ = stream.read_to_end(&mut Vec::new());
                        }
                    }
                }
            });
        }
    });

    let run = computing.join().unwrap();
    assert!(run.out().contains("664579"), "{run:?}");
}

/// A request with a body.
fn post(path: &str, body: &str) -> Vec<u8> {
    format!(
        "POST /v1/vm/{path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into()
}

/// Given a guest that computes, when ten clients at once pause, resume and save it and ask for its counters, then each is
/// answered, its clock never goes back, and the guest and all that was saved of it end with the right result.
#[test]
fn ten_clients_that_pause_resume_save_and_count_lose_nothing() {
    const RESULT: &str = "664579";
    const SAVES: usize = 2;
    let place = Place::new();
    // Slow enough to be saved in the middle.
    place.done("run --detach --quiet --name x --engine interp builtin");
    let mut console = place.on_terminal("console x");
    console.screen.expect("> ");
    console.press("primes 10000000\r");
    console.screen.expect("primes 10000000");
    let saved = |number: usize| place.runtime().join(format!("saved-{number}"));
    let granted = |request: &[u8]| {
        let answer = ask(&place, "x", request);
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        answer
    };

    thread::scope(|scope| {
        for client in 0..10 {
            let (saved, granted) = (&saved, &granted);
            scope.spawn(move || match client {
                0..SAVES => {
                    let body = serde_json::json!({ "directory": saved(client) });
                    granted(&post("snapshot", &body.to_string()));
                }
                SAVES..6 => {
                    for _ in 0..8 {
                        granted(&post("pause", ""));
                        granted(&post("resume", ""));
                    }
                }
                _ => {
                    let mut last = 0;
                    for _ in 0..8 {
                        let answer = granted(b"GET /v1/vm/counters HTTP/1.1\r\n\r\n");
                        let body = answer.split_once("\r\n\r\n").unwrap().1;
                        let counters: Value = serde_json::from_str(body).unwrap();
                        let clock = counters["clock_ns"].as_u64().unwrap();
                        assert!(clock >= last, "{clock} after {last}");
                        last = clock;
                    }
                }
            });
        }
    });

    // Whoever paused it has resumed it.
    assert_eq!(place.machine("x")["state"], "running");
    console.screen.expect(RESULT);
    for number in 0..SAVES {
        let run = finish_with(
            place.command(&format!("restore -q {}", saved(number).display())),
            b"",
        );
        assert_eq!(
            (run.code(), run.out().contains(RESULT)),
            (Some(0), true),
            "{run:?}"
        );
    }
}

#[test]
fn half_a_request_keeps_nobody_waiting() {
    let place = Place::new();
    place.start("x");
    let _half: Vec<_> = (0..5)
        .map(|_| {
            let mut stream = UnixStream::connect(place.socket("x")).unwrap();
            stream
                .write_all(b"POST /v1/vm/stop HTTP/1.1\r\nContent-Le")
                .unwrap();
            stream
        })
        .collect();
    assert_eq!(place.machine("x")["state"], "running");
    place.done("pause x");
}

#[test]
fn socket_speaks_http_to_anyone() {
    let place = Place::new();
    place.start("x");
    let info = ask(
        &place,
        "x",
        b"GET /v1/vm HTTP/1.1\r\nHost: localhost\r\n\r\n",
    );
    assert!(info.starts_with("HTTP/1.1 200 OK\r\n"), "{info}");
    assert!(info.contains("\"name\":\"x\""), "{info}");
    let counters = ask(&place, "x", b"GET /v1/vm/counters HTTP/1.1\r\n\r\n");
    assert!(counters.contains("\"instructions\""), "{counters}");
    let document = ask(&place, "x", b"GET /v1/openapi.json HTTP/1.1\r\n\r\n");
    let committed = include_str!("../../../../docs/openapi.json");
    assert!(document.ends_with(committed));
    let refused = ask(&place, "x", b"GET /v1/vm/console HTTP/1.1\r\n\r\n");
    assert!(refused.starts_with("HTTP/1.1 426 "), "{refused}");
}

#[test]
fn interrupted_stop_leaves_the_machine_running() {
    let place = Place::new();
    place.start("x");
    let mut stop = start(place.command("stop --grace 600 x"));
    let mut said = stderr_of(&mut stop);
    thread::sleep(Duration::from_millis(200));
    assert!(!stop.has_ended());
    stop.signal(Signal::INT);
    stop.wait();
    assert!(said.rest().is_empty());
    thread::sleep(Duration::from_millis(200));
    assert_eq!(place.machine("x")["state"], "running");
}
