//! Delivery of exceptions and interrupts (SDM vol. 3A, chapter 7; vol. 2A, INT n).
//!
//! A delivery that faults has changed nothing, with one exception that the architecture makes: a
//! task switch commits before it loads the new task's segments.

use iced_x86::{Instruction, Mnemonic};
use trapgate_x86::descriptor::{access, system};
use trapgate_x86::paging::is_canonical;
use trapgate_x86::registers::{cr4, dr, gpr, rflags, sreg};
use trapgate_x86::{Descriptor, Exception, InterruptShadow, Segment, Vector};

use crate::cpu::{Cpu, Step, Stop};
use crate::frame::Stack;
use crate::iret;
use crate::op::{Handler, Op};
use crate::segments::{is_code, is_conforming, is_null, loaded, sized};
use crate::task::Reason;

/// Where an event comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventKind {
    /// The interrupt controller.
    External,
    /// A non-maskable interrupt.
    Nmi,
    /// INT n, INT3, INTO: the gate's privilege level counts, and errors are not "external".
    Software,
    /// INT1: as an exception, the gate's privilege level does not count.
    PrivilegedSoftware,
    /// An exception.
    Exception,
}

/// An event that is being delivered.
#[derive(Clone, Copy, Debug)]
struct Event {
    vector: u8,
    kind: EventKind,
    error_code: Option<u32>,
    /// RFLAGS as the handler's frame shows it.
    flags: u64,
}

impl Event {
    /// The EXT bit of the error code of a fault in this delivery.
    fn ext(&self) -> u32 {
        u32::from(self.kind != EventKind::Software)
    }

    /// Bytes from the IDT's start to the gate, for gates of `size`; and the error code for them.
    fn gate(&self, size: u64) -> (u64, u32) {
        let code = u32::from(self.vector) << 3 | 2 | self.ext();
        (u64::from(self.vector) * size, code)
    }
}

/// Where an event's handler is.
struct Target {
    /// CS when the handler runs.
    code: Segment,
    /// Its descriptor, as it was read.
    descriptor: Descriptor,
    /// CPL when the handler runs.
    level: u8,
    rip: u64,
    /// An interrupt gate, not a trap gate.
    masks: bool,
}

impl Cpu {
    /// Delivers an exception. RIP is what the handler's frame shall show: of the faulting
    /// instruction, or of the next one for traps. `Err` is a triple fault.
    ///
    /// The loop ends: what a delivery raises is contributory or a page fault, and at most one pair
    /// of those makes no double fault.
    pub(crate) fn deliver_exception(&mut self, exception: Exception) -> Result<(), Stop> {
        let mut current = exception;
        loop {
            let stop = match self.deliver_one(current) {
                Ok(()) => return Ok(()),
                Err(stop) => stop,
            };
            // "Processors update CR2 whenever a page fault is detected", also if that makes a double fault or is in
            // the delivery of one (SDM vol. 3A, 7.15, vector 14, footnote).
            if stop == Stop::Fault && self.exception.vector == Vector::PF {
                self.sys.cr2 = self.exception.address;
            }
            if stop != Stop::Fault || current.vector == Vector::DF {
                return Err(Stop::Shutdown);
            }
            current = if current.vector.doubles_with(self.exception.vector) {
                Exception::with_code(Vector::DF, 0)
            } else {
                self.exception
            };
        }
    }

    fn deliver_one(&mut self, exception: Exception) -> Step {
        let vector = exception.vector;
        if vector == Vector::PF {
            self.sys.cr2 = exception.address;
        }
        let mut flags = self.rflags();
        // General detect is the one #DB fault that is not an instruction breakpoint.
        let detected = vector == Vector::DB
            && self.sys.dr7 & dr::DR7_GD != 0
            && self.sys.dr6 & dr::DR6_BD != 0;
        if detected || pushes_resume_flag(vector) {
            flags |= rflags::RF;
        }
        self.deliver(&Event {
            vector: vector.0,
            kind: EventKind::Exception,
            error_code: exception.error_code,
            flags,
        })?;
        if vector == Vector::DB {
            self.sys.dr7 &= !dr::DR7_GD;
        }
        Ok(())
    }

    /// Delivers an interrupt. RIP is that of the next instruction. On `Err` nothing has happened,
    /// and [`Self::exception`] is to be delivered instead; for external interrupts, after it.
    pub(crate) fn deliver_interrupt(&mut self, vector: u8, kind: EventKind) -> Step {
        if kind == EventKind::Nmi {
            self.sys.nmi_blocked = true;
        }
        let mut flags = self.rflags();
        if matches!(kind, EventKind::Software | EventKind::PrivilegedSoftware) {
            flags &= !rflags::RF;
        }
        self.deliver(&Event {
            vector,
            kind,
            error_code: None,
            flags,
        })
    }

