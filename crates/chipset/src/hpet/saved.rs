//! The saved state of the HPET.

use serde::{Deserialize, Serialize};

use super::{ENABLE, Hpet, LEGACY, ROUTES, TIMER_WRITABLE, TIMERS, Timer};
use crate::saved::{Check, StateError};

/// One comparator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimerState {
    /// The writable bits of the configuration register.
    pub config: u64,
    /// Comparator.
    pub comparator: u64,
    /// Counts between two matches in periodic mode.
    pub period: u64,
    /// Count up to which matches have been reported.
    pub settled: u64,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HpetState {
    /// General configuration.
    pub config: u64,
    /// Interrupt status.
    pub status: u64,
    /// Main counter while it is halted; else what is to be added to VM time (in counts).
    pub counter: u64,
    /// The comparators.
    pub timers: [TimerState; TIMERS],
}

impl Timer {
    fn save(&self) -> TimerState {
        let Self {
            config,
            comparator,
            period,
            settled,
        } = *self;
        TimerState {
            config,
            comparator,
            period,
            settled,
        }
    }

    fn restore(state: &TimerState) -> Result<Self, StateError> {
        let TimerState {
            config,
            comparator,
            period,
            settled,
        } = *state;
        let timer = Self {
            config,
            comparator,
            period,
            settled,
        };
        let check = Check("hpet");
        check.bits("a timer's configuration", config, TIMER_WRITABLE)?;
        let has_route = ROUTES >> (config >> 9 & 0x1f) & 1 != 0;
        check.that(has_route, "a timer's route", config)?;
        // The reset value of a comparator is all ones, also for a timer that is made 32 bits wide
        // afterwards: only then is it cut.
        check.bits("a timer's period", period, timer.mask())?;
        check.bits("a timer's comparator", comparator, timer.mask())?;
        Ok(timer)
    }
}

impl Hpet {
    /// Its state.
    pub fn save(&self) -> HpetState {
        let Self {
            config,
            status,
            counter,
            timers,
            // Taken by whoever lets time pass, at once.
            pulses: _,
        } = self;
        HpetState {
            config: *config,
            status: *status,
            counter: *counter,
            timers: std::array::from_fn(|index| timers[index].save()),
        }
    }

    /// The HPET in a state.
    ///
    /// # Errors
    /// For a state that it can't be in.
    pub fn restore(state: &HpetState) -> Result<Self, StateError> {
        let HpetState {
            config,
            status,
            counter,
            timers: [first, second, third],
        } = state;
        let check = Check("hpet");
        check.bits("configuration", *config, ENABLE | LEGACY)?;
        check.bits("status", *status, (1u64 << TIMERS) - 1)?;
        Ok(Self {
            config: *config,
            status: *status,
            counter: *counter,
            timers: [
                Timer::restore(first)?,
                Timer::restore(second)?,
                Timer::restore(third)?,
            ],
            pulses: 0,
        })
    }
}
