//! Snapshots that are not as they were written, and what else can go wrong: each a clear error, and
//! nothing lost.

mod boot;

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use boot::{Transcript, end};
use serde_json::{Value, json};
use tempfile::TempDir;
use trapgate_vmm::{
    Content, DiskConfig, Failure, Hooks, Machine, MachineConfig, Outcome, Port, Snapshot,
    SnapshotError,
};

fn config() -> MachineConfig {
    MachineConfig {
        kernel: Content::from(trapgate_guests::BUILTIN),
        memory_bytes: 8 << 20,
        engine: "interp".parse().unwrap(),
        ..MachineConfig::default()
    }
}

fn hooks(serial: &Transcript) -> Hooks {
    let sink = serial.clone();
    Hooks {
        serial: Box::new(move |bytes| sink.add(bytes)),
        ..Hooks::default()
    }
}

/// The built-in guest, as it waits for a person.
fn waiting(config: MachineConfig) -> (Machine, Transcript) {
    let serial = Transcript::default();
    let machine = Machine::start(config, hooks(&serial)).unwrap();
    serial.wait_for("> ");
    (machine, serial)
}

/// The built-in guest is alive, and answers.
#[track_caller]
fn check_alive(machine: &Machine, serial: &Transcript) {
    assert!(machine.serial().input_all(b"help\r"));
    serial.wait_for("how many primes");
}

/// A snapshot of the built-in guest, which waits for a person.
fn snapshot() -> &'static Path {
    static DIRECTORY: OnceLock<TempDir> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let (machine, _) = waiting(config());
        machine.snapshot(&directory.path().join("saved")).unwrap();
        directory
    });
    Box::leak(directory.path().join("saved").into_boxed_path())
}

/// A copy of it, to be damaged.
struct Copy {
    _directory: TempDir,
    path: PathBuf,
}

