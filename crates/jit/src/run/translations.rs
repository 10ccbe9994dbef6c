//! Translations that host code uses: copies of what the processor's TLB holds.

use trapgate_interp::Target;

use crate::context::{Context, MOST_LOCAL, Slots, Table, VIEWS};
use crate::unit::Site;

/// Pages that are looked for in the slots one by one, when they are forgotten.
const FEW: usize = 4;

impl Context {
    /// Keeps the translation of a site's access in the table.
    pub(super) fn keep(&mut self, site: &Site, linear: u64, target: &Target) {
        let view = site.mode.view();
        let host = target.page.as_ptr() as u64;
        let rights = (target.read, target.write);
        if let Some(watch) = &mut self.rust.watch {
            watch.resolved(site, linear, host);
        }
        Table::of(&mut self.tlbs, view).insert(linear, host, rights);
        // What is not there in every address space.
        if target.local || linear >> 63 == 0 {
            self.local[view].push(linear);
        }
        if self.interp.cpu.changes().any {
            self.apply_changes();
        }
    }

    /// Keeps the translations of both pages of a site's access, which the interpreter has just done.
    pub(super) fn keep_both(&mut self, site: &Site, linear: u64) {
        let last = linear.wrapping_add(u64::from(site.size) - 1);
        for linear in [linear, last] {
            let cpu = &mut self.interp.cpu;
            if let Ok(Some(target)) = cpu.resolve(linear, 1, site.access(), site.segment)
                && site.is_allowed(&target)
            {
                self.keep(site, linear, &target);
            }
        }
    }

    pub(super) fn clear_translations(&mut self) {
        self.clear_tables();
        for local in &mut self.local {
            local.count = 0;
        }
        self.pages.clear();
        self.rust.spaces.clear();
        self.rust.local_code.clear();
    }

    /// Forgets the translations in tables and slots.
    pub(super) fn clear_tables(&mut self) {
        for view in 0..VIEWS {
            Table::of(&mut self.tlbs, view).clear();
            Slots(&mut self.slots[view]).clear(self.unmatched);
        }
    }

    /// Forgets the translations that are not of every address space.
    pub(super) fn forget_local(&mut self) {
        for view in 0..VIEWS {
            let mut table = Table::of(&mut self.tlbs, view);
            let mut slots = Slots(&mut self.slots[view]);
            let local = &mut self.local[view];
            if local.is_full() {
                table.clear();
            }
            let few = local.list().len() <= FEW;
            for &linear in local.list() {
                table.clear_page(linear);
                if few {
                    slots.clear_page(linear, self.unmatched);
                }
            }
            if !few {
                slots.clear(self.unmatched);
            }
            local.count = 0;
        }
    }

    /// Forgets what the processor's TLB forgot.
    pub(super) fn apply_changes(&mut self) {
        let unmatched = self.unmatched;
        let changes = self.interp.cpu.changes();
        if !changes.any {
            return;
        }
        let (all, space) = (changes.all, changes.space);
        if let Some(watch) = &mut self.rust.watch {
            watch.forget(changes);
        }
        if !all {
            for view in 0..VIEWS {
                let mut tlb = Table::of(&mut self.tlbs, view);
                for &linear in &changes.pages {
                    tlb.clear_page(linear);
                }
                for &host in &changes.revoked {
                    tlb.revoke_write(host);
                }
            }
            for mut slots in self.slots.iter_mut().map(Slots) {
                for &linear in &changes.pages {
                    slots.clear_page(linear, unmatched);
                }
                for &host in &changes.revoked {
                    slots.revoke_write(host, unmatched);
                }
            }
            for &linear in &changes.pages {
                self.pages.forget(linear);
                self.rust.spaces.clear_code_page(linear);
            }
        }
        changes.clear();
        let tag = self.interp.cpu.space();
        if all {
            self.clear_translations();
        } else if space && tag != self.rust.space {
            self.forget_local();
            if self.rust.local_code.len() >= MOST_LOCAL {
                self.pages.forget_half(1);
            }
            for linear in self.rust.local_code.drain(..) {
                self.pages.forget(linear);
            }
            let pages = &mut self.pages;
            self.rust.spaces.exchange(self.rust.space, tag, pages);
        }
        self.rust.space = tag;
    }
}
