//! Descriptors in memory and loading segment registers (SDM vol. 3A, chapters 3 and 6).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};
use trapgate_x86::descriptor::access;
use trapgate_x86::registers::{gpr, sreg};
use trapgate_x86::{Descriptor, Exception, InterruptShadow, Segment, Vector};

use crate::cpu::{Cpu, Step, Stop};
use crate::descriptor_tables;
use crate::frame::null_stack_segment;
use crate::mmu::Place;
use crate::op::{Handler, Op};
use crate::tlb::{Access, View};

/// Selector bit: the descriptor is in the LDT.
pub(crate) const LOCAL: u16 = 4;
/// Requested privilege level of a selector.
pub(crate) const RPL: u16 = 3;

/// A selector as an error code shows it.
pub(crate) const fn selector_code(selector: u16) -> u32 {
    (selector & !RPL) as u32
}

/// Whether a selector is null.
pub(crate) const fn is_null(selector: u16) -> bool {
    selector & !RPL == 0
}

/// A selector's requested privilege level.
pub(crate) const fn rpl(selector: u16) -> u8 {
    (selector & RPL) as u8
}

/// Whether a descriptor is of a code segment.
pub(crate) const fn is_code(descriptor: Descriptor) -> bool {
    descriptor.has(access::S | access::CODE)
}

/// Whether a descriptor is of a data segment that can be written, such as a stack.
pub(crate) const fn is_writable_data(descriptor: Descriptor) -> bool {
    descriptor.has(access::S | access::WRITABLE) && !descriptor.has(access::CODE)
}

/// Whether a descriptor is of a segment that can be read.
pub(crate) const fn is_readable(descriptor: Descriptor) -> bool {
    descriptor.has(access::S) && (!descriptor.has(access::CODE) || descriptor.has(access::READABLE))
}

/// Whether a descriptor is of conforming code.
pub(crate) const fn is_conforming(descriptor: Descriptor) -> bool {
    descriptor.has(access::S | access::CODE | access::CONFORMING)
}

/// The segment register that loading a code or data descriptor gives.
pub(crate) const fn loaded(descriptor: Descriptor, selector: u16) -> Segment {
    let mut segment = descriptor.segment(selector);
    segment.access |= access::ACCESSED;
    segment
}

/// A segment of virtual-8086 mode (SDM vol. 3A, 21.2).
pub(crate) const fn vm86_segment(selector: u16) -> Segment {
    let mut segment = Segment::real(selector, false);
    segment.access |= access::DPL;
    segment
}

impl Cpu {
    /// `Err` with an exception whose error code is a selector and the EXT bit.
    #[cold]
    pub(crate) fn refuse<T>(&mut self, vector: Vector, selector: u16, ext: u32) -> Result<T, Stop> {
        let code = selector_code(selector) | ext;
        Err(self.raise(Exception::with_code(vector, code)))
    }

