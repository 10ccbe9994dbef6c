//! A Linux that is saved and restored in the middle of its work.
//!
//! Skipped, aloud, where the packages cannot be had.

mod boot;
#[path = "boot/linux.rs"]
mod linux;

use std::process::Command;
use std::time::Duration;

use linux::{Linux, image_or_skip};
use trapgate_vmm::{Machine, Snapshot};

/// Times that the guest is moved, unless `TRAPGATE_LINUX_MOVES` says otherwise.
const MOVES: u32 = 5;

fn moves() -> u32 {
    let asked = std::env::var("TRAPGATE_LINUX_MOVES").ok();
    asked.and_then(|text| text.parse().ok()).unwrap_or(MOVES)
}

/// A chain of checksums through pipelines of processes, which looks at the clocks in every round.
fn work(rounds: u32, clocks: bool) -> String {
    let look = "read now rest < /proc/uptime; now=${now%.*}${now#*.}; \
                [ $now -ge $last ] || back=$((back + 1)); last=$now; \
                time=$(date +%s); [ $time -ge $day ] || back=$((back + 1)); day=$time;";
    let look = if clocks { look } else { "" };
    format!(
        "h=start; i=0; last=0; day=0; back=0; \
         while [ $i -lt {rounds} ]; do \
         h=$(echo $h $i | sha256sum | tr a-f g-l | cut -c1-40); {look} i=$((i + 1)); \
         done; echo $h back $back"
    )
}

/// What the work gives, by this host's own shell.
fn expected(rounds: u32) -> String {
    let output = Command::new("sh")
        .arg("-c")
        .arg(work(rounds, false))
        .output();
    String::from_utf8(output.unwrap().stdout).unwrap()
}

#[test]
fn a_pipeline_with_checksums_survives_being_saved_and_restored_in_the_middle() {
    let (image, _turn) = image_or_skip!();
    let moves = moves();
    let rounds = 20 + 15 * moves;
    let directory = tempfile::tempdir().unwrap();
    let script = work(rounds, true);
    let mut linux = Linux::boot(image, &["sh", "-c", &script], |config| {
        config.engine = "interp".parse().unwrap();
    });
    linux.status.wait_for("init\n");
    for number in 0..moves {
        // Neither in step with its rounds nor with its ticks.
        std::thread::sleep(Duration::from_millis(150 + u64::from(number * 37 % 100)));
        let path = directory.path().join(number.to_string());
        let report = linux.machine.snapshot(&path).expect("it is not done yet");
        println!(
            "{number}: {} KiB, paused {:?}",
            report.bytes >> 10,
            report.paused
        );
        // What it was is gone; what was saved goes on.
        drop(linux);
        let mut snapshot = Snapshot::open(&path).unwrap();
        snapshot.set_engine("interp".parse().unwrap());
        linux = Linux::connected(|hooks| Machine::restore(&snapshot, hooks).unwrap());
        std::fs::remove_dir_all(&path).unwrap();
    }

    linux.powers_off();

    assert_eq!(linux.stdout.text(), expected(rounds));
    assert_eq!(linux.status.text(), "0\n");
}

#[test]
fn a_shell_on_a_terminal_is_there_again_and_its_machine_can_reboot() {
    let (image, _turn) = image_or_skip!();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("saved");
    let linux = Linux::boot(image, &[], |config| config.cpus = 2);
    linux.terminal.wait_for("# ");
    let terminal = linux.machine.terminal().unwrap();
    terminal.resize(101, 37);
    assert!(terminal.input_all(b"x=42; cd /proc; touch /before; echo r''eady\n"));
    linux.terminal.wait_for("ready");
    linux.machine.snapshot(&path).unwrap();
    drop(linux);

    let snapshot = Snapshot::open(&path).unwrap();
    let linux = Linux::connected(|hooks| Machine::restore(&snapshot, hooks).unwrap());
    let terminal = linux.machine.terminal().unwrap();
    // A window of another size.
    terminal.resize(90, 20);
    assert!(terminal.input_all(b"while ! stty size | grep -q '^20 90'; do sleep 0.1; done; echo x is $x in $PWD; ls /before\n"));
    linux.terminal.wait_for("x is 42 in /proc\r\n/before");

    assert!(terminal.input_all(b"reboot\n"));
    linux.status.wait_for("init\n");
    assert!(terminal.input_all(b"ls /before; echo again $?\n"));
    linux.terminal.wait_for("again 1");
    assert_eq!(linux.machine.counters().resets, 1);
    assert!(terminal.input_all(b"exit 3\n"));
    linux.powers_off();
    assert_eq!(linux.status.text(), "init\n3\n");
}

#[test]
fn input_that_a_command_has_not_read_is_read_after_a_restore() {
    let (image, _turn) = image_or_skip!();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("saved");
    let linux = Linux::boot(image, &["sh", "-c", "echo up; sleep 2; wc -c"], |_| {});
    linux.stdout.wait_for("up\n");
    let stdin = linux.machine.port(trapgate_image::STDIN_PORT).unwrap();
    // More than the pipes of the guest hold, less than the port.
    assert_eq!(stdin.input(&vec![b'x'; 50_000]), 50_000);
    linux.machine.snapshot(&path).unwrap();
    drop(linux);
    let snapshot = Snapshot::open(&path).unwrap();
    let linux = Linux::connected(|hooks| Machine::restore(&snapshot, hooks).unwrap());
    let stdin = linux.machine.port(trapgate_image::STDIN_PORT).unwrap();
    assert!(stdin.input_all(&vec![b'y'; 50_000]));
    stdin.close_input();
    linux.powers_off();
    assert_eq!(linux.stdout.text(), "100000\n");
}
