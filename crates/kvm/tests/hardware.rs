//! Guests of a few bytes on the KVM of this host, where there is one.
#![allow(missing_docs, unreachable_pub)]

mod bench;

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use bench::{CODE, DEVICE, STACK, bench, long_state, skipped};
use trapgate_engine::probe::Host;
use trapgate_engine::{Exit, Signal, Vcpu, World};
use trapgate_memory::{TraceFlags, TraceListener};
use trapgate_x86::registers::{MXCSR_MASK, cr4, dr, gpr, rflags, sreg};
use trapgate_x86::state::{Mtrrs, ParavirtualMsrs};
use trapgate_x86::{Activity, CpuState, Exception, InterruptShadow, Segment, Vector};

const HLT: u8 = 0xf4;

/// A state in which as much as a kernel takes has a value of its own.
fn busy_state() -> CpuState {
    let mut state = long_state();
    state.gpr =
        std::array::from_fn(|index| 0x1111_1111_1111_1111u64.wrapping_mul(index as u64) ^ 3);
    state.rip = 0x1234;
    state.rflags = rflags::ONE | rflags::ARITHMETIC | rflags::IF | rflags::AC | rflags::ID;
    for (index, byte) in state.xsave.0.iter_mut().enumerate() {
        *byte = index as u8 | 1;
    }
    let image = &mut state.xsave.0;
    image[..8].copy_from_slice(&[0x7f, 0x02, 0x41, 0x38, 0x81, 0, 0x23, 0x05]);
    // Pointers as 64-bit code leaves them, without the selectors that went out of use.
    image[8..24].fill(0);
    image[24..28].copy_from_slice(&0x9fc0u32.to_le_bytes());
    image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    for register in 0..8 {
        image[32 + 16 * register + 10..][..6].fill(0);
    }
    image[416..].fill(0);
    image[512] = 3;
    let system = &mut state.system;
    system.segments[sreg::FS].base = 0xffff_8000_1234_5000;
    system.segments[sreg::GS].base = 0x7fff_1234_5000;
    system.ldtr = Segment {
        selector: 0x28,
        base: 0x5000,
        limit: 0xff,
        access: 0x82,
    };
    system.tr = Segment {
        selector: 0x30,
        base: 0x6000,
        limit: 0x67,
        access: 0x8b,
    };
    system.cr2 = 0x22;
    system.cr4 |= cr4::DE | cr4::PGE | cr4::TSD;
    system.dr = [5, 6, 7, 8];
    system.dr6 = dr::DR6_ONES | 1;
    system.dr7 = dr::DR7_ONE | 0x55;
    system.star = 9 << 48 | 8 << 32;
    system.lstar = 0xffff_8000_0000_0010;
    system.cstar = 11;
    system.sfmask = 12;
    system.kernel_gs_base = 0x13_0000;
    system.sysenter_cs = 14;
    system.sysenter_esp = 15;
    system.sysenter_eip = 16;
    system.tsc_aux = 17;
    system.tsc_offset = 0x1_0000_0018;
    system.tsc_adjust = 19;
    system.pat = 0x0001_0406_0007_0406;
    system.misc_enable = 0;
    system.mcg_status = 4;
    system.mtrrs = Mtrrs {
        default_type: 0xc06,
        fixed: [0x0606_0606_0606_0606; 11],
        variable: [(6, 0xff_c000_0800); 8],
    };
    system.paravirtual = ParavirtualMsrs {
        system_time: 0x5001,
        wall_clock: 0x6000,
    };
    state
}

type Change = fn(&mut CpuState);

#[test]
fn state_put_in_is_the_state_taken_out() {
    let Some(mut bench) = bench(&[HLT]) else {
        return;
    };
    let changes: &[Change] = &[
        |_| {},
        |state| state.system.shadow = InterruptShadow::Sti,
        |state| state.system.shadow = InterruptShadow::MovSs,
        |state| state.system.nmi_pending = true,
        |state| state.system.nmi_blocked = true,
        |state| state.interrupt = Some(0x41),
        |state| state.pending = Some(Exception::gp(0x18)),
        |state| state.pending = Some(Exception::page_fault(0x22, 5)),
        |state| state.pending = Some(Exception::UD),
        |state| state.system.activity = Activity::Halted,
        |state| state.system.activity = Activity::WaitForSipi,
        |state| *state = CpuState::default(),
        |state| *state = CpuState::default().init(false),
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut state = busy_state();
        change(&mut state);
        bench.vcpu.set_state(&state).unwrap();
        let got = bench.vcpu.state();
        assert_eq!(got.system, state.system, "case {number}");
        assert!(got.xsave.0 == state.xsave.0, "case {number}, image");
        assert_eq!(got, state, "case {number}");
    }
}

