//! Boots the guest programs of this repository: on the interpreter, the translator, and both in lockstep, which must
//! make them print what every correct CPU of its level does, without exception. For KVM see `conformance.rs`.

mod boot;
mod resident;

use std::sync::{Mutex, PoisonError};

use boot::{Transcript, end, skipped};
use resident::{MOST_BEYOND_RAM, Watch};
use trapgate_vmm::{
    Content, Hooks, Host, Level, Machine, MachineConfig, Outcome, Protocol, engines,
};

fn start(name: &str, change: impl FnOnce(&mut MachineConfig)) -> (Machine, Transcript) {
    let program = trapgate_guests::named(name).expect("there is such a program");
    let serial = Transcript::default();
    let mut config = MachineConfig {
        kernel: Content::from(program.image),
        cpus: program.processors(),
        ..MachineConfig::default()
    };
    change(&mut config);
    let sink = serial.clone();
    let hooks = Hooks {
        serial: Box::new(move |bytes| sink.add(bytes)),
        ..Hooks::default()
    };
    (Machine::start(config, hooks).unwrap(), serial)
}

/// Boots a program and compares what it prints with what every correct CPU prints.
#[track_caller]
fn check(name: &str, engine: &str, level: Level) {
    // Some programs set timers and do things before they expire, for which they want a host CPU to
    // themselves.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let host = Host::probe();
    if !host.lacks(level).is_empty() {
        eprintln!("skipped: this host's processor has no AVX2 and what else belongs to x86-64-v3");
        return;
    }
    let report = engines(&host)
        .into_iter()
        .find(|report| report.kind.name() == engine)
        .expect("the engine has a name");
    if let Err(reason) = report.usable {
        skipped(&format!("{name} on {engine}: {reason}"));
        return;
    }
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let length = length_of(name, engine, level);
    let boot = |engine: &str| {
        start(name, |config| {
            config.engine = engine.parse().unwrap();
            config.level = level;
            config.command_line = length.to_owned();
        })
    };
    let watch = Watch::start();
    let (machine, serial) = boot(engine);
    let outcome = end(&machine, &serial);
    let most = watch.most_kib();
    // Lockstep is both of the others, and what it compares.
    let limit = if engine == "lockstep" { 2 } else { 1 } * MOST_BEYOND_RAM;
    println!("{name} on {engine}: at most {most} KiB beyond the guest's memory");
    assert!(
        most <= limit,
        "{name} on {engine}: {most} KiB beyond the guest's memory, and {limit} are promised"
    );
    let program = trapgate_guests::named(name).unwrap();
    let expected = match level {
        // With fewer rounds the loops compute something else.
        _ if length.starts_with("share=") => {
            let (machine, serial) = boot("interp");
            end(&machine, &serial);
            let text = serial.text();
            let results = text
                .lines()
                .filter(|line| line.starts_with("result ") || line.ends_with(": done"));
            results.map(|line| format!("{line}\n")).collect()
        }
        Level::V3 => program.expected_v3.or(program.expected).unwrap().to_owned(),
        Level::V2 => program.expected.unwrap().to_owned(),
    };
    assert!(expected.ends_with(": done\n"), "{expected}");
    if let Err(mismatch) = trapgate_guests::compare(&expected, &serial.text()) {
        panic!("{name} on {engine}: {mismatch}\n{}", serial.text());
    }
    assert!(matches!(outcome, Outcome::PoweredOff), "{outcome:?}");
}

/// What the command line says of how long a program is to be.
fn length_of(name: &str, engine: &str, level: Level) -> &'static str {
    match (name, engine, level) {
        ("flood", "lockstep", _) => "short",
        ("flood", _, _) if std::env::var_os("TRAPGATE_LONG").is_some() => "long",
        // It is at length at the other level.
        ("flood", "jit", Level::V2) => "short",
        // Two million rounds of a loop say no more of it than a few.
        ("bench", "lockstep", _) => "share=100",
        _ => "",
    }
}

