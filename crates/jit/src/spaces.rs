//! Code pages of address spaces that are not the current one: a process that gets the processor back finds them as it
//! left them. Its translations of data are in the processor's TLB, from which host code fetches them as it needs them:
//! that is cheaper than to copy tables, of which little is used before the next switch.

use crate::code_pages::{Pages, PutAway};

/// Address spaces that are kept.
const MOST: usize = 8;

struct Space {
    /// The processor's tag for it.
    tag: u64,
    pages: PutAway,
    /// When it was put here.
    age: u64,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Spaces {
    kept: Vec<Space>,
    age: u64,
}

impl Spaces {
    pub(crate) fn clear(&mut self) {
        for space in &mut self.kept {
            // No tag: they are never given out as zero.
            space.tag = 0;
        }
    }

    /// Forgets a code page.
    pub(crate) fn clear_code_page(&mut self, linear: u64) {
        if linear >> 63 == 0 {
            for space in &mut self.kept {
                space.pages.forget(linear);
            }
        }
    }

    /// Puts away the code pages of the space with tag `old`, and replaces them by those of `new`; none if they are not kept.
    pub(crate) fn exchange(&mut self, old: u64, new: u64, pages: &mut Pages) {
        self.age += 1;
        let found = self
            .kept
            .iter()
            .position(|space| space.tag == new && new != 0);
        let place = match found {
            // The new one's place is free now.
            Some(place) => place,
            None => {
                if self.kept.len() < MOST {
                    self.kept.push(Space {
                        tag: 0,
                        pages: PutAway::new(),
                        age: 0,
                    });
                }
                let oldest = (0..self.kept.len()).min_by_key(|&place| self.kept[place].age);
                let place = oldest.unwrap_or(0);
                self.kept[place].pages.clear();
                place
            }
        };
        let space = &mut self.kept[place];
        space.tag = old;
        space.age = self.age;
        space.pages.exchange(pages);
    }
}
