use trapgate_engine::{Exit, Vcpu};
use trapgate_x86::descriptor::{access, system};
use trapgate_x86::registers::{cr0, dr, rflags, sreg};
use trapgate_x86::{Exception, Segment, Vector};

use crate::Interpreter;
use crate::cpu::{CodeSize, Stop};
use crate::events::EventKind;
use crate::system_testing::*;

/// The other task's TSS, which [`SPARE`] names.
const OTHER: u64 = 0x14000;
/// Where the other task's stack is.
const OTHER_STACK: u64 = 0x30000;
const IRET: &[u8] = &[0xcf];

fn far(opcode: u8, selector: u16) -> Vec<u8> {
    let mut bytes = vec![opcode, 0, 0, 0, 0];
    bytes.extend(selector.to_le_bytes());
    bytes
}

const CALL: u8 = 0x9a;
const JMP: u8 = 0xea;

/// Protected mode with another task at level 0 in a 32-bit TSS.
fn with_task() -> Bench {
    let bench = Bench::protected();
    describe_task(&bench, 0x67, access::P | system::TSS);
    let code = HANDLER as u32;
    for (offset, value) in [
        (0x20, code),
        (0x24, rflags::CF as u32),
        (0x28, 0xa0a0_a0a0),
        (0x2c, 0xc1c1_c1c1),
        (0x30, 0xd2d2_d2d2),
        (0x34, 0xb3b3_b3b3),
        (0x38, OTHER_STACK as u32),
        (0x3c, 0xb5b5_b5b5),
        (0x40, 0x5656_5656),
        (0x44, 0xd7d7_d7d7),
        (0x48, DATA3.into()),
        (0x4c, CODE0.into()),
        (0x50, DATA0.into()),
        (0x54, DATA0.into()),
        (0x58, 0),
        (0x5c, DATA3.into()),
    ] {
        bench.put32(OTHER + offset, value);
    }
    bench
}

fn describe_task(bench: &Bench, limit: u32, access: u32) {
    let value = descriptor(OTHER as u32, limit, access);
    bench.put(GDT + u64::from(SPARE), value);
}

/// Type of a TSS descriptor in the table.
fn kind(bench: &Bench, selector: u16) -> u64 {
    let [value] = bench.get(GDT + u64::from(selector), 8);
    value >> 40 & 0xf
}

const AVAILABLE: u64 = system::TSS as u64;
const BUSY: u64 = system::TSS_BUSY as u64;

#[test]
fn call_nests_a_task_and_iret_comes_back() {
    let mut bench = with_task();
    bench.cpu.set_reg(0, 0x1234_5678u32);
    bench.cpu.sys.dr7 |= 0x3ff;
    bench.runs(&far(CALL, SPARE));

    let cpu = &bench.cpu;
    assert_eq!(cpu.rip, HANDLER);
    assert_eq!(cpu.rflags(), rflags::CF | rflags::NT | 2);
    let registers = [0, 1, 2, 3, 4, 5, 6, 7].map(|index| cpu.reg::<u32>(index));
    let stack = OTHER_STACK as u32;
    assert_eq!(
        registers,
        [
            0xa0a0_a0a0,
            0xc1c1_c1c1,
            0xd2d2_d2d2,
            0xb3b3_b3b3,
            stack,
            0xb5b5_b5b5,
            0x5656_5656,
            0xd7d7_d7d7
        ]
    );
    let selectors = [0, 1, 2, 3, 4, 5].map(|index| bench.selector(index));
    assert_eq!(selectors, [DATA3, CODE0, DATA0, DATA0, 0, DATA3]);
    assert_eq!(
        (cpu.sys.tr.selector, cpu.sys.tr.base, cpu.sys.tr.limit),
        (SPARE, OTHER, 0x67)
    );
    assert_ne!(cpu.sys.cr0 & cr0::TS, 0);
    assert_eq!(
        cpu.sys.dr7 & 0x3ff,
        0x2aa,
        "local breakpoints are the old task's"
    );
    assert_eq!((kind(&bench, TASK), kind(&bench, SPARE)), (BUSY, BUSY));
    // The link, and what the old task goes on with.
    assert_eq!(bench.get(OTHER, 2), [u64::from(TASK)]);
    let saved = bench.get(TSS + 0x20, 4);
    assert_eq!(saved, [CODE + 7, rflags::IF | 2, 0x1234_5678]);
    assert_eq!(bench.get(TSS + 0x38, 4), [STACK]);
    assert_eq!(bench.get(TSS + 0x4c, 4), [u64::from(CODE0), DATA0.into()]);

    bench.cpu.set_reg(0, 0x4242u32);
    bench.runs(IRET);
    let cpu = &bench.cpu;
    assert_eq!((cpu.rip, cpu.rflags()), (CODE + 7, rflags::IF | 2));
    assert_eq!((cpu.reg::<u32>(0), bench.sp()), (0x1234_5678, STACK));
    assert_eq!(cpu.sys.tr.selector, TASK);
    assert_eq!((kind(&bench, TASK), kind(&bench, SPARE)), (BUSY, AVAILABLE));
    // The nested task's state was kept, with NT clear.
    let saved = bench.get(OTHER + 0x20, 4);
    assert_eq!(saved, [HANDLER + 1, rflags::CF | 2, 0x4242]);
}

