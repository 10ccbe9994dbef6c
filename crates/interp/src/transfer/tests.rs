use trapgate_x86::descriptor::{access, system};
use trapgate_x86::registers::{efer, rflags, sreg};
use trapgate_x86::{Exception, Segment};

use crate::cpu::CodeSize;
use crate::frame::null_stack_segment;
use crate::system_testing::*;
use crate::testing::reset_cpu;

const CALL_GATE: u32 = access::P | system::CALL_GATE;
const CALL_GATE16: u32 = access::P | system::CALL_GATE16;
const DPL3: u32 = access::DPL;

/// CALL or JMP ptr16:32.
fn far(opcode: u8, selector: u16, offset: u32) -> Vec<u8> {
    let mut bytes = vec![opcode];
    bytes.extend(offset.to_le_bytes());
    bytes.extend(selector.to_le_bytes());
    bytes
}

const CALL: u8 = 0x9a;
const JMP: u8 = 0xea;
const RETF: &[u8] = &[0xcb];

/// CALL [RBX] with a 10-byte, a 6-byte or a 4-byte pointer; JMP is two more.
const CALL_M64: &[u8] = &[0x48, 0xff, 0x1b];
const CALL_M32: &[u8] = &[0xff, 0x1b];
const JMP_M64: &[u8] = &[0x48, 0xff, 0x2b];

/// Puts a far pointer at 0x6000, where RBX points.
fn pointer(bench: &mut Bench, size: u64, offset: u64, selector: u16) {
    bench.put(0x6000, offset);
    bench.put16(0x6000 + size, selector);
    bench.cpu.set_reg(3, 0x6000u64);
}

fn spare_gate(bench: &mut Bench, selector: u16, access: u32, parameters: u8) {
    let value = gate(selector, HANDLER, access, parameters);
    bench.put(GDT + u64::from(SPARE), value);
    bench.put(GDT + u64::from(SPARE) + 8, 0);
}

#[test]
fn real_mode_far_call_and_return() {
    let (cpu, _) = reset_cpu();
    let mut bench = Bench { cpu };
    bench.cpu.sys.segments[sreg::CS] = Segment::real(0x2000, true);
    bench.cpu.sys.segments[sreg::SS] = Segment::real(0x3000, false);
    bench.cpu.set_reg(4, 0x8000u32);
    bench.cpu.rip = 0x100;
    bench.runs(&[0x9a, 0x34, 0x12, 0x00, 0x50]);
    assert_eq!(bench.cpu.rip, 0x1234);
    assert_eq!(
        bench.cpu.sys.segments[sreg::CS],
        Segment::real(0x5000, true)
    );
    assert_eq!(bench.get(0x37ffc, 2), [0x105, 0x2000]);
    // RETF 4
    bench.runs(&[0xca, 4, 0]);
    assert_eq!((bench.cpu.rip, bench.sp()), (0x105, 0x8004));
    assert_eq!(
        bench.cpu.sys.segments[sreg::CS],
        Segment::real(0x2000, true)
    );
}

#[test]
fn real_mode_target_beyond_the_segment_is_refused() {
    let (cpu, _) = reset_cpu();
    let mut bench = Bench { cpu };
    bench.cpu.rip = 0x100;
    // JMP 0x5000:0x10000
    assert_eq!(bench.faults(&[0x66, 0xea, 0, 0, 1, 0, 0, 0x50]), gp(0));
}

#[test]
fn far_jump_enters_protected_mode() {
    let mut bench = Bench::protected();
    // As right after CR0.PE was set: CS and SS are still those of real mode.
    bench.cpu.sys.segments[sreg::CS] = Segment::real(0x100, true);
    bench.cpu.sys.segments[sreg::SS] = Segment::real(0x3000, false);
    bench.cpu.update_mode();
    assert_eq!(bench.cpu.code_size, CodeSize::Bits16);
    bench.runs(&[0x66, 0xea, 0x78, 0x56, 0x34, 0x12, CODE0 as u8, 0]);
    assert_eq!(
        (bench.cpu.code_size, bench.cpu.rip),
        (CodeSize::Bits32, 0x1234_5678)
    );
}

