//! What host code and Rust code both see of one vCPU: it lies below 2 GiB, so that host code names every
//! field by a 32-bit address and needs no register for it.

use std::mem::offset_of;
use std::sync::atomic::AtomicU32;

use crate::clock::Reading;
use trapgate_interp::Interpreter;
use trapgate_interp::cpu::Cpu;
use trapgate_thunk::RegisterFile;
use trapgate_x86::SystemState;
use trapgate_x86::descriptor::Segment;

/// Entries of the largest table of translations.
pub(crate) const TLB: usize = 2048;
/// Entries of the user's table, which is copied when address spaces are exchanged.
pub(crate) const USER_TLB: usize = 512;
/// Entries of the table for the few accesses of a kernel to user memory.
pub(crate) const ACCESS_TLB: usize = 128;
/// Entries that each view uses.
pub(crate) const TLB_ENTRIES: [usize; VIEWS] = [TLB, ACCESS_TLB, USER_TLB];
/// Pages of the upper half that are not global, of which a list is kept; if there are more, all are forgotten.
pub(crate) const MOST_LOCAL: usize = 256;
/// Views with a table: those of [`trapgate_interp::View`] but the last.
pub(crate) const VIEWS: usize = 3;
/// Slots for code pages of the lower half of the address space, which every process has its own of.
pub(crate) const USER_PAGES: usize = 512;
/// Slots for code pages of the upper half: as far apart as two pages of a kernel may lie.
pub(crate) const KERNEL_PAGES: usize = 8192;
/// Entries of a table of jump targets.
pub(crate) const TARGETS: usize = 1 << 16;
/// Tables of jump targets: user, supervisor, supervisor with EFLAGS.AC.
pub(crate) const CLASSES: usize = 3;

/// A page of linear addresses that no access can hit: not canonical. Its index in the tables is 0.
const NEVER: u64 = 0x8000_0000_0000_0000;

/// A page that no access with a page's index can hit: it has another index.
fn other_page(page: u64) -> u64 {
    page ^ 0x1000
}

/// Cached translations, as three arrays. An access of `n` bytes at `a` hits if
/// `a - page[index(a)] <= 4096 - n`, unsigned, where the index is of the first byte: so one that crosses the
/// page's end misses.
#[repr(C)]
pub(crate) struct Tlb<const ENTRIES: usize = TLB> {
    /// Linear addresses of pages that may be read.
    pub(crate) read: [u64; ENTRIES],
    /// Linear addresses of pages that may be written.
    pub(crate) write: [u64; ENTRIES],
    /// Host addresses of the pages.
    pub(crate) host: [u64; ENTRIES],
    /// A table with one entry, for accesses relative to RSP: it needs no index.
    pub(crate) stack: StackPage,
}

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

/// See [`Tlb::stack`].
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct StackPage {
    pub(crate) read: u64,
    pub(crate) write: u64,
    pub(crate) host: u64,
}

/// A table of translations, wherever it lies: the current ones, or those of an address space that is not.
pub(crate) struct Table<'a> {
    read: &'a mut [u64],
    write: &'a mut [u64],
    host: &'a mut [u64],
    stack: &'a mut StackPage,
}

impl<const ENTRIES: usize> Tlb<ENTRIES> {
    /// Zeros, to be filled in.
    pub(crate) fn zero() -> Self {
        Self {
            read: [0; ENTRIES],
            write: [0; ENTRIES],
            host: [0; ENTRIES],
            stack: StackPage::default(),
        }
    }

    /// Its first entries, a power of two.
    pub(crate) fn table(&mut self, entries: usize) -> Table<'_> {
        Table {
            read: &mut self.read[..entries],
            write: &mut self.write[..entries],
            host: &mut self.host[..entries],
            stack: &mut self.stack,
        }
    }
}

/// What a slot holds that nothing hits: a page that does not have the slot's index.
fn never(index: usize) -> u64 {
    if index == 0 { NEVER | 0x1000 } else { NEVER }
}

impl Table<'_> {
    fn index(&self, linear: u64) -> usize {
        (linear >> 12) as usize % self.read.len()
    }

    /// Forgets everything. `unmatched` is a linear address that no guest can guess: not canonical.
    pub(crate) fn clear(&mut self, unmatched: u64) {
        for pages in [&mut self.read, &mut self.write] {
            pages.fill(NEVER);
            pages[0] = NEVER | 0x1000;
        }
        self.clear_stack(unmatched);
    }

    pub(crate) fn clear_stack(&mut self, unmatched: u64) {
        self.stack.read = unmatched;
        self.stack.write = unmatched;
    }

    /// Forgets a page.
    pub(crate) fn clear_page(&mut self, linear: u64, unmatched: u64) {
        let index = self.index(linear);
        self.read[index] = never(index);
        self.write[index] = never(index);
        self.clear_stack(unmatched);
    }

    /// Forgets the right to write to a host page.
    pub(crate) fn revoke_write(&mut self, host: u64, unmatched: u64) {
        for (index, page) in self.host.iter().enumerate() {
            if *page == host {
                self.write[index] = never(index);
            }
        }
        if self.stack.host == host {
            self.stack.write = unmatched;
        }
    }

    /// Caches a translation.
    pub(crate) fn insert(&mut self, linear: u64, host: u64, (read, write): (bool, bool)) {
        let page = linear & !0xfff;
        let index = self.index(linear);
        let given = |right| if right { page } else { other_page(page) };
        self.read[index] = given(read);
        self.write[index] = given(write);
        self.host[index] = host;
    }

    /// Caches a translation for accesses relative to RSP.
    pub(crate) fn insert_stack(
        &mut self,
        linear: u64,
        host: u64,
        (read, write): (bool, bool),
        unmatched: u64,
    ) {
        let given = |right| if right { linear & !0xfff } else { unmatched };
        *self.stack = StackPage {
            read: given(read),
            write: given(write),
            host,
        };
    }

    /// Copies another table of the same size.
    pub(crate) fn copy_from(&mut self, other: &Table<'_>) {
        self.read.copy_from_slice(other.read);
        self.write.copy_from_slice(other.write);
        self.host.copy_from_slice(other.host);
        *self.stack = *other.stack;
    }
}