macro_rules! programs {
    ($($name:ident)*) => {
        /// Programs with a known output, each of which is a test here.
        const CHECKED: &[&str] = &[$(stringify!($name)),*];

        mod interp {
            $(#[test]
            fn $name() {
                super::check(stringify!($name), "interp", super::Level::V2);
            })*
        }

        mod jit {
            $(#[test]
            fn $name() {
                super::check(stringify!($name), "jit", super::Level::V2);
            })*
        }

        /// The level that the command line gives, where the host has it.
        mod jit_v3 {
            $(#[test]
            fn $name() {
                super::check(stringify!($name), "jit", super::Level::V3);
            })*
        }

        /// Each instruction that the host has is compared.
        mod lockstep {
            $(#[test]
            fn $name() {
                super::check(stringify!($name), "lockstep", super::Host::probe().level());
            })*
        }
    };
}

programs!(
    bench chain controllers coprocessor debugging delivery exceptions flood hostile identity interrupts legacy modes paging
    processors segmentation selfmod sensitive storm strings timers transfers
);

/// An engine that is not in this list would not be held to anything.
#[test]
fn every_engine_is_tested_with_the_programs() {
    let names: Vec<&str> = engines(&Host::probe())
        .iter()
        .map(|report| report.kind.name())
        .collect();
    assert!(
        names
            .iter()
            .all(|name| ["interp", "jit", "kvm", "lockstep"].contains(name)),
        "{names:?}"
    );
    assert!(names.len() == 4);
}

#[test]
fn every_program_with_a_known_output_is_checked() {
    let known: Vec<&str> = trapgate_guests::all()
        .iter()
        .filter(|program| program.expected.is_some())
        .map(|program| program.name)
        .collect();
    assert_eq!(known, CHECKED);
}

#[test]
fn builtin_guest_answers_a_person_and_powers_off() {
    let (machine, serial) = start("hello", |config| {
        config.command_line = "said by the test".to_owned();
    });
    assert_eq!(machine.protocol(), Some(Protocol::Pvh));
    serial.wait_for("> ");
    assert!(machine.serial().input_all(b"6 * (3 + 4)\r"));

    let outcome = end(&machine, &serial);

    assert!(matches!(outcome, Outcome::PoweredOff), "{outcome:?}");
    let text = serial.text();
    for said in [
        "hello from trapgate",
        "memory: 255 MiB",
        "command line: said by the test",
        "42",
        "goodbye",
    ] {
        assert!(text.contains(said), "no `{said}` in:\n{text}");
    }
}

/// A processor that takes one interrupt after the other, and comes to nothing else, is still stopped.
#[test]
fn machine_in_a_storm_of_interrupts_can_be_paused_and_stopped() {
    for engine in ["interp", "jit"] {
        let (machine, serial) = start("storm", |config| {
            config.engine = engine.parse().unwrap();
            config.command_line = "forever".to_owned();
        });
        serial.wait_for("on and on");
        let before = machine.pause().counters().instructions();
        while machine.pause().counters().instructions() <= before + 1000 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        machine.stop();
        assert!(
            matches!(end(&machine, &serial), Outcome::Stopped),
            "{engine}"
        );
    }
}

/// A guest that waits for input costs next to no host CPU time: its processor halts and stays so.
#[test]
fn guest_that_waits_is_halted() {
    let (machine, serial) = start("hello", |_| {});
    serial.wait_for("> ");
    while !machine
        .pause()
        .processors()
        .iter()
        .all(|state| state.system.activity == trapgate_x86::Activity::Halted)
    {
        std::thread::yield_now();
    }
    let before = machine.counters().instructions();
    assert!(machine.pause().counters().instructions() <= before + 1);
    machine.stop();
    assert!(matches!(end(&machine, &serial), Outcome::Stopped));
}
