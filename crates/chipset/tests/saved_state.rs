//! The chipset as a whole: after any traffic its saved state restores to a chipset that behaves the
//! same, and no state whatever makes it do worse than refuse.

use proptest::prelude::*;
use serde_json::{Value, json};
use trapgate_chipset::saved::StateError;
use trapgate_chipset::{Chipset, ChipsetConfig, ChipsetState, RestoreError, map};

/// One thing that a machine does to its chipset.
#[derive(Clone, Debug)]
enum Act {
    PortRead(u16, u8),
    PortWrite(u16, u8, u32),
    MemoryRead(usize, u64),
    MemoryWrite(usize, u64, u64, bool),
    MsrRead(usize, u32),
    MsrWrite(usize, u32, u64),
    Line(u32, bool),
    Msi(u64, u32),
    Take(usize),
    Priority(usize, u8),
    Serial(usize, Vec<u8>),
    Key(u16, bool),
    PowerButton,
    Pass(u64),
}

const CPUS: usize = 2;

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![
        Just(0x20u16),
        Just(0x21),
        Just(0xa0),
        Just(0xa1),
        0x4d0u16..0x4d2,
        0x40u16..0x44,
        Just(0x61),
        0x70u16..0x72,
        Just(0x60),
        Just(0x64),
        Just(0x92),
        map::PM_BASE..map::PM_END,
        Just(map::RESET_PORT),
        Just(map::POST_PORT),
        0x3f8u16..0x400,
        0x2f8u16..0x300,
    ]
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0u64..0x40).prop_map(|register| map::LOCAL_APIC_ADDRESS + (register << 4)),
        prop_oneof![Just(0u64), Just(0x10), Just(0x40)]
            .prop_map(|offset| map::IO_APIC_ADDRESS + offset),
        (0u64..0x60).prop_map(|register| map::HPET_ADDRESS + 4 * register),
        Just(map::HPET_ADDRESS + 0x10),
    ]
}

fn msr() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0x1bu32), Just(0x6e0), 0x800u32..0x840]
}

fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        0u64..0x400,
        // Local vector table, redirection entries, the APIC's base with its mode bits.
        (16u64..256).prop_map(|vector| 0x2_0000 | vector),
        (16u64..256).prop_map(|vector| 0x8000 | vector),
        Just(map::LOCAL_APIC_ADDRESS | 0x900),
        Just(map::LOCAL_APIC_ADDRESS | 0xd00),
    ]
}

fn act() -> impl Strategy<Value = Act> {
    let size = || prop_oneof![4 => Just(1u8), 1 => Just(2), 1 => Just(4)];
    prop_oneof![
        4 => (port(), size()).prop_map(|(port, size)| Act::PortRead(port, size)),
        8 => (port(), size(), value()).prop_map(|(p, s, v)| Act::PortWrite(p, s, v as u32)),
        3 => (0..CPUS, address()).prop_map(|(cpu, gpa)| Act::MemoryRead(cpu, gpa)),
        6 => (0..CPUS, address(), value(), any::<bool>())
            .prop_map(|(cpu, gpa, value, wide)| Act::MemoryWrite(cpu, gpa, value, wide)),
        2 => (0..CPUS, msr()).prop_map(|(cpu, msr)| Act::MsrRead(cpu, msr)),
        4 => (0..CPUS, msr(), value()).prop_map(|(cpu, msr, value)| Act::MsrWrite(cpu, msr, value)),
        3 => (0u32..26, any::<bool>()).prop_map(|(gsi, level)| Act::Line(gsi, level)),
        2 => (0u64..0x40, any::<u32>())
            .prop_map(|(id, data)| Act::Msi(map::LOCAL_APIC_ADDRESS | id << 12, data)),
        4 => (0..CPUS).prop_map(Act::Take),
        1 => (0..CPUS, 0u8..16).prop_map(|(cpu, value)| Act::Priority(cpu, value)),
        1 => (0usize..2, proptest::collection::vec(any::<u8>(), 1..20))
            .prop_map(|(port, bytes)| Act::Serial(port, bytes)),
        1 => (0u16..0x80, any::<bool>()).prop_map(|(code, pressed)| Act::Key(code, pressed)),
        1 => Just(Act::PowerButton),
        4 => prop_oneof![0u64..100_000, 0u64..3_000_000_000].prop_map(Act::Pass),
    ]
}

