use trapgate_engine::Vcpu;
use trapgate_x86::descriptor::{access, system};
use trapgate_x86::registers::{cr4, dr, gpr, rflags, sreg};
use trapgate_x86::{Exception, Segment, TableRegister, Vector};

use super::EventKind;
use crate::cpu::{CodeSize, Stop};
use crate::frame::null_stack_segment;
use crate::segments::vm86_segment;
use crate::system_testing::*;
use crate::testing::{PAGE_TABLES, reset_cpu};

const INTERRUPT: u32 = access::P | system::INTERRUPT_GATE;
const TRAP: u32 = access::P | system::TRAP_GATE;
const INTERRUPT16: u32 = access::P | system::INTERRUPT_GATE16;
const TRAP16: u32 = access::P | system::TRAP_GATE16;
const DPL3: u32 = access::DPL;
const VECTOR: u8 = 0x40;
/// Error code of a fault at the gate of [`VECTOR`], without EXT.
const GATE_CODE: u32 = (VECTOR as u32) << 3 | 2;

/// Delivers an external interrupt that faults and changes nothing.
fn fault_of(bench: &mut Bench, kind: EventKind) -> Exception {
    let before = bench.registers();
    assert_eq!(bench.cpu.deliver_interrupt(VECTOR, kind), Err(Stop::Fault));
    assert_eq!(bench.registers(), before);
    bench.cpu.exception
}

#[test]
fn real_mode_pushes_flags_cs_and_ip_and_iret_returns() {
    let (cpu, _) = reset_cpu();
    let mut bench = Bench { cpu };
    bench.cpu.sys.segments[sreg::CS] = Segment::real(0x2000, true);
    bench.cpu.sys.segments[sreg::SS] = Segment::real(0x3000, false);
    bench.cpu.set_reg(4, 0x8000u32);
    bench.cpu.rip = 0x123;
    let flags = rflags::IF | rflags::TF | rflags::CF | rflags::DF;
    bench.cpu.set_rflags(flags);
    bench.put32(13 * 4, 0x4567_89ab);

    // An exception's error code is not pushed in real mode.
    bench.cpu.deliver_exception(gp(0)).unwrap();

    let cpu = &bench.cpu;
    assert_eq!((bench.selector(sreg::CS), cpu.rip), (0x4567, 0x89ab));
    assert_eq!(cpu.sys.segments[sreg::CS].base, 0x45670);
    assert_eq!(cpu.rflags(), rflags::CF | rflags::DF | 2);
    let pushed = (flags | rflags::ONE) & 0xffff;
    assert_eq!(bench.sp(), 0x7ffa);
    assert_eq!(bench.get(0x37ffa, 2), [0x123, 0x2000, pushed]);

    bench.runs(&[0xcf]);
    assert_eq!((bench.selector(sreg::CS), bench.cpu.rip), (0x2000, 0x123));
    assert_eq!(bench.cpu.rflags(), flags | 2);
    assert_eq!(bench.sp(), 0x8000);
}

#[test]
fn real_mode_vector_beyond_the_table_triple_faults_in_the_end() {
    let (mut cpu, _) = reset_cpu();
    cpu.sys.idtr.limit = 4 * 3 - 1;
    assert_eq!(cpu.deliver_exception(gp(0)), Err(Stop::Shutdown));
}

#[test]
fn gate_types_decide_frame_size_and_interrupt_flag() {
    for (kind, size, masks) in [
        (INTERRUPT, 4, true),
        (TRAP, 4, false),
        (INTERRUPT16, 2, true),
        (TRAP16, 2, false),
    ] {
        let mut bench = Bench::protected();
        bench.gate(VECTOR, CODE0, kind, 0);
        bench.cpu.rip = 0x1234;
        bench
            .cpu
            .set_rflags(rflags::IF | rflags::NT | rflags::TF | rflags::CF);
        bench
            .cpu
            .deliver_interrupt(VECTOR, EventKind::External)
            .unwrap();
        let pushed = rflags::IF | rflags::NT | rflags::TF | rflags::CF | 2;
        assert_eq!(bench.sp(), STACK - 3 * size);
        let frame = bench.get(bench.sp(), size);
        assert_eq!(frame, [0x1234, u64::from(CODE0), pushed]);
        let kept = if masks { 0 } else { rflags::IF };
        assert_eq!(bench.cpu.rflags(), kept | rflags::CF | 2, "{kind:#x}");
        let mask = if size == 2 { 0xffff } else { u64::MAX };
        assert_eq!(bench.cpu.rip, HANDLER & mask);
    }
}

