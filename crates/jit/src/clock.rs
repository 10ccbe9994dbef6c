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

/// What host code reads; see the module.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Reading {
    /// The host's counter; 0 for no reading.
    pub(crate) host: u64,
    /// The guest's at that moment.
    pub(crate) guest: u64,
    /// Guest ticks for each host tick, with 32 fractional bits.
    pub(crate) ratio: u64,
}

/// How the readings are made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    /// The host's counter runs evenly, whatever the processor does.
    usable: bool,
    /// Both counters some time ago.
    since: Option<(u64, u64)>,
}

impl Rate {
    pub(crate) fn new() -> Self {
        // CPUID 8000_0007H, EDX bit 8: invariant TSC (SDM vol. 3B, 18.17.1).
        let usable = __cpuid(0x8000_0000).eax >= 0x8000_0007
            && __cpuid(0x8000_0007).edx & 1 << 8 != 0;
        Self {
            usable,
            since: None,
        }
    }

    /// The guest's counter was changed, or stood still: what was read means nothing any more.
    pub(crate) fn forget(&mut self, reading: &mut Reading) {
        self.since = None;
        *reading = Reading::default();
    }

    /// The machine's clock was asked. Gives what the guest is to see: never less than host code may have told.
    pub(crate) fn read(&mut self, reading: &mut Reading, guest: u64) -> u64 {
        if !self.usable {
            return guest;
        }
        // SAFETY: every x86-64 processor has RDTSC.
        #[allow(unsafe_code)]
        let host = unsafe { _rdtsc() };
        self.note(reading, guest, host)
    }

    fn note(&mut self, reading: &mut Reading, guest: u64, host: u64) -> u64 {
        let told = match reading.host {
            0 => guest,
            then => {
                let ticks = host.saturating_sub(then).min(WINDOW as u64);
                reading.guest + (ticks * reading.ratio >> FRACTION)
            }
        };
        // Only as far as host code could have gone: a counter that was put back is seen by `forget`.
        let guest = guest.max(told);
        let (then_host, then_guest) = *self.since.get_or_insert((host, guest));
        let (hosts, guests) = (
            host.saturating_sub(then_host),
            guest.saturating_sub(then_guest),
        );
        if hosts < SHORT {
            if reading.ratio != 0 {
                (reading.host, reading.guest) = (host, guest);
            }
            return guest;
        }
        let ratio = (u128::from(guests) << FRACTION) / u128::from(hosts);
        // Anything else is a host that does not keep time.
        if let Ok(ratio) = u64::try_from(ratio)
            && (1 << 26..1 << 38).contains(&ratio)
        {
            *reading = Reading { host, guest, ratio };
        } else {
            *reading = Reading::default();
        }
        if hosts >= LONG {
            self.since = Some((host, guest));
        }
        guest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate() -> Rate {
        Rate {
            usable: true,
            since: None,
        }
    }

    #[test]
    fn rate_is_measured_before_a_reading_serves() {
        let (mut rate, mut reading) = (rate(), Reading::default());
        assert_eq!(rate.note(&mut reading, 1_000, 50_000), 1_000);
        assert_eq!(reading.host, 0);
        let later = 50_000 + SHORT;
        assert_eq!(rate.note(&mut reading, 1_000 + SHORT / 2, later), 1_000 + SHORT / 2);
        assert_eq!((reading.host, reading.guest), (later, 1_000 + SHORT / 2));
        assert_eq!(reading.ratio, 1 << 31);
    }

    #[test]
    fn what_host_code_may_have_told_is_never_taken_back() {
        let (mut rate, mut reading) = (rate(), Reading::default());
        rate.note(&mut reading, 0, 1);
        rate.note(&mut reading, SHORT, 1 + SHORT);
        // The machine's clock is behind: host code could have told 1000 more.
        let seen = rate.note(&mut reading, SHORT + 900, 1 + SHORT + 1000);
        assert_eq!(seen, SHORT + 1000);
        assert_eq!(reading.guest, seen);
    }

    #[test]
    fn counter_that_was_put_back_is_believed_after_forgetting() {
        let (mut rate, mut reading) = (rate(), Reading::default());
        rate.note(&mut reading, 1 << 40, 1);
        rate.note(&mut reading, (1 << 40) + SHORT, 1 + SHORT);
        rate.forget(&mut reading);
        assert_eq!(reading.host, 0);
        assert_eq!(rate.note(&mut reading, 5, 2 + SHORT), 5);
    }

    #[test]
    fn host_counter_that_goes_back_gives_no_reading() {
        let (mut rate, mut reading) = (rate(), Reading::default());
        rate.note(&mut reading, 0, 1 << 40);
        assert_eq!(rate.note(&mut reading, 10, 1), 10);
        assert_eq!(reading.host, 0);
    }
}
