use trapgate_x86::registers::{cr0, cr4, rflags};
use trapgate_x86::{Exception, InterruptShadow};

use crate::cpu::Stop;
use crate::system_testing::*;
use crate::testing::reset_cpu;
use crate::tlb::View;

const CLI: &[u8] = &[0xfa];
const STI: &[u8] = &[0xfb];
const PUSHF: &[u8] = &[0x9c];
const POPF: &[u8] = &[0x9d];

/// What CLI and STI change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flag {
    Real,
    Virtual,
    Refused,
}

fn with_iopl(mut bench: Bench, iopl: u8) -> Bench {
    bench.cpu.system_flags &= !rflags::IOPL;
    bench.cpu.system_flags |= u64::from(iopl) << rflags::IOPL_SHIFT;
    bench
}

#[test]
fn cli_and_sti_by_mode_and_privilege() {
    type Make = fn() -> Bench;
    let cases: [(Make, u8, u64, Flag); 9] = [
        (|| Bench { cpu: reset_cpu().0 }, 0, 0, Flag::Real),
        (Bench::protected, 0, 0, Flag::Real),
        (Bench::long, 0, 0, Flag::Real),
        (|| Bench::long().user(), 3, 0, Flag::Real),
        (|| Bench::long().user(), 2, 0, Flag::Refused),
        (|| Bench::protected().user(), 0, cr4::PVI, Flag::Virtual),
        (|| Bench::vm86(0), 3, 0, Flag::Real),
        (|| Bench::vm86(0), 0, cr4::PVI, Flag::Refused),
        (|| Bench::vm86(0), 0, cr4::VME, Flag::Virtual),
    ];
    for (index, (make, iopl, extension, expected)) in cases.into_iter().enumerate() {
        let fresh = |flags: u64| {
            let mut bench = with_iopl(make(), iopl);
            bench.cpu.sys.cr4 |= extension;
            bench.cpu.system_flags &= !(rflags::IF | rflags::VIF);
            bench.cpu.system_flags |= flags;
            bench
        };
        let changed = match expected {
            Flag::Real => rflags::IF,
            Flag::Virtual => rflags::VIF,
            Flag::Refused => 0,
        };
        let refused = expected == Flag::Refused;
        for (code, before, after) in [
            (
                CLI,
                rflags::IF | rflags::VIF,
                (rflags::IF | rflags::VIF) & !changed,
            ),
            (STI, 0, changed),
        ] {
            let mut bench = fresh(before);
            let outcome = bench.run(code);
            assert_eq!(outcome.is_err(), refused, "case {index}");
            assert!(!refused || bench.cpu.exception == gp(0));
            let flags = bench.cpu.rflags() & (rflags::IF | rflags::VIF);
            assert_eq!(flags, after, "case {index}");
        }
    }
}

#[test]
fn sti_with_a_virtual_interrupt_pending_faults() {
    for mut bench in [Bench::protected().user(), Bench::vm86(0)] {
        bench.cpu.sys.cr4 |= cr4::PVI | cr4::VME;
        bench.cpu.system_flags |= rflags::VIP;
        assert_eq!(bench.faults(STI), gp(0));
        bench.runs(CLI);
    }
}

#[test]
fn sti_holds_interrupts_off_only_if_they_were_masked() {
    for (flag, shadow) in [
        (0, InterruptShadow::Sti),
        (rflags::IF, InterruptShadow::None),
    ] {
        let mut bench = Bench::long();
        bench.cpu.set_rflags(flag);
        bench.cpu.end_block = false;
        bench.runs(STI);
        assert_eq!(bench.cpu.sys.shadow, shadow);
        assert_eq!(bench.cpu.end_block, flag == 0);
    }
}

#[test]
fn pushf_hides_vm_and_rf() {
    for (mut bench, code, size) in [
        (Bench::protected(), PUSHF, 4),
        (Bench::protected(), &[0x66, 0x9c], 2),
        (Bench::long(), PUSHF, 8),
        (Bench::long(), &[0x66, 0x9c], 2),
        (Bench::vm86(3), &[0x66, 0x9c], 4),
    ] {
        bench.cpu.system_flags |= rflags::RF | rflags::ID;
        let all = bench.cpu.rflags() & !(rflags::RF | rflags::VM);
        let top = bench.cpu.sys.segments[2].base * u64::from(bench.cpu.is_vm86()) + bench.sp();
        bench.runs(code);
        let expected = all & (u64::MAX >> (64 - size * 8));
        assert_eq!(bench.get(top - size, size), [expected]);
    }
}

