//! What clients ask of machines that run, stand still, restart and end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use trapgate_engine::probe::EngineKind;
use trapgate_engine::{Exit, Signal};

use super::*;
use crate::testing::{Guest, Script, machine};
use crate::{Hooks, Outcome};

/// Far more than anything here takes.
const LONG: Duration = Duration::from_secs(60);

fn remote() -> RemoteControl {
    let identity = Identity {
        name: "test".to_owned(),
        guest: "a script".to_owned(),
        engine: Choice {
            kind: EngineKind::Interp,
            reason: "a test".to_owned(),
        },
        cpus: 1,
        memory_bytes: 16 << 20,
    };
    RemoteControl::new(identity, None)
}

fn connected(remote: &RemoteControl, script: Script) -> Arc<Machine> {
    let machine = Arc::new(machine(vec![script], Hooks::default(), |_| {}));
    remote.connect(&machine);
    machine
}

fn computes() -> Script {
    Box::new(Guest::spin)
}

/// Sleeps until it is called, as a guest that is idle.
fn idles() -> Script {
    Box::new(|_| Exit::Halted)
}

fn answer(state: State, changed: bool) -> StateAnswer {
    StateAnswer { state, changed }
}

#[test]
fn pausing_twice_and_resuming_twice_change_something_once() {
    for script in [computes(), idles()] {
        let remote = remote();
        let machine = connected(&remote, script);
        assert_eq!(remote.resume().unwrap(), answer(State::Running, false));
        assert_eq!(remote.pause().unwrap(), answer(State::Paused, true));
        assert_eq!(remote.pause().unwrap(), answer(State::Paused, false));
        assert_eq!(remote.info().state, State::Paused);
        let stands = machine.counters();
        assert_eq!(remote.counters().unwrap().clock_ns, stands.clock);

        assert_eq!(remote.resume().unwrap(), answer(State::Running, true));
        assert_eq!(remote.info().state, State::Running);
        while machine.counters().clock == stands.clock {
            thread::yield_now();
        }
    }
}

#[test]
fn pause_by_a_client_and_one_of_the_owner_do_not_undo_each_other() {
    let remote = remote();
    let machine = connected(&remote, computes());
    let owners = machine.pause();
    remote.pause().unwrap();
    remote.resume().unwrap();
    let stands = owners.counters().clock;
    assert_eq!(machine.counters().clock, stands);
    remote.pause().unwrap();
    drop(owners);
    assert_eq!(machine.counters().clock, stands);
}

#[test]
fn paused_machine_can_be_stopped() {
    let remote = remote();
    let machine = connected(&remote, computes());
    remote.pause().unwrap();
    remote.stop();
    let outcome = machine.wait_for(LONG);
    assert!(matches!(outcome, Some(Outcome::Stopped)), "{outcome:?}");
}

#[test]
fn power_button_reaches_a_guest_that_stood_still_when_it_was_pressed() {
    // Given a guest that powers off when the power button's event comes (ACPI PM1 status, bit 8)
    let remote = remote();
    let machine = connected(
        &remote,
        Box::new(|guest| {
            let pressed = guest.world.read_port(0x600, 2) & 1 << 8 != 0;
            if pressed {
                guest.power_off()
            } else if guest.signals.take(Signal::Kick) {
                Exit::Kicked
            } else {
                thread::yield_now();
                Exit::Debug
            }
        }),
    );
    remote.pause().unwrap();
    remote.press_power_button().unwrap();
    assert!(machine.wait_for(Duration::from_millis(20)).is_none());

    remote.resume().unwrap();

    let outcome = machine.wait_for(LONG);
    assert!(matches!(outcome, Some(Outcome::PoweredOff)), "{outcome:?}");
}

#[test]
fn machine_that_comes_after_one_that_was_paused_is_paused_and_after_a_stop_stops() {
    let remote = remote();
    let first = connected(&remote, computes());
    remote.pause().unwrap();
    remote.disconnect();
    first.stop();

    let second = connected(&remote, computes());
    let stands = second.counters().clock;
    assert_eq!(remote.pause().unwrap(), answer(State::Paused, false));
    thread::sleep(Duration::from_millis(5));
    assert_eq!(second.counters().clock, stands);
    let counters = remote.counters().unwrap();
    assert_eq!(counters.get("resets").unwrap().value, 1);

    remote.disconnect();
    remote.stop();
    let third = connected(&remote, computes());
    assert!(third.wait_for(LONG).is_some());
}

#[test]
fn nothing_of_a_machine_is_held_after_it_is_disconnected() {
    let remote = remote();
    let machine = connected(&remote, computes());
    assert_eq!(Arc::strong_count(&machine), 2);
    remote.pause().unwrap();
    remote.counters().unwrap();
    remote.disconnect();
    assert_eq!(Arc::strong_count(&machine), 1);
    // Between two machines there is nothing to count.
    assert_eq!(remote.counters().unwrap_err().kind, ProblemKind::Busy);
}

