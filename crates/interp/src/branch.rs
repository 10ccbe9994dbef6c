//! Near transfers of control.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind};
use trapgate_x86::paging::is_canonical;
use trapgate_x86::registers::gpr::{RCX, RSP};
use trapgate_x86::registers::sreg;

use crate::cpu::{Cpu, Step, Stop};
use crate::moves::condition_of;
use crate::op::{Handler, Op};
use crate::stack::push_64;

impl Cpu {
    /// Continues at an offset in the code segment, truncated to `size` bytes: checks the segment's
    /// limit, or in 64-bit mode that the address is canonical.
    #[inline(always)]
    pub(crate) fn jump_to(&mut self, target: u64, size: u64) -> Step {
        let target = self.check_target(target, size)?;
        self.rip = target;
        Ok(())
    }

    /// The checks of [`Self::jump_to`] alone; gives the truncated target.
    #[inline(always)]
    pub(crate) fn check_target(&mut self, target: u64, size: u64) -> Result<u64, Stop> {
        if self.is_64bit() {
            if !is_canonical(target) {
                return self.gp0();
            }
            return Ok(target);
        }
        let target = if size == 2 {
            target & 0xffff
        } else {
            target & 0xffff_ffff
        };
        if target > u64::from(self.sys.segments[sreg::CS].limit) {
            return self.gp0();
        }
        Ok(target)
    }
}

// 64-bit mode.

fn jump_64(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.rip = cpu.rip.wrapping_add(op.immediate);
    Ok(())
}

fn jump_if_64<const CONDITION: u8>(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.flags.condition(CONDITION) {
        cpu.rip = cpu.rip.wrapping_add(op.immediate);
    }
    Ok(())
}

fn call_64(cpu: &mut Cpu, op: &Op) -> Step {
    push_64(cpu, cpu.rip)?;
    cpu.rip = cpu.rip.wrapping_add(op.immediate);
    Ok(())
}

fn return_64(cpu: &mut Cpu, op: &Op) -> Step {
    let pointer = cpu.regs.gpr[RSP];
    let target = cpu.read::<u64>(pointer, sreg::SS as u8)?;
    if !is_canonical(target) {
        return cpu.gp0();
    }
    cpu.regs.gpr[RSP] = pointer.wrapping_add(8).wrapping_add(op.immediate);
    cpu.rip = target;
    Ok(())
}

const JUMP_IF_64: [Handler; 16] = [
    jump_if_64::<0>,
    jump_if_64::<1>,
    jump_if_64::<2>,
    jump_if_64::<3>,
    jump_if_64::<4>,
    jump_if_64::<5>,
    jump_if_64::<6>,
    jump_if_64::<7>,
    jump_if_64::<8>,
    jump_if_64::<9>,
    jump_if_64::<10>,
    jump_if_64::<11>,
    jump_if_64::<12>,
    jump_if_64::<13>,
    jump_if_64::<14>,
    jump_if_64::<15>,
];

// Any mode and size; the operand size is that of the instruction pointer.

fn relative(cpu: &Cpu, op: &Op) -> u64 {
    cpu.rip.wrapping_add(op.immediate)
}

fn jump(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.jump_to(relative(cpu, op), op.operand_size())
}

fn jump_if(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.flags.condition(op.code) {
        jump(cpu, op)
    } else {
        Ok(())
    }
}

fn call_to(cpu: &mut Cpu, target: u64, size: u64) -> Step {
    // The host CPU pushes before it looks at the target, which shows in which of two faults comes.
    let pointer = cpu.regs.gpr[RSP];
    cpu.push(size, cpu.rip)?;
    match cpu.check_target(target, size) {
        Ok(target) => {
            cpu.rip = target;
            Ok(())
        }
        Err(stop) => {
            cpu.regs.gpr[RSP] = pointer;
            Err(stop)
        }
    }
}

fn call(cpu: &mut Cpu, op: &Op) -> Step {
    call_to(cpu, relative(cpu, op), op.operand_size())
}

/// The target in a register or memory.
fn indirect(cpu: &mut Cpu, op: &Op) -> Result<u64, Stop> {
    if op.has_memory() {
        Ok(match op.operand_size() {
            2 => u64::from(cpu.load::<u16>(op)?),
            4 => u64::from(cpu.load::<u32>(op)?),
            _ => cpu.load::<u64>(op)?,
        })
    } else {
        Ok(cpu.reg::<u64>(op.dst))
    }
}

fn jump_indirect(cpu: &mut Cpu, op: &Op) -> Step {
    let target = indirect(cpu, op)?;
    cpu.jump_to(target, op.operand_size())
}

fn call_indirect(cpu: &mut Cpu, op: &Op) -> Step {
    let target = indirect(cpu, op)?;
    call_to(cpu, target, op.operand_size())
}

fn return_near(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.operand_size();
    let target = cpu.peek(size, 0)?;
    cpu.jump_to(target, size)?;
    cpu.drop_from_stack(size.wrapping_add(op.immediate));
    Ok(())
}

