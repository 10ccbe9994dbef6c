//! The guest's clocks and timers beside the host's.
//!
//! `cargo test --release -p trapgate-vmm --test timekeeping -- --nocapture` looks at them for some seconds on the
//! translator; `TRAPGATE_CLOCK_SECONDS=120` before it for so long idle and as long under load, on the interpreter too, and on
//! KVM if it is hardware's (a paravirtual one does not boot the guest's kernel). What was found is in `docs/fidelity.md`.
//!
//! What is asserted holds on a host of any speed: clocks that agree as far as was measured, that never go back, timers
//! that are never early. How late timers are is printed, beside what the same program sees on the host.
//! Skipped, aloud, where the guest's kernel or a C compiler cannot be had.
#![forbid(unsafe_code)]

#[path = "../boot/mod.rs"]
mod boot;
#[path = "../boot/linux.rs"]
mod linux;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use linux::{Linux, image_or_skip};
use trapgate_image::STDIN_PORT;
use trapgate_vmm::{EngineChoice, EngineKind, Host, Machine, Snapshot, engines};

/// How long the clocks are to be watched in each state, if somebody said so.
fn asked() -> Option<Duration> {
    let asked = std::env::var("TRAPGATE_CLOCK_SECONDS").ok()?;
    asked.parse().ok().map(Duration::from_secs)
}

/// Timers of a millisecond in one measurement.
const TIMERS: u32 = 500;

/// How far two quartz clocks may be apart after a second; the guest's has the host's, so it should be less.
const DRIFT: f64 = 50e-6;

/// Who runs `clocks.c` and can be asked.
trait Clocks {
    fn ask(&mut self, question: &str) -> Vec<i128>;
}

fn numbers(line: &str) -> Vec<i128> {
    line.split_whitespace()
        .map(|word| word.parse().expect("a number"))
        .collect()
}

/// The program as a process here.
struct OnHost {
    child: Child,
    answers: BufReader<ChildStdout>,
}

impl OnHost {
    fn start(program: &Path) -> Self {
        let mut child = Command::new(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it was built here");
        let answers = BufReader::new(child.stdout.take().expect("it was asked for"));
        Self { child, answers }
    }
}

impl Clocks for OnHost {
    fn ask(&mut self, question: &str) -> Vec<i128> {
        let stdin = self.child.stdin.as_mut().expect("it was asked for");
        writeln!(stdin, "{question}").expect("it listens");
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("it answers");
        numbers(&line)
    }
}

impl Drop for OnHost {
    fn drop(&mut self) {
        // It ends at the end of its input.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// The program as the guest's command.
struct InGuest {
    linux: Linux,
    /// Lines of output that were read.
    read: usize,
}

impl Clocks for InGuest {
    fn ask(&mut self, question: &str) -> Vec<i128> {
        let stdin = self.linux.machine.port(STDIN_PORT).expect("it has one");
        assert!(stdin.input_all(format!("{question}\n").as_bytes()));
        let lines = |text: &str| text.bytes().filter(|byte| *byte == b'\n').count();
        let wanted = self.read + 1;
        let answered = self
            .linux
            .stdout
            .waits_until(boot::LIMIT, |text| lines(text) >= wanted);
        let text = self.linux.stdout.text();
        assert!(answered, "{question}: {text}; {}", self.linux.serial.text());
        self.read = wanted;
        numbers(text.lines().nth(wanted - 1).expect("it was counted"))
    }
}

/// By how much a clock of the guest is ahead of the host's, in nanoseconds: at least, and at most.
#[derive(Clone, Copy, Debug)]
struct Ahead {
    least: i128,
    most: i128,
}

impl Ahead {
    /// What several looks at it have in common. The guest reads its clock between the question and the answer.
    fn measure(guest: &mut InGuest, clock: usize, host: impl Fn() -> i128) -> Self {
        let mut ahead = Self {
            least: i128::MIN,
            most: i128::MAX,
        };
        for _ in 0..20 {
            let before = host();
            let time = guest.ask("clock")[clock];
            let after = host();
            ahead.least = ahead.least.max(time - after);
            ahead.most = ahead.most.min(time - before);
        }
        assert!(
            ahead.least <= ahead.most,
            "the clock goes unevenly: {ahead:?}"
        );
        ahead
    }

    /// The change since `earlier`.
    fn since(self, earlier: Self) -> Self {
        Self {
            least: self.least - earlier.most,
            most: self.most - earlier.least,
        }
    }

    /// Whether it can be within `allowed` of `expected`.
    fn agrees(self, expected: Duration, sign: i128, allowed: Duration) -> bool {
        let expected = sign * expected.as_nanos() as i128;
        let allowed = allowed.as_nanos() as i128;
        self.least <= expected + allowed && self.most >= expected - allowed
    }
}

impl std::fmt::Display for Ahead {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |ns: i128| ns as f64 / 1e6;
        write!(f, "{:+.3} to {:+.3} ms", ms(self.least), ms(self.most))
    }
}

/// What `clocks.c` answers to `clock`, in its order.
const REALTIME: usize = 0;
const MONOTONIC: usize = 1;
const TSC: usize = 2;

fn time_of_day() -> i128 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    time.expect("the host's clock is right").as_nanos() as i128
}

/// Builds the program; `None`, said aloud, where there is no compiler.
fn program(directory: &Path) -> Option<std::path::PathBuf> {
    let program = directory.join("clocks");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/timekeeping/clocks.c");
    let built = Command::new("cc")
        .args(["-O2", "-Wall", "-static", "-o"])
        .args([&program, Path::new(source)])
        .output();
    match built {
        Ok(output) if output.status.success() => Some(program),
        Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
        Err(error) => {
            say(&format!("SKIPPED: the guest's clocks: cc: {error}"));
            None
        }
    }
}

/// Prints a line past the test harness, which would swallow it.
fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}