/// For each code page the number of the mapping that is known to be in force; 0 is none.
#[repr(C)]
pub(crate) struct Pages {
    pub(crate) user: [u32; USER_PAGES],
    pub(crate) kernel: [u32; KERNEL_PAGES],
}

impl Pages {
    /// Which half of the address space, and which slot in it.
    fn slot(linear: u64) -> (usize, usize) {
        let page = (linear >> 12) as usize;
        if linear >> 63 == 0 {
            (0, page % USER_PAGES)
        } else {
            (1, page % KERNEL_PAGES)
        }
    }

    /// The slots of one half.
    pub(crate) fn half(&mut self, half: usize) -> &mut [u32] {
        if half == 0 {
            &mut self.user
        } else {
            &mut self.kernel
        }
    }

    /// The slot of a page.
    pub(crate) fn of(&mut self, linear: u64) -> &mut u32 {
        let (half, slot) = Self::slot(linear);
        &mut self.half(half)[slot]
    }

    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        self.user.fill(0);
        self.kernel.fill(0);
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

/// What is no mode.
pub(crate) const NO_MODE: u8 = 0xff;
/// A linear address that is no jump target.
pub(crate) const NO_TARGET: u64 = 0x8000_0000_0000_0000;

/// See the module.
#[repr(C)]
pub(crate) struct Context {
    /// 0 if a signal may be raised, else 1. Other threads clear it.
    pub(crate) poll: AtomicU32,
    /// The arithmetic flags as LAHF and SETO leave them in AX, while they are not in the host's flags.
    pub(crate) flags: u32,
    /// The site that called out.
    pub(crate) site: u32,
    /// Host code to enter.
    pub(crate) target: u64,
    /// Linear address of the access that missed.
    pub(crate) linear: u64,
    /// RCX of host code while it calls out.
    pub(crate) rcx: u64,
    /// For a value that has no register for a moment.
    pub(crate) stash: u64,
    /// Host code changed the privilege level, and what follows from it is not worked out yet.
    pub(crate) stale: u32,
    /// The mode that each table of jump targets is for, or [`NO_MODE`].
    pub(crate) target_modes: [u8; CLASSES],
    /// The time-stamp counter.
    pub(crate) clock: Reading,
    /// Stack accesses that may yet miss before one is looked at: see [`crate::adapt`].
    pub(crate) patience: u32,
    /// The host's MXCSR.
    pub(crate) host_mxcsr: u32,
    /// Rust functions that host code calls.
    pub(crate) miss: u64,
    pub(crate) operate: u64,
    /// Translations that host code fetched into the tables.
    pub(crate) refills: crate::statistics::Refills,
    pub(crate) tlbs: [Tlb; VIEWS],
    /// Addresses whose pages are in the tables and not in every address space, by view: those of the upper half
    /// that are not global, and a supervisor's of the lower half.
    pub(crate) local: [Local; VIEWS],
    /// Which mapping of a code page is known to be in force, by linear page; 0 is none.
    pub(crate) pages: Pages,
    pub(crate) targets: [Targets; CLASSES],
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
        self.field(offset_of!(Context, poll))
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

    pub(crate) fn rcx(self) -> u32 {
        self.field(offset_of!(Context, rcx))
    }

    pub(crate) fn stash(self) -> u32 {
        self.field(offset_of!(Context, stash))
    }

    pub(crate) fn patience(self) -> u32 {
        self.field(offset_of!(Context, patience))
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

    /// The count of refills.
    pub(crate) fn refills(self, view: usize, write: bool, stack: bool) -> u32 {
        let index = view * 4 + usize::from(write) * 2 + usize::from(stack);
        self.field(offset_of!(Context, refills)) + (index * 8) as u32
    }

    fn tlb(self, view: usize) -> u32 {
        self.field(offset_of!(Context, tlbs)) + (view * size_of::<Tlb>()) as u32
    }

    /// The array of page addresses for reading or writing.
    pub(crate) fn tlb_pages(self, view: usize, write: bool) -> u32 {
        self.tlb(view)
            + if write {
                offset_of!(Tlb<TLB>, write)
            } else {
                offset_of!(Tlb<TLB>, read)
            } as u32
    }

    /// The array of host addresses.
    pub(crate) fn tlb_hosts(self, view: usize) -> u32 {
        self.tlb(view) + offset_of!(Tlb<TLB>, host) as u32
    }

    pub(crate) fn stack_page(self, view: usize, write: bool) -> u32 {
        self.tlb(view)
            + offset_of!(Tlb<TLB>, stack) as u32
            + if write {
                offset_of!(StackPage, write)
            } else {
                offset_of!(StackPage, read)
            } as u32
    }

    pub(crate) fn stack_host(self, view: usize) -> u32 {
        self.tlb(view) + (offset_of!(Tlb<TLB>, stack) + offset_of!(StackPage, host)) as u32
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
        let (half, slot) = Pages::slot(linear);
        let half = [offset_of!(Pages, user), offset_of!(Pages, kernel)][half];
        self.field(offset_of!(Context, pages) + half + slot * 4)
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

    /// The x87 control word.
    pub(crate) fn x87_control(self) -> u32 {
        self.cpu(offset_of!(Cpu, regs) + offset_of!(RegisterFile, x87))
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