#[test]
fn state_that_the_hardware_refuses_is_an_error_with_its_reason() {
    let Some(mut bench) = bench(&[HLT]) else {
        return;
    };
    let mut state = long_state();
    state.system.cr4 |= 1 << 40;
    let error = bench.vcpu.set_state(&state).unwrap_err();
    assert!(error.to_string().contains("KVM_SET_SREGS2"), "{error}");
    bench.vcpu.set_state(&long_state()).unwrap();
    bench.run_to_halt();
}

#[test]
fn ports_of_each_size_and_strings_reach_the_world() {
    // OUT 0x10,AL; OUT 0x11,EAX; IN AL,0x12; MOV EBX,EAX; MOV EDX,0x13; MOV ESI,0x2800;
    // MOV ECX,3; REP OUTSW; HLT.
    let Some(mut bench) = bench(&[
        0xe6, 0x10, 0xe7, 0x11, 0xe4, 0x12, 0x89, 0xc3, 0xba, 0x13, 0, 0, 0, 0xbe, 0x00, 0x28, 0,
        0, 0xb9, 3, 0, 0, 0, 0xf3, 0x66, 0x6f, HLT,
    ]) else {
        return;
    };
    bench.memory.write(0x2800, &[1, 0, 2, 0, 3, 0]).unwrap();
    let mut state = long_state();
    state.gpr[gpr::RAX] = 0x8765_4321;
    bench.vcpu.set_state(&state).unwrap();
    let state = bench.run_to_halt();
    assert_eq!(state.gpr[gpr::RBX] & 0xff, 0x12);
    let expected = [
        (0x10, 1, 0x21),
        (0x11, 4, 0x8765_4321),
        (0x13, 2, 1),
        (0x13, 2, 2),
        (0x13, 2, 3),
    ];
    assert_eq!(bench.world.with(|told| told.ports.clone()), expected);
    let counted = |name| {
        let counters = bench.vcpu.counters();
        let counter = counters.iter().find(|counter| counter.name() == name);
        counter.unwrap().get()
    };
    assert!(counted("port_exits") >= 4, "{}", counted("port_exits"));
    assert!(counted("exits") > counted("port_exits"));
    assert_eq!(counted("device_exits"), 0);
}

#[test]
fn memory_that_is_not_ram_is_the_worlds() {
    // MOV RBX,DEVICE; MOV EAX,[RBX]; MOV [RBX+8],RAX; MOV BYTE [RBX+16],7; HLT.
    let Some(mut bench) = bench(&[
        0xbb, 0, 0, 0x60, 0, 0x8b, 0x03, 0x48, 0x89, 0x43, 0x08, 0xc6, 0x43, 0x10, 7, HLT,
    ]) else {
        return;
    };
    let state = bench.run_to_halt();
    let read = (DEVICE.wrapping_mul(0x9e37_79b9_7f4a_7c15)) & 0xffff_ffff;
    assert_eq!(state.gpr[gpr::RAX], read);
    let written = [
        (DEVICE + 8, read.to_le_bytes().to_vec()),
        (DEVICE + 16, vec![7]),
    ];
    assert_eq!(bench.world.with(|told| told.memory.clone()), written);
}

/// RDMSR and WRMSR of `index` with `value`; `None` for #GP.
fn msr(bench: &mut bench::Bench, code: [u8; 2], index: u32, value: u64) -> Option<u64> {
    bench.memory.write(CODE, &code).unwrap();
    bench.memory.write(CODE + 2, &[HLT]).unwrap();
    bench.memory.write(CODE + 0x10, &[HLT]).unwrap();
    bench.gate(13, CODE + 0x10);
    let mut state = bench.vcpu.state();
    state.rip = CODE;
    state.gpr[gpr::RSP] = STACK;
    state.gpr[gpr::RCX] = index.into();
    state.gpr[gpr::RAX] = value & 0xffff_ffff;
    state.gpr[gpr::RDX] = value >> 32;
    state.system.activity = Activity::Running;
    bench.vcpu.set_state(&state).unwrap();
    let state = bench.run_to_halt();
    let value = state.gpr[gpr::RDX] << 32 | state.gpr[gpr::RAX] & 0xffff_ffff;
    (state.rip == CODE + 3).then_some(value)
}

