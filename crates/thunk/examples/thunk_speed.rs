//! Nanoseconds per thunk call, next to compiling one: `cargo run --release -p trapgate-thunk
//! --example thunk_speed`.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::time::Instant;

use iced_x86::{Decoder, DecoderOptions};
use trapgate_thunk::{RegisterFile, ThunkCache};

const CALLS: u32 = 2_000_000;

#[repr(C, align(64))]
struct Operand([u8; 64]);

/// Best of some rounds, in nanoseconds a call.
fn best(mut round: impl FnMut()) -> f64 {
    (0..5)
        .map(|_| {
            let start = Instant::now();
            round();
            start.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS)
        })
        .fold(f64::INFINITY, f64::min)
}

fn main() -> Result<(), trapgate_thunk::ThunkError> {
    let cases: [(&str, &[u8]); 15] = [
        ("paddd xmm1, xmm2", &[0x66, 0x0f, 0xfe, 0xca]),
        ("paddd xmm1, [m]", &[0x66, 0x0f, 0xfe, 0x08]),
        ("movdqu [m], xmm1", &[0xf3, 0x0f, 0x7f, 0x08]),
        ("addsd xmm1, xmm2", &[0xf2, 0x0f, 0x58, 0xca]),
        ("comisd xmm1, xmm2", &[0x66, 0x0f, 0x2f, 0xca]),
        ("cvtsi2sd xmm1, rax", &[0xf2, 0x48, 0x0f, 0x2a, 0xc8]),
        ("vpaddd ymm1, ymm2, ymm3", &[0xc5, 0xed, 0xfe, 0xcb]),
        ("fadd st, st1", &[0xd8, 0xc1]),
        ("paddd mm1, mm2", &[0x0f, 0xfe, 0xca]),
        ("popcnt rax, rcx", &[0xf3, 0x48, 0x0f, 0xb8, 0xc1]),
        ("adc rax, rcx", &[0x48, 0x11, 0xc8]),
        ("shl rax, cl", &[0x48, 0xd3, 0xe0]),
        ("lock xadd [m], rcx", &[0xf0, 0x48, 0x0f, 0xc1, 0x08]),
        ("lock cmpxchg [m], rcx", &[0xf0, 0x48, 0x0f, 0xb1, 0x08]),
        ("xchg [m], rcx", &[0x48, 0x87, 0x08]),
    ];
    let mut cache = ThunkCache::new();
    let mut registers = RegisterFile::new();
    registers.x87.0[4] = 0xff;
    for index in 0..8 {
        registers
            .x87
            .set_stack_register(index, [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    }
    let mut operand = Operand([0; 64]);
    for (name, bytes) in cases {
        let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        let thunk = cache.thunk(&instruction)?;
        let memory = operand.0.as_mut_ptr();
        let time = best(|| {
            for _ in 0..CALLS {
                // SAFETY: no operand here is larger than the buffer, which is aligned.
                let _ = black_box(unsafe { thunk.run(black_box(&mut registers), memory) });
            }
        });
        println!("{name:26} {time:6.1} ns a call");
    }

    // add eax, imm32 with another immediate each time: a new thunk each time.
    let compiled: u32 = 100_000;
    let start = Instant::now();
    for immediate in 0..compiled {
        let mut bytes = vec![0x05];
        bytes.extend_from_slice(&immediate.to_le_bytes());
        let instruction = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
        black_box(cache.thunk(&instruction)?);
    }
    let time = start.elapsed().as_secs_f64() * 1e9 / f64::from(compiled);
    println!("{:26} {time:6.0} ns each", "compile");
    let start = Instant::now();
    let instruction = Decoder::new(64, &[0x66, 0x0f, 0xfe, 0xca], DecoderOptions::NONE).decode();
    for _ in 0..CALLS {
        black_box(cache.thunk(black_box(&instruction))?);
    }
    let time = start.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS);
    println!("{:26} {time:6.0} ns each", "look up");
    Ok(())
}