/// RCX, ECX or CX, by the address size.
fn counter(cpu: &Cpu, op: &Op) -> u64 {
    cpu.regs.gpr[RCX] & Cpu::address_mask(op)
}

fn set_counter(cpu: &mut Cpu, op: &Op, value: u64) {
    match op.address_size() {
        2 => cpu.set_reg(RCX as u8, value as u16),
        4 => cpu.set_reg(RCX as u8, value as u32),
        _ => cpu.regs.gpr[RCX] = value,
    }
}

/// LOOP, LOOPE, LOOPNE: `code` is 0, 1, 2.
fn loop_near(cpu: &mut Cpu, op: &Op) -> Step {
    let count = counter(cpu, op).wrapping_sub(1) & Cpu::address_mask(op);
    let again = count != 0
        && match op.code {
            0 => true,
            1 => cpu.flags.zero(),
            _ => !cpu.flags.zero(),
        };
    if again {
        // The counter stays as it was if the target is out of bounds.
        jump(cpu, op)?;
    }
    set_counter(cpu, op, count);
    Ok(())
}

fn jump_if_counter_zero(cpu: &mut Cpu, op: &Op) -> Step {
    if counter(cpu, op) == 0 {
        jump(cpu, op)
    } else {
        Ok(())
    }
}

/// The sixteen Jcc in the order of their condition codes.
const JCC: [Mnemonic; 16] = [
    Mnemonic::Jo,
    Mnemonic::Jno,
    Mnemonic::Jb,
    Mnemonic::Jae,
    Mnemonic::Je,
    Mnemonic::Jne,
    Mnemonic::Jbe,
    Mnemonic::Ja,
    Mnemonic::Js,
    Mnemonic::Jns,
    Mnemonic::Jp,
    Mnemonic::Jnp,
    Mnemonic::Jl,
    Mnemonic::Jge,
    Mnemonic::Jle,
    Mnemonic::Jg,
];

/// The handler of an instruction that this module executes.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let near = matches!(
        instruction.op0_kind(),
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
    );
    match instruction.op0_kind() {
        OpKind::NearBranch16 => op.set_operand_size(2),
        OpKind::NearBranch32 => op.set_operand_size(4),
        OpKind::NearBranch64 => op.set_operand_size(8),
        _ => {}
    }
    let long = instruction.op0_kind() == OpKind::NearBranch64;
    Some(match (instruction.flow_control(), instruction.mnemonic()) {
        (FlowControl::UnconditionalBranch, Mnemonic::Jmp) if near => {
            if long {
                jump_64
            } else {
                jump
            }
        }
        (FlowControl::Call, Mnemonic::Call) if near => {
            if long {
                call_64
            } else {
                call
            }
        }
        (FlowControl::IndirectBranch, Mnemonic::Jmp) if !is_far(instruction) => jump_indirect,
        (FlowControl::IndirectCall, Mnemonic::Call) if !is_far(instruction) => call_indirect,
        (FlowControl::Return, Mnemonic::Ret) => {
            op.set_operand_size(match instruction.code() {
                Code::Retnw | Code::Retnw_imm16 => 2,
                Code::Retnd | Code::Retnd_imm16 => 4,
                _ => 8,
            });
            op.immediate &= 0xffff;
            if op.operand_size() == 8 {
                return_64
            } else {
                return_near
            }
        }
        (_, Mnemonic::Loop) => with_code(op, 0, loop_near),
        (_, Mnemonic::Loope) => with_code(op, 1, loop_near),
        (_, Mnemonic::Loopne) => with_code(op, 2, loop_near),
        (_, Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz) => jump_if_counter_zero,
        (FlowControl::ConditionalBranch, mnemonic) => {
            op.code = condition_of(mnemonic, JCC)?;
            if long {
                JUMP_IF_64[usize::from(op.code)]
            } else {
                jump_if
            }
        }
        _ => return None,
    })
}

fn with_code(op: &mut Op, code: u8, handler: Handler) -> Handler {
    op.code = code;
    handler
}

/// Far JMP and CALL through memory are another module's.
fn is_far(instruction: &Instruction) -> bool {
    instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect()
}

#[cfg(test)]
mod tests {
    use trapgate_x86::Vector;
    use trapgate_x86::registers::gpr;

    use crate::testing::{GP0, UNMAPPED, fault, long_cpu, unmap_page};

    /// As the host CPU does: of two faults the push's comes first.
    #[test]
    fn call_pushes_before_it_looks_at_its_target() {
        let (mut cpu, _) = long_cpu();
        unmap_page(&mut cpu);
        cpu.regs.gpr[gpr::RAX] = 1 << 60;
        cpu.regs.gpr[gpr::RSP] = UNMAPPED + 16;
        let call = [0xff, 0xd0];
        assert_eq!(fault(&mut cpu, &call), (Vector::PF, Some(2)));
        cpu.regs.gpr[gpr::RSP] = UNMAPPED - 16;
        assert_eq!(fault(&mut cpu, &call), GP0);
        assert_eq!(cpu.regs.gpr[gpr::RSP], UNMAPPED - 16);
    }
}
