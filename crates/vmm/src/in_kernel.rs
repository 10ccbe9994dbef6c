//! Guests that use what a kernel can do for a machine, in every combination of what it does: what they see must be what
//! they see on the interpreter.

use std::fs;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tempfile::TempDir;
use trapgate_engine::probe::{EngineKind, Host};
use trapgate_kvm::{Facts, InKernel};

use crate::crossing::{Die, choice, constructor, hooks};
use crate::engines::OnKvm;
use crate::skipped::skipped;
use crate::{Content, DiskConfig, EngineChoice, Machine, MachineConfig, Outcome, Snapshot, lock};

/// Long enough that a guest that is not done by then never will be.
const LIMIT: Duration = Duration::from_secs(120);
const SECTORS: u64 = 256;

/// What the KVM of this host can do for a machine; `None`, with a word about it, where there is none.
fn facts() -> Option<Facts> {
    Facts::probe()
        .inspect_err(|error| skipped(&format!("no KVM here: {error}")))
        .ok()
}

/// All that can be asked of a kernel.
fn combinations() -> impl Iterator<Item = InKernel> {
    (0..8).map(|bits| InKernel {
        controllers: bits & 1 != 0,
        irqfd: bits & 2 != 0,
        ioeventfd: bits & 4 != 0,
    })
}

/// A disk as the guest `disk` wants it.
fn disk() -> (TempDir, DiskConfig) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let words = (0..SECTORS * 64).map(|word| match (word / 64, word % 64) {
        // mov eax, sector; ret
        (sector, 0) => 0xc3 << 40 | sector << 8 | 0xb8,
        _ => word,
    });
    let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    fs::write(&path, bytes).unwrap();
    let disk = DiskConfig {
        path,
        read_only: true,
    };
    (directory, disk)
}

fn config(program: &str, command_line: &str, disks: &[DiskConfig], tsc_hz: u64) -> MachineConfig {
    MachineConfig {
        memory_bytes: 16 << 20,
        kernel: Content::from(trapgate_guests::named(program).unwrap().image),
        command_line: command_line.to_owned(),
        disks: disks.to_vec(),
        tsc_hz,
        ..MachineConfig::default()
    }
}

fn start(engine: EngineKind, in_kernel: InKernel, config: MachineConfig) -> (Machine, Said) {
    let said = Said::default();
    let make = constructor(engine, in_kernel);
    let machine = Machine::start_on(config, hooks(&said), choice(engine), &*make).unwrap();
    (machine, said)
}

type Said = Arc<Mutex<Vec<u8>>>;

/// All that a guest said, once it has ended by itself.
#[track_caller]
fn end(machine: &Machine, said: &Mutex<Vec<u8>>) -> String {
    let outcome = machine.wait_for(LIMIT);
    let text = String::from_utf8_lossy(&lock(said)).into_owned();
    if outcome.is_none() {
        let pause = machine.pause();
        let (chipset, _) = machine.board.save();
        let processors = pause.processors();
        panic!("the guest hangs: {processors:#x?}, {chipset:#x?}:\n{text}");
    }
    let well = matches!(outcome, Some(Outcome::PoweredOff));
    assert!(well, "{outcome:?}:\n{text}");
    text
}

/// What `disk` says on an engine of ours, which is right.
fn disk_on(engine: EngineKind, config: &MachineConfig) -> String {
    let said = Said::default();
    let config = MachineConfig {
        engine: EngineChoice::Only(engine),
        ..config.clone()
    };
    let machine = Machine::start(config, hooks(&said)).unwrap();
    let text = end(&machine, &said);
    for line in [
        "disk: 256 sectors",
        "disk: 200 sectors read, 0 of them wrong",
        "disk: called, 0 of them the code of another sector",
        "disk: 200 interrupts, 0 of them not asked for, 3 held back",
        "disk: done",
    ] {
        assert!(text.lines().any(|said| said == line), "{engine}: {text}");
    }
    text
}

