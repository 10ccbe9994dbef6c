//! How much translated code is kept before all of it is thrown away.
//!
//! A Linux machine that boots and works makes do with what there is at first. A compiler of 30 MiB runs through more code than that for
//! each function that it compiles: all was thrown away once a second, and nine tenths of the time were translation. So if
//! translation again takes much of the time from one such moment to the next, there is room for twice as much, as far as
//! the guest's own memory makes that seem little; and half of it goes again when it is not needed any more.

use crate::clock::host_counter;

/// Bytes of host code.
const CODE: usize = 32 << 20;
/// Bytes of host code and of the lists that go with it. Code that compilers make has lists
/// nearly as large as its host code; a guest can make code whose lists are several times as large.
const CODE_AND_LISTS: usize = 52 << 20;
/// Mappings of code pages, and units: what a hash table with 2¹⁷ places holds.
const UNITS: usize = 7 << 14;
/// How many times as much there may be.
const MOST_TIMES: usize = 8;
/// Of the guest's memory, code and lists take at most one part of so many, if they take more than at first.
const PART: u64 = 4;
/// Translation takes too much if it takes one part of so many of the time, twice at a stretch: once may be a program that begins.
const TOO_MUCH: u64 = 4;

/// What is kept at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Bytes of host code.
    pub(crate) code: usize,
    /// Bytes of host code and its lists.
    pub(crate) bytes: usize,
    /// Units, and mappings of code pages.
    pub(crate) units: usize,
}

impl Limits {
    const fn times(times: usize) -> Self {
        Self {
            code: CODE * times,
            bytes: CODE_AND_LISTS * times,
            units: UNITS * times,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Room {
    least: usize,
    times: usize,
    most: usize,
    /// When all was thrown away last, and how long translation took since then, in ticks of the host's time-stamp counter.
    since: u64,
    translating: u64,
    was_too_much: bool,
}

impl Room {
    /// For a guest with so many bytes of memory.
    pub(crate) fn new(memory: u64) -> Self {
        let most = (1..=MOST_TIMES)
            .filter(|times| times.is_power_of_two())
            .rfind(|times| (CODE_AND_LISTS * times) as u64 <= memory / PART);
        Self::between(1, most.unwrap_or(1))
    }

    /// As much from the start as there may be.
    pub(crate) fn largest() -> Self {
        Self::between(MOST_TIMES, MOST_TIMES)
    }

    fn between(times: usize, most: usize) -> Self {
        Self {
            least: times,
            times,
            most,
            since: host_counter(),
            translating: 0,
            was_too_much: false,
        }
    }

    /// What is kept now.
    pub(crate) fn limits(&self) -> Limits {
        Limits::times(self.times)
    }

    /// What may come to be kept.
    pub(crate) fn most(&self) -> Limits {
        Limits::times(self.most)
    }

    /// Something was translated, from `begun` until now.
    pub(crate) fn translated(&mut self, begun: u64) {
        self.translating += host_counter().wrapping_sub(begun);
    }

    /// There was no more room, and all is thrown away.
    pub(crate) fn is_full(&mut self) {
        let now = host_counter();
        let passed = now.wrapping_sub(self.since);
        self.since = now;
        self.decide(passed);
    }

    fn decide(&mut self, passed: u64) {
        let too_much = std::mem::take(&mut self.translating) > passed / TOO_MUCH;
        if too_much && self.was_too_much {
            self.times = self.most.min(self.times * 2);
        } else if !too_much && !self.was_too_much {
            self.times = self.least.max(self.times / 2);
        }
        self.was_too_much = too_much;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(room: &mut Room, translating: u64, passed: u64) -> usize {
        room.translating = translating;
        room.decide(passed);
        room.times
    }

    #[test]
    fn code_takes_no_more_than_a_part_of_the_guest_s_memory_or_what_it_has_at_first() {
        for (mib, times) in [
            (16, 1),
            (256, 1),
            (512, 2),
            (1024, 4),
            (2048, 8),
            (1 << 20, 8),
        ] {
            let room = Room::new(mib << 20);
            assert_eq!(room.limits(), Limits::times(1));
            assert_eq!(room.most(), Limits::times(times), "{mib}");
        }
    }

    #[test]
    fn there_is_more_room_when_translation_takes_much_of_the_time_twice_and_less_when_it_does_not()
    {
        let mut room = Room::new(1 << 30);
        let shares = [40, 10, 40, 40, 10, 40, 40, 40, 40, 24, 24, 24, 24];
        let times = [1, 1, 1, 2, 2, 2, 4, 4, 4, 4, 2, 1, 1];
        for (share, times) in shares.into_iter().zip(times) {
            assert_eq!(after(&mut room, share, 100), times);
        }
    }
}
