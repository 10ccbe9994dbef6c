//! x87 and MMX code at random, for programs and by itself: it is rare in what compilers make of this program.

use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions, Mnemonic};
use trapgate_engine::{Exit, Vcpu};
use trapgate_interp::Interpreter;
use trapgate_jit::{Lockstep, Translating};
use trapgate_x86::CpuProfile;
use trapgate_x86::profile::Level;

use crate::guest::{CODE, DATA, Empty, Random, contents, fill, memory, run, setting, state};

/// Opcodes after 0F of MMX instructions, and of conversions between MMX and SSE registers, with a prefix that they may
/// have.
const MMX: &[(Option<u8>, u8)] = &[
    (None, 0x60),
    (None, 0x61),
    (None, 0x63),
    (None, 0x67),
    (None, 0x6b),
    (None, 0x6e),
    (None, 0x6f),
    (None, 0x7e),
    (None, 0x7f),
    (None, 0xd1),
    (None, 0xd4),
    (None, 0xd5),
    (None, 0xd9),
    (None, 0xdd),
    (None, 0xe0),
    (None, 0xe7),
    (None, 0xeb),
    (None, 0xef),
    (None, 0xf4),
    (None, 0xf6),
    (None, 0xfc),
    (None, 0x2a),
    (None, 0x2c),
    (None, 0x2d),
    (Some(0x66), 0x2a),
    (Some(0x66), 0x2c),
    (Some(0x66), 0x2d),
    (Some(0xf2), 0xd6),
    (Some(0xf3), 0xd6),
    (None, 0xc4),
    (None, 0xc5),
    (None, 0xd7),
    (None, 0x70),
];

/// ModRM and displacement of `[rip + …]`, which is `data` in code at `at` where `before` bytes of the instruction come
/// before and `after` follow.
fn relative(register: u8, at: u64, before: u64, after: u64, data: u64) -> [u8; 5] {
    let next = at + before + 5 + after;
    let [a, b, c, d] = (data.wrapping_sub(next) as u32).to_le_bytes();
    [register << 3 | 5, a, b, c, d]
}

fn is_defined(bytes: &[u8]) -> bool {
    let instruction = Decoder::with_ip(64, bytes, CODE, DecoderOptions::NONE).decode();
    !instruction.is_invalid()
}

/// Where an operand lies: now and then across the end of a page.
fn place(random: &mut Random) -> u64 {
    let page = DATA + (random.below(0x20) << 12);
    match random.below(6) {
        0 => page + 0xff6 + random.below(10),
        _ => page + random.below(0x100) * 8,
    }
}

/// Appends an instruction, or a few that belong together, that will lie at `at`.
pub(crate) fn part(random: &mut Random, at: u64, code: &mut Vec<u8>) {
    let here = at + code.len() as u64;
    let register = random.below(8) as u8;
    let data = place(random);
    match random.below(44) {
        // Between registers, or without operand.
        0..=12 => loop {
            let bytes = [0xd8 + random.below(8) as u8, 0xc0 | random.below(64) as u8];
            if is_defined(&bytes) {
                code.extend(bytes);
                break;
            }
        },
        // With memory. What loads a control word from there would nearly always unmask exceptions.
        13..=22 => loop {
            let (escape, register) = (random.below(8) as u8, random.below(8) as u8);
            let mut bytes = vec![0xd8 + escape];
            bytes.extend(relative(register, here, 1, 0, data));
            let control = matches!((escape, register), (1, 4 | 5) | (5, 4));
            if is_defined(&bytes) && (!control || random.below(16) == 0) {
                code.extend(bytes);
                break;
            }
        },
        // fldz, fld1, fldpi: numbers that are numbers.
        23..=25 => code.extend([0xd9, [0xee, 0xe8, 0xeb][random.below(3) as usize]]),
        // A control word: mov word [data], imm16; fldcw [data]; fnstcw [data]. Mostly it masks all.
        26 | 27 => {
            let masks = if random.below(6) == 0 {
                random.below(64)
            } else {
                0x3f
            };
            let word = (random.below(16) << 8 | masks) as u16;
            code.extend([0x66, 0xc7]);
            code.extend(relative(0, here, 2, 2, data));
            code.extend(word.to_le_bytes());
            code.push(0xd9);
            code.extend(relative(5, here + 9, 1, 0, data));
            code.push(0xd9);
            code.extend(relative(7, here + 15, 1, 0, data));
        }
        // fninit, fnclex, fwait, fnstsw ax, emms
        28 => code.extend([0xdb, 0xe3]),
        29 => code.extend([0xdb, 0xe2]),
        30 => code.push(0x9b),
        31 => code.extend([0xdf, 0xe0]),
        32 => code.extend([0x0f, 0x77]),
        // fxsave64, fxrstor64 of the same
        33 => {
            let data = data & !15;
            for form in [0, 1] {
                let here = at + code.len() as u64;
                code.extend([0x48, 0x0f, 0xae]);
                code.extend(relative(form, here, 3, 0, data));
            }
        }
        // fcomi; cmovbe eax, edx; adc ebx, ecx
        34 => code.extend([0xdb, 0xf0 | register, 0x0f, 0x46, 0xc2, 0x11, 0xcb]),
        // mov dword [data], imm32; ldmxcsr [data], mostly of a value that masks all
        35 => {
            let value = match random.below(6) {
                0 => random.next() as u32 & 0x1_ffff,
                _ => 0x1f80 | random.next() as u32 & 0xe07f,
            };
            code.push(0xc7);
            code.extend(relative(0, here, 1, 4, data));
            code.extend(value.to_le_bytes());
            code.extend([0x0f, 0xae]);
            code.extend(relative(2, here + 10, 2, 0, data));
        }
        // stmxcsr [data], vstmxcsr [data]
        36 => {
            code.extend([0x0f, 0xae]);
            code.extend(relative(3, here, 2, 0, data));
        }
        37 => {
            code.extend([0xc5, 0xf8, 0xae]);
            code.extend(relative(3, here, 3, 0, data));
        }
        _ => {
            let (prefix, opcode) = MMX[random.below(MMX.len() as u64) as usize];
            code.extend(prefix);
            let before = if prefix.is_some() { 3 } else { 2 };
            code.extend([0x0f, opcode]);
            let immediate = matches!(opcode, 0xc4 | 0xc5 | 0x70);
            if random.below(2) == 0 {
                code.push(0xc0 | random.below(64) as u8);
            } else {
                code.extend(relative(register, here, before, immediate.into(), data));
            }
            if immediate {
                code.push(random.next() as u8);
            }
        }
    }
}