#[test]
fn code_that_a_disk_has_written_over_is_executed_as_it_is_now_on_each_engine() {
    let (_directory, disk) = disk();
    let tsc_hz = MachineConfig::default().tsc_hz;
    let config = config("disk", "rounds=200", &[disk], tsc_hz);
    for engine in [EngineKind::Interp, EngineKind::Jit, EngineKind::Lockstep] {
        disk_on(engine, &config);
    }
}

#[test]
fn disk_is_read_and_interrupts_once_for_each_sector_whatever_the_kernel_does() {
    let Some(facts) = facts() else {
        return;
    };
    let (_directory, disk) = disk();
    let config = config("disk", "rounds=200", &[disk], facts.tsc_hz);
    let expected = disk_on(EngineKind::Interp, &config);
    for in_kernel in combinations().filter(|wanted| *wanted == wanted.and(facts.in_kernel())) {
        let said = Said::default();
        let make = OnKvm::new(&Host::probe(), in_kernel);
        let choice = choice(EngineKind::Kvm);
        let machine = Machine::start_on(config.clone(), hooks(&said), choice, &make).unwrap();
        assert_eq!(end(&machine, &said), expected, "{in_kernel:?}");
        let doorbells = machine.brake.doorbells.as_ref();
        let by_event = doorbells.map_or(0, |doorbells| doorbells.count());
        assert_eq!(by_event, usize::from(in_kernel.ioeventfd), "{in_kernel:?}");
        // Of 200 that are sent, the first ones after the vector changes go the other way.
        let by_event = make.machine().unwrap().messages_by_event();
        assert_eq!(by_event > 150, in_kernel.irqfd, "{in_kernel:?}: {by_event}");
    }
}

/// Pauses a machine at random moments, a few milliseconds apart, until it ends.
fn disturb(machine: &Machine, die: &mut Die) -> u32 {
    let mut pauses = 0;
    while machine
        .wait_for(die.time(Duration::from_millis(8)))
        .is_none()
    {
        drop(machine.pause());
        pauses += 1;
    }
    pauses
}

/// Saves a machine at random moments, each time to go on where it was restored, on the other engine; all that it said.
fn wander(
    config: &MachineConfig,
    in_kernel: InKernel,
    moves: usize,
    die: &mut Die,
) -> (String, usize) {
    let directory = tempfile::tempdir().unwrap();
    let engines = [EngineKind::Kvm, EngineKind::Interp];
    let (mut machine, mut said) = start(engines[0], in_kernel, config.clone());
    let mut before = String::new();
    for number in 1..=moves {
        let path = directory.path().join(number.to_string());
        let most = match number % 2 {
            1 => 60,
            _ => 15,
        };
        let ended = machine.wait_for(die.time(Duration::from_millis(most)));
        // What it says after it was saved is not to be heard.
        let pause = machine.pause();
        if ended.is_some() || machine.snapshot(&path).is_err() {
            drop(pause);
            before += &end(&machine, &said);
            return (before, number - 1);
        }
        machine.stop();
        machine.wait();
        drop(pause);
        before += &String::from_utf8_lossy(&lock(&said));
        drop(machine);
        let snapshot = Snapshot::open(&path).unwrap();
        let engine = engines[number % 2];
        said = Said::default();
        let make = constructor(engine, in_kernel);
        machine = Machine::restore_on(&snapshot, hooks(&said), choice(engine), &*make).unwrap();
    }
    before += &end(&machine, &said);
    (before, moves)
}

#[test]
fn disk_is_read_right_over_pauses_and_on_another_engine() {
    let Some(facts) = facts() else {
        return;
    };
    let (_directory, disk) = disk();
    let config = config("disk", "rounds=200", &[disk], facts.tsc_hz);
    let (machine, said) = start(EngineKind::Interp, InKernel::NOTHING, config.clone());
    let expected = end(&machine, &said);
    let mut die = Die(crate::clock::time_of_day() | 1);
    let (machine, said) = start(EngineKind::Kvm, InKernel::ALL, config.clone());
    let pauses = disturb(&machine, &mut die);
    assert_eq!(end(&machine, &said), expected, "{pauses} pauses");
    drop(machine);
    let (text, moves) = wander(&config, InKernel::ALL, 20, &mut die);
    assert_eq!(text, expected, "{moves} moves");
    println!("{pauses} pauses, {moves} moves");
}
