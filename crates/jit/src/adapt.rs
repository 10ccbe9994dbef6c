//! Instructions that turn out not to be what they were taken for, and are translated again.
//!
//! Accesses relative to RSP, and those in loops, use a cached translation that they need not look for, since most go
//! to the same page as the last. If one does not, or if two take it from each other, as when a frame lies across the
//! end of a page, they use the table instead. Others use the table, where two pages may want the same entry; if one
//! loses it all the time, it gets a translation without an index. And one that often lies across the end of a page is
//! made ready for that: see [`crate::crossing`].
//!
//! A unit ends at a CALL, since most calls are made once or never, and what comes after them is often jumped to as well. After one
//! that returns all the time the unit goes on.

use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

/// Misses of a kind before the last of them is looked at; and returns.
pub(crate) const PATIENCE: [u32; Lesson::COUNT] = [1024, 1024, 1024, 8192];
/// If so many miss in less time than this, it is worth doing something about it.
const OFTEN: Duration = Duration::from_millis(2);
/// Instructions that are remembered before all are forgotten.
const MOST: usize = 1 << 14;

/// What was learnt of an instruction: where its access missed, and how. The later ones say more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(crate) enum Lesson {
    /// In the table: another page wants the same entry.
    Crowded,
    /// In a slot: it goes to several pages, or shares the slot with one that goes to another.
    Wanders,
    /// Anywhere: it lies across the end of a page.
    Crosses,
    /// No access: a CALL that a RET came back to, known by its return address.
    Returns,
}

impl Lesson {
    /// How many there are.
    pub(crate) const COUNT: usize = 4;
}

/// What is known of an instruction's accesses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Noted {
    /// Its offset on its page.
    pub(crate) offset: u16,
    pub(crate) lesson: Lesson,
    /// The first unit that was translated by somebody who knew.
    since: u64,
}

/// What was learnt.
#[derive(Debug)]
pub(crate) struct Lessons {
    /// By guest-physical page.
    pages: FxHashMap<u64, Vec<Noted>>,
    count: usize,
    /// When patience with each kind ended last.
    last: [Option<Instant>; Lesson::COUNT],
    /// It ends often if in less time than this after the last end.
    pub(crate) often: Duration,
}

impl Default for Lessons {
    fn default() -> Self {
        Self {
            pages: FxHashMap::default(),
            count: 0,
            last: [None; Lesson::COUNT],
            often: OFTEN,
        }
    }
}

impl Lessons {
    /// What is known of the instructions on a page.
    pub(crate) fn on_page(&self, gpa: u64) -> &[Noted] {
        self.pages.get(&(gpa >> 12)).map_or(&[], |noted| noted)
    }

    /// Whether patience ends often; asked each time that it ends.
    pub(crate) fn is_often(&mut self, lesson: Lesson) -> bool {
        let now = Instant::now();
        let last = self.last[lesson as usize].replace(now);
        last.is_some_and(|last| now.duration_since(last) < self.often)
    }

    /// Remembers an instruction of a unit, by the number of the unit and that of the next one to be translated. `false` if that
    /// changes nothing: the unit takes it for this, or more, already. An instruction may be in several units.
    pub(crate) fn note(
        &mut self,
        gpa: u64,
        rip: u64,
        lesson: Lesson,
        unit: u64,
        next_unit: u64,
    ) -> bool {
        if self.count == MOST {
            self.pages.clear();
            self.count = 0;
        }
        let offset = (rip & 0xfff) as u16;
        let noted = self.pages.entry(gpa >> 12).or_default();
        let returns = lesson == Lesson::Returns;
        let same = |noted: &&mut Noted| {
            noted.offset == offset && (noted.lesson == Lesson::Returns) == returns
        };
        match noted.iter_mut().find(same) {
            Some(known) if known.lesson >= lesson => unit < known.since,
            Some(known) => {
                known.lesson = lesson;
                known.since = next_unit;
                true
            }
            None => {
                noted.push(Noted {
                    offset,
                    lesson,
                    since: next_unit,
                });
                self.count += 1;
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn on_page(lessons: &Lessons, gpa: u64) -> Vec<(u16, Lesson)> {
        let noted = lessons.on_page(gpa).iter();
        noted.map(|noted| (noted.offset, noted.lesson)).collect()
    }

    #[test]
    fn instruction_is_noted_once_and_found_by_its_page() {
        let mut lessons = Lessons::default();
        assert!(lessons.note(0x5000, 0xffff_8000_0000_0123, Lesson::Wanders, 3, 8));
        assert!(!lessons.note(0x5000, 0x123, Lesson::Wanders, 8, 9));
        assert!(lessons.note(0x6000, 0x123, Lesson::Wanders, 8, 9));
        assert_eq!(on_page(&lessons, 0x5fff), [(0x123, Lesson::Wanders)]);
        assert!(lessons.on_page(0x7000).is_empty());
    }

    #[test]
    fn instruction_changes_its_mind_once_for_each_lesson() {
        let mut lessons = Lessons::default();
        assert!(lessons.note(0, 1, Lesson::Crowded, 0, 1));
        assert!(lessons.note(0, 1, Lesson::Wanders, 1, 2));
        assert!(!lessons.note(0, 1, Lesson::Crowded, 2, 3));
        assert!(lessons.note(0, 1, Lesson::Crosses, 2, 3));
        assert!(!lessons.note(0, 1, Lesson::Wanders, 3, 4));
        assert_eq!(on_page(&lessons, 0), [(1, Lesson::Crosses)]);
    }

    #[test]
    fn each_unit_that_did_not_know_learns_it() {
        let mut lessons = Lessons::default();
        assert!(lessons.note(0, 1, Lesson::Crosses, 5, 8));
        assert!(lessons.note(0, 1, Lesson::Crosses, 7, 9));
        assert!(lessons.note(0, 1, Lesson::Wanders, 3, 9));
        assert!(!lessons.note(0, 1, Lesson::Crosses, 8, 9));
    }

    #[test]
    fn memory_for_instructions_is_bounded() {
        let mut lessons = Lessons::default();
        for number in 0..3 * MOST as u64 {
            lessons.note(number << 12, 0, Lesson::Wanders, 0, 1);
        }
        assert!(lessons.pages.len() <= MOST);
    }

    #[test]
    fn first_end_of_patience_is_not_often() {
        assert!(!Lessons::default().is_often(Lesson::Crowded));
    }
}
