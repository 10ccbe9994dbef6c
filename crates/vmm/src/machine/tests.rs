//! Machines whose guests are scripts: what reaches a processor, and what a guest's accesses do.

use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex};

use trapgate_engine::{Exit, Signal};
use trapgate_x86::Activity;
use trapgate_x86::registers::sreg;

use super::*;
use crate::testing::{Guest, Script, machine};
use crate::{Failure, OnReset, OnTripleFault, ResetCause};

/// Long enough that a machine that has not ended then never will.
const LONG: Duration = Duration::from_secs(60);

fn script(script: impl FnMut(&mut Guest) -> Exit + Send + 'static) -> Script {
    Box::new(script)
}

fn one(body: impl FnMut(&mut Guest) -> Exit + Send + 'static) -> Machine {
    machine(vec![script(body)], Hooks::default(), |_| {})
}

fn outcome(machine: &Machine) -> &Outcome {
    machine.wait_for(LONG).expect("the machine never ends")
}

#[test]
fn power_off_by_acpi_ends_the_machine() {
    let machine = one(Guest::power_off);
    assert!(matches!(outcome(&machine), Outcome::PoweredOff));
    // And it is told again.
    assert!(matches!(machine.wait(), Outcome::PoweredOff));
}

#[test]
fn debug_exit_port_gives_the_status() {
    let machine = one(|guest| guest.exit(0x10));
    assert!(matches!(outcome(&machine), Outcome::Exited(0x21)));
}

#[test]
fn stop_ends_a_guest_that_never_rests() {
    let machine = one(Guest::spin);
    machine.handle().stop();
    assert!(matches!(outcome(&machine), Outcome::Stopped));
}

#[test]
fn triple_fault_is_reported_with_the_processor_s_state() {
    let machine = one(|guest| {
        guest.state.rip = 0x1234;
        guest.state.system.cr3 = 0x5000;
        Exit::ShutDown
    });
    let Outcome::TripleFault(fault) = outcome(&machine) else {
        panic!("{:?}", machine.wait());
    };
    assert_eq!((fault.cpu, fault.state.rip), (0, 0x1234));
    let text = fault.to_string();
    assert!(text.contains("RIP 0x1234, CR3 0x5000"), "{text}");
    assert!(!fault.hint().is_empty());
}

#[test]
fn thread_of_a_processor_that_dies_ends_the_machine() {
    let machine = one(|_| panic!("a defect, on purpose"));
    let Outcome::Failed(Failure::Thread { thread, message }) = outcome(&machine) else {
        panic!("{:?}", machine.wait());
    };
    assert_eq!(
        (&thread[..], &message[..]),
        ("processor 0", "a defect, on purpose")
    );
}

#[test]
fn engine_that_its_host_fails_ends_the_machine_and_says_why() {
    let lost = trapgate_engine::Failure {
        what: "an instruction is not known",
        code: 1,
        rip: 0x1234,
    };
    let machine = one(move |_| Exit::Failed(lost));
    let Outcome::Failed(failure @ Failure::Engine { cpu: 0, .. }) = outcome(&machine) else {
        panic!("{:?}", machine.wait());
    };
    assert_eq!(
        failure.to_string(),
        "processor 0 could not go on: an instruction is not known at RIP 0x1234 (code 0x1)"
    );
}

#[test]
fn reset_may_end_the_machine() {
    let body = script(|guest: &mut Guest| {
        guest.out(0xcf9, 6);
        Exit::Halted
    });
    let machine = machine(vec![body], Hooks::default(), |config| {
        config.on_reset = OnReset::End;
    });
    assert!(matches!(
        outcome(&machine),
        Outcome::Reset(ResetCause::Chipset(
            trapgate_chipset::ResetCause::ResetControl
        ))
    ));
}

