//! What host code and Rust code both see of one vCPU: it lies below 2 GiB, so that host code names every
//! field by a 32-bit address and needs no register for it.

use std::mem::offset_of;

use crate::adapt::Lesson;
use crate::clock::Reading;
use crate::code_pages::Pages;
use crate::crossing::Crossing;
use crate::returns::{Bell, EMPTY, Stack};
use trapgate_interp::Interpreter;
use trapgate_interp::cpu::Cpu;
use trapgate_thunk::RegisterFile;
use trapgate_x86::SystemState;
use trapgate_x86::descriptor::Segment;

/// Entries of the largest table of translations.
pub(crate) const TLB: usize = 2048;
/// Entries of the user's table.
pub(crate) const USER_TLB: usize = 512;
/// Entries of the table for the few accesses of a kernel to user memory.
pub(crate) const ACCESS_TLB: usize = 128;
/// Translations of each view that are used without an index.
pub(crate) const SLOTS: usize = 64;
/// Entries that each view uses.
pub(crate) const TLB_ENTRIES: [usize; VIEWS] = [TLB, ACCESS_TLB, USER_TLB];
/// Pages of the upper half that are not global, of which a list is kept; if there are more, all are forgotten.
pub(crate) const MOST_LOCAL: usize = 256;
/// Views with a table: those of [`trapgate_interp::View`] but the last.
pub(crate) const VIEWS: usize = 3;
/// Entries of a table of jump targets.
pub(crate) const TARGETS: usize = 1 << 16;
/// Tables of jump targets: user, supervisor, supervisor with EFLAGS.AC, user in compatibility mode.
pub(crate) const CLASSES: usize = 4;

/// A page of linear addresses that no access can hit: not canonical. Its index in the tables is 0.
const NEVER: u64 = 0x8000_0000_0000_0000;

/// A page that no access with a page's index can hit: it has another index.
fn other_page(page: u64) -> u64 {
    page ^ 0x1000
}

/// A cached translation. An access of `n` bytes at `a` hits if `a - page ≤ 4096 - n`, unsigned: so one that
/// crosses the page's end misses.
#[derive(Clone, Copy, Default)]
#[repr(C, align(32))]
pub(crate) struct Entry {
    /// Linear address of the page if it may be read.
    pub(crate) read: u64,
    /// Linear address of the page if it may be written.
    pub(crate) write: u64,
    /// Host address of the page.
    pub(crate) host: u64,
}

/// Offset of what is compared in an entry.
pub(crate) fn page_offset(write: bool) -> u32 {
    if write {
        offset_of!(Entry, write) as u32
    } else {
        offset_of!(Entry, read) as u32
    }
}

/// Offset of what is added.
pub(crate) const HOST_OFFSET: u32 = offset_of!(Entry, host) as u32;

/// A list of linear addresses. If it is full there may be others.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Local {
    pub(crate) count: u32,
    pub(crate) linear: [u64; MOST_LOCAL],
}

impl Local {
    pub(crate) fn push(&mut self, linear: u64) {
        if let Some(slot) = self.linear.get_mut(self.count as usize) {
            *slot = linear;
            self.count += 1;
        }
    }

    /// What is in it.
    pub(crate) fn list(&self) -> &[u64] {
        &self.linear[..MOST_LOCAL.min(self.count as usize)]
    }

    pub(crate) fn is_full(&self) -> bool {
        self.count as usize >= MOST_LOCAL
    }
}

/// What an entry of a table holds that nothing hits: a page that does not have the entry's index.
fn never(index: usize) -> u64 {
    if index == 0 { NEVER | 0x1000 } else { NEVER }
}

/// A table of translations, indexed by the lowest bits of the page number; a power of two of them.
pub(crate) struct Table<'a>(&'a mut [Entry]);

impl<'a> Table<'a> {
    /// A view's.
    pub(crate) fn of(tlbs: &'a mut [[Entry; TLB]; VIEWS], view: usize) -> Self {
        Self(&mut tlbs[view][..TLB_ENTRIES[view]])
    }

    fn index(&self, linear: u64) -> usize {
        (linear >> 12) as usize % self.0.len()
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        for (index, entry) in self.0.iter_mut().enumerate() {
            entry.read = never(index);
            entry.write = never(index);
        }
    }

    /// Forgets a page.
    pub(crate) fn clear_page(&mut self, linear: u64) {
        let index = self.index(linear);
        self.0[index].read = never(index);
        self.0[index].write = never(index);
    }

