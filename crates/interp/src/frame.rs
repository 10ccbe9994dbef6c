//! Stack frames of events and far transfers: written whole or not at all, on the current stack or
//! on one that is about to become it.

use trapgate_x86::descriptor::access;
use trapgate_x86::paging::is_canonical;
use trapgate_x86::registers::{cr4, rflags, sreg};
use trapgate_x86::{Exception, Segment, Vector};

use crate::cpu::{Cpu, Step, Stop, within_limit};
use crate::segments::{is_null, selector_code};
use crate::tlb::{Access, View};

/// Bytes of the largest frame: a 32-bit call gate with 31 parameters.
const LARGEST: usize = (31 + 4) * 4;

/// A stack that frames are pushed on or popped from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack {
    segment: Segment,
    /// Offset of the top.
    pub(crate) pointer: u64,
    mask: u64,
    view: View,
    /// 64-bit addressing, without segment.
    flat: bool,
    /// An instruction's own accesses: alignment checks and data breakpoints count.
    explicit: bool,
    /// Error code of the #SS that a frame without room raises.
    code: u32,
}

impl Stack {
    /// The current stack; `ext` is the EXT bit of the error code.
    pub(crate) fn current(cpu: &Cpu, ext: u32) -> Self {
        Self {
            segment: cpu.sys.segments[sreg::SS],
            pointer: cpu.stack_pointer(),
            mask: cpu.stack_mask,
            view: cpu.plain_view,
            flat: cpu.is_64bit(),
            explicit: false,
            code: ext,
        }
    }

    /// The current stack as the operand of a far transfer.
    pub(crate) fn operand(cpu: &Cpu) -> Self {
        Self {
            explicit: cpu.view == View::Checked,
            ..Self::current(cpu, 0)
        }
    }

    /// The stack of an inner level outside long mode.
    pub(crate) fn inner(cpu: &Cpu, segment: Segment, pointer: u64, ext: u32) -> Self {
        let mask = if segment.has(access::DB) {
            0xffff_ffff
        } else {
            0xffff
        };
        Self {
            segment,
            pointer: pointer & mask,
            mask,
            view: cpu.view_at(segment.dpl()),
            flat: false,
            explicit: false,
            code: selector_code(segment.selector) | ext,
        }
    }

    /// A stack of 64-bit mode at a privilege level.
    pub(crate) fn long(cpu: &Cpu, pointer: u64, level: u8, ext: u32) -> Self {
        Self {
            segment: Segment::null(0),
            pointer,
            mask: u64::MAX,
            view: cpu.view_at(level),
            flat: true,
            explicit: false,
            code: ext,
        }
    }

    /// Whether `bytes` from `offset` on do not wrap around.
    fn is_contiguous(&self, offset: u64, bytes: u64) -> bool {
        self.flat || offset + (bytes - 1) <= self.mask
    }
}

impl Cpu {
    /// The view of explicit data accesses at a privilege level, other things being as they are.
    pub(crate) fn view_at(&self, level: u8) -> View {
        if level == 3 {
            View::User
        } else if self.sys.cr4 & cr4::SMAP == 0 || self.system_flags & rflags::AC != 0 {
            View::SupervisorUser
        } else {
            View::Supervisor
        }
    }

    /// Linear address of `bytes` at `offset` in a stack, or #SS.
    fn stack_address(&mut self, stack: &Stack, offset: u64, bytes: u64) -> Result<u64, Stop> {
        let (allowed, linear) = if stack.flat {
            let last = offset.wrapping_add(bytes - 1);
            (is_canonical(offset) && is_canonical(last), offset)
        } else {
            (
                // A register is never unusable in real mode once it was loaded there.
                (stack.segment.is_usable() || !self.is_protected())
                    && within_limit(&stack.segment, offset, bytes),
                stack.segment.base.wrapping_add(offset) & 0xffff_ffff,
            )
        };
        if !allowed {
            return Err(self.raise(Exception::ss(stack.code)));
        }
        Ok(linear)
    }

