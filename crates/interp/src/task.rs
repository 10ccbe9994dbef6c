//! Hardware task switches (SDM vol. 3A, chapter 9).

use trapgate_x86::descriptor::{access, system};
use trapgate_x86::registers::{cr0, cr4, dr, rflags, sreg};
use trapgate_x86::{Descriptor, Exception, Segment, Vector};

use crate::cpu::{Cpu, Step, Stop};
use crate::frame::Stack;
use crate::segments::{
    LOCAL, is_code, is_conforming, is_null, is_readable, is_writable_data, loaded, rpl,
    vm86_segment,
};
use crate::tlb::{Access, View};

/// Why tasks are switched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// JMP.
    Jump,
    /// CALL: the old task stays busy and is linked to.
    Call,
    /// An event through a task gate: as CALL; its error code goes to the new task's stack.
    Event {
        /// What to push.
        error_code: Option<u32>,
        /// EXT bit of error codes.
        ext: u32,
    },
    /// IRET with NT.
    Return,
}

impl Reason {
    /// Whether the old task waits for the new one's return.
    fn nests(self) -> bool {
        matches!(self, Self::Call | Self::Event { .. })
    }
}

/// Bytes of the fixed parts of the two kinds of task-state segments.
const TSS32_BYTES: usize = 104;
const TSS16_BYTES: usize = 44;

/// Where a task-state segment has what (SDM vol. 3A, figures 9-2 and 9-10).
struct Layout {
    /// Bytes of a register's place.
    width: usize,
    bytes: usize,
    /// Start of what a switch saves: instruction pointer, flags, general registers, then
    /// selectors in the order of their numbers.
    saved: usize,
    selectors: usize,
    ldt: usize,
}

const TSS32: Layout = Layout {
    width: 4,
    bytes: TSS32_BYTES,
    saved: 0x20,
    selectors: 6,
    ldt: 0x60,
};
const TSS16: Layout = Layout {
    width: 2,
    bytes: TSS16_BYTES,
    saved: 0x0e,
    selectors: 4,
    ldt: 0x2a,
};

/// General registers in a task-state segment.
const REGISTERS: usize = 8;
/// Values in the part that a switch saves: instruction pointer, flags, registers, selectors.
const SAVED: usize = 2 + REGISTERS + 6;
/// Position of CR3 in a 32-bit TSS.
const CR3: usize = 0x1c;
/// Position of the debug trap flag in a 32-bit TSS.
const TRAP: usize = 0x64;

impl Layout {
    /// The layout of a TSS with this access or type.
    fn of(access: u32) -> &'static Self {
        if access & system::TSS == system::TSS {
            &TSS32
        } else {
            &TSS16
        }
    }

    /// Number of values that a switch saves.
    fn count(&self) -> usize {
        2 + REGISTERS + self.selectors
    }

    fn saved_bytes(&self) -> usize {
        self.count() * self.width
    }
}

/// A task-state segment as it was read.
struct Image {
    layout: &'static Layout,
    bytes: [u8; TSS32_BYTES],
}

impl Image {
    fn value(&self, at: usize) -> u64 {
        let mut value = [0; 8];
        let width = self.layout.width;
        value[..width].copy_from_slice(&self.bytes[at..at + width]);
        u64::from_le_bytes(value)
    }

    /// The values of the saved part, in order.
    fn saved(&self, index: usize) -> u64 {
        self.value(self.layout.saved + index * self.layout.width)
    }

    fn selector(&self, index: usize) -> u16 {
        // A 16-bit TSS has no FS and GS.
        if index < self.layout.selectors {
            self.saved(2 + REGISTERS + index) as u16
        } else {
            0
        }
    }

    fn ldt(&self) -> u16 {
        self.value(self.layout.ldt) as u16
    }

    fn is_wide(&self) -> bool {
        self.layout.width == 4
    }
}