const RDMSR: [u8; 2] = [0x0f, 0x32];
const WRMSR: [u8; 2] = [0x0f, 0x30];

#[test]
fn msrs_are_answered_as_the_profile_has_them() {
    use trapgate_x86::msr::*;
    let Some(mut bench) = bench(&[HLT]) else {
        return;
    };
    // Stored by us, by the kernel, and by the local APIC's model; what is not there, and what is
    // refused.
    for (index, value) in [
        (IA32_MTRR_DEF_TYPE, 0xc06),
        (IA32_MTRR_PHYSBASE0 + 1, 0xff_c000_0800),
        (LSTAR, 0xffff_8000_0000_1000),
        (IA32_SYSENTER_EIP, 0x1234),
        (IA32_PAT, 0x0407_0506_0007_0106),
        (0x80b, 5),
    ] {
        assert!(msr(&mut bench, WRMSR, index, value).is_some(), "{index:#x}");
        assert_eq!(msr(&mut bench, RDMSR, index, 0), Some(value), "{index:#x}");
    }
    assert_eq!(bench.vcpu.state().system.mtrrs.default_type, 0xc06);
    assert_eq!(
        msr(&mut bench, RDMSR, IA32_ARCH_CAPABILITIES, 0),
        Some(trapgate_x86::profile::ARCH_CAPABILITIES)
    );
    assert_eq!(msr(&mut bench, RDMSR, IA32_FEATURE_CONTROL, 0), Some(1));
    for (index, value) in [
        // Not canonical in 57 bits either, which the host's processor may have.
        (LSTAR, 1 << 62),
        (IA32_MTRR_DEF_TYPE, 2),
        (0x8ff, 0),
        (0x140, 0),
    ] {
        assert_eq!(msr(&mut bench, WRMSR, index, value), None, "{index:#x}");
    }
    for index in [0x345, 0x4b56_4d02, 0xc001_0015, 0x140] {
        assert_eq!(msr(&mut bench, RDMSR, index, 0), None, "{index:#x}");
    }
}

#[test]
fn interrupt_is_taken_when_the_guest_lets_it() {
    // CLI; STI; NOP; NOP; HLT, with a handler that halts.
    let Some(mut bench) = bench(&[0xfa, 0xfb, 0x90, 0x90, HLT, HLT]) else {
        return;
    };
    bench.memory.write(CODE + 0x100, &[HLT]).unwrap();
    bench.gate(0x61, CODE + 0x100);
    bench.world.with(|told| told.interrupts.push(0x61));
    bench.vcpu.signals().raise(Signal::Interrupt);
    let state = bench.run_to_halt();
    assert_eq!(state.rip, CODE + 0x101);
    assert!(bench.world.with(|told| told.interrupts.is_empty()));
}

/// Sixteen instructions, so that an emulator which works in batches of a power of two meets the loop
/// always at the same place.
#[test]
fn interrupt_is_taken_in_a_window_of_one_instruction_in_a_loop() {
    // STI; NOP; CLI; 12 times NOP; JMP back.
    let mut code = vec![0xfb, 0x90, 0xfa];
    code.extend([0x90; 12]);
    code.extend([0xeb, 0xef]);
    let Some(mut bench) = bench(&code) else {
        return;
    };
    bench.memory.write(CODE + 0x100, &[0x90, HLT]).unwrap();
    bench.gate(0x61, CODE + 0x100);
    bench.world.with(|told| told.interrupts.push(0x61));
    bench.vcpu.signals().raise(Signal::Interrupt);
    assert_eq!(bench.run_to_halt().rip, CODE + 0x102);
}

