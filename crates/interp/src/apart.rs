//! A processor whose stores stay apart from guest memory: what it would do, without doing it.
//!
//! Lockstep runs it beside a translator on the same memory. A page that it writes is copied first, and it goes
//! on with the copy; in the end guest memory is as it was, and the copies show what would be in it. Only
//! accessed and dirty bits of page tables that are not copied yet go to memory: the other processor is about to set
//! the same. Devices it does not touch, nor pages that someone traces: the instruction is left undone.
#![allow(unsafe_code)]

use std::cell::UnsafeCell;

use trapgate_memory::{HostAddress, PAGE_SIZE};
use trapgate_thunk::RegisterFile;
use trapgate_x86::{InterruptShadow, SystemState};

use crate::cpu::{Cpu, Stop};
use crate::flags::LazyFlags;
use crate::mmu::{Piece, Place};
use crate::paging::Translation;
use crate::tlb::{Access, Rights, View};

#[repr(C, align(4096))]
struct Page(UnsafeCell<[u8; PAGE_SIZE as usize]>);

impl Page {
    fn new() -> Box<Self> {
        Box::new(Self(UnsafeCell::new([0; PAGE_SIZE as usize])))
    }

    fn host(&self) -> HostAddress {
        // SAFETY: the page lives in a box of `Apart`, which only ever gets more of them; no reference to the
        // bytes lives while the processor runs.
        unsafe { HostAddress::new(self.0.get().cast()) }
    }

    fn bytes(&self) -> &[u8; PAGE_SIZE as usize] {
        // SAFETY: the processor that writes through `host` is borrowed by whoever looks, and so does not run.
        unsafe { &*self.0.get() }
    }

    fn fill(&mut self, from: HostAddress) {
        from.read(self.0.get_mut());
    }
}

/// A page that was written.
pub struct Written {
    /// Guest-physical address of the page.
    pub gpa: u64,
    /// Where it lies in the process.
    pub real: HostAddress,
    /// A walk of page tables changed accessed or dirty bits in the copy.
    walked: bool,
    before: Box<Page>,
    copy: Box<Page>,
}

/// A byte of memory that is not what this processor would have made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryDifference {
    /// Guest-physical address of the aligned eight bytes that hold it.
    pub gpa: u64,
    /// What was there.
    pub before: u64,
    /// What would be there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
}

impl Written {
    /// The first difference between memory and the copy.
    fn difference(&self) -> Option<MemoryDifference> {
        let mut now = [0; PAGE_SIZE as usize];
        self.real.read(&mut now);
        if now == *self.copy.bytes() {
            return None;
        }
        let word = |bytes: &[u8], at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        // The other processor may have known a translation already that this one looked up, or the reverse.
        let ignored = if self.walked { ACCESSED_DIRTY } else { 0 };
        (0..PAGE_SIZE as usize).step_by(8).find_map(|at| {
            let (expected, found) = (word(self.copy.bytes(), at), word(&now, at));
            ((expected ^ found) & !ignored != 0).then_some(MemoryDifference {
                gpa: self.gpa + at as u64,
                before: word(self.before.bytes(), at),
                expected,
                found,
            })
        })
    }
}

/// Accessed and dirty bits of a page-table entry; of two where entries have 32 bits.
const ACCESSED_DIRTY: u64 = 0x60 | 0x60 << 32;

/// A cached translation that leads to a copy, and what it was.
struct Opened {
    view: View,
    linear: u64,
    real: HostAddress,
    rights: Rights,
}

/// What a processor is like before it runs.
struct Saved {
    regs: RegisterFile,
    rip: u64,
    flags: LazyFlags,
    system_flags: u64,
    sys: SystemState,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Apart {
    /// Of which the first `used` count; the others are kept for their memory.
    pages: Vec<Written>,
    used: usize,
    opened: Vec<Opened>,
    undone: bool,
    saved: Option<Box<Saved>>,
}

impl Apart {
    fn find(&mut self, gpa: u64) -> Option<&mut Written> {
        let page = gpa & !(PAGE_SIZE - 1);
        self.pages[..self.used]
            .iter_mut()
            .find(|written| written.gpa == page)
    }

    /// The copy of a page, made if there is none.
    fn copy(&mut self, gpa: u64, real: HostAddress) -> HostAddress {
        if let Some(written) = self.find(gpa) {
            return written.copy.host();
        }
        if self.used == self.pages.len() {
            self.pages.push(Written {
                gpa: 0,
                real,
                walked: false,
                before: Page::new(),
                copy: Page::new(),
            });
        }
        let written = &mut self.pages[self.used];
        self.used += 1;
        written.gpa = gpa & !(PAGE_SIZE - 1);
        written.real = real;
        written.walked = false;
        written.before.fill(real);
        let before = written.before.host();
        written.copy.fill(before);
        written.copy.host()
    }

    /// Where an entry of the page tables lies, if it lies in a copy.
    pub(crate) fn table_entry(&mut self, gpa: u64) -> Option<HostAddress> {
        let written = self.find(gpa)?;
        Some(written.copy.host().offset(gpa % PAGE_SIZE))
    }

    /// An entry in a copy gets accessed or dirty bits. `false` if it is in no copy.
    pub(crate) fn walks(&mut self, gpa: u64) -> bool {
        self.find(gpa)
            .map(|written| written.walked = true)
            .is_some()
    }
}

impl Cpu {
    /// From now on this processor's stores stay apart.
    pub fn stay_apart(&mut self) {
        self.apart = Some(Box::default());
    }

