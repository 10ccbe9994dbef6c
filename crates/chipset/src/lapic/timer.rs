//! The local APIC's timer (SDM vol. 3A, 11.5.4).

use serde::{Deserialize, Serialize};

use crate::saved::{Check, StateError};
use crate::ticks::{ticks_at, time_of};

/// The shortest time between two interrupts of a periodic timer, nanoseconds. A guest may program a
/// period of a few nanoseconds, which would leave its host nothing else to do. Ticks in between are
/// lost, the phase is kept, and one-shot timers are not touched: each of those costs the guest a
/// write of its own.
pub const MIN_PERIOD_NS: u64 = 20_000;

/// How the timer counts (LVT timer register, bits 18:17).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimerMode {
    /// Counts down once.
    OneShot,
    /// Starts again when it reaches zero.
    Periodic,
    /// Expires when the TSC reaches `IA32_TSC_DEADLINE`.
    TscDeadline,
}

/// The counter, without the local vector table entry that routes it.
#[derive(Clone, Debug)]
pub struct ApicTimer {
    divide: u32,
    initial: u32,
    /// When the count next reaches zero, nanoseconds of VM time.
    expires: Option<u64>,
    tsc_deadline: u64,
    tsc_hz: u64,
    tsc_offset: u64,
}

impl ApicTimer {
    /// A stopped timer.
    pub fn new(tsc_hz: u64) -> Self {
        Self {
            divide: 0,
            initial: 0,
            expires: None,
            tsc_deadline: 0,
            tsc_hz,
            tsc_offset: 0,
        }
    }

    /// After INIT: stopped, and the TSC goes on.
    pub fn reset(&mut self) {
        *self = Self {
            tsc_offset: self.tsc_offset,
            ..Self::new(self.tsc_hz)
        };
    }

    /// Divide configuration register.
    pub fn divide(&self) -> u32 {
        self.divide
    }

    /// Initial count register.
    pub fn initial(&self) -> u32 {
        self.initial
    }

    /// `IA32_TSC_DEADLINE`; zero while disarmed.
    pub fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// What is added to the common TSC.
    pub fn tsc_offset(&self) -> u64 {
        self.tsc_offset
    }

    /// When [`settle`](Self::settle) must next be called, nanoseconds of VM time.
    pub fn deadline(&self) -> Option<u64> {
        self.expires
    }

    /// Nanoseconds a step of the count takes: the timer's clock runs at 1 GHz
    /// ([`APIC_TIMER_HZ`](crate::map::APIC_TIMER_HZ)).
    fn step(&self) -> u64 {
        let code = (self.divide & 3) | (self.divide >> 1 & 4);
        if code == 7 { 1 } else { 2 << code }
    }

    fn period(&self) -> u64 {
        u64::from(self.initial) * self.step()
    }

    /// Lets time pass; whether the count reached zero at least once. Ticks missed count as one.
    pub fn settle(&mut self, mode: TimerMode, now: u64) -> bool {
        let Some(at) = self.expires.filter(|&at| at <= now) else {
            return false;
        };
        self.expires = None;
        match mode {
            TimerMode::OneShot => {}
            TimerMode::TscDeadline => self.tsc_deadline = 0,
            TimerMode::Periodic => {
                let period = self.period();
                if period != 0 {
                    let gap = if period < MIN_PERIOD_NS {
                        MIN_PERIOD_NS
                    } else {
                        1
                    };
                    let earliest = now.saturating_add(gap);
                    let steps = (earliest - at).div_ceil(period);
                    self.expires = steps.checked_mul(period).and_then(|ns| at.checked_add(ns));
                }
            }
        }
        true
    }

    /// Current count register.
    pub fn current(&self, mode: TimerMode, now: u64) -> u32 {
        let Some(at) = self.expires else { return 0 };
        let left = at.saturating_sub(now);
        let ns = match mode {
            TimerMode::TscDeadline => return 0,
            TimerMode::OneShot => left,
            // The next interrupt may be more than one of the guest's (too short) periods away.
            TimerMode::Periodic if left > self.period() && self.initial != 0 => {
                (left - 1) % self.period() + 1
            }
            TimerMode::Periodic => left,
        };
        ns.div_ceil(self.step()) as u32
    }

    /// Writes the initial count register: starts the count, or stops it with zero. Without effect in
    /// TSC-deadline mode.
    pub fn set_initial(&mut self, value: u32, mode: TimerMode, now: u64) {
        if mode == TimerMode::TscDeadline {
            return;
        }
        self.initial = value;
        self.expires = if value == 0 {
            None
        } else {
            now.checked_add(self.period())
        };
    }

    /// Writes the divide configuration register; a running count goes on from where it is.
    pub fn set_divide(&mut self, value: u32, mode: TimerMode, now: u64) {
        let count = self.current(mode, now);
        self.divide = value & 0xb;
        if mode != TimerMode::TscDeadline && self.expires.is_some() {
            self.expires = now.checked_add(u64::from(count) * self.step());
        }
    }

    /// Stops the timer because its mode changes to or from TSC-deadline.
    pub fn disarm(&mut self) {
        self.initial = 0;
        self.tsc_deadline = 0;
        self.expires = None;
    }

    /// Arms the timer for a value of this vCPU's TSC, or disarms it with zero. A value in the past
    /// expires at the next [`settle`](Self::settle).
    pub fn set_tsc_deadline(&mut self, value: u64, now: u64) {
        self.tsc_deadline = value;
        if value == 0 {
            self.expires = None;
            return;
        }
        let common = ticks_at(now, self.tsc_hz);
        let tsc = common.wrapping_add(self.tsc_offset);
        self.expires = if value <= tsc {
            Some(now)
        } else {
            common
                .checked_add(value - tsc)
                .map(|at| time_of(at, self.tsc_hz))
                .filter(|&at| at != u64::MAX)
        };
    }

    /// Changes what is added to the common TSC; an armed TSC deadline moves.
    pub fn set_tsc_offset(&mut self, offset: u64, now: u64) {
        self.tsc_offset = offset;
        if self.tsc_deadline != 0 {
            self.set_tsc_deadline(self.tsc_deadline, now);
        }
    }
}

/// The saved state of the timer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TimerState {
    /// Divide configuration register.
    pub divide: u32,
    /// Initial count register.
    pub initial: u32,
    /// When the count next reaches zero, nanoseconds of VM time.
    pub expires: Option<u64>,
    /// `IA32_TSC_DEADLINE`.
    pub tsc_deadline: u64,
    /// What is added to the common TSC.
    pub tsc_offset: u64,
}

impl ApicTimer {
    /// Its state.
    pub fn save(&self) -> TimerState {
        let Self {
            divide,
            initial,
            expires,
            tsc_deadline,
            // The machine's.
            tsc_hz: _,
            tsc_offset,
        } = *self;
        TimerState {
            divide,
            initial,
            expires,
            tsc_deadline,
            tsc_offset,
        }
    }

    /// The timer in a state.
    ///
    /// # Errors
    /// For a state that it can't be in.
    pub fn restore(tsc_hz: u64, state: &TimerState) -> Result<Self, StateError> {
        let TimerState {
            divide,
            initial,
            expires,
            tsc_deadline,
            tsc_offset,
        } = *state;
        Check("lapic").bits("divide", divide, 0xbu32)?;
        Ok(Self {
            divide,
            initial,
            expires,
            tsc_deadline,
            tsc_hz,
            tsc_offset,
        })
    }
}
