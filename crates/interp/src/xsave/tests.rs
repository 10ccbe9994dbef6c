//! Tests of saving and restoring, with the host as judge.

use trapgate_x86::Vector;

use super::*;
use crate::testing::{GP0, UD, execute, fault, long_cpu, protected_cpu};

/// Instructions on `[RBX]`, without REX.W.
const FXSAVE: &[u8] = &[0x0f, 0xae, 0x03];
const FXRSTOR: &[u8] = &[0x0f, 0xae, 0x0b];
const LDMXCSR: &[u8] = &[0x0f, 0xae, 0x13];
const STMXCSR: &[u8] = &[0x0f, 0xae, 0x1b];
const XSAVE: &[u8] = &[0x0f, 0xae, 0x23];
const XRSTOR: &[u8] = &[0x0f, 0xae, 0x2b];
const XSAVEOPT: &[u8] = &[0x0f, 0xae, 0x33];
const XSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x23];
const XRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x2b];
const XSAVEOPT64: &[u8] = &[0x48, 0x0f, 0xae, 0x33];
const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x03];
const FXRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x0b];

const AT: u64 = 0x8000;
const NM: (Vector, Option<u32>) = (Vector::NM, None);

#[derive(Clone)]
#[repr(align(64))]
struct Aligned(Area);

/// A 64-bit processor with everything enabled, RBX at [`AT`], EDX:EAX all ones.
fn enabled_cpu() -> Cpu {
    let (mut cpu, _) = long_cpu();
    cpu.sys.cr4 |= cr4::OSXSAVE;
    cpu.sys.xcr0 = 7;
    cpu.regs.gpr[gpr::RAX] = u64::MAX;
    cpu.regs.gpr[gpr::RDX] = u64::MAX;
    cpu.regs.gpr[gpr::RBX] = AT;
    cpu
}

/// Registers in which every bit that can be set is somewhere.
fn fill(regs: &mut RegisterFile) {
    regs.x87.set_control_word(0x0240);
    regs.x87.set_status_word(0xb982);
    regs.x87.0[4] = 0xa5;
    let instruction = 0x0000_7123_89ab_cdef;
    regs.x87
        .set_pointers(instruction, 0x5a5, Some(0x0000_7fed_cba9_8765));
    for index in 0..8 {
        regs.x87
            .set_stack_register(index, [0x11 * (index as u8 + 1); 10]);
    }
    for (index, vector) in regs.vector.iter_mut().enumerate() {
        vector.0 = std::array::from_fn(|byte| (index * 32 + byte) as u8 | 0x80);
    }
    regs.mxcsr = 0xffc0;
}

fn memory(cpu: &Cpu) -> Area {
    let mut area = [0; XSAVE_BYTES];
    cpu.memory.read(AT, &mut area).unwrap();
    area
}

fn put(cpu: &Cpu, area: &Area) {
    cpu.memory.write(AT, area).unwrap();
}

/// Lets the host load an image and save it again, in one of its own areas.
#[allow(unsafe_code)]
fn through_host(image: &Area, out: &mut Aligned, components: u32) {
    let image = Aligned(*image);
    let mut saved = Box::new([0u8; 16384]);
    let offset = saved.as_ptr().align_offset(64);
    // SAFETY: the instructions access areas of the sizes that `components`, and for FXSAVE the
    // instruction itself, ask for; the host's own state is what it was at the end.
    unsafe {
        let own = saved.as_mut_ptr().add(offset);
        if components == 0 {
            std::arch::asm!(
                "fxsave64 [{own}]", "fxrstor64 [{image}]", "fxsave64 [{out}]",
                "fxrstor64 [{own}]",
                own = in(reg) own, image = in(reg) image.0.as_ptr(),
                out = in(reg) out.0.as_mut_ptr());
        } else {
            std::arch::asm!(
                "xsave64 [{own}]", "xrstor64 [{image}]", "xsave64 [{out}]",
                "xrstor64 [{own}]",
                own = in(reg) own, image = in(reg) image.0.as_ptr(),
                out = in(reg) out.0.as_mut_ptr(), in("eax") components, in("edx") 0);
        }
    }
    // MXCSR.MM in MXCSR_MASK: AMD's processors have it (APM vol. 1, 4.2.2), the profiles do not.
    out.0[30] &= !2;
}