fn acts(length: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Act>> {
    proptest::collection::vec(act(), length)
}

/// Does something, and tells all that can be seen of it.
fn perform(chipset: &mut Chipset, now: &mut u64, act: &Act) -> String {
    let time = *now;
    let seen = match act {
        Act::PortRead(port, size) => format!("{:?}", chipset.port_read(*port, *size, time)),
        Act::PortWrite(port, size, value) => {
            format!("{:?}", chipset.port_write(*port, *size, *value, time))
        }
        Act::MemoryRead(cpu, gpa) => {
            let mut data = [0; 4];
            let answered = chipset.mmio_read(*cpu, *gpa, &mut data, time);
            format!("{answered} {data:?}")
        }
        Act::MemoryWrite(cpu, gpa, value, wide) => {
            let length = if *wide { 8 } else { 4 };
            let bytes = value.to_le_bytes();
            format!("{}", chipset.mmio_write(*cpu, *gpa, &bytes[..length], time))
        }
        Act::MsrRead(cpu, msr) => format!("{:?}", chipset.apic_msr_read(*cpu, *msr, time)),
        Act::MsrWrite(cpu, msr, value) => {
            format!("{:?}", chipset.apic_msr_write(*cpu, *msr, *value, time))
        }
        Act::Line(gsi, level) => {
            chipset.set_line(*gsi, *level, time);
            String::new()
        }
        Act::Msi(address, data) => {
            chipset.send_msi(*address, *data);
            String::new()
        }
        Act::Take(cpu) => format!("{:?}", chipset.take_interrupt(*cpu)),
        Act::Priority(cpu, value) => {
            chipset.set_cr8(*cpu, *value);
            String::new()
        }
        Act::Serial(port, bytes) => format!("{}", chipset.serial_receive(*port, bytes, time)),
        Act::Key(code, pressed) => {
            chipset.key(*code, *pressed, time);
            String::new()
        }
        Act::PowerButton => {
            chipset.press_power_button(time);
            String::new()
        }
        Act::Pass(ns) => {
            *now = time.saturating_add(*ns);
            chipset.advance(*now);
            String::new()
        }
    };
    let pending = (0..CPUS).map(|cpu| chipset.interrupt_pending(cpu));
    format!(
        "{act:?}: {seen} {:?} {:?} {:?}",
        pending.collect::<Vec<_>>(),
        chipset.next_deadline(),
        chipset.take_effects(),
    )
}

fn config() -> ChipsetConfig {
    ChipsetConfig {
        cpus: CPUS,
        utc_base: 1_700_000_000_123_456_789,
        com2: true,
        ..ChipsetConfig::default()
    }
}

fn busy_chipset(acts: &[Act]) -> (Chipset, u64) {
    let mut chipset = Chipset::new(config()).unwrap();
    let mut now = 0;
    for act in acts {
        perform(&mut chipset, &mut now, act);
    }
    (chipset, now)
}

/// A state as it is written, in one value.
fn written(state: &ChipsetState) -> Value {
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
    } = state;
    json!([
        board,
        local_apics,
        io_apic,
        pic,
        pit,
        rtc,
        hpet,
        acpi_pm,
        serial,
        i8042
    ])
}

fn read(value: Value) -> Result<ChipsetState, serde_json::Error> {
    let (board, local_apics, io_apic, pic, pit, rtc, hpet, acpi_pm, serial, i8042) =
        serde_json::from_value(value)?;
    Ok(ChipsetState {
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
    })
}

