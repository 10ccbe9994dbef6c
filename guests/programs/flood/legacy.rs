//! 32-bit code of ring 0, which a translator for 64-bit code may leave to something else that keeps code.

use core::arch::naked_asm;

use runtime::interrupts::catch;
use runtime::println;
use runtime::segments::{KERNEL_CODE, KERNEL_CODE_32};

use crate::{ARENA, store, store_long};

/// Bytes from one piece of code to the next.
const STEP: u64 = 16;

/// Runs the 32-bit code at `start`, whose last piece goes back to 64-bit code.
#[unsafe(naked)]
unsafe extern "C" fn run(start: u64) -> u64 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "xor ebp, ebp",
        "push {code_32}",
        "push rdi",
        "retfq",
        ".global flood_back",
        "flood_back:",
        "mov eax, ebp",
        "pop rbp",
        "pop rbx",
        "ret",
        code_32 = const KERNEL_CODE_32 as u64,
    )
}

unsafe extern "C" {
    static flood_back: u8;
}

/// A chain of pieces, each of which jumps to the next; `code` gives a piece's bytes, at most 14.
fn chain(pieces: u64, code: impl Fn(u64, &mut [u8; 14]) -> usize) {
    for piece in 0..pieces {
        let at = ARENA + piece * STEP;
        let mut bytes = [0; 14];
        let length = code(piece, &mut bytes);
        store(at, &bytes[..length]);
        store(at + length as u64, &[0xEB, 14 - length as u8]); // jmp to the next
    }
    // jmp far KERNEL_CODE:flood_back
    let at = ARENA + pieces * STEP;
    let [a, b, c, d] = ((&raw const flood_back) as u32).to_le_bytes();
    let [e, f] = KERNEL_CODE.to_le_bytes();
    store(at, &[0xEA, a, b, c, d, e, f]);
    store_long(at + 8, 0);
}

fn passes(what: &str, expected: u64) {
    let mut wrong = 0;
    for _ in 0..2 {
        match catch(run, ARENA) {
            Ok(found) => wrong += u32::from(found != expected),
            Err(fault) => {
                wrong += 1;
                println!(
                    "{what}: vector {} at {:#x}",
                    fault.frame.vector, fault.frame.rip
                );
            }
        }
    }
    println!("{what}: {wrong} wrong");
}

pub fn flood(scale: u64) {
    let pieces = (25_000 * scale).min(6_000_000);
    chain(pieces, |_, _| 0);
    passes("32-bit code, jumps", 0);
    chain(pieces, |_, bytes| {
        bytes[0] = 0x45; // inc ebp
        1
    });
    passes("32-bit code, counting", pieces);
    // Vector instructions that differ in registers and immediates: PSHUFD, PSHUFHW, PSHUFLW, SHUFPS and others.
    let kinds: [&[u8]; 5] = [
        &[0x66, 0x0F, 0x70],
        &[0xF3, 0x0F, 0x70],
        &[0xF2, 0x0F, 0x70],
        &[0x0F, 0xC6],
        &[0x66, 0x0F, 0xC6],
    ];
    let pieces = 64 * 256 * (kinds.len() as u64).min(scale);
    chain(pieces, |piece, bytes| {
        let kind = kinds[(piece / (64 * 256)) as usize];
        bytes[..kind.len()].copy_from_slice(kind);
        bytes[kind.len()] = 0xC0 | (piece & 63) as u8;
        bytes[kind.len() + 1] = (piece >> 6) as u8;
        kind.len() + 2
    });
    passes("32-bit code, vector instructions", 0);
}
