//! A sleep that ends when it is to.
//!
//! A host wakes a sleeper late: it must leave an idle state, its own or that of the machine that it is itself a guest of, and
//! then find the thread. On a quiet server that is some microseconds, on a shared one 20 to 50, and a guest sees them in each
//! of its timers. So a thread that waits for a point in time sleeps until a little before, by as much as it was woken late
//! before, and looks at the clock for the rest.

use std::time::{Duration, Instant};

use trapgate_engine::Signals;

/// The longest that is spent looking at the clock: at a thousand timers a second, a twentieth of a processor.
const MOST: Duration = Duration::from_micros(50);
/// A host that wakes a thread so late had something else to do; that says nothing of the next time.
const BUSY: Duration = Duration::from_micros(200);

/// How early a thread has itself woken.
#[derive(Debug, Default)]
pub(crate) struct Alarm {
    lead: Duration,
}

impl Alarm {
    /// Sleeps for `limit`, or until a signal is raised. Not shorter, and hardly longer if the host lets it.
    pub(crate) fn sleep(&mut self, signals: &Signals, limit: Duration) {
        let now = Instant::now();
        let due = now + limit;
        if let Some(asleep) = limit.checked_sub(self.lead).filter(|left| !left.is_zero()) {
            signals.sleep(Some(asleep));
            if signals.any() {
                return;
            }
            self.learn((now + asleep).elapsed());
        }
        while Instant::now() < due && !signals.any() {
            std::hint::spin_loop();
        }
    }

    /// Takes in that the host woke the thread so late: quickly if that was later than expected, slowly if not, so that it is
    /// in time more often than not.
    fn learn(&mut self, late: Duration) {
        if late >= BUSY {
            return;
        }
        self.lead = match late.checked_sub(self.lead) {
            Some(later) => (self.lead + later / 4).min(MOST),
            None => self.lead - (self.lead - late) / 16,
        };
    }
}

#[cfg(test)]
mod tests {
    use trapgate_engine::Signal;

    use super::*;

    fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn alarm_goes_ahead_by_what_the_host_needs_and_no_more_than_50_us() {
        let mut alarm = Alarm::default();
        let mut settled = |late: &[u64]| {
            for late in late.iter().cycle().take(1000) {
                alarm.learn(us(*late));
            }
            alarm.lead
        };
        assert!((us(23)..=us(24)).contains(&settled(&[24])));
        // In time for most.
        assert!((us(24)..us(40)).contains(&settled(&[10, 20, 40])));
        assert!(settled(&[3]) < us(4));
        assert_eq!(settled(&[150]), MOST);
    }

    #[test]
    fn alarm_takes_a_host_that_is_busy_for_no_measure() {
        let mut alarm = Alarm::default();
        alarm.learn(us(30));
        let before = alarm.lead;
        alarm.learn(us(5000));
        assert_eq!(alarm.lead, before);
    }

    #[test]
    fn alarm_never_rings_early_and_ends_at_a_signal() {
        let signals = Signals::default();
        let mut alarm = Alarm { lead: MOST };
        for limit in [0, 20, 49, 50, 51, 300, 1000] {
            let start = Instant::now();
            alarm.sleep(&signals, us(limit));
            assert!(start.elapsed() >= us(limit), "{limit}");
        }
        signals.raise(Signal::Interrupt);
        // Otherwise the test would last for an hour.
        alarm.sleep(&signals, us(3_600_000_000));
    }
}