#[test]
fn inner_level_gets_the_stack_of_the_tss() {
    for (kind, size) in [(INTERRUPT, 4), (INTERRUPT16, 2)] {
        let mut bench = Bench::protected().user();
        bench.cpu.set_reg(4, 0x5678u32);
        bench.gate(13, CODE0, kind, 0);
        bench.cpu.deliver_exception(gp(0x1234)).unwrap();
        assert_eq!(bench.cpu.cpl, 0);
        assert_eq!(bench.selector(sreg::CS), CODE0);
        assert_eq!(bench.selector(sreg::SS), DATA0);
        assert_eq!(bench.sp(), STACK0 - 6 * size);
        let mask = u64::MAX >> (64 - size * 8);
        let flags = rflags::IF | rflags::RF | 2;
        assert_eq!(
            bench.get(bench.sp(), size),
            [
                0x1234,
                CODE & mask,
                CODE3.into(),
                flags & mask,
                0x5678,
                DATA3.into()
            ]
        );
        // Data segments stay as they are on the way in.
        assert_eq!(bench.selector(sreg::DS), DATA3);
    }
}

#[test]
fn inner_level_with_a_16_bit_tss() {
    let mut bench = Bench::protected().user();
    bench.cpu.sys.tr.access = access::P | system::TSS16_BUSY;
    bench.cpu.sys.tr.limit = 0x2b;
    bench.put16(TSS + 2, 0x9000);
    bench.put16(TSS + 4, DATA0);
    bench.interrupt_gate(VECTOR);
    bench
        .cpu
        .deliver_interrupt(VECTOR, EventKind::External)
        .unwrap();
    assert_eq!((bench.selector(sreg::SS), bench.sp()), (DATA0, 0x9000 - 20));
}

#[test]
fn conforming_handler_runs_at_the_interrupted_level() {
    let mut bench = Bench::protected().user();
    bench.gate(VECTOR, CONFORMING, INTERRUPT, 0);
    bench
        .cpu
        .deliver_interrupt(VECTOR, EventKind::External)
        .unwrap();
    assert_eq!(bench.cpu.cpl, 3);
    assert_eq!(bench.selector(sreg::CS), CONFORMING | 3);
    assert_eq!(bench.sp(), STACK - 12);
}

#[test]
fn errors_of_gates_and_handlers() {
    // The error codes are those of a software interrupt; others add EXT.
    type Prepare = fn(&mut Bench);
    let cases: [(&str, Prepare, Exception); 15] = [
        (
            "beyond the table",
            |b| b.cpu.sys.idtr.limit = u16::from(VECTOR) * 8 + 6,
            gp(GATE_CODE),
        ),
        (
            "a call gate",
            |b| b.gate(VECTOR, CODE0, access::P | system::CALL_GATE | DPL3, 0),
            gp(GATE_CODE),
        ),
        (
            "a code segment",
            |b| b.gate(VECTOR, CODE0, INTERRUPT | access::S | DPL3, 0),
            gp(GATE_CODE),
        ),
        (
            "absent",
            |b| b.gate(VECTOR, CODE0, system::INTERRUPT_GATE | DPL3, 0),
            np(GATE_CODE),
        ),
        (
            "null handler",
            |b| b.gate(VECTOR, 3, INTERRUPT | DPL3, 0),
            gp(0),
        ),
        (
            "handler outside",
            |b| b.gate(VECTOR, OUTSIDE, INTERRUPT | DPL3, 0),
            gp(OUTSIDE.into()),
        ),
        (
            "handler local",
            |b| b.gate(VECTOR, 0x0c, INTERRUPT | DPL3, 0),
            gp(0x0c),
        ),
        (
            "handler is data",
            |b| b.gate(VECTOR, DATA0, INTERRUPT | DPL3, 0),
            gp(DATA0.into()),
        ),
        (
            "handler absent",
            |b| b.gate(VECTOR, ABSENT_CODE, INTERRUPT | DPL3, 0),
            np(ABSENT_CODE.into()),
        ),
        ("small TSS", |b| b.cpu.sys.tr.limit = 8, ts(TASK.into())),
        ("null stack", |b| b.put32(TSS + 8, 0), ts(0)),
        (
            "stack outside",
            |b| b.put32(TSS + 8, OUTSIDE.into()),
            ts(OUTSIDE.into()),
        ),
        (
            "stack of another level",
            |b| b.put32(TSS + 8, DATA3.into()),
            ts(0x20),
        ),
        (
            "read-only stack",
            |b| b.put32(TSS + 8, READ_ONLY.into()),
            ts(READ_ONLY.into()),
        ),
        (
            "absent stack",
            |b| b.put32(TSS + 8, ABSENT_DATA.into()),
            ss(ABSENT_DATA.into()),
        ),
    ];
    for (what, prepare, expected) in cases {
        let mut bench = Bench::protected().user();
        bench.gate(VECTOR, CODE0, INTERRUPT | DPL3, 0);
        prepare(&mut bench);
        assert_eq!(
            fault_of(&mut bench, EventKind::Software),
            expected,
            "{what}"
        );
        let external = Exception {
            error_code: expected.error_code.map(|code| code | 1),
            ..expected
        };
        assert_eq!(
            fault_of(&mut bench, EventKind::External),
            external,
            "{what}"
        );
        assert_eq!(
            fault_of(&mut bench, EventKind::PrivilegedSoftware),
            external,
            "{what}"
        );
    }
}