    /// Forgets the right to write to a host page.
    pub(crate) fn revoke_write(&mut self, host: u64) {
        for (index, entry) in self.0.iter_mut().enumerate() {
            if entry.host == host {
                entry.write = never(index);
            }
        }
    }

    /// Caches a translation.
    pub(crate) fn insert(&mut self, linear: u64, host: u64, (read, write): (bool, bool)) {
        let page = linear & !0xfff;
        let index = self.index(linear);
        let given = |right| if right { page } else { other_page(page) };
        self.0[index] = Entry {
            read: given(read),
            write: given(write),
            host,
        };
    }
}

/// Translations that have no index: an instruction that uses one need not work out where it lies. What does not
/// hit holds a linear address that no guest can guess: not canonical.
pub(crate) struct Slots<'a>(pub(crate) &'a mut [Entry; SLOTS]);

impl Slots<'_> {
    pub(crate) fn clear(&mut self, unmatched: u64) {
        for slot in &mut *self.0 {
            slot.read = unmatched;
            slot.write = unmatched;
        }
    }

    /// Forgets a page.
    pub(crate) fn clear_page(&mut self, linear: u64, unmatched: u64) {
        let page = linear & !0xfff;
        for slot in &mut *self.0 {
            if slot.read == page || slot.write == page {
                slot.read = unmatched;
                slot.write = unmatched;
            }
        }
    }

    /// Forgets the right to write to a host page.
    pub(crate) fn revoke_write(&mut self, host: u64, unmatched: u64) {
        for slot in &mut *self.0 {
            if slot.host == host {
                slot.write = unmatched;
            }
        }
    }
}

/// Where indirect jumps lead: linear address and host code.
#[repr(C)]
pub(crate) struct Targets {
    pub(crate) linear: [u64; TARGETS],
    pub(crate) host: [u64; TARGETS],
    /// The mapping that must be in force; only Rust code looks at it.
    pub(crate) mapping: [u32; TARGETS],
}

/// What is no mode: a user without access to user pages.
pub(crate) const NO_MODE: u8 = 1;
/// A linear address that is no jump target.
pub(crate) const NO_TARGET: u64 = 0x8000_0000_0000_0000;

/// See the module.
#[repr(C)]
pub(crate) struct Context {
    pub(crate) bell: Bell,
    /// The arithmetic flags as LAHF and SETO leave them in AX, while they are not in the host's flags.
    pub(crate) flags: u32,
    /// The site that called out.
    pub(crate) site: u32,
    /// Host code to enter.
    pub(crate) target: u64,
    /// Linear address of the access that missed.
    pub(crate) linear: u64,
    /// For a value that has no register for a moment.
    pub(crate) stash: u64,
    /// Host code changed the privilege level, and what follows from it is not worked out yet.
    pub(crate) stale: u32,
    /// The mode that each table of jump targets is for, or [`NO_MODE`].
    pub(crate) target_modes: [u8; CLASSES],
    /// The time-stamp counter.
    pub(crate) clock: Reading,
    /// What may yet happen, by lesson, before one case of it is looked at: see [`crate::adapt`].
    pub(crate) patience: [u32; Lesson::COUNT],
    /// The access that lies across the end of a page.
    pub(crate) crossing: Crossing,
    /// RSP of host code while Rust code runs, and of the thread's stack while host code runs.
    pub(crate) stack: u64,
    pub(crate) host_stack: u64,
    /// Where the call of a Rust function returns to.
    pub(crate) resume: u64,
    /// RSP of host code of each class, while it is not the current one.
    pub(crate) tops: [u64; CLASSES],
    /// The host's MXCSR.
    pub(crate) host_mxcsr: u32,
    /// Where the guest's x87 registers are: see [`crate::x87`].
    pub(crate) x87: u32,
    /// Rust functions that host code calls.
    pub(crate) miss: u64,
    pub(crate) operate: u64,
    /// Translations that host code fetched into tables and slots.
    pub(crate) refills: crate::statistics::Refills,
    /// What [`crate::context::Slots`] holds that nothing hits.
    pub(crate) unmatched: u64,
    pub(crate) tlbs: [[Entry; TLB]; VIEWS],
    pub(crate) slots: [[Entry; SLOTS]; VIEWS],
    /// Addresses whose pages are in the tables and not in every address space, by view: those of the lower half, and
    /// of the upper half those that are not global.
    pub(crate) local: [Local; VIEWS],
    /// Which mapping of a code page is known to be in force, by linear page; 0 is none.
    pub(crate) pages: Pages,
    pub(crate) targets: [Targets; CLASSES],
    /// Host code's stacks.
    pub(crate) stacks: [Stack; CLASSES],
    /// The processor.
    pub(crate) interp: Interpreter,
    /// What only Rust code uses.
    pub(crate) rust: crate::run::Inner,
}

