//! Snapshots of anybody's making: parts cut, bytes and values changed, with checksums that fit or
//! don't. Whatever it is, it is refused or goes on, and no thread of the machine dies of it.
#![no_main]
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use arbitrary::Arbitrary;
use flate2::read::GzDecoder;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use trapgate_vmm::{Failure, Hooks, Machine, Outcome, Port, Snapshot, SnapshotError};

/// A snapshot that is known to be good: the present golden one.
const GOLDEN: &[u8] = include_bytes!("../../crates/vmm/tests/golden/format-2-profile-1.tar.gz");
const HEADER: &str = "snapshot.json";
const MEMORY_LIST: &str = "memory.json";
/// How long a machine that goes on is watched.
const WATCHED: Duration = Duration::from_millis(2);

#[derive(Arbitrary, Debug)]
struct Input {
    edits: Vec<Edit>,
    /// The header has the right lengths and checksums: somebody did it on purpose.
    signed: bool,
}

#[derive(Arbitrary, Debug)]
struct Edit {
    part: u8,
    change: Change,
}

#[derive(Arbitrary, Debug)]
enum Change {
    /// Replaces the value that is found by counting.
    Value(u16, Scalar),
    /// Removes it, or puts it there twice.
    Remove(u16),
    Double(u16),
    Byte(u16, u8),
    Cut(u16),
}

#[derive(Arbitrary, Debug)]
enum Scalar {
    Number(u64),
    Small(u8),
    Power(u8, i8),
    Negative(i64),
    Register(u64),
    Bool(bool),
    Text(String),
    Null,
    Empty,
}

impl Scalar {
    fn value(&self) -> Value {
        match self {
            Self::Number(number) => json!(number),
            Self::Small(number) => json!(number),
            Self::Power(bit, more) => {
                json!((1u64 << (bit & 63)).wrapping_add_signed((*more).into()))
            }
            Self::Negative(number) => json!(number),
            Self::Register(number) => json!(format!("{number:#x}")),
            Self::Bool(value) => json!(value),
            Self::Text(text) => json!(text),
            Self::Null => Value::Null,
            Self::Empty => json!([]),
        }
    }
}

/// The parts that are small enough to be changed, by their names, and where to put them.
struct Golden {
    directory: PathBuf,
    parts: BTreeMap<String, Vec<u8>>,
}