/// A guest that runs the program.
fn guest(image: &trapgate_image::StockImage, program: &Path, engine: EngineKind) -> InGuest {
    let root = tempfile::tempdir().expect("room for a file");
    std::fs::copy(program, root.path().join("clocks")).expect("room for a file");
    let archive = Command::new("sh")
        .args(["-c", "echo clocks | cpio -o -H newc --quiet"])
        .current_dir(root.path())
        .output()
        .expect("there is a shell");
    assert!(archive.status.success(), "cpio is missing: {archive:?}");
    let linux = Linux::boot(image, &["/clocks"], |config| {
        config.engine = EngineChoice::Only(engine);
        config.cpus = 2;
        config.command_line = format!(
            "console=ttyS0 quiet panic=-1 {}",
            trapgate_image::COMMAND_LINE
        );
        config.initrds.push(archive.stdout.into());
    });
    InGuest { linux, read: 0 }
}

/// The guest's clocks agree with the host's: while it idles, while it works, and but for the time that it stood still.
fn clocks_agree(guest: &mut InGuest, engine: EngineKind) {
    let begun = Instant::now();
    let monotonic = || begun.elapsed().as_nanos() as i128;
    let day = Ahead::measure(guest, REALTIME, time_of_day);
    // Linux sets its clock by the real-time clock's seconds when it boots, and takes it to be in the middle of one.
    assert!(
        day.agrees(Duration::ZERO, 1, Duration::from_secs(1)),
        "{day}"
    );
    say(&format!("{engine}: time of day, guest less host: {day}"));

    let mut last = Ahead::measure(guest, MONOTONIC, monotonic);
    for state in ["idle", "under load"] {
        if state != "idle" {
            assert_eq!(guest.ask("load"), [1]);
        }
        last = goes_as_the_hosts(guest, &format!("{engine}: {state}"), last, monotonic);
    }
    assert_eq!(guest.ask("rest"), [0]);

    let around = Instant::now();
    let pause = guest.linux.machine.pause();
    let within = Instant::now();
    std::thread::sleep(Duration::from_secs(1));
    let within = within.elapsed();
    drop(pause);
    let around = around.elapsed();
    let stood = Ahead::measure(guest, MONOTONIC, monotonic).since(last);
    say(&format!(
        "{engine}: paused for {within:.3?}, guest less host: {stood}"
    ));
    let uncertain = around - within + Duration::from_millis(1);
    assert!(stood.agrees(within, -1, uncertain), "{stood}");
}

/// Watches the guest's clock, which was `last` ahead of the host's; gives by how much it is now.
fn goes_as_the_hosts(
    guest: &mut InGuest,
    what: &str,
    last: Ahead,
    host: impl Fn() -> i128,
) -> Ahead {
    let since = Instant::now();
    std::thread::sleep(asked().unwrap_or(Duration::from_secs(2)));
    let ahead = Ahead::measure(guest, MONOTONIC, host);
    let (drift, time) = (ahead.since(last), since.elapsed());
    say(&format!("{what} for {time:.1?}, guest less host: {drift}"));
    let allowed = time.mul_f64(DRIFT);
    assert!(drift.agrees(Duration::ZERO, 1, allowed), "{what}: {drift}");
    ahead
}

/// Moves between the guest's processors: neither its TSC nor its clock goes back, nor did they since the last time.
fn never_goes_back(guest: &mut InGuest, what: &str) {
    let migrated = guest.ask("migrate 2000");
    say(&format!(
        "{what}: moved between processors {} times, TSC and clock went back {} and {}",
        migrated[0], migrated[1], migrated[2]
    ));
    assert_eq!(migrated[1..], [0, 0]);
    assert!(migrated[0] > 1000, "{migrated:?}");
}