/// 32-bit addresses of what host code uses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addresses {
    base: u32,
}

impl Addresses {
    /// Of a context at an address below 2 GiB.
    pub(crate) fn at(base: u32) -> Self {
        Self { base }
    }

    pub(crate) fn base(self) -> u32 {
        self.base
    }

    fn field(self, offset: usize) -> u32 {
        self.base + offset as u32
    }

    pub(crate) fn poll(self) -> u32 {
        self.field(offset_of!(Context, bell) + offset_of!(Bell, poll))
    }

    /// The lowest RSP with which a CALL goes on.
    pub(crate) fn limit(self, class: usize) -> u32 {
        self.field(offset_of!(Context, bell) + offset_of!(Bell, limits)) + (class * 4) as u32
    }

    pub(crate) fn stack(self) -> u32 {
        self.field(offset_of!(Context, stack))
    }

    pub(crate) fn host_stack(self) -> u32 {
        self.field(offset_of!(Context, host_stack))
    }

    pub(crate) fn resume(self) -> u32 {
        self.field(offset_of!(Context, resume))
    }

    pub(crate) fn top(self, class: usize) -> u32 {
        self.field(offset_of!(Context, tops)) + (class * 8) as u32
    }

    /// RSP of a class's stack without calls.
    pub(crate) fn empty_stack(self, class: usize) -> u32 {
        self.field(offset_of!(Context, stacks)) + (class * size_of::<Stack>()) as u32 + EMPTY
    }

    pub(crate) fn flags(self) -> u32 {
        self.field(offset_of!(Context, flags))
    }

    pub(crate) fn site(self) -> u32 {
        self.field(offset_of!(Context, site))
    }

    pub(crate) fn target(self) -> u32 {
        self.field(offset_of!(Context, target))
    }

    pub(crate) fn linear(self) -> u32 {
        self.field(offset_of!(Context, linear))
    }

    pub(crate) fn unmatched(self) -> u32 {
        self.field(offset_of!(Context, unmatched))
    }

    pub(crate) fn stash(self) -> u32 {
        self.field(offset_of!(Context, stash))
    }

    pub(crate) fn patience(self, lesson: Lesson) -> u32 {
        self.field(offset_of!(Context, patience)) + lesson as u32 * 4
    }

    pub(crate) fn crossing(self) -> u32 {
        self.field(offset_of!(Context, crossing))
    }

    pub(crate) fn host_mxcsr(self) -> u32 {
        self.field(offset_of!(Context, host_mxcsr))
    }

    pub(crate) fn miss(self) -> u32 {
        self.field(offset_of!(Context, miss))
    }

    pub(crate) fn operate(self) -> u32 {
        self.field(offset_of!(Context, operate))
    }

    /// The count of refills of a table, or of its slots.
    pub(crate) fn refills(self, view: usize, write: bool, slot: bool) -> u32 {
        let index = view * 4 + usize::from(write) * 2 + usize::from(slot);
        self.field(offset_of!(Context, refills)) + (index * 8) as u32
    }

    /// The first entry of a view's table.
    pub(crate) fn tlb(self, view: usize) -> u32 {
        self.field(offset_of!(Context, tlbs)) + (view * size_of::<[Entry; TLB]>()) as u32
    }

    /// Offset of the entry of a linear address in a view's table.
    pub(crate) fn tlb_entry(view: usize, linear: u64) -> u32 {
        ((linear >> 12) as usize % TLB_ENTRIES[view] * size_of::<Entry>()) as u32
    }

    /// A translation without an index.
    pub(crate) fn slot(self, view: usize, slot: usize) -> u32 {
        self.field(offset_of!(Context, slots)) + ((view * SLOTS + slot) * size_of::<Entry>()) as u32
    }

    fn local(self, view: usize) -> u32 {
        self.field(offset_of!(Context, local)) + (view * size_of::<Local>()) as u32
    }

    pub(crate) fn local_count(self, view: usize) -> u32 {
        self.local(view) + offset_of!(Local, count) as u32
    }

    pub(crate) fn local_list(self, view: usize) -> u32 {
        self.local(view) + offset_of!(Local, linear) as u32
    }

    /// The slot of a code page.
    pub(crate) fn page(self, linear: u64) -> u32 {
        self.field(offset_of!(Context, pages) + Pages::offset(linear))
    }

    pub(crate) fn targets_linear(self, class: usize) -> u32 {
        self.field(offset_of!(Context, targets)) + (class * size_of::<Targets>()) as u32
    }