/// Given a guest that changed its memory, its devices and its registers, when it triple-faults and
/// that is to be a reset, then it starts again as it did the first time.
#[test]
fn reset_gives_the_guest_a_machine_as_new() {
    const FREE: u64 = 0x80_0000;
    const KERNEL: u64 = 0x10_0000;
    let (tell, told) = mpsc::channel();
    let body = script(move |guest: &mut Guest| {
        let mut free = [9; 4];
        let mut kernel = [0; 64];
        guest.memory.read(FREE, &mut free).unwrap();
        guest.memory.read(KERNEL, &mut kernel).unwrap();
        let scratch = guest.world.read_port(0x3ff, 1);
        let entry = (guest.state.rip, guest.state.system.cr0);
        tell.send((free, kernel, scratch, entry, guest.world.clock()))
            .unwrap();
        if guest.runs == 2 {
            return guest.power_off();
        }
        guest.memory.write(FREE, &[1, 2, 3, 4]).unwrap();
        guest.memory.write(KERNEL, &[0xcc; 64]).unwrap();
        guest.out(0x3ff, 0x5a);
        guest.state.rip = 0xdead;
        std::thread::sleep(Duration::from_millis(20));
        Exit::ShutDown
    });
    let machine = machine(vec![body], Hooks::default(), |config| {
        config.on_triple_fault = OnTripleFault::Reset;
    });

    assert!(matches!(outcome(&machine), Outcome::PoweredOff));
    let (first, second) = (told.recv().unwrap(), told.recv().unwrap());
    assert_eq!(
        (first.0, first.1, first.2, first.3),
        (second.0, second.1, second.2, second.3)
    );
    assert_eq!(second.0, [0; 4]);
    assert_ne!(second.1, [0xcc; 64]);
    assert_eq!(machine.counters().resets, 1);
}

#[test]
fn nobody_s_ports_and_addresses_read_ones() {
    let (tell, told) = mpsc::channel();
    let machine = one(move |guest| {
        let ports = [1, 2, 4].map(|size| guest.world.read_port(0x1234, size));
        let mut memory = [0; 8];
        guest.world.read_memory(0xfed4_0000, &mut memory);
        let mut beyond = [0; 4];
        guest.world.read_memory(1 << 39, &mut beyond);
        guest.world.write_memory(1 << 39, &[1]);
        guest.world.write_port(0x1234, 4, 1);
        tell.send((ports, memory, beyond)).unwrap();
        guest.power_off()
    });
    outcome(&machine);
    let (ports, memory, beyond) = told.recv().unwrap();
    assert_eq!(ports, [0xff, 0xffff, u32::MAX]);
    assert_eq!((memory, beyond), ([0xff; 8], [0xff; 4]));
}

#[test]
fn pci_is_reached_by_ports_and_by_memory() {
    let (tell, told) = mpsc::channel();
    let machine = one(move |guest| {
        let by_port = [0, 1].map(|slot| {
            guest.world.write_port(0xcf8, 4, 1 << 31 | slot << 11);
            // A byte access to the data port goes to the bus as well.
            (
                guest.world.read_port(0xcfc, 4),
                guest.world.read_port(0xcfd, 1),
            )
        });
        let mut by_memory = [0; 4];
        let ecam = trapgate_pci::ECAM_BASE + (1 << 15);
        guest.world.read_memory(ecam, &mut by_memory);
        tell.send((by_port, u32::from_le_bytes(by_memory))).unwrap();
        guest.power_off()
    });
    outcome(&machine);
    let ([bridge, device], by_memory) = told.recv().unwrap();
    assert_eq!(bridge, (0x0008_1b36, 0x1b));
    // The entropy device: virtio type 4.
    assert_eq!(device, (0x1044_1af4, 0x1a));
    assert_eq!(by_memory, device.0);
}

/// Programs the 8259A pair as a PC's firmware does, with interrupt 0 unmasked at vector 0x20.
fn unmask_the_timer(guest: &mut Guest) {
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 0x04),
        (0x21, 0x01),
        (0x21, 0xfe),
        (0xa1, 0xff),
    ] {
        guest.out(port, value);
    }
}

/// Given a guest that programs the timer for a thousand interrupts a second and halts, then each of
/// them wakes it.
#[test]
fn timer_interrupts_wake_a_halted_processor() {
    let mut vectors = Vec::new();
    let (tell, told) = mpsc::channel();
    let machine = one(move |guest| {
        if guest.runs == 1 {
            unmask_the_timer(guest);
            guest.out(0x43, 0x34);
            guest.out(0x40, 0xa9);
            guest.out(0x40, 0x04);
        }
        if guest.signals.take(Signal::Interrupt)
            && let Some(vector) = guest.world.take_interrupt()
        {
            vectors.push(vector);
            guest.out(0x20, 0x20);
        }
        if vectors.len() < 5 {
            return Exit::Halted;
        }
        tell.send((vectors.clone(), guest.world.clock())).unwrap();
        guest.power_off()
    });
    assert!(matches!(outcome(&machine), Outcome::PoweredOff));
    let (vectors, clock) = told.recv().unwrap();
    assert_eq!(vectors, [0x20; 5]);
    // Not before their time.
    assert!(clock >= 5_000_000, "{clock}");
    assert!(machine.counters().processors[0].halts >= 5);
}

