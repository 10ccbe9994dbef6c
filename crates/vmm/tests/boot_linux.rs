//! Boots the distribution's stock kernel on the translator, at the host's level of x86-64 as the command line does, with
//! the init of `trapgate_image`.
//!
//! Skipped, aloud, where the packages cannot be had.

mod boot;
#[path = "boot/linux.rs"]
mod linux;
mod resident;

use std::io::{Read, Seek, SeekFrom};
use std::time::Duration;

use linux::{Linux, image_or_skip};
use resident::{MOST_BEYOND_RAM, Watch};
use trapgate_image::{STDIN_PORT, StockImage};
use trapgate_vmm::{DiskConfig, EngineChoice, EngineKind, MachineConfig};

/// Between two presses of the power button.
const PATIENCE: Duration = Duration::from_secs(1);

/// A machine on the translator: with `Auto`, a host with KVM would test that.
fn boot(image: &StockImage, command: &[&str], change: impl FnOnce(&mut MachineConfig)) -> Linux {
    Linux::boot(image, command, |config| {
        config.engine = EngineChoice::Only(EngineKind::Jit);
        change(config);
    })
}

/// What the machine took beside the guest's memory is at most so much.
#[track_caller]
fn stays_within(watch: Watch, limit: u64) {
    let most = watch.most_kib();
    println!("at most {most} KiB beyond the guest's memory");
    assert!(most <= limit, "{most} KiB");
}

#[test]
fn command_runs_with_its_streams_and_its_status() {
    let (image, _turn) = image_or_skip!();
    let watch = Watch::start();
    let script = "uname -sm; wc -c; echo to stderr >&2; nproc; \
                  ls /sys/bus/virtio/devices | wc -l; head -c 4 /dev/hwrng | wc -c; exit 7";
    let linux = boot(image, &["sh", "-c", script], |_| {});
    let stdin = linux.machine.port(STDIN_PORT).unwrap();
    // More than a port buffers.
    assert!(stdin.input_all(&vec![b'x'; 200_000]));
    stdin.close_input();

    linux.powers_off();

    assert_eq!(linux.stdout.text(), "Linux x86_64\n200000\n1\n3\n4\n");
    assert_eq!(linux.stderr.text(), "to stderr\n");
    assert_eq!(linux.status.text(), "init\n7\n");
    stays_within(watch, MOST_BEYOND_RAM);
}

/// Every block of the kernel and of user programs is done by the translator and the interpreter, and both agree.
#[test]
fn lockstep_finds_no_difference_from_start_to_power_off() {
    let (image, _turn) = image_or_skip!();
    let script = "seq 3000 | sort -r | awk '{ sum += $1 / 2 } END { print sum }'; ls / | wc -l";
    let linux = boot(image, &["sh", "-c", script], |config| {
        config.engine = EngineChoice::Only(EngineKind::Lockstep);
    });
    linux.powers_off();
    assert!(
        linux.stdout.text().starts_with("2250750\n"),
        "{}",
        linux.stdout.text()
    );
    assert_eq!(linux.status.text(), "init\n0\n");
}

/// The distribution's other kernels: everyone's, and the one with PREEMPT_RT. Their packages are 70 MB each, so fetching
/// them must be asked for with `TRAPGATE_OTHER_KERNELS=1`; what an earlier run fetched is used.
#[test]
fn kernels_for_hardware_and_for_real_time_run_a_command_on_the_translator() {
    let Some(_) = linux::image() else { return };
    let _turn = linux::turn();
    let fetch = std::env::var_os("TRAPGATE_OTHER_KERNELS").is_some();
    for (package, preemption) in [
        ("linux-image-amd64", "PREEMPT_DYNAMIC"),
        ("linux-image-rt-amd64", "PREEMPT_RT"),
    ] {
        let Some(image) = linux::image_of(package, fetch) else {
            continue;
        };
        let script =
            "uname -v; seq 3000 | sort -r | md5sum; lsmod | grep -c ^virtio_console; exit 5";
        let watch = Watch::start();
        let linux = boot(&image, &["sh", "-c", script], |_| {});
        linux.powers_off();
        let text = linux.stdout.text();
        let (version, rest) = text.split_once('\n').unwrap_or_default();
        assert!(version.contains(preemption), "{package}: {text}");
        assert_eq!(
            rest, "58a411f0f5089590c17ee74d6b228992  -\n1\n",
            "{package}"
        );
        assert_eq!(linux.status.text(), "init\n5\n", "{package}");
        stays_within(watch, MOST_BEYOND_RAM);
    }
}

