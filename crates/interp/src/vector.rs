//! Instructions that run on the host CPU: vector, x87, and whatever integer instruction is too rare
//! to be written out (see `trapgate_thunk`).
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use iced_x86::{Instruction, Mnemonic};
use trapgate_thunk::{
    Access as ThunkAccess, Class, MemoryOperand, Outcome, Thunk, ThunkCache, ThunkError,
    X87Pointers, x87_opcode,
};
use trapgate_x86::registers::{cr0, cr4, xcr0};
use trapgate_x86::{Exception, Vector};

use crate::cpu::{Cpu, Step, Stop};
use crate::op::Op;
use crate::parts::{Extent, Parts};
use crate::tlb::Access;

/// A thunk with what its op needs to know.
#[derive(Debug)]
struct Entry {
    thunk: Thunk,
    flags: bool,
}

/// Thunks before all are forgotten: some 300 bytes each, in three tables. Ordinary guests need a few thousand; one with
/// all registers and immediates of a few vector instructions can have millions.
const MAX_THUNKS: usize = 1 << 14;

/// Thunks by the number that an op carries.
#[derive(Debug, Default)]
pub(crate) struct ThunkTable {
    cache: ThunkCache,
    entries: Vec<Entry>,
    numbers: HashMap<(usize, bool), u16>,
}

impl ThunkTable {
    /// The number of an instruction's thunk. `None` when the table is full: all decoded code must
    /// be thrown away first.
    pub(crate) fn number(&mut self, instruction: &Instruction) -> Result<Option<u16>, ThunkError> {
        let thunk = self.cache.thunk(instruction)?;
        let flags = instruction.rflags_read() | instruction.rflags_modified() != 0;
        let key = (thunk.entry() as usize, flags);
        if let Some(&number) = self.numbers.get(&key) {
            return Ok(Some(number));
        }
        if self.entries.len() >= MAX_THUNKS {
            return Ok(None);
        }
        let number = self.entries.len() as u16;
        self.entries.push(Entry { thunk, flags });
        self.numbers.insert(key, number);
        Ok(Some(number))
    }

    /// Forgets all thunks: no op refers to them any more.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// A memory operand larger than any instruction's, aligned as the strictest needs it.
#[repr(C, align(64))]
struct Bounce([u8; 128]);

/// Held while an access that should be atomic is done in several steps, because it crosses a cache
/// line or goes to a device.
static BUS_LOCK: Mutex<()> = Mutex::new(());

/// Runs an op's thunk.
pub(crate) fn op_thunk(cpu: &mut Cpu, op: &Op) -> Step {
    let number = usize::from(op.extra);
    let Some(entry) = cpu.thunks.entries.get(number) else {
        return cpu.ud();
    };
    let (flags, memory) = (entry.flags, entry.thunk.memory);
    if entry.thunk.class != Class::Integer {
        cpu.check_class(number)?;
    }
    if flags {
        cpu.regs.flags = cpu.flags.get();
    }
    let outcome = match memory {
        // SAFETY: the thunk has no memory operand.
        None => unsafe {
            cpu.thunks.entries[number]
                .thunk
                .run(&mut cpu.regs, std::ptr::null_mut())
        },
        Some(operand) => cpu.run_with_memory(op, number, operand)?,
    };
    match outcome {
        Outcome::Done => {}
        Outcome::SimdException if cpu.sys.cr4 & cr4::OSXMMEXCPT != 0 => {
            return Err(cpu.raise(Exception::plain(Vector::XM)));
        }
        Outcome::SimdException => return cpu.ud(),
        Outcome::X87Pending => return Err(cpu.x87_error()),
    }
    if flags {
        cpu.flags.put(cpu.regs.flags);
    }
    Ok(())
}

impl Cpu {
    /// The checks before an instruction that is not a plain integer one (SDM vol. 3A, table 2-2;
    /// vol. 1, 13.2).
    #[inline]
    fn check_class(&mut self, number: usize) -> Step {
        let thunk = &self.thunks.entries[number].thunk;
        let (class, waiting, uses_vector) = (thunk.class, thunk.waiting, thunk.uses_vector);
        let task_switched = self.sys.cr0 & cr0::TS != 0;
        match class {
            Class::Integer => {}
            Class::Sse => self.check_sse()?,
            Class::X87 => {
                if self.sys.cr0 & (cr0::EM | cr0::TS) != 0 {
                    return Err(self.raise(Exception::NM));
                }
            }
            Class::Mmx => {
                if self.sys.cr0 & cr0::EM != 0 {
                    return self.ud();
                }
                if uses_vector {
                    self.check_sse()?;
                }
                if task_switched {
                    return Err(self.raise(Exception::NM));
                }
            }
            Class::Avx => self.check_avx()?,
            Class::VexInteger => {
                if !self.is_protected() || self.is_vm86() {
                    return self.ud();
                }
            }
        }
        if waiting && self.regs.x87.exception_pending() {
            return Err(self.x87_error());
        }
        Ok(())
    }