impl Copy {
    fn new() -> Self {
        fn copy(from: &Path, to: &Path) {
            fs::create_dir(to).unwrap();
            for entry in fs::read_dir(from).unwrap() {
                let (entry, to) = (entry.unwrap().path(), to);
                let to = to.join(entry.file_name().unwrap());
                if entry.is_dir() {
                    copy(&entry, &to);
                } else {
                    fs::copy(&entry, &to).unwrap();
                    fs::set_permissions(&to, fs::Permissions::from_mode(0o600)).unwrap();
                }
            }
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("copy");
        copy(snapshot(), &path);
        Self {
            _directory: directory,
            path,
        }
    }

    fn file(&self, part: &str) -> PathBuf {
        self.path.join(part)
    }

    fn edit(&self, part: &str, change: impl FnOnce(&mut Value)) {
        let mut value: Value = serde_json::from_slice(&fs::read(self.file(part)).unwrap()).unwrap();
        change(&mut value);
        fs::write(self.file(part), serde_json::to_vec_pretty(&value).unwrap()).unwrap();
    }

    /// Changes a section, and its length and checksum in the header: somebody did it on purpose.
    fn forge(&self, section: &str, change: impl FnOnce(&mut Value)) {
        let part = format!("state/{section}.json");
        self.edit(&part, |value| change(&mut value["state"]));
        self.sign(&part);
    }

    fn sign(&self, part: &str) {
        let bytes = fs::read(self.file(part)).unwrap();
        self.edit("snapshot.json", |header| {
            header["parts"][part] = json!({
                "length": bytes.len(),
                "crc32": format!("{:08x}", crc32fast::hash(&bytes)),
            });
        });
    }

    #[track_caller]
    fn error(&self) -> SnapshotError {
        match Snapshot::open(&self.path) {
            Err(error) => error,
            Ok(snapshot) => Machine::restore(&snapshot, Hooks::default())
                .err()
                .expect("it is refused"),
        }
    }

    fn parts(&self) -> Vec<String> {
        let header: Value =
            serde_json::from_slice(&fs::read(self.file("snapshot.json")).unwrap()).unwrap();
        header["parts"]
            .as_object()
            .unwrap()
            .keys()
            .cloned()
            .collect()
    }
}

/// An error with all its causes.
fn words(error: &SnapshotError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

/// The error, or one of its causes, says this.
#[track_caller]
fn check_words(error: &SnapshotError, expected: &str) {
    let text = words(error);
    assert!(text.contains(expected), "`{expected}` is not in `{text}`");
}

#[test]
fn an_undamaged_copy_goes_on_and_so_do_two_at_once_on_their_own() {
    let copy = Copy::new();
    let snapshot = Snapshot::open(&copy.path).unwrap();
    assert!(snapshot.warnings().is_empty());
    let (one, other) = (Transcript::default(), Transcript::default());
    let first = Machine::restore(&snapshot, hooks(&one)).unwrap();
    let second = Machine::restore(&snapshot, hooks(&other)).unwrap();
    check_alive(&first, &one);
    assert!(second.serial().input_all(b"100 + 1\r"));
    other.wait_for("101");
    assert!(!one.text().contains("101") && !other.text().contains("primes"));
    // And what they did is not in what comes after.
    snapshot.check_memory().unwrap();
    let third = Transcript::default();
    let machine = Machine::restore(&snapshot, hooks(&third)).unwrap();
    check_alive(&machine, &third);
}

#[test]
fn another_version_is_refused_before_anything_else() {
    for version in [json!(0), json!(1), json!(3), json!(u64::MAX)] {
        let copy = Copy::new();
        copy.edit("snapshot.json", |header| {
            *header = json!({ "format": "trapgate-snapshot", "version": version, "new": [] });
        });
        let error = copy.error();
        assert!(matches!(error, SnapshotError::Version { .. }), "{error}");
        assert!(error.fix().unwrap().contains("version of trapgate"));
    }
}

#[test]
fn another_version_of_a_section_is_refused_by_its_name() {
    for part in [
        "machine.json",
        "memory.json",
        "state/pit.json",
        "state/cpu-0.json",
    ] {
        let copy = Copy::new();
        copy.edit(part, |section| section["version"] = json!(7));
        copy.sign(part);
        let error = copy.error();
        assert!(
            matches!(error, SnapshotError::SectionVersion { found: 7, .. }),
            "{error}"
        );
        check_words(&error, part);
    }
    // Functions judge theirs themselves.
    let copy = Copy::new();
    copy.edit("state/pci-1.json", |section| section["version"] = json!(7));
    copy.sign("state/pci-1.json");
    check_words(&copy.error(), "version 7");
}

#[test]
fn another_profile_is_refused() {
    let copy = Copy::new();
    copy.edit("snapshot.json", |header| {
        header["profile"]["version"] = json!(9)
    });
    let error = copy.error();
    check_words(&error, "x86-64-v2 of version 9");
    assert!(error.fix().unwrap().contains("version of trapgate"));
    let copy = Copy::new();
    copy.edit("snapshot.json", |header| {
        header["profile"]["cpuid_crc32"] = json!("00000000")
    });
    let error = copy.error();
    assert!(matches!(error, SnapshotError::Profile { .. }), "{error}");
    for (field, value) in [
        ("level", json!("x86-64-v3")),
        ("tsc_hz", json!(2_000_000_000_u64)),
    ] {
        let copy = Copy::new();
        copy.edit("machine.json", |config| config["state"][field] = value);
        let error = copy.error();
        assert!(matches!(error, SnapshotError::Changed { .. }), "{error}");
        check_words(&error, field);
    }
}

#[test]
fn another_memory_size_or_number_of_processors_is_refused() {
    for (field, value) in [
        ("memory_bytes", 16 << 20),
        ("memory_bytes", 4096),
        ("cpus", 2),
    ] {
        let copy = Copy::new();
        copy.edit("machine.json", |config| {
            config["state"][field] = json!(value)
        });
        let error = copy.error();
        assert!(matches!(error, SnapshotError::Changed { .. }), "{error}");
        check_words(&error, field);
        // In the header too: then what belongs to it is missing or has another length.
        copy.edit("snapshot.json", |header| header[field] = json!(value));
        copy.error();
    }
}

#[test]
fn parts_that_are_cut_short_are_refused_by_their_name() {
    for part in Copy::new().parts() {
        let copy = Copy::new();
        let file = fs::File::options()
            .write(true)
            .open(copy.file(&part))
            .unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        check_words(&copy.error(), &part);
    }
    let copy = Copy::new();
    let header = copy.file("snapshot.json");
    let bytes = fs::read(&header).unwrap();
    for length in [0, 1, bytes.len() / 2, bytes.len() - 3] {
        fs::write(&header, &bytes[..length]).unwrap();
        check_words(&copy.error(), "snapshot.json");
    }
}

#[test]
fn parts_that_are_missing_are_refused_by_their_name() {
    for part in Copy::new().parts() {
        let copy = Copy::new();
        fs::remove_file(copy.file(&part)).unwrap();
        let error = copy.error();
        assert!(matches!(error, SnapshotError::Missing { .. }), "{error}");
        check_words(&error, &part);
        // And if the header does not know of it either.
        copy.edit("snapshot.json", |header| {
            header["parts"].as_object_mut().unwrap().remove(&part);
        });
        match part.as_str() {
            // Without a kernel it can only not boot again.
            "boot/kernel" => drop(Snapshot::open(&copy.path).unwrap()),
            _ => check_words(&copy.error(), &part),
        }
    }
}

#[test]
fn any_flipped_bit_of_a_section_is_found() {
    for (number, part) in Copy::new().parts().iter().enumerate() {
        if matches!(part.as_str(), "memory" | "machine.json" | "boot/kernel") {
            continue;
        }
        let copy = Copy::new();
        let mut bytes = fs::read(copy.file(part)).unwrap();
        for turn in 0..16 {
            let at = (number * 31 + turn * 97) % bytes.len();
            bytes[at] ^= 1 << (turn % 8);
            fs::write(copy.file(part), &bytes).unwrap();
            let error = copy.error();
            assert!(
                matches!(error, SnapshotError::Checksum { .. }),
                "{part}: {error}"
            );
            bytes[at] ^= 1 << (turn % 8);
        }
    }
}

#[test]
fn a_header_or_configuration_with_a_flipped_bit_is_refused_or_read() {
    for part in ["snapshot.json", "machine.json"] {
        let copy = Copy::new();
        let bytes = fs::read(copy.file(part)).unwrap();
        let mut refused = 0;
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << (at % 8);
            fs::write(copy.file(part), &damaged).unwrap();
            refused += usize::from(Snapshot::open(&copy.path).is_err());
        }
        assert!(
            refused > bytes.len() / 3,
            "{part}: {refused} of {}",
            bytes.len()
        );
    }
}

#[test]
fn flipped_bits_of_memory_are_found_by_whoever_asks() {
    let copy = Copy::new();
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(copy.file("memory"))
        .unwrap();
    let mut byte = [0];
    // Where the guest's code is.
    file.read_exact_at(&mut byte, 1 << 20).unwrap();
    file.write_all_at(&[byte[0] ^ 4], 1 << 20).unwrap();
    let snapshot = Snapshot::open(&copy.path).unwrap();
    check_words(&snapshot.check_memory().unwrap_err(), "is damaged");
}

#[test]
fn a_kernel_that_was_damaged_is_found_when_it_is_needed() {
    let copy = Copy::new();
    let file = fs::File::options()
        .write(true)
        .open(copy.file("boot/kernel"))
        .unwrap();
    file.write_all_at(&[0xff], 100).unwrap();
    let snapshot = Snapshot::open(&copy.path).unwrap();
    let error = Machine::start(snapshot.config().clone(), Hooks::default())
        .err()
        .unwrap();
    assert!(error.to_string().contains("boot/kernel"), "{error}");
}

#[test]
fn what_is_no_snapshot_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let error = |path: &Path| Snapshot::open(path).unwrap_err();
    check_words(
        &error(directory.path()),
        "is not a snapshot: it has no `snapshot.json`",
    );
    check_words(&error(Path::new("/proc/self/exe")), "it is no directory");
    let missing = directory.path().join("missing");
    assert!(matches!(error(&missing), SnapshotError::Read { .. }));
    for text in [
        "",
        "hello",
        "[]",
        "{}",
        "{\"format\": \"other\", \"version\": 1}",
    ] {
        fs::write(directory.path().join("snapshot.json"), text).unwrap();
        check_words(&error(directory.path()), "snapshot.json");
    }
    // Neither a pipe, which nobody writes to, nor a directory is read.
    let copy = Copy::new();
    fs::remove_file(copy.file("state/pit.json")).unwrap();
    let made = std::process::Command::new("mkfifo")
        .arg(copy.file("state/pit.json"))
        .status();
    if made.is_ok_and(|status| status.success()) {
        check_words(&copy.error(), "it is no file");
    }
}