fn golden() -> &'static Golden {
    static GOLDEN_SNAPSHOT: OnceLock<Golden> = OnceLock::new();
    GOLDEN_SNAPSHOT.get_or_init(|| {
        // Kept as long as the process; the next one has its own.
        let directory = std::env::temp_dir().join(format!("trapgate-fuzz-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        tar::Archive::new(GzDecoder::new(GOLDEN))
            .unpack(&directory)
            .unwrap();
        let directory = directory.join("golden");
        let mut parts = BTreeMap::new();
        let header = fs::read(directory.join(HEADER)).unwrap();
        let names: Value = serde_json::from_slice(&header).unwrap();
        for name in names["parts"].as_object().unwrap().keys() {
            if name.ends_with(".json") {
                parts.insert(name.clone(), fs::read(directory.join(name)).unwrap());
            }
        }
        parts.insert(HEADER.to_owned(), header);
        for name in parts.keys() {
            writable(&directory.join(name));
        }
        // If it were refused itself, nothing behind the header would ever be reached.
        let restored = opened(&directory).and_then(|snapshot| Machine::restore(&snapshot, hooks()));
        let machine = restored.expect("the golden snapshot goes on while nothing in it is changed");
        machine.stop();
        machine.wait();
        Golden { directory, parts }
    })
}

fn opened(directory: &Path) -> Result<Snapshot, SnapshotError> {
    let mut snapshot = Snapshot::open(directory)?;
    snapshot.set_engine("interp".parse().unwrap());
    Ok(snapshot)
}

fn writable(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// The container and place of the `index`th value, and what is to be done there.
fn visit(value: &mut Value, index: &mut u16, change: &Change) -> bool {
    let done = |index: &mut u16| {
        let here = *index == 0;
        *index = index.saturating_sub(1);
        here
    };
    match value {
        Value::Array(items) => {
            for at in 0..items.len() {
                if done(index) {
                    match change {
                        Change::Value(_, scalar) => items[at] = scalar.value(),
                        Change::Remove(_) => drop(items.remove(at)),
                        _ => items.insert(at, items[at].clone()),
                    }
                    return true;
                }
                if visit(&mut items[at], index, change) {
                    return true;
                }
            }
        }
        Value::Object(fields) => {
            let names: Vec<String> = fields.keys().cloned().collect();
            for name in names {
                if done(index) {
                    match change {
                        Change::Value(_, scalar) => drop(fields.insert(name, scalar.value())),
                        Change::Remove(_) => drop(fields.remove(&name)),
                        _ => {
                            let twice = fields[&name].clone();
                            fields.insert(format!("{name}2"), twice);
                        }
                    }
                    return true;
                }
                if let Some(inner) = fields.get_mut(&name)
                    && visit(inner, index, change)
                {
                    return true;
                }
            }
        }
        _ => {}
    }
    false
}

fn changed(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Value(index, _) | Change::Remove(index) | Change::Double(index) => {
            let Ok(mut value) = serde_json::from_slice(bytes) else {
                return;
            };
            let mut index = *index % 512;
            visit(&mut value, &mut index, change);
            *bytes = value.to_string().into_bytes();
        }
        Change::Byte(at, byte) => {
            let length = bytes.len().max(1);
            if let Some(old) = bytes.get_mut(usize::from(*at) % length) {
                *old = *byte;
            }
        }
        Change::Cut(length) => bytes.truncate(usize::from(*length)),
    }
}

fn sign(parts: &mut BTreeMap<String, Vec<u8>>, name: &str) {
    let bytes = &parts[name];
    let part = json!({
        "length": bytes.len(),
        "crc32": format!("{:08x}", crc32fast::hash(bytes)),
    });
    if let Ok(mut header) = serde_json::from_slice::<Value>(&parts[HEADER])
        && let Some(known) = header["parts"].as_object_mut()
    {
        known.insert(name.to_owned(), part);
        parts.insert(HEADER.to_owned(), header.to_string().into_bytes());
    }
}

fn hooks() -> Hooks {
    let port = |name: &str| Port {
        name: name.to_owned(),
        output: Box::new(()),
    };
    Hooks {
        terminal: Some(Box::new(())),
        ports: vec![port("one"), port("two")],
        ..Hooks::default()
    }
}

fuzz_target!(|input: Input| {
    let golden = golden();
    let mut parts = golden.parts.clone();
    let names: Vec<&String> = golden.parts.keys().collect();
    let mut touched = Vec::new();
    for Edit { part, change } in input.edits.iter().take(8) {
        let name = names[usize::from(*part) % names.len()];
        changed(parts.get_mut(name).unwrap(), change);
        // The header cannot be signed, and the configuration is not.
        if input.signed && (name.starts_with("state/") || name == MEMORY_LIST) {
            sign(&mut parts, name);
            touched.push(HEADER);
        }
        touched.push(name);
    }
    for name in &touched {
        fs::write(golden.directory.join(name), &parts[*name]).unwrap();
    }
    if let Ok(snapshot) = opened(&golden.directory) {
        // More would have to be had; what is tested is what comes before.
        if let Ok(machine) = Machine::restore(&snapshot, hooks()) {
            machine.serial().input(b"6*7\r");
            let outcome = machine.wait_for(WATCHED);
            if let Some(Outcome::Failed(Failure::Thread { thread, message })) = outcome {
                panic!("{thread}: {message}");
            }
            machine.stop();
            machine.wait();
        }
    }
    for name in touched {
        fs::write(golden.directory.join(name), &golden.parts[name]).unwrap();
    }
});