#[test]
fn jump_leaves_no_link() {
    let mut bench = with_task();
    bench.put16(OTHER, 0x5555);
    bench.runs(&far(JMP, SPARE));
    assert_eq!(bench.cpu.rflags(), rflags::CF | 2);
    assert_eq!((kind(&bench, TASK), kind(&bench, SPARE)), (AVAILABLE, BUSY));
    assert_eq!(bench.get(OTHER, 2), [0x5555]);
    // And the way back is another jump.
    bench.runs(&far(JMP, TASK));
    assert_eq!((bench.cpu.rip, bench.sp()), (CODE + 7, STACK));
}

#[test]
fn task_gates_lead_to_tasks() {
    for (access, allowed) in [(access::DPL, true), (0, false)] {
        let bench = with_task();
        bench.put(
            GDT + u64::from(SPARE) + 8,
            gate(SPARE, 0, access::P | system::TASK_GATE | access, 0),
        );
        bench.put(
            GDT + u64::from(SPARE),
            descriptor(OTHER as u32, 0x67, access::P | system::TSS),
        );
        let mut bench = bench.user();
        let code = far(JMP, SPARE + 8);
        if allowed {
            bench.runs(&code);
            assert_eq!((bench.cpu.cpl, bench.cpu.rip), (0, HANDLER));
        } else {
            assert_eq!(bench.faults(&code), gp(u32::from(SPARE) + 8));
        }
    }
}

#[test]
fn exception_through_a_task_gate_pushes_its_code_in_the_new_task() {
    let mut bench = with_task().user();
    bench.gate(13, SPARE, access::P | system::TASK_GATE, 0);
    bench.cpu.deliver_exception(gp(0x1234)).unwrap();
    assert_eq!((bench.cpu.cpl, bench.cpu.rip), (0, HANDLER));
    assert_eq!(bench.sp(), OTHER_STACK - 4);
    assert_eq!(bench.get(bench.sp(), 4), [0x1234]);
    let [ip, flags] = bench.get(TSS + 0x20, 4);
    assert_eq!((ip, flags), (CODE, rflags::IF | rflags::RF | 2));
    assert_ne!(bench.cpu.rflags() & rflags::NT, 0);
    bench.cpu.drop_from_stack(4);
    bench.runs(IRET);
    assert_eq!((bench.cpu.cpl, bench.cpu.rip, bench.sp()), (3, CODE, STACK));
}

#[test]
fn task_switch_into_vm86() {
    let mut bench = with_task();
    bench.put32(OTHER + 0x24, (rflags::VM | rflags::IOPL) as u32);
    bench.put32(OTHER + 0x20, 0x1234);
    bench.put32(OTHER + 0x4c, 0x7777);
    bench.runs(&far(JMP, SPARE));
    let cpu = &bench.cpu;
    assert!(cpu.is_vm86());
    assert_eq!((cpu.cpl, cpu.code_size), (3, CodeSize::Bits16));
    assert_eq!(cpu.sys.segments[sreg::CS].base, 0x77770);
    assert_eq!(cpu.sys.segments[sreg::CS].limit, 0xffff);
}