#[test]
fn terminal_session_survives_a_reboot() {
    let (image, _turn) = image_or_skip!();
    let watch = Watch::start();
    let linux = boot(image, &[], |_| {});
    let terminal = linux.machine.terminal().unwrap();
    terminal.resize(101, 37);
    linux.terminal.wait_for("# ");
    assert!(terminal.input_all(b"stty size; echo $((6 * 7)) | sha256sum\n"));
    linux
        .terminal
        .wait_for("084c799cd551dd1d8d5c5f9a5d593b2e931f5e36122ee5c793c1d08a19839cc0");
    assert!(linux.terminal.text().contains("37 101"));

    assert!(terminal.input_all(b"touch /before; reboot\n"));
    linux.status.wait_for("init\ninit\n");
    assert!(terminal.input_all(b"ls /before; echo again $?\n"));
    linux.terminal.wait_for("again 1");
    assert_eq!(linux.machine.counters().resets, 1);
    assert!(terminal.input_all(b"exit 3\n"));
    linux.powers_off();
    assert_eq!(linux.status.text(), "init\ninit\n3\n");
    stays_within(watch, MOST_BEYOND_RAM);
}

#[test]
fn several_processors_come_up() {
    let (image, _turn) = image_or_skip!();
    let watch = Watch::start();
    let script = "nproc; for cpu in 0 1 2; do taskset -c $cpu sh -c 'echo on $((1 + 1))'; done; \
                  grep -c ^processor /proc/cpuinfo";
    let linux = boot(image, &["sh", "-c", script], |config| config.cpus = 3);
    linux.powers_off();
    assert_eq!(linux.stdout.text(), "3\non 2\non 2\non 2\n3\n");
    assert_eq!(linux.status.text(), "init\n0\n");
    // Each has a code cache.
    stays_within(watch, 3 * MOST_BEYOND_RAM);
}

#[test]
fn disk_keeps_what_was_written_and_the_power_button_shuts_down() {
    let (image, _turn) = image_or_skip!();
    let watch = Watch::start();
    let mut disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(8 << 20).unwrap();
    let path = disk.path().to_owned();
    let with_disk = |config: &mut MachineConfig| {
        config.disks.push(DiskConfig {
            path: path.clone(),
            read_only: false,
        });
    };
    let script = "cat /sys/block/vda/size; \
                  echo kept | dd of=/dev/vda bs=512 seek=100 conv=sync,fsync 2>/dev/null; sleep 1000";
    let linux = boot(image, &["sh", "-c", script], with_disk);
    linux.stdout.wait_for("16384\n");
    let mut written = [0; 5];
    while written != *b"kept\n" {
        std::thread::sleep(Duration::from_millis(20));
        disk.as_file_mut().seek(SeekFrom::Start(51_200)).unwrap();
        disk.as_file_mut().read_exact(&mut written).unwrap();
    }
    // Init may not be listening yet, so the button is pressed as an impatient person does.
    while linux.machine.wait_for(PATIENCE).is_none() {
        linux.machine.power_button();
    }
    linux.powers_off();
    drop(linux);

    let script = "dd if=/dev/vda bs=512 skip=100 count=1 2>/dev/null | head -c 5";
    let linux = boot(image, &["sh", "-c", script], with_disk);
    linux.powers_off();
    assert_eq!(linux.stdout.text(), "kept\n");
    stays_within(watch, MOST_BEYOND_RAM);
}
