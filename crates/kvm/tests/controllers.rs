//! The kernel's interrupt controllers on the KVM of this host, where it has them.
#![allow(missing_docs, unreachable_pub, dead_code)]

mod bench;

use std::thread;
use std::time::Duration;

use bench::{Bench, CODE, DEVICE, bench_of, bench_with, skipped};
use trapgate_chipset::lapic::VectorSet;
use trapgate_chipset::{Chipset, ChipsetConfig, ControllersState};
use trapgate_engine::probe::Host;
use trapgate_engine::{Exit, Signal, Vcpu, World};
use trapgate_kvm::{Facts, InKernel};
use trapgate_x86::registers::{cr0, rflags, sreg};
use trapgate_x86::{Activity, CpuState};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const HLT: u8 = 0xf4;

/// A processor with the kernel's controllers; `None`, with a word about it, where there are none.
fn kernels(code: &[u8]) -> Option<Bench> {
    kernels_of(code, 1)
}

/// As [`kernels`], in a machine of `count` processors.
fn kernels_of(code: &[u8], count: u32) -> Option<Bench> {
    if Facts::probe().is_ok_and(|facts| !facts.irqchip) {
        skipped("this KVM has no interrupt controllers");
        return None;
    }
    bench_of(code, InKernel::ALL, count)
}

/// What `change` makes of the controllers as firmware leaves them, with the local APIC enabled.
fn state(change: impl FnOnce(&mut ControllersState)) -> ControllersState {
    state_of(1, change)
}

fn state_of(cpus: usize, change: impl FnOnce(&mut ControllersState)) -> ControllersState {
    let config = ChipsetConfig {
        cpus,
        ..ChipsetConfig::default()
    };
    let (mut state, _) = Chipset::new(config).unwrap().lend_controllers(0);
    state.local_apics[0].svr = 0x1ff;
    change(&mut state);
    state
}

/// Runs the processor until it is kicked, after `time`.
fn run_for(bench: &mut Bench, time: Duration) {
    let signals = bench.vcpu.signals();
    let kicker = thread::spawn(move || {
        thread::sleep(time);
        signals.raise(Signal::Kick);
    });
    assert_eq!(bench.vcpu.run(), Exit::Kicked);
    kicker.join().unwrap();
}

/// Runs the processor until something is so; a host that is busy may take its time.
#[track_caller]
fn run_until(bench: &mut Bench, so: impl Fn(&Bench) -> bool) {
    for _ in 0..2000 {
        if so(bench) {
            return;
        }
        run_for(bench, Duration::from_millis(5));
    }
    panic!("it never comes");
}

#[test]
fn controllers_given_to_the_kernel_come_back() {
    // JMP to itself, with interrupts off.
    let Some(mut bench) = kernels(&[0xeb, 0xfe]) else {
        return;
    };
    let given = state(|state| {
        let apic = &mut state.local_apics[0];
        apic.tpr = 0x20;
        apic.ldr = 0x0300_0000;
        apic.isr.insert(0x31);
        apic.irr.insert(0x42);
        apic.irr.insert(0x53);
        apic.tmr.insert(0x53);
        apic.icr = 0x0500_0000_0000_4531;
        apic.lvt[0] = 0x1_0061;
        apic.lvt[5] = 0x32;
        state.io_apic.id = 0x0100_0000;
        state.io_apic.index = 0x12;
        state.io_apic.entries[4] = 0x0100_0000_0000_0044;
        state.io_apic.entries[20] = 0x0100_0000_0001_a050;
        let chip = &mut state.pic.master;
        (chip.imr, chip.vector, chip.lowest, chip.isr) = (0x12, 0x30, 4, 0x40);
        state.pic.slave.read_isr = true;
    });
    bench.machine.give_controllers(&given, 0, 0).unwrap();
    run_for(&mut bench, Duration::from_millis(1));
    let taken = bench.machine.take_controllers().unwrap();
    assert_eq!(taken.io_apic, given.io_apic);
    // The kernel lets the slave's be as the board wires it.
    assert_eq!(taken.pic, given.pic);
    assert_eq!(taken.local_apics, given.local_apics);
}

/// Handlers that count in memory, from 0x5000 on, and end no interrupt.
fn count_interrupts(bench: &Bench, vectors: &[u8]) {
    for (index, vector) in (0u8..).zip(vectors) {
        // INC DWORD [0x5000 + 8 * index]; IRETQ.
        let code = [0xff, 0x04, 0x25, 8 * index, 0x50, 0, 0, 0x48, 0xcf];
        let handler = CODE + 0x100 + 0x20 * u64::from(index);
        bench.memory.write(handler, &code).unwrap();
        bench.gate(*vector, handler);
    }
}

