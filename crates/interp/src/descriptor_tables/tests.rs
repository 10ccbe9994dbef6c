use trapgate_x86::descriptor::{access, system};
use trapgate_x86::registers::{cr4, rflags};
use trapgate_x86::{Exception, Segment, TableRegister};

use crate::system_testing::*;
use crate::testing::reset_cpu;

/// The memory operand [RBX] is here.
const OPERAND: u64 = 0x6000;

fn at_operand(mut bench: Bench) -> Bench {
    bench.cpu.set_reg(3, OPERAND);
    bench
}

#[test]
fn tables_are_loaded_and_stored_in_the_modes_sizes() {
    const VALUE: u64 = 0xffff_8765_4321_abcd;
    for (bench, prefix, base) in [
        (Bench::protected(), &[][..], 0x8765_4321),
        (Bench::protected(), &[0x66], 0x65_4321),
        (Bench::long(), &[], 0xffff_8000_8765_4321),
        (Bench::long(), &[0x66], 0xffff_8000_8765_4321),
    ] {
        let mut bench = at_operand(bench);
        bench.put(OPERAND, VALUE & 0xffff_ffff_ffff);
        bench.put32(OPERAND + 2, 0x8765_4321);
        bench.put32(OPERAND + 6, 0xffff_8000);
        let instruction = |reg: u8| [prefix, &[0x0f, 0x01, reg << 3 | 3]].concat();
        let expected = TableRegister {
            base,
            limit: 0xabcd,
        };
        bench.runs(&instruction(3));
        assert_eq!(bench.cpu.sys.idtr, expected);
        bench.runs(&instruction(2));
        assert_eq!(bench.cpu.sys.gdtr, expected);

        let long = bench.cpu.is_long();
        let upper = if long { base >> 32 } else { 0x5555_5555 };
        for reg in [0, 1] {
            bench.put(OPERAND, 0);
            bench.put32(OPERAND + 6, 0x5555_5555);
            bench.runs(&instruction(reg));
            assert_eq!(bench.get(OPERAND, 2), [0xabcd]);
            assert_eq!(bench.get(OPERAND + 2, 4), [base & 0xffff_ffff, upper]);
        }
    }
}

#[test]
fn table_base_must_be_canonical() {
    let mut bench = at_operand(Bench::long());
    bench.put(OPERAND + 2, 0x8000_0000_0000);
    assert_eq!(bench.faults(&[0x0f, 0x01, 0x13]), gp(0));
    assert_eq!(bench.faults(&[0x0f, 0x01, 0x1b]), gp(0));
}

#[test]
fn loads_are_privileged() {
    let mut bench = at_operand(Bench::long().user());
    for code in [
        &[0x0f, 0x01, 0x13][..],
        &[0x0f, 0x01, 0x1b],
        &[0x0f, 0x00, 0xd0],
        &[0x0f, 0x00, 0xd8],
    ] {
        assert_eq!(bench.faults(code), gp(0), "{code:02x?}");
    }
}

#[test]
fn user_mode_instruction_prevention() {
    for code in [
        &[0x0f, 0x01, 0x03][..], // SGDT
        &[0x0f, 0x01, 0x0b],     // SIDT
        &[0x0f, 0x00, 0xc0],     // SLDT
        &[0x0f, 0x00, 0xc8],     // STR
    ] {
        let mut bench = at_operand(Bench::long());
        bench.cpu.sys.cr4 |= cr4::UMIP;
        bench.runs(code);
        let mut bench = at_operand(Bench::long().user());
        bench.runs(code);
        bench.cpu.sys.cr4 |= cr4::UMIP;
        assert_eq!(bench.faults(code), gp(0), "{code:02x?}");
    }
}

#[test]
fn instructions_on_selectors_need_protected_mode() {
    for mut bench in [Bench { cpu: reset_cpu().0 }, Bench::vm86(3)] {
        for modrm in [0xc0, 0xc8, 0xd0, 0xd8, 0xe0, 0xe8] {
            assert_eq!(
                bench.faults(&[0x0f, 0x00, modrm]),
                Exception::UD,
                "{modrm:x}"
            );
        }
        for opcode in [2, 3] {
            assert_eq!(bench.faults(&[0x0f, opcode, 0xc0]), Exception::UD);
        }
        assert_eq!(bench.faults(&[0x63, 0xc0]), Exception::UD);
    }
}

#[test]
fn stored_selectors_fill_registers_but_only_two_bytes_of_memory() {
    let mut bench = at_operand(Bench::long());
    for (code, expected) in [
        (&[0x0f, 0x00, 0xc8][..], u64::from(TASK)),
        (&[0x48, 0x0f, 0x00, 0xc8], u64::from(TASK)),
        (
            &[0x66, 0x0f, 0x00, 0xc8],
            0xffff_ffff_ffff_0000 | u64::from(TASK),
        ),
    ] {
        bench.cpu.set_reg(0, u64::MAX);
        bench.runs(code);
        assert_eq!(bench.cpu.reg::<u64>(0), expected);
    }
    bench.put(OPERAND, u64::MAX);
    bench.runs(&[0x48, 0x0f, 0x00, 0x0b]);
    assert_eq!(bench.get(OPERAND, 8), [u64::MAX << 16 | u64::from(TASK)]);
}

