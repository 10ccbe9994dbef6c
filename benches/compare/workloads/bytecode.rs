//! A register machine: one dispatch for each of its instructions, as in the interpreter of a scripting language.

use std::hint::black_box;

use crate::{Setting, Work};

#[derive(Clone, Copy)]
enum Op {
    /// a ← constant
    Set(u8, u32),
    /// a ← b
    Move(u8, u8),
    /// a ← b + c
    Add(u8, u8, u8),
    /// a ← b × constant + 1
    Grow(u8, u8, u32),
    /// a ← b ÷ 2
    Halve(u8, u8),
    /// a ← b + constant
    Increase(u8, u8, u32),
    /// a ← array[b]
    Load(u8, u8),
    /// array[a] ← b
    Store(u8, u8),
    /// Jumps if a is odd.
    IfOdd(u8, u16),
    /// Jumps if a < b.
    IfLess(u8, u8, u16),
    /// Jumps.
    Jump(u16),
    /// Ends; the result is a.
    End(u8),
}

/// Lengths of Collatz sequences below a limit; how many have which length is counted in the array. The result is
/// the sum of the lengths.
fn program(limit: u32) -> Vec<Op> {
    vec![
        /* 0 */ Op::Set(0, 1), // n
        /* 1 */ Op::Set(1, limit),
        /* 2 */ Op::Set(2, 0), // sum
        /* 3 */ Op::Set(6, 2),
        // Next n.
        /* 4 */ Op::Move(3, 0),
        /* 5 */ Op::Set(4, 0), // length
        // Next in the sequence.
        /* 6 */ Op::IfLess(3, 6, 13),
        /* 7 */ Op::Increase(4, 4, 1),
        /* 8 */ Op::IfOdd(3, 11),
        /* 9 */ Op::Halve(3, 3),
        /* 10 */ Op::Jump(6),
        /* 11 */ Op::Grow(3, 3, 3),
        /* 12 */ Op::Jump(6),
        // One more of this length.
        /* 13 */ Op::Load(5, 4),
        /* 14 */ Op::Increase(5, 5, 1),
        /* 15 */ Op::Store(4, 5),
        /* 16 */ Op::Add(2, 2, 4),
        /* 17 */ Op::Increase(0, 0, 1),
        /* 18 */ Op::IfLess(0, 1, 4),
        /* 19 */ Op::End(2),
    ]
}

fn interpret(program: &[Op], array: &mut [u64; 1024]) -> u64 {
    let mut registers = [0_u64; 16];
    let mut at = 0;
    macro_rules! r {
        ($index:expr) => {
            registers[usize::from($index) & 15]
        };
    }
    loop {
        let op = program[at];
        at += 1;
        match op {
            Op::Set(a, value) => r!(a) = u64::from(value),
            Op::Move(a, b) => r!(a) = r!(b),
            Op::Add(a, b, c) => r!(a) = r!(b).wrapping_add(r!(c)),
            Op::Grow(a, b, value) => r!(a) = r!(b).wrapping_mul(u64::from(value)) + 1,
            Op::Halve(a, b) => r!(a) = r!(b) >> 1,
            Op::Increase(a, b, value) => r!(a) = r!(b) + u64::from(value),
            Op::Load(a, b) => r!(a) = array[r!(b) as usize & 1023],
            Op::Store(a, b) => array[r!(a) as usize & 1023] = r!(b),
            Op::IfOdd(a, to) if r!(a) & 1 == 1 => at = usize::from(to),
            Op::IfLess(a, b, to) if r!(a) < r!(b) => at = usize::from(to),
            Op::IfOdd(..) | Op::IfLess(..) => {}
            Op::Jump(to) => at = usize::from(to),
            Op::End(a) => return r!(a),
        }
    }
}

pub(crate) fn run(setting: &Setting) -> Work {
    let program = program((180_000 / setting.scale) as u32);
    Box::new(move || {
        let mut array = [0; 1024];
        let sum = interpret(black_box(&program), &mut array);
        Ok(sum ^ array[100] << 40)
    })
}