#[test]
fn halted_processor_wakes_for_an_interrupt_and_an_nmi_only_if_it_may() {
    // HLT; HLT.
    let Some(mut bench) = bench(&[HLT, HLT]) else {
        return;
    };
    bench.memory.write(CODE + 0x100, &[HLT]).unwrap();
    bench.gate(0x61, CODE + 0x100);
    bench.gate(2, CODE + 0x100);
    assert_eq!(bench.run_to_halt().rip, CODE + 1);
    // Interrupts are off.
    bench.world.with(|told| told.interrupts.push(0x61));
    bench.vcpu.signals().raise(Signal::Interrupt);
    assert_eq!(bench.vcpu.run(), Exit::Halted);
    assert_eq!(bench.world.with(|told| told.interrupts.len()), 1);

    bench.vcpu.signals().raise(Signal::Nmi);
    let state = bench.run_to_halt();
    assert_eq!(state.rip, CODE + 0x101);
    assert!(state.system.nmi_blocked);

    let mut state = long_state();
    state.rflags |= rflags::IF;
    state.system.activity = Activity::Halted;
    bench.vcpu.set_state(&state).unwrap();
    assert_eq!(bench.run_to_halt().rip, CODE + 0x101);
    assert!(bench.world.with(|told| told.interrupts.is_empty()));
}

#[test]
fn acknowledged_interrupt_of_a_state_is_delivered_first() {
    let Some(mut bench) = bench(&[HLT]) else {
        return;
    };
    bench.memory.write(CODE + 0x100, &[HLT]).unwrap();
    bench.gate(0x61, CODE + 0x100);
    let mut state = long_state();
    state.interrupt = Some(0x61);
    bench.vcpu.set_state(&state).unwrap();
    let state = bench.run_to_halt();
    assert_eq!((state.rip, state.interrupt), (CODE + 0x101, None));
}

#[test]
fn pending_exception_of_a_state_is_delivered_first() {
    let Some(mut bench) = bench(&[HLT]) else {
        return;
    };
    bench.memory.write(CODE + 0x100, &[HLT]).unwrap();
    bench.gate(14, CODE + 0x100);
    let mut state = long_state();
    state.pending = Some(Exception::page_fault(0x77_0000, 2));
    bench.vcpu.set_state(&state).unwrap();
    let state = bench.run_to_halt();
    assert_eq!((state.rip, state.pending), (CODE + 0x101, None));
    assert_eq!(state.system.cr2, 0x77_0000);
    let mut code = [0; 8];
    bench.memory.read(state.gpr[gpr::RSP], &mut code).unwrap();
    assert_eq!(u64::from_le_bytes(code), 2);
}

/// Given an interrupt that waits for a chance, which a KVM without hardware is watched for step by step,
/// when another event is delivered, then its frame has the guest's flags.
#[test]
fn event_is_not_stepped_into() {
    let mut on = long_state();
    on.rflags |= rflags::IF;
    let [mut fault, mut interrupt, mut nmi] = [on.clone(), on.clone(), on];
    fault.pending = Some(Exception::plain(Vector::UD));
    interrupt.interrupt = Some(0x61);
    nmi.system.nmi_pending = true;
    for (vector, state) in [(6, fault), (0x61, interrupt), (2, nmi)] {
        // NOP; HLT.
        let Some(mut bench) = bench(&[0x90, HLT]) else {
            return;
        };
        // NOP; HLT.
        bench.memory.write(CODE + 0x100, &[0x90, HLT]).unwrap();
        bench.gate(vector, CODE + 0x100);
        bench.vcpu.set_state(&state).unwrap();
        bench.vcpu.signals().raise(Signal::Interrupt);

        let state = bench.run_to_halt();

        assert_eq!(state.rip, CODE + 0x102);
        let mut flags = [0; 8];
        let place = state.gpr[gpr::RSP] + 16;
        bench.memory.read(place, &mut flags).unwrap();
        let flags = u64::from_le_bytes(flags) & !rflags::RF;
        assert_eq!(flags, rflags::ONE | rflags::IF, "vector {vector:#x}");
    }
}

/// Given an interrupt that waits, when a state is put in whose shadow holds it off, then one instruction is executed first.
#[test]
fn shadow_of_a_state_holds_an_interrupt_off_for_an_instruction() {
    for shadow in [InterruptShadow::Sti, InterruptShadow::MovSs] {
        // NOP; JMP to itself.
        let Some(mut bench) = bench(&[0x90, 0xeb, 0xfe]) else {
            return;
        };
        // CLI; HLT.
        bench.memory.write(CODE + 0x100, &[0xfa, HLT]).unwrap();
        bench.gate(0x61, CODE + 0x100);
        let mut state = long_state();
        state.rflags |= rflags::IF;
        state.system.shadow = shadow;
        bench.world.with(|told| told.interrupts.push(0x61));
        bench.vcpu.set_state(&state).unwrap();
        bench.vcpu.signals().raise(Signal::Interrupt);

        let state = bench.run_to_halt();

        let mut from = [0; 8];
        bench.memory.read(state.gpr[gpr::RSP], &mut from).unwrap();
        let held_off = u64::from_le_bytes(from) - CODE;
        if held_off == 0 && !Host::probe().kvm.is_hardware() {
            return skipped("a paravirtual KVM does not heed the shadow of a state");
        }
        assert_eq!(held_off, 1, "{shadow:?}");
    }
}

