//! Moves, loads of addresses, conditional moves and sets, exchanges.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::arithmetic::sized;
use crate::cpu::{Cpu, Step};
use crate::op::{Handler, Op, attribute};
use crate::width::Width;

fn move_register<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<T>(op.src);
    cpu.set_reg(op.dst, value);
    Ok(())
}

fn move_immediate<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.set_reg(op.dst, T::from_u64(op.immediate));
    Ok(())
}

fn move_load<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.load::<T>(op)?;
    cpu.set_reg(op.dst, value);
    Ok(())
}

fn move_store<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<T>(op.src);
    cpu.store(op, value)
}

fn move_store_immediate<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.store(op, T::from_u64(op.immediate))
}

/// MOV with a 64-bit absolute address; the op's immediate is the address.
fn absolute<T: Width>(cpu: &mut Cpu, op: &Op, write: bool) -> Result<u64, crate::cpu::Stop> {
    let offset = op.immediate & Cpu::address_mask(op);
    cpu.segment_address(usize::from(op.segment), offset, T::BYTES, write)
}

fn move_load_absolute<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let linear = absolute::<T>(cpu, op, false)?;
    let value = cpu.read::<T>(linear, op.segment)?;
    cpu.set_reg(op.dst, value);
    Ok(())
}

fn move_store_absolute<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let linear = absolute::<T>(cpu, op, true)?;
    let value = cpu.reg::<T>(op.src);
    cpu.write(linear, op.segment, value)
}

fn zero_extend_register<F: Width, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<F>(op.src);
    cpu.set_reg(op.dst, T::from_u64(value.to_u64()));
    Ok(())
}

fn zero_extend_memory<F: Width, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.load::<F>(op)?;
    cpu.set_reg(op.dst, T::from_u64(value.to_u64()));
    Ok(())
}

fn sign_extend_register<F: Width, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.reg::<F>(op.src);
    cpu.set_reg(op.dst, T::from_u64(value.sign_extend()));
    Ok(())
}

fn sign_extend_memory<F: Width, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.load::<F>(op)?;
    cpu.set_reg(op.dst, T::from_u64(value.sign_extend()));
    Ok(())
}

fn load_address<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let offset = cpu.offset(op);
    cpu.set_reg(op.dst, T::from_u64(offset));
    Ok(())
}

fn conditional_move<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    // The source is read, and may fault, whatever the condition; and a 32-bit destination is
    // written, its upper half cleared.
    let source = if op.has_memory() {
        cpu.load::<T>(op)?
    } else {
        cpu.reg::<T>(op.src)
    };
    let value = if cpu.flags.condition(op.code) {
        source
    } else {
        cpu.reg::<T>(op.dst)
    };
    cpu.set_reg(op.dst, value);
    Ok(())
}

fn set_on_condition(cpu: &mut Cpu, op: &Op) -> Step {
    let value = u8::from(cpu.flags.condition(op.code));
    if op.has_memory() {
        cpu.store(op, value)
    } else {
        cpu.set_reg(op.dst, value);
        Ok(())
    }
}

fn exchange_registers<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let (a, b) = (cpu.reg::<T>(op.dst), cpu.reg::<T>(op.src));
    cpu.set_reg(op.dst, b);
    cpu.set_reg(op.src, a);
    Ok(())
}

/// CLC, STC, CMC: `code` is 0, 1, 2.
fn change_carry(cpu: &mut Cpu, op: &Op) -> Step {
    let carry = match op.code {
        0 => false,
        1 => true,
        _ => !cpu.flags.carry(),
    };
    cpu.flags.set_carry(carry);
    Ok(())
}

/// CLD, STD: `code` is 0, 1.
fn change_direction(cpu: &mut Cpu, op: &Op) -> Step {
    use trapgate_x86::registers::rflags::DF;
    cpu.system_flags = cpu.system_flags & !DF | if op.code == 0 { 0 } else { DF };
    Ok(())
}

fn load_flags_to_ah(cpu: &mut Cpu, _: &Op) -> Step {
    let flags = cpu.rflags() as u8;
    cpu.set_reg(1, flags);
    Ok(())
}

fn store_ah_to_flags(cpu: &mut Cpu, _: &Op) -> Step {
    use trapgate_x86::registers::rflags::{AF, CF, OF, PF, SF, ZF};
    let ah = u64::from(cpu.reg::<u8>(1));
    let overflow = cpu.flags.get() & OF;
    cpu.flags.put(ah & (SF | ZF | AF | PF | CF) | overflow);
    Ok(())
}

/// MOVZX, MOVSX, MOVSXD: the instance for the kind and size of the source and the destination's
/// size.
macro_rules! extension {
    ($instruction:expr, $op:expr, $register:ident, $memory:ident) => {{
        let size = $op.operand_size();
        let from = if $op.has_memory() {
            $instruction.memory_size().size()
        } else {
            $instruction.op1_register().size()
        };
        match ($op.has_memory(), from) {
            (false, 1) => sized!(size, $register, u8),
            (false, 2) => sized!(size, $register, u16),
            (false, _) => sized!(size, $register, u32),
            (true, 1) => sized!(size, $memory, u8),
            (true, 2) => sized!(size, $memory, u16),
            (true, _) => sized!(size, $memory, u32),
        }
    }};
}

