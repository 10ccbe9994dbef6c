//! Snapshots of machines whose guests are scripts.

use std::sync::mpsc;
use std::time::Duration;

use trapgate_engine::{Exit, Signal};

use super::*;
use crate::testing::{Guest, Script, machine, restored};
use crate::{Hooks, Host, Level, MachineError, Outcome};

const LONG: Duration = Duration::from_secs(60);

fn script(script: impl FnMut(&mut Guest) -> Exit + Send + 'static) -> Script {
    Box::new(script)
}

#[test]
fn a_machine_that_resets_all_the_time_is_saved_between_two_resets() {
    // Given a guest that resets the machine as soon as it has begun
    let directory = tempfile::tempdir().unwrap();
    let resets = script(|guest| {
        guest.out(0xcf9, 0x06);
        Exit::Kicked
    });
    let machine = machine(vec![resets], Hooks::default(), |_| {});
    // When it is saved again and again
    for number in 0..30 {
        let path = directory.path().join(number.to_string());
        machine.snapshot(&path).unwrap();
        // Then what was saved is whole, and what it asked for is not lost
        let again = script(|guest| guest.exit(1));
        let restored = restored(&Snapshot::open(&path).unwrap(), vec![again]);
        let outcome = restored.wait_for(LONG);
        assert!(matches!(outcome, Some(Outcome::Exited(3))), "{outcome:?}");
    }
    assert!(machine.counters().resets > 0);
}

/// Given a snapshot of a machine with x86-64-v3, when it is to go on where the processor is less, then it is refused on
/// every engine, with what that lacks.
#[test]
fn a_machine_of_a_higher_level_does_not_go_on_on_a_lesser_processor() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("saved");
    let idle = script(|_| Exit::Halted);
    let machine = machine(vec![idle], Hooks::default(), |config| {
        config.level = Level::V3;
    });
    machine.snapshot(&path).unwrap();
    let mut snapshot = Snapshot::open(&path).unwrap();
    assert_eq!(snapshot.header().profile.level, Level::V3);
    let mut host = Host::probe();
    for (feature, is_there) in &mut host.features {
        *is_there = *feature != "avx2";
    }
    for engine in ["auto", "interp", "jit"] {
        snapshot.set_engine(engine.parse().unwrap());
        let error = snapshot.choose_engine(&host).unwrap_err();
        assert!(
            matches!(&error, MachineError::Level { level: Level::V3, lacks } if lacks == &["avx2"]),
            "{engine}: {error}"
        );
        assert!(error.fix().unwrap().contains("needs a host with it"));
    }
}

#[test]
fn signals_that_a_processor_has_not_noticed_are_saved_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("saved");
    let (began, begun) = mpsc::channel();
    let waits = script(move |guest| {
        // Virtual wire mode lets every NMI in; this one is its own.
        guest.apic(0x310, 0);
        guest.apic(0x300, 0x400);
        // And an interrupt with vector 0x55, to itself.
        guest.apic(0xf0, 0x1ff);
        guest.apic(0x300, 0x4_4055);
        assert!(guest.signals.is_raised(Signal::Nmi));
        began.send(()).unwrap();
        guest.spin()
    });
    let machine = machine(vec![waits], Hooks::default(), |_| {});
    begun.recv().unwrap();
    machine.snapshot(&path).unwrap();
    let (tell, told) = mpsc::channel();
    let looks = script(move |guest| {
        let interrupt = guest.signals.is_raised(Signal::Interrupt);
        let vector = guest.world.take_interrupt();
        tell.send((guest.state.system.nmi_pending, interrupt, vector))
            .unwrap();
        guest.exit(0)
    });
    let restored = restored(&Snapshot::open(&path).unwrap(), vec![looks]);
    restored.wait_for(LONG).expect("it ends");
    assert_eq!(told.recv().unwrap(), (true, true, Some(0x55)));
}
