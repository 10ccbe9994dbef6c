//! Guests of this repository that are saved while they run, and go on from what was saved.

mod boot;

use std::path::Path;
use std::time::Duration;

use boot::{Transcript, end};
use trapgate_vmm::{
    Content, EngineChoice, EngineKind, Hooks, Host, Machine, MachineConfig, Outcome, Snapshot,
    engines,
};

/// The engines that this host has, but for KVM, whose moves have tests of their own.
fn choices() -> Vec<EngineChoice> {
    let usable = engines(&Host::probe()).into_iter();
    usable
        .filter(|engine| engine.usable.is_ok() && engine.kind != EngineKind::Kvm)
        .map(|engine| EngineChoice::Only(engine.kind))
        .collect()
}

fn hooks(serial: &Transcript) -> Hooks {
    let sink = serial.clone();
    Hooks {
        serial: Box::new(move |bytes| sink.add(bytes)),
        ..Hooks::default()
    }
}

fn start(name: &str, command_line: &str, serial: &Transcript) -> Machine {
    let program = trapgate_guests::named(name).expect("there is such a program");
    let config = MachineConfig {
        kernel: Content::from(program.image),
        command_line: command_line.to_owned(),
        memory_bytes: 32 << 20,
        engine: EngineChoice::Only(EngineKind::Interp),
        ..MachineConfig::default()
    };
    Machine::start(config, hooks(serial)).unwrap()
}

fn restore(directory: &Path, engine: EngineChoice, serial: &Transcript) -> Machine {
    let mut snapshot = Snapshot::open(directory).unwrap();
    snapshot.check_memory().unwrap();
    snapshot.set_engine(engine);
    Machine::restore(&snapshot, hooks(serial)).unwrap()
}

/// The chain's last words, which are the same whenever and wherever it ran; of a machine that was saved in the middle
/// of them, the rest.
#[track_caller]
fn check_end(machine: &Machine, serial: &Transcript) {
    let outcome = end(machine, serial);
    assert!(matches!(outcome, Outcome::PoweredOff), "{outcome:?}");
    let expected = trapgate_guests::named("chain").unwrap().expected.unwrap();
    let lines: Vec<&str> = expected.lines().collect();
    let last = lines[lines.len() - 6..].join("\n");
    let text = serial.text().replace('\r', "");
    let text = text.trim_end();
    assert!(
        text.ends_with(&last) || last.ends_with(text),
        "`{last}` is not at the end of\n{text}"
    );
}

/// What was saved goes on in the place of what it was saved from, again and again, at moments that
/// nobody chose, each time on another engine. The machine that was saved ends as if nothing had been.
#[test]
fn a_chain_that_is_saved_and_restored_again_and_again_has_the_right_result() {
    let directory = tempfile::tempdir().unwrap();
    let serial = Transcript::default();
    let original = start("chain", "", &serial);
    let mut last: Option<Machine> = None;
    let choices = choices();
    let mut moves = 0;
    loop {
        let machine = last.as_ref().unwrap_or(&original);
        if machine.wait_for(Duration::from_millis(15)).is_some() {
            break;
        }
        let path = directory.path().join(moves.to_string());
        if let Err(error) = machine.snapshot(&path) {
            // It ended in this very moment.
            assert!(
                machine.wait_for(Duration::from_secs(1)).is_some(),
                "{error}"
            );
            break;
        }
        last = Some(restore(
            &path,
            choices[moves % choices.len()],
            &Transcript::default(),
        ));
        moves += 1;
    }
    println!("moved {moves} times");
    assert!(moves >= 3, "moved {moves} times only");
    check_end(&original, &serial);
    // And so does whatever went on from the last snapshot, and from the first.
    for number in [0, moves - 1] {
        for &engine in &choices {
            let serial = Transcript::default();
            let machine = restore(&directory.path().join(number.to_string()), engine, &serial);
            check_end(&machine, &serial);
        }
    }
}