#[test]
fn guest_that_ends_during_requests_ends_them_too() {
    for _ in 0..20 {
        // Given a guest that powers off in the midst of pauses, and four clients
        let remote = Arc::new(remote());
        let end = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&end);
        let machine = connected(
            &remote,
            Box::new(move |guest| {
                if told.load(Ordering::Relaxed) {
                    guest.power_off()
                } else if guest.signals.take(Signal::Kick) {
                    Exit::Kicked
                } else {
                    Exit::Debug
                }
            }),
        );
        let asked = Arc::new(AtomicU64::new(0));
        let clients: Vec<_> = (0..4)
            .map(|_| {
                let (remote, asked) = (Arc::clone(&remote), Arc::clone(&asked));
                thread::spawn(move || {
                    loop {
                        asked.fetch_add(1, Ordering::Relaxed);
                        let all = [
                            remote.pause().err(),
                            remote.counters().err(),
                            remote.resume().err(),
                        ];
                        if all.iter().flatten().count() == 3 {
                            return all.into_iter().flatten().map(|problem| problem.kind);
                        }
                    }
                })
            })
            .collect();
        while asked.load(Ordering::Relaxed) < 8 {
            thread::yield_now();
        }

        end.store(true, Ordering::Relaxed);
        // As its owner does.
        assert!(machine.wait_for(LONG).is_some());
        remote.end();

        for client in clients {
            assert!(
                client
                    .join()
                    .unwrap()
                    .all(|kind| kind == ProblemKind::Ended)
            );
        }
        assert_eq!(remote.info().state, State::Ended);
        assert_eq!(
            remote.press_power_button().unwrap_err().kind,
            ProblemKind::Ended
        );
    }
}

#[test]
fn counters_of_a_guest_that_never_leaves_are_fresh() {
    // Given a guest that computes until it is kicked: what the engine counts is how often it was let run
    let remote = remote();
    let _machine = connected(&remote, computes());
    let runs = || {
        let counters = remote.counters().unwrap();
        let counter = counters.get("instructions").unwrap();
        assert_eq!(counter.cpus, [counter.value]);
        counter.value
    };
    let before = runs();
    while runs() < before + 3 {
        thread::sleep(FRESH);
    }
}

#[test]
fn counters_of_a_machine_that_stands_still_call_nobody() {
    let remote = remote();
    let machine = connected(&remote, computes());
    remote.pause().unwrap();
    let kicks = machine.counters().processors[0].kicks;
    for _ in 0..3 {
        remote.counters().unwrap();
        thread::sleep(FRESH);
    }
    assert_eq!(machine.counters().processors[0].kicks, kicks);
}

#[test]
fn what_an_engine_counts_becomes_one_counter_with_a_value_for_each_processor() {
    let own = |value| {
        let misses =
            trapgate_engine::Counter::new("misses", Measure::Events, "Times that it missed");
        let code = trapgate_engine::Counter::new("code", Measure::Bytes, "Bytes of code");
        misses.set(value);
        code.set(10 * value);
        vec![misses, code]
    };
    let counters = engine_counters(&[own(1), own(2)]);
    let [misses, code] = &counters[..] else {
        panic!("{counters:?}");
    };
    assert_eq!((misses.value, &misses.cpus[..]), (3, &[1, 2][..]));
    assert_eq!((misses.unit, misses.kind), (Unit::Count, Kind::Total));
    assert_eq!(
        (code.value, code.unit, code.kind),
        (30, Unit::Bytes, Kind::Level)
    );
}

#[test]
fn every_counter_is_explained_and_has_a_name_of_its_own() {
    let remote = remote();
    let _machine = connected(&remote, idles());
    let counters = remote.counters().unwrap().counters;
    for counter in &counters {
        assert!(!counter.help.is_empty() && !counter.help.ends_with('.'));
        let same = counters.iter().filter(|other| other.name == counter.name);
        assert_eq!(same.count(), 1, "{}", counter.name);
    }
}

#[test]
fn costs_of_processors_are_summed_and_ranked() {
    let cost = |detail: &str, count, nanoseconds| trapgate_engine::Cost {
        kind: "call_out",
        detail: detail.to_owned(),
        count,
        nanoseconds,
        estimated: false,
    };
    let timed = costs(vec![
        vec![cost("rdtsc", 9, Some(1)), cost("hlt", 1, Some(5))],
        vec![cost("hlt", 2, Some(7))],
    ]);
    let lines: Vec<_> = timed
        .iter()
        .map(|cost| (&*cost.detail, cost.count, cost.nanoseconds))
        .collect();
    assert_eq!(lines, [("hlt", 3, Some(12)), ("rdtsc", 9, Some(1))]);

    let untimed = costs(vec![vec![cost("hlt", 1, None), cost("rdtsc", 9, None)]]);
    assert_eq!(untimed[0].detail, "rdtsc");
    assert_eq!(untimed[0].nanoseconds, None);
}
