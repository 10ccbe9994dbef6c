use trapgate_x86::descriptor::access;
use trapgate_x86::registers::sreg;
use trapgate_x86::{Exception, InterruptShadow, Segment};

use crate::frame::null_stack_segment;
use crate::system_testing::*;
use crate::testing::reset_cpu;

/// MOV to a segment register from AX.
fn mov_to(index: usize) -> [u8; 2] {
    [0x8e, 0xc0 | (index as u8) << 3]
}

#[test]
fn data_segments_and_their_errors() {
    for (user, selector, expected) in [
        (false, 0, None),
        (false, 3, None),
        (false, DATA0, None),
        (false, DATA3, None),
        (false, CODE0, None),
        (false, READ_ONLY, None),
        (false, DATA0 | 1, Some(gp(DATA0.into()))),
        (false, CONFORMING | 3, None),
        (false, EXECUTE_ONLY, Some(gp(EXECUTE_ONLY.into()))),
        (false, TASK, Some(gp(TASK.into()))),
        (false, OUTSIDE, Some(gp(OUTSIDE.into()))),
        (false, 0x0c, Some(gp(0x0c))),
        (false, ABSENT_DATA, Some(np(ABSENT_DATA.into()))),
        (true, DATA0, Some(gp(DATA0.into()))),
        (true, CONFORMING, None),
        (true, DATA3, None),
    ] {
        for index in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            for bench in [Bench::protected(), Bench::long()] {
                let mut bench = if user { bench.user() } else { bench };
                bench.cpu.set_reg(0, selector);
                match expected {
                    None => {
                        bench.runs(&mov_to(index));
                        assert_eq!(bench.selector(index), selector);
                        let usable = bench.cpu.sys.segments[index].is_usable();
                        assert_eq!(usable, selector > 3);
                    }
                    Some(exception) => {
                        assert_eq!(bench.faults(&mov_to(index)), exception, "{selector:#x}");
                    }
                }
            }
        }
    }
}

#[test]
fn stack_segments_and_their_errors() {
    for (user, selector, expected) in [
        (false, DATA0, None),
        (false, 0, Some(gp(0))),
        (false, DATA0 | 3, Some(gp(DATA0.into()))),
        (false, DATA3 & !3, Some(gp(0x20))),
        (false, CODE0, Some(gp(CODE0.into()))),
        (false, READ_ONLY, Some(gp(READ_ONLY.into()))),
        (false, OUTSIDE, Some(gp(OUTSIDE.into()))),
        (false, ABSENT_DATA, Some(ss(ABSENT_DATA.into()))),
        (true, DATA3, None),
        (true, DATA0, Some(gp(DATA0.into()))),
        (true, 3, Some(gp(0))),
    ] {
        let bench = Bench::protected();
        let mut bench = if user { bench.user() } else { bench };
        bench.cpu.set_reg(0, selector);
        match expected {
            None => {
                bench.runs(&mov_to(sreg::SS));
                assert_eq!(bench.selector(sreg::SS), selector);
                assert_eq!(bench.cpu.sys.shadow, InterruptShadow::MovSs);
                assert!(bench.cpu.attention && bench.cpu.end_block);
            }
            Some(exception) => {
                assert_eq!(bench.faults(&mov_to(sreg::SS)), exception, "{selector:#x}");
                assert_eq!(bench.cpu.sys.shadow, InterruptShadow::None);
            }
        }
    }
}

#[test]
fn null_stack_is_for_64_bit_code_below_level_3() {
    let mut bench = Bench::long();
    bench.cpu.set_reg(0, 0u16);
    bench.runs(&mov_to(sreg::SS));
    assert_eq!(bench.cpu.sys.segments[sreg::SS], null_stack_segment(0));
    assert_eq!(bench.cpu.cpl, 0);
    bench.push(8, &[1]);

    bench.cpu.set_reg(0, 1u16);
    assert_eq!(bench.faults(&mov_to(sreg::SS)), gp(0));
    let mut bench = Bench::long().user();
    bench.cpu.set_reg(0, 3u16);
    assert_eq!(bench.faults(&mov_to(sreg::SS)), gp(0));
}

#[test]
fn accessed_bit_is_set_by_loading() {
    let mut bench = Bench::protected();
    let [before] = bench.get(GDT + u64::from(DATA3 & !7), 8);
    bench.cpu.set_reg(0, DATA3);
    bench.runs(&mov_to(sreg::ES));
    assert_eq!(
        bench.get(GDT + u64::from(DATA3 & !7), 8),
        [before | 1 << 40]
    );
    assert!(bench.cpu.sys.segments[sreg::ES].has(access::ACCESSED));
}

#[test]
fn accessed_bit_in_a_misaligned_table_is_set() {
    let mut bench = Bench::protected();
    bench.cpu.sys.gdtr.base = 0x9003;
    let value = descriptor(0x1234, 0xfff, 0x4092);
    bench.put(0x9003 + u64::from(SPARE), value);
    bench.cpu.set_reg(0, SPARE);
    bench.runs(&mov_to(sreg::ES));
    assert_eq!(bench.get(0x9003 + u64::from(SPARE), 8), [value | 1 << 40]);
}

#[test]
fn mov_to_cs_is_undefined() {
    assert_eq!(Bench::protected().faults(&mov_to(sreg::CS)), Exception::UD);
}