#[test]
fn fxsave_writes_what_the_host_does() {
    let mut cpu = enabled_cpu();
    fill(&mut cpu.regs);
    let background = [0xcc; XSAVE_BYTES];
    put(&cpu, &background);
    execute(&mut cpu, FXSAVE64).unwrap();
    let ours = memory(&cpu);
    let mut host = Aligned(background);
    through_host(&ours, &mut host, 0);
    assert_eq!(ours[..416], host.0[..416]);
    assert_eq!(ours[416..], background[416..], "not the processor's");
}

#[test]
fn xsave_writes_what_the_host_does() {
    if !std::arch::is_x86_feature_detected!("avx") {
        println!("skipped: the host has no AVX");
        return;
    }
    let mut cpu = enabled_cpu();
    fill(&mut cpu.regs);
    execute(&mut cpu, XSAVE64).unwrap();
    let ours = memory(&cpu);
    assert_eq!(state_bits(&ours), 7);
    let mut host = Aligned([0; XSAVE_BYTES]);
    through_host(&ours, &mut host, 7);
    assert_eq!(ours, host.0);
    // The host agrees on what components in their initial configuration are.
    for component in [xcr0::X87, xcr0::SSE, xcr0::AVX] {
        let mut lacking = ours;
        lacking[HEADER_AT] = 7 & !(component as u8);
        put(&cpu, &lacking);
        execute(&mut cpu, XRSTOR64).unwrap();
        execute(&mut cpu, XSAVE64).unwrap();
        let ours = memory(&cpu);
        through_host(&lacking, &mut host, 7);
        assert_eq!(ours[..HEADER_AT], host.0[..HEADER_AT], "{component}");
        assert_eq!(ours[YMM_AT..], host.0[YMM_AT..], "{component}");
        assert_eq!(state_bits(&ours), 7 & !component);
    }
}

#[test]
fn registers_come_back_from_memory() {
    let instructions = [
        (FXSAVE64, FXRSTOR64),
        (XSAVE64, XRSTOR64),
        (XSAVEOPT64, XRSTOR64),
    ];
    for (save, restore) in instructions {
        let mut cpu = enabled_cpu();
        fill(&mut cpu.regs);
        let before = cpu.regs.clone();
        execute(&mut cpu, save).unwrap();
        let uppers = save != FXSAVE64;
        let (gpr, vector) = (cpu.regs.gpr, before.vector);
        cpu.regs = RegisterFile::new();
        cpu.regs.gpr = gpr;
        execute(&mut cpu, restore).unwrap();
        let bytes = if uppers { 32 } else { 16 };
        for (got, expected) in cpu.regs.vector.iter().zip(vector) {
            assert_eq!(got.0[..bytes], expected.0[..bytes]);
        }
        assert_eq!(cpu.regs.mxcsr, before.mxcsr);
        assert_eq!(cpu.regs.x87.0[..24], before.x87.0[..24]);
        for index in 0..8 {
            let expected = before.x87.stack_register(index);
            assert_eq!(cpu.regs.x87.stack_register(index), expected);
        }
    }
}

#[test]
fn narrow_forms_keep_half_the_pointers() {
    for (save, restore) in [(FXSAVE, FXRSTOR), (XSAVE, XRSTOR)] {
        let mut cpu = enabled_cpu();
        fill(&mut cpu.regs);
        execute(&mut cpu, save).unwrap();
        let area = memory(&cpu);
        assert_eq!(area[8..16], [0xef, 0xcd, 0xab, 0x89, 0, 0, 0, 0]);
        assert_eq!(area[16..24], [0x65, 0x87, 0xa9, 0xcb, 0, 0, 0, 0]);
        execute(&mut cpu, restore).unwrap();
        assert_eq!(cpu.regs.x87.instruction_pointer(), 0x89ab_cdef);
        assert_eq!(cpu.regs.x87.data_pointer(), 0xcba9_8765);
    }
}

#[test]
fn eight_registers_are_reached_outside_64bit_mode() {
    for (save, restore) in [(FXSAVE, FXRSTOR), (XSAVE, XRSTOR)] {
        let (mut cpu, _) = protected_cpu();
        cpu.sys.cr4 = cr4::OSFXSR | cr4::OSXSAVE;
        cpu.sys.xcr0 = 7;
        cpu.regs.gpr[gpr::RAX] = 7;
        cpu.regs.gpr[gpr::RBX] = AT;
        put(&cpu, &[0; XSAVE_BYTES]);
        fill(&mut cpu.regs);
        execute(&mut cpu, save).unwrap();
        let area = memory(&cpu);
        assert_eq!(area[160..176], cpu.regs.vector[0].0[..16]);
        assert_eq!(area[272..288], cpu.regs.vector[7].0[..16]);
        assert_eq!(area[288..416], [0; 128]);
        assert_eq!(area[704..], [0; 128]);
        let before = cpu.regs.vector;
        put(&cpu, &XsaveImage::default().0);
        execute(&mut cpu, restore).unwrap();
        assert_eq!(cpu.regs.vector[7].0[..16], [0; 16]);
        assert_eq!(cpu.regs.vector[8], before[8]);
    }
}

