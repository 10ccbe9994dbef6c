//! How the guest's TSC follows VM time.
//!
//! VM time is the host's monotonic clock without pauses. The guest's TSC under KVM is the host's TSC, scaled,
//! plus an offset; it goes on during a pause, and its ticks are not exactly those of the
//! monotonic clock, which the host's NTP may slew. So:
//!
//! - `TSC = scaled host TSC + lead + state's offset`, where the *lead* is the machine's: the same
//!   number for all of its processors, so that their TSCs stay as far apart as their states say.
//! - While the machine runs the lead stays as it is: the guest's TSC is never touched.
//! - When a processor leaves the guest, the lead that VM time asks for is noted. The
//!   difference is drift, and goes into the offsets of the states that are taken out: a TSC never goes
//!   back because a machine was moved.
//! - When a processor enters the guest and finds that the machine was paused, which it sees from VM time
//!   having fallen behind the monotonic clock, the lead is worked out anew.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Ticks of the TSC in a time.
pub(crate) fn ticks(nanoseconds: u64, hz: u64) -> u64 {
    (u128::from(nanoseconds) * u128::from(hz) / 1_000_000_000) as u64
}

/// From one pause to the next.
#[derive(Clone, Copy, Debug)]
struct Stretch {
    /// The lead that processors run with.
    lead: u64,
    /// The lead that was right when a processor last left the guest.
    latest: u64,
}

#[derive(Debug, Default)]
struct Lag {
    /// Nanoseconds by which VM time is behind the monotonic clock: at least, at most. What is
    /// known about one number, which changes with a pause only.
    range: (i64, i64),
    /// All of them, since a processor may have slept through some: a few bytes for each pause.
    stretches: Vec<Stretch>,
}

/// The relation of VM time and the host's TSC, for all processors of a machine.
#[derive(Debug)]
pub(crate) struct Pace {
    base: Instant,
    lag: Mutex<Lag>,
}

impl Pace {
    pub(crate) fn new() -> Self {
        Self {
            base: Instant::now(),
            lag: Mutex::default(),
        }
    }

    fn lag(&self) -> MutexGuard<'_, Lag> {
        self.lag.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A processor enters the guest. `clock` reads VM time; `lead` works out the lead that is right now,
    /// from a clock. Gives the number of the stretch between two pauses, from 1, and its lead.
    pub(crate) fn enter<E>(
        &self,
        clock: &mut dyn FnMut() -> u64,
        lead: impl FnOnce(&mut dyn FnMut() -> u64) -> Result<u64, E>,
    ) -> Result<(usize, u64), E> {
        let mut lag = self.lag();
        let before = self.base.elapsed().as_nanos() as i64;
        let now = clock() as i64;
        let after = self.base.elapsed().as_nanos() as i64;
        // Negative where the machine began elsewhere, long before this process.
        let (least, most) = (before.wrapping_sub(now), after.wrapping_sub(now));
        let number = lag.stretches.len();
        if let Some(stretch) = lag.stretches.last().copied() {
            let common = (lag.range.0.max(least), lag.range.1.min(most));
            if common.0 <= common.1 {
                lag.range = common;
                return Ok((number, stretch.lead));
            }
        }
        let lead = lead(clock)?;
        lag.range = (least, most);
        lag.stretches.push(Stretch { lead, latest: lead });
        Ok((number + 1, lead))
    }

    /// A processor has left the guest, when `lead` would have been right.
    pub(crate) fn leave(&self, lead: u64) {
        if let Some(stretch) = self.lag().stretches.last_mut() {
            stretch.latest = lead;
        }
    }

    /// The lead that was right when a processor last left the guest, before the pause after stretch
    /// `number`.
    pub(crate) fn latest(&self, number: usize) -> Option<u64> {
        let lag = self.lag();
        let stretch = lag.stretches.get(number.checked_sub(1)?)?;
        Some(stretch.latest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(pace: &Pace, clock: impl Fn() -> u64, lead: u64) -> (usize, u64) {
        let mut clock = clock;
        let entered: Result<_, ()> = pace.enter(&mut clock, |_| Ok(lead));
        entered.unwrap()
    }

    #[test]
    fn lead_changes_with_a_pause_only() {
        let pace = Pace::new();
        let host = || pace.base.elapsed().as_nanos() as u64;
        let running = || host().wrapping_sub(5);
        assert_eq!(enter(&pace, running, 100), (1, 100));
        assert_eq!(enter(&pace, running, 300), (1, 100));
        // A tenth of a second of which VM time knows nothing.
        let paused = || host().wrapping_sub(100_000_005);
        assert_eq!(enter(&pace, paused, 200), (2, 200));
        assert_eq!(enter(&pace, paused, 300), (2, 200));
    }

    #[test]
    fn drift_is_noted_and_moves_nothing() {
        let pace = Pace::new();
        let host = || pace.base.elapsed().as_nanos() as u64;
        // VM time may be ahead of this process.
        let running = || host() + (1 << 50);
        enter(&pace, running, 100);
        pace.leave(90);
        assert_eq!(pace.latest(1), Some(90));
        assert_eq!(enter(&pace, running, 300), (1, 100));
        enter(&pace, host, 200);
        assert_eq!((pace.latest(1), pace.latest(2)), (Some(90), Some(200)));
        assert_eq!((pace.latest(0), pace.latest(3)), (None, None));
    }

    #[test]
    fn ticks_do_not_overflow_in_a_century() {
        let century = 100 * 365 * 86_400 * 1_000_000_000;
        assert_eq!(ticks(century, 1_000_000_000), century);
        assert_eq!(ticks(3, 2_500_000_000), 7);
    }
}