#[test]
fn real_mode_keeps_limit_and_rights() {
    let (cpu, _) = reset_cpu();
    let mut bench = Bench { cpu };
    bench.cpu.sys.segments[sreg::DS] = Segment::flat(0x10, access::WRITABLE | access::DB);
    bench.cpu.sys.segments[sreg::ES] = Segment::null(0);
    bench.cpu.set_reg(0, 0x1234u16);
    bench.runs(&mov_to(sreg::DS));
    bench.runs(&mov_to(sreg::ES));
    let expected = Segment {
        selector: 0x1234,
        base: 0x12340,
        ..Segment::flat(0x10, access::WRITABLE | access::DB)
    };
    assert_eq!(bench.cpu.sys.segments[sreg::DS], expected);
    assert_eq!(
        bench.cpu.sys.segments[sreg::ES],
        Segment::real(0x1234, false)
    );
}

#[test]
fn vm86_segments_are_of_64_kib_at_level_3() {
    let mut bench = Bench::vm86(0);
    bench.cpu.set_reg(0, 0x1234u16);
    bench.runs(&mov_to(sreg::DS));
    let expected = Segment {
        selector: 0x1234,
        base: 0x12340,
        limit: 0xffff,
        access: 0xf3,
    };
    assert_eq!(bench.cpu.sys.segments[sreg::DS], expected);
}

#[test]
fn mov_from_a_segment_register() {
    let mut bench = Bench::long();
    bench.cpu.set_reg(3, 0x6000u64);
    for (code, expected) in [
        (&[0x8c, 0xd0][..], u64::from(DATA0)),
        (&[0x48, 0x8c, 0xd0], u64::from(DATA0)),
        (
            &[0x66, 0x8c, 0xd0],
            0xffff_ffff_ffff_0000 | u64::from(DATA0),
        ),
    ] {
        bench.cpu.set_reg(0, u64::MAX);
        bench.runs(code);
        assert_eq!(bench.cpu.reg::<u64>(0), expected);
    }
    bench.put(0x6000, u64::MAX);
    bench.runs(&[0x48, 0x8c, 0x13]);
    assert_eq!(bench.get(0x6000, 8), [u64::MAX << 16 | u64::from(DATA0)]);
}

#[test]
fn push_and_pop_have_operand_sizes() {
    for (make, push, pop, size) in [
        (
            Bench::protected as fn() -> Bench,
            &[0x0f, 0xa0][..],
            &[0x0f, 0xa9][..],
            4,
        ),
        (
            Bench::protected,
            &[0x66, 0x0f, 0xa0],
            &[0x66, 0x0f, 0xa9],
            2,
        ),
        (Bench::long, &[0x0f, 0xa0], &[0x0f, 0xa9], 8),
        (Bench::long, &[0x66, 0x0f, 0xa0], &[0x66, 0x0f, 0xa9], 2),
    ] {
        let mut bench = make();
        bench.cpu.load_segment(sreg::FS, DATA3).unwrap();
        bench.runs(push);
        assert_eq!(bench.sp(), STACK - size);
        assert_eq!(bench.get(bench.sp(), size), [u64::from(DATA3)]);
        bench.runs(pop);
        assert_eq!((bench.selector(sreg::GS), bench.sp()), (DATA3, STACK));
    }
}

#[test]
fn pop_ss_moves_the_old_stacks_pointer() {
    let mut bench = Bench::protected();
    bench.put(GDT + u64::from(SPARE), descriptor(0, 0xffff, 0x93));
    bench.cpu.set_reg(4, 0x2_fffc_u32);
    bench.put32(0x2_fffc, SPARE.into());
    bench.runs(&[0x17]);
    assert_eq!(bench.cpu.reg::<u32>(4), 0x3_0000);
    assert_eq!(bench.cpu.stack_mask, 0xffff);
    assert_eq!(bench.cpu.sys.shadow, InterruptShadow::MovSs);
}

#[test]
fn far_pointers_load_both_or_nothing() {
    let mut bench = Bench::long();
    bench.cpu.set_reg(3, 0x6000u64);
    bench.put(0x6000, 0x1122_3344_5566_7788);
    bench.put16(0x6008, DATA3);
    // LGS RCX, [RBX]
    bench.runs(&[0x48, 0x0f, 0xb5, 0x0b]);
    assert_eq!(bench.cpu.reg::<u64>(1), 0x1122_3344_5566_7788);
    assert_eq!(bench.selector(sreg::GS), DATA3);
    bench.put16(0x6008, OUTSIDE);
    assert_eq!(bench.faults(&[0x48, 0x0f, 0xb5, 0x0b]), gp(OUTSIDE.into()));

    // LSS ESP, [EBX] casts no shadow.
    let mut bench = Bench::protected();
    bench.cpu.set_reg(3, 0x6000u32);
    bench.put32(0x6000, 0x7777);
    bench.put16(0x6004, DATA0);
    bench.runs(&[0x0f, 0xb2, 0x23]);
    assert_eq!(
        (bench.sp(), bench.cpu.sys.shadow),
        (0x7777, InterruptShadow::None)
    );
}

/// The selector is all that is read and written of a stack's word.
#[test]
fn selectors_on_the_stack_have_two_bytes() {
    let (mut cpu, _) = crate::testing::long_cpu();
    crate::testing::unmap_page(&mut cpu);
    cpu.regs.gpr[4] = crate::testing::UNMAPPED - 2;
    cpu.memory
        .write(crate::testing::UNMAPPED - 2, &[0, 0])
        .unwrap();
    // pop fs
    crate::testing::execute(&mut cpu, &[0x0f, 0xa1]).unwrap();

    let (mut cpu, _) = crate::testing::protected_cpu();
    cpu.regs.gpr[4] = 0x8004;
    cpu.memory.write(0x8000, &[0xff; 4]).unwrap();
    // push ds
    crate::testing::execute(&mut cpu, &[0x1e]).unwrap();
    let mut word = [0; 4];
    cpu.memory.read(0x8000, &mut word).unwrap();
    assert_eq!(word, [0x10, 0, 0xff, 0xff]);
}