#[test]
fn kick_gets_a_guest_out_that_never_rests() {
    // JMP to itself.
    let Some(mut bench) = bench(&[0xeb, 0xfe]) else {
        return;
    };
    for delay in [0, 1, 300, 3000] {
        let signals = bench.vcpu.signals();
        let kicker = thread::spawn(move || {
            thread::sleep(Duration::from_micros(delay));
            signals.raise(Signal::Kick);
        });
        assert_eq!(bench.vcpu.run(), Exit::Kicked);
        kicker.join().unwrap();
        assert_eq!(bench.vcpu.state().rip, CODE);
    }
}

#[test]
fn kick_while_a_device_answers_leaves_a_whole_instruction() {
    // IN AL,DX; INC RBX; JMP back: at each moment RAX is what the port gives, or the loop is at its
    // begin with RBX having counted.
    let Some(mut bench) = bench(&[0xec, 0x48, 0xff, 0xc3, 0xeb, 0xfa]) else {
        return;
    };
    let mut state = long_state();
    state.gpr[gpr::RDX] = 0x42;
    state.gpr[gpr::RAX] = 0;
    bench.vcpu.set_state(&state).unwrap();
    let signals = bench.vcpu.signals();
    for _ in 0..50 {
        let kicker = {
            let signals = Arc::clone(&signals);
            thread::spawn(move || signals.raise(Signal::Kick))
        };
        assert_eq!(bench.vcpu.run(), Exit::Kicked);
        kicker.join().unwrap();
        let state = bench.vcpu.state();
        let expected = if state.rip == CODE && state.gpr[gpr::RBX] == 0 {
            0
        } else {
            0x42
        };
        assert_eq!(state.gpr[gpr::RAX], expected, "at {:#x}", state.rip);
        // Taking the state and giving it back changes nothing.
        bench.vcpu.set_state(&state).unwrap();
        assert_eq!(bench.vcpu.state(), state);
    }
}

#[test]
fn triple_fault_shuts_down() {
    // UD2 without an interrupt table.
    let Some(mut bench) = bench(&[0x0f, 0x0b]) else {
        return;
    };
    let mut state = long_state();
    state.system.idtr.limit = 0;
    bench.vcpu.set_state(&state).unwrap();
    assert_eq!(bench.vcpu.run(), Exit::ShutDown);
    assert_eq!(bench.vcpu.state().system.activity, Activity::Shutdown);
    assert_eq!(bench.vcpu.run(), Exit::ShutDown);
}

/// What the guest has in DR6 is its own, whoever steps it; what it writes there counts.
#[test]
fn step_leaves_dr6_to_the_guest() {
    // NOP; MOV RBX, DR6; MOV DR6, RAX; NOP; HLT.
    let code = [0x90, 0x0f, 0x21, 0xf3, 0x0f, 0x23, 0xf0, 0x90, HLT];
    let Some(mut bench) = bench(&code) else {
        return;
    };
    let held = dr::DR6_ONES | 0xe005;
    for written in [dr::DR6_ONES, dr::DR6_ONES | 2] {
        let mut state = long_state();
        state.system.dr6 = held;
        state.gpr[gpr::RAX] = written;
        bench.vcpu.set_state(&state).unwrap();
        let mut seen = Vec::new();
        for rip in [1, 4, 7, 8] {
            assert_eq!(bench.vcpu.step(), Exit::Debug);
            let state = bench.vcpu.state();
            assert_eq!(state.rip, CODE + rip);
            seen.push(state.system.dr6);
        }
        assert_eq!(seen, [held, held, written, written]);
        assert_eq!(bench.vcpu.state().gpr[gpr::RBX], held);
    }
}