    fn deliver(&mut self, event: &Event) -> Step {
        if self.is_long() {
            self.deliver_long(event)
        } else if self.is_protected() {
            self.deliver_protected(event)
        } else {
            self.deliver_real(event)
        }
    }

    /// `Err` with #GP or #NP whose error code names a gate.
    #[cold]
    fn refuse_gate(&mut self, vector: Vector, code: u32) -> Step {
        Err(self.raise(Exception::with_code(vector, code)))
    }

    /// IA-32e mode (SDM vol. 3A, 7.14).
    fn deliver_long(&mut self, event: &Event) -> Step {
        let ext = event.ext();
        let (offset, code) = event.gate(16);
        if offset + 15 > u64::from(self.sys.idtr.limit) {
            return self.refuse_gate(Vector::GP, code);
        }
        let address = self.sys.idtr.base.wrapping_add(offset);
        let gate = Descriptor(self.read_system(address)?);
        let upper: u64 = self.read_system(address.wrapping_add(8))?;
        self.check_gate(
            event,
            gate,
            code,
            &[system::INTERRUPT_GATE, system::TRAP_GATE],
        )?;
        let rip = u64::from(gate.gate_offset()) | upper << 32;
        let target = self.event_target(event, gate, rip)?;

        let ist = u64::from(gate.gate_ist());
        let pointer = if ist != 0 {
            self.read_tss(28 + ist * 8, 8, ext)?
        } else if target.level < self.cpl {
            self.read_tss(4 + u64::from(target.level) * 8, 8, ext)?
        } else {
            self.regs.gpr[gpr::RSP]
        };
        let mut stack = Stack::long(self, pointer & !15, target.level, ext);
        let frame = [
            u64::from(self.sys.segments[sreg::SS].selector),
            self.regs.gpr[gpr::RSP],
            event.flags,
            u64::from(self.sys.segments[sreg::CS].selector),
            self.return_address(),
            u64::from(event.error_code.unwrap_or(0)),
        ];
        let frame = &frame[..if event.error_code.is_some() { 6 } else { 5 }];
        self.check_room(&stack, 8, frame.len())?;
        if !is_canonical(rip) {
            return self.refuse_gate(Vector::GP, ext);
        }
        self.set_accessed(target.code.selector, target.descriptor)?;
        self.push_frame(&mut stack, 8, frame)?;

        self.regs.gpr[gpr::RSP] = stack.pointer;
        if target.level != self.cpl {
            self.take_stack(&stack, target.level);
        }
        self.enter_handler(&target);
        Ok(())
    }

