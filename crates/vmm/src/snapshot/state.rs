//! A machine's state between two instructions, and its sections.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use trapgate_chipset::ChipsetState;
use trapgate_pci::{BusState, SavedFunction};
use trapgate_x86::CpuState;

use super::header::{read_section, section, section_version};
use crate::SnapshotError;

/// Version of the sections of the clock, of processors, and of what the chipset consists of. Each has
/// its own number as soon as one of them changes.
const VERSION: u32 = 1;

/// The clock that everything reads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ClockState {
    /// Nanoseconds of VM time.
    pub(crate) now: u64,
    /// Time of day at VM time 0, nanoseconds since 1970-01-01 UTC.
    pub(crate) epoch: u64,
}

/// Input for COM1 that the guest's receiver has had no room for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SerialInput {
    waiting: Vec<u8>,
}

/// What is on the bus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BusSection {
    /// What was last written to port 0xcf8.
    address: u32,
    /// The kinds of functions, by slot; each has a section of its own.
    functions: Vec<String>,
}

/// All of a machine but its memory, its disks and its configuration. It belongs to no engine.
#[derive(Clone, Debug)]
pub(crate) struct MachineState {
    pub(crate) clock: ClockState,
    pub(crate) processors: Vec<CpuState>,
    pub(crate) chipset: ChipsetState,
    pub(crate) serial_input: Vec<u8>,
    pub(crate) bus: BusState,
}

/// Sections by the names of their parts.
pub(super) type Sections = BTreeMap<String, Vec<u8>>;

fn name(section: &str) -> String {
    format!("state/{section}.json")
}

fn numbered(section: &str, number: usize) -> String {
    name(&format!("{section}-{number}"))
}

impl MachineState {
    /// Writes it as sections.
    pub(super) fn sections(&self) -> Sections {
        let Self {
            clock,
            processors,
            chipset,
            serial_input,
            bus,
        } = self;
        let ChipsetState {
            board,
            local_apics,
            io_apic,
            pic,
            pit,
            rtc,
            hpet,
            acpi_pm,
            serial,
            i8042,
        } = chipset;
        let BusState { address, functions } = bus;
        let waiting = SerialInput {
            waiting: serial_input.clone(),
        };
        let bus = BusSection {
            address: *address,
            functions: functions.iter().map(|saved| saved.kind.clone()).collect(),
        };
        let mut sections = Sections::new();
        let mut add = |name: String, bytes: Vec<u8>| {
            sections.insert(name, bytes);
        };
        add(name("clock"), section(VERSION, clock));
        for (number, processor) in processors.iter().enumerate() {
            add(numbered("cpu", number), section(VERSION, processor));
        }
        add(name("board"), section(VERSION, board));
        for (number, apic) in local_apics.iter().enumerate() {
            add(numbered("local-apic", number), section(VERSION, apic));
        }
        add(name("io-apic"), section(VERSION, io_apic));
        add(name("pic"), section(VERSION, pic));
        add(name("pit"), section(VERSION, pit));
        add(name("rtc"), section(VERSION, rtc));
        add(name("hpet"), section(VERSION, hpet));
        add(name("acpi-pm"), section(VERSION, acpi_pm));
        for (number, port) in serial.iter().enumerate() {
            add(numbered("serial", number), section(VERSION, port));
        }
        add(name("serial-input"), section(VERSION, &waiting));
        add(name("i8042"), section(VERSION, i8042));
        add(name("pci"), section(VERSION, &bus));
        for (slot, saved) in functions.iter().enumerate() {
            add(numbered("pci", slot), section(saved.version, &saved.state));
        }
        sections
    }

    /// Reads it from sections; every one of them must be there, and no other.
    pub(super) fn read(mut sections: Sections, cpus: u32) -> Result<Self, SnapshotError> {
        let sections = &mut sections;
        let cpus = cpus as usize;
        let clock = take(sections, name("clock"))?;
        let processors = take_all(sections, "cpu", cpus)?;
        let SerialInput { waiting } = take(sections, name("serial-input"))?;
        let chipset = ChipsetState {
            board: take(sections, name("board"))?,
            local_apics: take_all(sections, "local-apic", cpus)?,
            io_apic: take(sections, name("io-apic"))?,
            pic: take(sections, name("pic"))?,
            pit: take(sections, name("pit"))?,
            rtc: take(sections, name("rtc"))?,
            hpet: take(sections, name("hpet"))?,
            acpi_pm: take(sections, name("acpi-pm"))?,
            serial: [
                take(sections, numbered("serial", 0))?,
                take(sections, numbered("serial", 1))?,
            ],
            i8042: take(sections, name("i8042"))?,
        };
        let BusSection { address, functions } = take(sections, name("pci"))?;
        let function = |(slot, kind): (usize, String)| {
            let part = numbered("pci", slot);
            let bytes = bytes(sections, &part)?;
            let found = section_version(&part, &bytes)?;
            let version = u32::try_from(found).unwrap_or(u32::MAX);
            Ok(SavedFunction {
                kind,
                version,
                // Its version is the function's to judge.
                state: read_section::<Value>(&part, version, &bytes)?,
            })
        };
        let functions = functions.into_iter().enumerate().map(function);
        let functions = functions.collect::<Result<_, SnapshotError>>()?;
        if let Some(part) = sections.keys().next() {
            return Err(SnapshotError::Unknown { part: part.clone() });
        }
        Ok(Self {
            clock,
            processors,
            chipset,
            serial_input: waiting,
            bus: BusState { address, functions },
        })
    }
}

fn bytes(sections: &mut Sections, part: &str) -> Result<Vec<u8>, SnapshotError> {
    sections.remove(part).ok_or_else(|| SnapshotError::Missing {
        part: part.to_owned(),
    })
}

fn take<T: DeserializeOwned>(sections: &mut Sections, part: String) -> Result<T, SnapshotError> {
    let bytes = bytes(sections, &part)?;
    read_section(&part, VERSION, &bytes)
}

fn take_all<T: DeserializeOwned>(
    sections: &mut Sections,
    section: &str,
    count: usize,
) -> Result<Vec<T>, SnapshotError> {
    (0..count)
        .map(|number| take(sections, numbered(section, number)))
        .collect()
}