/// A run of them, with what tells them apart.
fn sequence(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..1 + random.below(24) {
        part(random, CODE, &mut code);
    }
    // fnstenv [data]; fxsave64 [data]: what the guest sees of it.
    for (bytes, form, data) in [
        (&[0xd9][..], 6, DATA + 0x1_f000),
        (&[0x48, 0x0f, 0xae], 0, DATA + 0x1_f100),
    ] {
        if random.below(2) == 0 {
            let here = CODE + code.len() as u64;
            code.extend(bytes);
            code.extend(relative(form, here, bytes.len() as u64, 0, data));
        }
    }
    code.extend([0xf4; 16]);
    code
}

#[test]
fn x87_and_mmx_code_does_the_same_on_all() {
    let seed = setting("TRAPGATE_TEST_SEED", 0x0087_0087_8087_8081);
    let cases = setting("TRAPGATE_TEST_CASES", 500);
    let mut random = Random(seed);
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let memories = [(); 3].map(|()| memory());
    let [one, two, three] = memories.each_ref().map(Arc::clone);
    let mut interp = Interpreter::new(one, Box::new(Empty), profile.clone(), 0, 1);
    let mut jit = Translating::new(two, Box::new(Empty), profile.clone(), 0, 1)
        .expect("the host can run translated code");
    jit.be_exact();
    let mut lockstep = Lockstep::new(three, Box::new(Empty), profile, 0, 1)
        .expect("the host can run translated code");
    let mut halted = 0;
    for case in 0..cases {
        let case_seed = setting("TRAPGATE_TEST_CASE", random.next() | 1);
        let start = |memory: &trapgate_memory::GuestMemory| {
            let mut random = Random(case_seed);
            fill(memory, &mut random);
            let code = sequence(&mut random);
            memory.write(CODE, &code).expect("code lies in memory");
            let mut start = state(&mut random);
            // Registers full of numbers, or of anything; sometimes exceptions that are not masked.
            for byte in &mut start.xsave.0[32..160] {
                *byte = random.next() as u8;
            }
            for register in 0..8 {
                start.xsave.0[32 + 16 * register + 10..][..6].fill(0);
                if random.below(2) == 0 {
                    start.xsave.0[32 + 16 * register + 7..][..3].copy_from_slice(&[0x80, 0, 0x40]);
                }
            }
            start.xsave.0[2..5].copy_from_slice(&[0, random.below(8) as u8 * 8, 0]);
            start.xsave.0[4] = [0, 0xff, random.next() as u8][random.below(3) as usize];
            if random.below(8) == 0 {
                start.xsave.0[0] = 0x40 | random.below(64) as u8;
            }
            (code, start)
        };
        let (code, begin) = start(&memories[0]);
        for memory in &memories[1..] {
            start(memory);
        }
        let expected = run(&mut interp, &begin);
        let found = run(&mut jit, &begin);
        let stepped = run(&mut lockstep, &begin);
        halted += u64::from(expected.0 == Exit::Halted);
        if let Exit::Failed(failure) = &stepped.0 {
            let report = lockstep.explain().unwrap_or_default();
            panic!("case {case} seed {case_seed}: {failure}\n{report}");
        }
        let same = |other: &(Exit, trapgate_x86::CpuState), memory: usize| {
            let differs = (0..832).filter(|&at| expected.1.xsave.0[at] != other.1.xsave.0[at]);
            let differs: Vec<usize> = differs.collect();
            assert!(
                expected == *other && contents(&memories[0]) == contents(&memories[memory]),
                "case {case} seed {case_seed}: {:?} {:?}, rip {:x} {:x}, xsave at {differs:?}\n{}",
                expected.0,
                other.0,
                expected.1.rip,
                other.1.rip,
                listing(&code),
            );
        };
        same(&found, 1);
        same(&stepped, 2);
    }
    eprintln!("{halted} of {cases} ran to the end");
    assert!(halted > cases / 5, "{halted} of {cases}");
}

fn listing(code: &[u8]) -> String {
    Decoder::with_ip(64, code, CODE, DecoderOptions::NONE)
        .into_iter()
        .take_while(|instruction| instruction.mnemonic() != Mnemonic::Hlt)
        .map(|instruction| format!("  {:x} {:?}\n", instruction.ip(), instruction.code()))
        .collect()
}