    /// Linear address in a system structure: 64 bits in long mode, else 32.
    #[inline(always)]
    pub(crate) fn system_address(&self, base: u64, offset: u64) -> u64 {
        let linear = base.wrapping_add(offset);
        if self.is_long() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// Where a selector's descriptor of `bytes` lies, if inside its table.
    fn descriptor_address(&self, selector: u16, bytes: u64) -> Option<u64> {
        let offset = u64::from(selector & !(RPL | LOCAL));
        let (base, limit) = if selector & LOCAL == 0 {
            (self.sys.gdtr.base, u64::from(self.sys.gdtr.limit))
        } else if self.sys.ldtr.is_usable() {
            (self.sys.ldtr.base, u64::from(self.sys.ldtr.limit))
        } else {
            return None;
        };
        (offset + (bytes - 1) <= limit).then(|| self.system_address(base, offset))
    }

    /// Reads a selector's descriptor; `None` if it lies outside its table.
    pub(crate) fn descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Stop> {
        match self.descriptor_address(selector, 8) {
            Some(address) => Ok(Some(Descriptor(self.read_system(address)?))),
            None => Ok(None),
        }
    }

    /// Reads a selector's descriptor; raises `vector` if it lies outside its table.
    pub(crate) fn descriptor_or(
        &mut self,
        selector: u16,
        vector: Vector,
        ext: u32,
    ) -> Result<Descriptor, Stop> {
        match self.descriptor(selector)? {
            Some(descriptor) => Ok(descriptor),
            None => self.refuse(vector, selector, ext),
        }
    }

    /// The upper half of a 16-byte descriptor of long mode; `None` if it lies outside its table.
    pub(crate) fn upper_descriptor(&mut self, selector: u16) -> Result<Option<u64>, Stop> {
        match self.descriptor_address(selector, 16) {
            Some(address) => Ok(Some(self.read_system(address.wrapping_add(8))?)),
            None => Ok(None),
        }
    }

    /// Sets the accessed bit of a code or data descriptor that is being loaded.
    #[inline(always)]
    pub(crate) fn set_accessed(&mut self, selector: u16, descriptor: Descriptor) -> Step {
        if descriptor.has(access::ACCESSED) {
            return Ok(());
        }
        self.change_descriptor(selector, access::ACCESSED, 0)
    }

    /// Whether a descriptor could be changed: faults if not.
    pub(crate) fn probe_descriptor(&mut self, selector: u16) -> Step {
        match self.descriptor_address(selector, 8) {
            Some(address) => {
                let access_byte = address.wrapping_add(5);
                self.probe_as(access_byte, 1, Access::Write, View::Supervisor)
            }
            None => Ok(()),
        }
    }

    /// Sets and clears bits of [`access`] (those of bits 0 to 7) in a descriptor in memory, by one
    /// locked access.
    pub(crate) fn change_descriptor(&mut self, selector: u16, set: u32, clear: u32) -> Step {
        let Some(address) = self.descriptor_address(selector, 8) else {
            return Ok(());
        };
        let address = address.wrapping_add(4);
        let change = |word: u32| word & !(clear << 8) | set << 8;
        let piece = self.piece(address, Access::Write, View::Supervisor)?;
        match piece.place {
            Place::Ram { host, traced } if address.is_multiple_of(4) => {
                let mut old = host.load_u32();
                while let Err(found) = host.compare_exchange_u32(old, change(old)) {
                    old = found;
                }
                if traced {
                    self.report_write(piece.gpa, 4);
                }
            }
            // A table in device memory, or misaligned, which no system has: not locked.
            _ => {
                let word = change(self.read_system::<u32>(address)?);
                self.write_system(address.wrapping_add(1), (word >> 8) as u8)?;
            }
        }
        Ok(())
    }

    /// What real mode and virtual-8086 mode make of a selector. Real mode leaves limit and access
    /// rights as they were ("unreal mode" relies on that).
    pub(crate) fn real_segment(&self, index: usize, selector: u16) -> Segment {
        if self.is_vm86() {
            return vm86_segment(selector);
        }
        let old = self.sys.segments[index];
        if !old.is_usable() {
            return Segment::real(selector, index == sreg::CS);
        }
        Segment {
            selector,
            base: u64::from(selector) << 4,
            ..old
        }
    }

    /// Loads a segment register other than CS (SDM vol. 2B, MOV).
    pub(crate) fn load_segment(&mut self, index: usize, selector: u16) -> Step {
        let segment = if !self.is_protected() || self.is_vm86() {
            self.real_segment(index, selector)
        } else if index == sreg::SS {
            self.stack_segment(selector)?
        } else {
            self.data_segment(selector)?
        };
        let before = std::mem::replace(&mut self.sys.segments[index], segment);
        if index == sreg::SS && before.access != segment.access {
            self.update_mode();
        }
        Ok(())
    }

    /// What DS, ES, FS or GS becomes with a selector.
    fn data_segment(&mut self, selector: u16) -> Result<Segment, Stop> {
        if is_null(selector) {
            return Ok(Segment::null(selector));
        }
        let descriptor = self.descriptor_or(selector, Vector::GP, 0)?;
        let level = self.cpl.max(rpl(selector));
        let too_low = !is_conforming(descriptor) && level > descriptor.dpl();
        if !is_readable(descriptor) || too_low {
            return self.refuse(Vector::GP, selector, 0);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::NP, selector, 0);
        }
        self.set_accessed(selector, descriptor)?;
        Ok(loaded(descriptor, selector))
    }

