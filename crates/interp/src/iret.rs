//! IRET (SDM vol. 2A), in all modes.

use iced_x86::{Code, Instruction};
use trapgate_x86::descriptor::{access, system};
use trapgate_x86::paging::is_canonical;
use trapgate_x86::registers::{cr0, cr4, rflags, sreg};
use trapgate_x86::{Descriptor, Exception, Segment, Vector};

use crate::cpu::{Cpu, Step, Stop};
use crate::frame::{Stack, null_stack_segment};
use crate::op::{Handler, Op};
use crate::segments::{LOCAL, is_code, is_conforming, is_null, loaded, rpl, sized, vm86_segment};
use crate::task::Reason;

/// Flags that IRET and POPF restore with any operand size, at any level.
const LOW_FLAGS: u64 = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;

/// Where a far return or IRET goes.
pub(crate) struct Return {
    /// CS after it.
    pub(crate) code: Segment,
    pub(crate) descriptor: Descriptor,
    /// CPL after it.
    pub(crate) level: u8,
}

impl Cpu {
    /// Checks the code selector that a far return or IRET popped (SDM vol. 2A, IRET,
    /// PROTECTED-MODE-RETURN).
    pub(crate) fn return_target(&mut self, selector: u16) -> Result<Return, Stop> {
        if is_null(selector) {
            return self.gp0();
        }
        let descriptor = self.descriptor_or(selector, Vector::GP, 0)?;
        let level = rpl(selector);
        let mut refused = !is_code(descriptor) || level < self.cpl;
        refused |= if is_conforming(descriptor) {
            descriptor.dpl() > level
        } else {
            descriptor.dpl() != level
        };
        refused |= self.is_long() && descriptor.has(access::L | access::DB);
        if refused {
            return self.refuse(Vector::GP, selector, 0);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::NP, selector, 0);
        }
        Ok(Return {
            code: loaded(descriptor, selector),
            descriptor,
            level,
        })
    }

    /// Checks the stack selector that goes with it. A null one is good for 64-bit code that is not
    /// user code.
    pub(crate) fn return_stack(&mut self, selector: u16, to: &Return) -> Result<Segment, Stop> {
        if is_null(selector) {
            let to_64bit = self.is_long() && to.code.has(access::L);
            if !to_64bit || to.level == 3 || rpl(selector) != to.level {
                return self.gp0();
            }
            return Ok(null_stack_segment(to.level));
        }
        self.stack_segment_at(selector, to.level)
    }

    /// The instruction pointer that a return pops: to compatibility mode a host CPU (Intel family 6, model 167) takes
    /// EIP of eight bytes, and does not look at the rest.
    pub(crate) fn returned_rip(&self, to: &Return, popped: u64) -> u64 {
        if self.is_long() && !to.code.has(access::L) {
            popped & 0xffff_ffff
        } else {
            popped
        }
    }

    /// #GP(0) unless an instruction pointer is inside the code segment that it is for.
    pub(crate) fn check_entry(&mut self, code: &Segment, rip: u64) -> Step {
        let inside = if self.is_long() && code.has(access::L) {
            is_canonical(rip)
        } else {
            rip <= u64::from(code.limit)
        };
        if inside { Ok(()) } else { self.gp0() }
    }

    /// Data segments that the new level may not use become null, on a return to an outer level. Null selectors
    /// become 0, whatever their RPL was; their bases stay.
    pub(crate) fn drop_inner_segments(&mut self, level: u8) {
        for index in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            let segment = &mut self.sys.segments[index];
            let conforming = segment.has(access::CODE | access::CONFORMING);
            if is_null(segment.selector) {
                segment.selector = 0;
            } else if segment.is_usable() && !conforming && segment.dpl() < level {
                *segment = Segment::null(0);
            }
        }
    }

    /// Replaces the flags in `mask`; the caller updates the mode.
    pub(crate) fn put_flags(&mut self, value: u64, mask: u64) {
        let flags = self.rflags() & !mask | value & mask;
        self.flags.put(flags);
        self.system_flags = flags & rflags::DEFINED & !rflags::ARITHMETIC;
    }

    /// The flags that IRET may change at the current level.
    fn return_flags(&self, size: u64) -> u64 {
        let mut mask = LOW_FLAGS;
        if size > 2 {
            mask |= rflags::RF | rflags::AC | rflags::ID;
        }
        if self.cpl <= self.iopl() {
            mask |= rflags::IF;
        }
        if self.cpl == 0 {
            mask |= rflags::IOPL;
            if size > 2 {
                mask |= rflags::VIF | rflags::VIP;
            }
        }
        mask
    }

    /// Protected and long mode, after [`rflags::NT`] and [`rflags::VM`] were dealt with.
    fn return_protected(&mut self, size: u64) -> Step {
        let stack = Stack::operand(self);
        let long = self.is_64bit();
        let mut frame = [0; 5];
        // 64-bit mode pops the stack pointer whatever the levels are.
        if long {
            self.peek_return(&stack, size, 0, &mut frame)?;
        } else {
            self.peek_frame(&stack, size, 0, &mut frame[..3])?;
        }
        let [rip, selector, flags, ..] = frame;
        if !long && size == 4 && flags & rflags::VM != 0 && self.cpl == 0 && !self.is_long() {
            return self.return_to_vm86(&stack);
        }
        let to = self.return_target(selector as u16)?;
        if long && size > 2 && flags & rflags::AC != 0 {
            self.check_pops_behind_flags(&stack, size)?;
        }
        let outward = to.level > self.cpl;
        if outward && !long {
            self.peek_return(&stack, size, 3 * size, &mut frame[3..])?;
        }
        let rip = self.returned_rip(&to, rip);
        let [.., pointer, stack_selector] = frame;
        let new_stack = if outward || long {
            Some(self.return_stack(stack_selector as u16, &to)?)
        } else {
            None
        };
        self.check_entry(&to.code, rip)?;
        self.set_accessed(to.code.selector, to.descriptor)?;

        self.put_flags(flags, self.return_flags(size));
        self.sys.segments[sreg::CS] = to.code;
        self.rip = rip;
        if let Some(segment) = new_stack {
            self.sys.segments[sreg::SS] = segment;
            if outward {
                self.drop_inner_segments(to.level);
            }
            self.update_mode();
            self.set_stack_pointer(pointer);
        } else {
            self.drop_from_stack(3 * size);
            self.update_mode();
        }
        Ok(())
    }

    /// #AC of the stack pointer and selector, if the flags that were popped before them ask for it. A host CPU (family 6,
    /// model 167) has these in force by then, and the old ones in the exception's frame.
    fn check_pops_behind_flags(&mut self, stack: &Stack, size: u64) -> Step {
        let checked = self.cpl == 3 && self.sys.cr0 & cr0::AM != 0;
        if checked && !stack.pointer.is_multiple_of(size) {
            return Err(self.raise(Exception::with_code(Vector::AC, 0)));
        }
        Ok(())
    }

    /// RETURN-TO-VIRTUAL-8086-MODE.
    fn return_to_vm86(&mut self, stack: &Stack) -> Step {
        let mut frame = [0; 9];
        self.peek_frame(stack, 4, 0, &mut frame)?;
        let [rip, cs, flags, pointer, ss, es, ds, fs, gs] = frame;
        if rip > 0xffff {
            return self.gp0();
        }
        for (index, selector) in [
            (sreg::CS, cs),
            (sreg::SS, ss),
            (sreg::ES, es),
            (sreg::DS, ds),
            (sreg::FS, fs),
            (sreg::GS, gs),
        ] {
            self.sys.segments[index] = vm86_segment(selector as u16);
        }
        self.put_flags(flags, rflags::DEFINED);
        self.rip = rip;
        self.regs.gpr[trapgate_x86::registers::gpr::RSP] = pointer & 0xffff_ffff;
        self.update_mode();
        Ok(())
    }

    /// TASK-RETURN: back to the task that this one was called from.
    fn return_to_task(&mut self) -> Step {
        let selector = self.read_tss(0, 2, 0)? as u16;
        if selector & LOCAL != 0 {
            return self.refuse(Vector::TS, selector, 0);
        }
        let descriptor = self.descriptor_or(selector, Vector::TS, 0)?;
        let busy = matches!(descriptor.kind(), system::TSS16_BUSY | system::TSS_BUSY);
        if descriptor.has(access::S) || !busy {
            return self.refuse(Vector::TS, selector, 0);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::NP, selector, 0);
        }
        let flags = self.rflags();
        self.switch_task(selector, descriptor, Reason::Return, flags)
    }

    /// Real mode, and virtual-8086 mode where it may: `mask` is the flags to restore.
    fn return_real(&mut self, size: u64, mask: u64) -> Step {
        let stack = Stack::operand(self);
        let mut frame = [0; 3];
        self.peek_frame(&stack, size, 0, &mut frame)?;
        let [rip, selector, flags] = frame;
        if rip > u64::from(self.sys.segments[sreg::CS].limit) {
            return self.gp0();
        }
        self.drop_from_stack(3 * size);
        self.sys.segments[sreg::CS] = self.real_segment(sreg::CS, selector as u16);
        self.rip = rip;
        self.put_flags(flags, mask);
        self.update_mode();
        Ok(())
    }

    /// IRET in virtual-8086 mode.
    fn return_in_vm86(&mut self, size: u64) -> Step {
        let mut mask = LOW_FLAGS | rflags::IF;
        if self.iopl() == 3 {
            if size > 2 {
                mask |= rflags::RF | rflags::AC | rflags::ID;
            }
            return self.return_real(size, mask);
        }
        if self.sys.cr4 & cr4::VME == 0 || size != 2 {
            return self.gp0();
        }
        // With the mode's extensions, VIF stands for IF (SDM vol. 3A, 21.3.2).
        let stack = Stack::operand(self);
        let mut frame = [0; 3];
        self.peek_frame(&stack, 2, 0, &mut frame)?;
        let enables = frame[2] & rflags::IF != 0;
        if frame[2] & rflags::TF != 0 || enables && self.system_flags & rflags::VIP != 0 {
            return self.gp0();
        }
        mask &= !rflags::IF;
        self.return_real(2, mask)?;
        self.put_flags(if enables { rflags::VIF } else { 0 }, rflags::VIF);
        Ok(())
    }
}

fn op_iret(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.operand_size();
    // Even an IRET that faults ends the blocking of NMIs (SDM vol. 3A, 7.7.1).
    cpu.sys.nmi_blocked = false;
    cpu.end_block = true;
    if !cpu.is_protected() {
        // ID, AC and RF too, with 32 bits; VIP, VIF and VM stay as they are.
        let mut mask = LOW_FLAGS | rflags::IF | rflags::IOPL;
        if size > 2 {
            mask |= rflags::ID | rflags::AC | rflags::RF;
        }
        return cpu.return_real(size, mask);
    }
    if cpu.is_vm86() {
        return cpu.return_in_vm86(size);
    }
    if cpu.system_flags & rflags::NT != 0 {
        if cpu.is_long() {
            return cpu.gp0();
        }
        return cpu.return_to_task();
    }
    cpu.return_protected(size)
}

/// The handler of an instruction that this module executes.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    let size = match instruction.code() {
        Code::Iretw => 2,
        Code::Iretd => 4,
        Code::Iretq => 8,
        _ => return None,
    };
    Some(sized(op, size, op_iret))
}

#[cfg(test)]
mod tests;