#[test]
fn tasks_of_16_bits() {
    let mut bench = with_task();
    describe_task(&bench, 0x2b, access::P | system::TSS16);
    bench.put(GDT + u64::from(SPARE) + 8, descriptor(0, 0xffff, 0x93));
    for index in 0..8 {
        bench.put16(OTHER + 0x12 + index * 2, 0x1010 * (index as u16 + 1));
    }
    for (offset, value) in [
        (0x0e, 0x4321),
        (0x10, rflags::ZF as u16),
        (0x22, DATA0),
        (0x24, CODE16),
        (0x26, SPARE + 8),
        (0x28, DATA0),
        (0x2a, 0),
    ] {
        bench.put16(OTHER + offset, value);
    }
    bench.runs(&far(CALL, SPARE));
    let cpu = &bench.cpu;
    assert_eq!((cpu.code_size, cpu.rip), (CodeSize::Bits16, 0x4321));
    assert_eq!(cpu.rflags(), rflags::ZF | rflags::NT | 2);
    assert_eq!(cpu.reg::<u16>(0), 0x1010);
    assert_eq!(bench.sp(), 0x5050);
    assert!(!cpu.sys.segments[sreg::FS].is_usable());
    // Saved in the same format on the way back.
    bench.cpu.set_reg(7, 0xbeefu16);
    bench.runs(IRET);
    assert_eq!(bench.cpu.rip, CODE + 7);
    assert_eq!(bench.get(OTHER + 0x0e, 2), [0x4322, rflags::ZF | 2]);
    assert_eq!(
        bench.get(OTHER + 0x20, 2),
        [0xbeef, DATA0.into(), CODE16.into()]
    );
}

#[test]
fn debug_trap_flag_raises_a_debug_exception_in_the_new_task() {
    let mut bench = with_task();
    bench.put16(OTHER + 0x64, 1);
    bench.runs(&far(JMP, SPARE));
    assert_eq!(bench.cpu.rip, HANDLER);
    assert_eq!(bench.cpu.pending, Some(Exception::plain(Vector::DB)));
    assert_eq!(bench.cpu.sys.dr6, dr::DR6_ONES | dr::DR6_BT);
    assert!(bench.cpu.attention);
}

/// Found by fuzzing: by blocks, the task's first instruction came before it.
#[test]
fn exception_of_a_task_that_an_event_leads_to_comes_before_its_first_instruction() {
    const START: u64 = HANDLER + 0x100;
    const HLT: &[u8] = &[0xf4];
    fn step_until_exit(interpreter: &mut Interpreter) -> Exit {
        loop {
            match interpreter.step() {
                Exit::Debug => {}
                exit => return exit,
            }
        }
    }
    for go in [Interpreter::run, step_until_exit] {
        // Given a task with its debug trap flag set, behind the gate of #GP,
        let mut bench = with_task();
        bench.put32(OTHER + 0x20, START as u32);
        bench.put16(OTHER + 0x64, 1);
        bench.gate(13, SPARE, access::P | system::TASK_GATE, 0);
        bench.interrupt_gate(1);
        bench.cpu.memory.write(START, HLT).unwrap();
        bench.cpu.memory.write(HANDLER, HLT).unwrap();
        // when #GP is delivered,
        bench.cpu.pending = Some(gp(0));
        bench.cpu.update_attention();
        let mut interpreter = Interpreter::of(bench.cpu);
        assert_eq!(go(&mut interpreter), Exit::Halted);
        // then #DB finds the task at its start.
        let bench = Bench {
            cpu: interpreter.cpu,
        };
        assert_eq!(bench.cpu.rip, HANDLER + 1);
        assert_eq!(bench.get(bench.sp(), 4), [START]);
    }
}