#[test]
fn direct_targets_and_their_errors() {
    // Who may go where; a selector's level counts for nonconforming code only.
    for (user, selector, expected) in [
        (false, CODE0, Ok(CODE0)),
        (false, CODE0 | 3, Err(gp(CODE0.into()))),
        (false, CONFORMING | 3, Ok(CONFORMING)),
        (false, CODE3, Err(gp(0x18))),
        (false, 3, Err(gp(0))),
        (false, OUTSIDE, Err(gp(OUTSIDE.into()))),
        (false, 0x0c, Err(gp(0x0c))),
        (false, DATA0, Err(gp(DATA0.into()))),
        (false, ABSENT_CODE, Err(np(ABSENT_CODE.into()))),
        (false, CODE16, Err(gp(0))),
        (true, CODE3 & !3, Ok(CODE3)),
        (true, CODE0, Err(gp(CODE0.into()))),
        (true, CONFORMING, Ok(CONFORMING | 3)),
        (true, TASK, Err(gp(TASK.into()))),
    ] {
        for opcode in [CALL, JMP] {
            let mut bench = Bench::protected();
            if user {
                bench = bench.user();
            }
            let level = bench.cpu.cpl;
            let code = far(opcode, selector, 0x1_0000);
            match expected {
                Ok(loaded) => {
                    let from = u64::from(bench.selector(sreg::CS));
                    bench.runs(&code);
                    assert_eq!(bench.selector(sreg::CS), loaded);
                    assert_eq!((bench.cpu.rip, bench.cpu.cpl), (0x1_0000, level));
                    let pushed = if opcode == CALL { 8 } else { 0 };
                    assert_eq!(bench.sp(), STACK - pushed);
                    let frame = if opcode == CALL {
                        [CODE + 7, from]
                    } else {
                        [0, 0]
                    };
                    assert_eq!(bench.get(STACK - 8, 4), frame);
                }
                Err(exception) => assert_eq!(bench.faults(&code), exception, "{selector:#x}"),
            }
        }
    }
}

#[test]
fn call_gate_to_an_inner_level_copies_parameters_and_retf_drops_them() {
    for (kind, size) in [(CALL_GATE, 4), (CALL_GATE16, 2)] {
        let mut bench = Bench::protected().user();
        spare_gate(&mut bench, CODE0, kind | DPL3, 3);
        for value in [0x11, 0x22, 0x33] {
            bench.cpu.push(size, value).unwrap();
        }
        let user_sp = bench.sp();
        // The target's offset is ignored.
        bench.runs(&far(CALL, SPARE | 3, 0xffff_ffff));
        let mask = u64::MAX >> (64 - size * 8);
        assert_eq!((bench.cpu.cpl, bench.cpu.rip), (0, HANDLER & mask));
        assert_eq!(
            (bench.selector(sreg::CS), bench.selector(sreg::SS)),
            (CODE0, DATA0)
        );
        assert_eq!(bench.sp(), STACK0 - 7 * size);
        let back = (CODE + 7) & mask;
        assert_eq!(
            bench.get(bench.sp(), size),
            [
                back,
                CODE3.into(),
                0x33,
                0x22,
                0x11,
                user_sp & mask,
                DATA3.into()
            ]
        );

        // RETF 3 × size, of the gate's size.
        let mut code = vec![0xca, 3 * size as u8, 0];
        if size == 2 {
            code.insert(0, 0x66);
        }
        bench.runs(&code);
        assert_eq!((bench.cpu.cpl, bench.cpu.rip), (3, back));
        assert_eq!(bench.sp(), (user_sp & mask) + 3 * size);
        assert_eq!(bench.selector(sreg::SS), DATA3);
    }
}