#[test]
fn xsave_writes_only_what_is_requested() {
    let mut cpu = enabled_cpu();
    fill(&mut cpu.regs);
    let mut background = [0xcc; XSAVE_BYTES];
    background[512..520].copy_from_slice(&0x8000_0000_0000_0007u64.to_le_bytes());
    // Requested, and the bytes written besides XSTATE_BV.
    let cases: [(u64, &[std::ops::Range<usize>]); 4] = [
        (0, &[]),
        (1, &[0..24, 32..160]),
        (2, &[24..32, 160..416]),
        (4, &[24..32, 576..832]),
    ];
    for (requested, ranges) in cases {
        cpu.regs.gpr[gpr::RAX] = requested;
        cpu.regs.gpr[gpr::RDX] = 0;
        for instruction in [XSAVE64, XSAVEOPT64] {
            put(&cpu, &background);
            execute(&mut cpu, instruction).unwrap();
            let area = memory(&cpu);
            for (at, &byte) in area.iter().enumerate() {
                let written = ranges.iter().any(|range| range.contains(&at));
                assert!(written || byte == background[at], "{requested}: byte {at}");
            }
            for range in ranges {
                assert_ne!(area[range.clone()], background[range.clone()]);
            }
            let bits = state_bits(&area);
            assert_eq!(bits, 0x8000_0000_0000_0007, "other bits stay");
        }
    }
}

#[test]
fn xsaveopt_leaves_initial_components_out() {
    let mut cpu = enabled_cpu();
    cpu.regs.mxcsr = 0x9f80;
    cpu.regs.vector[3].0[20] = 1;
    let mut background = [0xcc; XSAVE_BYTES];
    background[HEADER_AT] = 0;
    put(&cpu, &background);
    execute(&mut cpu, XSAVEOPT64).unwrap();
    let area = memory(&cpu);
    assert_eq!(area[..24], background[..24]);
    assert_eq!(mxcsr_of(&area), 0x9f80);
    assert_eq!(area[32..512], background[32..512]);
    assert_eq!(area[512], 4);
    assert_eq!(area[576 + 3 * 16 + 4], 1);
    put(&cpu, &background);
    execute(&mut cpu, XSAVE64).unwrap();
    let area = memory(&cpu);
    assert_eq!(area[..2], [0x7f, 0x03], "XSAVE writes them");
    assert_eq!(area[512], 4);
}

#[test]
fn restoring_checks_before_it_changes_anything() {
    type Change = fn(&mut Area);
    let cases: [(&str, &[u8], Change); 7] = [
        ("component not enabled", XRSTOR, |area| area[512] |= 0x80),
        ("compacted", XRSTOR, |area| area[527] = 0x80),
        ("reserved in header", XRSTOR, |area| area[528] = 1),
        ("reserved in header", XRSTOR, |area| area[535] = 1),
        ("MXCSR", XRSTOR, |area| area[26] = 1),
        ("MXCSR, absent", XRSTOR, |area| {
            area[512] = 1;
            area[27] = 1;
        }),
        ("MXCSR", FXRSTOR, |area| area[26] = 1),
    ];
    for (what, instruction, change) in cases {
        let mut cpu = enabled_cpu();
        let mut area = *image(&RegisterFile::new()).0;
        change(&mut area);
        put(&cpu, &area);
        fill(&mut cpu.regs);
        let before = cpu.export();
        assert_eq!(fault(&mut cpu, instruction), GP0, "{what}");
        assert!(cpu.export() == before, "{what}");
    }
    // The rest of the header is not looked at.
    let mut cpu = enabled_cpu();
    let mut area = *XsaveImage::default().0;
    area[536..576].fill(0xff);
    put(&cpu, &area);
    execute(&mut cpu, XRSTOR).unwrap();
}

#[test]
fn mxcsr_is_restored_with_either_of_its_components() {
    for (requested, restored) in [(1, false), (2, true), (4, true)] {
        let mut cpu = enabled_cpu();
        cpu.regs.gpr[gpr::RAX] = requested;
        cpu.regs.gpr[gpr::RDX] = 0;
        let mut area = *XsaveImage::default().0;
        area[24..28].copy_from_slice(&0x3f80u32.to_le_bytes());
        put(&cpu, &area);
        execute(&mut cpu, XRSTOR).unwrap();
        let expected = if restored { 0x3f80 } else { 0x1f80 };
        assert_eq!(cpu.regs.mxcsr, expected, "{requested}");
    }
}