#[test]
fn errors_before_the_switch_leave_the_old_task() {
    type Prepare = fn(&mut Bench);
    const TSS_CODE: u32 = SPARE as u32;
    let cases: [(&str, Prepare, Exception); 6] = [
        (
            "busy",
            |b| describe_task(b, 0x67, access::P | system::TSS_BUSY),
            gp(TSS_CODE),
        ),
        (
            "absent",
            |b| describe_task(b, 0x67, system::TSS),
            np(TSS_CODE),
        ),
        (
            "too small",
            |b| describe_task(b, 0x66, access::P | system::TSS),
            ts(TSS_CODE),
        ),
        (
            "16-bit too small",
            |b| describe_task(b, 0x2a, access::P | system::TSS16),
            ts(TSS_CODE),
        ),
        (
            "LDT",
            |b| describe_task(b, 0x67, access::P | system::LDT),
            gp(TSS_CODE),
        ),
        (
            "old task too small",
            |b| b.cpu.sys.tr.limit = 0x5e,
            ts(TASK.into()),
        ),
    ];
    for (what, prepare, expected) in cases {
        for opcode in [CALL, JMP] {
            let mut bench = with_task();
            prepare(&mut bench);
            let before = bench.get::<13>(TSS, 8);
            assert_eq!(bench.faults(&far(opcode, SPARE)), expected, "{what}");
            assert_eq!(bench.get(TSS, 8), before);
            assert_eq!(kind(&bench, TASK), BUSY);
        }
    }
}

#[test]
fn errors_of_task_gates_in_the_interrupt_table() {
    type Prepare = fn(&mut Bench);
    const TSS_CODE: u32 = SPARE as u32;
    let cases: [(&str, Prepare, Exception); 5] = [
        (
            "local",
            |b| b.gate(0x40, SPARE | 4, access::P | system::TASK_GATE, 0),
            gp(TSS_CODE | 4 | 1),
        ),
        (
            "outside",
            |b| b.gate(0x40, OUTSIDE, access::P | system::TASK_GATE, 0),
            gp(u32::from(OUTSIDE) | 1),
        ),
        (
            "busy",
            |b| describe_task(b, 0x67, access::P | system::TSS_BUSY),
            gp(TSS_CODE | 1),
        ),
        (
            "absent",
            |b| describe_task(b, 0x67, system::TSS),
            np(TSS_CODE | 1),
        ),
        (
            "too small",
            |b| describe_task(b, 0x66, access::P | system::TSS),
            ts(TSS_CODE | 1),
        ),
    ];
    for (what, prepare, expected) in cases {
        let mut bench = with_task();
        bench.gate(0x40, SPARE, access::P | system::TASK_GATE, 0);
        prepare(&mut bench);
        let before = bench.registers();
        assert_eq!(
            bench.cpu.deliver_interrupt(0x40, EventKind::External),
            Err(Stop::Fault)
        );
        assert_eq!(bench.registers(), before);
        assert_eq!(bench.cpu.exception, expected, "{what}");
    }
}

#[test]
fn errors_after_the_switch_are_the_new_tasks() {
    // A field of the TSS, a bad value, and what comes of it.
    for (what, offset, value, expected) in [
        ("local LDT", 0x60, 0x0c, ts(0x0c)),
        ("LDT is code", 0x60, CODE0, ts(CODE0.into())),
        ("null code", 0x4c, 0, ts(0)),
        ("code is data", 0x4c, DATA0, ts(DATA0.into())),
        ("code of another level", 0x4c, CODE0 | 1, ts(CODE0.into())),
        ("absent code", 0x4c, ABSENT_CODE, np(ABSENT_CODE.into())),
        ("null stack", 0x50, 0, ts(0)),
        ("stack outside", 0x50, OUTSIDE, ts(OUTSIDE.into())),
        ("stack of another level", 0x50, DATA3, ts(0x20)),
        ("read-only stack", 0x50, READ_ONLY, ts(READ_ONLY.into())),
        ("absent stack", 0x50, ABSENT_DATA, ss(ABSENT_DATA.into())),
        (
            "data can't be read",
            0x54,
            EXECUTE_ONLY,
            ts(EXECUTE_ONLY.into()),
        ),
        ("data for another level", 0x48, DATA0 | 1, ts(DATA0.into())),
        ("absent data", 0x58, ABSENT_DATA, np(ABSENT_DATA.into())),
        ("beyond the code", 0x4c, CODE16, gp(0)),
    ] {
        let mut bench = with_task();
        bench.put32(OTHER + offset, value.into());
        bench.runs(&far(CALL, SPARE));
        assert_eq!(bench.cpu.pending, Some(expected), "{what}");
        assert_eq!(
            (bench.cpu.rip, bench.cpu.sys.tr.selector),
            (HANDLER, SPARE),
            "{what}"
        );
        // Back to the old task, as a handler in a task of its own could.
        assert_eq!(kind(&bench, TASK), BUSY);
    }
}

