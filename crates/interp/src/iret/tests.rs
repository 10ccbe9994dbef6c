use trapgate_x86::descriptor::access;
use trapgate_x86::registers::{cr0, cr4, gpr, rflags, sreg};
use trapgate_x86::{Exception, Segment, Vector};

use crate::cpu::CodeSize;
use crate::frame::null_stack_segment;
use crate::system_testing::*;

const IRETQ: &[u8] = &[0x48, 0xcf];
const IRETD: &[u8] = &[0xcf];
const IRETW: &[u8] = &[0x66, 0xcf];

/// Pushes a frame for IRETQ.
fn long_frame(bench: &mut Bench, ss: u16, sp: u64, flags: u64, cs: u16, ip: u64) {
    bench.push(8, &[ss.into(), sp, flags, cs.into(), ip]);
}

#[test]
fn data_segments_of_inner_levels_become_null_on_the_way_out() {
    let mut bench = Bench::protected();
    bench.cpu.load_segment(sreg::ES, DATA3).unwrap();
    bench.cpu.load_segment(sreg::FS, CONFORMING).unwrap();
    bench.cpu.load_segment(sreg::GS, CODE0).unwrap();
    bench.push(4, &[DATA3.into(), 0x7000, rflags::IF, CODE3.into(), 0x1234]);
    bench.runs(IRETD);
    assert_eq!(
        (bench.cpu.cpl, bench.cpu.rip, bench.sp()),
        (3, 0x1234, 0x7000)
    );
    assert_eq!(bench.selector(sreg::ES), DATA3);
    assert_eq!(bench.selector(sreg::FS), CONFORMING);
    assert_eq!(bench.cpu.sys.segments[sreg::DS], Segment::null(0));
    assert_eq!(bench.cpu.sys.segments[sreg::GS], Segment::null(0));
}

#[test]
fn flags_restored_depend_on_level_and_size() {
    const COMMON: u64 = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
    const WIDE: u64 = COMMON | rflags::RF | rflags::AC | rflags::ID;
    const KERNEL: u64 = rflags::IF | rflags::IOPL;
    for (user, iopl, iret, size, changed) in [
        (
            false,
            0,
            IRETD,
            4,
            WIDE | KERNEL | rflags::VIF | rflags::VIP,
        ),
        (false, 0, IRETW, 2, COMMON | KERNEL),
        (true, 0, IRETD, 4, WIDE),
        (true, 3, IRETD, 4, WIDE | rflags::IF),
        (true, 3, IRETW, 2, COMMON | rflags::IF),
    ] {
        let mut bench = Bench::protected();
        if user {
            bench = bench.user();
        }
        let code = if user { CODE3 } else { CODE0 };
        let before = u64::from(iopl as u8) << rflags::IOPL_SHIFT;
        bench.cpu.set_rflags(before);
        // Everything is flipped but VM, which would go elsewhere.
        let image = (rflags::DEFINED & !rflags::VM) ^ before;
        let frame = [image, code.into(), 0x1234];
        for value in frame {
            bench.cpu.push(size, value).unwrap();
        }
        bench.runs(iret);
        let expected = before ^ changed | rflags::ONE;
        assert_eq!(
            bench.cpu.rflags(),
            expected,
            "user {user} IOPL {iopl} size {size}"
        );
        assert_eq!(bench.sp(), STACK);
    }
}

#[test]
fn user_cannot_enter_vm86() {
    let mut bench = Bench::protected().user();
    bench.push(4, &[rflags::VM, CODE3.into(), 0x1234]);
    bench.runs(IRETD);
    assert!(!bench.cpu.is_vm86());
    assert_eq!(bench.cpu.rip, 0x1234);
}

#[test]
fn errors_of_returns() {
    let ok = (DATA3, 0x7000, CODE3, 0x1234);
    for (what, (ss_, sp, cs, ip), expected) in [
        ("null code", (ok.0, ok.1, 3, ok.3), gp(0)),
        (
            "outside",
            (ok.0, ok.1, OUTSIDE | 3, ok.3),
            gp(OUTSIDE.into()),
        ),
        ("data", (ok.0, ok.1, DATA3, ok.3), gp(0x20)),
        (
            "level of the selector is not the code's",
            (ok.0, ok.1, CODE0 | 1, ok.3),
            gp(CODE0.into()),
        ),
        (
            "absent",
            (ok.0, ok.1, ABSENT_CODE, ok.3),
            np(ABSENT_CODE.into()),
        ),
        ("null stack", (3, ok.1, ok.2, ok.3), gp(0)),
        (
            "stack outside",
            (OUTSIDE | 3, ok.1, ok.2, ok.3),
            gp(OUTSIDE.into()),
        ),
        (
            "stack of another level",
            (DATA0, ok.1, ok.2, ok.3),
            gp(DATA0.into()),
        ),
        ("stack is code", (CODE3, ok.1, ok.2, ok.3), gp(0x18)),
        (
            "absent stack",
            (SPARE | 3, ok.1, ok.2, ok.3),
            ss(SPARE.into()),
        ),
        (
            "beyond the segment",
            (ok.0, ok.1, (SPARE + 8) | 3, 0x1000),
            gp(0),
        ),
    ] {
        let mut bench = Bench::protected();
        bench.put(GDT + u64::from(SPARE), descriptor(0, 0xfffff, 0xc073));
        bench.put(GDT + u64::from(SPARE) + 8, descriptor(0, 0xfff, 0x40fb));
        bench.push(4, &[ss_.into(), sp, 2, cs.into(), ip]);
        assert_eq!(bench.faults(IRETD), expected, "{what}");
    }
}

