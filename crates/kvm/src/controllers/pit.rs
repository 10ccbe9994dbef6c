//! The interval timer's state, between the chipset's form and the kernel's (`struct kvm_pit_state2`).
//!
//! The kernel's timer is less than the chipset's. It starts every count anew when it is given a state, does not tell how far
//! channel 0 has come, counts on while the gate of mode 0 is low, has no modes 1 and 5 of channel 0, no counts in decimal, and a new
//! count of a periodic channel takes over at once. Here is what can be kept of the time nevertheless:
//!
//! - a periodic channel 0 is given a moment ahead, so that it is in its phase when the machine goes on ([`Start::Ahead`]);
//! - a count that ends once is given what is left of it;
//! - a count that has ended must end again, unheard ([`Start::Quiet`]);
//! - channels 1 and 2 are as they were given unless the kernel says that they were loaded since.

use std::time::Duration;

use kvm_bindings::{KVM_PIT_FLAGS_SPEAKER_DATA_ON, kvm_pit_channel_state, kvm_pit_state2};
use trapgate_chipset::pit::{Access, ChannelState, Latch, PIT_HZ, PitState};
use trapgate_chipset::ticks::{ticks_at, time_of};

/// The largest count.
const LARGEST: u64 = 0x1_0000;

/// Which bytes of a count are accessed, and which one is next (`RW_STATE_…` of the kernel).
const LOW: u8 = 1;
const HIGH: u8 = 2;
const WORD_LOW: u8 = 3;
const WORD_HIGH: u8 = 4;

/// Port B's bit that lets channel 2 reach the speaker.
const SPEAKER: u8 = 2;

/// What is to become of channel 0 between the kernel's taking its state and the machine's going on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// Let so much time pass.
    Ahead(Duration),
    /// Nothing: it ends in its time, if it ever does.
    Now,
    /// Its count ends at once, and is not to be heard.
    Quiet,
}

/// Nanoseconds of so many ticks, rounded up.
pub(crate) fn nanoseconds(ticks: u64) -> u64 {
    time_of(ticks, PIT_HZ)
}

/// Full ticks in so many nanoseconds.
pub(crate) fn ticks(nanoseconds: u64) -> u64 {
    ticks_at(nanoseconds, PIT_HZ)
}

fn is_periodic(mode: u8) -> bool {
    matches!(mode, 2 | 3)
}

/// For the kernel, with what is to become of channel 0, at `now`, nanoseconds of VM time. A periodic channel 0 goes on
/// where it stood if it is to be `in_phase`, else it begins a period.
pub(crate) fn to_kernel(state: &PitState, now: u64, in_phase: bool) -> (kvm_pit_state2, Start) {
    let PitState {
        channels: [timer, refresh, speaker],
        control_b,
        // Follows from the mode, and from whether the count has ended.
        interrupt: _,
    } = state;
    let (count, start) = match timer_to_kernel(timer, now) {
        (count, Start::Ahead(_)) if !in_phase => (count, Start::Now),
        started => started,
    };
    let ahead = match start {
        Start::Ahead(phase) => ticks(phase.as_nanos() as u64),
        Start::Now | Start::Quiet => 0,
    };
    let silent = |channel| channel_to_kernel(channel, silent_count(channel, now, ahead));
    let kernel = kvm_pit_state2 {
        channels: [
            channel_to_kernel(timer, count),
            silent(refresh),
            silent(speaker),
        ],
        flags: if control_b & SPEAKER != 0 {
            KVM_PIT_FLAGS_SPEAKER_DATA_ON
        } else {
            0
        },
        ..kvm_pit_state2::default()
    };
    (kernel, start)
}

/// Ticks since a channel was loaded, at a tick.
fn elapsed(state: &ChannelState, tick: u64) -> u64 {
    state
        .stopped_at
        .unwrap_or_else(|| tick.saturating_sub(state.start))
}

/// The count that channel 0 is given.
fn timer_to_kernel(state: &ChannelState, now: u64) -> (u64, Start) {
    let tick = ticks(now);
    let elapsed = elapsed(state, tick);
    match (state.mode, state.loaded) {
        (2 | 3, false) => (LARGEST, Start::Now),
        (2 | 3, true) => match state.next_reload {
            None => {
                let fraction = now.saturating_sub(nanoseconds(tick));
                let phase = nanoseconds(elapsed % state.reload) + fraction;
                let phase = Duration::from_nanos(phase);
                (state.reload, Start::Ahead(phase))
            }
            // It is as if the period before the one that begins then had been as long.
            Some((at, reload)) => {
                let left = at.saturating_sub(tick).min(reload);
                let phase = Duration::from_nanos(nanoseconds(reload - left));
                (reload, Start::Ahead(phase))
            }
        },
        (0 | 4, true) if elapsed < state.reload => (state.reload - elapsed, Start::Now),
        // The kernel has no timer in mode 5.
        (5, _) => (state.reload, Start::Now),
        _ => (1, Start::Quiet),
    }
}