#[test]
fn call_gate_at_the_same_level_stays_on_the_stack() {
    for selector in [CODE0, CONFORMING] {
        let mut bench = Bench::protected();
        spare_gate(&mut bench, selector, CALL_GATE, 5);
        bench.runs(&far(CALL, SPARE, 0));
        assert_eq!(
            (bench.selector(sreg::CS), bench.cpu.rip),
            (selector, HANDLER)
        );
        assert_eq!(bench.get(STACK - 8, 4), [CODE + 7, CODE0.into()]);
        assert_eq!(bench.sp(), STACK - 8);
        bench.runs(RETF);
        assert_eq!((bench.cpu.rip, bench.sp()), (CODE + 7, STACK));
    }
}

#[test]
fn call_gate_to_conforming_code_keeps_the_level() {
    let mut bench = Bench::protected().user();
    spare_gate(&mut bench, CONFORMING, CALL_GATE | DPL3, 5);
    bench.runs(&far(CALL, SPARE, 0));
    assert_eq!(
        (bench.cpu.cpl, bench.selector(sreg::CS)),
        (3, CONFORMING | 3)
    );
    assert_eq!(bench.sp(), STACK - 8);
}

#[test]
fn errors_of_call_gates() {
    type Prepare = fn(&mut Bench);
    let cases: [(&str, Prepare, Exception); 11] = [
        (
            "gate of level 0",
            |b| spare_gate(b, CODE0, CALL_GATE, 0),
            gp(SPARE.into()),
        ),
        (
            "absent gate",
            |b| spare_gate(b, CODE0, system::CALL_GATE | DPL3, 0),
            np(SPARE.into()),
        ),
        (
            "interrupt gate",
            |b| spare_gate(b, CODE0, access::P | system::INTERRUPT_GATE | DPL3, 0),
            gp(SPARE.into()),
        ),
        (
            "null code",
            |b| spare_gate(b, 0, CALL_GATE | DPL3, 0),
            gp(0),
        ),
        (
            "code outside",
            |b| spare_gate(b, OUTSIDE, CALL_GATE | DPL3, 0),
            gp(OUTSIDE.into()),
        ),
        (
            "data",
            |b| spare_gate(b, DATA0, CALL_GATE | DPL3, 0),
            gp(DATA0.into()),
        ),
        (
            "absent code",
            |b| spare_gate(b, ABSENT_CODE, CALL_GATE | DPL3, 0),
            np(ABSENT_CODE.into()),
        ),
        (
            "beyond the code",
            |b| spare_gate(b, CODE16, CALL_GATE | DPL3, 0),
            gp(0),
        ),
        ("small TSS", |b| b.cpu.sys.tr.limit = 8, ts(TASK.into())),
        ("null stack", |b| b.put32(TSS + 8, 0), ts(0)),
        (
            "absent stack",
            |b| b.put32(TSS + 8, ABSENT_DATA.into()),
            ss(ABSENT_DATA.into()),
        ),
    ];
    for (what, prepare, expected) in cases {
        let mut bench = Bench::protected().user();
        spare_gate(&mut bench, CODE0, CALL_GATE | DPL3, 2);
        prepare(&mut bench);
        assert_eq!(bench.faults(&far(CALL, SPARE, 0)), expected, "{what}");
    }
}

#[test]
fn jump_through_a_gate_cannot_change_the_level() {
    let mut bench = Bench::protected().user();
    spare_gate(&mut bench, CODE0, CALL_GATE | DPL3, 0);
    assert_eq!(bench.faults(&far(JMP, SPARE, 0)), gp(CODE0.into()));
    spare_gate(&mut bench, CODE3, CALL_GATE | DPL3, 0);
    bench.runs(&far(JMP, SPARE, 0));
    assert_eq!((bench.cpu.rip, bench.sp()), (HANDLER, STACK));
}

