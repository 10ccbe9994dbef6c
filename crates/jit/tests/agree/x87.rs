//! x87 and MMX code at random, for programs and by itself: it is rare in what compilers make of this program.

use iced_x86::{Decoder, DecoderOptions};
use trapgate_x86::CpuState;

use crate::guest::{CODE, DATA, Random, place, relative};
use crate::together;

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

fn is_defined(bytes: &[u8]) -> bool {
    let instruction = Decoder::with_ip(64, bytes, CODE, DecoderOptions::NONE).decode();
    !instruction.is_invalid()
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
    code
}

/// Registers full of numbers, or of anything; sometimes exceptions that are not masked.
fn fill_registers(random: &mut Random, state: &mut CpuState) {
    let image = &mut state.xsave.0;
    for byte in &mut image[32..160] {
        *byte = random.next() as u8;
    }
    for register in 0..8 {
        image[32 + 16 * register + 10..][..6].fill(0);
        if random.below(2) == 0 {
            image[32 + 16 * register + 7..][..3].copy_from_slice(&[0x80, 0, 0x40]);
        }
    }
    image[2..4].copy_from_slice(&[0, random.below(8) as u8 * 8]);
    image[4] = [0, 0xff, random.next() as u8][random.below(3) as usize];
    if random.below(8) == 0 {
        image[0] = 0x40 | random.below(64) as u8;
    }
}

#[test]
fn x87_and_mmx_code_does_the_same_on_all() {
    together::compare(500, |random, state| {
        fill_registers(random, state);
        sequence(random)
    });
}