#[test]
fn popf_by_mode_and_privilege() {
    const COMMON: u64 = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
    const WIDE: u64 = COMMON | rflags::AC | rflags::ID;
    const POPFW: &[u8] = &[0x66, 0x9d];
    type Make = fn() -> Bench;
    let cases: [(Make, u8, &[u8], u64, u64); 9] = [
        (
            Bench::protected,
            0,
            POPF,
            4,
            WIDE | rflags::IF | rflags::IOPL,
        ),
        (
            Bench::protected,
            0,
            POPFW,
            2,
            COMMON | rflags::IF | rflags::IOPL,
        ),
        (Bench::long, 0, POPF, 8, WIDE | rflags::IF | rflags::IOPL),
        (|| Bench::long().user(), 0, POPF, 8, WIDE),
        (|| Bench::long().user(), 3, POPF, 8, WIDE | rflags::IF),
        (|| Bench::protected().user(), 2, POPFW, 2, COMMON),
        (
            || Bench::protected().user(),
            3,
            POPFW,
            2,
            COMMON | rflags::IF,
        ),
        (|| Bench::vm86(0), 3, POPFW, 4, WIDE | rflags::IF),
        (|| Bench::vm86(0), 3, POPF, 2, COMMON | rflags::IF),
    ];
    for (index, (make, iopl, code, size, changed)) in cases.into_iter().enumerate() {
        let mut bench = with_iopl(make(), iopl);
        let before = bench.cpu.rflags();
        // Everything flipped, where it can be shown.
        bench.cpu.push(size, !before).unwrap();
        bench.runs(code);
        assert_eq!(bench.cpu.rflags(), before ^ changed, "case {index}");
    }
}

#[test]
fn popf_clears_rf() {
    let mut bench = Bench::long();
    bench.cpu.system_flags |= rflags::RF;
    bench.push(8, &[rflags::RF]);
    bench.runs(POPF);
    assert_eq!(bench.cpu.rflags(), 2);
}

#[test]
fn vm86_pushf_and_popf_without_privilege() {
    let mut bench = Bench::vm86(0);
    assert_eq!(bench.faults(PUSHF), gp(0));
    assert_eq!(bench.faults(POPF), gp(0));

    bench.cpu.sys.cr4 |= cr4::VME;
    assert_eq!(bench.faults(&[0x66, 0x9c]), gp(0));
    assert_eq!(bench.faults(&[0x66, 0x9d]), gp(0));
    for (before, shown) in [(rflags::VIF, rflags::IF), (0, 0)] {
        bench.cpu.system_flags &= !rflags::VIF;
        bench.cpu.system_flags |= before;
        bench.runs(PUSHF);
        let top = 0x10000 + bench.sp();
        assert_eq!(bench.get(top, 2), [shown | rflags::IOPL | 2]);
        bench.cpu.system_flags ^= rflags::VIF;
        bench.runs(POPF);
        assert_eq!(bench.cpu.rflags() & (rflags::VIF | rflags::IOPL), before);
        assert_ne!(bench.cpu.rflags() & rflags::IF, 0);
    }
    // An interrupt that waits, or single step, is the monitor's business.
    bench.cpu.push(2, rflags::IF).unwrap();
    bench.cpu.system_flags |= rflags::VIP;
    assert_eq!(bench.faults(POPF), gp(0));
    bench.cpu.system_flags &= !rflags::VIP;
    bench.runs(POPF);
    bench.cpu.push(2, rflags::TF).unwrap();
    assert_eq!(bench.faults(POPF), gp(0));
}

#[test]
fn popf_that_enables_a_waiting_interrupt_ends_the_block() {
    for (waits, ends) in [(false, false), (true, true)] {
        let mut bench = Bench::long();
        bench.cpu.set_rflags(0);
        bench.cpu.interrupt_waits = waits;
        bench.cpu.end_block = false;
        bench.push(8, &[rflags::IF]);
        bench.runs(POPF);
        assert_eq!(bench.cpu.end_block, ends);
    }
}

#[test]
fn stac_and_clac_open_and_close_user_pages() {
    let mut bench = Bench::long();
    bench.cpu.sys.cr4 |= cr4::SMAP;
    bench.cpu.update_mode();
    assert_eq!(bench.cpu.plain_view, View::Supervisor);
    // Every page of the bench is a user page.
    let fault = Exception::page_fault(0x6000, 1);
    bench.cpu.set_reg(3, 0x6000u64);
    assert_eq!(bench.run(&[0x8b, 0x03]), Err(Stop::Fault));
    assert_eq!(bench.cpu.exception, fault);
    bench.runs(&[0x0f, 0x01, 0xcb]);
    assert_ne!(bench.cpu.rflags() & rflags::AC, 0);
    bench.runs(&[0x8b, 0x03]);
    bench.runs(&[0x0f, 0x01, 0xca]);
    assert_eq!(bench.cpu.rflags() & rflags::AC, 0);
    assert_eq!(bench.run(&[0x8b, 0x03]), Err(Stop::Fault));

    let mut bench = Bench::long().user();
    assert_eq!(bench.faults(&[0x0f, 0x01, 0xcb]), Exception::UD);
    assert_eq!(bench.faults(&[0x0f, 0x01, 0xca]), Exception::UD);
}

#[test]
fn hlt_and_clts_are_privileged() {
    let mut bench = Bench::long();
    bench.cpu.sys.cr0 |= cr0::TS;
    bench.runs(&[0x0f, 0x06]);
    assert_eq!(bench.cpu.sys.cr0 & cr0::TS, 0);
    assert_eq!(bench.run(&[0xf4]), Err(Stop::Halt));
    assert_eq!(bench.cpu.rip, CODE + 3);
    let mut bench = Bench::long().user();
    assert_eq!(bench.faults(&[0x0f, 0x06]), gp(0));
    assert_eq!(bench.faults(&[0xf4]), gp(0));
}