#[test]
fn privilege_of_the_gate_counts_for_software_interrupts_only() {
    for (kind, allowed) in [
        (EventKind::Software, false),
        (EventKind::PrivilegedSoftware, true),
        (EventKind::External, true),
    ] {
        let mut bench = Bench::protected().user();
        bench.interrupt_gate(VECTOR);
        if allowed {
            bench.cpu.deliver_interrupt(VECTOR, kind).unwrap();
            assert_eq!(bench.cpu.cpl, 0);
        } else {
            assert_eq!(fault_of(&mut bench, kind), gp(GATE_CODE));
        }
    }
}

#[test]
fn handler_beyond_its_segment_is_refused() {
    let mut bench = Bench::protected();
    bench.put(GDT + u64::from(SPARE), descriptor(0, 0xff, 0x409b));
    bench.gate(VECTOR, SPARE, INTERRUPT, 0);
    assert_eq!(fault_of(&mut bench, EventKind::External), gp(1));
}

#[test]
fn stack_without_room_is_refused() {
    let mut bench = Bench::protected();
    bench.interrupt_gate(VECTOR);
    bench.cpu.set_reg(4, 8u32);
    bench.cpu.sys.segments[sreg::SS].limit = 0xffff;
    // The frame wraps to the top of the address space, beyond the limit.
    assert_eq!(fault_of(&mut bench, EventKind::External), ss(1));

    let mut bench = Bench::protected().user();
    bench.interrupt_gate(VECTOR);
    bench.put(GDT + u64::from(SPARE), descriptor(0, 0xfff, 0x4093));
    bench.put32(TSS + 8, SPARE.into());
    assert_eq!(
        fault_of(&mut bench, EventKind::External),
        ss(u32::from(SPARE) | 1)
    );
}

#[test]
fn frame_wraps_around_a_16_bit_stack() {
    let mut bench = Bench::protected();
    bench.gate(VECTOR, CODE0, INTERRUPT16, 0);
    bench.cpu.sys.segments[sreg::SS] = vm86_segment(0x6000);
    bench.cpu.sys.segments[sreg::SS].access &= !DPL3;
    bench.cpu.update_mode();
    bench.cpu.set_reg(4, 0xabcd_0002u32);
    bench
        .cpu
        .deliver_interrupt(VECTOR, EventKind::External)
        .unwrap();
    // Only SP moved.
    assert_eq!(bench.cpu.reg::<u32>(4), 0xabcd_fffc);
    assert_eq!(bench.get(0x60000, 2), [rflags::IF | 2]);
    assert_eq!(bench.get(0x6fffc, 2), [CODE & 0xffff, u64::from(CODE0)]);
}

#[test]
fn accessed_bits_of_handler_and_stack_are_set() {
    let mut bench = Bench::protected().user();
    bench.interrupt_gate(VECTOR);
    bench
        .cpu
        .deliver_interrupt(VECTOR, EventKind::External)
        .unwrap();
    for selector in [CODE0, DATA0] {
        let [value] = bench.get(GDT + u64::from(selector), 8);
        assert_eq!(value >> 40 & 1, 1, "{selector:#x}");
    }
}