/// A 1 ms timer wakes a halted processor each time, and never before its deadline.
#[test]
fn timer_interrupts_of_a_halted_processor_all_arrive_and_none_early() {
    const MILLISECOND: u64 = 1_000_000;
    let mut early = Vec::new();
    let mut deadline = 0;
    let (tell, told) = mpsc::channel();
    let machine = one(move |guest| {
        if guest.runs == 1 {
            guest.apic(0xf0, 0x1ff);
            // TSC-deadline mode, vector 0x40.
            guest.apic(0x320, 2 << 17 | 0x40);
        }
        let now = guest.world.clock();
        if guest.signals.take(Signal::Interrupt) && guest.world.take_interrupt().is_some() {
            early.push(now < deadline);
            guest.apic(0xb0, 0);
        } else if guest.runs > 1 {
            return Exit::Halted;
        }
        if early.len() == 100 {
            tell.send(std::mem::take(&mut early)).unwrap();
            return guest.power_off();
        }
        deadline = now + MILLISECOND;
        guest.world.write_apic_msr(0x6e0, deadline).unwrap();
        Exit::Halted
    });
    outcome(&machine);
    assert_eq!(told.recv().unwrap(), [false; 100]);
}

/// What the second processor sees in the next test.
fn started(tell: Sender<(u64, u64, Activity)>) -> Script {
    script(move |guest: &mut Guest| {
        if guest.runs == 1 {
            let system = &guest.state.system;
            tell.send((
                guest.state.rip,
                system.segments[sreg::CS].base,
                system.activity,
            ))
            .unwrap();
            // Software-enable the APIC, and wait for an interrupt.
            guest.apic(0xf0, 0x1ff);
            return Exit::Halted;
        }
        match guest.world.take_interrupt() {
            Some(vector) => guest.exit(vector.into()),
            None => Exit::Halted,
        }
    })
}

/// Given a second processor that waits, when the first sends INIT, a start-up IPI and then interrupts
/// until one is taken, then the second starts where it was told and takes it.
#[test]
fn application_processor_is_started_and_interrupted_by_ipis() {
    let (tell, told) = mpsc::channel();
    let mut sent = false;
    let boot = script(move |guest: &mut Guest| {
        if !sent {
            sent = true;
            guest.apic(0xf0, 0x1ff);
            guest.apic(0x310, 1 << 24);
            guest.apic(0x300, 0x4500);
            guest.apic(0x300, 0x469a);
            // A second start-up IPI, as every kernel sends it, changes nothing.
            guest.apic(0x300, 0x469b);
        }
        guest.apic(0x300, 0x4055);
        guest.spin()
    });
    let machine = machine(vec![boot, started(tell)], Hooks::default(), |_| {});
    let Outcome::Exited(status) = outcome(&machine) else {
        panic!("{:?}", machine.wait());
    };
    assert_eq!(*status, 0x55 << 1 | 1);
    assert_eq!(told.recv().unwrap(), (0, 0x9_a000, Activity::Running));
}

#[test]
fn init_to_the_boot_processor_resets_the_machine() {
    let body = script(|guest: &mut Guest| {
        guest.apic(0xf0, 0x1ff);
        guest.apic(0x300, 0x4500);
        Exit::Halted
    });
    let machine = machine(vec![body], Hooks::default(), |config| {
        config.on_reset = OnReset::End;
    });
    assert!(matches!(
        outcome(&machine),
        Outcome::Reset(ResetCause::Init)
    ));
}

/// Given processors that never rest and take turns, then all of them get on.
#[test]
fn processors_that_never_rest_share_the_engine() {
    let rounds = Arc::new(Mutex::new([0_u32; 2]));
    let of = |cpu: usize| {
        let rounds = Arc::clone(&rounds);
        script(move |guest: &mut Guest| {
            guest.state.system.activity = Activity::Running;
            let done = {
                let mut rounds = rounds.lock().unwrap();
                rounds[cpu] += 1;
                rounds.iter().all(|&rounds| rounds >= 5)
            };
            if done {
                guest.power_off()
            } else {
                guest.spin()
            }
        })
    };
    let mut boot = of(0);
    let mut sent = false;
    let boot = script(move |guest: &mut Guest| {
        if !sent {
            sent = true;
            guest.apic(0xf0, 0x1ff);
            guest.apic(0x310, 1 << 24);
            guest.apic(0x300, 0x4500);
            guest.apic(0x300, 0x4600);
        }
        boot(guest)
    });
    let machine = machine(vec![boot, of(1)], Hooks::default(), |_| {});
    assert!(matches!(outcome(&machine), Outcome::PoweredOff));
}