#[test]
fn parts_of_other_names_are_refused_and_none_leads_out_of_the_directory() {
    for name in [
        "../secret",
        "/etc/passwd",
        "state/../../x",
        "state/",
        ".x",
        "a b",
        "new.json",
    ] {
        let copy = Copy::new();
        if name == "new.json" {
            fs::write(copy.file(name), "{}").unwrap();
        }
        copy.edit("snapshot.json", |header| {
            header["parts"][name] = json!({ "length": 2, "crc32": "00000000" });
        });
        let error = copy.error();
        assert!(
            matches!(error, SnapshotError::Unknown { .. }),
            "{name}: {error}"
        );
    }
}

#[test]
fn states_that_cannot_be_are_refused_though_their_checksums_are_right() {
    type Change = fn(&mut Value);
    let cases: &[(&str, &str, Change)] = &[
        ("clock", "clock", |state| state["now"] = json!(u64::MAX)),
        ("clock", "clock", |state| state["now"] = json!(0)),
        ("cpu-0", "CR0", |state| {
            state["system"]["cr0"] = json!("0xffffffffffffffff")
        }),
        ("cpu-0", "cpu-0", |state| state["rip"] = json!(5)),
        ("local-apic-0", "lapic", |state| {
            state["lvt"][0] = json!(u32::MAX)
        }),
        ("io-apic", "ioapic", |state| {
            state["entries"][0] = json!(u64::MAX)
        }),
        ("io-apic", "io-apic", |state| state["entries"] = json!([])),
        ("pit", "pit", |state| {
            state["channels"][0]["reload"] = json!(0)
        }),
        ("rtc", "rtc", |state| state["cells"] = json!("00")),
        ("serial-0", "serial", |state| {
            state["received"] = json!(vec![0; 1000])
        }),
        ("pci", "pci-0", |state| state["functions"] = json!([])),
        ("pci-1", "virtio-entropy", |state| {
            state["queues"] = json!([])
        }),
        ("pci-1", "virtio-entropy", |state| {
            state["active"] = json!(true);
        }),
        ("board", "board", |state| state["more"] = json!(1)),
    ];
    for (section, expected, change) in cases {
        let copy = Copy::new();
        copy.forge(section, change);
        let text = words(&copy.error());
        assert!(
            text.contains(expected),
            "{section}: `{expected}` is not in `{text}`"
        );
    }
}