#[test]
fn long_mode_switches_to_rsp0_aligned() {
    let mut bench = Bench::long().user();
    bench.put(TSS + 4, STACK0 + 0xb);
    bench.interrupt_gate(14);
    bench.cpu.set_reg(4, 0x1237u64);
    let fault = Exception::page_fault(0xffff_8000_dead_beef, 6);
    bench.cpu.deliver_exception(fault).unwrap();
    let cpu = &bench.cpu;
    assert_eq!(cpu.sys.cr2, 0xffff_8000_dead_beef);
    assert_eq!(
        (cpu.cpl, cpu.code_size, cpu.rip),
        (0, CodeSize::Bits64, HANDLER)
    );
    assert_eq!(cpu.sys.segments[sreg::SS], null_stack_segment(0));
    assert_eq!(bench.sp(), STACK0 - 48);
    let flags = rflags::IF | rflags::RF | 2;
    assert_eq!(
        bench.get(bench.sp(), 8),
        [6, CODE, CODE3_64.into(), flags, 0x1237, DATA3.into()]
    );
    assert_eq!(cpu.rflags(), 2);

    // And back: the error code goes, the rest returns.
    bench.cpu.drop_from_stack(8);
    bench.runs(&[0x48, 0xcf]);
    assert_eq!(
        (bench.cpu.cpl, bench.cpu.rip, bench.sp()),
        (3, CODE, 0x1237)
    );
    assert_eq!(bench.cpu.rflags(), flags);
    assert_eq!(bench.selector(sreg::SS), DATA3);
}

#[test]
fn long_mode_same_level_keeps_ss_and_aligns() {
    let mut bench = Bench::long();
    bench.gate(VECTOR, CODE0, TRAP, 0);
    bench.cpu.set_reg(4, STACK - 3);
    bench
        .cpu
        .deliver_interrupt(VECTOR, EventKind::External)
        .unwrap();
    assert_eq!(bench.sp(), STACK - 16 - 40);
    assert_eq!(bench.selector(sreg::SS), DATA0);
    assert_eq!(
        bench.get(bench.sp(), 8),
        [CODE, CODE0.into(), rflags::IF | 2, STACK - 3, DATA0.into()]
    );
    bench.runs(&[0x48, 0xcf]);
    assert_eq!((bench.sp(), bench.cpu.rip), (STACK - 3, CODE));
}

#[test]
fn interrupt_stack_table_wins_at_any_level() {
    for user in [false, true] {
        let mut bench = Bench::long();
        if user {
            bench = bench.user();
        }
        bench.gate(VECTOR, CODE0, INTERRUPT, 1);
        bench.cpu.deliver_interrupt(VECTOR, EventKind::Nmi).unwrap();
        assert_eq!(bench.sp(), (IST1 & !15) - 40);
        assert_eq!(bench.get(bench.sp() + 24, 8), [STACK]);
        let stack = if user { 0 } else { DATA0 };
        assert_eq!(bench.selector(sreg::SS), stack);
    }
}

#[test]
fn long_mode_interrupts_compatibility_code() {
    let mut bench = Bench::long().user();
    bench.cpu.sys.segments[sreg::CS] =
        Segment::flat(CODE3, access::CODE | access::READABLE | access::DB | DPL3);
    bench.cpu.update_mode();
    assert_eq!(bench.cpu.code_size, CodeSize::Bits32);
    bench.interrupt_gate(VECTOR);
    bench
        .cpu
        .deliver_interrupt(VECTOR, EventKind::External)
        .unwrap();
    assert_eq!(bench.cpu.code_size, CodeSize::Bits64);
    assert_eq!(bench.sp(), STACK0 - 40);
    bench.runs(&[0x48, 0xcf]);
    assert_eq!((bench.cpu.code_size, bench.cpu.cpl), (CodeSize::Bits32, 3));
    assert_eq!((bench.cpu.rip, bench.sp()), (CODE, STACK));
}

