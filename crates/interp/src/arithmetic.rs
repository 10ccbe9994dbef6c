//! Integer arithmetic and logic, written out for speed. What is rare runs on the host instead
//! ([`crate::vector`]).

use iced_x86::{Instruction, Mnemonic, OpKind};
use trapgate_x86::registers::gpr::{RAX, RCX, RDX};
use trapgate_x86::{Exception, Vector};

use crate::cpu::{Cpu, Step, Stop};
use crate::op::{Handler, Op, attribute};
use crate::width::Width;

/// Picks the instance of a generic handler for an operand size in bytes.
macro_rules! sized {
    ($size:expr, $handler:ident $(, $parameter:ty)*) => {
        match $size {
            1 => $handler::<$($parameter,)* u8> as Handler,
            2 => $handler::<$($parameter,)* u16> as Handler,
            4 => $handler::<$($parameter,)* u32> as Handler,
            _ => $handler::<$($parameter,)* u64> as Handler,
        }
    };
}
pub(crate) use sized;

/// A two-operand operation.
trait Binary {
    /// Whether the result is written back (CMP and TEST only set flags).
    const WRITES: bool;
    /// Computes the result and sets the flags.
    fn compute<T: Width>(cpu: &mut Cpu, a: T, b: T) -> T;
    /// Computes the result alone.
    fn result<T: Width>(cpu: &Cpu, a: T, b: T) -> T;
}

/// Declares a binary operation by its result and by which of [`LazyFlags`]' rules its flags follow.
macro_rules! binary {
    ($name:ident, $writes:literal, $flags:ident, |$cpu:ident, $a:ident, $b:ident| $result:expr) => {
        struct $name;
        impl Binary for $name {
            const WRITES: bool = $writes;
            #[inline(always)]
            fn compute<T: Width>(cpu: &mut Cpu, a: T, b: T) -> T {
                let result = Self::result(cpu, a, b);
                $flags(cpu, a, b, result);
                result
            }
            #[inline(always)]
            fn result<T: Width>($cpu: &Cpu, $a: T, $b: T) -> T {
                $result
            }
        }
    };
}

#[inline(always)]
fn sum_flags<T: Width>(cpu: &mut Cpu, a: T, b: T, result: T) {
    cpu.flags.add(a, b, result);
}

#[inline(always)]
fn difference_flags<T: Width>(cpu: &mut Cpu, a: T, b: T, result: T) {
    cpu.flags.sub(a, b, result);
}

#[inline(always)]
fn logic_flags<T: Width>(cpu: &mut Cpu, _: T, _: T, result: T) {
    cpu.flags.logic(result);
}

#[inline(always)]
fn plus<T: Width>(a: T, b: T, carry: bool) -> T {
    T::from_u64(
        a.to_u64()
            .wrapping_add(b.to_u64())
            .wrapping_add(u64::from(carry)),
    )
}

#[inline(always)]
fn minus<T: Width>(a: T, b: T, borrow: bool) -> T {
    T::from_u64(
        a.to_u64()
            .wrapping_sub(b.to_u64())
            .wrapping_sub(u64::from(borrow)),
    )
}

binary!(Add, true, sum_flags, |_cpu, a, b| plus(a, b, false));
binary!(Adc, true, sum_flags, |cpu, a, b| plus(
    a,
    b,
    cpu.flags.carry()
));
binary!(Sub, true, difference_flags, |_cpu, a, b| minus(a, b, false));
binary!(Sbb, true, difference_flags, |cpu, a, b| minus(
    a,
    b,
    cpu.flags.carry()
));
binary!(Cmp, false, difference_flags, |_cpu, a, b| minus(
    a, b, false
));
binary!(And, true, logic_flags, |_cpu, a, b| T::from_u64(
    a.to_u64() & b.to_u64()
));
binary!(Or, true, logic_flags, |_cpu, a, b| T::from_u64(
    a.to_u64() | b.to_u64()
));
binary!(Xor, true, logic_flags, |_cpu, a, b| T::from_u64(
    a.to_u64() ^ b.to_u64()
));
binary!(Test, false, logic_flags, |_cpu, a, b| T::from_u64(
    a.to_u64() & b.to_u64()
));

/// Where an operation's second operand comes from.
trait Source {
    fn get<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<T, Stop>;
}

