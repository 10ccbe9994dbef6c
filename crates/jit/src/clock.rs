//! The guest's time-stamp counter, read without a call.
//!
//! The machine's clock is the judge, and asking it costs more than the guest's RDTSC should. So a reading of it is
//! kept with the host's counter at that moment, and for a short while the guest's is worked out from these: the
//! rate between the two is measured, not assumed. What was given out is never taken back.

use std::arch::x86_64::{__cpuid, _rdtsc};

/// Ticks of the host's counter for which a reading serves: some 0.1 ms.
pub(crate) const WINDOW: i32 = 1 << 18;
/// Ticks over which the rate is measured, at least; from then on anew.
const SHORT: u64 = 1 << 21;
const LONG: u64 = 1 << 28;
/// Fractional bits of the rate.
const FRACTION: u32 = 32;

/// How much a rate may differ from the last, as a fraction: one that differs more was measured over a time in
/// which the machine's clock stood still.
const STEADY: u64 = 1000;

/// What host code reads; see the module.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Reading {
    /// The host's counter; 0 for no reading.
    pub(crate) host: u64,
    /// The guest's at that moment.
    pub(crate) guest: u64,
    /// Guest ticks for each host tick, with 32 fractional bits; 0 while it is not known.
    pub(crate) ratio: u64,
}

impl Reading {
    /// The most that host code may have told by the time of a host counter.
    fn told(&self, host: u64) -> u64 {
        if self.host == 0 {
            return 0;
        }
        let ticks = host.saturating_sub(self.host).min(WINDOW as u64);
        self.guest + ((ticks * self.ratio) >> FRACTION)
    }
}

/// How the readings are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    /// The host's counter runs evenly, whatever the processor does.
    usable: bool,
    /// Both counters some time ago.
    since: Option<(u64, u64)>,
    /// The guest was told no more than this.
    floor: u64,
}

/// The host's time-stamp counter.
pub(crate) fn host_counter() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC.
    #[allow(unsafe_code)]
    unsafe {
        _rdtsc()
    }
}

impl Rate {
    pub(crate) fn new() -> Self {
        // CPUID 8000_0007H, EDX bit 8: invariant TSC (SDM vol. 3B, 18.17.1).
        let usable =
            __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & 1 << 8 != 0;
        Self {
            usable,
            since: None,
            floor: 0,
        }
    }

    /// From now on every reading is the machine's.
    pub(crate) fn disable(&mut self) {
        self.usable = false;
    }

    /// The machine's clock may stand still from now on: it is asked the next time.
    pub(crate) fn forget(&mut self, reading: &mut Reading) {
        self.floor = self.floor.max(reading.told(host_counter()));
        reading.host = 0;
    }

    /// The guest's counter was set.
    pub(crate) fn restart(&mut self, reading: &mut Reading) {
        (self.since, self.floor) = (None, 0);
        reading.host = 0;
    }

    /// The machine's clock was asked. Gives what the guest is to see: never less than host code may have told.
    pub(crate) fn read(&mut self, reading: &mut Reading, guest: u64) -> u64 {
        if !self.usable {
            return guest;
        }
        self.note(reading, guest, host_counter())
    }

    fn note(&mut self, reading: &mut Reading, guest: u64, host: u64) -> u64 {
        let seen = guest.max(reading.told(host)).max(self.floor);
        let (then_host, then_guest) = *self.since.get_or_insert((host, guest));
        let hosts = host.saturating_sub(then_host);
        let guests = guest.saturating_sub(then_guest);
        if hosts >= SHORT {
            let ratio = (u128::from(guests) << FRACTION) / u128::from(hosts);
            // A rate out of this range is of a host that does not keep time.
            let ratio = u64::try_from(ratio).unwrap_or(0);
            let ratio = if (1 << 26..1 << 38).contains(&ratio) {
                ratio
            } else {
                0
            };
            if reading.ratio == 0 || reading.ratio.abs_diff(ratio) <= reading.ratio / STEADY {
                reading.ratio = ratio;
            } else {
                self.since = None;
            }
            if hosts >= LONG {
                self.since = Some((host, guest));
            }
        }
        (reading.host, reading.guest) = if reading.ratio == 0 {
            (0, 0)
        } else {
            (host, seen)
        };
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate() -> (Rate, Reading) {
        let rate = Rate {
            usable: true,
            since: None,
            floor: 0,
        };
        (rate, Reading::default())
    }

    /// As [`rate`], after a guest's counter that runs as fast as the host's was read twice.
    fn measured() -> (Rate, Reading) {
        let (mut rate, mut reading) = rate();
        rate.note(&mut reading, 0, 1);
        rate.note(&mut reading, SHORT, 1 + SHORT);
        (rate, reading)
    }

    #[test]
    fn rate_is_measured_before_a_reading_serves() {
        let (mut rate, mut reading) = rate();
        assert_eq!(rate.note(&mut reading, 1_000, 50_000), 1_000);
        assert_eq!(reading.host, 0);
        let (host, guest) = (50_000 + SHORT, 1_000 + SHORT / 2);
        assert_eq!(rate.note(&mut reading, guest, host), guest);
        assert_eq!((reading.host, reading.guest), (host, guest));
        assert_eq!(reading.ratio, 1 << 31);
    }

    #[test]
    fn what_host_code_may_have_told_is_never_taken_back() {
        let (mut rate, mut reading) = measured();
        // The machine's clock is behind: host code could have told 1000 more.
        let seen = rate.note(&mut reading, SHORT + 900, 1 + SHORT + 1000);
        assert_eq!(seen, SHORT + 1000);
        assert_eq!(reading.guest, seen);
        rate.forget(&mut reading);
        assert_eq!(reading.host, 0);
        assert!(rate.note(&mut reading, SHORT + 950, 3 + SHORT + 1000) >= seen);
    }

    #[test]
    fn clock_that_stood_still_does_not_change_the_rate() {
        let (mut rate, mut reading) = measured();
        rate.forget(&mut reading);
        // The guest's clock stood for as long as it had run.
        rate.note(&mut reading, SHORT + WINDOW as u64, 1 + 2 * SHORT);
        assert_eq!(reading.ratio, 1 << 32);
        assert_ne!(reading.host, 0);
    }

    #[test]
    fn counter_that_was_set_is_believed() {
        let (mut rate, mut reading) = measured();
        rate.restart(&mut reading);
        assert_eq!(rate.note(&mut reading, 5, 2 + SHORT), 5);
    }

    #[test]
    fn host_counter_that_goes_back_takes_nothing_back() {
        let (mut rate, mut reading) = measured();
        assert_eq!(rate.note(&mut reading, SHORT + 10, 1), SHORT + 10);
    }
}