impl Cpu {
    /// Switches to a task whose descriptor's type, level and presence are as the reason needs
    /// them. RIP and `flags` are what the old task goes on with.
    ///
    /// `Err` means that nothing has happened. What goes wrong in loading the new task's segments
    /// is an exception of the new task, as on the machine: it is left in [`Self::pending`].
    pub(crate) fn switch_task(
        &mut self,
        selector: u16,
        descriptor: Descriptor,
        reason: Reason,
        flags: u64,
    ) -> Step {
        let ext = match reason {
            Reason::Event { ext, .. } => ext,
            _ => 0,
        };
        let layout = Layout::of(descriptor.access());
        let base = u64::from(descriptor.base());
        if (descriptor.limit() as usize) < layout.bytes - 1 {
            return self.refuse(Vector::TS, selector, ext);
        }
        let old = self.sys.tr;
        let old_layout = Layout::of(old.access);
        let save_end = old_layout.saved + old_layout.saved_bytes();
        if (old.limit as usize) < save_end - 1 {
            return self.refuse(Vector::TS, old.selector, ext);
        }

        // Everything that the switch touches, before anything is changed.
        let save_at = self.system_address(old.base, old_layout.saved as u64);
        let saved_bytes = old_layout.saved_bytes();
        self.probe_as(save_at, saved_bytes as u64, Access::Write, View::Supervisor)?;
        self.read_image(base, layout)?;
        if reason.nests() {
            self.probe_as(base, 2, Access::Write, View::Supervisor)?;
        }
        if reason != Reason::Return {
            self.probe_descriptor(selector)?;
        }
        if !reason.nests() {
            self.probe_descriptor(old.selector)?;
        }

        // The old task is put away.
        let mut old_flags = flags;
        if reason == Reason::Return {
            old_flags &= !rflags::NT;
        }
        let saved = self.task_registers(old_layout, old_flags);
        self.write_bytes_as(save_at, &saved[..saved_bytes], View::Supervisor)?;
        if !reason.nests() {
            self.change_descriptor(old.selector, 0, system::TSS16_BUSY & !system::TSS16)?;
        }
        if reason.nests() {
            self.write_system(base, old.selector)?;
        }
        if reason != Reason::Return {
            self.change_descriptor(selector, system::TSS16_BUSY & !system::TSS16, 0)?;
        }

        // From here on the new task is the current one. It is read again, since the two may
        // overlap.
        let image = self.read_image(base, layout)?;
        let mut tr = descriptor.segment(selector);
        tr.access |= system::TSS16_BUSY & !system::TSS16;
        self.sys.tr = tr;
        self.sys.cr0 |= cr0::TS;
        // L0 to L3 and LE are the old task's (SDM vol. 3B, 18.2.4).
        self.sys.dr7 &= !0x155;
        let loaded = self.load_task(&image, reason);
        if loaded.is_err() {
            self.pending = Some(self.exception);
        } else if image.is_wide() && image.value(TRAP) & 1 != 0 {
            self.sys.dr6 |= dr::DR6_BT;
            self.pending = Some(Exception::plain(Vector::DB));
        }
        self.end_block = true;
        self.update_mode();
        Ok(())
    }

    /// Reads the fixed part of a TSS.
    fn read_image(&mut self, base: u64, layout: &'static Layout) -> Result<Image, Stop> {
        let mut bytes = [0; TSS32_BYTES];
        self.read_bytes_as(base, &mut bytes[..layout.bytes], View::Supervisor)?;
        Ok(Image { layout, bytes })
    }

    /// The current task's registers as a TSS has them.
    fn task_registers(&self, layout: &Layout, flags: u64) -> [u8; SAVED * 4] {
        let mut values = [0; SAVED];
        values[0] = self.mask_rip(self.rip);
        values[1] = flags;
        values[2..2 + REGISTERS].copy_from_slice(&self.regs.gpr[..REGISTERS]);
        for (value, segment) in values[2 + REGISTERS..].iter_mut().zip(&self.sys.segments) {
            *value = u64::from(segment.selector);
        }
        let mut bytes = [0; SAVED * 4];
        let places = bytes.chunks_exact_mut(layout.width);
        for (place, value) in places.zip(&values[..layout.count()]) {
            place.copy_from_slice(&value.to_le_bytes()[..layout.width]);
        }
        bytes
    }