#[test]
fn errors_in_long_mode() {
    type Prepare = fn(&mut Bench);
    let cases: [(&str, Prepare, Exception); 9] = [
        (
            "beyond the table",
            |b| b.cpu.sys.idtr.limit = u16::from(VECTOR) * 16 + 14,
            gp(GATE_CODE),
        ),
        (
            "16-bit gate",
            |b| b.gate(VECTOR, CODE0, INTERRUPT16 | DPL3, 0),
            gp(GATE_CODE),
        ),
        (
            "task gate",
            |b| b.gate(VECTOR, CODE0, access::P | system::TASK_GATE | DPL3, 0),
            gp(GATE_CODE),
        ),
        (
            "32-bit handler",
            |b| b.gate(VECTOR, CODE16, INTERRUPT | DPL3, 0),
            gp(CODE16.into()),
        ),
        (
            "absent handler",
            |b| b.gate(VECTOR, ABSENT_CODE, INTERRUPT | DPL3, 0),
            np(ABSENT_CODE.into()),
        ),
        ("small TSS", |b| b.cpu.sys.tr.limit = 10, ts(TASK.into())),
        (
            "small TSS for IST 7",
            |b| {
                b.gate(VECTOR, CODE0, INTERRUPT | DPL3, 7);
                b.cpu.sys.tr.limit = 28 + 7 * 8 + 6;
            },
            ts(TASK.into()),
        ),
        (
            "non-canonical stack",
            |b| b.put(TSS + 4, 0x8000_0000_1000),
            ss(0),
        ),
        (
            "non-canonical handler",
            |b| b.put(IDT + u64::from(VECTOR) * 16 + 8, 0x8000),
            gp(0),
        ),
    ];
    for (what, prepare, expected) in cases {
        let mut bench = Bench::long().user();
        bench.gate(VECTOR, CODE0, INTERRUPT | DPL3, 0);
        prepare(&mut bench);
        assert_eq!(
            fault_of(&mut bench, EventKind::Software),
            expected,
            "{what}"
        );
        let external = Exception {
            error_code: expected.error_code.map(|code| code | 1),
            ..expected
        };
        assert_eq!(
            fault_of(&mut bench, EventKind::External),
            external,
            "{what}"
        );
    }
}

/// Makes the 2 MiB page at `gpa` not present.
fn unmap(bench: &mut Bench, gpa: u64) {
    bench.put(PAGE_TABLES + 0x2000 + (gpa >> 21) * 8, 0);
    bench.cpu.tlb.flush_all();
}

#[test]
fn page_fault_in_delivery_has_no_effect_but_itself() {
    let mut bench = Bench::long().user();
    bench.interrupt_gate(VECTOR);
    bench.put(TSS + 4, 0x40_0000);
    unmap(&mut bench, 0x3f_ffff);
    // The first push faults.
    let expected = Exception::page_fault(0x40_0000 - 8, 2);
    assert_eq!(fault_of(&mut bench, EventKind::External), expected);
}

#[test]
fn exception_in_delivery_of_an_exception_makes_a_double_fault() {
    let mut bench = Bench::long().user();
    // #GP has no gate.
    bench.gate(13, CODE0, 0, 0);
    bench.gate(8, CODE0, INTERRUPT, 1);
    bench.cpu.deliver_exception(gp(0x18)).unwrap();
    assert_eq!(bench.cpu.rip, HANDLER);
    assert_eq!(bench.sp(), (IST1 & !15) - 48);
    assert_eq!(bench.get(bench.sp(), 8), [0, CODE, CODE3_64.into()]);
}

#[test]
fn page_fault_on_the_page_fault_handlers_stack_makes_a_double_fault() {
    let mut bench = Bench::long().user();
    bench.put(TSS + 4, 0x40_0000);
    unmap(&mut bench, 0x3f_ffff);
    bench.interrupt_gate(14);
    bench.gate(8, CODE0, INTERRUPT, 1);
    bench
        .cpu
        .deliver_exception(Exception::page_fault(0x1234, 4))
        .unwrap();
    assert_eq!(bench.sp(), (IST1 & !15) - 48);
    // CR2 has the address of a fault that was detected, delivered or not.
    assert_eq!(bench.cpu.sys.cr2, 0x40_0000 - 8);
}

#[test]
fn benign_exception_gives_way_to_the_fault_in_its_delivery() {
    let mut bench = Bench::long().user();
    bench.gate(6, CODE0, 0, 0);
    bench.interrupt_gate(13);
    bench.cpu.deliver_exception(Exception::UD).unwrap();
    assert_eq!(bench.get(bench.sp(), 8), [6 << 3 | 2 | 1, CODE]);
}

#[test]
fn fault_in_the_delivery_of_a_double_fault_shuts_down() {
    for mut bench in [
        Bench::long().user(),
        Bench::protected().user(),
        Bench::vm86(3),
    ] {
        bench.cpu.sys.idtr.limit = 0;
        assert_eq!(
            bench.cpu.deliver_exception(Exception::UD),
            Err(Stop::Shutdown)
        );
    }
}