    /// Protected and virtual-8086 mode (SDM vol. 3A, 7.12 and 21.3).
    fn deliver_protected(&mut self, event: &Event) -> Step {
        let ext = event.ext();
        let (offset, code) = event.gate(8);
        if offset + 7 > u64::from(self.sys.idtr.limit) {
            return self.refuse_gate(Vector::GP, code);
        }
        let gate = Descriptor(self.read_system(self.system_address(self.sys.idtr.base, offset))?);
        let kinds = [
            system::TASK_GATE,
            system::INTERRUPT_GATE16,
            system::TRAP_GATE16,
            system::INTERRUPT_GATE,
            system::TRAP_GATE,
        ];
        self.check_gate(event, gate, code, &kinds)?;
        if gate.kind() == system::TASK_GATE {
            return self.deliver_to_task(event, gate.gate_selector());
        }
        let wide = gate.kind() >= system::INTERRUPT_GATE;
        let size = if wide { 4 } else { 2 };
        let rip = u64::from(gate.gate_offset()) & (u64::MAX >> (64 - size * 8));
        let target = self.event_target(event, gate, rip)?;

        let vm86 = self.is_vm86();
        let inner = target.level < self.cpl;
        let mut stack = if inner {
            self.tss_stack(target.level, ext)?
        } else {
            Stack::current(self, ext)
        };
        let selector = |index: usize| u64::from(self.sys.segments[index].selector);
        let frame = [
            selector(sreg::GS),
            selector(sreg::FS),
            selector(sreg::DS),
            selector(sreg::ES),
            selector(sreg::SS),
            self.regs.gpr[gpr::RSP],
            event.flags,
            selector(sreg::CS),
            self.return_address(),
            u64::from(event.error_code.unwrap_or(0)),
        ];
        let start = match (vm86, inner) {
            (true, _) => 0,
            (false, true) => 4,
            (false, false) => 6,
        };
        let end = if event.error_code.is_some() { 10 } else { 9 };
        let frame = &frame[start..end];
        self.check_room(&stack, size, frame.len())?;
        if rip > u64::from(target.code.limit) {
            return self.refuse_gate(Vector::GP, ext);
        }
        self.set_accessed(target.code.selector, target.descriptor)?;
        self.push_frame(&mut stack, size, frame)?;

        if inner {
            self.take_stack(&stack, target.level);
        }
        if vm86 {
            for index in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
                self.sys.segments[index] = Segment::null(0);
            }
        }
        self.enter_handler(&target);
        // With the mode up to date: the new stack's size decides how much of RSP is written.
        self.set_stack_pointer(stack.pointer);
        Ok(())
    }

    /// Real mode (SDM vol. 3A, 21.1.4): the table has far pointers; no error codes.
    fn deliver_real(&mut self, event: &Event) -> Step {
        let (offset, _) = event.gate(4);
        if offset + 3 > u64::from(self.sys.idtr.limit) {
            return self.gp0();
        }
        let pointer: u32 = self.read_system(self.system_address(self.sys.idtr.base, offset))?;
        self.jump_through_table(event.flags, pointer)?;
        self.system_flags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        self.finish_event();
        Ok(())
    }

    /// Pushes FLAGS, CS and IP and goes to a far pointer of an 8086's interrupt table.
    fn jump_through_table(&mut self, flags: u64, pointer: u32) -> Step {
        let mut stack = Stack::current(self, 0);
        let selector = u64::from(self.sys.segments[sreg::CS].selector);
        self.push_frame(&mut stack, 2, &[flags, selector, self.rip])?;
        self.set_stack_pointer(stack.pointer);
        self.sys.segments[sreg::CS] = self.real_segment(sreg::CS, (pointer >> 16) as u16);
        self.rip = u64::from(pointer as u16);
        Ok(())
    }

    /// Checks a gate's type, privilege level and presence.
    #[inline]
    fn check_gate(&mut self, event: &Event, gate: Descriptor, code: u32, kinds: &[u32]) -> Step {
        if gate.has(access::S) || !kinds.contains(&gate.kind()) {
            return self.refuse_gate(Vector::GP, code);
        }
        if event.kind == EventKind::Software && gate.dpl() < self.cpl {
            return self.refuse_gate(Vector::GP, code);
        }
        if !gate.has(access::P) {
            return self.refuse_gate(Vector::NP, code);
        }
        Ok(())
    }

    /// Checks the code segment that an interrupt or trap gate names.
    #[inline]
    fn event_target(&mut self, event: &Event, gate: Descriptor, rip: u64) -> Result<Target, Stop> {
        let ext = event.ext();
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(self.raise(Exception::gp(ext)));
        }
        let descriptor = self.descriptor_or(selector, Vector::GP, ext)?;
        let mut refused = !is_code(descriptor) || descriptor.dpl() > self.cpl;
        // Handlers of long mode are 64-bit code; those of virtual-8086 mode run at level 0.
        refused |= self.is_long() && (!descriptor.has(access::L) || descriptor.has(access::DB));
        refused |= self.is_vm86() && (is_conforming(descriptor) || descriptor.dpl() != 0);
        if refused {
            return self.refuse(Vector::GP, selector, ext);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::NP, selector, ext);
        }
        let level = if is_conforming(descriptor) {
            self.cpl
        } else {
            descriptor.dpl()
        };
        Ok(Target {
            code: loaded(descriptor, selector & !3 | u16::from(level)),
            descriptor,
            level,
            rip,
            masks: matches!(
                gate.kind(),
                system::INTERRUPT_GATE | system::INTERRUPT_GATE16
            ),
        })
    }

    /// RIP as a frame shows it.
    fn return_address(&self) -> u64 {
        self.mask_rip(self.rip)
    }

    /// Makes a handler's first instruction the next one; SS is loaded.
    fn enter_handler(&mut self, target: &Target) {
        self.sys.segments[sreg::CS] = target.code;
        self.rip = target.rip;
        self.system_flags &= !(rflags::TF | rflags::NT | rflags::VM | rflags::RF);
        if target.masks {
            self.system_flags &= !rflags::IF;
        }
        self.finish_event();
    }

    fn finish_event(&mut self) {
        self.sys.shadow = InterruptShadow::None;
        self.end_block = true;
        self.update_mode();
    }

    /// A task gate in the IDT.
    fn deliver_to_task(&mut self, event: &Event, selector: u16) -> Step {
        let descriptor = self.available_task(selector, event.ext())?;
        let reason = Reason::Event {
            error_code: event.error_code,
            ext: event.ext(),
        };
        self.switch_task(selector, descriptor, reason, event.flags)?;
        self.sys.shadow = InterruptShadow::None;
        self.update_attention();
        Ok(())
    }

    /// INT n in virtual-8086 mode (SDM vol. 3A, 21.3 and table 21-2): with CR4.VME a bit map in the
    /// TSS says which vectors go to the 8086 program's own handlers.
    fn interrupt_from_vm86(&mut self, vector: u8) -> Step {
        let full_privilege = self.iopl() == 3;
        if self.sys.cr4 & cr4::VME != 0 && self.is_redirected(vector)? {
            let pointer: u32 = self.read_system(u64::from(vector) * 4)?;
            let mut flags = self.rflags() & !rflags::RF;
            if !full_privilege {
                flags |= rflags::IOPL | rflags::IF;
                if self.system_flags & rflags::VIF == 0 {
                    flags &= !rflags::IF;
                }
            }
            self.jump_through_table(flags, pointer)?;
            let masked = if full_privilege {
                rflags::IF
            } else {
                rflags::VIF
            };
            self.system_flags &= !(masked | rflags::TF | rflags::RF);
            self.finish_event();
            return Ok(());
        }
        if !full_privilege {
            return self.gp0();
        }
        self.deliver_interrupt(vector, EventKind::Software)
    }

    /// Whether the redirection bit map sends a vector to the 8086 program: its bit is clear. The
    /// map is the 32 bytes below the I/O permission bit map.
    fn is_redirected(&mut self, vector: u8) -> Result<bool, Stop> {
        let tr = self.sys.tr;
        if !tr.has(system::TSS) || tr.limit < 103 {
            return self.gp0();
        }
        let io_map: u16 = self.read_system(self.system_address(tr.base, 102))?;
        let Some(offset) = (u64::from(io_map) + u64::from(vector / 8)).checked_sub(32) else {
            return self.gp0();
        };
        if offset > u64::from(tr.limit) {
            return self.gp0();
        }
        let byte: u8 = self.read_system(self.system_address(tr.base, offset))?;
        Ok(byte & 1 << (vector % 8) == 0)
    }
}