    /// Becomes what another processor is, which shares its memory.
    pub fn follow(&mut self, other: &Self) {
        self.regs.clone_from(&other.regs);
        self.rip = other.rip;
        self.flags = other.flags;
        self.system_flags = other.system_flags;
        self.sys.clone_from(&other.sys);
        self.sys.shadow = InterruptShadow::None;
        self.interrupt_waits = other.interrupt_waits;
        self.tlb.take_tags(&other.tlb);
        self.update_mode();
    }

    /// Takes another processor's flags: what instructions leave undefined may differ.
    pub fn follow_flags(&mut self, other: &Self) {
        self.flags = other.flags;
    }

    /// Forgets what was cached of the page of a linear address.
    pub fn forget_page(&mut self, linear: u64) {
        self.tlb.forget_page(linear);
        self.fetch_epoch = self.fetch_epoch.wrapping_add(1);
    }

    /// Forgets all cached translations.
    pub fn forget_translations(&mut self) {
        self.tlb.forget();
        self.fetch_epoch = self.fetch_epoch.wrapping_add(1);
    }

    /// From now on every page's translation is asked for by itself, as [`Self::forget_write_rights`] needs it.
    pub fn translate_pages_alone(&mut self) {
        self.tlb.refuse_large();
    }

    /// Forgets which pages may be written.
    pub fn forget_write_rights(&mut self) {
        self.tlb.forget_writes();
    }

    /// Begins a run that [`Self::run_again`] repeats and [`Self::end_run`] ends.
    pub fn begin_run(&mut self) {
        let Some(apart) = &mut self.apart else {
            return;
        };
        apart.used = 0;
        apart.undone = false;
        match &mut apart.saved {
            Some(saved) => {
                saved.regs.clone_from(&self.regs);
                saved.rip = self.rip;
                saved.flags = self.flags;
                saved.system_flags = self.system_flags;
                saved.sys.clone_from(&self.sys);
            }
            none => {
                *none = Some(Box::new(Saved {
                    regs: self.regs.clone(),
                    rip: self.rip,
                    flags: self.flags,
                    system_flags: self.system_flags,
                    sys: self.sys.clone(),
                }));
            }
        }
    }

    /// Goes back to where the run began. Pages that were copied hold what they held, whatever is in memory by
    /// now, and no translation is cached: what was read wrongly because a page has two linear addresses is now
    /// read rightly.
    pub fn run_again(&mut self) {
        self.tlb.forget();
        let Some(apart) = &mut self.apart else {
            return;
        };
        apart.undone = false;
        apart.opened.clear();
        for written in &mut apart.pages[..apart.used] {
            let before = written.before.host();
            written.copy.fill(before);
        }
        if let Some(saved) = &apart.saved {
            self.regs.clone_from(&saved.regs);
            self.rip = saved.rip;
            self.flags = saved.flags;
            self.system_flags = saved.system_flags;
            self.sys.clone_from(&saved.sys);
        }
        self.update_mode();
    }

    /// General registers and flags where the run began.
    pub fn before_run(&self) -> ([u64; 16], u64) {
        let saved = self.apart.as_ref().and_then(|apart| apart.saved.as_ref());
        saved.map_or(([0; 16], 0), |saved| {
            (saved.regs.gpr, saved.system_flags | saved.flags.get())
        })
    }

    /// Ends a run: stores no longer go where they went.
    pub fn end_run(&mut self) {
        let Some(apart) = &mut self.apart else {
            return;
        };
        for opened in apart.opened.drain(..) {
            self.tlb
                .insert(opened.view, opened.linear, opened.real, opened.rights);
        }
    }

    /// Whether the last instruction was left undone because it touches a device or traced memory.
    pub fn left_undone(&self) -> bool {
        self.apart.as_ref().is_some_and(|apart| apart.undone)
    }

    /// The pages that the run wrote.
    pub fn written(&self) -> &[Written] {
        self.apart
            .as_ref()
            .map_or(&[], |apart| &apart.pages[..apart.used])
    }

    /// The first place where memory is not what the run made of it.
    pub fn memory_difference(&self) -> Option<MemoryDifference> {
        self.written().iter().find_map(Written::difference)
    }

    /// Makes memory what it was before the run, where the run wrote.
    pub fn put_memory_back(&self) {
        for written in self.written() {
            written.real.write(written.before.bytes());
        }
    }

    /// [`Cpu::piece`] of a processor whose stores stay apart.
    #[cold]
    pub(crate) fn piece_apart(
        &mut self,
        linear: u64,
        access: Access,
        view: View,
        translation: Translation,
    ) -> Result<Piece, Stop> {
        let gpa = translation.gpa;
        let host = self.memory.host(gpa & !(PAGE_SIZE - 1));
        let traced = !self.memory.flags(gpa).is_empty();
        let Some(apart) = &mut self.apart else {
            return Err(Stop::Fault);
        };
        let Some(real) = host.filter(|_| !traced || access != Access::Write) else {
            apart.undone = true;
            return Err(Stop::Fault);
        };
        let mut rights = Rights {
            read: access != Access::Execute || translation.execute,
            write: false,
            execute: translation.execute,
            global: translation.global,
        };
        let copy = if access == Access::Write {
            Some(apart.copy(gpa, real))
        } else {
            apart.find(gpa).map(|written| written.copy.host())
        };
        let page = match copy {
            None => real,
            Some(copy) => {
                apart.opened.push(Opened {
                    view,
                    linear,
                    real,
                    rights,
                });
                rights.write = access == Access::Write;
                copy
            }
        };
        self.tlb.insert(view, linear, page, rights);
        Ok(Piece {
            gpa,
            place: Place::Ram {
                host: page.offset(gpa % PAGE_SIZE),
                traced: false,
            },
        })
    }
}