#[test]
fn faults_push_rf_and_others_do_not() {
    let cases = [
        (Exception::UD, 0, true),
        (gp(0), 1, true),
        (Exception::plain(Vector::DB), 0, false),
        (Exception::plain(Vector::BP), 0, false),
        (Exception::plain(Vector::MF), 0, true),
    ];
    for (exception, code, pushed) in cases {
        let mut bench = Bench::protected();
        bench.interrupt_gate(exception.vector.0);
        bench.cpu.deliver_exception(exception).unwrap();
        let [flags] = bench.get(bench.sp() + 8 + code * 4, 4);
        assert_eq!(flags & rflags::RF != 0, pushed, "{exception:?}");
        assert_eq!(bench.cpu.rflags() & rflags::RF, 0);
    }
}

#[test]
fn software_interrupt_pushes_no_rf() {
    let mut bench = Bench::protected();
    bench.interrupt_gate(VECTOR);
    bench.cpu.system_flags |= rflags::RF;
    bench.runs(&[0xcd, VECTOR]);
    let frame = bench.get(bench.sp(), 4);
    assert_eq!(frame, [CODE + 2, CODE0.into(), rflags::IF | 2]);
}

#[test]
fn debug_exception_clears_general_detect() {
    let mut bench = Bench::protected();
    bench.interrupt_gate(1);
    bench.cpu.sys.dr7 |= dr::DR7_GD;
    bench
        .cpu
        .deliver_exception(Exception::plain(Vector::DB))
        .unwrap();
    assert_eq!(bench.cpu.sys.dr7, dr::DR7_ONE);
}

#[test]
fn nmis_are_blocked_until_iret() {
    for (mut bench, iret) in [
        (Bench::long(), &[0x48, 0xcf][..]),
        (Bench::protected(), &[0xcf][..]),
    ] {
        bench.interrupt_gate(2);
        bench.cpu.deliver_interrupt(2, EventKind::Nmi).unwrap();
        assert!(bench.cpu.sys.nmi_blocked);
        bench.runs(iret);
        assert!(!bench.cpu.sys.nmi_blocked);
    }
}

#[test]
fn vm86_goes_to_level_0_with_all_its_segments() {
    for (kind, size) in [(INTERRUPT, 4), (INTERRUPT16, 2)] {
        let mut bench = Bench::vm86(0);
        bench.gate(13, CODE0, kind, 0);
        bench.cpu.rip = 0x77;
        bench.cpu.deliver_exception(gp(0)).unwrap();
        assert_eq!((bench.cpu.cpl, bench.cpu.code_size), (0, CodeSize::Bits32));
        assert!(!bench.cpu.is_vm86());
        assert_eq!(bench.sp(), STACK0 - 10 * size);
        let flags = rflags::VM | rflags::IF | rflags::RF | 2;
        assert_eq!(
            bench.get(bench.sp(), size),
            [
                0,
                0x77,
                0x4000,
                flags & (u64::MAX >> (64 - size * 8)),
                0x8000,
                0x1000,
                0x1111,
                0x3333,
                0x4444,
                0x5555
            ]
        );
        for index in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            assert!(!bench.cpu.sys.segments[index].is_usable());
        }
    }
}

#[test]
fn iret_returns_to_vm86() {
    let mut bench = Bench::vm86(0);
    bench.interrupt_gate(VECTOR);
    let before = bench.registers();
    bench
        .cpu
        .deliver_interrupt(VECTOR, EventKind::External)
        .unwrap();
    assert!(!bench.cpu.is_vm86());
    bench.runs(&[0xcf]);
    assert!(bench.cpu.is_vm86());
    assert_eq!(bench.cpu.code_size, CodeSize::Bits16);
    assert_eq!(bench.registers(), before);
}

#[test]
fn vm86_handler_must_be_of_level_0() {
    for (selector, code) in [(CONFORMING, CONFORMING), (SPARE, SPARE)] {
        let mut bench = Bench::vm86(0);
        bench.put(GDT + u64::from(SPARE), descriptor(0, 0xfffff, 0xc0bb));
        bench.gate(VECTOR, selector, INTERRUPT, 0);
        assert_eq!(
            fault_of(&mut bench, EventKind::External),
            gp(u32::from(code) | 1)
        );
    }
}

