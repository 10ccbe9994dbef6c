//! Far jumps, calls and returns, and the system call instructions.

use iced_x86::{Code, Instruction, Mnemonic};
use trapgate_x86::descriptor::{access, system};
use trapgate_x86::paging::is_canonical;
use trapgate_x86::registers::{efer, gpr, rflags, sreg};
use trapgate_x86::{Descriptor, Segment, Vector};

use crate::cpu::{Cpu, Step, Stop};
use crate::frame::Stack;
use crate::op::{Handler, Op};
use crate::segments::{
    LOCAL, is_code, is_conforming, is_null, load_far_pointer, loaded, rpl, sized,
};
use crate::task::Reason;

/// What the 64-bit far branch targets through a gate: a code segment and an offset.
struct GateTarget {
    selector: u16,
    descriptor: Descriptor,
    rip: u64,
    /// Bytes of what the gate pushes: 2, 4 or 8.
    size: u64,
    /// Parameters to copy to an inner stack.
    parameters: usize,
}

/// The far pointer operand: offset and selector.
fn far_operand(cpu: &mut Cpu, op: &Op) -> Result<(u64, u16), Stop> {
    if op.has_memory() {
        load_far_pointer(cpu, op)
    } else {
        Ok((op.immediate, op.extra))
    }
}

fn truncate(value: u64, size: u64) -> u64 {
    value & (u64::MAX >> (64 - size * 8))
}

impl Cpu {
    /// A far JMP or CALL in real or virtual-8086 mode.
    fn far_real(&mut self, offset: u64, selector: u16, size: u64, call: bool) -> Step {
        if call {
            self.check_room(&Stack::current(self, 0), size, 2)?;
        }
        if offset > u64::from(self.sys.segments[sreg::CS].limit) {
            return self.gp0();
        }
        if call {
            self.push_return(size)?;
        }
        self.sys.segments[sreg::CS] = self.real_segment(sreg::CS, selector);
        self.rip = offset;
        self.update_mode();
        Ok(())
    }

    /// Pushes CS and RIP on the current stack.
    fn push_return(&mut self, size: u64) -> Step {
        let mut stack = Stack::operand(self);
        let selector = u64::from(self.sys.segments[sreg::CS].selector);
        self.push_frame(&mut stack, size, &[selector, self.rip])?;
        self.set_stack_pointer(stack.pointer);
        Ok(())
    }

