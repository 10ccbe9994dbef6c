//! Following pointers, each of which has to be loaded before the next.

use crate::Work;
use crate::random::mix;

/// A cache line with the index of the next.
#[derive(Clone)]
#[repr(align(64))]
struct Line {
    next: u64,
}

/// The lines are a ring: a linear congruential generator whose period is all of a power of two (Hull, Dobell
/// 1962). Its order is none that a prefetcher knows.
#[derive(Clone, Copy)]
struct Step {
    factor: u64,
    add: u64,
}

const STEP: Step = Step {
    factor: 0xd134_2543_de82_ef95,
    add: 0x2545_f491,
};

impl Step {
    fn of(self, at: u64) -> u64 {
        at.wrapping_mul(self.factor).wrapping_add(self.add)
    }

    /// `count` such steps in one.
    fn times(self, count: u64) -> Self {
        let (mut all, mut power) = (Step { factor: 1, add: 0 }, self);
        for bit in 0..64 {
            if count >> bit & 1 == 1 {
                all = power.after(all);
            }
            power = power.after(power);
        }
        all
    }

    fn after(self, first: Self) -> Self {
        Step {
            factor: first.factor.wrapping_mul(self.factor),
            add: self.of(first.add),
        }
    }
}

/// `bytes` is a power of two.
pub(crate) fn chase(bytes: u64, steps: u64) -> Work {
    let mask = bytes / 64 - 1;
    let ring: Vec<Line> = (0..=mask)
        .map(|index| Line {
            next: STEP.of(index) & mask,
        })
        .collect();
    let steps = steps / 16 * 16;
    // Goes on from where it was: what is in the caches is not where it comes next.
    let mut at = 0;
    Box::new(move || {
        let end = STEP.times(steps).of(at) & mask;
        for _ in 0..steps / 16 {
            for _ in 0..16 {
                at = ring[at as usize].next;
            }
        }
        if at == end {
            Ok(mix(mask, steps))
        } else {
            Err(format!("came to line {at} and not to {end}"))
        }
    })
}
