//! Between nanoseconds of VM time and the ticks of a clock.
//!
//! Both directions start from VM time 0, never from the last event, so no fraction of a tick is ever
//! lost and no periodic timer drifts.

/// Nanoseconds in a second.
pub const NS_PER_SECOND: u64 = 1_000_000_000;

/// Full ticks of a clock of `hz` at `now` nanoseconds of VM time, modulo 2^64.
pub fn ticks_at(now: u64, hz: u64) -> u64 {
    if hz == NS_PER_SECOND {
        return now;
    }
    (u128::from(now) * u128::from(hz) / u128::from(NS_PER_SECOND)) as u64
}

/// The first nanosecond of VM time at which a clock of `hz` has made `ticks` full ticks:
/// the least `now` with `ticks_at(now, hz) >= ticks`. `u64::MAX` where that is never.
pub fn time_of(ticks: u64, hz: u64) -> u64 {
    if hz == NS_PER_SECOND {
        return ticks;
    }
    if hz == 0 {
        return if ticks == 0 { 0 } else { u64::MAX };
    }
    let ns = (u128::from(ticks) * u128::from(NS_PER_SECOND)).div_ceil(u128::from(hz));
    u64::try_from(ns).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A deadline is neither early (the counter would not have got there) nor a nanosecond late.
    #[test]
    fn time_of_a_tick_is_the_first_nanosecond_that_shows_it() {
        for hz in [32_768, 1_193_182, 3_579_545, 2_400_000_123, NS_PER_SECOND] {
            for ticks in [1, 2, 3, 1000, 65_536, 123_456_789, 1 << 40] {
                let ns = time_of(ticks, hz);
                assert!(ticks_at(ns, hz) >= ticks, "{hz} {ticks}");
                assert!(ticks_at(ns - 1, hz) < ticks, "{hz} {ticks}");
            }
        }
    }

    #[test]
    fn a_time_beyond_the_clock_saturates() {
        assert_eq!(time_of(u64::MAX, 1), u64::MAX);
        assert_eq!(time_of(5, 0), u64::MAX);
    }
}
