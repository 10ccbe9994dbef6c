//! Accesses across the end of a page, of which some pages cannot be written, or are not there.

use iced_x86::{Decoder, DecoderOptions};

use crate::guest::{CODE, DATA, Random, relative};
use crate::together;

/// Instructions with a memory operand: what comes before ModRM, and the bytes of an immediate after it.
const INSTRUCTIONS: &[(&[u8], u64)] = &[
    (&[0x48, 0x8b], 0),       // mov r64, m
    (&[0x89], 0),             // mov m, r32
    (&[0x66, 0x89], 0),       // mov m, r16
    (&[0x48, 0x01], 0),       // add m, r64
    (&[0x4c, 0x11], 0),       // adc m, r8 …
    (&[0x03], 0),             // add r32, m
    (&[0x81], 4),             // add … cmp m32, imm32
    (&[0x48, 0x0f, 0xc1], 0), // xadd m, r64
    (&[0x48, 0x0f, 0xb1], 0), // cmpxchg m, r64
    (&[0x0f, 0xbf], 0),       // movsx r32, m16
    (&[0xd1], 0),             // rol … sar m32, 1
    (&[0xf3, 0x0f, 0x6f], 0), // movdqu xmm, m
    (&[0xf3, 0x0f, 0x7f], 0), // movdqu m, xmm
    (&[0xf2, 0x0f, 0x58], 0), // addsd xmm, m
    (&[0xf2, 0x0f, 0x11], 0), // movsd m, xmm
    (&[0x0f, 0x12], 0),       // movlps xmm, m
    (&[0xc5, 0xfe, 0x6f], 0), // vmovdqu ymm, m
    (&[0xc5, 0xfe, 0x7f], 0), // vmovdqu m, ymm
    (&[0xc5, 0xf5, 0xfe], 0), // vpaddd ymm, ymm1, m
    (&[0xdb], 0),             // fild m32 …
    (&[0xdd], 0),             // fld m64 …
];

fn part(random: &mut Random, at: u64, code: &mut Vec<u8>) {
    let here = at + code.len() as u64;
    let (bytes, immediate) = INSTRUCTIONS[random.below(INSTRUCTIONS.len() as u64) as usize];
    let page = DATA + ((1 + random.below(6)) << 12);
    let data = page - 32 + random.below(33);
    code.extend(bytes);
    let register = random.below(8) as u8;
    code.extend(relative(
        register,
        here,
        bytes.len() as u64,
        immediate,
        data,
    ));
    code.extend((0..immediate).map(|_| random.next() as u8));
    let start = (here - at) as usize;
    let instruction = Decoder::new(64, &code[start..], DecoderOptions::NONE).decode();
    if instruction.rflags_undefined() != 0 {
        code.extend([0x39, 0xc0]); // cmp eax, eax
    }
}

#[test]
fn accesses_across_the_end_of_a_page_do_the_same_on_all() {
    together::compare(400, |random, _| {
        let mut code = Vec::new();
        for _ in 0..8 {
            part(random, CODE, &mut code);
        }
        code
    });
}
