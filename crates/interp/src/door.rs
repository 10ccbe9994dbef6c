//! The door for an engine that makes host code of the guest's and leaves to the interpreter what it
//! does not translate.

use trapgate_engine::Exit;
use trapgate_memory::{HostAddress, PAGE_SIZE, TraceFlags};

use crate::Interpreter;
use crate::block::Dropped;
use crate::cpu::{Cpu, Stop};
use crate::decode::decode;
use crate::op::Op;
use crate::tlb::{Access, Changes, Layout, View};

/// Where a data access leads.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The page in host memory.
    pub page: HostAddress,
    /// It may be read without asking again.
    pub read: bool,
    /// It may be written without asking again: it is dirty, and nobody traces it.
    pub write: bool,
    /// It is in the upper half of the address space and not global.
    pub local: bool,
}

impl Interpreter {
    /// From now on notes what [`Self::take_dropped`] and [`Cpu::changes`] give.
    pub fn note_changes(&mut self) {
        self.cpu.tlb.note_changes();
        self.blocks.note_dropped();
    }

    /// Whether [`Self::take_dropped`] has anything to give.
    pub fn has_dropped(&self) -> bool {
        self.blocks.dropped.all || !self.blocks.dropped.pages.is_empty()
    }

    /// Takes the list of code that was thrown away.
    pub fn take_dropped(&mut self) -> Dropped {
        self.blocks.dropped.take()
    }

    /// Throws all decoded code away, and what ops refer to.
    pub fn clear(&mut self) {
        self.blocks.clear(&mut self.cpu);
    }

    /// Signals from outside and events that wait; what ends the run.
    pub fn events(&mut self) -> Option<Exit> {
        self.between_blocks()
    }

    /// Why a processor that does not run does not.
    pub fn why_inactive(&self) -> Exit {
        self.inactive()
    }

    /// Runs one instruction with everything around it: breakpoints, shadows, single step.
    ///
    /// # Errors
    /// Why the instruction did not complete, for [`Self::after`].
    pub fn one(&mut self) -> Result<(), Stop> {
        self.step_carefully()
    }

    /// Runs the block at RIP.
    ///
    /// # Errors
    /// Why it did not complete, for [`Self::after`].
    pub fn block(&mut self) -> Result<(), Stop> {
        self.execute_block()
    }

    /// Deals with what ended an instruction: delivers faults. Says if that ends the run.
    pub fn after(&mut self, stop: Stop) -> Option<Exit> {
        self.stopped(stop)
    }

    /// Runs one instruction, or delivers one event.
    pub fn one_or_event(&mut self) -> Exit {
        self.run_one()
    }
}

impl Cpu {
    /// Translations that became wrong since this was cleared.
    pub fn changes(&mut self) -> &mut Changes {
        &mut self.tlb.changes
    }

    /// The current address space's tag: while it is the same, what was cached for it is right.
    pub fn space(&self) -> u64 {
        self.tlb.space()
    }

    /// Where host code finds cached translations.
    pub fn translations(&self) -> Layout {
        self.tlb.layout()
    }

    /// With whose rights explicit accesses are made now.
    pub fn view(&self) -> View {
        self.view
    }

    /// The page that holds the instruction at a linear address: in the host's memory, and
    /// guest-physical. `None` if it is not RAM.
    ///
    /// # Errors
    /// A fault of the fetch.
    pub fn fetch(&mut self, linear: u64) -> Result<Option<HostAddress>, Stop> {
        let piece = self.piece(linear, Access::Execute, self.plain_view)?;
        Ok(match piece.place {
            crate::mmu::Place::Ram { host, .. } => Some(host.page_start()),
            crate::mmu::Place::Device => None,
        })
    }

    /// Whether the page of an instruction that was just fetched is in the upper half of the address space and not
    /// global.
    pub fn fetched_locally(&self, linear: u64) -> bool {
        self.tlb.is_local(self.plain_view, linear)
    }

    /// Guest-physical address of an instruction.
    ///
    /// # Errors
    /// A fault of the fetch.
    pub fn fetch_physical(&mut self, linear: u64) -> Result<u64, Stop> {
        Ok(self
            .translate(linear, Access::Execute, self.plain_view)?
            .gpa)
    }

    /// Translates the address of an access of `size` bytes, which lie in one page, with the rights of the
    /// current view. `None` if it can't be done by a plain load or store: a device is there, or someone traces
    /// writes.
    ///
    /// # Errors
    /// The access's fault.
    pub fn resolve(
        &mut self,
        linear: u64,
        size: u64,
        access: Access,
        segment: u8,
    ) -> Result<Option<Target>, Stop> {
        self.check_explicit(linear, segment, size, access)?;
        let view = self.plain_view;
        let piece = self.piece(linear, access, view)?;
        let crate::mmu::Place::Ram { host, traced } = piece.place else {
            return Ok(None);
        };
        if traced && access == Access::Write {
            return Ok(None);
        }
        Ok(Some(Target {
            page: host.page_start(),
            read: self.tlb.find(view, Access::Read, linear, 1).is_some(),
            write: self.tlb.find(view, Access::Write, linear, 1).is_some(),
            local: self.tlb.is_local(view, linear),
        }))
    }

    /// Whether the translation of an address for reading, by plain loads, is cached. After [`Self::resolve`] gave
    /// `None` this tells memory whose writes are traced from a device.
    pub fn has_readable(&self, linear: u64) -> bool {
        self.tlb
            .find(self.plain_view, Access::Read, linear, 1)
            .is_some()
    }

    /// Wants to hear of writes to code at guest-physical `gpa`, in one page. Mark first, then read: a
    /// write in between is then seen.
    pub fn watch_code(&mut self, gpa: u64, length: u64) {
        let Some(page) = self.memory.page_index(gpa) else {
            return;
        };
        // In this order: see `TraceListener::wants`.
        self.code.add(gpa, length.min(PAGE_SIZE - gpa % PAGE_SIZE));
        let before = self.memory.traces().set(page, TraceFlags::CODE);
        if !before.contains(TraceFlags::CODE)
            && let Some(host) = self.memory.host(gpa)
        {
            self.tlb.revoke_write(host.page_start());
        }
    }

    /// Whether watched code was written over and the code made of it not yet thrown away.
    pub fn has_stale_code(&self) -> bool {
        self.code.has_stale()
    }

    /// The op of the first instruction of `bytes`, and its length; `None` if they do not hold a whole one,
    /// or all ops must be thrown away first ([`Interpreter::clear`]).
    pub fn lower_one(&mut self, bytes: &[u8]) -> Option<Op> {
        decode(self, bytes, 1).ok().map(|decoded| decoded.ops[0])
    }
}