    /// What SS becomes with a selector, at the current level.
    fn stack_segment(&mut self, selector: u16) -> Result<Segment, Stop> {
        let level = self.cpl;
        if is_null(selector) {
            if !self.is_64bit() || level == 3 || rpl(selector) != level {
                return self.gp0();
            }
            return Ok(null_stack_segment(level));
        }
        self.stack_segment_at(selector, level)
    }

    /// A stack segment for a level; the selector is not null.
    pub(crate) fn stack_segment_at(&mut self, selector: u16, level: u8) -> Result<Segment, Stop> {
        let descriptor = self.descriptor_or(selector, Vector::GP, 0)?;
        if rpl(selector) != level || !is_writable_data(descriptor) || descriptor.dpl() != level {
            return self.refuse(Vector::GP, selector, 0);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::SS, selector, 0);
        }
        self.set_accessed(selector, descriptor)?;
        Ok(loaded(descriptor, selector))
    }

    /// Holds off interrupts and debug traps for one instruction, after SS was loaded.
    fn shadow_stack_switch(&mut self) {
        self.sys.shadow = InterruptShadow::MovSs;
        self.update_attention();
        self.end_block = true;
    }
}

/// MOV to a segment register; CS gives #UD.
fn op_mov_to_segment(cpu: &mut Cpu, op: &Op) -> Step {
    let index = usize::from(op.dst);
    if index == sreg::CS || index > sreg::GS {
        return cpu.ud();
    }
    let selector = source_word(cpu, op)?;
    cpu.load_segment(index, selector)?;
    if index == sreg::SS {
        cpu.shadow_stack_switch();
    }
    Ok(())
}

/// A 16-bit source operand.
pub(crate) fn source_word(cpu: &mut Cpu, op: &Op) -> Result<u16, Stop> {
    if op.has_memory() {
        cpu.load::<u16>(op)
    } else {
        Ok(cpu.regs.gpr[usize::from(op.src) & 15] as u16)
    }
}

/// Stores a selector to memory (16 bits), or zero-extended to a register of the operand size.
pub(crate) fn store_selector(cpu: &mut Cpu, op: &Op, selector: u16) -> Step {
    if op.has_memory() {
        return cpu.store(op, selector);
    }
    match op.operand_size() {
        2 => cpu.set_reg(op.dst, selector),
        _ => cpu.set_reg(op.dst, u32::from(selector)),
    }
    Ok(())
}

fn op_mov_from_segment(cpu: &mut Cpu, op: &Op) -> Step {
    let selector = cpu.sys.segments[usize::from(op.src).min(5)].selector;
    store_selector(cpu, op, selector)
}

fn op_push_segment(cpu: &mut Cpu, op: &Op) -> Step {
    let selector = cpu.sys.segments[usize::from(op.dst).min(5)].selector;
    if op.operand_size() == 4 {
        // The upper half of the doubleword stays as it was on the stack (SDM vol. 2B, PUSH).
        return cpu.push_low(4, selector);
    }
    cpu.push(op.operand_size(), u64::from(selector))
}