#[test]
fn int_n_in_vm86_without_extensions_needs_io_privilege() {
    let mut bench = Bench::vm86(2);
    bench.gate(VECTOR, CODE0, INTERRUPT | DPL3, 0);
    assert_eq!(bench.faults(&[0xcd, VECTOR]), gp(0));
    // INT3 does not.
    bench.gate(3, CODE0, INTERRUPT | DPL3, 0);
    bench.runs(&[0xcc]);
    assert_eq!(bench.cpu.cpl, 0);

    let mut bench = Bench::vm86(3);
    bench.gate(VECTOR, CODE0, INTERRUPT | DPL3, 0);
    bench.runs(&[0xcd, VECTOR]);
    assert_eq!(bench.cpu.cpl, 0);
}

/// A TSS with both bit maps; `redirected` clears the vector's bit.
fn with_redirection(bench: &mut Bench, redirected: bool) {
    bench.cpu.sys.cr4 |= cr4::VME;
    bench.cpu.sys.tr.limit = 0x200;
    bench.put16(TSS + 102, 0x88);
    let bit = if redirected { 0 } else { 1 << (VECTOR % 8) };
    bench.put(TSS + 0x68 + u64::from(VECTOR / 8), bit);
    bench.put32(u64::from(VECTOR) * 4, 0x4321_0567);
}

#[test]
fn redirected_int_n_stays_in_vm86() {
    for (iopl, virtual_flag) in [(3, false), (0, false), (0, true)] {
        let mut bench = Bench::vm86(iopl);
        with_redirection(&mut bench, true);
        if virtual_flag {
            bench.cpu.system_flags |= rflags::VIF;
        }
        bench.runs(&[0xcd, VECTOR]);
        assert!(bench.cpu.is_vm86());
        assert_eq!((bench.selector(sreg::CS), bench.cpu.rip), (0x4321, 0x567));
        let shown = if iopl == 3 || virtual_flag {
            rflags::IF
        } else {
            0
        };
        let frame = bench.get(0x10000 + 0x7ffa, 2);
        assert_eq!(frame, [2, 0x4000, shown | rflags::IOPL | 2], "IOPL {iopl}");
        assert_eq!(bench.cpu.rflags() & rflags::IF != 0, iopl != 3);
        assert_eq!(bench.cpu.rflags() & rflags::VIF, 0);
    }
}

#[test]
fn int_n_that_is_not_redirected_needs_io_privilege() {
    let mut bench = Bench::vm86(0);
    with_redirection(&mut bench, false);
    bench.gate(VECTOR, CODE0, INTERRUPT | DPL3, 0);
    assert_eq!(bench.faults(&[0xcd, VECTOR]), gp(0));

    let mut bench = Bench::vm86(3);
    with_redirection(&mut bench, false);
    bench.gate(VECTOR, CODE0, INTERRUPT | DPL3, 0);
    bench.runs(&[0xcd, VECTOR]);
    assert_eq!(bench.cpu.cpl, 0);
}

#[test]
fn redirection_map_outside_the_tss_is_refused() {
    for (limit, map) in [(0x66, 0x88), (0x200, 0x10), (0x6f, 0x88)] {
        let mut bench = Bench::vm86(3);
        with_redirection(&mut bench, true);
        bench.cpu.sys.tr.limit = limit;
        bench.put16(TSS + 102, map);
        assert_eq!(bench.faults(&[0xcd, VECTOR]), gp(0), "{limit:#x} {map:#x}");
    }
}

#[test]
fn single_byte_interrupts_have_their_vectors() {
    for (bytes, vector) in [(&[0xcc][..], 3), (&[0xf1], 1), (&[0xce], 4)] {
        let mut bench = Bench::protected();
        bench.interrupt_gate(vector);
        bench.cpu.flags.put(rflags::OF);
        bench.runs(bytes);
        assert_eq!(bench.cpu.rip, HANDLER);
        assert_eq!(bench.get(bench.sp(), 4), [CODE + 1]);
    }
}

#[test]
fn into_without_overflow_does_nothing() {
    let mut bench = Bench::protected();
    bench.runs(&[0xce]);
    assert_eq!((bench.cpu.rip, bench.sp()), (CODE + 1, STACK));
}

#[test]
fn bound_compares_signed_and_inclusively() {
    let faults = Some(Exception::plain(Vector::BR));
    for (index, expected) in [
        (-5, None),
        (7, None),
        (0, None),
        (-6, faults),
        (8, faults),
        (i32::MIN, faults),
    ] {
        let mut bench = Bench::protected();
        bench.put32(0x6000, -5i32 as u32);
        bench.put32(0x6004, 7);
        bench.cpu.set_reg(0, index as u32);
        bench.cpu.set_reg(3, 0x6000u32);
        // BOUND EAX, [EBX]
        let outcome = bench.run(&[0x62, 0x03]).err().map(|_| bench.cpu.exception);
        assert_eq!(outcome, expected, "{index}");
    }
}