    /// #UD or #NM for a legacy SSE instruction.
    #[inline(always)]
    pub(crate) fn check_sse(&mut self) -> Step {
        if self.sys.cr0 & cr0::EM != 0 || self.sys.cr4 & cr4::OSFXSR == 0 {
            return self.ud();
        }
        if self.sys.cr0 & cr0::TS != 0 {
            return Err(self.raise(Exception::NM));
        }
        Ok(())
    }

    /// #UD or #NM for an instruction of AVX.
    pub(crate) fn check_avx(&mut self) -> Step {
        let enabled = xcr0::SSE | xcr0::AVX;
        if !self.is_protected()
            || self.is_vm86()
            || self.sys.cr4 & cr4::OSXSAVE == 0
            || self.sys.xcr0 & enabled != enabled
        {
            return self.ud();
        }
        if self.sys.cr0 & cr0::TS != 0 {
            return Err(self.raise(Exception::NM));
        }
        Ok(())
    }

    /// An unmasked x87 exception met by a waiting instruction: #MF. Without CR0.NE it would be
    /// IRQ 13 by way of the FERR# pin, which no machine of ours wires.
    #[cold]
    pub(crate) fn x87_error(&mut self) -> Stop {
        self.raise(Exception::plain(Vector::MF))
    }

    fn run_with_memory(
        &mut self,
        op: &Op,
        number: usize,
        operand: MemoryOperand,
    ) -> Result<Outcome, Stop> {
        if operand.mask.is_some() && self.selected_elements(operand).count == 0 {
            // No access at all, so none that its segment could refuse.
            return Ok(self.run_on(number, &mut Bounce([0; 128])));
        }
        let size = operand.size as u64;
        let write = operand.access != ThunkAccess::Read;
        let address = if operand.bit_offset {
            self.bit_operand_address(op, size, write)
        } else {
            self.operand_address(op, size, write)
        };
        let class = self.thunks.entries[number].thunk.class;
        let parts = Parts::of_thunk(class, operand.size);
        let access = if write { Access::Write } else { Access::Read };
        let extent =
            address.and_then(|linear| self.extent(op, linear, operand.size, parts, access));
        let extent = match extent {
            Ok(extent) => extent,
            Err(stop) if self.raises_before_storing(number, operand) => {
                let outcome = self.run_before_store(op, number, operand, Err(stop))?;
                if outcome == Outcome::Done {
                    self.record_x87(op, number);
                }
                return Ok(outcome);
            }
            Err(stop) => return Err(stop),
        };
        let linear = extent.linear;
        if !linear.is_multiple_of(operand.alignment as u64) {
            return self.gp0();
        }
        let direct = if !extent.is_contiguous(operand.size) {
            None
        } else if write {
            self.tlb.write(linear, size)
        } else {
            self.tlb.read(linear, size)
        };
        // A host atomic across cache lines is a split lock, for which hosts throttle a process.
        let split = operand.locked && linear % 64 + size > 64;
        let outcome = match direct {
            Some(host) if !split && operand.mask.is_none() => {
                // SAFETY: the TLB vouches for `size` bytes of guest RAM at that address.
                unsafe {
                    self.thunks.entries[number]
                        .thunk
                        .run(&mut self.regs, host.as_ptr())
                }
            }
            _ => self.run_bounced(op, number, operand, extent)?,
        };
        if outcome == Outcome::Done {
            self.record_x87(op, number);
        }
        Ok(outcome)
    }