#[test]
fn a_directory_that_exists_is_left_alone_and_the_machine_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let (machine, serial) = waiting(config());
    let file = directory.path().join("file");
    fs::write(&file, "precious").unwrap();
    let dangling = directory.path().join("link");
    std::os::unix::fs::symlink("nowhere", &dangling).unwrap();
    for path in [directory.path(), &file, &dangling] {
        let error = machine.snapshot(path).unwrap_err();
        assert!(matches!(error, SnapshotError::Exists { .. }), "{error}");
    }
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
    check_alive(&machine, &serial);
}

#[test]
fn a_place_that_does_not_exist_is_an_error_and_the_machine_goes_on() {
    let (machine, serial) = waiting(config());
    let directory = tempfile::tempdir().unwrap();
    let error = machine
        .snapshot(&directory.path().join("no/such/place"))
        .unwrap_err();
    assert!(
        error.fix().unwrap().contains("make the directory"),
        "{error}"
    );
    let error = machine.snapshot(Path::new("/")).unwrap_err();
    assert!(matches!(error, SnapshotError::Exists { .. }), "{error}");
    check_alive(&machine, &serial);
}

#[test]
fn a_machine_that_has_ended_is_not_saved() {
    let directory = tempfile::tempdir().unwrap();
    let (machine, _) = waiting(config());
    machine.stop();
    machine.wait();
    let error = machine
        .snapshot(&directory.path().join("saved"))
        .unwrap_err();
    assert!(matches!(error, SnapshotError::Ended), "{error}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_paused_machine_is_saved_and_stays_paused_and_what_it_has_not_read_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("saved");
    let (machine, serial) = waiting(config());
    let pause = machine.pause();
    // More than the receiver of a serial port holds.
    assert!(machine.serial().input_all(b"1 + 2 + 3 + 4 + 5 + 6 + 7\r"));
    machine.snapshot(&path).unwrap();
    assert!(!serial.text().contains("\n28"));
    let words = Transcript::default();
    let restored = Machine::restore(&Snapshot::open(&path).unwrap(), hooks(&words)).unwrap();
    words.wait_for("\n28");
    assert!(!serial.text().contains("\n28"));
    drop(pause);
    serial.wait_for("\n28");
    drop(restored);
}

#[test]
fn a_snapshot_outlives_what_it_was_taken_of_and_a_machine_outlives_its_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("saved");
    let (machine, _) = waiting(config());
    machine.snapshot(&path).unwrap();
    drop(machine);
    let serial = Transcript::default();
    let snapshot = Snapshot::open(&path).unwrap();
    let machine = Machine::restore(&snapshot, hooks(&serial)).unwrap();
    fs::remove_dir_all(&path).unwrap();
    check_alive(&machine, &serial);
    // The kernel too is still there for a machine that boots again.
    let second = Transcript::default();
    let booted = Machine::start(snapshot.config().clone(), hooks(&second)).unwrap();
    second.wait_for("> ");
    drop(booted);
    // And for another snapshot.
    machine.snapshot(&path).unwrap();
    let words = Transcript::default();
    let again = Machine::restore(&Snapshot::open(&path).unwrap(), hooks(&words)).unwrap();
    check_alive(&again, &words);
}

