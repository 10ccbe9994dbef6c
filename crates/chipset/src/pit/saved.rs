//! The saved state of the 8254.

use serde::{Deserialize, Serialize};

use super::{Access, Channel, Latch, PIT_HZ, Pit};
use crate::saved::{Check, StateError};
use crate::ticks::ticks_at;

/// Ticks that a count can be away at most: two full periods of the widest counter.
const REACH: u64 = 2 * 0x1_0000 + 1;

/// One counter. Ticks are those of [`PIT_HZ`] since VM time 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChannelState {
    /// 0 to 5.
    pub mode: u8,
    /// Counts in decimal.
    pub bcd: bool,
    /// How the bytes of a count are accessed.
    pub access: Access,
    /// The low byte of a count, whose high byte has not been written.
    pub written_low: Option<u8>,
    /// The next read gives the high byte.
    pub read_high_next: bool,
    /// A count held for reading.
    pub count_latch: Option<Latch>,
    /// A status held for reading.
    pub status_latch: Option<u8>,
    /// 1 to 65536, or to 10000 in decimal.
    pub reload: u64,
    /// A count was written since the control word, and in modes 1 and 5 the gate has triggered it.
    pub loaded: bool,
    /// Waits for a trigger at the gate (modes 1 and 5).
    pub waiting: bool,
    /// Tick at which the count was at `reload`.
    pub start: u64,
    /// Ticks counted when the gate stopped it.
    pub stopped_at: Option<u64>,
    /// A count written while another runs, and the tick at which it takes over (modes 2 and 3).
    pub next_reload: Option<(u64, u64)>,
    /// Level of the gate.
    pub gate: bool,
    /// Tick up to which edges of the output have been reported.
    pub settled: u64,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PitState {
    /// Timer, refresh, speaker.
    pub channels: [ChannelState; 3],
    /// Bits 3:0 of port B.
    pub control_b: u8,
    /// Level of the interrupt line.
    pub interrupt: bool,
}

impl Channel {
    fn save(&self) -> ChannelState {
        let Self {
            mode,
            bcd,
            access,
            written_low,
            read_high_next,
            count_latch,
            status_latch,
            reload,
            loaded,
            waiting,
            start,
            stopped_at,
            next_reload,
            gate,
            settled,
        } = *self;
        ChannelState {
            mode,
            bcd,
            access,
            written_low,
            read_high_next,
            count_latch,
            status_latch,
            reload,
            loaded,
            waiting,
            start,
            stopped_at,
            next_reload,
            gate,
            settled,
        }
    }

    fn restore(state: &ChannelState, tick: u64) -> Result<Self, StateError> {
        let ChannelState {
            mode,
            bcd,
            access,
            written_low,
            read_high_next,
            count_latch,
            status_latch,
            reload,
            loaded,
            waiting,
            start,
            stopped_at,
            next_reload,
            gate,
            settled,
        } = *state;
        let channel = Self {
            mode,
            bcd,
            access,
            written_low,
            read_high_next,
            count_latch,
            status_latch,
            reload,
            loaded,
            waiting,
            start,
            stopped_at,
            next_reload,
            gate,
            settled,
        };
        let check = Check("pit");
        // A control word leaves the count of the mode before it, which may have been binary.
        let widest = 0x1_0000;
        let least = if channel.is_periodic() && loaded {
            2
        } else {
            1
        };
        let valid_reload = |reload: u64| (least..=widest).contains(&reload);
        check.at_most("mode", mode.into(), 5)?;
        check.that(valid_reload(reload), "reload", reload)?;
        check.at_most("start", start, tick + 1)?;
        check.at_most("settled", settled, tick)?;
        check.at_most("stopped_at", stopped_at.unwrap_or(0), tick)?;
        if let Some((at, reload)) = next_reload {
            check.at_most("the tick of next_reload", at, tick + REACH)?;
            let valid = channel.is_periodic() && (2..=widest).contains(&reload);
            check.that(valid, "next_reload", reload)?;
        }
        Ok(channel)
    }
}

impl Pit {
    /// Its state.
    pub fn save(&self) -> PitState {
        let Self {
            channels,
            control_b,
            interrupt,
        } = self;
        PitState {
            channels: std::array::from_fn(|index| channels[index].save()),
            control_b: *control_b,
            interrupt: *interrupt,
        }
    }

    /// The 8254 in a state that it was in at `now`, nanoseconds of VM time.
    ///
    /// # Errors
    /// For a state that it can't be in.
    pub fn restore(state: &PitState, now: u64) -> Result<Self, StateError> {
        let PitState {
            channels: [timer, refresh, speaker],
            control_b,
            interrupt,
        } = state;
        let check = Check("pit");
        check.time("VM time", now)?;
        check.bits("port B", *control_b, 0x0fu8)?;
        let gates = (timer.gate, refresh.gate, speaker.gate);
        check.that(
            gates == (true, true, control_b & 1 != 0),
            "port B, whose gate the channels do not see",
            *control_b,
        )?;
        let tick = ticks_at(now, PIT_HZ);
        Ok(Self {
            channels: [
                Channel::restore(timer, tick)?,
                Channel::restore(refresh, tick)?,
                Channel::restore(speaker, tick)?,
            ],
            control_b: *control_b,
            interrupt: *interrupt,
        })
    }
}
