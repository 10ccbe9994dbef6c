//! The stack: PUSH, POP, ENTER, LEAVE and their kin.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use trapgate_x86::registers::gpr::{RBP, RSP};
use trapgate_x86::registers::sreg;

use crate::cpu::{Cpu, Step, Stop};
use crate::op::{Handler, Op};

const SS: u8 = sreg::SS as u8;

impl Cpu {
    /// Pushes a value of 2, 4 or 8 bytes on the current stack. RSP moves only if nothing faults.
    pub(crate) fn push(&mut self, size: u64, value: u64) -> Step {
        let pointer = self.regs.gpr[RSP].wrapping_sub(size) & self.stack_mask;
        let linear = self.segment_address(sreg::SS, pointer, size, true)?;
        match size {
            2 => self.write(linear, SS, value as u16)?,
            4 => self.write(linear, SS, value as u32)?,
            _ => self.write(linear, SS, value)?,
        }
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// Makes room for `size` bytes on the current stack, and writes the lower two of them.
    pub(crate) fn push_low(&mut self, size: u64, value: u16) -> Step {
        let pointer = self.regs.gpr[RSP].wrapping_sub(size) & self.stack_mask;
        let linear = self.segment_address(sreg::SS, pointer, 2, true)?;
        self.write(linear, SS, value)?;
        self.set_stack_pointer(pointer);
        Ok(())
    }

    /// The value of 2, 4 or 8 bytes that lies `depth` bytes above the top of the stack.
    pub(crate) fn peek(&mut self, size: u64, depth: u64) -> Result<u64, Stop> {
        let pointer = self.regs.gpr[RSP].wrapping_add(depth) & self.stack_mask;
        let linear = self.segment_address(sreg::SS, pointer, size, false)?;
        Ok(match size {
            2 => u64::from(self.read::<u16>(linear, SS)?),
            4 => u64::from(self.read::<u32>(linear, SS)?),
            _ => self.read::<u64>(linear, SS)?,
        })
    }

    /// Moves the stack pointer up.
    pub(crate) fn drop_from_stack(&mut self, bytes: u64) {
        let pointer = self.regs.gpr[RSP].wrapping_add(bytes);
        self.set_stack_pointer(pointer);
    }

    /// Pops a value of 2, 4 or 8 bytes.
    pub(crate) fn pop(&mut self, size: u64) -> Result<u64, Stop> {
        let value = self.peek(size, 0)?;
        self.drop_from_stack(size);
        Ok(value)
    }
}

// 64-bit mode, 64-bit operands: nearly all of it.

#[inline(always)]
pub(crate) fn push_64(cpu: &mut Cpu, value: u64) -> Step {
    let pointer = cpu.regs.gpr[RSP].wrapping_sub(8);
    cpu.write(pointer, SS, value)?;
    cpu.regs.gpr[RSP] = pointer;
    Ok(())
}

fn push_register_64(cpu: &mut Cpu, op: &Op) -> Step {
    push_64(cpu, cpu.reg(op.dst))
}

fn pop_register_64(cpu: &mut Cpu, op: &Op) -> Step {
    let pointer = cpu.regs.gpr[RSP];
    let value = cpu.read(pointer, SS)?;
    cpu.regs.gpr[RSP] = pointer.wrapping_add(8);
    // POP RSP: the value popped wins.
    cpu.set_reg::<u64>(op.dst, value);
    Ok(())
}

fn push_immediate_64(cpu: &mut Cpu, op: &Op) -> Step {
    push_64(cpu, op.immediate)
}

fn leave_64(cpu: &mut Cpu, _: &Op) -> Step {
    let frame = cpu.regs.gpr[RBP];
    let value = cpu.read(frame, SS)?;
    cpu.regs.gpr[RSP] = frame.wrapping_add(8);
    cpu.regs.gpr[RBP] = value;
    Ok(())
}

// Any mode and size.

fn push_register(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.push(op.operand_size(), cpu.reg::<u64>(op.dst))
}

fn pop_register(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.operand_size();
    let value = cpu.pop(size)?;
    match size {
        2 => cpu.set_reg(op.dst, value as u16),
        4 => cpu.set_reg(op.dst, value as u32),
        _ => cpu.set_reg(op.dst, value),
    }
    Ok(())
}

fn push_immediate(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.push(op.operand_size(), op.immediate)
}

fn push_memory(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.operand_size();
    let value = match size {
        2 => u64::from(cpu.load::<u16>(op)?),
        4 => u64::from(cpu.load::<u32>(op)?),
        _ => cpu.load::<u64>(op)?,
    };
    cpu.push(size, value)
}

/// POP to memory: the address is computed with RSP as it is after the pop.
fn pop_memory(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.operand_size();
    let before = cpu.regs.gpr[RSP];
    let value = cpu.pop(size)?;
    let stored = match size {
        2 => cpu.store(op, value as u16),
        4 => cpu.store(op, value as u32),
        _ => cpu.store(op, value),
    };
    if stored.is_err() {
        cpu.regs.gpr[RSP] = before;
    }
    stored
}

/// PUSHA, PUSHAD.
fn push_all(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.operand_size();
    let before = cpu.regs.gpr[RSP];
    for register in 0..8 {
        let value = if register == RSP {
            before
        } else {
            cpu.regs.gpr[register]
        };
        if let Err(stop) = cpu.push(size, value) {
            cpu.regs.gpr[RSP] = before;
            return Err(stop);
        }
    }
    Ok(())
}

/// POPA, POPAD: RSP's place is skipped.
fn pop_all(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.operand_size();
    // A fault in the middle shows what was popped, but not in RSP: it is done again from the start.
    for place in 0..8 {
        let value = cpu.peek(size, place as u64 * size)?;
        let register = 7 - place;
        if register != RSP {
            match size {
                2 => cpu.set_reg(register as u8, value as u16),
                _ => cpu.set_reg(register as u8, value as u32),
            }
        }
    }
    cpu.drop_from_stack(8 * size);
    Ok(())
}

/// ENTER (SDM vol. 2A): `immediate` is the frame's size, `code` the nesting level.
fn enter(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.operand_size();
    let level = op.code % 32;
    let (old_stack, old_frame) = (cpu.regs.gpr[RSP], cpu.regs.gpr[RBP]);
    let entered = enter_frame(cpu, size, level, op.immediate & 0xffff);
    if entered.is_err() {
        cpu.regs.gpr[RSP] = old_stack;
        cpu.regs.gpr[RBP] = old_frame;
    }
    entered
}

fn enter_frame(cpu: &mut Cpu, size: u64, level: u8, bytes: u64) -> Step {
    cpu.push(size, cpu.regs.gpr[RBP])?;
    let frame = cpu.regs.gpr[RSP];
    let mut pointer = cpu.regs.gpr[RBP];
    for _ in 1..level {
        pointer = pointer.wrapping_sub(size) & cpu.stack_mask;
        let linear = cpu.segment_address(sreg::SS, pointer, size, false)?;
        let value = match size {
            2 => u64::from(cpu.read::<u16>(linear, SS)?),
            4 => u64::from(cpu.read::<u32>(linear, SS)?),
            _ => cpu.read::<u64>(linear, SS)?,
        };
        cpu.push(size, value)?;
    }
    if level > 0 {
        cpu.push(size, frame)?;
    }
    let top = cpu.regs.gpr[RSP].wrapping_sub(bytes);
    cpu.set_stack_pointer(top);
    // The final stack must be writable, though nothing is written (SDM vol. 2A, ENTER).
    let pointer = cpu.stack_pointer();
    let linear = cpu.segment_address(sreg::SS, pointer, size, true)?;
    cpu.probe(linear, size, crate::tlb::Access::Write, SS)?;
    match size {
        2 => cpu.set_reg(RBP as u8, frame as u16),
        4 => cpu.set_reg(RBP as u8, frame as u32),
        _ => cpu.set_reg(RBP as u8, frame),
    }
    Ok(())
}

fn leave(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.operand_size();
    let old = cpu.regs.gpr[RSP];
    cpu.set_stack_pointer(cpu.regs.gpr[RBP]);
    match cpu.pop(size) {
        Ok(value) => {
            match size {
                2 => cpu.set_reg(RBP as u8, value as u16),
                4 => cpu.set_reg(RBP as u8, value as u32),
                _ => cpu.set_reg(RBP as u8, value),
            }
            Ok(())
        }
        Err(stop) => {
            cpu.regs.gpr[RSP] = old;
            Err(stop)
        }
    }
}

/// The handler of an instruction that this module executes.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let long = instruction.code_size() == iced_x86::CodeSize::Code64;
    Some(match instruction.mnemonic() {
        Mnemonic::Push => match instruction.op0_kind() {
            OpKind::Register if instruction.op0_register().is_segment_register() => return None,
            OpKind::Register if long && op.operand_size() == 8 => push_register_64,
            OpKind::Register => push_register,
            OpKind::Memory => push_memory,
            _ => {
                op.set_operand_size(pushed_immediate_size(instruction.code()));
                if long && op.operand_size() == 8 {
                    push_immediate_64
                } else {
                    push_immediate
                }
            }
        },
        Mnemonic::Pop => match instruction.op0_kind() {
            OpKind::Register if instruction.op0_register().is_segment_register() => return None,
            OpKind::Register if long && op.operand_size() == 8 => pop_register_64,
            OpKind::Register => pop_register,
            _ => pop_memory,
        },
        Mnemonic::Pusha | Mnemonic::Popa => {
            op.set_operand_size(2);
            if instruction.mnemonic() == Mnemonic::Pusha {
                push_all
            } else {
                pop_all
            }
        }
        Mnemonic::Pushad => {
            op.set_operand_size(4);
            push_all
        }
        Mnemonic::Popad => {
            op.set_operand_size(4);
            pop_all
        }
        Mnemonic::Enter => {
            op.set_operand_size(match instruction.code() {
                Code::Enterw_imm16_imm8 => 2,
                Code::Enterd_imm16_imm8 => 4,
                _ => 8,
            });
            op.code = instruction.immediate8_2nd();
            enter
        }
        Mnemonic::Leave => {
            op.set_operand_size(match instruction.code() {
                Code::Leavew => 2,
                Code::Leaved => 4,
                _ => 8,
            });
            if instruction.code() == Code::Leaveq {
                leave_64
            } else {
                leave
            }
        }
        _ => return None,
    })
}

fn pushed_immediate_size(code: Code) -> u64 {
    match code {
        Code::Pushw_imm8 | Code::Push_imm16 => 2,
        Code::Pushd_imm8 | Code::Pushd_imm32 => 4,
        _ => 8,
    }
}