macro_rules! source {
    ($(#[$doc:meta])* $name:ident, |$cpu:ident, $op:ident| $value:expr) => {
        $(#[$doc])*
        struct $name;
        impl Source for $name {
            #[inline(always)]
            fn get<T: Width>($cpu: &mut Cpu, $op: &Op) -> Result<T, Stop> {
                $value
            }
        }
    };
}

source!(
    /// The register `src`.
    Register,
    |cpu, op| Ok(cpu.reg::<T>(op.src))
);
source!(
    /// The immediate.
    Immediate,
    |_cpu, op| Ok(T::from_u64(op.immediate))
);
source!(
    /// The memory operand.
    Memory,
    |cpu, op| cpu.load::<T>(op)
);
source!(
    /// CL, a shift's count.
    Counter,
    |cpu, _op| Ok(T::from_u64(cpu.regs.gpr[RCX] & 0xff))
);

fn to_register<O: Binary, S: Source, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = S::get::<T>(cpu, op)?;
    let result = O::compute(cpu, cpu.reg::<T>(op.dst), value);
    if O::WRITES {
        cpu.set_reg(op.dst, result);
    }
    Ok(())
}

fn to_register_flagless<O: Binary, S: Source, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    if O::WRITES {
        let value = S::get::<T>(cpu, op)?;
        let result = O::result(cpu, cpu.reg::<T>(op.dst), value);
        cpu.set_reg(op.dst, result);
    }
    Ok(())
}

fn to_memory<O: Binary, S: Source, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = S::get::<T>(cpu, op)?;
    if O::WRITES {
        cpu.modify(op, |cpu, old: T| O::compute(cpu, old, value))
    } else {
        let old = cpu.load::<T>(op)?;
        O::compute(cpu, old, value);
        Ok(())
    }
}

fn binary<O: Binary>(instruction: &Instruction, op: &Op) -> Handler {
    let size = op.operand_size();
    match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Memory, OpKind::Register) => sized!(size, to_memory, O, Register),
        (OpKind::Memory, _) => sized!(size, to_memory, O, Immediate),
        (_, OpKind::Memory) => sized!(size, to_register, O, Memory),
        (_, OpKind::Register) => sized!(size, to_register, O, Register),
        _ => sized!(size, to_register, O, Immediate),
    }
}

fn binary_flagless<O: Binary>(instruction: &Instruction, op: &Op) -> Option<Handler> {
    let size = op.operand_size();
    match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Memory, _) | (_, OpKind::Memory) => None,
        (_, OpKind::Register) => Some(sized!(size, to_register_flagless, O, Register)),
        _ => Some(sized!(size, to_register_flagless, O, Immediate)),
    }
}

/// XOR or SUB of a register with itself: the usual way to clear it.
fn clear<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let zero = T::from_u64(0);
    cpu.flags.logic(zero);
    cpu.set_reg(op.dst, zero);
    Ok(())
}

/// A one-operand operation.
trait Unary {
    fn compute<T: Width>(cpu: &mut Cpu, value: T) -> T;
}

struct Increment;
impl Unary for Increment {
    #[inline(always)]
    fn compute<T: Width>(cpu: &mut Cpu, value: T) -> T {
        let carry = cpu.flags.carry();
        let one = T::from_u64(1);
        let result = plus(value, one, false);
        cpu.flags.add(value, one, result);
        cpu.flags.keep_carry(carry);
        result
    }
}

struct Decrement;
impl Unary for Decrement {
    #[inline(always)]
    fn compute<T: Width>(cpu: &mut Cpu, value: T) -> T {
        let carry = cpu.flags.carry();
        let one = T::from_u64(1);
        let result = minus(value, one, false);
        cpu.flags.sub(value, one, result);
        cpu.flags.keep_carry(carry);
        result
    }
}

struct Negate;
impl Unary for Negate {
    #[inline(always)]
    fn compute<T: Width>(cpu: &mut Cpu, value: T) -> T {
        let zero = T::from_u64(0);
        let result = minus(zero, value, false);
        cpu.flags.sub(zero, value, result);
        result
    }
}

struct Not;
impl Unary for Not {
    #[inline(always)]
    fn compute<T: Width>(_: &mut Cpu, value: T) -> T {
        T::from_u64(!value.to_u64())
    }
}