#[test]
fn level_of_a_half_loaded_task_is_its_code_selectors() {
    let mut bench = with_task();
    bench.put32(OTHER + 0x4c, CODE3.into());
    bench.put32(OTHER + 0x50, 0);
    bench.runs(&far(JMP, SPARE));
    assert_eq!((bench.cpu.pending, bench.cpu.cpl), (Some(ts(0)), 3));
    assert!(!bench.cpu.sys.segments[sreg::SS].is_usable());
    // The exception's handler gets a good stack.
    bench.put32(OTHER + 4, STACK0 as u32);
    bench.put32(OTHER + 8, DATA0.into());
    bench.interrupt_gate(10);
    bench.cpu.deliver_exception(ts(0)).unwrap();
    assert_eq!((bench.cpu.cpl, bench.sp()), (0, STACK0 - 24));
}

#[test]
fn nested_return_checks_the_link() {
    for (link, expected) in [
        (SPARE | 4, ts(u32::from(SPARE) | 4)),
        (OUTSIDE, ts(OUTSIDE.into())),
        (CODE0, ts(CODE0.into())),
        // Not busy.
        (SPARE, ts(SPARE.into())),
    ] {
        let mut bench = with_task();
        bench.cpu.system_flags |= rflags::NT;
        bench.put16(TSS, link);
        assert_eq!(bench.faults(IRET), expected, "{link:#x}");
    }
}

#[test]
fn ldt_is_loaded() {
    let mut bench = with_task();
    bench.put(
        GDT + u64::from(SPARE) + 8,
        descriptor(LDT as u32, 0xf, access::P | system::LDT),
    );
    bench.put(LDT + 8, descriptor(0, 0xfffff, 0xc093));
    bench.put32(OTHER + 0x60, u32::from(SPARE) + 8);
    bench.put32(OTHER + 0x54, 0x0c);
    bench.runs(&far(JMP, SPARE));
    assert_eq!(bench.cpu.pending, None);
    let expected = Segment {
        selector: SPARE + 8,
        base: LDT,
        limit: 0xf,
        access: access::P | system::LDT,
    };
    assert_eq!(bench.cpu.sys.ldtr, expected);
    assert_eq!(bench.selector(sreg::DS), 0x0c);
}

#[test]
fn cr3_is_loaded_while_paging_is_on() {
    // A page directory with one 4 MiB page, the same for both tasks but at different places.
    for (paging, expected) in [(false, 0x1000), (true, 0x2000)] {
        let mut bench = with_task();
        bench.put32(0x1000, 0x83);
        bench.put32(0x2000, 0x83);
        bench.cpu.sys.cr3 = 0x1000;
        bench.cpu.sys.cr4 |= trapgate_x86::registers::cr4::PSE;
        if paging {
            bench.cpu.sys.cr0 |= cr0::PG;
            bench.cpu.tlb.flush_all();
        }
        bench.put32(OTHER + 0x1c, 0x2000);
        bench.runs(&far(JMP, SPARE));
        assert_eq!(bench.cpu.pending, None);
        assert_eq!(bench.cpu.sys.cr3, expected);
    }
}