fn load_task(bench: &mut Bench, selector: u16) {
    bench.cpu.set_reg(0, selector);
    bench.runs(&[0x0f, 0x00, 0xd8]);
}

#[test]
fn ltr_marks_the_task_busy() {
    for (mut bench, upper) in [(Bench::protected(), 0), (Bench::long(), 0xffff_8000)] {
        let value = descriptor(0x1234_5678, 0x67, access::P | system::TSS);
        bench.put(GDT + u64::from(SPARE), value);
        bench.put(GDT + u64::from(SPARE) + 8, upper);
        load_task(&mut bench, SPARE);
        let expected = Segment {
            selector: SPARE,
            base: 0x1234_5678 | upper << 32,
            limit: 0x67,
            access: access::P | system::TSS_BUSY,
        };
        assert_eq!(bench.cpu.sys.tr, expected);
        assert_eq!(bench.get(GDT + u64::from(SPARE), 8), [value | 2 << 40]);
        // A busy task can't be loaded again.
        assert_eq!(bench.faults(&[0x0f, 0x00, 0xd8]), gp(SPARE.into()));
    }
}

#[test]
fn errors_of_ltr_and_lldt() {
    const TSS_ACCESS: u32 = access::P | system::TSS;
    const LDT_ACCESS: u32 = access::P | system::LDT;
    const LTR: u8 = 0xd8;
    const LLDT: u8 = 0xd0;
    for (what, modrm, selector, access, upper, expected) in [
        ("null", LTR, 3, TSS_ACCESS, 0, gp(0)),
        (
            "local",
            LTR,
            SPARE | 4,
            TSS_ACCESS,
            0,
            gp(u32::from(SPARE) | 4),
        ),
        ("outside", LTR, OUTSIDE, TSS_ACCESS, 0, gp(OUTSIDE.into())),
        ("an LDT", LTR, SPARE, LDT_ACCESS, 0, gp(SPARE.into())),
        (
            "16-bit",
            LTR,
            SPARE,
            access::P | system::TSS16,
            0,
            gp(SPARE.into()),
        ),
        ("absent", LTR, SPARE, system::TSS, 0, np(SPARE.into())),
        (
            "non-canonical",
            LTR,
            SPARE,
            TSS_ACCESS,
            0x8000,
            gp(SPARE.into()),
        ),
        (
            "typed upper half",
            LTR,
            SPARE,
            TSS_ACCESS,
            1 << 40,
            gp(SPARE.into()),
        ),
        (
            "half outside",
            LTR,
            SPARE + 8,
            TSS_ACCESS,
            u64::from(TSS_ACCESS) << 40,
            gp(u32::from(SPARE) + 8),
        ),
        (
            "local",
            LLDT,
            SPARE | 4,
            LDT_ACCESS,
            0,
            gp(u32::from(SPARE) | 4),
        ),
        ("outside", LLDT, OUTSIDE, LDT_ACCESS, 0, gp(OUTSIDE.into())),
        ("a TSS", LLDT, SPARE, TSS_ACCESS, 0, gp(SPARE.into())),
        ("data", LLDT, DATA0, LDT_ACCESS, 0, gp(DATA0.into())),
        ("absent", LLDT, SPARE, system::LDT, 0, np(SPARE.into())),
        (
            "non-canonical",
            LLDT,
            SPARE,
            LDT_ACCESS,
            0x8000,
            gp(SPARE.into()),
        ),
    ] {
        let mut bench = Bench::long();
        bench.put(GDT + u64::from(SPARE), descriptor(0, 0x67, access));
        bench.put(GDT + u64::from(SPARE) + 8, upper);
        bench.cpu.set_reg(0, selector);
        assert_eq!(
            bench.faults(&[0x0f, 0x00, modrm]),
            expected,
            "{what} {modrm:x}"
        );
    }
}

#[test]
fn lldt_makes_local_selectors_work() {
    for mut bench in [Bench::protected(), Bench::long()] {
        bench.put(
            GDT + u64::from(SPARE),
            descriptor(LDT as u32, 0xf, access::P | system::LDT),
        );
        bench.put(GDT + u64::from(SPARE) + 8, 0);
        bench.put(LDT + 8, descriptor(0, 0xfffff, 0xc093));
        bench.cpu.set_reg(0, SPARE);
        bench.runs(&[0x0f, 0x00, 0xd0]);
        assert_eq!(
            (bench.cpu.sys.ldtr.base, bench.cpu.sys.ldtr.limit),
            (LDT, 0xf)
        );
        bench.cpu.load_segment(0, 0x0c).unwrap();
        assert_eq!(bench.selector(0), 0x0c);
        assert!(bench.cpu.load_segment(0, 0x14).is_err());
        bench.cpu.set_reg(0, 0u16);
        bench.runs(&[0x0f, 0x00, 0xd0]);
        assert!(bench.cpu.load_segment(0, 0x0c).is_err());
        assert_eq!(bench.cpu.exception, gp(0x0c));
    }
}