/// Replaces the `index`th number, counted round and round; whether there was one.
fn change_number(value: &mut Value, index: &mut usize, to: u64) -> bool {
    let inner: Vec<&mut Value> = match value {
        Value::Number(_) if *index == 0 => {
            *value = to.into();
            return true;
        }
        Value::Number(_) => {
            *index -= 1;
            return false;
        }
        Value::Array(items) => items.iter_mut().collect(),
        Value::Object(fields) => fields.values_mut().collect(),
        _ => Vec::new(),
    };
    inner
        .into_iter()
        .any(|value| change_number(value, index, to))
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 600,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn a_restored_chipset_behaves_and_saves_as_the_one_that_was_saved(
        before in acts(0..150),
        after in acts(0..100),
    ) {
        let (mut original, now) = busy_chipset(&before);
        let state = original.save();
        let read_back = read(written(&state)).unwrap();
        prop_assert_eq!(&read_back, &state);

        let mut restored = Chipset::restore(config(), &read_back).unwrap();

        prop_assert_eq!(restored.save(), state);
        prop_assert!(!restored.has_effects());
        let (mut one, mut other) = (now, now);
        for act in &after {
            let expected = perform(&mut original, &mut one, act);
            prop_assert_eq!(perform(&mut restored, &mut other, act), expected);
        }
        prop_assert_eq!(restored.save(), original.save());
    }

    #[test]
    fn a_state_with_any_number_changed_is_refused_or_does_no_harm(
        before in acts(0..100),
        index in 0usize..170,
        to in prop_oneof![any::<u64>(), 0u64..0x1_0001, Just(u64::MAX), Just(1 << 62)],
        after in acts(0..100),
    ) {
        let (chipset, _) = busy_chipset(&before);
        let mut value = written(&chipset.save());
        let mut index = index;
        // Registers are numbers, and there are more than this many.
        prop_assert!(change_number(&mut value, &mut index, to));
        let Ok(state) = read(value) else { return Ok(()) };
        let mut now = state.board.now;
        let Ok(mut restored) = Chipset::restore(config(), &state) else { return Ok(()) };
        // What it then does is the guest's affair; that it does something is ours.
        for act in &after {
            perform(&mut restored, &mut now, act);
        }
    }
}

#[test]
fn states_that_no_device_has_are_refused_by_name() {
    type Change = fn(&mut ChipsetState);
    let cases: &[(&str, Change)] = &[
        ("pic", |s| s.pic.master.lowest = 8),
        ("pic", |s| s.pic.slave.vector = 0x71),
        ("pic", |s| s.pic.master.elcr = 1),
        ("pic", |s| s.pic.master.edges = 1),
        ("pit", |s| s.pit.channels[0].reload = 0),
        ("pit", |s| s.pit.channels[1].start = u64::MAX),
        ("pit", |s| s.pit.channels[2].mode = 6),
        ("pit", |s| s.pit.channels[2].gate = true),
        ("pit", |s| s.pit.channels[0].next_reload = Some((0, 0))),
        ("ioapic", |s| s.io_apic.asserted = 1 << 24),
        ("ioapic", |s| s.io_apic.entries[3] = 1 << 12),
        ("lapic", |s| s.local_apics[1].apic_base = 1 << 50),
        ("lapic", |s| s.local_apics[0].apic_base = 0xfee0_0500),
        ("lapic", |s| s.local_apics[0].lvt[0] = 1 << 30),
        ("lapic", |s| s.local_apics[0].irr.insert(3)),
        ("lapic", |s| s.local_apics[0].timer.divide = 4),
        ("lapic", |s| s.local_apics.truncate(1)),
        ("rtc", |s| s.rtc.index = 0x80),
        ("rtc", |s| s.rtc.base_seconds = i64::MIN),
        ("rtc", |s| s.rtc.weekday_offset = -1),
        ("hpet", |s| s.hpet.timers[0].config = 0),
        ("hpet", |s| s.hpet.status = 8),
        ("acpi-pm", |s| s.acpi_pm.overflows = 1),
        ("acpi-pm", |s| s.acpi_pm.control = 0),
        ("serial", |s| s.serial[0].received = vec![0; 17]),
        ("serial", |s| s.serial[1].fcr = 0x40),
        ("i8042", |s| s.i8042.keyboard.queue = vec![0; 33]),
        ("i8042", |s| s.i8042.scan_set = 3),
        ("board", |s| s.board.now = u64::MAX),
        ("board", |s| s.board.lines[0] = 0x10),
        ("board", |s| s.board.lowest_priority_turn = CPUS),
    ];
    let state = Chipset::new(config()).unwrap().save();
    for (number, (device, change)) in cases.iter().enumerate() {
        let mut changed = state.clone();
        change(&mut changed);
        let Err(RestoreError::State(
            StateError::Value { device: named, .. } | StateError::Length { device: named, .. },
        )) = Chipset::restore(config(), &changed)
        else {
            panic!("case {number}, {device}, was let in");
        };
        assert_eq!(named, *device, "case {number}");
    }
}