/// The handler of an instruction that this module executes.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let size = op.operand_size();
    let (to, from) = (instruction.op0_kind(), instruction.op1_kind());
    Some(match instruction.mnemonic() {
        Mnemonic::Mov => match (to, from) {
            _ if is_special_register(instruction) => return None,
            (OpKind::Register, OpKind::Register) => sized!(size, move_register),
            (OpKind::Register, OpKind::Memory) if is_absolute(instruction) => {
                op.immediate = instruction.memory_displacement64();
                sized!(size, move_load_absolute)
            }
            (OpKind::Memory, OpKind::Register) if is_absolute(instruction) => {
                op.immediate = instruction.memory_displacement64();
                sized!(size, move_store_absolute)
            }
            (OpKind::Register, OpKind::Memory) => sized!(size, move_load),
            (OpKind::Memory, OpKind::Register) => sized!(size, move_store),
            (OpKind::Memory, _) => sized!(size, move_store_immediate),
            _ => sized!(size, move_immediate),
        },
        Mnemonic::Movzx => extension!(instruction, op, zero_extend_register, zero_extend_memory),
        Mnemonic::Movsx | Mnemonic::Movsxd => {
            extension!(instruction, op, sign_extend_register, sign_extend_memory)
        }
        Mnemonic::Lea => sized!(size, load_address),
        mnemonic if condition_of(mnemonic, CMOV).is_some() => {
            op.code = condition_of(mnemonic, CMOV)?;
            sized!(size, conditional_move)
        }
        mnemonic if condition_of(mnemonic, SET).is_some() => {
            op.code = condition_of(mnemonic, SET)?;
            set_on_condition
        }
        Mnemonic::Xchg if !op.has_memory() => sized!(size, exchange_registers),
        Mnemonic::Clc => code(op, 0, change_carry),
        Mnemonic::Stc => code(op, 1, change_carry),
        Mnemonic::Cmc => code(op, 2, change_carry),
        Mnemonic::Cld => code(op, 0, change_direction),
        Mnemonic::Std => code(op, 1, change_direction),
        Mnemonic::Lahf => load_flags_to_ah,
        Mnemonic::Sahf => store_ah_to_flags,
        _ => return None,
    })
    .filter(|_| !op.has(attribute::LOCK))
}

fn code(op: &mut Op, code: u8, handler: Handler) -> Handler {
    op.code = code;
    handler
}

/// Whether a MOV is to or from a segment, control or debug register.
fn is_special_register(instruction: &Instruction) -> bool {
    [instruction.op0_register(), instruction.op1_register()]
        .iter()
        .any(|register| {
            register.is_segment_register()
                || register.is_cr()
                || register.is_dr()
                || register.is_tr()
        })
}

/// Whether the memory operand is a 64-bit absolute address (MOV's A0 to A3 in 64-bit mode).
fn is_absolute(instruction: &Instruction) -> bool {
    instruction.memory_displ_size() == 8
        && instruction.memory_base() == iced_x86::Register::None
        && instruction.memory_index() == iced_x86::Register::None
}

/// The sixteen CMOVcc in the order of their condition codes.
const CMOV: [Mnemonic; 16] = [
    Mnemonic::Cmovo,
    Mnemonic::Cmovno,
    Mnemonic::Cmovb,
    Mnemonic::Cmovae,
    Mnemonic::Cmove,
    Mnemonic::Cmovne,
    Mnemonic::Cmovbe,
    Mnemonic::Cmova,
    Mnemonic::Cmovs,
    Mnemonic::Cmovns,
    Mnemonic::Cmovp,
    Mnemonic::Cmovnp,
    Mnemonic::Cmovl,
    Mnemonic::Cmovge,
    Mnemonic::Cmovle,
    Mnemonic::Cmovg,
];

/// The sixteen SETcc in the order of their condition codes.
const SET: [Mnemonic; 16] = [
    Mnemonic::Seto,
    Mnemonic::Setno,
    Mnemonic::Setb,
    Mnemonic::Setae,
    Mnemonic::Sete,
    Mnemonic::Setne,
    Mnemonic::Setbe,
    Mnemonic::Seta,
    Mnemonic::Sets,
    Mnemonic::Setns,
    Mnemonic::Setp,
    Mnemonic::Setnp,
    Mnemonic::Setl,
    Mnemonic::Setge,
    Mnemonic::Setle,
    Mnemonic::Setg,
];

/// A mnemonic's place in a table of the sixteen conditions.
pub(crate) fn condition_of(mnemonic: Mnemonic, table: [Mnemonic; 16]) -> Option<u8> {
    table
        .iter()
        .position(|&candidate| candidate == mnemonic)
        .map(|place| place as u8)
}