    /// Loads the new task's registers. On `Err` the segments not yet loaded are unusable.
    fn load_task(&mut self, image: &Image, reason: Reason) -> Step {
        let mut flags = image.saved(1) & rflags::DEFINED;
        if reason.nests() {
            flags |= rflags::NT;
        }
        let vm86 = flags & rflags::VM != 0;
        let level = if vm86 {
            3
        } else {
            rpl(image.selector(sreg::CS))
        };
        self.rip = image.saved(0);
        self.flags.put(flags);
        self.system_flags = flags & !rflags::ARITHMETIC;
        for register in 0..REGISTERS {
            let value = image.saved(2 + register);
            let place = &mut self.regs.gpr[register];
            // The upper halves are undefined after a switch from a 16-bit TSS; ones are what the
            // 80386 leaves, and show up.
            *place = if image.is_wide() {
                value
            } else {
                value | 0xffff_0000
            };
        }
        for (index, segment) in self.sys.segments.iter_mut().enumerate() {
            *segment = Segment::null(image.selector(index));
        }
        // The level is SS's DPL, also while SS can't be used.
        self.sys.segments[sreg::SS].access |= u32::from(level) << access::DPL_SHIFT;
        self.sys.ldtr = Segment::null(image.ldt());
        self.update_mode();

        if image.is_wide() && self.sys.cr0 & cr0::PG != 0 {
            let cr3 = image.value(CR3);
            if self.sys.cr4 & cr4::PAE != 0 {
                self.sys.pdptes = self.load_pdptes(cr3)?;
            }
            self.sys.cr3 = cr3;
            self.tlb.switch(0, false);
        }
        self.load_task_ldt(image.ldt())?;
        if vm86 {
            for index in 0..6 {
                self.sys.segments[index] = vm86_segment(image.selector(index));
            }
            self.update_mode();
        } else {
            self.load_task_code(image.selector(sreg::CS))?;
            self.load_task_stack(image.selector(sreg::SS), level)?;
            self.update_mode();
            for index in [sreg::DS, sreg::ES, sreg::FS, sreg::GS] {
                self.load_task_data(index, image.selector(index), level)?;
            }
        }
        let ext = match reason {
            Reason::Event {
                error_code: Some(code),
                ext,
            } => {
                let mut stack = Stack::current(self, ext);
                let size = image.layout.width as u64;
                self.push_frame(&mut stack, size, &[u64::from(code)])?;
                self.set_stack_pointer(stack.pointer);
                ext
            }
            Reason::Event { ext, .. } => ext,
            _ => 0,
        };
        if self.rip > u64::from(self.sys.segments[sreg::CS].limit) {
            return Err(self.raise(Exception::gp(ext)));
        }
        Ok(())
    }

    fn load_task_ldt(&mut self, selector: u16) -> Step {
        if is_null(selector) {
            return Ok(());
        }
        if selector & LOCAL != 0 {
            return self.refuse(Vector::TS, selector, 0);
        }
        let descriptor = self.descriptor_or(selector, Vector::TS, 0)?;
        let is_ldt = !descriptor.has(access::S) && descriptor.kind() == system::LDT;
        if !is_ldt || !descriptor.has(access::P) {
            return self.refuse(Vector::TS, selector, 0);
        }
        self.sys.ldtr = descriptor.segment(selector);
        Ok(())
    }

    fn load_task_code(&mut self, selector: u16) -> Step {
        if is_null(selector) {
            return self.refuse(Vector::TS, selector, 0);
        }
        let descriptor = self.descriptor_or(selector, Vector::TS, 0)?;
        let level_fits = if is_conforming(descriptor) {
            descriptor.dpl() <= rpl(selector)
        } else {
            descriptor.dpl() == rpl(selector)
        };
        if !is_code(descriptor) || !level_fits {
            return self.refuse(Vector::TS, selector, 0);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::NP, selector, 0);
        }
        self.set_accessed(selector, descriptor)?;
        self.sys.segments[sreg::CS] = loaded(descriptor, selector);
        Ok(())
    }

    fn load_task_stack(&mut self, selector: u16, level: u8) -> Step {
        if is_null(selector) {
            return self.refuse(Vector::TS, selector, 0);
        }
        let descriptor = self.descriptor_or(selector, Vector::TS, 0)?;
        let level_fits = rpl(selector) == level && descriptor.dpl() == level;
        if !is_writable_data(descriptor) || !level_fits {
            return self.refuse(Vector::TS, selector, 0);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::SS, selector, 0);
        }
        self.set_accessed(selector, descriptor)?;
        self.sys.segments[sreg::SS] = loaded(descriptor, selector);
        Ok(())
    }

    fn load_task_data(&mut self, index: usize, selector: u16, level: u8) -> Step {
        if is_null(selector) {
            return Ok(());
        }
        let descriptor = self.descriptor_or(selector, Vector::TS, 0)?;
        let too_low = !is_conforming(descriptor) && descriptor.dpl() < level.max(rpl(selector));
        if !is_readable(descriptor) || too_low {
            return self.refuse(Vector::TS, selector, 0);
        }
        if !descriptor.has(access::P) {
            return self.refuse(Vector::NP, selector, 0);
        }
        self.set_accessed(selector, descriptor)?;
        self.sys.segments[index] = loaded(descriptor, selector);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