/// Whether an exception's frame has RF set (SDM vol. 3B, 18.3.1.1): faults, so that the
/// instruction breakpoint on the faulting instruction does not hit again. #DB is left out: those
/// that are faults are instruction breakpoints.
fn pushes_resume_flag(vector: Vector) -> bool {
    !matches!(
        vector,
        Vector::DB | Vector::BP | Vector::OF | Vector::NMI | Vector::MC
    )
}

fn op_int(cpu: &mut Cpu, op: &Op) -> Step {
    let vector = op.immediate as u8;
    if cpu.is_vm86() {
        cpu.interrupt_from_vm86(vector)
    } else {
        cpu.deliver_interrupt(vector, EventKind::Software)
    }
}

fn op_int1(cpu: &mut Cpu, _: &Op) -> Step {
    cpu.deliver_interrupt(Vector::DB.0, EventKind::PrivilegedSoftware)?;
    // Data breakpoints that a MOV SS before put off are told by this #DB. With one of their own, on
    // the same interrupt stack, the frame would be lost.
    cpu.sys.dr6 |= cpu.take_breakpoints();
    Ok(())
}

fn op_int3(cpu: &mut Cpu, _: &Op) -> Step {
    cpu.deliver_interrupt(Vector::BP.0, EventKind::Software)
}

fn op_into(cpu: &mut Cpu, _: &Op) -> Step {
    if cpu.flags.overflow() {
        cpu.deliver_interrupt(Vector::OF.0, EventKind::Software)
    } else {
        Ok(())
    }
}

/// BOUND: signed lower and upper bound in memory, both inclusive.
fn op_bound(cpu: &mut Cpu, op: &Op) -> Step {
    let size = op.operand_size();
    let linear = cpu.operand_address(op, size * 2, false)?;
    let second = cpu.part_address(op, size);
    let index = if size == 2 {
        i32::from(cpu.reg::<u16>(op.dst) as i16)
    } else {
        cpu.reg::<u32>(op.dst) as i32
    };
    let bound = |cpu: &mut Cpu, linear| -> Result<i32, Stop> {
        Ok(if size == 2 {
            i32::from(cpu.read::<u16>(linear, op.segment)? as i16)
        } else {
            cpu.read::<u32>(linear, op.segment)? as i32
        })
    };
    // The second bound is not read if the first is violated.
    if index < bound(cpu, linear)? || index > bound(cpu, second)? {
        return Err(cpu.raise(Exception::plain(Vector::BR)));
    }
    Ok(())
}

fn op_undefined(cpu: &mut Cpu, _: &Op) -> Step {
    cpu.ud()
}

/// The handler of an instruction that this module executes, or [`iret`].
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Int => op_int,
        Mnemonic::Int1 => op_int1,
        Mnemonic::Int3 => op_int3,
        Mnemonic::Into => op_into,
        Mnemonic::Bound => {
            let size = instruction.op0_register().size() as u64;
            sized(op, size, op_bound)
        }
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => op_undefined,
        _ => return iret::lower(instruction, op),
    })
}

#[cfg(test)]
mod tests;