    /// A far JMP or CALL in protected or long mode (SDM vol. 2A, JMP and CALL).
    fn far_protected(&mut self, offset: u64, selector: u16, size: u64, call: bool) -> Step {
        if is_null(selector) {
            return self.gp0();
        }
        let descriptor = self.descriptor_or(selector, Vector::GP, 0)?;
        if descriptor.has(access::S) {
            return self.far_direct(offset, selector, descriptor, size, call);
        }
        // All that follow are gates or tasks, whose own level counts.
        let kind = descriptor.kind();
        let known = match kind {
            system::CALL_GATE => true,
            system::CALL_GATE16 | system::TASK_GATE | system::TSS16 | system::TSS => {
                !self.is_long()
            }
            // A busy task shows as #GP too.
            _ => false,
        };
        if !known || descriptor.dpl() < self.cpl.max(rpl(selector)) {
            return self.refuse(Vector::GP, selector, 0);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::NP, selector, 0);
        }
        let reason = if call { Reason::Call } else { Reason::Jump };
        let flags = self.rflags() & !rflags::RF;
        match kind {
            system::CALL_GATE | system::CALL_GATE16 => {
                let target = self.gate_target(selector, descriptor, call)?;
                if call {
                    self.call_gate(&target)
                } else {
                    self.jump_gate(&target)
                }
            }
            system::TASK_GATE => {
                let task = descriptor.gate_selector();
                let descriptor = self.available_task(task, 0)?;
                self.switch_task(task, descriptor, reason, flags)
            }
            _ => self.switch_task(selector, descriptor, reason, flags),
        }
    }

    /// Straight to a code segment, at the current level.
    fn far_direct(
        &mut self,
        offset: u64,
        selector: u16,
        descriptor: Descriptor,
        size: u64,
        call: bool,
    ) -> Step {
        let level = self.cpl;
        let mut refused = !is_code(descriptor);
        refused |= self.is_long() && descriptor.has(access::L | access::DB);
        refused |= if is_conforming(descriptor) {
            descriptor.dpl() > level
        } else {
            rpl(selector) > level || descriptor.dpl() != level
        };
        if refused {
            return self.refuse(Vector::GP, selector, 0);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::NP, selector, 0);
        }
        let code = loaded(descriptor, selector & !3 | u16::from(level));
        let is_64bit = self.is_long() && code.has(access::L);
        // An offset of 64 bits loses its upper half on the way to compatibility mode.
        let offset = if is_64bit {
            offset
        } else {
            offset & 0xffff_ffff
        };
        if call {
            self.check_room(&Stack::current(self, 0), size, 2)?;
        }
        if !(call && is_64bit) {
            self.check_entry(&code, offset)?;
        }
        self.set_accessed(selector, descriptor)?;
        if call {
            // As of a near call, the push comes before the look at an address that is not canonical.
            let pointer = self.regs.gpr[gpr::RSP];
            self.push_return(size)?;
            if let Err(stop) = self.check_entry(&code, offset) {
                self.regs.gpr[gpr::RSP] = pointer;
                return Err(stop);
            }
        }
        self.enter_code(code, offset);
        Ok(())
    }

    fn enter_code(&mut self, code: Segment, rip: u64) {
        self.sys.segments[sreg::CS] = code;
        self.rip = rip;
        self.update_mode();
    }

    /// Checks the code segment behind a call gate.
    fn gate_target(
        &mut self,
        gate_selector: u16,
        gate: Descriptor,
        call: bool,
    ) -> Result<GateTarget, Stop> {
        let long = self.is_long();
        let mut rip = u64::from(gate.gate_offset());
        if long {
            let Some(upper) = self.upper_descriptor(gate_selector)? else {
                return self.refuse(Vector::GP, gate_selector, 0);
            };
            // The type field of the second half must be zero, so that it is no descriptor.
            if upper >> 40 & 0x1f != 0 {
                return self.refuse(Vector::GP, gate_selector, 0);
            }
            rip |= upper << 32;
        }
        let size = match (long, gate.kind()) {
            (true, _) => 8,
            (false, system::CALL_GATE) => 4,
            _ => 2,
        };
        let selector = gate.gate_selector();
        if is_null(selector) {
            return self.gp0();
        }
        let descriptor = self.descriptor_or(selector, Vector::GP, 0)?;
        let mut refused = !is_code(descriptor) || descriptor.dpl() > self.cpl;
        // A jump can't change the level.
        refused |= !call && !is_conforming(descriptor) && descriptor.dpl() != self.cpl;
        refused |= long && (!descriptor.has(access::L) || descriptor.has(access::DB));
        if refused {
            return self.refuse(Vector::GP, selector, 0);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::NP, selector, 0);
        }
        Ok(GateTarget {
            selector,
            descriptor,
            rip: truncate(rip, size),
            size,
            parameters: usize::from(gate.gate_count()),
        })
    }

    fn jump_gate(&mut self, target: &GateTarget) -> Step {
        let code = loaded(
            target.descriptor,
            target.selector & !3 | u16::from(self.cpl),
        );
        self.check_entry(&code, target.rip)?;
        self.set_accessed(target.selector, target.descriptor)?;
        self.enter_code(code, target.rip);
        Ok(())
    }

    fn call_gate(&mut self, target: &GateTarget) -> Step {
        let level = target.descriptor.dpl();
        if is_conforming(target.descriptor) || level == self.cpl {
            let code = loaded(
                target.descriptor,
                target.selector & !3 | u16::from(self.cpl),
            );
            self.check_room(&Stack::current(self, 0), target.size, 2)?;
            self.check_entry(&code, target.rip)?;
            self.set_accessed(target.selector, target.descriptor)?;
            self.push_return(target.size)?;
            self.enter_code(code, target.rip);
            return Ok(());
        }
        self.call_inner(target, level)
    }

    /// MORE-PRIVILEGE: to the stack that the TSS has for the level.
    fn call_inner(&mut self, target: &GateTarget, level: u8) -> Step {
        let size = target.size;
        let old = Stack::operand(self);
        let mut stack = if size == 8 {
            let pointer = self.read_tss(4 + u64::from(level) * 8, 8, 0)?;
            Stack::long(self, pointer, level, 0)
        } else {
            self.tss_stack(level, 0)?
        };
        let parameters = if size == 8 { 0 } else { target.parameters };
        let mut frame = [0; 4 + 31];
        frame[0] = u64::from(self.sys.segments[sreg::SS].selector);
        frame[1] = self.regs.gpr[gpr::RSP];
        let end = 4 + parameters;
        self.check_room(&stack, size, end)?;
        let code = loaded(target.descriptor, target.selector & !3 | u16::from(level));
        self.check_entry(&code, target.rip)?;
        // The last parameter pushed is on top of the old stack, and of the new.
        let copied = &mut frame[2..2 + parameters];
        if !copied.is_empty() {
            self.peek_frame(&old, size, 0, copied)?;
            copied.reverse();
        }
        frame[end - 2] = u64::from(self.sys.segments[sreg::CS].selector);
        frame[end - 1] = self.mask_rip(self.rip);
        self.set_accessed(target.selector, target.descriptor)?;
        self.push_frame(&mut stack, size, &frame[..end])?;
        self.take_stack(&stack, level);
        self.enter_code(code, target.rip);
        self.set_stack_pointer(stack.pointer);
        Ok(())
    }

    /// RETF in protected and long mode; `released` bytes of parameters go from both stacks (SDM
    /// vol. 2B, RET).
    fn far_return(&mut self, size: u64, released: u64) -> Step {
        let stack = Stack::operand(self);
        let mut frame = [0; 2];
        self.peek_return(&stack, size, 0, &mut frame)?;
        let [rip, selector] = frame;
        let to = self.return_target(selector as u16)?;
        let rip = self.returned_rip(&to, rip);
        if to.level == self.cpl {
            self.check_entry(&to.code, rip)?;
            self.set_accessed(to.code.selector, to.descriptor)?;
            self.drop_from_stack((2 * size).wrapping_add(released));
            self.enter_code(to.code, rip);
            return Ok(());
        }
        let mut outer = [0; 2];
        self.peek_return(&stack, size, (2 * size).wrapping_add(released), &mut outer)?;
        let [pointer, stack_selector] = outer;
        let segment = self.return_stack(stack_selector as u16, &to)?;
        self.check_entry(&to.code, rip)?;
        self.set_accessed(to.code.selector, to.descriptor)?;
        self.sys.segments[sreg::SS] = segment;
        self.drop_inner_segments(to.level);
        self.enter_code(to.code, rip);
        self.set_stack_pointer(pointer.wrapping_add(released));
        Ok(())
    }

    /// RETF in real and virtual-8086 mode.
    fn far_return_real(&mut self, size: u64, released: u64) -> Step {
        let stack = Stack::operand(self);
        let mut frame = [0; 2];
        self.peek_frame(&stack, size, 0, &mut frame)?;
        let [rip, selector] = frame;
        if rip > u64::from(self.sys.segments[sreg::CS].limit) {
            return self.gp0();
        }
        self.drop_from_stack((2 * size).wrapping_add(released));
        let code = self.real_segment(sreg::CS, selector as u16);
        self.enter_code(code, rip);
        Ok(())
    }

    /// The available task that a task gate names.
    pub(crate) fn available_task(&mut self, selector: u16, ext: u32) -> Result<Descriptor, Stop> {
        if selector & LOCAL != 0 {
            return self.refuse(Vector::GP, selector, ext);
        }
        let descriptor = self.descriptor_or(selector, Vector::GP, ext)?;
        let available = matches!(descriptor.kind(), system::TSS16 | system::TSS);
        if descriptor.has(access::S) || !available {
            return self.refuse(Vector::GP, selector, ext);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::NP, selector, ext);
        }
        Ok(descriptor)
    }

    /// CS and SS as the system call instructions make them, without a descriptor; the selectors'
    /// RPL is the new level.
    fn enter_fixed(&mut self, code: u16, stack: u16, level: u8, long: bool) {
        let dpl = u32::from(level) << access::DPL_SHIFT;
        let size = if long { access::L } else { access::DB };
        let rights = access::CODE | access::READABLE | size | dpl;
        self.sys.segments[sreg::CS] = Segment::flat(code, rights);
        self.sys.segments[sreg::SS] = Segment::flat(stack, access::WRITABLE | access::DB | dpl);
        self.end_block = true;
        self.update_mode();
    }
}