    /// Whether an instruction is a store with exceptions of its own.
    fn raises_before_storing(&self, number: usize, operand: MemoryOperand) -> bool {
        let thunk = &self.thunks.entries[number].thunk;
        let can_raise = thunk.class == Class::X87 || thunk.simd_float;
        operand.access == ThunkAccess::Write && can_raise
    }

    /// As [`Self::run_with_memory`], by way of a buffer: for devices, traced pages, page crossings,
    /// split locks, masked elements.
    #[cold]
    fn run_bounced(
        &mut self,
        op: &Op,
        number: usize,
        operand: MemoryOperand,
        extent: Extent,
    ) -> Result<Outcome, Stop> {
        if self.raises_before_storing(number, operand) {
            return self.run_before_store(op, number, operand, Ok(extent));
        }
        let mut bounce = Bounce([0; 128]);
        let selected = self.selected_elements(operand);
        let lock = operand
            .locked
            .then(|| BUS_LOCK.lock().unwrap_or_else(PoisonError::into_inner));
        for (start, length) in selected.iter() {
            self.each_run(&extent, start..start + length, |cpu, at, run| {
                cpu.check_operand(op, operand, at, &run)?;
                // Stores must not read: there may be a device.
                if operand.access != ThunkAccess::Write {
                    cpu.read_elements(at, &mut bounce.0[run], op.segment)?;
                }
                Ok(())
            })?;
        }
        let outcome = self.run_on(number, &mut bounce);
        if operand.access != ThunkAccess::Read && outcome == Outcome::Done {
            for (start, length) in selected.iter() {
                self.each_run(&extent, start..start + length, |cpu, at, run| {
                    cpu.write_elements(at, &bounce.0[run], op.segment)
                })?;
            }
        }
        drop(lock);
        Ok(outcome)
    }

    /// A store whose own exceptions come before those of memory: one that is unmasked leaves memory alone, so that
    /// it cannot fault either. `extent` may be a fault already.
    fn run_before_store(
        &mut self,
        op: &Op,
        number: usize,
        operand: MemoryOperand,
        extent: Result<Extent, Stop>,
    ) -> Result<Outcome, Stop> {
        let before = self.regs.clone();
        let mut bounce = Bounce([0; 128]);
        let outcome = self.run_on(number, &mut bounce);
        if outcome != Outcome::Done {
            return Ok(outcome);
        }
        let size = operand.size;
        if !before.x87.masks_all() && bounce.0[..size].iter().all(|&byte| byte == 0) {
            // Zeros were stored, or nothing.
            let after = std::mem::replace(&mut self.regs, before.clone());
            let mut other = Bounce([0xff; 128]);
            let _ = self.run_on(number, &mut other);
            self.regs = after;
            if other.0[..size].iter().all(|&byte| byte == 0xff) {
                return Ok(outcome);
            }
        }
        let stored = extent.and_then(|extent| {
            self.each_run(&extent, 0..size, |cpu, at, run| {
                cpu.check_operand(op, operand, at, &run)
            })?;
            self.each_run(&extent, 0..size, |cpu, at, run| {
                cpu.write_elements(at, &bounce.0[run], op.segment)
            })
        });
        if let Err(stop) = stored {
            self.regs = before;
            return Err(stop);
        }
        Ok(outcome)
    }

    fn run_on(&mut self, number: usize, bounce: &mut Bounce) -> Outcome {
        // SAFETY: the buffer is ours, larger than any operand, and aligned for all.
        unsafe {
            self.thunks.entries[number]
                .thunk
                .run(&mut self.regs, bounce.0.as_mut_ptr())
        }
    }

    /// Faults as an access to part of a memory operand would.
    fn check_operand(
        &mut self,
        op: &Op,
        operand: MemoryOperand,
        at: u64,
        bytes: &Range<usize>,
    ) -> Step {
        let length = bytes.len() as u64;
        let alignment = if bytes.start == 0 || operand.mask.is_some() {
            operand.checked_alignment as u64
        } else {
            // It is the operand that is to be aligned.
            1
        };
        if operand.access == ThunkAccess::Read {
            return self.check_access(at, op.segment, length, alignment, Access::Read);
        }
        self.check_access(at, op.segment, length, alignment, Access::Write)?;
        self.probe_elements(at, length, Access::Write, op.segment)
    }

