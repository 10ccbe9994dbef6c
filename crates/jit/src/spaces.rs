//! Translations of address spaces that are not the current one: a process that gets the processor back finds
//! its translations as it left them.

use crate::context::{ACCESS_TLB, Entry, Table, USER_PAGES, USER_TLB};

/// Address spaces that are kept.
const MOST: usize = 8;

/// What belongs to one address space.
pub(crate) struct Parts<'a> {
    /// The table of a supervisor with access to user pages.
    pub(crate) access: &'a mut [Entry],
    /// The user's.
    pub(crate) user: &'a mut [Entry],
    /// Code pages of the lower half.
    pub(crate) pages: &'a mut [u32; USER_PAGES],
}

struct Space {
    /// The processor's tag for it.
    tag: u64,
    access: [Entry; ACCESS_TLB],
    user: [Entry; USER_TLB],
    pages: [u32; USER_PAGES],
    /// When it was put here.
    age: u64,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Spaces {
    kept: Vec<Box<Space>>,
    age: u64,
}

impl Spaces {
    pub(crate) fn clear(&mut self) {
        for space in &mut self.kept {
            // No tag: they are never given out as zero.
            space.tag = 0;
        }
    }

    /// All tables.
    pub(crate) fn tables(&mut self) -> impl Iterator<Item = Table<'_>> {
        self.kept
            .iter_mut()
            .filter(|space| space.tag != 0)
            .flat_map(|space| [Table(&mut space.access), Table(&mut space.user)])
    }

    /// Forgets a code page.
    pub(crate) fn clear_code_page(&mut self, linear: u64) {
        if linear >> 63 == 0 {
            let slot = (linear >> 12) as usize % USER_PAGES;
            for space in &mut self.kept {
                space.pages[slot] = 0;
            }
        }
    }

    /// Puts away the parts of the space with tag `old`, and replaces them by those of `new`; empty ones if they
    /// are not kept.
    pub(crate) fn exchange(&mut self, old: u64, new: u64, parts: Parts<'_>) {
        self.age += 1;
        let found = self
            .kept
            .iter()
            .position(|space| space.tag == new && new != 0);
        let place = self
            .kept
            .iter()
            .position(|space| space.tag == old || space.tag == 0)
            .filter(|&place| Some(place) != found);
        let place = match place {
            Some(place) => place,
            None if self.kept.len() < MOST => {
                self.kept.push(Box::new(Space {
                    tag: 0,
                    access: [Entry::default(); ACCESS_TLB],
                    user: [Entry::default(); USER_TLB],
                    pages: [0; USER_PAGES],
                    age: 0,
                }));
                self.kept.len() - 1
            }
            None => {
                let others = (0..self.kept.len()).filter(|&place| Some(place) != found);
                let oldest = others.min_by_key(|&place| self.kept[place].age);
                oldest.unwrap_or(0)
            }
        };
        let space = &mut self.kept[place];
        space.tag = old;
        space.age = self.age;
        space.access.copy_from_slice(parts.access);
        space.user.copy_from_slice(parts.user);
        space.pages.copy_from_slice(parts.pages);
        match found {
            Some(found) => {
                let space = &mut self.kept[found];
                space.age = self.age;
                parts.access.copy_from_slice(&space.access);
                parts.user.copy_from_slice(&space.user);
                parts.pages.copy_from_slice(&space.pages);
            }
            None => {
                Table(parts.access).clear();
                Table(parts.user).clear();
                parts.pages.fill(0);
            }
        }
    }
}