#[test]
fn return_to_an_inner_level_is_refused() {
    let mut bench = Bench::protected().user();
    bench.push(4, &[2, CODE0.into(), 0x1234]);
    assert_eq!(bench.faults(IRETD), gp(CODE0.into()));
}

#[test]
fn frame_beyond_the_stack_is_refused() {
    let mut bench = Bench::protected();
    bench.cpu.sys.segments[sreg::SS].limit = (STACK + 10) as u32;
    assert_eq!(bench.faults(IRETD), ss(0));
}

#[test]
fn stack_of_16_bits_moves_only_sp() {
    let mut bench = Bench::protected();
    bench.put(GDT + u64::from(SPARE), descriptor(0, 0xffff, 0x00f3));
    bench.push(4, &[u64::from(SPARE) | 3, 0x1234_5678, 2, CODE3.into(), 0]);
    bench.cpu.set_reg(0, 0u32);
    let high = bench.cpu.reg::<u32>(4) & 0xffff_0000;
    bench.runs(IRETD);
    assert_eq!(bench.cpu.reg::<u32>(4), high | 0x5678);
}

#[test]
fn long_mode_returns_to_compatibility_mode() {
    let mut bench = Bench::long();
    long_frame(
        &mut bench,
        DATA3,
        0x7000,
        rflags::IF | rflags::RF,
        CODE3,
        0x1234,
    );
    bench.runs(IRETQ);
    assert_eq!((bench.cpu.cpl, bench.cpu.code_size), (3, CodeSize::Bits32));
    assert_eq!((bench.cpu.rip, bench.sp()), (0x1234, 0x7000));
    assert_eq!(bench.cpu.rflags(), rflags::IF | rflags::RF | 2);
}

/// A host CPU showed it, of RETFQ and IRETQ within level 3.
#[test]
fn returns_to_compatibility_mode_take_the_lower_half_of_rip() {
    for rip in [0x1_0000_1234, 0x8000_0000_0000_1234] {
        let mut bench = Bench::long();
        long_frame(&mut bench, DATA3, 0x7000, 2, CODE3, rip);
        bench.runs(IRETQ);
        assert_eq!((bench.cpu.cpl, bench.cpu.rip), (3, 0x1234));

        let mut bench = Bench::long().user();
        bench.push(8, &[CODE3.into(), rip]);
        // RETFQ
        bench.runs(&[0x48, 0xcb]);
        assert_eq!(
            (bench.cpu.code_size, bench.cpu.rip),
            (CodeSize::Bits32, 0x1234)
        );
    }
}

#[test]
fn long_mode_pops_the_stack_at_the_same_level_too() {
    let mut bench = Bench::long();
    long_frame(&mut bench, 0, 0x7008, 2, CODE0, 0xffff_8000_0000_1000);
    bench.runs(IRETQ);
    assert_eq!((bench.cpu.cpl, bench.sp()), (0, 0x7008));
    assert_eq!(bench.cpu.rip, 0xffff_8000_0000_1000);
    assert_eq!(bench.cpu.sys.segments[sreg::SS], null_stack_segment(0));
}

#[test]
fn stack_pointer_and_selector_are_popped_under_the_flags_before_them() {
    for (alignment_mask, flags, expected) in [
        (0, rflags::AC, None),
        (cr0::AM, 0, None),
        (
            cr0::AM,
            rflags::AC,
            Some(Exception::with_code(Vector::AC, 0)),
        ),
    ] {
        let mut bench = Bench::long().user();
        bench.cpu.sys.cr0 |= alignment_mask;
        bench.cpu.regs.gpr[gpr::RSP] = STACK - 4;
        long_frame(&mut bench, DATA3, 0x7008, flags | 2, CODE3_64, 0x1234);
        match expected {
            None => bench.runs(IRETQ),
            Some(exception) => assert_eq!(bench.faults(IRETQ), exception),
        }
    }
}

#[test]
fn compatibility_mode_pops_no_stack_at_the_same_level() {
    let mut bench = Bench::long().user();
    bench.cpu.sys.segments[sreg::CS] = Segment::flat(
        CODE3,
        access::CODE | access::READABLE | access::DB | access::DPL,
    );
    bench.cpu.update_mode();
    bench.push(4, &[2, CODE3_64.into(), 0x1234]);
    bench.runs(IRETD);
    assert_eq!((bench.cpu.code_size, bench.sp()), (CodeSize::Bits64, STACK));
}