/// Given a machine that was restored, when somebody cuts the file short from which its memory is mapped, then it ends
/// with that reason, and another that was restored from a copy goes on.
#[test]
fn a_machine_whose_memory_file_is_cut_short_ends_and_says_so() {
    // The translator's code may have anything in its stack pointer when it is interrupted.
    for engine in ["interp", "jit"] {
        let (cut, whole) = (Copy::new(), Copy::new());
        let (one, other) = (Transcript::default(), Transcript::default());
        let restore = |copy: &Copy, serial: &Transcript| {
            let mut snapshot = Snapshot::open(&copy.path).unwrap();
            snapshot.set_engine(engine.parse().unwrap());
            Machine::restore(&snapshot, hooks(serial)).unwrap()
        };
        let (machine, bystander) = (restore(&cut, &one), restore(&whole, &other));
        let file = fs::File::options().write(true).open(cut.file("memory"));
        file.unwrap().set_len(0).unwrap();

        machine.serial().input_all(b"100 + 1\r");

        let outcome = end(&machine, &one);
        assert!(
            matches!(outcome, Outcome::Failed(Failure::MemoryGone)),
            "{engine}: {outcome:?}"
        );
        check_alive(&bystander, &other);
    }
}

#[test]
fn a_restored_machine_that_is_told_to_power_off_does() {
    let serial = Transcript::default();
    let machine = Machine::restore(&Snapshot::open(snapshot()).unwrap(), hooks(&serial)).unwrap();
    assert!(machine.serial().input_all(b"quit\r"));
    let outcome = end(&machine, &serial);
    assert!(matches!(outcome, Outcome::PoweredOff), "{outcome:?}");
}

#[test]
fn time_stands_still_while_a_machine_is_saved_and_never_goes_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("saved");
    let (machine, _) = waiting(config());
    let pause = machine.pause();
    let before = pause.counters().clock;
    machine.snapshot(&path).unwrap();
    drop(pause);
    drop(machine);
    std::thread::sleep(Duration::from_millis(300));
    let restored = Machine::restore(&Snapshot::open(&path).unwrap(), Hooks::default()).unwrap();
    let after = restored.pause().counters().clock;
    assert!(after >= before, "{after} {before}");
    // The time in between is not in it; restoring takes less.
    assert!(after - before < 300_000_000, "{} ns", after - before);
}

fn with_disk(path: &Path, read_only: bool) -> MachineConfig {
    MachineConfig {
        disks: vec![DiskConfig {
            path: path.to_owned(),
            read_only,
        }],
        ..config()
    }
}

#[test]
fn disks_that_are_missing_or_of_another_size_are_refused_and_changed_ones_are_told_of() {
    let directory = tempfile::tempdir().unwrap();
    let (disk, path) = (
        directory.path().join("disk"),
        directory.path().join("saved"),
    );
    fs::write(&disk, [1; 4096]).unwrap();
    let (machine, _) = waiting(with_disk(&disk, false));
    machine.snapshot(&path).unwrap();
    let open = || Snapshot::open(&path).unwrap();
    let restore = || Machine::restore(&open(), Hooks::default());
    // The machine that was saved still has it.
    check_words(&restore().err().unwrap(), "is in use");
    drop(machine);
    assert!(open().warnings().is_empty());
    drop(restore().unwrap());

    let file = fs::File::options().write(true).open(&disk).unwrap();
    file.set_modified(std::time::SystemTime::now() + Duration::from_secs(5))
        .unwrap();
    assert!(open().warnings()[0].contains("has been written to"));
    drop(restore().unwrap());
    file.set_len(8192).unwrap();
    let error = restore().err().unwrap();
    assert!(matches!(error, SnapshotError::DiskSize { .. }), "{error}");
    fs::rename(&disk, path.join("moved")).unwrap();
    check_words(&restore().err().unwrap(), "does not exist");

    // The configuration is there to be edited; a disk may lie in the snapshot itself.
    file.set_len(4096).unwrap();
    let config = path.join("machine.json");
    let text = fs::read_to_string(&config).unwrap();
    let text = text.replace(disk.to_str().unwrap(), "moved");
    fs::write(&config, text).unwrap();
    drop(restore().unwrap());
}

#[test]
fn other_connections_than_the_machine_had_are_refused() {
    let snapshot = Snapshot::open(snapshot()).unwrap();
    let hooks = Hooks {
        ports: vec![Port {
            name: "new".to_owned(),
            output: Box::new(()),
        }],
        ..Hooks::default()
    };
    let error = Machine::restore(&snapshot, hooks).err().unwrap();
    check_words(&error, "the ports `new`");
}