fn unary_register<O: Unary, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let result = O::compute(cpu, cpu.reg::<T>(op.dst));
    cpu.set_reg(op.dst, result);
    Ok(())
}

fn unary_memory<O: Unary, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.modify(op, |cpu, old: T| O::compute(cpu, old))
}

fn unary<O: Unary>(op: &Op) -> Handler {
    let size = op.operand_size();
    if op.has_memory() {
        sized!(size, unary_memory, O)
    } else {
        sized!(size, unary_register, O)
    }
}

/// A shift or rotation by a count that has been masked and is not zero.
trait Shift {
    /// Computes the result and sets the flags.
    fn compute<T: Width>(cpu: &mut Cpu, value: T, count: u32) -> T;
    /// Computes the result alone.
    fn result<T: Width>(value: T, count: u32) -> T;
}

fn top<T: Width>(value: T) -> bool {
    value.to_u64() >> (T::BITS - 1) & 1 != 0
}

struct Left;
impl Shift for Left {
    #[inline(always)]
    fn compute<T: Width>(cpu: &mut Cpu, value: T, count: u32) -> T {
        // One bit less first, so that the last bit out is at the top; a count beyond the width
        // shifts zeroes out.
        let before = if count > T::BITS {
            T::from_u64(0)
        } else {
            T::from_u64(value.to_u64().wrapping_shl(count - 1))
        };
        let result = T::from_u64(before.to_u64() << 1);
        let carry = top(before);
        cpu.flags.set_result(result, carry, carry != top(result));
        result
    }

    #[inline(always)]
    fn result<T: Width>(value: T, count: u32) -> T {
        // The mask lets 8- and 16-bit counts reach beyond their width, never beyond 31.
        T::from_u64(value.to_u64() << count)
    }
}

struct Right;
impl Shift for Right {
    #[inline(always)]
    fn compute<T: Width>(cpu: &mut Cpu, value: T, count: u32) -> T {
        let before = value.to_u64() >> (count - 1);
        let result = T::from_u64(before >> 1);
        cpu.flags.set_result(result, before & 1 != 0, top(value));
        result
    }

    #[inline(always)]
    fn result<T: Width>(value: T, count: u32) -> T {
        T::from_u64(value.to_u64() >> count)
    }
}

struct ArithmeticRight;
impl Shift for ArithmeticRight {
    #[inline(always)]
    fn compute<T: Width>(cpu: &mut Cpu, value: T, count: u32) -> T {
        let before = (value.sign_extend() as i64) >> (count - 1);
        let result = T::from_u64((before >> 1) as u64);
        cpu.flags.set_result(result, before & 1 != 0, false);
        result
    }

    #[inline(always)]
    fn result<T: Width>(value: T, count: u32) -> T {
        T::from_u64((value.sign_extend() as i64 >> count) as u64)
    }
}

struct RotateLeft;
impl Shift for RotateLeft {
    #[inline(always)]
    fn compute<T: Width>(cpu: &mut Cpu, value: T, count: u32) -> T {
        let result = Self::result(value, count);
        let carry = result.to_u64() & 1 != 0;
        cpu.flags.set_carry_overflow(carry, carry != top(result));
        result
    }

    #[inline(always)]
    fn result<T: Width>(value: T, count: u32) -> T {
        rotate_left(value, count % T::BITS)
    }
}

struct RotateRight;
impl Shift for RotateRight {
    #[inline(always)]
    fn compute<T: Width>(cpu: &mut Cpu, value: T, count: u32) -> T {
        let result = Self::result(value, count);
        let carry = top(result);
        let below = result.to_u64() >> (T::BITS - 2) & 1 != 0;
        cpu.flags.set_carry_overflow(carry, carry != below);
        result
    }

    #[inline(always)]
    fn result<T: Width>(value: T, count: u32) -> T {
        rotate_left(value, (T::BITS - count % T::BITS) % T::BITS)
    }
}

#[inline(always)]
fn rotate_left<T: Width>(value: T, count: u32) -> T {
    let value = value.to_u64();
    if count == 0 {
        T::from_u64(value)
    } else {
        T::from_u64(value << count | value >> (T::BITS - count))
    }
}

#[inline(always)]
fn masked_count<T: Width>(count: u64) -> u32 {
    (count & if T::BITS == 64 { 63 } else { 31 }) as u32
}

