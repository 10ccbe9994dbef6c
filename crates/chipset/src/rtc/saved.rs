//! The saved state of the clock and its memory.

use serde::{Deserialize, Serialize};

use super::Rtc;
use crate::saved::{Check, MOST_SECONDS, StateError};
use crate::ticks::NS_PER_SECOND;

/// The real-time clock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RtcState {
    /// The index register, 0 to 127.
    pub index: u8,
    /// Bit 7 of the index port.
    pub nmi_masked: bool,
    /// All registers and memory; the time registers count only while the clock stands.
    #[serde(with = "hex::serde")]
    pub cells: [u8; 128],
    /// The clock's time (seconds since 1970 in its own calendar) at `base_ns`.
    pub base_seconds: i64,
    /// Some beginning of a second, nanoseconds of VM time.
    pub base_ns: i64,
    /// What is to be added to the day of the week, 0 to 6.
    pub weekday_offset: i64,
    /// The next second begins half a second after the divider starts.
    pub divider_reset: bool,
    /// VM time up to which interrupt flags are set, nanoseconds.
    pub settled: u64,
}

impl Rtc {
    /// Its state.
    pub fn save(&self) -> RtcState {
        let Self {
            index,
            nmi_masked,
            cells,
            base_seconds,
            base_ns,
            weekday_offset,
            divider_reset,
            settled,
        } = *self;
        RtcState {
            index,
            nmi_masked,
            cells,
            base_seconds,
            base_ns,
            weekday_offset,
            divider_reset,
            settled,
        }
    }

    /// The clock in a state that it was in at `now`, nanoseconds of VM time.
    ///
    /// # Errors
    /// For a state that it can't be in.
    pub fn restore(state: &RtcState, now: u64) -> Result<Self, StateError> {
        let RtcState {
            index,
            nmi_masked,
            cells,
            base_seconds,
            base_ns,
            weekday_offset,
            divider_reset,
            settled,
        } = *state;
        let check = Check("rtc");
        check.time("VM time", now)?;
        check.at_most("index", index.into(), 0x7f)?;
        check.at_most(
            "base_seconds",
            base_seconds.unsigned_abs(),
            MOST_SECONDS.unsigned_abs(),
        )?;
        // Before VM time 0 by less than the second in which the machine started.
        let first = -(NS_PER_SECOND as i64);
        let valid = (first..=now.cast_signed()).contains(&base_ns);
        check.that(valid, "base_ns", base_ns.cast_unsigned())?;
        let valid = (0..7).contains(&weekday_offset);
        check.that(valid, "weekday_offset", weekday_offset.cast_unsigned())?;
        check.at_most("settled", settled, now)?;
        Ok(Self {
            index,
            nmi_masked,
            cells,
            base_seconds,
            base_ns,
            weekday_offset,
            divider_reset,
            settled,
        })
    }
}