#[test]
fn ud_instructions_raise_ud() {
    for bytes in [&[0x0f, 0x0b][..], &[0x0f, 0xb9, 0xc0], &[0x0f, 0xff, 0xc0]] {
        assert_eq!(Bench::protected().faults(bytes), Exception::UD);
    }
}

#[test]
fn event_ends_the_shadow() {
    let mut bench = Bench::long();
    bench.interrupt_gate(6);
    bench.cpu.sys.shadow = trapgate_x86::InterruptShadow::MovSs;
    bench.cpu.deliver_exception(Exception::UD).unwrap();
    assert_eq!(bench.cpu.sys.shadow, trapgate_x86::InterruptShadow::None);
}

/// What a MOV SS in which a data breakpoint hit, and the instruction after it, lead to: where the
/// processor is then, and DR6.
fn after_watched_mov_ss(next: &[u8]) -> (u64, u64) {
    let mut bench = Bench::long();
    bench.interrupt_gate(1);
    bench.gate(3, CODE0, INTERRUPT, 1);
    bench.put(0x6000, u64::from(DATA0));
    // MOV SS, [RSI]
    let code: Vec<u8> = [&[0x8e, 0x16][..], next].concat();
    bench.cpu.memory.write(CODE, &code).unwrap();
    let mut state = bench.cpu.export();
    state.gpr[gpr::RSI] = 0x6000;
    state.system.dr[0] = 0x6000;
    state.system.dr7 = dr::DR7_ONE | 1 | 0b0111 << 16;
    let memory = std::sync::Arc::clone(&bench.cpu.memory);
    let world = crate::testing::TestWorld::default();
    let profile = bench.cpu.profile.clone();
    let mut cpu = crate::Interpreter::new(memory, Box::new(world), profile, 0, 1);
    cpu.set_state(&state).unwrap();

    assert_eq!(cpu.step(), trapgate_engine::Exit::Debug);
    assert_eq!(cpu.state().rip, CODE + 2);
    assert_eq!(cpu.state().system.dr6, dr::DR6_ONES);
    assert_eq!(cpu.step(), trapgate_engine::Exit::Debug);

    let state = cpu.state();
    (bench.get::<1>(state.gpr[gpr::RSP], 8)[0], state.system.dr6)
}

/// SDM vol. 3A, 7.8.3.
#[test]
fn breakpoint_in_mov_ss_is_told_after_the_next_instruction() {
    let told = dr::DR6_ONES | 1;
    assert_eq!(after_watched_mov_ss(&[0x90]), (CODE + 3, told), "NOP");
    assert_eq!(after_watched_mov_ss(&[0xcc]), (HANDLER, told), "INT3");
    // INT1 is a #DB already, and the only one.
    assert_eq!(after_watched_mov_ss(&[0xf1]), (CODE + 3, told), "INT1");
}

#[test]
fn table_of_another_place_is_used() {
    let mut bench = Bench::long();
    bench.cpu.sys.idtr = TableRegister {
        base: 0x9000,
        limit: 0xfff,
    };
    bench.put(0x9000 + 6 * 16, gate(CODE0, 0x1_2345, INTERRUPT, 0));
    bench.cpu.deliver_exception(Exception::UD).unwrap();
    assert_eq!(bench.cpu.rip, 0x1_2345);
}

/// Whatever IF says by now: the interrupt controller has given it away.
#[test]
fn interrupt_that_another_engine_acknowledged_is_delivered_before_anything_else() {
    let mut bench = Bench::long();
    bench.interrupt_gate(VECTOR);
    let mut state = bench.cpu.export();
    state.interrupt = Some(VECTOR);
    state.rflags &= !rflags::IF;
    let memory = std::sync::Arc::clone(&bench.cpu.memory);
    let world = crate::testing::TestWorld::default();
    let profile = bench.cpu.profile.clone();
    let mut cpu = crate::Interpreter::new(memory, Box::new(world), profile, 0, 1);
    cpu.set_state(&state).unwrap();

    assert_eq!(cpu.step(), trapgate_engine::Exit::Debug);

    let after = cpu.state();
    assert_eq!((after.rip, after.interrupt), (HANDLER, None));
}