#[test]
fn pause_stands_clock_and_processors_still() {
    let runs = Arc::new(Mutex::new(0_u64));
    let counted = Arc::clone(&runs);
    let machine = one(move |guest| {
        guest.state.gpr[3] = 77;
        *counted.lock().unwrap() += 1;
        Exit::Kicked
    });
    {
        let pause = machine.pause();
        let inner = machine.pause();
        let before = (pause.counters(), *runs.lock().unwrap());
        drop(inner);
        std::thread::sleep(Duration::from_millis(10));
        let after = (pause.counters(), *runs.lock().unwrap());
        assert_eq!(before, after);
        assert_eq!(pause.processors().len(), 1);
    }
    let (clock, ran) = (machine.counters().clock, *runs.lock().unwrap());
    while *runs.lock().unwrap() < ran + 2 || machine.counters().clock == clock {
        std::thread::yield_now();
    }
    assert_eq!(machine.pause().processors()[0].gpr[3], 77);
}

#[test]
fn pause_of_a_machine_that_has_ended_finds_no_processor() {
    let machine = one(Guest::power_off);
    outcome(&machine);
    assert!(machine.pause().processors().is_empty());
    assert!(matches!(machine.wait(), Outcome::PoweredOff));
}

#[test]
fn serial_output_is_complete_when_the_machine_has_ended() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let hooks = Hooks {
        serial: Box::new(move |bytes| sink.lock().unwrap().extend_from_slice(bytes)),
        ..Hooks::default()
    };
    let body = script(|guest: &mut Guest| {
        for byte in 0..=255 {
            guest.out(0x3f8, byte);
        }
        guest.power_off()
    });
    let machine = machine(vec![body], hooks, |_| {});
    outcome(&machine);
    let all: Vec<u8> = (0..=255).collect();
    assert_eq!(*seen.lock().unwrap(), all);
}

#[test]
fn serial_input_larger_than_the_receiver_arrives_whole() {
    let (tell, told) = mpsc::channel();
    let mut got = Vec::new();
    let machine = one(move |guest| {
        // Data ready, as long as it is.
        while guest.world.read_port(0x3fd, 1) & 1 != 0 {
            got.push(guest.world.read_port(0x3f8, 1) as u8);
        }
        if got.len() < 1000 {
            return Exit::Kicked;
        }
        tell.send(got.clone()).unwrap();
        guest.power_off()
    });
    let input: Vec<u8> = (0..1000_u32).map(|index| (index % 251) as u8).collect();
    let serial = machine.serial();
    assert!(serial.input_all(&input));
    outcome(&machine);
    assert_eq!(told.recv().unwrap(), input);
    assert_eq!(serial.input(b"x"), 0);
    assert!(!serial.input_all(b"x"));
}

#[test]
fn power_button_shows_in_the_event_register() {
    let machine = one(|guest| {
        // PM1 status, PWRBTN_STS (ACPI 6.5, 4.8.3.1.1).
        if guest.world.read_port(0x600, 2) & 1 << 8 != 0 {
            guest.power_off()
        } else {
            Exit::Kicked
        }
    });
    machine.power_button();
    assert!(matches!(outcome(&machine), Outcome::PoweredOff));
}

#[test]
fn mistakes_are_refused_before_anything_runs() {
    let start = |change: fn(&mut MachineConfig)| {
        let mut config = MachineConfig::default();
        change(&mut config);
        Machine::start(config, Hooks::default()).err().unwrap()
    };
    assert!(matches!(start(|_| {}), MachineError::Boot(_)));
    assert!(matches!(
        start(|config| config.cpus = 0),
        MachineError::Cpus { .. }
    ));
    let missing = start(|config| {
        config.disks.push(crate::DiskConfig {
            path: "/no/such/disk".into(),
            read_only: true,
        });
    });
    assert!(matches!(missing, MachineError::Disk(_)));
    assert!(missing.fix().is_some());
}
