//! The one clock that everything in a machine reads.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Set in [`Clock::word`] while the clock stands still.
const PAUSED: u64 = 1 << 63;

/// VM time: nanoseconds since the machine was started or reset, without those in which it was
/// paused; and the time of day.
///
/// The time of day goes on in a pause, and while a machine is a snapshot. Those who ask for it afterwards
/// are told what it is (the real-time clock, KVM_WALL_CLOCK). A guest that counts on from what it read
/// earlier, as Linux does, is late until it looks again, as a computer is that slept.
#[derive(Debug)]
pub(crate) struct Clock {
    base: Instant,
    /// With [`PAUSED`]: the time at which the clock stands. Without: what is taken from the
    /// nanoseconds since `base` (modulo 2^63) to give the time. One word, so that a reader sees both parts of it
    /// or neither.
    word: AtomicU64,
    /// Moves on when the clock does after it stood still.
    epoch: AtomicU64,
    /// The host's time of day when the clock last stopped.
    stopped: AtomicU64,
}

impl Clock {
    /// A clock that stands at 0. `epoch` is in nanoseconds since 1970-01-01 UTC.
    pub(crate) fn new(epoch: u64) -> Self {
        Self {
            base: Instant::now(),
            word: AtomicU64::new(PAUSED),
            epoch: AtomicU64::new(epoch),
            stopped: AtomicU64::new(time_of_day()),
        }
    }

    /// A clock that stands at `now`, as one did that was saved.
    pub(crate) fn at(epoch: u64, now: u64) -> Self {
        Self {
            word: AtomicU64::new(now & !PAUSED | PAUSED),
            stopped: AtomicU64::new(epoch.saturating_add(now)),
            ..Self::new(epoch)
        }
    }

    fn host(&self) -> u64 {
        // 2^63 ns are 292 years.
        self.base.elapsed().as_nanos() as u64
    }

    /// Nanoseconds of VM time.
    pub(crate) fn now(&self) -> u64 {
        let word = self.word.load(Ordering::Acquire);
        if word & PAUSED != 0 {
            word & !PAUSED
        } else {
            // 63 bits with a sign: a clock that was restored may be ahead of the host's.
            let time = self.host().wrapping_sub(word) << 1;
            (time.cast_signed() >> 1).max(0).cast_unsigned()
        }
    }

    /// Time of day at VM time 0, nanoseconds since 1970-01-01 UTC.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Stops the clock. Only one thread at a time may call this, [`Self::resume`] and
    /// [`Self::restart`].
    pub(crate) fn pause(&self) {
        let now = self.now();
        self.word.store(now | PAUSED, Ordering::Release);
        self.stopped.store(time_of_day(), Ordering::Relaxed);
    }

    /// Lets the clock go on where it stands. Gives how far the time of day went on without it, in nanoseconds: zero
    /// if the host's was put back meanwhile.
    pub(crate) fn resume(&self) -> u64 {
        let away = time_of_day().saturating_sub(self.stopped.load(Ordering::Relaxed));
        self.epoch.fetch_add(away, Ordering::Relaxed);
        let now = self.now();
        let word = self.host().wrapping_sub(now) & !PAUSED;
        self.word.store(word, Ordering::Release);
        away
    }

    /// Puts a clock that is paused to 0; `epoch` is the host's time of day.
    pub(crate) fn restart(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Relaxed);
        self.stopped.store(epoch, Ordering::Relaxed);
        self.word.store(PAUSED, Ordering::Release);
    }
}

/// The host's time of day, nanoseconds since 1970-01-01 UTC.
pub(crate) fn time_of_day() -> u64 {
    // A host clock before 1970 is as good as none.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;
    use std::time::Duration;

    use super::*;

    #[test]
    fn clock_starts_at_zero_and_stands_still_until_it_is_let_go() {
        let clock = Clock::new(7);
        sleep(Duration::from_millis(2));
        assert_eq!((clock.now(), clock.epoch()), (0, 7));
    }

    #[test]
    fn pause_takes_no_time_on_the_clock() {
        let host = Instant::now();
        let clock = Clock::new(0);
        clock.resume();
        clock.pause();
        let before = clock.now();
        sleep(Duration::from_millis(20));
        assert_eq!(clock.now(), before);
        clock.resume();
        let after = clock.now();
        assert!(after >= before);
        assert!(Duration::from_nanos(after) + Duration::from_millis(20) <= host.elapsed());
    }

    #[test]
    fn restored_clock_goes_on_where_it_stood() {
        // Later than the host's own clock would be.
        let clock = Clock::at(7, 1 << 50);
        sleep(Duration::from_millis(2));
        assert_eq!((clock.now(), clock.epoch()), (1 << 50, 7));
        clock.resume();
        let now = clock.now();
        assert!((1 << 50..(1 << 50) + 60_000_000_000).contains(&now));
    }

    #[test]
    fn time_of_day_goes_on_in_a_pause() {
        let clock = Clock::new(time_of_day());
        assert!(clock.resume() < 60_000_000_000);
        clock.pause();
        let epoch = clock.epoch();
        sleep(Duration::from_millis(20));
        let away = clock.resume();
        assert!((20_000_000..60_000_000_000).contains(&away));
        assert_eq!(clock.epoch(), epoch + away);
    }

    #[test]
    fn time_of_day_goes_on_in_a_snapshot() {
        let (hour, now) = (3_600_000_000_000, 5_000_000_000);
        let epoch = time_of_day() - now - hour;
        let clock = Clock::at(epoch, now);
        assert!((hour..hour + 60_000_000_000).contains(&clock.resume()));
        // From a host whose clock is ahead.
        let clock = Clock::at(time_of_day() + hour, now);
        assert_eq!(clock.resume(), 0);
    }

    #[test]
    fn restart_begins_again_at_zero() {
        let clock = Clock::new(0);
        clock.resume();
        sleep(Duration::from_millis(2));
        clock.pause();
        assert!(clock.now() >= 2_000_000);
        clock.restart(99);
        assert_eq!((clock.now(), clock.epoch()), (0, 99));
    }
}