/// The count that a channel is given whose output is only looked at, so many ticks `ahead` of the machine.
fn silent_count(state: &ChannelState, now: u64, ahead: u64) -> u64 {
    let elapsed = elapsed(state, ticks(now));
    match (state.mode, state.loaded) {
        (0 | 4, true) if elapsed < state.reload => (state.reload - elapsed + ahead).min(LARGEST),
        (0 | 4, true) => 1,
        // Low for as long as may be.
        (0, false) => LARGEST,
        _ => state.reload,
    }
}

fn channel_to_kernel(state: &ChannelState, count: u64) -> kvm_pit_channel_state {
    let ChannelState {
        mode,
        bcd,
        access,
        written_low,
        read_high_next,
        count_latch,
        status_latch,
        gate,
        // In the count.
        reload: _,
        loaded: _,
        waiting: _,
        start: _,
        stopped_at: _,
        next_reload: _,
        settled: _,
    } = *state;
    let (rw_mode, second_read, second_write) = match access {
        Access::Low => (LOW, LOW, LOW),
        Access::High => (HIGH, HIGH, HIGH),
        Access::LowThenHigh => (WORD_LOW, WORD_HIGH, WORD_HIGH),
    };
    kvm_pit_channel_state {
        count: count as u32,
        latched_count: count_latch.map_or(0, |latch| latch.count),
        count_latched: count_latch.map_or(0, |latch| match (access, latch.high_next) {
            (Access::Low, _) => LOW,
            (Access::High, _) | (Access::LowThenHigh, true) => HIGH,
            (Access::LowThenHigh, false) => WORD_LOW,
        }),
        status_latched: status_latch.is_some().into(),
        status: status_latch.unwrap_or_default(),
        read_state: if read_high_next { second_read } else { rw_mode },
        write_state: if written_low.is_some() {
            second_write
        } else {
            rw_mode
        },
        write_latch: written_low.unwrap_or_default(),
        rw_mode,
        mode,
        bcd: bcd.into(),
        gate: gate.into(),
        ..kvm_pit_channel_state::default()
    }
}

/// What channel 0 of the kernel's timer showed when it was read by a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reading {
    /// The status byte's output bit.
    pub(crate) output: bool,
    /// The count.
    pub(crate) count: u16,
}

impl Reading {
    /// Ticks since the channel was loaded, or, of a periodic one, since its period began; and whether a count that ends
    /// once has ended.
    pub(crate) fn elapsed(self, channel: &kvm_pit_channel_state) -> (u64, bool) {
        let reload = reload(channel);
        let down = reload.wrapping_sub(self.count.into()) % LARGEST;
        match channel.mode {
            2 => (down % reload, false),
            // Down by two, twice in a period.
            3 => {
                let second_half = if self.output { 0 } else { reload };
                ((down + second_half) / 2 % reload, false)
            }
            // It goes on below zero. In mode 4 the output does not tell.
            0 if self.output && down < reload => (down + LARGEST, true),
            _ => (down, down >= reload),
        }
    }
}

fn reload(channel: &kvm_pit_channel_state) -> u64 {
    u64::from(channel.count).clamp(1, LARGEST)
}

/// What the kernel was given, and said then that it has.
#[derive(Clone, Debug)]
pub(crate) struct Given {
    pub(crate) state: PitState,
    pub(crate) kernel: kvm_pit_state2,
}

/// When the state was taken: VM time stood still, host time went on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment {
    /// Nanoseconds of VM time.
    pub(crate) now: u64,
    /// The host's monotonic clock when VM time was stopped.
    pub(crate) host: u64,
    /// The same clock when channel 0 was read, or before: a count must not go back.
    pub(crate) read: u64,
    /// Its next edge has come since it was read.
    pub(crate) edge_since: bool,
}

/// The inverse of [`to_kernel`].
pub(crate) fn from_kernel(
    kernel: &kvm_pit_state2,
    reading: Reading,
    given: &Given,
    moment: Moment,
) -> PitState {
    let [timer, refresh, speaker] = &kernel.channels;
    let (timer, ended) = timer_from_kernel(timer, reading, moment);
    let mode = timer.mode;
    let silent = |index: usize, channel| {
        let before = &given.kernel.channels[index];
        silent_from_kernel(channel, before, &given.state.channels[index], moment)
    };
    PitState {
        channels: [timer, silent(1, refresh), silent(2, speaker)],
        control_b: speaker.gate & 1
            | if kernel.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON != 0 {
                SPEAKER
            } else {
                0
            },
        // High from one edge to the next, or from its end on.
        interrupt: is_periodic(mode) || ended,
    }
}

