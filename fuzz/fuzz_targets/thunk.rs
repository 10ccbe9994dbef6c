//! Any bytes as a user-mode instruction, on registers that no CPU would hold: what becomes host code
//! must not harm the host.
#![no_main]
#![allow(unsafe_code)]

use std::cell::RefCell;

use arbitrary::Arbitrary;
use iced_x86::{Decoder, DecoderOptions};
use libfuzzer_sys::fuzz_target;
use trapgate_thunk::{RegisterFile, ThunkCache, Vector};

/// Bytes on both sides of the memory operand that must stay as they are.
const FENCE: usize = 64;
/// More than the largest operand (FSAVE's 108 bytes).
const OPERAND: usize = 128;
const UNTOUCHED: u8 = 0xa5;
/// Bytes of host code before the cache starts over.
const CODE_BYTES: usize = 1 << 20;

thread_local! {
    static CACHE: RefCell<ThunkCache> = RefCell::new(ThunkCache::with_limit(CODE_BYTES));
}

#[derive(Arbitrary, Debug)]
enum Bitness {
    Bits16,
    Bits32,
    Bits64,
}

#[derive(Arbitrary, Debug)]
struct Input {
    bitness: Bitness,
    instruction: [u8; 15],
    flags: u16,
    mxcsr: u16,
    control_word: Option<u16>,
    /// Repeated over the general registers, the vector registers, the x87 state and the operand.
    values: Vec<u8>,
}

#[repr(C, align(64))]
struct Operand([u8; FENCE + OPERAND + FENCE]);

fuzz_target!(|input: Input| run(&input));

fn run(input: &Input) {
    let bitness = match input.bitness {
        Bitness::Bits16 => 16,
        Bitness::Bits32 => 32,
        Bitness::Bits64 => 64,
    };
    let instruction = Decoder::new(bitness, &input.instruction, DecoderOptions::NONE).decode();
    let thunk = CACHE.with_borrow_mut(|cache| cache.thunk(&instruction));
    let Ok(thunk) = thunk else {
        return;
    };

    let mut values = input.values.iter().copied().chain([0]).cycle();
    let mut next = || values.next().unwrap_or(0);
    let mut registers = RegisterFile::new();
    for register in &mut registers.gpr {
        *register = u64::from_le_bytes(std::array::from_fn(|_| next()));
    }
    registers.flags = input.flags.into();
    registers.mxcsr = input.mxcsr.into();
    for vector in &mut registers.vector {
        *vector = Vector(std::array::from_fn(|_| next()));
    }
    for byte in &mut registers.x87.0 {
        *byte = next();
    }
    if let Some(word) = input.control_word {
        registers.x87.set_control_word(word);
    }

    let mut memory = Operand([UNTOUCHED; FENCE + OPERAND + FENCE]);
    let size = thunk.memory.map_or(0, |operand| operand.size);
    assert!(size <= OPERAND, "an operand of {size} bytes");
    for byte in &mut memory.0[FENCE..FENCE + size] {
        *byte = next();
    }
    let host = host_control();
    // SAFETY: aligned to 64 bytes, as long as the operand, and ours.
    let _ = unsafe { thunk.run(&mut registers, memory.0[FENCE..].as_mut_ptr()) };
    assert_eq!(
        host_control(),
        host,
        "the host's floating-point control changed"
    );
    let untouched = |bytes: &[u8]| bytes.iter().all(|byte| *byte == UNTOUCHED);
    assert!(untouched(&memory.0[..FENCE]), "wrote before its operand");
    assert!(
        untouched(&memory.0[FENCE + size..]),
        "wrote behind its operand"
    );
}

/// MXCSR without its flags, and the x87 control word.
fn host_control() -> (u32, u16) {
    let (mut mxcsr, mut word) = (0_u32, 0_u16);
    // SAFETY: stores 4 and 2 bytes to locals.
    unsafe {
        core::arch::asm!("stmxcsr [{}]", "fnstcw [{}]", in(reg) &mut mxcsr, in(reg) &mut word);
    }
    (mxcsr & !0x3f, word)
}