    /// The parts of a memory operand that are really accessed: all of it, or the elements that the
    /// mask selects.
    fn selected_elements(&self, operand: MemoryOperand) -> Elements {
        let mut elements = Elements::default();
        match operand.mask {
            None => elements.push(0, operand.size),
            Some(mask) => {
                let width = usize::from(mask.element_size);
                let register = &self.regs.vector[usize::from(mask.register) & 15].0;
                for start in (0..operand.size).step_by(width) {
                    if register[start + width - 1] & 0x80 != 0 {
                        elements.push(start, width);
                    }
                }
            }
        }
        elements
    }

    /// BT and its kin with a register offset: the offset's upper bits move the address.
    fn bit_operand_address(&mut self, op: &Op, size: u64, write: bool) -> Result<u64, Stop> {
        let register = self.regs.gpr[usize::from(op.src) & 15];
        let offset = match size {
            2 => i64::from(register as i16),
            4 => i64::from(register as i32),
            _ => register as i64,
        };
        let moved = (offset >> (size * 8).trailing_zeros()).wrapping_mul(size as i64);
        let mut offset = self.offset(op).wrapping_add(moved as u64);
        if op.form == crate::op::AddressForm::General {
            offset &= Self::address_mask(op);
            return self.segment_address(usize::from(op.segment), offset, size, write);
        }
        Ok(offset)
    }

    /// Records the last x87 instruction's address; and if it raised an unmasked exception its opcode and
    /// operand, which are not kept otherwise (SDM vol. 1, 8.1.8 and 8.1.9.1, and CPUID's bit of FDP). The op's
    /// immediate is the opcode with bit 15 set, or zero if it is no such instruction.
    fn record_x87(&mut self, op: &Op, number: usize) {
        if op.immediate == 0 {
            return;
        }
        let start = self.rip.wrapping_sub(u64::from(op.length));
        if !self.regs.x87.exception_pending() {
            self.regs.x87.set_instruction_pointer(start);
            return;
        }
        let data = match self.thunks.entries[number].thunk.x87_pointers {
            X87Pointers::InstructionAndData => Some(self.offset(op)),
            _ => None,
        };
        self.regs
            .x87
            .set_pointers(start, op.immediate as u16 & 0x7ff, data);
    }
}

/// Runs of bytes: at most eight elements.
#[derive(Default)]
struct Elements {
    runs: [(usize, usize); 8],
    count: usize,
}

impl Elements {
    fn push(&mut self, start: usize, length: usize) {
        self.runs[self.count] = (start, length);
        self.count += 1;
    }

    fn iter(&self) -> impl Iterator<Item = (usize, usize)> {
        self.runs.into_iter().take(self.count)
    }
}

/// An x87 op without memory operand: the thunk, then the pointers.
pub(crate) fn op_x87_registers(cpu: &mut Cpu, op: &Op) -> Step {
    op_thunk(cpu, op)?;
    cpu.record_x87(op, usize::from(op.extra));
    Ok(())
}

/// FWAIT: meets a pending exception; #NM only if CR0.MP and CR0.TS are both set.
fn op_wait(cpu: &mut Cpu, _: &Op) -> Step {
    let both = cr0::MP | cr0::TS;
    if cpu.sys.cr0 & both == both {
        return Err(cpu.raise(Exception::NM));
    }
    if cpu.regs.x87.exception_pending() {
        return Err(cpu.x87_error());
    }
    Ok(())
}

/// Fills an op in as one that runs a thunk. `bytes` is the instruction's encoding.
pub(crate) fn lower(
    cpu: &mut Cpu,
    instruction: &Instruction,
    bytes: &[u8],
    op: &mut Op,
) -> Result<Lowered, ThunkError> {
    if instruction.mnemonic() == Mnemonic::Wait {
        op.handler = op_wait;
        return Ok(Lowered::Done);
    }
    let number = match cpu.thunks.number(instruction) {
        Ok(Some(number)) => number,
        Ok(None) | Err(ThunkError::Full { .. }) => return Ok(Lowered::TableFull),
        Err(error) => return Err(error),
    };
    op.extra = number;
    op.immediate = 0;
    op.handler = op_thunk;
    let thunk = &cpu.thunks.entries[usize::from(number)].thunk;
    if thunk.x87_pointers != X87Pointers::Unchanged {
        op.immediate = u64::from(x87_opcode(bytes).unwrap_or(0)) | 1 << 15;
        if thunk.memory.is_none() {
            op.handler = op_x87_registers;
        }
    }
    Ok(Lowered::Done)
}

/// Whether an op could be filled in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lowered {
    /// Yes.
    Done,
    /// Not before the thunk table was cleared.
    TableFull,
}