#[test]
fn returns_to_an_outer_level_drop_inner_segments() {
    let mut bench = Bench::protected();
    bench.push(4, &[DATA3.into(), 0x7000, CODE3.into(), 0x1234]);
    bench.runs(RETF);
    assert_eq!(
        (bench.cpu.cpl, bench.cpu.rip, bench.sp()),
        (3, 0x1234, 0x7000)
    );
    assert!(!bench.cpu.sys.segments[sreg::DS].is_usable());
}

/// Linux's `sigreturn` selftest sees it.
#[test]
fn returns_to_an_outer_level_clear_null_selectors() {
    // RETFQ and IRETQ.
    for (bytes, flags) in [([0x48, 0xcb], None), ([0x48, 0xcf], Some(2))] {
        let mut bench = Bench::long();
        let null = Segment {
            base: 0x1234_5000,
            ..Segment::null(3)
        };
        bench.cpu.sys.segments[sreg::FS] = null;
        bench.push(8, &[DATA3.into(), 0x7000]);
        bench.push(8, flags.as_slice());
        bench.push(8, &[CODE3_64.into(), 0x1234]);
        bench.runs(&bytes);
        assert_eq!(bench.cpu.cpl, 3);
        let after = Segment {
            selector: 0,
            ..null
        };
        assert_eq!(bench.cpu.sys.segments[sreg::FS], after);
    }
}

#[test]
fn long_mode_call_gate_switches_to_rsp0_and_returns() {
    let mut bench = Bench::long().user();
    spare_gate(&mut bench, CODE0, CALL_GATE | DPL3, 7);
    bench.put(GDT + u64::from(SPARE) + 8, 0xffff_8000);
    pointer(&mut bench, 4, 0, SPARE);
    bench.runs(CALL_M32);
    assert_eq!(
        (bench.cpu.cpl, bench.cpu.rip),
        (0, 0xffff_8000_0000_0000 | HANDLER)
    );
    assert_eq!(bench.cpu.sys.segments[sreg::SS], null_stack_segment(0));
    assert_eq!(bench.sp(), STACK0 - 32);
    assert_eq!(
        bench.get(bench.sp(), 8),
        [CODE + 2, CODE3_64.into(), STACK, DATA3.into()]
    );
    // RETFQ
    bench.runs(&[0x48, 0xcb]);
    assert_eq!(
        (bench.cpu.cpl, bench.cpu.rip, bench.sp()),
        (3, CODE + 2, STACK)
    );
    assert_eq!(bench.selector(sreg::SS), DATA3);
}

#[test]
fn errors_of_long_mode_call_gates() {
    type Prepare = fn(&mut Bench);
    let cases: [(&str, Prepare, Exception); 7] = [
        (
            "16-bit gate",
            |b| spare_gate(b, CODE0, CALL_GATE16 | DPL3, 0),
            gp(SPARE.into()),
        ),
        (
            "task gate",
            |b| spare_gate(b, CODE0, access::P | system::TASK_GATE | DPL3, 0),
            gp(SPARE.into()),
        ),
        (
            "half a gate",
            |b| b.cpu.sys.gdtr.limit = SPARE + 14,
            gp(SPARE.into()),
        ),
        (
            "second half has a type",
            |b| b.put(GDT + u64::from(SPARE) + 8, 1 << 40),
            gp(SPARE.into()),
        ),
        (
            "32-bit code",
            |b| spare_gate(b, CODE3, CALL_GATE | DPL3, 0),
            gp(0x18),
        ),
        (
            "non-canonical code",
            |b| b.put(GDT + u64::from(SPARE) + 8, 0x8000),
            gp(0),
        ),
        (
            "non-canonical stack",
            |b| b.put(TSS + 4, 0x8000_0000_1000),
            ss(0),
        ),
    ];
    for (what, prepare, expected) in cases {
        let mut bench = Bench::long().user();
        spare_gate(&mut bench, CODE0, CALL_GATE | DPL3, 0);
        pointer(&mut bench, 4, 0, SPARE);
        prepare(&mut bench);
        assert_eq!(bench.faults(CALL_M32), expected, "{what}");
    }
}

