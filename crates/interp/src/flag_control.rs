//! Instructions on system flags: CLI, STI, PUSHF, POPF, CLAC, STAC; CLTS and HLT.

use iced_x86::{Code, Instruction, Mnemonic};
use trapgate_x86::InterruptShadow;
use trapgate_x86::registers::{cr0, cr4, rflags};

use crate::cpu::{Cpu, Step, Stop};
use crate::op::{Handler, Op};
use crate::segments::sized;
use crate::tlb::View;

/// Whom CLI and STI work on (SDM vol. 2A, CLI, table 3-6).
enum InterruptFlag {
    Real,
    /// VIF: virtual-8086 mode with CR4.VME, user mode with CR4.PVI.
    Virtual,
    Refused,
}

impl Cpu {
    #[inline]
    fn interrupt_flag(&self) -> InterruptFlag {
        if self.cpl <= self.iopl() || !self.is_protected() {
            return InterruptFlag::Real;
        }
        let extension = if self.is_vm86() {
            cr4::VME
        } else if self.cpl == 3 {
            cr4::PVI
        } else {
            0
        };
        if self.sys.cr4 & extension != 0 {
            InterruptFlag::Virtual
        } else {
            InterruptFlag::Refused
        }
    }

    /// EFLAGS.AC at level 0, where it only matters to SMAP.
    fn set_access_control(&mut self, allowed: bool) {
        self.system_flags &= !rflags::AC;
        if allowed {
            self.system_flags |= rflags::AC;
        }
        self.plain_view = self.view_at(0);
        if self.view != View::Checked {
            self.view = self.plain_view;
            self.tlb.set_view(self.view);
        }
    }

    /// Ends the block if the run loop must look at the flags that were set.
    fn notice_flags(&mut self) {
        self.end_block |= self.attention;
    }
}

fn op_cli(cpu: &mut Cpu, _: &Op) -> Step {
    match cpu.interrupt_flag() {
        InterruptFlag::Real => {
            cpu.system_flags &= !rflags::IF;
            cpu.update_attention();
        }
        InterruptFlag::Virtual => cpu.system_flags &= !rflags::VIF,
        InterruptFlag::Refused => return cpu.gp0(),
    }
    Ok(())
}

fn op_sti(cpu: &mut Cpu, _: &Op) -> Step {
    match cpu.interrupt_flag() {
        InterruptFlag::Real => {
            if cpu.system_flags & rflags::IF == 0 {
                cpu.system_flags |= rflags::IF;
                cpu.sys.shadow = InterruptShadow::Sti;
                cpu.update_attention();
                cpu.end_block = true;
            }
        }
        InterruptFlag::Virtual if cpu.system_flags & rflags::VIP == 0 => {
            cpu.system_flags |= rflags::VIF;
        }
        InterruptFlag::Virtual | InterruptFlag::Refused => return cpu.gp0(),
    }
    Ok(())
}

fn op_pushf(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.operand_size();
    let mut flags = cpu.rflags() & !(rflags::VM | rflags::RF);
    if cpu.is_vm86() && cpu.iopl() < 3 {
        if cpu.sys.cr4 & cr4::VME == 0 || size != 2 {
            return cpu.gp0();
        }
        // VIF stands for IF, and the program sees full privilege.
        flags |= rflags::IOPL | rflags::IF;
        if flags & rflags::VIF == 0 {
            flags &= !rflags::IF;
        }
    }
    cpu.push(size, flags)
}

/// POPF (SDM vol. 2B, POPF, table 4-16): VM, VIF and VIP stay as they are, RF is cleared.
fn op_popf(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.operand_size();
    let mut mask = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT | rflags::RF;
    if size > 2 {
        mask |= rflags::AC | rflags::ID;
    }
    if cpu.is_vm86() && cpu.iopl() < 3 {
        return pop_flags_vm86(cpu, size, mask);
    }
    if cpu.cpl <= cpu.iopl() {
        mask |= rflags::IF;
    }
    // Virtual-8086 mode has level 3.
    if cpu.cpl == 0 {
        mask |= rflags::IOPL;
    }
    let flags = cpu.pop(size)? & !rflags::RF;
    let flags = cpu.rflags() & !mask | flags & mask;
    cpu.set_rflags(flags);
    cpu.notice_flags();
    Ok(())
}

/// POPF in virtual-8086 mode without full I/O privilege: with CR4.VME, IF is VIF.
fn pop_flags_vm86(cpu: &mut Cpu, size: u64, mask: u64) -> Step {
    if cpu.sys.cr4 & cr4::VME == 0 || size != 2 {
        return cpu.gp0();
    }
    let popped = cpu.peek(2, 0)?;
    let enables = popped & rflags::IF != 0;
    if popped & rflags::TF != 0 || enables && cpu.system_flags & rflags::VIP != 0 {
        return cpu.gp0();
    }
    cpu.drop_from_stack(2);
    let mut flags = cpu.rflags() & !mask | popped & mask & !rflags::RF;
    flags &= !rflags::VIF;
    if enables {
        flags |= rflags::VIF;
    }
    cpu.set_rflags(flags);
    cpu.notice_flags();
    Ok(())
}

fn op_clac(cpu: &mut Cpu, _: &Op) -> Step {
    if cpu.cpl != 0 {
        return cpu.ud();
    }
    cpu.set_access_control(false);
    Ok(())
}

fn op_stac(cpu: &mut Cpu, _: &Op) -> Step {
    if cpu.cpl != 0 {
        return cpu.ud();
    }
    cpu.set_access_control(true);
    Ok(())
}

fn op_clts(cpu: &mut Cpu, _: &Op) -> Step {
    if cpu.cpl != 0 {
        return cpu.gp0();
    }
    cpu.sys.cr0 &= !cr0::TS;
    Ok(())
}

fn op_hlt(cpu: &mut Cpu, _: &Op) -> Step {
    if cpu.cpl != 0 {
        return cpu.gp0();
    }
    Err(Stop::Halt)
}

/// The handler of an instruction that this module executes.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match instruction.code() {
        Code::Pushfw => sized(op, 2, op_pushf),
        Code::Pushfd => sized(op, 4, op_pushf),
        Code::Pushfq => sized(op, 8, op_pushf),
        Code::Popfw => sized(op, 2, op_popf),
        Code::Popfd => sized(op, 4, op_popf),
        Code::Popfq => sized(op, 8, op_popf),
        _ => match instruction.mnemonic() {
            Mnemonic::Cli => op_cli,
            Mnemonic::Sti => op_sti,
            Mnemonic::Clac => op_clac,
            Mnemonic::Stac => op_stac,
            Mnemonic::Clts => op_clts,
            Mnemonic::Hlt => op_hlt,
            _ => return None,
        },
    })
}

#[cfg(test)]
mod tests;