#[test]
fn errors_of_returns_in_long_mode() {
    for (what, (ss_, cs, ip, flags), expected) in [
        ("null stack for user code", (3, CODE3_64, 0x1234, 0), gp(0)),
        (
            "null stack for compatibility mode",
            (0, CODE16, 0x1234, 0),
            gp(0),
        ),
        ("null stack of another level", (1, CODE0, 0x1234, 0), gp(0)),
        (
            "non-canonical",
            (DATA3, CODE3_64, 0x8000_0000_0000, 0),
            gp(0),
        ),
        (
            "both 64-bit and 32-bit",
            (DATA3, SPARE | 3, 0x1234, 0),
            gp(SPARE.into()),
        ),
        ("nested task", (DATA3, CODE3_64, 0x1234, rflags::NT), gp(0)),
    ] {
        let mut bench = Bench::long();
        bench.put(GDT + u64::from(SPARE), descriptor(0, 0xfffff, 0xe0fb));
        long_frame(&mut bench, ss_, 0x7000, 2, cs, ip);
        bench.cpu.system_flags |= flags;
        assert_eq!(bench.faults(IRETQ), expected, "{what}");
    }
}

#[test]
fn segment_bases_set_without_selectors_survive_the_way_out() {
    let mut bench = Bench::long();
    bench.cpu.sys.segments[sreg::FS] = Segment {
        base: 0x7fff_1234_5000,
        ..Segment::null(0)
    };
    long_frame(&mut bench, DATA3, 0x7000, 2, CODE3_64, 0x1234);
    bench.runs(IRETQ);
    assert_eq!(bench.cpu.sys.segments[sreg::FS].base, 0x7fff_1234_5000);
}

#[test]
fn vm86_iret_keeps_privilege_flags() {
    let mut bench = Bench::vm86(3);
    for value in [0xffff, 0x2222, 0x99] {
        bench.cpu.push(2, value).unwrap();
    }
    bench.cpu.system_flags |= rflags::VIP;
    bench.runs(IRETD_IN_16);
    assert!(bench.cpu.is_vm86());
    assert_eq!((bench.selector(sreg::CS), bench.cpu.rip), (0x2222, 0x99));
    assert_eq!(bench.cpu.iopl(), 3);
    let expected = rflags::ARITHMETIC | rflags::TF | rflags::IF | rflags::DF | rflags::NT;
    let kept = rflags::VM | rflags::IOPL | rflags::VIP | rflags::ONE;
    assert_eq!(bench.cpu.rflags(), expected | kept);
}

/// 0xCF in 16-bit code.
const IRETD_IN_16: &[u8] = &[0xcf];

#[test]
fn vm86_iret_without_privilege() {
    // VME, VIF/VIP, flags popped, outcome: VIF or #GP(0).
    for (vme, pending, popped, expected) in [
        (false, false, 0, None),
        (true, false, rflags::IF, Some(true)),
        (true, false, 0, Some(false)),
        (true, true, 0, Some(false)),
        (true, true, rflags::IF, None),
        (true, false, rflags::TF, None),
    ] {
        let mut bench = Bench::vm86(0);
        if vme {
            bench.cpu.sys.cr4 |= cr4::VME;
        }
        if pending {
            bench.cpu.system_flags |= rflags::VIP;
        }
        for value in [popped, 0x2222, 0x99] {
            bench.cpu.push(2, value).unwrap();
        }
        let before = bench.cpu.system_flags & rflags::IF;
        let outcome = bench.run(IRETD_IN_16);
        let virtual_flag = bench.cpu.rflags() & rflags::VIF != 0;
        assert_eq!(outcome.ok().map(|()| virtual_flag), expected);
        assert_eq!(
            bench.cpu.system_flags & rflags::IF,
            before,
            "IF itself stays"
        );
        assert!(expected.is_some() || bench.cpu.exception == Exception::gp(0));
    }
}

#[test]
fn resume_flag_asks_for_attention_in_vain_unless_something_else_does() {
    let mut bench = Bench::protected();
    let cpu = &mut bench.cpu;
    assert!(!cpu.merely_resumes());
    for (flags, dr7, merely) in [
        (rflags::RF, 0x400, true),
        (rflags::RF | rflags::TF, 0x400, false),
        (rflags::RF, 0x401, false),
        (rflags::TF, 0x400, false),
    ] {
        cpu.sys.dr7 = dr7;
        cpu.set_rflags(flags);
        assert!(cpu.attention);
        assert_eq!(cpu.merely_resumes(), merely, "{flags:#x} {dr7:#x}");
    }
    cpu.sys.dr7 = 0x400;
    cpu.set_rflags(rflags::RF | rflags::IF);
    cpu.resume();
    assert!(!cpu.attention);
    assert_eq!(cpu.rflags() & (rflags::RF | rflags::IF), rflags::IF);
}