#[test]
fn step_runs_one_instruction() {
    // MOV EAX,1; IN AL,0x12; NOP; HLT.
    let Some(mut bench) = bench(&[0xb8, 1, 0, 0, 0, 0xe4, 0x12, 0x90, HLT]) else {
        return;
    };
    for rip in [5, 7, 8] {
        assert_eq!(bench.vcpu.step(), Exit::Debug);
        let state = bench.vcpu.state();
        assert_eq!(state.rip, CODE + rip);
        assert_eq!(state.rflags & rflags::TF, 0);
    }
    assert_eq!(bench.vcpu.state().gpr[gpr::RAX], 0x12);
    assert_eq!(bench.run_to_halt().rip, CODE + 9);
}

/// Reads the TSC in the guest; `offset` is given to the state before. The TSC and the offset that the
/// state has then, and what VM time says the TSC is without offset before and after.
fn read_tsc(bench: &mut bench::Bench, offset: Option<u64>) -> (u64, u64, [u64; 2]) {
    let hz = bench.machine.profile().tsc_hz;
    let ticks = |time: u64| (u128::from(time) * u128::from(hz) / 1_000_000_000) as u64;
    // RDTSC; HLT.
    bench.memory.write(CODE, &[0x0f, 0x31, HLT]).unwrap();
    let mut state = bench.vcpu.state();
    state.rip = CODE;
    state.system.activity = Activity::Running;
    if let Some(offset) = offset {
        state.system.tsc_offset = offset;
    }
    bench.vcpu.set_state(&state).unwrap();
    let before = ticks(bench.world.clock());
    let state = bench.run_to_halt();
    let after = ticks(bench.world.clock());
    let tsc = state.gpr[gpr::RDX] << 32 | state.gpr[gpr::RAX];
    (tsc, state.system.tsc_offset, [before, after])
}

#[test]
fn tsc_is_vm_time_and_the_states_offset_and_never_goes_back() {
    let Some(mut bench) = bench(&[]) else {
        return;
    };
    // Offset and time are read one after the other.
    let slack = bench.machine.profile().tsc_hz / 1000;
    let mut last = 0;
    for pause in [0, 0, 30, 0, 5] {
        bench.world.pause();
        thread::sleep(Duration::from_millis(pause));
        let _saved = bench.vcpu.state();
        bench.world.resume();
        let (tsc, offset, [before, after]) = read_tsc(&mut bench, None);
        let time = tsc.wrapping_sub(offset);
        assert!(
            time + slack >= before && time <= after + slack,
            "{before} {time} {after}"
        );
        assert!(tsc > last, "{tsc} after {last}");
        assert_eq!(
            bench.world.with(|told| told.tsc_offset) / slack,
            offset / slack
        );
        last = tsc;
    }
}

#[test]
fn tsc_can_be_set_and_a_pause_does_not_move_it() {
    let Some(mut bench) = bench(&[]) else {
        return;
    };
    if !bench.machine.facts().tsc_offset {
        skipped("this KVM gives its guests the host's TSC");
        return;
    }
    let hz = bench.machine.profile().tsc_hz;
    let slack = hz / 1000;
    let given = 5_000_000_000_000;
    let (_, offset, _) = read_tsc(&mut bench, Some(given));
    assert!((offset.wrapping_sub(given) as i64).unsigned_abs() < slack);
    bench.world.pause();
    thread::sleep(Duration::from_millis(30));
    bench.world.resume();
    let (_, offset, _) = read_tsc(&mut bench, None);
    assert!((offset.wrapping_sub(given) as i64).unsigned_abs() < slack);

    // The guest moves it, and its adjustment with it.
    let before = bench.vcpu.state().system;
    assert!(msr(&mut bench, WRMSR, trapgate_x86::msr::IA32_TSC, 7).is_some());
    let after = bench.vcpu.state().system;
    let moved = after.tsc_offset.wrapping_sub(before.tsc_offset) as i64;
    let adjusted = after.tsc_adjust.wrapping_sub(before.tsc_adjust) as i64;
    assert!(moved < -(hz as i64), "{moved}");
    assert!(
        (moved - adjusted).unsigned_abs() < slack,
        "{moved} {adjusted}"
    );
}

#[test]
fn tsc_that_would_go_back_is_refused_where_it_cannot_be_set() {
    let Some(mut bench) = bench(&[]) else {
        return;
    };
    if bench.machine.facts().tsc_offset {
        skipped("this KVM can set the TSC");
        return;
    }
    let mut state = long_state();
    state.system.tsc_offset = 1 << 62;
    let error = bench.vcpu.set_state(&state).unwrap_err();
    assert!(error.to_string().contains("go back"), "{error}");
}

