//! Instructions on descriptor tables and on selectors: LGDT, LIDT, LLDT, LTR and what stores them
//! (SDM vol. 3A, 2.8.1), LAR, LSL, VERR, VERW, ARPL.

use iced_x86::{Code, Instruction, Mnemonic};
use trapgate_x86::descriptor::{access, system};
use trapgate_x86::paging::is_canonical;
use trapgate_x86::registers::{cr4, rflags};
use trapgate_x86::{Descriptor, Segment, TableRegister, Vector};

use crate::cpu::{Cpu, Step, Stop};
use crate::op::{Handler, Op};
use crate::segments::{
    LOCAL, is_conforming, is_null, is_readable, is_writable_data, rpl, sized, source_word,
    store_selector,
};

impl Cpu {
    /// #GP(0) for a user-mode instruction that CR4.UMIP prevents.
    fn check_user_prevention(&mut self) -> Step {
        if self.cpl == 3 && self.sys.cr4 & cr4::UMIP != 0 {
            return self.gp0();
        }
        Ok(())
    }

    /// #UD where there are no selectors to speak of.
    fn check_has_selectors(&mut self) -> Step {
        if !self.is_protected() || self.is_vm86() {
            return self.ud();
        }
        Ok(())
    }

    fn set_zero_flag(&mut self, set: bool) {
        let flags = self.flags.get() & !rflags::ZF;
        self.flags.put(if set { flags | rflags::ZF } else { flags });
    }

    fn store_table(&mut self, op: &Op, table: TableRegister) -> Step {
        self.check_user_prevention()?;
        let mut bytes = [0; 10];
        bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
        bytes[2..].copy_from_slice(&table.base.to_le_bytes());
        // All 32 bits of the base also with 16-bit operands.
        let size = if self.is_64bit() { 10 } else { 6 };
        let linear = self.operand_address(op, size, true)?;
        self.write_bytes(linear, &bytes[..size as usize], op.segment)
    }

    fn load_table(&mut self, op: &Op) -> Result<TableRegister, Stop> {
        if self.cpl != 0 {
            return self.gp0();
        }
        let size = if self.is_64bit() { 10 } else { 6 };
        let linear = self.operand_address(op, size, false)?;
        let limit = self.read::<u16>(linear, op.segment)?;
        let at = self.advance(linear, 2);
        let base = if size == 10 {
            self.read::<u64>(at, op.segment)?
        } else {
            let base = u64::from(self.read::<u32>(at, op.segment)?);
            // The 80286's bases have 24 bits.
            if op.operand_size() == 2 {
                base & 0xff_ffff
            } else {
                base
            }
        };
        if !is_canonical(base) {
            return self.gp0();
        }
        Ok(TableRegister { base, limit })
    }

    /// The segment of a system descriptor that LLDT or LTR loads. In long mode it has 16 bytes.
    fn system_segment(&mut self, selector: u16, descriptor: Descriptor) -> Result<Segment, Stop> {
        let mut segment = descriptor.segment(selector);
        if self.is_long() {
            let Some(upper) = self.upper_descriptor(selector)? else {
                return self.refuse(Vector::GP, selector, 0);
            };
            segment.base |= upper << 32;
            // The type field of the second half must be zero.
            if upper >> 40 & 0x1f != 0 || !is_canonical(segment.base) {
                return self.refuse(Vector::GP, selector, 0);
            }
        }
        Ok(segment)
    }

    /// The descriptor behind the operand of LAR, LSL, VERR, VERW, if software at this level may
    /// know about it.
    fn visible_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Stop> {
        if is_null(selector) {
            return Ok(None);
        }
        let Some(descriptor) = self.descriptor(selector)? else {
            return Ok(None);
        };
        let visible = is_conforming(descriptor) || descriptor.dpl() >= self.cpl.max(rpl(selector));
        Ok(visible.then_some(descriptor))
    }
}

fn op_sgdt(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.store_table(op, cpu.sys.gdtr)
}

fn op_sidt(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.store_table(op, cpu.sys.idtr)
}

fn op_lgdt(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sys.gdtr = cpu.load_table(op)?;
    Ok(())
}

fn op_lidt(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.sys.idtr = cpu.load_table(op)?;
    Ok(())
}

fn op_sldt(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_has_selectors()?;
    cpu.check_user_prevention()?;
    store_selector(cpu, op, cpu.sys.ldtr.selector)
}

fn op_str(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_has_selectors()?;
    cpu.check_user_prevention()?;
    store_selector(cpu, op, cpu.sys.tr.selector)
}

/// LLDT and LTR have their selector in operand 0.
fn operand_selector(cpu: &mut Cpu, op: &Op) -> Result<u16, Stop> {
    if op.has_memory() {
        cpu.load::<u16>(op)
    } else {
        Ok(cpu.regs.gpr[usize::from(op.dst) & 15] as u16)
    }
}

fn op_lldt(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_has_selectors()?;
    if cpu.cpl != 0 {
        return cpu.gp0();
    }
    let selector = operand_selector(cpu, op)?;
    if is_null(selector) {
        cpu.sys.ldtr = Segment::null(selector);
        return Ok(());
    }
    if selector & LOCAL != 0 {
        return cpu.refuse(Vector::GP, selector, 0);
    }
    let descriptor = cpu.descriptor_or(selector, Vector::GP, 0)?;
    if descriptor.has(access::S) || descriptor.kind() != system::LDT {
        return cpu.refuse(Vector::GP, selector, 0);
    }
    if !descriptor.has(access::P) {
        return cpu.refuse(Vector::NP, selector, 0);
    }
    cpu.sys.ldtr = cpu.system_segment(selector, descriptor)?;
    Ok(())
}