    /// #SS unless `count` values of `size` bytes can be pushed, as far as limits go.
    pub(crate) fn check_room(&mut self, stack: &Stack, size: u64, count: usize) -> Step {
        let total = size * count as u64;
        let low = stack.pointer.wrapping_sub(total) & stack.mask;
        if stack.is_contiguous(low, total) {
            self.stack_address(stack, low, total)?;
        } else {
            for index in 1..=count as u64 {
                let offset = stack.pointer.wrapping_sub(index * size) & stack.mask;
                self.stack_address(stack, offset, size)?;
            }
        }
        Ok(())
    }

    /// Alignment checks and data breakpoints for values of `size` bytes from an offset on.
    fn check_values(
        &mut self,
        stack: &Stack,
        offset: u64,
        size: u64,
        count: usize,
        access: Access,
    ) -> Step {
        if !stack.explicit {
            return Ok(());
        }
        for index in 0..count as u64 {
            let offset = offset.wrapping_add(index * size) & stack.mask;
            let linear = self.stack_address(stack, offset, size)?;
            self.check_alignment(linear, size)?;
            self.note_data_breakpoints(linear, size, access);
        }
        Ok(())
    }

    /// Pushes values of `size` bytes, the first first; all or, on a fault, none.
    pub(crate) fn push_frame(&mut self, stack: &mut Stack, size: u64, values: &[u64]) -> Step {
        let total = size * values.len() as u64;
        let low = stack.pointer.wrapping_sub(total) & stack.mask;
        self.check_values(stack, low, size, values.len(), Access::Write)?;
        if stack.is_contiguous(low, total) {
            let linear = self.stack_address(stack, low, total)?;
            if let (8, Some(host)) = (
                size,
                self.tlb.find(stack.view, Access::Write, linear, total),
            ) {
                for (index, &value) in values.iter().rev().enumerate() {
                    host.offset(index as u64 * 8).store_u64(value);
                }
            } else {
                // One push after the other, so that a page fault shows the address of the first
                // that has no page.
                for index in 1..=values.len() as u64 {
                    let push = self.advance(linear, total - index * size);
                    self.probe_as(push, size, Access::Write, stack.view)?;
                }
                let mut bytes = [0; LARGEST];
                let width = size as usize;
                for (place, &value) in bytes.chunks_exact_mut(width).zip(values.iter().rev()) {
                    place.copy_from_slice(&value.to_le_bytes()[..width]);
                }
                self.write_bytes_as(linear, &bytes[..total as usize], stack.view)?;
            }
        } else {
            self.push_wrapping(stack, size, values)?;
        }
        stack.pointer = low;
        Ok(())
    }

    /// A frame that goes around the end of a stack smaller than the address space.
    #[cold]
    fn push_wrapping(&mut self, stack: &Stack, size: u64, values: &[u64]) -> Step {
        for write in [false, true] {
            let mut pointer = stack.pointer;
            for value in values {
                pointer = pointer.wrapping_sub(size) & stack.mask;
                let linear = self.stack_address(stack, pointer, size)?;
                if write {
                    let bytes = value.to_le_bytes();
                    self.write_bytes_as(linear, &bytes[..size as usize], stack.view)?;
                } else {
                    self.probe_as(linear, size, Access::Write, stack.view)?;
                }
            }
        }
        Ok(())
    }

    /// Reads values of `size` bytes from `depth` bytes above the top of a stack upwards.
    pub(crate) fn peek_frame(
        &mut self,
        stack: &Stack,
        size: u64,
        depth: u64,
        values: &mut [u64],
    ) -> Step {
        self.peek_words(stack, size, depth, values, size)
    }

    /// As [`Self::peek_frame`], for a frame that ends with a selector: of its word two bytes are read.
    pub(crate) fn peek_return(
        &mut self,
        stack: &Stack,
        size: u64,
        depth: u64,
        values: &mut [u64],
    ) -> Step {
        self.peek_words(stack, size, depth, values, 2)
    }