    pub(crate) fn targets_host(self, class: usize) -> u32 {
        self.targets_linear(class) + offset_of!(Targets, host) as u32
    }

    pub(crate) fn stale(self) -> u32 {
        self.field(offset_of!(Context, stale))
    }

    pub(crate) fn target_mode(self, class: usize) -> u32 {
        self.field(offset_of!(Context, target_modes)) + class as u32
    }

    pub(crate) fn clock_host(self) -> u32 {
        self.field(offset_of!(Context, clock) + offset_of!(Reading, host))
    }

    pub(crate) fn clock_guest(self) -> u32 {
        self.field(offset_of!(Context, clock) + offset_of!(Reading, guest))
    }

    pub(crate) fn clock_ratio(self) -> u32 {
        self.field(offset_of!(Context, clock) + offset_of!(Reading, ratio))
    }

    fn cpu(self, offset: usize) -> u32 {
        self.field(offset_of!(Context, interp) + offset_of!(Interpreter, cpu) + offset)
    }

    pub(crate) fn gpr(self, index: usize) -> u32 {
        self.cpu(offset_of!(Cpu, regs) + offset_of!(RegisterFile, gpr) + index * 8)
    }

    pub(crate) fn vector(self, index: usize) -> u32 {
        self.cpu(offset_of!(Cpu, regs) + offset_of!(RegisterFile, vector) + index * 32)
    }

    pub(crate) fn mxcsr(self) -> u32 {
        self.cpu(offset_of!(Cpu, regs) + offset_of!(RegisterFile, mxcsr))
    }

    pub(crate) fn rip(self) -> u32 {
        self.cpu(offset_of!(Cpu, rip))
    }

    pub(crate) fn instructions(self) -> u32 {
        self.cpu(offset_of!(Cpu, instructions))
    }

    pub(crate) fn system_flags(self) -> u32 {
        self.cpu(offset_of!(Cpu, system_flags))
    }

    pub(crate) fn interrupt_waits(self) -> u32 {
        self.cpu(offset_of!(Cpu, interrupt_waits))
    }

    fn segment(self, segment: usize) -> u32 {
        self.cpu(
            offset_of!(Cpu, sys)
                + offset_of!(SystemState, segments)
                + segment * size_of::<Segment>(),
        )
    }

    pub(crate) fn segment_base(self, segment: usize) -> u32 {
        self.segment(segment) + offset_of!(Segment, base) as u32
    }

    pub(crate) fn segment_limit(self, segment: usize) -> u32 {
        self.segment(segment) + offset_of!(Segment, limit) as u32
    }

    pub(crate) fn segment_access(self, segment: usize) -> u32 {
        self.segment(segment) + offset_of!(Segment, access) as u32
    }

    pub(crate) fn selector(self, segment: usize) -> u32 {
        self.segment(segment) + offset_of!(Segment, selector) as u32
    }

    pub(crate) fn x87(self) -> u32 {
        self.field(offset_of!(Context, x87))
    }

    /// The image of the x87's state, as FXSAVE64 gives it.
    pub(crate) fn x87_image(self) -> u32 {
        self.cpu(offset_of!(Cpu, regs) + offset_of!(RegisterFile, x87))
    }

    /// XSTATE_BV of the XSAVE area whose legacy region the image is.
    pub(crate) fn x87_header(self) -> u32 {
        self.cpu(offset_of!(Cpu, regs) + offset_of!(RegisterFile, x87_header))
    }

    fn system(self, offset: usize) -> u32 {
        self.cpu(offset_of!(Cpu, sys) + offset)
    }

    pub(crate) fn kernel_gs_base(self) -> u32 {
        self.system(offset_of!(SystemState, kernel_gs_base))
    }

    pub(crate) fn cr4(self) -> u32 {
        self.system(offset_of!(SystemState, cr4))
    }

    pub(crate) fn efer(self) -> u32 {
        self.system(offset_of!(SystemState, efer))
    }

    pub(crate) fn star(self) -> u32 {
        self.system(offset_of!(SystemState, star))
    }

    pub(crate) fn lstar(self) -> u32 {
        self.system(offset_of!(SystemState, lstar))
    }

    pub(crate) fn sfmask(self) -> u32 {
        self.system(offset_of!(SystemState, sfmask))
    }

    pub(crate) fn tsc_aux(self) -> u32 {
        self.system(offset_of!(SystemState, tsc_aux))
    }
}

/// Vector registers are moved as a whole by aligned instructions.
const _: () = assert!(offset_of!(RegisterFile, vector) % 32 == 0);