fn op_pop_segment(cpu: &mut Cpu, op: &Op) -> Step {
    let index = usize::from(op.dst).min(5);
    let size = op.operand_size();
    // Only the selector is read, whatever the operand size: that shows in faults.
    let selector = cpu.peek(2, 0)? as u16;
    // With a new SS the old stack's size still decides which part of RSP moves.
    let mask = cpu.stack_mask;
    cpu.load_segment(index, selector)?;
    let pointer = cpu.regs.gpr[gpr::RSP];
    cpu.regs.gpr[gpr::RSP] = match mask {
        0xffff => pointer & !0xffff | pointer.wrapping_add(size) & 0xffff,
        mask => pointer.wrapping_add(size) & mask,
    };
    if index == sreg::SS {
        cpu.shadow_stack_switch();
    }
    Ok(())
}

/// LDS, LES, LFS, LGS, LSS: a far pointer to a segment register (`code`) and a general one.
fn op_load_far_pointer(cpu: &mut Cpu, op: &Op) -> Step {
    let (offset, selector) = load_far_pointer(cpu, op)?;
    cpu.load_segment(usize::from(op.code), selector)?;
    match op.operand_size() {
        2 => cpu.set_reg(op.dst, offset as u16),
        4 => cpu.set_reg(op.dst, offset as u32),
        _ => cpu.set_reg(op.dst, offset),
    }
    // LSS does both halves at once: no shadow (SDM vol. 3A, 7.8.3), but the stack's size may be new.
    cpu.end_block |= usize::from(op.code) == sreg::SS;
    Ok(())
}

/// Reads a far pointer operand: offset of the operand size, then selector.
pub(crate) fn load_far_pointer(cpu: &mut Cpu, op: &Op) -> Result<(u64, u16), Stop> {
    let size = op.operand_size();
    let linear = cpu.operand_address(op, size + 2, false)?;
    let offset = match size {
        2 => u64::from(cpu.read::<u16>(linear, op.segment)?),
        4 => u64::from(cpu.read::<u32>(linear, op.segment)?),
        _ => cpu.read::<u64>(linear, op.segment)?,
    };
    let behind = cpu.part_address(op, size);
    let selector = cpu.read::<u16>(behind, op.segment)?;
    Ok((offset, selector))
}

/// The handler of an instruction that this module executes, or [`descriptor_tables`].
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let to_segment = || {
        instruction.op0_kind() == OpKind::Register
            && instruction.op0_register().is_segment_register()
    };
    Some(match instruction.mnemonic() {
        Mnemonic::Mov => match instruction.code() {
            Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16 => {
                op_mov_to_segment
            }
            Code::Mov_rm16_Sreg => sized(op, 2, op_mov_from_segment),
            Code::Mov_r32m16_Sreg => sized(op, 4, op_mov_from_segment),
            Code::Mov_r64m16_Sreg => sized(op, 8, op_mov_from_segment),
            _ => return None,
        },
        Mnemonic::Push if to_segment() => sized(op, stack_bytes(instruction), op_push_segment),
        Mnemonic::Pop if to_segment() => sized(op, stack_bytes(instruction), op_pop_segment),
        Mnemonic::Lds => far_pointer(instruction, op, sreg::DS),
        Mnemonic::Les => far_pointer(instruction, op, sreg::ES),
        Mnemonic::Lfs => far_pointer(instruction, op, sreg::FS),
        Mnemonic::Lgs => far_pointer(instruction, op, sreg::GS),
        Mnemonic::Lss => far_pointer(instruction, op, sreg::SS),
        _ => return descriptor_tables::lower(instruction, op),
    })
}

fn far_pointer(instruction: &Instruction, op: &mut Op, segment: usize) -> Handler {
    op.code = segment as u8;
    let size = instruction.op0_register().size() as u64;
    sized(op, size, op_load_far_pointer)
}

/// Bytes that an instruction pushes or pops.
fn stack_bytes(instruction: &Instruction) -> u64 {
    u64::from(instruction.stack_pointer_increment().unsigned_abs())
}

/// Gives the op an operand size and a handler.
pub(crate) fn sized(op: &mut Op, bytes: u64, handler: Handler) -> Handler {
    op.set_operand_size(bytes);
    handler
}

#[cfg(test)]
mod tests;