#[test]
fn long_mode_far_pointers_have_64_bit_offsets() {
    let mut bench = Bench::long();
    pointer(&mut bench, 8, 0xffff_8000_1234_5678, CODE0);
    bench.runs(CALL_M64);
    assert_eq!(bench.cpu.rip, 0xffff_8000_1234_5678);
    assert_eq!(bench.get(STACK - 16, 8), [CODE + 3, CODE0.into()]);

    pointer(&mut bench, 8, 0x8000_0000_0000, CODE0);
    assert_eq!(bench.faults(JMP_M64), gp(0));
}

#[test]
fn far_jump_leaves_64_bit_mode() {
    let mut bench = Bench::long();
    pointer(&mut bench, 4, 0x1234, CODE16);
    bench.runs(&[0xff, 0x2b]);
    assert_eq!(
        (bench.cpu.code_size, bench.cpu.rip),
        (CodeSize::Bits16, 0x1234)
    );
}

fn with_syscall(bench: &mut Bench) {
    bench.cpu.sys.star = 0x0023_0010_0000_0000;
    bench.cpu.sys.lstar = 0xffff_8000_0000_1000;
    bench.cpu.sys.sfmask = rflags::IF | rflags::TF | rflags::DF | rflags::AC | rflags::NT;
}

#[test]
fn syscall_masks_flags_and_loads_fixed_segments() {
    let mut bench = Bench::long().user();
    with_syscall(&mut bench);
    let flags = rflags::IF | rflags::DF | rflags::CF | rflags::AC | rflags::ID | 2;
    bench.cpu.set_rflags(flags | rflags::RF);
    bench.runs(&[0x0f, 0x05]);
    let cpu = &bench.cpu;
    assert_eq!(
        (cpu.cpl, cpu.code_size, cpu.rip),
        (0, CodeSize::Bits64, 0xffff_8000_0000_1000)
    );
    assert_eq!((cpu.reg::<u64>(1), cpu.reg::<u64>(11)), (CODE + 2, flags));
    assert_eq!(cpu.rflags(), rflags::CF | rflags::ID | 2);
    assert_eq!(
        (
            cpu.sys.segments[sreg::CS].selector,
            cpu.sys.segments[sreg::CS].access
        ),
        (0x10, 0xa09b)
    );
    assert_eq!(
        (
            cpu.sys.segments[sreg::SS].selector,
            cpu.sys.segments[sreg::SS].access
        ),
        (0x18, 0xc093)
    );
    assert_eq!(cpu.sys.segments[sreg::SS].limit, 0xffff_ffff);
    // The stack stays the user's.
    assert_eq!(bench.sp(), STACK);
}

#[test]
fn sysret_returns_to_64_bit_or_compatibility_mode() {
    for (code, size, selector, rights, rip) in [
        (
            &[0x48, 0x0f, 0x07][..],
            CodeSize::Bits64,
            0x33,
            0xa0fb,
            0x7fff_1234_5678,
        ),
        (&[0x0f, 0x07], CodeSize::Bits32, 0x23, 0xc0fb, 0x1234_5678),
    ] {
        let mut bench = Bench::long();
        with_syscall(&mut bench);
        bench.cpu.set_reg(1, 0x7fff_1234_5678u64);
        bench.cpu.set_reg(11, u64::MAX);
        bench.runs(code);
        let cpu = &bench.cpu;
        assert_eq!((cpu.cpl, cpu.code_size, cpu.rip), (3, size, rip));
        assert_eq!(cpu.rflags(), 0x3c_7fd7);
        let (cs, stack) = (cpu.sys.segments[sreg::CS], cpu.sys.segments[sreg::SS]);
        assert_eq!((cs.selector, cs.access), (selector, rights));
        assert_eq!((stack.selector, stack.access), (0x2b, 0xc0f3));
    }
}