fn far_branch(cpu: &mut Cpu, op: &Op, call: bool) -> Step {
    let size = op.operand_size();
    let (offset, selector) = far_operand(cpu, op)?;
    let offset = truncate(offset, size);
    cpu.end_block = true;
    if cpu.is_protected() && !cpu.is_vm86() {
        cpu.far_protected(offset, selector, size, call)
    } else {
        cpu.far_real(offset, selector, size, call)
    }
}

fn op_jump_far(cpu: &mut Cpu, op: &Op) -> Step {
    far_branch(cpu, op, false)
}

fn op_call_far(cpu: &mut Cpu, op: &Op) -> Step {
    far_branch(cpu, op, true)
}

fn op_return_far(cpu: &mut Cpu, op: &Op) -> Step {
    let (size, released) = (op.operand_size(), op.immediate & 0xffff);
    cpu.end_block = true;
    if cpu.is_protected() && !cpu.is_vm86() {
        cpu.far_return(size, released)
    } else {
        cpu.far_return_real(size, released)
    }
}

/// SYSCALL: only in 64-bit mode, as Intel's.
fn op_syscall(cpu: &mut Cpu, _: &Op) -> Step {
    if !cpu.is_64bit() || cpu.sys.efer & efer::SCE == 0 {
        return cpu.ud();
    }
    let flags = cpu.rflags() & !rflags::RF;
    cpu.regs.gpr[gpr::RCX] = cpu.rip;
    cpu.regs.gpr[11] = flags;
    cpu.rip = cpu.sys.lstar;
    cpu.put_flags(flags & !cpu.sys.sfmask, u64::MAX);
    let code = (cpu.sys.star >> 32) as u16 & !3;
    cpu.enter_fixed(code, code.wrapping_add(8), 0, true);
    Ok(())
}