fn shift_register<O: Shift, S: Source, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let count = masked_count::<T>(S::get::<u64>(cpu, op)?);
    let value = cpu.reg::<T>(op.dst);
    // A 32-bit destination is written, its upper half cleared, even if the count is zero.
    let result = if count == 0 {
        value
    } else {
        O::compute(cpu, value, count)
    };
    cpu.set_reg(op.dst, result);
    Ok(())
}

fn shift_register_flagless<O: Shift, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let count = masked_count::<T>(op.immediate);
    let result = O::result(cpu.reg::<T>(op.dst), count);
    cpu.set_reg(op.dst, result);
    Ok(())
}

fn shift_memory<O: Shift, S: Source, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let count = masked_count::<T>(S::get::<u64>(cpu, op)?);
    cpu.modify(op, |cpu, old: T| {
        if count == 0 {
            old
        } else {
            O::compute(cpu, old, count)
        }
    })
}

fn shift<O: Shift>(instruction: &Instruction, op: &Op) -> Handler {
    let size = op.operand_size();
    let by_register = instruction.op1_kind() == OpKind::Register;
    match (op.has_memory(), by_register) {
        (true, true) => sized!(size, shift_memory, O, Counter),
        (true, false) => sized!(size, shift_memory, O, Immediate),
        (false, true) => sized!(size, shift_register, O, Counter),
        (false, false) => sized!(size, shift_register, O, Immediate),
    }
}

fn shift_flagless<O: Shift>(instruction: &Instruction, op: &Op) -> Option<Handler> {
    let size = op.operand_size();
    let plain = !op.has_memory() && instruction.op1_kind() != OpKind::Register;
    plain.then_some(sized!(size, shift_register_flagless, O))
}

// Multiplication and division.

/// The operand of a one-operand instruction.
#[inline(always)]
fn operand<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<T, Stop> {
    if op.has_memory() {
        cpu.load::<T>(op)
    } else {
        Ok(cpu.reg::<T>(op.dst))
    }
}

/// The double-width accumulator: AX, DX:AX, EDX:EAX, RDX:RAX.
#[inline(always)]
fn accumulator<T: Width>(cpu: &Cpu) -> u128 {
    if T::BITS == 8 {
        u128::from(cpu.regs.gpr[RAX] as u16)
    } else {
        let high = cpu.reg::<T>(RDX as u8).to_u64();
        let low = cpu.reg::<T>(RAX as u8).to_u64();
        u128::from(high) << T::BITS | u128::from(low)
    }
}

#[inline(always)]
fn set_accumulator<T: Width>(cpu: &mut Cpu, high: T, low: T) {
    if T::BITS == 8 {
        cpu.set_reg::<u8>(RAX as u8 * 8, low.to_u64() as u8);
        cpu.set_reg::<u8>(RAX as u8 * 8 + 1, high.to_u64() as u8);
    } else {
        cpu.set_reg(RAX as u8, low);
        cpu.set_reg(RDX as u8, high);
    }
}

/// The low part of the accumulator, AL to RAX.
#[inline(always)]
fn low<T: Width>(cpu: &Cpu) -> T {
    T::from_u64(cpu.regs.gpr[RAX])
}

fn multiply<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let factor = operand::<T>(cpu, op)?;
    let product = u128::from(low::<T>(cpu).to_u64()) * u128::from(factor.to_u64());
    let high = T::from_u64((product >> T::BITS) as u64);
    let result = T::from_u64(product as u64);
    let overflow = high.to_u64() != 0;
    cpu.flags.set_result(result, overflow, overflow);
    set_accumulator(cpu, high, result);
    Ok(())
}

fn multiply_signed<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let factor = operand::<T>(cpu, op)?;
    let a = low::<T>(cpu).sign_extend() as i64;
    let product = i128::from(a) * i128::from(factor.sign_extend() as i64);
    let high = T::from_u64((product >> T::BITS) as u64);
    let result = T::from_u64(product as u64);
    let overflow = product != i128::from(result.sign_extend() as i64);
    cpu.flags.set_result(result, overflow, overflow);
    set_accumulator(cpu, high, result);
    Ok(())
}