fn counts<const N: usize>(bench: &Bench) -> [u32; N] {
    std::array::from_fn(|index| {
        let mut bytes = [0; 4];
        let gpa = 0x5000 + 8 * index as u64;
        bench.memory.read(gpa, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    })
}

#[test]
fn edge_and_message_reach_the_processor_once() {
    // STI; JMP to itself.
    let Some(mut bench) = kernels(&[0xfb, 0xeb, 0xfe]) else {
        return;
    };
    count_interrupts(&bench, &[0x51, 0x73]);
    let given = state(|state| state.io_apic.entries[5] = 0x51);
    bench.machine.give_controllers(&given, 0, 0).unwrap();
    bench.machine.set_line(5, true).unwrap();
    run_until(&mut bench, |bench| counts(bench) == [1, 0]);
    bench.machine.send_message(0xfee0_0000, 0x73).unwrap();
    run_until(&mut bench, |bench| counts(bench) == [1, 1]);
    // An edge that was sent is not sent again because the machine was paused.
    let taken = bench.machine.take_controllers().unwrap();
    bench.machine.give_controllers(&taken, 1 << 5, 0).unwrap();
    run_for(&mut bench, Duration::from_millis(20));
    assert_eq!(counts(&bench), [1, 1]);
    // The next one is.
    bench.machine.set_line(5, false).unwrap();
    bench.machine.set_line(5, true).unwrap();
    // The first may still be in service, and the second wait.
    run_until(&mut bench, |bench| {
        let taken = bench.machine.take_controllers().unwrap();
        let waits = taken.local_apics[0].irr.contains(0x51);
        counts::<2>(bench)[0] + u32::from(waits) == 2
    });
}

#[test]
fn interrupt_in_service_holds_lower_ones_off() {
    if !Host::probe().kvm.is_hardware() {
        skipped("the local APIC of a paravirtual KVM keeps nothing in service");
        return;
    }
    let Some(mut bench) = kernels(&[0xfb, 0xeb, 0xfe]) else {
        return;
    };
    count_interrupts(&bench, &[0x51, 0x62, 0x73]);
    let given = state(|state| {
        state.io_apic.entries[5] = 0x51;
        state.io_apic.entries[20] = 0x8062;
    });
    bench.machine.give_controllers(&given, 0, 0).unwrap();
    bench.machine.set_line(5, true).unwrap();
    bench.machine.set_line(20, true).unwrap();
    bench.machine.send_message(0xfee0_0000, 0x73).unwrap();
    run_until(&mut bench, |bench| counts(bench) == [0, 0, 1]);
    let taken = bench.machine.take_controllers().unwrap();
    let apic = &taken.local_apics[0];
    assert_eq!(apic.isr.vectors().collect::<Vec<_>>(), [0x73]);
    assert_eq!(apic.irr.vectors().collect::<Vec<_>>(), [0x51, 0x62]);
    // The level waits for its end of interrupt.
    assert_eq!(taken.io_apic.entries[20], 0xc062);
}

/// The kernel's timer goes on while the processor is out of the guest, and keeps its interrupt to
/// itself.
#[test]
fn timer_that_ends_outside_of_the_guest_is_still_to_end_for_the_machine() {
    let Some(mut bench) = kernels(&[0xeb, 0xfe]) else {
        return;
    };
    let expires = loop {
        let now = bench.world.clock();
        let expires = now + 20_000_000;
        let given = state(|state| {
            let apic = &mut state.local_apics[0];
            apic.lvt[0] = 0x61;
            apic.timer.divide = 0xb;
            apic.timer.initial = 30_000_000;
            apic.timer.expires = Some(expires);
        });
        bench.machine.give_controllers(&given, 0, now).unwrap();
        run_for(&mut bench, Duration::from_millis(1));
        // A host that is busy may get it out too late: then it has ended in the guest.
        if bench.world.clock() < expires {
            break expires;
        }
    };
    thread::sleep(Duration::from_millis(40));
    let taken = bench.machine.take_controllers().unwrap();
    let apic = &taken.local_apics[0];
    assert!(!apic.irr.contains(0x61));
    let at = apic.timer.expires.unwrap();
    assert!(
        // Late by what this thread had to wait for.
        (expires..expires + 1_000_000_000).contains(&at),
        "{at} {expires}"
    );
}

#[test]
fn timer_that_ends_in_the_guest_has_interrupted_once() {
    let Some(mut bench) = kernels(&[0xeb, 0xfe]) else {
        return;
    };
    let now = bench.world.clock();
    let given = state(|state| {
        let apic = &mut state.local_apics[0];
        apic.lvt[0] = 0x61;
        apic.timer.divide = 0xb;
        apic.timer.initial = 1_000_000;
        apic.timer.expires = Some(now + 1_000_000);
    });
    bench.machine.give_controllers(&given, 0, now).unwrap();
    // Interrupts are off: it waits.
    run_until(&mut bench, |bench| {
        let taken = bench.machine.take_controllers().unwrap();
        taken.local_apics[0].irr.contains(0x61)
    });
    let taken = bench.machine.take_controllers().unwrap();
    let apic = &taken.local_apics[0];
    assert_eq!(apic.timer.expires, None);
    // Given again it does not end again.
    let mut served = taken.clone();
    served.local_apics[0].irr.remove(0x61);
    bench.machine.give_controllers(&served, 0, now).unwrap();
    run_for(&mut bench, Duration::from_millis(20));
    let taken = bench.machine.take_controllers().unwrap();
    assert!(!taken.local_apics[0].irr.contains(0x61));
    assert_eq!(taken.local_apics[0].timer.initial, 1_000_000);
}

#[test]
fn halted_processor_is_the_kernels_and_a_kick_gets_it_out() {
    // STI; HLT.
    let Some(mut bench) = kernels(&[0xfb, 0xf4]) else {
        return;
    };
    bench
        .machine
        .give_controllers(&state(|_| {}), 0, 0)
        .unwrap();
    run_for(&mut bench, Duration::from_millis(20));
    let halted = bench.vcpu.state();
    assert_eq!(halted.system.activity, Activity::Halted);
    assert_eq!(halted.rip, CODE + 2);
    bench.vcpu.set_state(&halted).unwrap();
    assert_eq!(bench.vcpu.state(), halted);
    assert_eq!(halted.rflags & rflags::IF, rflags::IF);
}

/// INIT and start-up interrupts are the kernel's, and so is a processor that waits for them.
#[test]
fn application_processor_starts_in_the_kernel() {
    let Some(bench) = kernels_of(&[HLT], 2) else {
        return;
    };
    let world = Box::new(bench.world.clone());
    let mut second = bench.machine.vcpu(world, 1).unwrap();
    let mut waiting = CpuState::default();
    waiting.system.activity = Activity::WaitForSipi;
    second.set_state(&waiting).unwrap();
    assert_eq!(second.state().system.activity, Activity::WaitForSipi);
    let given = state_of(2, |state| state.local_apics[1].svr = 0x1ff);
    bench.machine.give_controllers(&given, 0, 0).unwrap();
    // In real mode: INC WORD [0x5000]; CLI; HLT.
    let code = [0xff, 0x06, 0x00, 0x50, 0xfa, HLT];
    bench.memory.write(0x9000, &code).unwrap();

    let signals = second.signals();
    let runner = thread::spawn(move || {
        assert_eq!(second.run(), Exit::Kicked);
        second
    });
    // To the processor with APIC ID 1: INIT, then start-up at 0x9000, as often as it takes.
    let mut rounds = 0;
    while counts(&bench) == [0] {
        for data in [0x500, 0x609] {
            bench.machine.send_message(0xfee0_1000, data).unwrap();
            thread::sleep(Duration::from_millis(5));
        }
        rounds += 1;
        assert!(rounds < 1000, "it never starts");
    }
    signals.raise(Signal::Kick);
    let mut second = runner.join().unwrap();
    let state = second.state();
    assert_eq!(state.system.segments[sreg::CS].base, 0x9000);
    assert_eq!(state.system.efer, 0);
}

/// Given a processor that is not in the guest, when INIT and a start-up IPI reach it, then whoever takes its state sees
/// one that has started: all of it, and not the registers from before.
#[test]
fn processor_that_is_started_between_runs_has_started_in_its_state() {
    let Some(bench) = kernels_of(&[HLT], 2) else {
        return;
    };
    let mut second = bench
        .machine
        .vcpu(Box::new(bench.world.clone()), 1)
        .unwrap();
    let mut waiting = bench::long_state();
    waiting.system.activity = Activity::WaitForSipi;
    second.set_state(&waiting).unwrap();
    let given = state_of(2, |state| state.local_apics[1].svr = 0x1ff);
    bench.machine.give_controllers(&given, 0, 0).unwrap();
    for data in [0x500, 0x609] {
        bench.machine.send_message(0xfee0_1000, data).unwrap();
        // The kernel may pass an interrupt on a moment later.
        thread::sleep(Duration::from_millis(20));
    }

    let state = second.state();

    assert_eq!(state.system.activity, Activity::Running);
    assert_eq!(state.system.segments[sreg::CS].base, 0x9000);
    assert_eq!((state.rip, state.system.cr0 & cr0::PE), (0, 0));
    // And so does whoever takes the controllers first.
    second.set_state(&waiting).unwrap();
    bench.machine.give_controllers(&given, 0, 0).unwrap();
    for data in [0x500, 0x609] {
        bench.machine.send_message(0xfee0_1000, data).unwrap();
        thread::sleep(Duration::from_millis(20));
    }
    let taken = bench.machine.take_controllers().unwrap();
    // INIT disables it.
    assert_eq!(taken.local_apics[1].svr, 0xff);
    assert_eq!(second.state().system.activity, Activity::Running);
}

/// The kernel must not be asked for what the bus loses, nor what it was made to keep end the machine.
#[test]
fn messages_that_no_device_should_send_do_no_harm() {
    // STI; JMP to itself.
    let Some(mut bench) = kernels_of(&[0xfb, 0xeb, 0xfe], 2) else {
        return;
    };
    let world = Box::new(bench.world.clone());
    let _second = bench.machine.vcpu(world, 1).unwrap();
    count_interrupts(&bench, &[0x51, 0x73]);
    // Logical destinations of both models: the kernel has to ask each processor.
    let given = state_of(2, |state| {
        let [first, second] = &mut state.local_apics[..] else {
            panic!("there are two");
        };
        (first.ldr, first.dfr) = (0x0100_0000, 0xffff_ffff);
        (second.svr, second.ldr, second.dfr) = (0x1ff, 0x1100_0000, 0x0fff_ffff);
    });
    bench.machine.give_controllers(&given, 0, 0).unwrap();
    let addresses = [
        // No interrupts, or beyond what the kernel has a place for.
        (0, 0x51),
        (0xfed0_0000, 0x51),
        (0xfef0_0000, 0x51),
        (0x1_fee0_0000, 0x51),
        (u64::MAX, 0x51),
        // For processors that are not there, physically and logically.
        (0xfee0_7000, 0x51),
        (0xfee8_0004, 0x51),
        (0xfee8_000c, 0x51),
    ];
    // System management, reserved, external; and vectors that are the processor's own.
    let modes = [0x251, 0x351, 0x751, 0xc351].map(|data| (0xfee0_0000, data));
    let vectors = (0..16).map(|vector| (0xfeef_f000, vector));
    for (address, data) in addresses.into_iter().chain(modes).chain(vectors) {
        // The first by a call, the others by an event.
        for _ in 0..3 {
            bench.machine.send_message(address, data).unwrap();
        }
    }
    for times in 1..4 {
        bench.machine.send_message(0xfee0_0000, 0x73).unwrap();
        run_until(&mut bench, |bench| counts(bench) == [0, times]);
        // The handler ends no interrupt.
        let mut taken = bench.machine.take_controllers().unwrap();
        let mut chipset = Chipset::new(ChipsetConfig {
            cpus: 2,
            ..ChipsetConfig::default()
        })
        .unwrap();
        chipset.lend_controllers(0);
        chipset.take_back_controllers(&taken, 0).unwrap();
        taken.local_apics[0].isr = VectorSet::default();
        bench.machine.give_controllers(&taken, 0, 0).unwrap();
    }
}

/// A write to a doorbell that rings by an event stays in the kernel.
#[test]
fn doorbell_rings_by_its_event_and_only_while_it_is_to() {
    if Facts::probe().is_ok_and(|facts| !facts.ioeventfd) {
        skipped("this KVM has no ioeventfd");
        return;
    }
    // MOV EAX, DEVICE; MOV [RAX], CX; MOV [RAX], ECX; HLT.
    let mut code = [0xb8, 0, 0, 0, 0, 0x66, 0x89, 0x08, 0x89, 0x08, HLT];
    code[1..5].copy_from_slice(&(DEVICE as u32).to_le_bytes());
    let Some(mut bench) = bench_with(&code, InKernel::NOTHING) else {
        return;
    };
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let ring = |bench: &mut Bench| {
        bench.vcpu.set_state(&bench::long_state()).unwrap();
        bench.run_to_halt();
        let writes = bench.world.with(|told| std::mem::take(&mut told.memory));
        let lengths: Vec<usize> = writes.iter().map(|(_, data)| data.len()).collect();
        (lengths, event.read().unwrap_or_default())
    };
    assert_eq!(ring(&mut bench), (vec![2, 4], 0));
    bench.machine.ring_by_event(DEVICE, &event).unwrap();
    assert_eq!(ring(&mut bench), (vec![4], 1));
    // The place is taken.
    let other = EventFd::new(EFD_NONBLOCK).unwrap();
    assert!(bench.machine.ring_by_event(DEVICE, &other).is_err());
    assert_eq!(ring(&mut bench), (vec![4], 1));
    bench.machine.ring_by_exit(DEVICE, &event).unwrap();
    assert_eq!(ring(&mut bench), (vec![2, 4], 0));
}