/// The result of an instruction with its selector in CX and its result in RAX; `None` without ZF.
fn query(bench: &mut Bench, code: &[u8], selector: u16) -> Option<u64> {
    bench.cpu.set_reg(0, 0x5555_5555_5555_5555u64);
    bench.cpu.set_reg(1, selector);
    bench.runs(code);
    let value = bench.cpu.reg::<u64>(0);
    let found = bench.cpu.rflags() & rflags::ZF != 0;
    assert!(found || value == 0x5555_5555_5555_5555);
    found.then_some(value)
}

const LAR: &[u8] = &[0x0f, 0x02, 0xc1];
const LSL: &[u8] = &[0x0f, 0x03, 0xc1];
const VERR: &[u8] = &[0x0f, 0x00, 0xe1];
const VERW: &[u8] = &[0x0f, 0x00, 0xe9];

#[test]
fn rights_and_limits_of_visible_segments() {
    // User?, selector, LAR, LSL, VERR, VERW.
    let limit = Some(0xffff_ffff);
    for (user, selector, rights, size, read, write) in [
        (false, 0, None, None, false, false),
        (false, OUTSIDE, None, None, false, false),
        (false, CODE0, Some(0xcf_9a00), limit, true, false),
        (false, DATA0, Some(0xcf_9200), limit, true, true),
        (false, DATA0 | 3, None, None, false, false),
        (false, READ_ONLY, Some(0xcf_9000), limit, true, false),
        (false, EXECUTE_ONLY, Some(0xcf_9800), limit, false, false),
        (false, ABSENT_DATA, Some(0xcf_1200), limit, true, true),
        (false, CODE16, Some(0x00_9a00), Some(0xffff), true, false),
        (false, TASK, Some(0x00_8b00), Some(0x67), false, false),
        (true, DATA0, None, None, false, false),
        (true, CONFORMING, Some(0xcf_9e00), limit, true, false),
        (true, DATA3, Some(0xcf_f200), limit, true, true),
        (true, TASK, None, None, false, false),
    ] {
        let mut bench = Bench::protected();
        if user {
            bench = bench.user();
        }
        assert_eq!(
            query(&mut bench, LAR, selector),
            rights,
            "LAR {selector:#x}"
        );
        assert_eq!(query(&mut bench, LSL, selector), size, "LSL {selector:#x}");
        assert_eq!(
            query(&mut bench, VERR, selector).is_some(),
            read,
            "VERR {selector:#x}"
        );
        assert_eq!(
            query(&mut bench, VERW, selector).is_some(),
            write,
            "VERW {selector:#x}"
        );
    }
}

#[test]
fn system_types_that_lar_and_lsl_know() {
    // Bit n: type n.
    for (make, rights, limits) in [
        (
            Bench::protected as fn() -> Bench,
            0b0001_1010_0011_1110,
            0b0000_1010_0000_1110,
        ),
        (Bench::long, 0b0001_1010_0000_0100, 0b0000_1010_0000_0100),
    ] {
        let mut bench = make();
        for kind in 0..16 {
            bench.put(
                GDT + u64::from(SPARE),
                descriptor(0, 0x67, access::P | kind),
            );
            let known = |mask: u32| mask >> kind & 1 != 0;
            assert_eq!(
                query(&mut bench, LAR, SPARE).is_some(),
                known(rights),
                "LAR {kind}"
            );
            assert_eq!(
                query(&mut bench, LSL, SPARE).is_some(),
                known(limits),
                "LSL {kind}"
            );
        }
    }
}

#[test]
fn results_of_16_bits_keep_the_rest() {
    let mut bench = Bench::protected();
    let code = [&[0x66], LAR].concat();
    let value = query(&mut bench, &code, CODE0);
    assert_eq!(value, Some(0x5555_5555_5555_9a00));
}

#[test]
fn arpl_raises_the_requested_level() {
    for (selector, source, expected, raised) in [
        (0x12u16, 0x12u16, 0x12u16, false),
        (0x10, 0x1b, 0x13, true),
        (0x13, 0x18, 0x13, false),
        (0x11, 0x01, 0x11, false),
        (0x11, 0x02, 0x12, true),
    ] {
        let mut bench = Bench::protected();
        bench.cpu.set_reg(0, selector);
        bench.cpu.set_reg(1, source);
        // ARPL AX, CX; then the same in memory.
        bench.runs(&[0x63, 0xc8]);
        assert_eq!(bench.cpu.reg::<u16>(0), expected);
        assert_eq!(bench.cpu.rflags() & rflags::ZF != 0, raised);
        let mut bench = at_operand(bench);
        bench.put16(OPERAND, selector);
        bench.runs(&[0x63, 0x0b]);
        assert_eq!(bench.get(OPERAND, 2), [u64::from(expected)]);
        assert_eq!(bench.cpu.rflags() & rflags::ZF != 0, raised);
    }
}
