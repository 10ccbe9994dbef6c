//! From bytes to ops.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use trapgate_x86::registers::sreg;

use crate::cpu::{CodeSize, Cpu, Step};
use crate::features::{Reader, is_lacking};
use crate::op::{AddressForm, Handler, NO_REGISTER, Op, RIP_REGISTER, attribute};
use crate::quiet::Traits;
use crate::vector::Lowered;
use crate::{
    arithmetic, branch, control, debug, entropy, events, flag_control, gather, hints, identity,
    legacy, moves, msr, port, quiet, segments, stack, strings, transfer, vector, xsave,
};

/// Bytes of the longest instruction.
pub(crate) const MAX_INSTRUCTION: usize = 15;

/// Most instructions in a block.
pub(crate) const MAX_BLOCK: usize = 48;

/// What decoding a run of bytes gave.
pub(crate) struct Decoded {
    /// The instructions, at least one.
    pub(crate) ops: Vec<Op>,
    /// Bytes they take.
    pub(crate) length: usize,
}

/// Why nothing was decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DecodeError {
    /// The bytes end inside the first instruction.
    TooShort,
    /// The thunk table is full: all decoded code must be thrown away first.
    TableFull,
}

/// Decodes instructions from `bytes`, the code at RIP, up to the first that ends a block or does
/// not fit, at most `most`. The result does not depend on RIP.
pub(crate) fn decode(cpu: &mut Cpu, bytes: &[u8], most: usize) -> Result<Decoded, DecodeError> {
    let bits = match cpu.code_size {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    // Addresses relative to RIP are taken relative to the next instruction, so any will do.
    let mut reader = Reader::new(cpu.profile.level, bits, bytes, 0);
    let mut instruction = Instruction::default();
    let mut ops: Vec<Op> = Vec::with_capacity(8);
    let mut traits: Vec<Traits> = Vec::with_capacity(8);
    let mut length = 0;
    while reader.can_read() && ops.len() < most {
        reader.read(&mut instruction);
        let end = reader.position();
        if instruction.is_invalid() {
            if reader.is_cut() && bytes.len() - length < MAX_INSTRUCTION {
                // It goes on beyond the bytes there are.
                break;
            }
            let taken = end - length;
            ops.push(
                if taken >= MAX_INSTRUCTION && is_too_long(cpu, bits, &bytes[length..]) {
                    too_long()
                } else {
                    undefined()
                },
            );
            length = end;
            break;
        }
        if is_lacking(cpu.profile.level, &instruction) {
            ops.push(undefined());
            length = end;
            break;
        }
        let mut op = prepare(&instruction);
        match lower(cpu, &instruction, &bytes[length..end], &mut op) {
            Lowered::Done => {}
            Lowered::TableFull if ops.is_empty() => return Err(DecodeError::TableFull),
            Lowered::TableFull => break,
        }
        traits.push(Traits::of(&instruction, &op));
        ops.push(op);
        length = end;
        if ends_block(&instruction) {
            break;
        }
    }
    if ops.is_empty() {
        return Err(DecodeError::TooShort);
    }
    quiet::join(&mut ops, &traits);
    Ok(Decoded { ops, length })
}

/// Whether what is no instruction, and of which the decoder took 15 bytes, has more: it gives up there. The first byte is a
/// prefix, as nothing else is so long, and what it takes without that one tells.
fn is_too_long(cpu: &Cpu, bits: u32, bytes: &[u8]) -> bool {
    let mut reader = Reader::new(cpu.profile.level, bits, &bytes[1..], 0);
    reader.read(&mut Instruction::default());
    reader.is_cut() || reader.position() >= MAX_INSTRUCTION
}

fn op_undefined(cpu: &mut Cpu, _: &Op) -> Step {
    cpu.ud()
}

fn op_too_long(cpu: &mut Cpu, _: &Op) -> Step {
    cpu.gp0()
}

/// Raises #GP(0): more than 15 bytes (SDM vol. 3A, 7.15, #GP).
fn too_long() -> Op {
    Op {
        handler: op_too_long,
        ..undefined()
    }
}

/// Raises #UD. It has no length: RIP stays where it is.
pub(crate) fn undefined() -> Op {
    Op {
        handler: op_undefined,
        dst: 0,
        src: 0,
        base: NO_REGISTER,
        index: NO_REGISTER,
        quiet: 0,
        segment: sreg::DS as u8,
        length: 0,
        form: AddressForm::None,
        displacement: 0,
        attributes: 0,
        code: 0,
        extra: 0,
        immediate: 0,
    }
}

/// Fills in what does not depend on who executes the instruction.
fn prepare(instruction: &Instruction) -> Op {
    let mut op = undefined();
    op.length = instruction.len() as u8;
    if instruction.has_rep_prefix() {
        op.attributes |= attribute::REP;
    }
    if instruction.has_repne_prefix() {
        op.attributes |= attribute::REPNE;
    }
    if instruction.has_lock_prefix() {
        op.attributes |= attribute::LOCK;
    }
    op.segment = segment_number(effective_segment(instruction));

    let mut size = 0;
    for operand in 0..instruction.op_count() {
        match instruction.op_kind(operand) {
            OpKind::Register => {
                let register = instruction.op_register(operand);
                let number = register_number(register);
                if operand == 0 {
                    op.dst = number;
                    size = register.size();
                } else if operand == 1 {
                    op.src = number;
                }
            }
            OpKind::Memory => {
                memory_operand(instruction, &mut op);
                if operand == 0 || size == 0 {
                    size = instruction.memory_size().size();
                }
            }
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                let target = instruction.near_branch_target();
                op.immediate = target.wrapping_sub(instruction.next_ip());
            }
            OpKind::FarBranch16 => {
                op.extra = instruction.far_branch_selector();
                op.immediate = u64::from(instruction.far_branch16());
            }
            OpKind::FarBranch32 => {
                op.extra = instruction.far_branch_selector();
                op.immediate = u64::from(instruction.far_branch32());
            }
            OpKind::Immediate8_2nd => {}
            kind if is_immediate(kind) => op.immediate = instruction.immediate(operand),
            _ => {}
        }
    }
    if size.is_power_of_two() && size <= 8 {
        op.set_operand_size(size as u64);
    } else {
        op.set_operand_size(8);
    }
    op.set_address_size(address_size(instruction));
    op
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// The name of a register in an op.
fn register_number(register: Register) -> u8 {
    match register {
        Register::AH => 1,
        Register::CH => 9,
        Register::DH => 17,
        Register::BH => 25,
        _ if register.is_gpr8() => (register.full_register().number() as u8) * 8,
        _ => register.number() as u8,
    }
}

/// The segment of a memory operand. In 64-bit mode prefixes for other segments than FS and GS are ignored, which
/// shows in the exception for an address that is not canonical (SDM vol. 1, 3.3.7.1).
fn effective_segment(instruction: &Instruction) -> Register {
    let segment = instruction.memory_segment();
    let ignored = instruction.code_size() == iced_x86::CodeSize::Code64
        && !matches!(
            instruction.segment_prefix(),
            Register::None | Register::FS | Register::GS
        );
    if !ignored {
        return segment;
    }
    match instruction.memory_base() {
        Register::RSP | Register::RBP | Register::ESP | Register::EBP => Register::SS,
        _ => Register::DS,
    }
}

fn segment_number(register: Register) -> u8 {
    match register {
        Register::ES => sreg::ES as u8,
        Register::CS => sreg::CS as u8,
        Register::SS => sreg::SS as u8,
        Register::FS => sreg::FS as u8,
        Register::GS => sreg::GS as u8,
        _ => sreg::DS as u8,
    }
}

/// Address size in bytes, of the memory operand or of implicit operands.
fn address_size(instruction: &Instruction) -> u64 {
    for operand in 0..instruction.op_count() {
        let size = match instruction.op_kind(operand) {
            OpKind::Memory => {
                let base = instruction.memory_base();
                let index = instruction.memory_index();
                let register = if base == Register::None { index } else { base };
                return match register {
                    Register::None => displacement_address_size(instruction),
                    // The index of a gather.
                    register if register.is_vector_register() => {
                        displacement_address_size(instruction)
                    }
                    Register::EIP => 4,
                    Register::RIP => 8,
                    register => register.size() as u64,
                };
            }
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 2,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 4,
            OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => 8,
            _ => continue,
        };
        return size;
    }
    counter_size(instruction.code()).unwrap_or(match instruction.code_size() {
        iced_x86::CodeSize::Code16 => 2,
        iced_x86::CodeSize::Code32 => 4,
        _ => 8,
    })
}

/// A bare displacement has the size of the code's addresses unless it says otherwise.
fn displacement_address_size(instruction: &Instruction) -> u64 {
    match instruction.memory_displ_size() {
        2 => 2,
        8 => 8,
        _ => 4,
    }
}

/// Size of the counter that LOOP and JCXZ use.
fn counter_size(code: Code) -> Option<u64> {
    Some(match code {
        Code::Jcxz_rel8_16 | Code::Jcxz_rel8_32 => 2,
        Code::Jecxz_rel8_16 | Code::Jecxz_rel8_32 | Code::Jecxz_rel8_64 => 4,
        Code::Jrcxz_rel8_16 | Code::Jrcxz_rel8_64 => 8,
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 2,
        Code::Loop_rel8_16_ECX
        | Code::Loop_rel8_32_ECX
        | Code::Loop_rel8_64_ECX
        | Code::Loope_rel8_16_ECX
        | Code::Loope_rel8_32_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loopne_rel8_16_ECX
        | Code::Loopne_rel8_32_ECX
        | Code::Loopne_rel8_64_ECX => 4,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX => 8,
        _ => return None,
    })
}

fn memory_operand(instruction: &Instruction, op: &mut Op) {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    let displacement = instruction.memory_displacement64();
    if matches!(base, Register::RIP | Register::EIP) {
        op.base = RIP_REGISTER;
        // iced gives the target for an instruction at address zero.
        op.displacement = displacement.wrapping_sub(instruction.next_ip()) as i32;
    } else {
        if base != Register::None {
            op.base = base.number() as u8;
        }
        op.displacement = displacement as i32;
    }
    if index != Register::None && !index.is_vector_register() {
        let scale = instruction.memory_index_scale().trailing_zeros() as u8;
        op.index = index.number() as u8 | scale << 4;
    }
    let flat =
        instruction.code_size() == iced_x86::CodeSize::Code64 && usize::from(op.segment) < sreg::FS;
    op.form = match (base, index) {
        (Register::RIP, _) if flat => AddressForm::Rip,
        (base, Register::None) if flat && base.is_gpr64() => AddressForm::Base,
        (base, index) if flat && base.is_gpr64() && index.is_gpr64() => AddressForm::BaseIndex,
        _ => AddressForm::General,
    };
}

/// Finds who executes an instruction.
fn lower(cpu: &mut Cpu, instruction: &Instruction, bytes: &[u8], op: &mut Op) -> Lowered {
    type Module = fn(&Instruction, &mut Op) -> Option<Handler>;
    const MODULES: [Module; 19] = [
        moves::lower,
        arithmetic::lower,
        branch::lower,
        stack::lower,
        strings::lower,
        flag_control::lower,
        control::lower,
        msr::lower,
        port::lower,
        identity::lower,
        segments::lower,
        transfer::lower,
        events::lower,
        xsave::lower,
        debug::lower,
        entropy::lower,
        hints::lower,
        legacy::lower,
        gather::lower,
    ];
    for module in MODULES {
        if let Some(handler) = module(instruction, op) {
            op.handler = handler;
            return Lowered::Done;
        }
    }
    match vector::lower(cpu, instruction, bytes, op) {
        Ok(lowered) => lowered,
        Err(_) => {
            op.handler = op_undefined;
            Lowered::Done
        }
    }
}

/// Whether nothing may be decoded beyond an instruction: it goes elsewhere, or changes what the
/// run loop looks at between blocks.
fn ends_block(instruction: &Instruction) -> bool {
    use iced_x86::FlowControl;
    instruction.flow_control() != FlowControl::Next
        || matches!(
            instruction.mnemonic(),
            Mnemonic::Sti
                | Mnemonic::Popf
                | Mnemonic::Popfd
                | Mnemonic::Popfq
                | Mnemonic::Hlt
                | Mnemonic::Wrmsr
                | Mnemonic::In
                | Mnemonic::Out
                | Mnemonic::Insb
                | Mnemonic::Insw
                | Mnemonic::Insd
                | Mnemonic::Outsb
                | Mnemonic::Outsw
                | Mnemonic::Outsd
        )
}

#[cfg(test)]
mod tests {
    use crate::testing::{GP0, UD, fault, long_cpu};

    #[test]
    fn no_instruction_of_15_bytes_is_undefined_and_one_of_16_too_long() {
        // LOCK and REX before VEX, and as many prefixes as give it 15 bytes.
        let vex = [0xc4, 0x63, 0x59, 0x4c, 0xa4, 0x97, 0, 0, 0, 0x15, 5];
        let (mut cpu, _) = long_cpu();
        let code = [&[0x66, 0x66, 0xf0, 0x43], &vex[..]].concat();
        assert_eq!(fault(&mut cpu, &code), UD);
        let nop = [&[0x3e; 15], &[0x90][..]].concat();
        assert_eq!(fault(&mut cpu, &nop), GP0);
    }
}