#[cfg(test)]
mod tests {
    use trapgate_x86::registers::{cr4, gpr, xcr0};

    use super::*;
    use crate::testing::{UNMAPPED, execute, fault, long_cpu, unmap_page};

    const INFINITY: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x7f];

    /// FISTP of what is no integer raises the invalid-operation exception: unmasked it stores nothing, so there is
    /// nothing that could fault.
    #[test]
    fn x87_store_with_an_unmasked_exception_does_not_fault() {
        for (control, pending) in [(0x37f, false), (0x37e, true)] {
            let (mut cpu, _) = long_cpu();
            unmap_page(&mut cpu);
            cpu.regs.x87.set_control_word(control);
            cpu.regs.x87.set_stack_register(0, INFINITY);
            cpu.regs.x87.0[4] = 1;
            cpu.regs.gpr[gpr::RAX] = UNMAPPED;
            // fistp dword [rax]
            let code = [0xdb, 0x18];
            if pending {
                execute(&mut cpu, &code).unwrap();
                assert!(cpu.regs.x87.exception_pending());
                assert_eq!(cpu.regs.x87.tags(), 1, "it is not popped");
            } else {
                assert_eq!(fault(&mut cpu, &code), (Vector::PF, Some(2)));
                assert_eq!(cpu.regs.x87.status_word() & 0x3f, 0);
            }
        }
    }

    #[test]
    fn conversion_to_half_precision_raises_its_exception_before_that_of_its_store() {
        let (mut cpu, _) = long_cpu();
        unmap_page(&mut cpu);
        cpu.sys.cr4 |= cr4::OSXSAVE;
        cpu.sys.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
        cpu.regs.gpr[gpr::RAX] = UNMAPPED;
        cpu.regs.set_xmm(1, u128::from(1e20_f32.to_bits()));
        // vcvtps2ph [rax], xmm1, 0
        let code = [0xc4, 0xe3, 0x79, 0x1d, 0x08, 0];
        assert_eq!(fault(&mut cpu, &code), (Vector::PF, Some(2)));
        // Overflow unmasked.
        cpu.regs.mxcsr = 0x1b80;
        assert_eq!(fault(&mut cpu, &code), (Vector::XM, None));
    }

    #[test]
    fn masked_move_of_nothing_looks_at_no_address() {
        let (mut cpu, _) = long_cpu();
        cpu.sys.cr4 |= cr4::OSXSAVE;
        cpu.sys.xcr0 = xcr0::X87 | xcr0::SSE | xcr0::AVX;
        cpu.regs.gpr[gpr::RAX] = 1 << 60;
        // vmaskmovps [rax], xmm1, xmm2
        execute(&mut cpu, &[0xc4, 0xe2, 0x71, 0x2e, 0x10]).unwrap();
    }

    /// `fadd dword [rbx]`, and its opcode.
    const FADD: (&[u8], u16) = (&[0xd8, 0x03], 0x003);
    const AT: u64 = 0x8000;

    #[test]
    fn operand_and_opcode_of_an_x87_instruction_are_kept_only_with_an_unmasked_exception() {
        let (mut cpu, _) = long_cpu();
        cpu.rip = 0x1234;
        cpu.regs.gpr[gpr::RBX] = AT;
        // A signalling NaN is an invalid operand.
        let signalling = 0x7f80_0001u32.to_le_bytes();
        cpu.memory.write(AT, &signalling).unwrap();
        execute(&mut cpu, &[0xd9, 0xe8]).unwrap(); // fld1
        for (control, opcode, data) in [(0x37f, 0, 0), (0x37e, FADD.1, AT)] {
            cpu.regs.x87.set_control_word(control);
            cpu.regs.x87.set_status_word(7 << 11);
            let start = cpu.rip;
            execute(&mut cpu, FADD.0).unwrap();
            let image = &cpu.regs.x87;
            assert_eq!(image.instruction_pointer(), start, "{control:#x}");
            assert_eq!((image.opcode(), image.data_pointer()), (opcode, data));
        }
    }
}
