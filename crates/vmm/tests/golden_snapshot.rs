//! Snapshots that earlier versions took: each must go on, or be refused by version with a clear error.
//!
//! `golden/format-N.tar.gz` is a snapshot of format version N: the built-in guest, waiting for a person,
//! with a terminal, two ports and a disk (which lies in the snapshot). When the format changes, add one:
//! `cargo test -p trapgate-vmm --test golden_snapshot -- --ignored`.

mod boot;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use boot::{Transcript, end};
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use trapgate_vmm::{
    Content, DiskConfig, FORMAT_VERSION, Hooks, Machine, MachineConfig, Outcome, Port, Snapshot,
    SnapshotError,
};

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

/// Lets it go on, and looks whether it is the guest that it was.
fn goes_on(directory: &Path) -> Result<(), SnapshotError> {
    let mut snapshot = Snapshot::open(directory)?;
    snapshot.check_memory()?;
    snapshot.set_engine("interp".parse().unwrap());
    let serial = Transcript::default();
    let machine = Machine::restore(&snapshot, hooks(&serial))?;
    assert!(machine.serial().input_all(b"6 * (3 + 4)\r"));
    let outcome = end(&machine, &serial);
    assert!(matches!(outcome, Outcome::PoweredOff), "{outcome:?}");
    assert!(serial.text().contains("\n42\r\n"), "{}", serial.text());
    Ok(())
}

#[test]
fn old_snapshots_go_on_or_are_refused_by_version() {
    let mut found = 0;
    for entry in fs::read_dir(golden()).unwrap() {
        let path = entry.unwrap().path();
        let directory = tempfile::tempdir().unwrap();
        let file = GzDecoder::new(File::open(&path).unwrap());
        tar::Archive::new(file).unpack(directory.path()).unwrap();
        match goes_on(&directory.path().join("golden")) {
            Ok(()) => println!("{} goes on", path.display()),
            Err(
                error @ (SnapshotError::Version { .. }
                | SnapshotError::SectionVersion { .. }
                | SnapshotError::Profile { .. }
                | SnapshotError::Device(trapgate_pci::StateError::Version { .. })),
            ) => {
                assert!(error.fix().is_some(), "{error}");
                println!("{} is refused: {error}", path.display());
            }
            Err(error) => panic!("{}: {error}", path.display()),
        }
        found += 1;
    }
    assert!(found > 0);
    let present = golden().join(format!("format-{FORMAT_VERSION}.tar.gz"));
    assert!(present.exists(), "this format has no golden snapshot");
}

#[test]
#[ignore = "writes a new golden snapshot, when there is a new format"]
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
    goes_on(&path).unwrap();

    let target = golden().join(format!("format-{FORMAT_VERSION}.tar.gz"));
    let file = GzEncoder::new(File::create_new(&target).unwrap(), Compression::best());
    let mut archive = tar::Builder::new(file);
    archive.append_dir_all("golden", &path).unwrap();
    archive.into_inner().unwrap().finish().unwrap();
}