#[test]
fn paravirtual_clock_is_written_where_the_guest_asked() {
    use trapgate_x86::msr::{KVM_SYSTEM_TIME_NEW, KVM_WALL_CLOCK_NEW};
    let Some(mut bench) = bench(&[HLT]) else {
        return;
    };
    assert!(msr(&mut bench, WRMSR, KVM_SYSTEM_TIME_NEW, 0x9000 | 1).is_some());
    assert!(msr(&mut bench, WRMSR, KVM_WALL_CLOCK_NEW, 0xa000).is_some());
    let mut info = [0; 32];
    bench.memory.read(0x9000, &mut info).unwrap();
    let at_zero = u64::from_le_bytes(info[8..16].try_into().unwrap());
    let offset = bench.vcpu.state().system.tsc_offset;
    let hz = bench.machine.profile().tsc_hz;
    assert!((at_zero.wrapping_sub(offset) as i64).unsigned_abs() < hz / 1000);
    let version = u32::from_le_bytes(info[0..4].try_into().unwrap());
    assert!(version > 0 && version.is_multiple_of(2), "{version}");
    let mut wall = [0; 12];
    bench.memory.read(0xa000, &mut wall).unwrap();
    assert_eq!(wall[4..8], 1_700_000_000u32.to_le_bytes());
}

#[derive(Default)]
struct Heard(Mutex<Vec<u64>>);

impl TraceListener for Heard {
    fn written(&self, gpa: u64, _length: u64) {
        self.0.lock().unwrap().push(gpa);
    }

    fn wants(&self, _gpa: u64) -> bool {
        true
    }
}

#[test]
fn pages_that_the_guest_writes_are_reported_to_the_traces() {
    // MOV [0x200123],EAX; MOV [0x203000],EAX; HLT.
    let Some(mut bench) = bench(&[
        0x89, 0x04, 0x25, 0x23, 0x01, 0x20, 0, 0x89, 0x04, 0x25, 0, 0x30, 0x20, 0, HLT,
    ]) else {
        return;
    };
    let heard = Arc::new(Heard::default());
    let traces = bench.memory.traces();
    traces.listen(TraceFlags::CLEAN, Arc::clone(&heard) as _);
    let clean = |gpa: u64| {
        let page = bench.memory.page_index(gpa).unwrap();
        traces.set(page, TraceFlags::CLEAN);
    };
    for page in 0..bench.memory.size() / 4096 {
        clean(page * 4096);
    }
    bench.machine.log_writes(true).unwrap();
    bench.run_to_halt();
    bench.machine.collect_writes().unwrap();

    let mut pages = heard.0.lock().unwrap().clone();
    // Page tables, whose accessed bits the processor sets.
    pages.retain(|gpa| (0x20_0000..0x30_0000).contains(gpa));
    assert_eq!(pages, [0x20_0000, 0x20_3000]);
    assert!(bench.memory.flags(0x20_0000).is_empty());
    assert_eq!(bench.memory.flags(0x20_1000), TraceFlags::CLEAN);
    // Once told, it is not told again.
    bench.machine.collect_writes().unwrap();
    assert_eq!(
        heard
            .0
            .lock()
            .unwrap()
            .iter()
            .filter(|&&gpa| gpa == 0x20_3000)
            .count(),
        1
    );
}

#[test]
fn cpuid_is_the_profiles_where_kvm_gives_it() {
    // CPUID; HLT.
    let Some(mut bench) = bench(&[0x0f, 0xa2, HLT]) else {
        return;
    };
    let profile = bench.machine.profile().clone();
    for leaf in [0, 2, 4, 0x15, 0x16, 0x4000_0000, 0x4000_0001, 0x8000_0002] {
        let mut state = long_state();
        state.gpr[gpr::RAX] = leaf;
        state.gpr[gpr::RCX] = 0;
        bench.vcpu.set_state(&state).unwrap();
        let state = bench.run_to_halt();
        let answer = profile.cpuid(leaf as u32, 0, &Default::default());
        let said = [gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX].map(|index| state.gpr[index] as u32);
        assert_eq!(
            said,
            [answer.eax, answer.ebx, answer.ecx, answer.edx],
            "{leaf:#x}"
        );
    }
}