fn timer_from_kernel(
    channel: &kvm_pit_channel_state,
    reading: Reading,
    moment: Moment,
) -> (ChannelState, bool) {
    let tick = ticks(moment.now);
    let (elapsed, ended) = match (reading.elapsed(channel), moment.edge_since) {
        (read, false) => read,
        (_, true) if is_periodic(channel.mode) => (0, false),
        (_, true) => (reload(channel), true),
    };
    // What was counted while VM time stood is taken back; not beyond an edge, which the controllers have seen.
    let ahead = ticks(moment.read.saturating_sub(moment.host));
    let mut reload = reload(channel);
    let elapsed = if ended {
        // Also where the machine is younger than that.
        let elapsed = elapsed.saturating_sub(ahead).max(reload + 1).min(tick);
        reload = reload.min(elapsed).max(1);
        elapsed
    } else {
        elapsed.saturating_sub(ahead)
    };
    let mut state = registers(channel);
    state.reload = if is_periodic(state.mode) {
        reload.max(2)
    } else {
        reload
    };
    state.start = tick.saturating_sub(elapsed);
    state.settled = tick;
    // Its gate never rises, so nothing starts it.
    state.waiting = matches!(state.mode, 1 | 5);
    state.loaded = !state.waiting;
    (state, ended)
}

fn silent_from_kernel(
    channel: &kvm_pit_channel_state,
    before: &kvm_pit_channel_state,
    given: &ChannelState,
    moment: Moment,
) -> ChannelState {
    let tick = ticks(moment.now);
    let mut state = registers(channel);
    state.settled = tick;
    let loaded_at = channel.count_load_time.max(0).cast_unsigned();
    let since_load = ticks(moment.host.saturating_sub(loaded_at));
    let shape = |channel: &kvm_pit_channel_state| {
        let kvm_pit_channel_state {
            count,
            mode,
            bcd,
            gate,
            count_load_time,
            ..
        } = *channel;
        (count, mode, bcd, gate, count_load_time)
    };
    if shape(channel) == shape(before) {
        state.reload = given.reload;
        state.loaded = given.loaded;
        state.waiting = given.waiting;
        state.start = given.start;
        if matches!(state.mode, 0 | 4) && state.loaded && given.stopped_at.is_none() {
            // The kernel was a little ahead all the while, and a count must not go back.
            let given_count = u64::from(before.count);
            let shown = (given.reload + since_load).saturating_sub(given_count);
            state.start = given.start.min(tick.saturating_sub(shown));
        }
        state.stopped_at = given.stopped_at;
        state.next_reload = given.next_reload;
        return state;
    }
    let elapsed = since_load.min(tick);
    state.reload = reload(channel).max(if is_periodic(state.mode) { 2 } else { 1 });
    state.start = tick - elapsed;
    let triggered_by_gate = matches!(state.mode, 1 | 5);
    state.loaded = !triggered_by_gate || state.gate;
    state.waiting = !state.loaded;
    if !state.gate && !triggered_by_gate {
        state.stopped_at = Some(elapsed);
    }
    state
}

/// Of a channel what has nothing to do with time.
fn registers(channel: &kvm_pit_channel_state) -> ChannelState {
    let kvm_pit_channel_state {
        count: _,
        latched_count,
        count_latched,
        status_latched,
        status,
        read_state,
        write_state,
        write_latch,
        rw_mode,
        mode,
        bcd,
        gate,
        count_load_time: _,
    } = *channel;
    let access = match rw_mode {
        LOW => Access::Low,
        HIGH => Access::High,
        _ => Access::LowThenHigh,
    };
    ChannelState {
        mode: mode.min(5),
        bcd: bcd & 1 != 0,
        access,
        written_low: (write_state == WORD_HIGH).then_some(write_latch),
        read_high_next: read_state == WORD_HIGH,
        count_latch: (count_latched != 0).then_some(Latch {
            count: latched_count,
            high_next: count_latched == HIGH,
        }),
        status_latch: (status_latched != 0).then_some(status),
        reload: LARGEST,
        loaded: true,
        waiting: false,
        start: 0,
        stopped_at: None,
        next_reload: None,
        gate: gate != 0,
        settled: 0,
    }
}