#[test]
fn syscall_and_sysret_refuse() {
    let mut bench = Bench::long().user();
    with_syscall(&mut bench);
    assert_eq!(bench.faults(&[0x48, 0x0f, 0x07]), gp(0));
    bench.cpu.sys.efer &= !efer::SCE;
    assert_eq!(bench.faults(&[0x0f, 0x05]), Exception::UD);
    assert_eq!(bench.faults(&[0x48, 0x0f, 0x07]), Exception::UD);

    let mut bench = Bench::long();
    bench.cpu.set_reg(1, 0x8000_0000_0000u64);
    assert_eq!(bench.faults(&[0x48, 0x0f, 0x07]), gp(0));
    assert_eq!(bench.cpu.cpl, 0);

    let mut bench = Bench::protected();
    bench.cpu.sys.efer |= efer::SCE;
    assert_eq!(bench.faults(&[0x0f, 0x05]), Exception::UD);
    assert_eq!(bench.faults(&[0x0f, 0x07]), Exception::UD);
}

#[test]
fn sysenter_and_sysexit_switch_levels() {
    for (mut bench, exit, code) in [
        (Bench::protected().user(), &[0x0f, 0x35][..], 0x1b),
        (Bench::long().user(), &[0x48, 0x0f, 0x35], 0x2b),
        (Bench::long().user(), &[0x0f, 0x35], 0x1b),
    ] {
        let long = bench.cpu.is_long();
        bench.cpu.sys.sysenter_cs = 0x0b;
        bench.cpu.sys.sysenter_eip = 0x1_0000_5000;
        bench.cpu.sys.sysenter_esp = 0x1_0000_6000;
        bench.runs(&[0x0f, 0x34]);
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        assert_eq!((bench.cpu.cpl, bench.cpu.is_64bit()), (0, long));
        assert_eq!(
            (bench.cpu.rip, bench.sp()),
            (0x1_0000_5000 & mask, 0x1_0000_6000 & mask)
        );
        assert_eq!(
            (bench.selector(sreg::CS), bench.selector(sreg::SS)),
            (0x08, 0x10)
        );
        assert_eq!(bench.cpu.rflags(), 2);

        bench.cpu.set_reg(1, 0x1_0000_7000u64);
        bench.cpu.set_reg(2, 0x1_0000_8000u64);
        bench.runs(exit);
        let mask = if exit.len() == 3 {
            u64::MAX
        } else {
            0xffff_ffff
        };
        assert_eq!((bench.cpu.cpl, bench.cpu.is_64bit()), (3, exit.len() == 3));
        assert_eq!(
            (bench.cpu.rip, bench.sp()),
            (0x1_0000_8000 & mask, 0x1_0000_7000 & mask)
        );
        assert_eq!(
            (bench.selector(sreg::CS), bench.selector(sreg::SS)),
            (code, code + 8)
        );
    }
}

#[test]
fn sysenter_and_sysexit_refuse() {
    for mut bench in [Bench::protected(), Bench::long()] {
        bench.cpu.sys.sysenter_cs = 3;
        assert_eq!(bench.faults(&[0x0f, 0x34]), gp(0));
        assert_eq!(bench.faults(&[0x0f, 0x35]), gp(0));
        bench.cpu.sys.sysenter_cs = 8;
        let mut bench = bench.user();
        assert_eq!(bench.faults(&[0x0f, 0x35]), gp(0));
    }
    let mut bench = Bench::long();
    bench.cpu.sys.sysenter_cs = 8;
    bench.cpu.set_reg(1, 0x8000_0000_0000u64);
    assert_eq!(bench.faults(&[0x48, 0x0f, 0x35]), gp(0));
    let (cpu, _) = reset_cpu();
    let mut bench = Bench { cpu };
    bench.cpu.sys.sysenter_cs = 8;
    assert_eq!(bench.faults(&[0x0f, 0x34]), gp(0));
}