fn op_ltr(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_has_selectors()?;
    if cpu.cpl != 0 {
        return cpu.gp0();
    }
    let selector = operand_selector(cpu, op)?;
    if is_null(selector) {
        return cpu.gp0();
    }
    if selector & LOCAL != 0 {
        return cpu.refuse(Vector::GP, selector, 0);
    }
    let descriptor = cpu.descriptor_or(selector, Vector::GP, 0)?;
    let available = match descriptor.kind() {
        system::TSS => true,
        system::TSS16 => !cpu.is_long(),
        _ => false,
    };
    if descriptor.has(access::S) || !available {
        return cpu.refuse(Vector::GP, selector, 0);
    }
    if !descriptor.has(access::P) {
        return cpu.refuse(Vector::NP, selector, 0);
    }
    let mut segment = cpu.system_segment(selector, descriptor)?;
    let busy = system::TSS_BUSY & !system::TSS;
    cpu.change_descriptor(selector, busy, 0)?;
    segment.access |= busy;
    cpu.sys.tr = segment;
    Ok(())
}

/// LAR: the descriptor's access rights.
fn op_lar(cpu: &mut Cpu, op: &Op) -> Step {
    // The manual leaves the limit's bits undefined; processors give them.
    tell(cpu, op, true, |descriptor| {
        (descriptor.0 >> 32) as u32 & 0x00ff_ff00
    })
}

/// LSL: the segment's limit in bytes.
fn op_lsl(cpu: &mut Cpu, op: &Op) -> Step {
    tell(cpu, op, false, Descriptor::limit)
}

/// Writes what `of` says of the descriptor, and ZF whether it is one that LAR or LSL knows: segments and, for LAR,
/// `gates`.
fn tell(cpu: &mut Cpu, op: &Op, gates: bool, of: fn(Descriptor) -> u32) -> Step {
    cpu.check_has_selectors()?;
    let selector = source_word(cpu, op)?;
    let long = cpu.is_long();
    let known = |descriptor: &Descriptor| {
        descriptor.has(access::S)
            || match descriptor.kind() {
                system::LDT | system::TSS | system::TSS_BUSY => true,
                system::TSS16 | system::TSS16_BUSY => !long,
                system::CALL_GATE => gates,
                system::CALL_GATE16 | system::TASK_GATE => gates && !long,
                _ => false,
            }
    };
    let found = cpu.visible_descriptor(selector)?.filter(known);
    if let Some(descriptor) = found {
        write_result(cpu, op, of(descriptor));
    }
    cpu.set_zero_flag(found.is_some());
    Ok(())
}

fn write_result(cpu: &mut Cpu, op: &Op, value: u32) {
    match op.operand_size() {
        2 => cpu.set_reg(op.dst, value as u16),
        _ => cpu.set_reg(op.dst, value),
    }
}

fn op_verr(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_has_selectors()?;
    let selector = operand_selector(cpu, op)?;
    let found = cpu.visible_descriptor(selector)?;
    cpu.set_zero_flag(found.is_some_and(is_readable));
    Ok(())
}

fn op_verw(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_has_selectors()?;
    let selector = operand_selector(cpu, op)?;
    let found = cpu.visible_descriptor(selector)?;
    cpu.set_zero_flag(found.is_some_and(is_writable_data));
    Ok(())
}

/// ARPL: raises the selector's RPL to the source's.
fn op_arpl(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.check_has_selectors()?;
    let least = rpl(cpu.reg::<u16>(op.src));
    let adjusted = |selector: u16| selector & !3 | u16::from(least);
    let raised;
    if op.has_memory() {
        let selector = cpu.load::<u16>(op)?;
        raised = rpl(selector) < least;
        if raised {
            cpu.store(op, adjusted(selector))?;
        }
    } else {
        let selector = cpu.reg::<u16>(op.dst);
        raised = rpl(selector) < least;
        if raised {
            cpu.set_reg(op.dst, adjusted(selector));
        }
    }
    cpu.set_zero_flag(raised);
    Ok(())
}

/// The handler of an instruction that this module executes.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let register_size = |op: &mut Op, handler| {
        let size = instruction.op0_register().size() as u64;
        if size == 0 {
            handler
        } else {
            sized(op, size, handler)
        }
    };
    Some(match instruction.mnemonic() {
        Mnemonic::Sgdt => op_sgdt,
        Mnemonic::Sidt => op_sidt,
        Mnemonic::Lgdt => sized(op, table_size(instruction), op_lgdt),
        Mnemonic::Lidt => sized(op, table_size(instruction), op_lidt),
        Mnemonic::Sldt => register_size(op, op_sldt),
        Mnemonic::Str => register_size(op, op_str),
        Mnemonic::Lldt => op_lldt,
        Mnemonic::Ltr => op_ltr,
        Mnemonic::Lar => register_size(op, op_lar),
        Mnemonic::Lsl => register_size(op, op_lsl),
        Mnemonic::Verr => op_verr,
        Mnemonic::Verw => op_verw,
        Mnemonic::Arpl => op_arpl,
        _ => return None,
    })
}

/// Operand size of LGDT and LIDT.
fn table_size(instruction: &Instruction) -> u64 {
    match instruction.code() {
        Code::Lgdt_m1632_16 | Code::Lidt_m1632_16 => 2,
        Code::Lgdt_m1632 | Code::Lidt_m1632 => 4,
        _ => 8,
    }
}

#[cfg(test)]
mod tests;