#[inline(always)]
fn multiply_into<T: Width>(cpu: &mut Cpu, op: &Op, a: T, b: T) -> Step {
    let product = i128::from(a.sign_extend() as i64) * i128::from(b.sign_extend() as i64);
    let result = T::from_u64(product as u64);
    let overflow = product != i128::from(result.sign_extend() as i64);
    cpu.flags.set_result(result, overflow, overflow);
    cpu.set_reg(op.dst, result);
    Ok(())
}

fn multiply_two<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let b = if op.has_memory() {
        cpu.load::<T>(op)?
    } else {
        cpu.reg::<T>(op.src)
    };
    let a = cpu.reg::<T>(op.dst);
    multiply_into(cpu, op, a, b)
}

fn multiply_three<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let a = if op.has_memory() {
        cpu.load::<T>(op)?
    } else {
        cpu.reg::<T>(op.src)
    };
    multiply_into(cpu, op, a, T::from_u64(op.immediate))
}

fn divide<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let divisor = u128::from(operand::<T>(cpu, op)?.to_u64());
    let dividend = accumulator::<T>(cpu);
    // The usual case fits 64 bits, where division is ten times faster.
    let (quotient, remainder) = match (u64::try_from(dividend), divisor as u64) {
        (_, 0) => return Err(cpu.raise(Exception::plain(Vector::DE))),
        (Ok(dividend), divisor) => (u128::from(dividend / divisor), dividend % divisor),
        (Err(_), _) => (dividend / divisor, (dividend % divisor) as u64),
    };
    if quotient >> T::BITS != 0 {
        return Err(cpu.raise(Exception::plain(Vector::DE)));
    }
    set_accumulator(cpu, T::from_u64(remainder), T::from_u64(quotient as u64));
    Ok(())
}

fn divide_signed<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let divisor = i128::from(operand::<T>(cpu, op)?.sign_extend() as i64);
    let unsigned = accumulator::<T>(cpu);
    let unused = 128 - 2 * T::BITS;
    let dividend = ((unsigned << unused) as i128) >> unused;
    let quotient = dividend.checked_div(divisor);
    let fits = |quotient: i128| {
        let result = T::from_u64(quotient as u64);
        i128::from(result.sign_extend() as i64) == quotient
    };
    match quotient {
        Some(quotient) if fits(quotient) => {
            let remainder = (dividend % divisor) as u64;
            set_accumulator(cpu, T::from_u64(remainder), T::from_u64(quotient as u64));
            Ok(())
        }
        _ => Err(cpu.raise(Exception::plain(Vector::DE))),
    }
}

// Sign extension of the accumulator.

fn extend_accumulator(cpu: &mut Cpu, op: &Op) -> Step {
    let rax = cpu.regs.gpr[RAX];
    match op.code {
        2 => cpu.set_reg::<u16>(RAX as u8, rax as i8 as u16),
        4 => cpu.set_reg::<u32>(RAX as u8, rax as i16 as u32),
        _ => cpu.regs.gpr[RAX] = rax as i32 as u64,
    }
    Ok(())
}

fn sign_of_accumulator(cpu: &mut Cpu, op: &Op) -> Step {
    let rax = cpu.regs.gpr[RAX];
    match op.code {
        2 => cpu.set_reg::<u16>(RDX as u8, ((rax as i16) >> 15) as u16),
        4 => cpu.set_reg::<u32>(RDX as u8, ((rax as i32) >> 31) as u32),
        _ => cpu.regs.gpr[RDX] = ((rax as i64) >> 63) as u64,
    }
    Ok(())
}

fn byte_swap_32(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<u32>(op.dst).swap_bytes();
    cpu.set_reg(op.dst, value);
    Ok(())
}

fn byte_swap_64(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<u64>(op.dst).swap_bytes();
    cpu.set_reg(op.dst, value);
    Ok(())
}

/// BT with a register destination.
fn bit_test<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let bit = if op.code == 0 {
        cpu.reg::<T>(op.src).to_u64()
    } else {
        op.immediate
    };
    let value = cpu.reg::<T>(op.dst).to_u64();
    cpu.flags
        .set_carry(value >> (bit & u64::from(T::BITS - 1)) & 1 != 0);
    Ok(())
}

