//! Instructions that turn out not to be what they were taken for, and are translated again.
//!
//! Accesses relative to RSP, and those in loops, use a cached translation that they need not look for, since most go
//! to the same page as the last. If one does not, or if two take it from each other, as when a frame lies across the
//! end of a page, they use the table instead.

use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

/// Accesses that miss their slot before the last of them is looked at.
pub(crate) const PATIENCE: u32 = 1024;
/// If so many miss in less time than this, it is worth doing something about it.
const OFTEN: Duration = Duration::from_millis(2);
/// Instructions that are remembered before all are forgotten.
const MOST: usize = 1 << 16;

/// Instructions whose accesses go to several pages.
#[derive(Debug, Default)]
pub(crate) struct Wandering {
    /// Their offsets, by guest-physical page.
    pages: FxHashMap<u64, Vec<u16>>,
    count: usize,
    /// When patience ended last.
    last: Option<Instant>,
}

impl Wandering {
    /// Offsets of the instructions on a page.
    pub(crate) fn on_page(&self, gpa: u64) -> &[u16] {
        self.pages.get(&(gpa >> 12)).map_or(&[], |offsets| offsets)
    }

    /// Whether patience ends often; asked each time that it ends.
    pub(crate) fn is_often(&mut self) -> bool {
        let now = Instant::now();
        let last = self.last.replace(now);
        last.is_some_and(|last| now.duration_since(last) < OFTEN)
    }

    /// Remembers an instruction; `false` if it is known.
    pub(crate) fn note(&mut self, gpa: u64, rip: u64) -> bool {
        if self.count == MOST {
            self.pages.clear();
            self.count = 0;
        }
        let offset = (rip & 0xfff) as u16;
        let offsets = self.pages.entry(gpa >> 12).or_default();
        if offsets.contains(&offset) {
            return false;
        }
        offsets.push(offset);
        self.count += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_is_noted_once_and_found_by_its_page() {
        let mut wandering = Wandering::default();
        assert!(wandering.note(0x5000, 0xffff_8000_0000_0123));
        assert!(!wandering.note(0x5000, 0x123));
        assert!(wandering.note(0x6000, 0x123));
        assert_eq!(wandering.on_page(0x5fff), [0x123]);
        assert!(wandering.on_page(0x7000).is_empty());
    }

    #[test]
    fn memory_for_instructions_is_bounded() {
        let mut wandering = Wandering::default();
        for number in 0..3 * MOST as u64 {
            wandering.note(number << 12, 0);
        }
        assert!(wandering.pages.len() <= MOST);
    }

    #[test]
    fn first_end_of_patience_is_not_often() {
        assert!(!Wandering::default().is_often());
    }
}
