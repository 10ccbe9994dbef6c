//! Which mapping of each page of code is in force: host code asks when it goes to another page.
//!
//! Pages share slots, so a slot is only ever right or empty. A program with its libraries has thousands of pages of code, and a load of CR3 puts
//! away what the lower half has and takes out what it had in the new space: so it is known which slots are used.

use std::mem::offset_of;

/// Slots for each half of the address space: 32 MiB of code. With 512 for the lower half a compiler or a data base left
/// translated code a hundred thousand times a second; two pages of a kernel may lie as far apart.
const SLOTS: usize = 8192;

/// Numbers of mappings by page; 0 is none.
#[repr(C)]
pub(crate) struct Pages {
    user: Half,
    kernel: Half,
}

/// The slots of one half of the address space.
#[repr(C)]
struct Half {
    slots: [u32; SLOTS],
    /// A bit for each slot, set if it may hold something.
    used: [u64; SLOTS / 64],
}

impl Half {
    const EMPTY: Self = Self {
        slots: [0; SLOTS],
        used: [0; SLOTS / 64],
    };

    fn set(&mut self, slot: usize, mapping: u32) {
        self.slots[slot] = mapping;
        self.used[slot / 64] |= 1 << (slot % 64);
    }

    fn empty(&mut self) {
        for (word, used) in self.used.iter_mut().enumerate() {
            for slot in bits(word, std::mem::take(used)) {
                self.slots[slot] = 0;
            }
        }
    }

    fn exchange(&mut self, with: &mut Self) {
        let used = self.used.iter_mut().zip(&mut with.used);
        for (word, (used, other)) in used.enumerate() {
            for slot in bits(word, *used | *other) {
                std::mem::swap(&mut self.slots[slot], &mut with.slots[slot]);
            }
            std::mem::swap(used, other);
        }
    }
}

/// The slots whose bits are set in a word of them.
fn bits(word: usize, mut left: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = left.trailing_zeros() as usize;
        left &= left.wrapping_sub(1);
        (bit < 64).then_some(word * 64 + bit)
    })
}

impl Pages {
    /// Which half of the address space, and which slot in it.
    fn slot(linear: u64) -> (bool, usize) {
        let page = (linear >> 12) as usize;
        (linear >> 63 != 0, page % SLOTS)
    }

    /// Where a page's slot lies.
    pub(crate) fn offset(linear: u64) -> usize {
        let (upper, slot) = Self::slot(linear);
        let half = if upper {
            offset_of!(Self, kernel)
        } else {
            offset_of!(Self, user)
        };
        // The slots come first.
        half + slot * size_of::<u32>()
    }

    /// What a page's slot holds.
    pub(crate) fn get(&self, linear: u64) -> u32 {
        match Self::slot(linear) {
            (false, slot) => self.user.slots[slot],
            (true, slot) => self.kernel.slots[slot],
        }
    }

    /// A mapping of a page is in force.
    pub(crate) fn set(&mut self, linear: u64, mapping: u32) {
        match Self::slot(linear) {
            (false, slot) => self.user.set(slot, mapping),
            (true, slot) => self.kernel.set(slot, mapping),
        }
    }

    /// None of a page's may be.
    pub(crate) fn forget(&mut self, linear: u64) {
        match Self::slot(linear) {
            (false, slot) => self.user.slots[slot] = 0,
            (true, slot) => self.kernel.slots[slot] = 0,
        }
    }

    /// None of a half's may be: the lower half is 0, the upper 1.
    pub(crate) fn forget_half(&mut self, half: usize) {
        match half {
            0 => self.user.empty(),
            _ => self.kernel.empty(),
        }
    }

    /// None may be.
    pub(crate) fn clear(&mut self) {
        self.forget_half(0);
        self.forget_half(1);
    }
}

/// The lower half's slots of a space that is not the current one.
pub(crate) struct PutAway(Box<Half>);

impl PutAway {
    /// Nothing.
    pub(crate) fn new() -> Self {
        Self(Box::new(Half::EMPTY))
    }

    /// Becomes nothing.
    pub(crate) fn clear(&mut self) {
        self.0.empty();
    }

    /// Forgets a page of the lower half.
    pub(crate) fn forget(&mut self, linear: u64) {
        let (_, slot) = Pages::slot(linear);
        self.0.slots[slot] = 0;
    }

    /// Changes places with what is in force.
    pub(crate) fn exchange(&mut self, pages: &mut Pages) {
        self.0.exchange(&mut pages.user);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [u64; 4] = [0x1000, 0x40_0000, 0x7fff_ffff_f000, 0xffff_ffff_8100_0000];

    fn pages() -> Box<Pages> {
        Box::new(Pages {
            user: Half::EMPTY,
            kernel: Half::EMPTY,
        })
    }

    fn held(pages: &Pages) -> [u32; 4] {
        ALL.map(|linear| pages.get(linear))
    }

    #[test]
    fn space_that_comes_back_finds_its_pages_as_it_left_them() {
        let mut pages = pages();
        let mut away = PutAway::new();
        for (linear, mapping) in ALL.into_iter().zip(1..) {
            pages.set(linear, mapping);
        }
        away.exchange(&mut pages);
        // The upper half is every space's.
        assert_eq!(held(&pages), [0, 0, 0, 4]);
        pages.set(ALL[1], 9);
        away.forget(ALL[0]);
        away.exchange(&mut pages);
        assert_eq!(held(&pages), [0, 2, 3, 4]);
        away.exchange(&mut pages);
        assert_eq!(held(&pages), [0, 9, 0, 4]);
        away.clear();
        away.exchange(&mut pages);
        assert_eq!(held(&pages), [0, 0, 0, 4]);
        pages.clear();
        assert_eq!(held(&pages), [0; 4]);
    }

    #[test]
    fn page_that_is_forgotten_and_comes_again_is_put_away_once() {
        let mut pages = pages();
        let mut away = PutAway::new();
        for mapping in 1..4 {
            pages.set(ALL[0], mapping);
            pages.forget(ALL[0]);
        }
        pages.set(ALL[0], 5);
        away.exchange(&mut pages);
        away.exchange(&mut pages);
        assert_eq!(held(&pages), [5, 0, 0, 0]);
    }
}