/// Timers of a millisecond, on the host and in the guest in turns.
fn timers(guest: &mut InGuest, host: &mut OnHost, engine: EngineKind) {
    let kinds = [
        ("sleeps", "sleeps"),
        ("prompt", "sleeps without slack"),
        ("ticks", "ticks"),
    ];
    for (word, kind) in kinds {
        for _ in 0..2 {
            let question = format!("{word} {TIMERS}");
            let there = guest.ask(&question);
            let here = host.ask(&question);
            let us = |ns: i128| ns as f64 / 1e3;
            say(&format!(
                "{engine}: {kind} of 1 ms, late by µs (median, 99 %, most): guest {:.0} {:.0} {:.0}, host {:.0} {:.0} {:.0}",
                us(there[1]),
                us(there[2]),
                us(there[3]),
                us(here[1]),
                us(here[2]),
                us(here[3]),
            ));
            assert!(there[0] >= 0, "a timer was early: {there:?}");
        }
    }
}

#[test]
fn clocks_agree_with_the_hosts_and_timers_are_never_early() {
    let (image, _turn) = image_or_skip!();
    let directory = tempfile::tempdir().unwrap();
    let Some(program) = program(directory.path()) else {
        return;
    };
    let mut host = OnHost::start(&program);
    let mut chosen = vec![EngineKind::Jit];
    if asked().is_some() {
        chosen.push(EngineKind::Interp);
        let host = Host::probe();
        let kvm = engines(&host)
            .into_iter()
            .find(|report| report.kind == EngineKind::Kvm);
        match kvm.map(|report| report.usable) {
            Some(Ok(_)) if host.kvm.is_hardware() => chosen.push(EngineKind::Kvm),
            Some(Err(why)) => say(&format!("SKIPPED: clocks on KVM: {why}")),
            _ => say("SKIPPED: clocks on KVM: it is a paravirtual one"),
        }
    }
    for engine in chosen {
        let mut guest = guest(image, &program, engine);
        clocks_agree(&mut guest, engine);
        timers(&mut guest, &mut host, engine);
        never_goes_back(&mut guest, engine.name());
    }
}

/// For the guest no time has passed; who asks what time of day it is, is told.
#[test]
fn restored_guest_goes_on_where_it_stood_and_can_ask_for_the_time_of_day() {
    let (image, _turn) = image_or_skip!();
    let directory = tempfile::tempdir().unwrap();
    let Some(program) = program(directory.path()) else {
        return;
    };
    let mut guest = guest(image, &program, EngineKind::Jit);
    never_goes_back(&mut guest, "before a snapshot");
    // To the other engine, whose clock is the same, and back.
    for engine in [EngineKind::Interp, EngineKind::Jit] {
        guest = restored(guest, &directory.path().join(engine.name()), engine);
        never_goes_back(&mut guest, &format!("restored on {engine}"));
        let begun = Instant::now();
        let monotonic = || begun.elapsed().as_nanos() as i128;
        let ahead = Ahead::measure(&mut guest, MONOTONIC, monotonic);
        goes_as_the_hosts(
            &mut guest,
            &format!("restored on {engine}"),
            ahead,
            monotonic,
        );
        time_of_day_can_be_asked(&mut guest);
    }
}

/// How long a guest is away.
const AWAY: Duration = Duration::from_secs(3);

/// The guest after a while in a file, on another engine: its clocks have gone on by no more than it was awake.
fn restored(mut guest: InGuest, saved: &Path, engine: EngineKind) -> InGuest {
    let before = guest.ask("clock");
    let begun = Instant::now();
    guest.linux.machine.snapshot(saved).unwrap();
    drop(guest);
    std::thread::sleep(AWAY);

    let mut snapshot = Snapshot::open(saved).unwrap();
    snapshot.set_engine(EngineChoice::Only(engine));
    let linux = Linux::connected(|hooks| Machine::restore(&snapshot, hooks).unwrap());
    let mut guest = InGuest { linux, read: 0 };
    let after = guest.ask("clock");

    let gone = begun.elapsed() - AWAY;
    for clock in [REALTIME, MONOTONIC, TSC] {
        // The TSC counts nanoseconds.
        let passed = after[clock] - before[clock];
        assert!(
            passed > 0 && passed <= gone.as_nanos() as i128,
            "{passed} of {gone:?}"
        );
    }
    let late = time_of_day() - after[REALTIME];
    // It was half a second off when it was set.
    assert!(late >= (AWAY - Duration::from_secs(1)).as_nanos() as i128);
    say(&format!(
        "restored on {engine}: the time of day is late by {} ms",
        late / 1_000_000
    ));
    guest
}

/// The real-time clock has the host's time of day, and Linux can be told to take it.
fn time_of_day_can_be_asked(guest: &mut InGuest) {
    let off = guest.ask("rtc")[0] - time_of_day() / 1_000_000_000;
    assert!(
        (-2..=1).contains(&off),
        "the real-time clock is off by {off} s"
    );
    assert_eq!(guest.ask("set"), [0]);
    let day = Ahead::measure(guest, REALTIME, time_of_day);
    say(&format!("restored, and set: guest less host: {day}"));
    // The real-time clock has whole seconds, and setting by it takes a moment.
    let allowed = Duration::from_millis(1500);
    assert!(day.agrees(Duration::ZERO, 1, allowed), "{day}");
}