/// SYSRET. A non-canonical RCX faults at level 0, as on Intel's processors.
fn op_sysret(cpu: &mut Cpu, op: &Op) -> Step {
    if !cpu.is_64bit() || cpu.sys.efer & efer::SCE == 0 {
        return cpu.ud();
    }
    let long = op.operand_size() == 8;
    let target = cpu.regs.gpr[gpr::RCX];
    if cpu.cpl != 0 || (long && !is_canonical(target)) {
        return cpu.gp0();
    }
    cpu.rip = if long { target } else { target & 0xffff_ffff };
    let flags = cpu.regs.gpr[11] & rflags::DEFINED & !(rflags::RF | rflags::VM);
    cpu.put_flags(flags, u64::MAX);
    let user = (cpu.sys.star >> 48) as u16;
    let code = user.wrapping_add(if long { 16 } else { 0 }) | 3;
    cpu.enter_fixed(code, user.wrapping_add(8) | 3, 3, long);
    Ok(())
}

fn op_sysenter(cpu: &mut Cpu, _: &Op) -> Step {
    let code = cpu.sys.sysenter_cs as u16 & !3;
    if !cpu.is_protected() || code == 0 {
        return cpu.gp0();
    }
    let long = cpu.is_long();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.regs.gpr[gpr::RSP] = cpu.sys.sysenter_esp & mask;
    cpu.rip = cpu.sys.sysenter_eip & mask;
    cpu.put_flags(0, rflags::VM | rflags::IF | rflags::RF);
    cpu.enter_fixed(code, code.wrapping_add(8), 0, long);
    Ok(())
}

fn op_sysexit(cpu: &mut Cpu, op: &Op) -> Step {
    let kernel = cpu.sys.sysenter_cs as u16 & !3;
    if !cpu.is_protected() || kernel == 0 || cpu.cpl != 0 {
        return cpu.gp0();
    }
    let long = op.operand_size() == 8;
    let (stack, target) = (cpu.regs.gpr[gpr::RCX], cpu.regs.gpr[gpr::RDX]);
    if long && !(is_canonical(stack) && is_canonical(target)) {
        return cpu.gp0();
    }
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    cpu.regs.gpr[gpr::RSP] = stack & mask;
    cpu.rip = target & mask;
    let code = kernel.wrapping_add(if long { 32 } else { 16 }) | 3;
    cpu.enter_fixed(code, code.wrapping_add(8), 3, long);
    Ok(())
}

/// The handler of an instruction that this module executes.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match instruction.code() {
        Code::Jmp_ptr1616 | Code::Jmp_m1616 => sized(op, 2, op_jump_far),
        Code::Jmp_ptr1632 | Code::Jmp_m1632 => sized(op, 4, op_jump_far),
        Code::Jmp_m1664 => sized(op, 8, op_jump_far),
        Code::Call_ptr1616 | Code::Call_m1616 => sized(op, 2, op_call_far),
        Code::Call_ptr1632 | Code::Call_m1632 => sized(op, 4, op_call_far),
        Code::Call_m1664 => sized(op, 8, op_call_far),
        Code::Retfw | Code::Retfd | Code::Retfq => {
            op.immediate = 0;
            sized(op, return_size(instruction), op_return_far)
        }
        Code::Retfw_imm16 | Code::Retfd_imm16 | Code::Retfq_imm16 => {
            sized(op, return_size(instruction), op_return_far)
        }
        _ => match instruction.mnemonic() {
            Mnemonic::Syscall => op_syscall,
            Mnemonic::Sysret | Mnemonic::Sysretq => sized(op, long_form(instruction), op_sysret),
            Mnemonic::Sysenter => op_sysenter,
            Mnemonic::Sysexit | Mnemonic::Sysexitq => sized(op, long_form(instruction), op_sysexit),
            _ => return None,
        },
    })
}

fn return_size(instruction: &Instruction) -> u64 {
    match instruction.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    }
}

/// 8 for the forms with REX.W.
fn long_form(instruction: &Instruction) -> u64 {
    match instruction.code() {
        Code::Sysretq | Code::Sysexitq => 8,
        _ => 4,
    }
}

#[cfg(test)]
mod tests;