    fn peek_words(
        &mut self,
        stack: &Stack,
        size: u64,
        depth: u64,
        values: &mut [u64],
        last: u64,
    ) -> Step {
        let total = size * (values.len() as u64 - 1) + last;
        let low = stack.pointer.wrapping_add(depth) & stack.mask;
        self.check_values(stack, low, size, values.len(), Access::Read)?;
        if stack.is_contiguous(low, total) {
            let linear = self.stack_address(stack, low, total)?;
            if let (8, Some(host)) = (
                size,
                self.tlb
                    .find(stack.view, Access::Read, linear, size * values.len() as u64),
            ) {
                for (index, value) in values.iter_mut().enumerate() {
                    *value = host.offset(index as u64 * 8).load_u64();
                }
                return Ok(());
            }
        }
        let count = values.len();
        for (index, value) in values.iter_mut().enumerate() {
            let offset = low.wrapping_add(index as u64 * size) & stack.mask;
            let linear = self.stack_address(stack, offset, size)?;
            let mut bytes = [0; 8];
            let read = if index + 1 == count { last } else { size };
            self.read_bytes_as(linear, &mut bytes[..read as usize], stack.view)?;
            *value = u64::from_le_bytes(bytes);
        }
        Ok(())
    }

    /// Whether `size` bytes, at most a page, could be accessed in a view: faults as it would.
    pub(crate) fn probe_as(&mut self, linear: u64, size: u64, access: Access, view: View) -> Step {
        self.piece(linear, access, view)?;
        let last = self.advance(linear, size - 1);
        if (linear ^ last) >> 12 != 0 {
            self.piece(last, access, view)?;
        }
        Ok(())
    }

    // Stacks named by the task-state segment.

    /// `bytes` (2, 4 or 8) at an offset in the current TSS, or #TS.
    pub(crate) fn read_tss(&mut self, offset: u64, bytes: u64, ext: u32) -> Result<u64, Stop> {
        let tr = self.sys.tr;
        if offset + (bytes - 1) > u64::from(tr.limit) {
            return self.refuse(Vector::TS, tr.selector, ext);
        }
        let linear = self.system_address(tr.base, offset);
        Ok(match bytes {
            2 => u64::from(self.read_system::<u16>(linear)?),
            4 => u64::from(self.read_system::<u32>(linear)?),
            _ => self.read_system::<u64>(linear)?,
        })
    }

    /// The stack that the TSS has for an inner level outside long mode (SDM vol. 2A, INT n,
    /// INTER-PRIVILEGE-LEVEL-INTERRUPT).
    pub(crate) fn tss_stack(&mut self, level: u8, ext: u32) -> Result<Stack, Stop> {
        let level_offset = u64::from(level);
        let tr = self.sys.tr;
        let (selector, pointer) = if tr.has(trapgate_x86::descriptor::system::TSS) {
            let at = level_offset * 8 + 4;
            // One check for both fields.
            if at + 5 > u64::from(tr.limit) {
                return self.refuse(Vector::TS, tr.selector, ext);
            }
            (self.read_tss(at + 4, 2, ext)?, self.read_tss(at, 4, ext)?)
        } else {
            let at = level_offset * 4 + 2;
            if at + 3 > u64::from(tr.limit) {
                return self.refuse(Vector::TS, tr.selector, ext);
            }
            (self.read_tss(at + 2, 2, ext)?, self.read_tss(at, 2, ext)?)
        };
        let segment = self.inner_stack_segment(selector as u16, level, ext)?;
        Ok(Stack::inner(self, segment, pointer, ext))
    }

    /// Checks a stack selector from the TSS.
    fn inner_stack_segment(&mut self, selector: u16, level: u8, ext: u32) -> Result<Segment, Stop> {
        if is_null(selector) {
            return Err(self.raise(Exception::with_code(Vector::TS, ext)));
        }
        let descriptor = self.descriptor_or(selector, Vector::TS, ext)?;
        let right_level = selector & 3 == u16::from(level) && descriptor.dpl() == level;
        if !right_level || !crate::segments::is_writable_data(descriptor) {
            return self.refuse(Vector::TS, selector, ext);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::SS, selector, ext);
        }
        self.set_accessed(selector, descriptor)?;
        Ok(crate::segments::loaded(descriptor, selector))
    }

    /// Makes a stack the current one; the caller updates the mode.
    pub(crate) fn take_stack(&mut self, stack: &Stack, level: u8) {
        self.sys.segments[sreg::SS] = if stack.flat {
            null_stack_segment(level)
        } else {
            stack.segment
        };
    }
}

/// SS as 64-bit mode has it after a change of level: null, but its DPL is the CPL.
pub(crate) fn null_stack_segment(level: u8) -> Segment {
    Segment {
        access: access::UNUSABLE | u32::from(level) << access::DPL_SHIFT,
        ..Segment::null(u16::from(level))
    }
}