#[test]
fn pending_exceptions_show_in_the_status_word() {
    let mut cpu = enabled_cpu();
    // Invalid operation, flagged while masked, then unmasked by FLDCW.
    cpu.regs.x87.set_status_word(1);
    cpu.regs.x87.set_control_word(0x37e);
    execute(&mut cpu, FXSAVE).unwrap();
    assert_eq!(memory(&cpu)[2..4], [0x81, 0x80]);
}

#[test]
fn operands_must_be_aligned() {
    for (instruction, offset) in [
        (FXSAVE, 8),
        (FXRSTOR, 8),
        (XSAVE, 32),
        (XRSTOR, 32),
        (XSAVEOPT, 32),
    ] {
        let mut cpu = enabled_cpu();
        cpu.regs.gpr[gpr::RBX] = AT + offset;
        assert_eq!(fault(&mut cpu, instruction), GP0, "{instruction:02x?}");
    }
}

#[test]
fn control_registers_forbid_or_defer() {
    for instruction in [FXSAVE, FXRSTOR, XSAVE, XRSTOR, LDMXCSR, STMXCSR] {
        let mut cpu = enabled_cpu();
        cpu.sys.cr0 |= cr0::TS;
        assert_eq!(fault(&mut cpu, instruction), NM, "{instruction:02x?}");
    }
    for (instruction, vector) in [(FXSAVE, NM), (FXRSTOR, NM), (LDMXCSR, UD)] {
        let mut cpu = enabled_cpu();
        cpu.sys.cr0 |= cr0::EM;
        assert_eq!(fault(&mut cpu, instruction), vector, "{instruction:02x?}");
    }
    for instruction in [XSAVE, XRSTOR, XSAVEOPT, &[0xc5, 0xf8, 0xae, 0x13]] {
        let mut cpu = enabled_cpu();
        cpu.sys.cr4 &= !cr4::OSXSAVE;
        assert_eq!(fault(&mut cpu, instruction), UD, "{instruction:02x?}");
    }
    let mut cpu = enabled_cpu();
    cpu.sys.cr4 &= !cr4::OSFXSR;
    assert_eq!(fault(&mut cpu, STMXCSR), UD);
}

#[test]
fn save_across_a_missing_page_writes_nothing() {
    let mut cpu = enabled_cpu();
    // The last page of the mapped GiB leads to memory; nothing is mapped after it.
    let entry = (0x20_0000u64 | 0xe7).to_le_bytes();
    let last = crate::testing::PAGE_TABLES + 0x2000 + 511 * 8;
    cpu.memory.write(last, &entry).unwrap();
    cpu.memory.write(0x40_0000 - 576, &[0xcc; 576]).unwrap();
    fill(&mut cpu.regs);
    cpu.regs.gpr[gpr::RBX] = (1 << 30) - 576;
    let (vector, code) = fault(&mut cpu, XSAVE64);
    assert_eq!((vector, code), (Vector::PF, Some(2)));
    assert_eq!(cpu.exception.address, 1 << 30);
    let mut kept = [0; 576];
    cpu.memory.read(0x40_0000 - 576, &mut kept).unwrap();
    assert_eq!(kept, [0xcc; 576]);
}

#[test]
fn mxcsr_moves_to_and_from_memory() {
    let cases: [(&[u8], &[u8]); 2] = [
        (LDMXCSR, STMXCSR),
        (&[0xc5, 0xf8, 0xae, 0x13], &[0xc5, 0xf8, 0xae, 0x1b]),
    ];
    for (load, store) in cases {
        let mut cpu = enabled_cpu();
        cpu.memory.write(AT, &0x7f80u32.to_le_bytes()).unwrap();
        execute(&mut cpu, load).unwrap();
        assert_eq!(cpu.regs.mxcsr, 0x7f80);
        cpu.regs.mxcsr = 0x1fa0;
        execute(&mut cpu, store).unwrap();
        let mut stored = [0; 4];
        cpu.memory.read(AT, &mut stored).unwrap();
        assert_eq!(u32::from_le_bytes(stored), 0x1fa0);
        cpu.memory.write(AT, &0x1_0000u32.to_le_bytes()).unwrap();
        assert_eq!(fault(&mut cpu, load), GP0);
        assert_eq!(cpu.regs.mxcsr, 0x1fa0);
    }
}