/// The handler of an instruction that this module executes.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    if op.has(attribute::LOCK) {
        // A host atomic.
        return None;
    }
    let size = op.operand_size();
    let same = instruction.op_count() == 2
        && instruction.op1_kind() == OpKind::Register
        && instruction.op0_kind() == OpKind::Register
        && op.dst == op.src;
    Some(match instruction.mnemonic() {
        Mnemonic::Xor | Mnemonic::Sub if same => sized!(size, clear),
        Mnemonic::Add => binary::<Add>(instruction, op),
        Mnemonic::Or => binary::<Or>(instruction, op),
        Mnemonic::Adc => binary::<Adc>(instruction, op),
        Mnemonic::Sbb => binary::<Sbb>(instruction, op),
        Mnemonic::And => binary::<And>(instruction, op),
        Mnemonic::Sub => binary::<Sub>(instruction, op),
        Mnemonic::Xor => binary::<Xor>(instruction, op),
        Mnemonic::Cmp => binary::<Cmp>(instruction, op),
        Mnemonic::Test => binary::<Test>(instruction, op),
        Mnemonic::Inc => unary::<Increment>(op),
        Mnemonic::Dec => unary::<Decrement>(op),
        Mnemonic::Neg => unary::<Negate>(op),
        Mnemonic::Not => unary::<Not>(op),
        Mnemonic::Shl | Mnemonic::Sal => shift::<Left>(instruction, op),
        Mnemonic::Shr => shift::<Right>(instruction, op),
        Mnemonic::Sar => shift::<ArithmeticRight>(instruction, op),
        Mnemonic::Rol => shift::<RotateLeft>(instruction, op),
        Mnemonic::Ror => shift::<RotateRight>(instruction, op),
        Mnemonic::Mul => sized!(size, multiply),
        Mnemonic::Imul if instruction.op_count() == 1 => sized!(size, multiply_signed),
        Mnemonic::Imul if instruction.op_count() == 2 => sized!(size, multiply_two),
        Mnemonic::Imul => sized!(size, multiply_three),
        Mnemonic::Div => sized!(size, divide),
        Mnemonic::Idiv => sized!(size, divide_signed),
        Mnemonic::Cbw => with_code(op, 2, extend_accumulator),
        Mnemonic::Cwde => with_code(op, 4, extend_accumulator),
        Mnemonic::Cdqe => with_code(op, 8, extend_accumulator),
        Mnemonic::Cwd => with_code(op, 2, sign_of_accumulator),
        Mnemonic::Cdq => with_code(op, 4, sign_of_accumulator),
        Mnemonic::Cqo => with_code(op, 8, sign_of_accumulator),
        Mnemonic::Bswap if size == 4 => byte_swap_32,
        Mnemonic::Bswap if size == 8 => byte_swap_64,
        Mnemonic::Bt if !op.has_memory() => {
            op.code = u8::from(instruction.op1_kind() != OpKind::Register);
            sized!(size, bit_test)
        }
        _ => return None,
    })
}

/// A handler that does the same and leaves the flags as they are, where it is worth while.
pub(crate) fn without_flags(instruction: &Instruction, op: &Op) -> Option<Handler> {
    if op.has(attribute::LOCK) {
        return None;
    }
    match instruction.mnemonic() {
        Mnemonic::Add => binary_flagless::<Add>(instruction, op),
        Mnemonic::Or => binary_flagless::<Or>(instruction, op),
        Mnemonic::Adc => binary_flagless::<Adc>(instruction, op),
        Mnemonic::Sbb => binary_flagless::<Sbb>(instruction, op),
        Mnemonic::And => binary_flagless::<And>(instruction, op),
        Mnemonic::Sub => binary_flagless::<Sub>(instruction, op),
        Mnemonic::Xor => binary_flagless::<Xor>(instruction, op),
        Mnemonic::Cmp => binary_flagless::<Cmp>(instruction, op),
        Mnemonic::Test => binary_flagless::<Test>(instruction, op),
        Mnemonic::Shl | Mnemonic::Sal => shift_flagless::<Left>(instruction, op),
        Mnemonic::Shr => shift_flagless::<Right>(instruction, op),
        Mnemonic::Sar => shift_flagless::<ArithmeticRight>(instruction, op),
        Mnemonic::Rol => shift_flagless::<RotateLeft>(instruction, op),
        Mnemonic::Ror => shift_flagless::<RotateRight>(instruction, op),
        _ => None,
    }
}

fn with_code(op: &mut Op, code: u8, handler: Handler) -> Handler {
    op.code = code;
    handler
}
