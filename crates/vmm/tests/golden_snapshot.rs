//! Snapshots that were taken once and are kept: the present one must go on, whatever is changed, and those of earlier
//! versions must be refused by the number that is different.
//!
//! Each is the built-in guest, waiting for a person, with a terminal, two ports and a disk (which lies in the
//! snapshot), and has the name of the versions that it was taken with. When [`PRESENT`] no longer goes on, a version
//! must be raised (`FORMAT_VERSION`, a section's, `PROFILE_VERSION`): move it to [`REFUSED`] and take another:
//! `cargo test -p trapgate-vmm --test golden_snapshot -- --ignored`.

mod boot;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use boot::{Transcript, end};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use tempfile::TempDir;
use trapgate_vmm::{
    Content, DiskConfig, Hooks, Machine, MachineConfig, Outcome, Port, Snapshot, SnapshotError,
};

/// The snapshot of this version.
const PRESENT: &str = "format-2-profile-1.tar.gz";
/// Those of earlier versions, and what the refusal says.
const REFUSED: &[(&str, &str)] = &[(
    "format-1.tar.gz",
    "the snapshot has format version 1, and this program reads version 2",
)];

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn hooks(serial: &Transcript) -> Hooks {
    let sink = serial.clone();
    let port = |name: &str| Port {
        name: name.to_owned(),
        output: Box::new(()),
    };
    Hooks {
        serial: Box::new(move |bytes| sink.add(bytes)),
        terminal: Some(Box::new(())),
        ports: vec![port("one"), port("two")],
    }
}

/// A golden snapshot, in a directory of its own.
struct Unpacked(TempDir);

impl Unpacked {
    fn new(name: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = GzDecoder::new(File::open(golden().join(name)).unwrap());
        tar::Archive::new(file).unpack(directory.path()).unwrap();
        Self(directory)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("golden")
    }
}

/// Lets it go on, and looks whether it is the guest that it was.
fn goes_on(directory: &Path, engine: &str) -> Result<(), SnapshotError> {
    let mut snapshot = Snapshot::open(directory)?;
    snapshot.check_memory()?;
    snapshot.set_engine(engine.parse().unwrap());
    let serial = Transcript::default();
    let machine = Machine::restore(&snapshot, hooks(&serial))?;
    assert!(machine.serial().input_all(b"6 * (3 + 4)\r"));
    let outcome = end(&machine, &serial);
    assert!(matches!(outcome, Outcome::PoweredOff), "{outcome:?}");
    assert!(serial.text().contains("\n42\r\n"), "{}", serial.text());
    Ok(())
}

#[test]
fn present_snapshot_goes_on_on_every_engine_in_software() {
    for engine in ["interp", "jit", "lockstep"] {
        let unpacked = Unpacked::new(PRESENT);
        goes_on(&unpacked.path(), engine).unwrap_or_else(|error| {
            panic!("{PRESENT} does not go on on {engine} (see the top of this file): {error}")
        });
    }
}

#[test]
fn earlier_snapshots_are_refused_by_version() {
    for (name, expected) in REFUSED {
        let error = Snapshot::open(&Unpacked::new(name).path()).unwrap_err();
        assert_eq!(error.to_string(), *expected);
        assert!(error.fix().unwrap().contains("version of trapgate"));
    }
}

#[test]
fn every_golden_snapshot_is_tried() {
    let mut found: Vec<_> = fs::read_dir(golden())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let mut tried: Vec<_> = REFUSED
        .iter()
        .map(|(name, _)| *name)
        .chain([PRESENT])
        .collect();
    tried.sort_unstable();
    assert_eq!(found, tried);
}

#[test]
#[ignore = "writes the present golden snapshot, when a version was raised"]
fn take_golden_snapshot() {
    let directory = tempfile::tempdir().unwrap();
    let (path, disk) = (
        directory.path().join("golden"),
        directory.path().join("disk"),
    );
    fs::write(&disk, [0x5a; 4096]).unwrap();
    let config = MachineConfig {
        kernel: Content::from(trapgate_guests::BUILTIN),
        memory_bytes: 4 << 20,
        engine: "interp".parse().unwrap(),
        disks: vec![DiskConfig {
            path: disk.clone(),
            read_only: false,
        }],
        epoch: Some(1_700_000_000_000_000_000),
        ..MachineConfig::default()
    };
    let serial = Transcript::default();
    let machine = Machine::start(config, hooks(&serial)).unwrap();
    serial.wait_for("> ");
    machine.snapshot(&path).unwrap();
    drop(machine);
    // The disk goes with it.
    fs::rename(&disk, path.join("disk")).unwrap();
    let file = path.join("machine.json");
    let mut saved: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    saved["state"]["disks"][0]["path"] = json!("disk");
    fs::write(&file, serde_json::to_vec_pretty(&saved).unwrap()).unwrap();
    goes_on(&path, "interp").unwrap();

    let target = golden().join(PRESENT);
    let file = GzEncoder::new(File::create_new(&target).unwrap(), Compression::best());
    let mut archive = tar::Builder::new(file);
    archive.append_dir_all("golden", &path).unwrap();
    archive.into_inner().unwrap().finish().unwrap();
}
