//! The 8254 programmable interval timer (Intel 8254 data sheet, order 231164) and system control
//! port B, which gates its channel 2.

mod saved;

use serde::{Deserialize, Serialize};

pub use saved::{ChannelState, PitState};

use crate::ticks::{ticks_at, time_of};

/// The 8254's clock on a PC, Hz.
pub const PIT_HZ: u64 = 1_193_182;

/// Ticks between two interrupts of a periodic channel 0 at least, about 20 µs, so that a guest that
/// programs a count of 2 does not take its host's time. The phase is kept.
const MIN_PERIOD_TICKS: u64 = 24;

/// Nanoseconds between changes of the refresh bit in port B (66.288 kHz).
const REFRESH_NS: u64 = 15_085;

/// How the bytes of a count are accessed (control word, bits 5:4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    /// The low byte only; the high one is zero.
    Low,
    /// The high byte only; the low one is zero.
    High,
    /// First the low byte, then the high one.
    LowThenHigh,
}

/// A count or status held for reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latch {
    /// What was latched.
    pub count: u16,
    /// The next read gives the high byte.
    pub high_next: bool,
}

/// One counter. Nothing counts: its count and output follow from the tick it was loaded at.
#[derive(Clone, Debug)]
struct Channel {
    mode: u8,
    bcd: bool,
    access: Access,
    written_low: Option<u8>,
    read_high_next: bool,
    count_latch: Option<Latch>,
    status_latch: Option<u8>,
    /// 1 to 65536, or to 10000 in BCD.
    reload: u64,
    /// A count was written since the control word, and in modes 1 and 5 the gate has triggered it.
    loaded: bool,
    /// Waiting for a trigger at the gate (modes 1 and 5).
    waiting: bool,
    /// Tick at which the count was at `reload`: one after it was written.
    start: u64,
    /// Ticks counted when the gate stopped it.
    stopped_at: Option<u64>,
    /// A count written while another runs, and the tick at which it takes over (modes 2 and 3).
    next_reload: Option<(u64, u64)>,
    gate: bool,
    /// Up to here edges of the output have been reported.
    settled: u64,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            bcd: false,
            access: Access::LowThenHigh,
            written_low: None,
            read_high_next: false,
            count_latch: None,
            status_latch: None,
            reload: 0x1_0000,
            loaded: gate,
            waiting: false,
            start: 0,
            stopped_at: None,
            next_reload: None,
            gate,
            settled: 0,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn modulus(&self) -> u64 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn elapsed(&self, tick: u64) -> u64 {
        self.stopped_at
            .unwrap_or_else(|| tick.saturating_sub(self.start))
    }

    fn output(&self, tick: u64) -> bool {
        if !self.loaded {
            return self.mode != 0;
        }
        let elapsed = self.elapsed(tick);
        match self.mode {
            0 | 1 => elapsed >= self.reload,
            2 => !self.gate || elapsed % self.reload != self.reload - 1,
            3 => !self.gate || elapsed % self.reload < self.reload.div_ceil(2),
            _ => elapsed != self.reload,
        }
    }

    /// The counting element, as the guest reads it.
    fn count(&self, tick: u64) -> u16 {
        let elapsed = if self.loaded { self.elapsed(tick) } else { 0 };
        let reload = self.reload;
        let count = match self.mode {
            2 => reload - elapsed % reload,
            // Counts down by two, twice in a period; an odd count is made even (data sheet, "Mode 3").
            3 => {
                let high = reload.div_ceil(2);
                let position = elapsed % reload;
                let step = if position < high {
                    position
                } else {
                    position - high
                };
                (reload & !1) - (2 * step).min(reload & !1)
            }
            _ => (reload + self.modulus() - elapsed % self.modulus()) % self.modulus(),
        } % self.modulus();
        if !self.bcd {
            return count as u16;
        }
        let digit = |power: u64| count / power % 10;
        (digit(1000) << 12 | digit(100) << 8 | digit(10) << 4 | digit(1)) as u16
    }

    /// Lets time pass up to `tick`; whether the output rose.
    fn settle(&mut self, tick: u64) -> bool {
        let mut rose = false;
        if let Some((at, reload)) = self.next_reload
            && at <= tick
        {
            rose = self.rose_until(at);
            self.start = at;
            self.settled = at;
            self.reload = reload;
            self.next_reload = None;
        }
        rose |= self.rose_until(tick);
        self.settled = self.settled.max(tick);
        rose
    }

    fn rose_until(&self, tick: u64) -> bool {
        let (from, to) = (self.settled, tick);
        if !self.loaded || self.stopped_at.is_some() || to <= from {
            return false;
        }
        if self.is_periodic() {
            return to.saturating_sub(self.start) / self.reload
                > from.saturating_sub(self.start) / self.reload;
        }
        let edge = self.single_edge();
        from < edge && edge <= to
    }

    /// When a mode that does not repeat raises its output.
    fn single_edge(&self) -> u64 {
        self.start + self.reload + u64::from(self.mode >= 4)
    }

    /// The next tick at which the output rises, after those reported.
    fn next_edge(&self) -> Option<u64> {
        if !self.loaded || self.stopped_at.is_some() {
            return None;
        }
        if !self.is_periodic() {
            return Some(self.single_edge()).filter(|&edge| edge > self.settled);
        }
        let gap = if self.reload < MIN_PERIOD_TICKS {
            MIN_PERIOD_TICKS
        } else {
            1
        };
        let done = (self.settled + gap).saturating_sub(self.start);
        Some(self.start + done.div_ceil(self.reload).max(1) * self.reload)
    }

    fn set_mode(&mut self, control: u8) {
        let mode = control >> 1 & 7;
        self.mode = if mode > 5 { mode - 4 } else { mode };
        self.bcd = control & 1 != 0;
        self.access = match control >> 4 & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::LowThenHigh,
        };
        self.written_low = None;
        self.read_high_next = false;
        self.count_latch = None;
        self.status_latch = None;
        self.loaded = false;
        self.waiting = false;
        self.stopped_at = None;
        self.next_reload = None;
    }

    fn write(&mut self, value: u8, tick: u64) {
        let count = match (self.access, self.written_low) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::LowThenHigh, None) => {
                self.written_low = Some(value);
                if self.mode == 0 {
                    // "Writing the first byte disables counting" (mode 0).
                    self.loaded = false;
                }
                return;
            }
            (Access::LowThenHigh, Some(low)) => u16::from(value) << 8 | u16::from(low),
        };
        self.written_low = None;
        self.load(count, tick);
    }

    fn load(&mut self, count: u16, tick: u64) {
        let count = if self.bcd {
            (0..4).rev().fold(0, |sum, digit| {
                sum * 10 + u64::from(count >> (4 * digit) & 15).min(9)
            })
        } else {
            u64::from(count)
        };
        let reload = if count == 0 { self.modulus() } else { count };
        if self.is_periodic() {
            // A count of 1 is illegal there.
            let reload = reload.max(2);
            if self.loaded && self.stopped_at.is_none() {
                // The running period ends first.
                let periods = self.elapsed(tick) / self.reload + 1;
                self.next_reload = Some((self.start + periods * self.reload, reload));
                return;
            }
            self.reload = reload;
        } else {
            self.reload = reload;
        }
        if matches!(self.mode, 1 | 5) {
            self.waiting = true;
            return;
        }
        self.begin(tick);
        if !self.gate {
            self.stopped_at = Some(0);
        }
    }

    fn begin(&mut self, tick: u64) {
        self.loaded = true;
        self.start = tick + 1;
        self.stopped_at = None;
        self.settled = tick;
    }

    fn set_gate(&mut self, gate: bool, tick: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, gate) {
            // These are triggered by the edge, and again by every other one.
            (1 | 5, true) if self.waiting || self.loaded => {
                self.waiting = false;
                self.begin(tick);
            }
            (1 | 5, _) => {}
            (2 | 3, true) if self.loaded => self.begin(tick),
            (_, true) => {
                if let Some(elapsed) = self.stopped_at.take() {
                    self.start = tick.saturating_sub(elapsed);
                }
            }
            (_, false) => {
                if self.loaded {
                    self.stopped_at = Some(self.elapsed(tick));
                }
            }
        }
    }

    fn latch_count(&mut self, tick: u64) {
        if self.count_latch.is_none() {
            self.count_latch = Some(Latch {
                count: self.count(tick),
                high_next: self.access == Access::High,
            });
        }
    }

    fn latch_status(&mut self, tick: u64) {
        let null_count = !self.loaded || self.next_reload.is_some() || tick < self.start;
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::LowThenHigh => 3,
        };
        let status = u8::from(self.output(tick)) << 7
            | u8::from(null_count) << 6
            | access << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.status_latch.get_or_insert(status);
    }

    fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.status_latch.take() {
            return status;
        }
        if let Some(latch) = self.count_latch {
            let [low, high] = latch.count.to_le_bytes();
            self.count_latch =
                (self.access == Access::LowThenHigh && !latch.high_next).then_some(Latch {
                    high_next: true,
                    ..latch
                });
            return if latch.high_next { high } else { low };
        }
        let [low, high] = self.count(tick).to_le_bytes();
        match self.access {
            Access::Low => low,
            Access::High => high,
            Access::LowThenHigh => {
                self.read_high_next = !self.read_high_next;
                if self.read_high_next { low } else { high }
            }
        }
    }
}

/// The 8254 with port B.
#[derive(Clone, Debug)]
pub struct Pit {
    channels: [Channel; 3],
    /// Bits 3:0 of port B.
    control_b: u8,
    interrupt: bool,
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl Pit {
    /// As firmware leaves it: channel 0 at 18.2 Hz, channel 2 silent.
    pub fn new() -> Self {
        Self {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            control_b: 0,
            interrupt: false,
        }
    }

    /// Lets time pass; whether channel 0's output rose at least once. Edges missed count as one.
    pub fn settle(&mut self, now: u64) -> bool {
        let tick = ticks_at(now, PIT_HZ);
        let rose = self.channels[0].settle(tick);
        self.channels[1].settle(tick);
        self.channels[2].settle(tick);
        // In the modes that repeat, the line is held high from one edge to the next rather than
        // following the output: a tick is not to be lost because its interrupt was taken late.
        if rose {
            self.interrupt = true;
        } else if self.channels[0].mode == 0 && !self.channels[0].output(tick) {
            self.interrupt = false;
        }
        rose
    }

    /// The level of channel 0's interrupt line.
    pub fn interrupt(&self) -> bool {
        self.interrupt
    }

    /// When channel 0's output next rises, nanoseconds of VM time.
    pub fn deadline(&self) -> Option<u64> {
        self.channels[0]
            .next_edge()
            .map(|tick| time_of(tick, PIT_HZ))
    }

    /// Reads port 0x40 to 0x43.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        // The control word cannot be read.
        self.channels
            .get_mut(usize::from(port & 3))
            .map_or(0xff, |channel| channel.read(ticks_at(now, PIT_HZ)))
    }

    /// Writes port 0x40 to 0x43. Call [`settle`](Self::settle) before and after.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        let tick = ticks_at(now, PIT_HZ);
        if let Some(channel) = self.channels.get_mut(usize::from(port & 3)) {
            channel.write(value, tick);
            return;
        }
        match (usize::from(value >> 6), value >> 4 & 3) {
            (3, _) => self.read_back(value, tick),
            (channel, 0) => self.channels[channel].latch_count(tick),
            (channel, _) => self.channels[channel].set_mode(value),
        }
    }

    fn read_back(&mut self, command: u8, tick: u64) {
        for (index, channel) in self.channels.iter_mut().enumerate() {
            if command & 2 << index == 0 {
                continue;
            }
            if command & 0x20 == 0 {
                channel.latch_count(tick);
            }
            if command & 0x10 == 0 {
                channel.latch_status(tick);
            }
        }
    }

    /// Reads port 0x61: gate, speaker, refresh toggle (bit 4), output of channel 2 (bit 5).
    pub fn read_control_b(&mut self, now: u64) -> u8 {
        let output = self.channels[2].output(ticks_at(now, PIT_HZ));
        self.control_b | ((now / REFRESH_NS) as u8 & 1) << 4 | u8::from(output) << 5
    }

    /// Writes port 0x61: bit 0 is channel 2's gate, bit 1 lets it reach the speaker.
    pub fn write_control_b(&mut self, value: u8, now: u64) {
        self.control_b = value & 0x0f;
        self.channels[2].set_gate(value & 1 != 0, ticks_at(now, PIT_HZ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(tick: u64) -> u64 {
        time_of(tick, PIT_HZ)
    }

    /// Control word and count, written at tick 0.
    fn programmed(channel: u16, control: u8, count: u16) -> Pit {
        let mut pit = Pit::new();
        pit.write(3, (channel as u8) << 6 | control, 0);
        pit.write(channel, count as u8, 0);
        pit.write(channel, (count >> 8) as u8, 0);
        pit.settle(0);
        pit
    }

    fn latched(pit: &mut Pit, channel: u16, tick: u64) -> u16 {
        pit.write(3, (channel as u8) << 6, at(tick));
        u16::from(pit.read(channel, at(tick))) | u16::from(pit.read(channel, at(tick))) << 8
    }

    #[test]
    fn rate_generator_rises_once_a_period_and_does_not_drift() {
        let mut pit = programmed(0, 0x34, 11_932);
        let mut now = 0;
        for period in 1..=1000 {
            now = pit.deadline().unwrap();
            assert_eq!(ticks_at(now, PIT_HZ), 1 + period * 11_932);
            assert!(!pit.settle(now - 1));
            assert!(pit.settle(now));
        }
        // 1000 periods of 10.00015 ms, to the tick.
        assert_eq!(now, at(1 + 11_932_000));
    }

    #[test]
    fn missed_periods_are_one_edge_and_the_phase_stays() {
        let mut pit = programmed(0, 0x34, 1000);
        assert!(pit.settle(at(1 + 5500)));
        assert!(!pit.settle(at(1 + 5999)));
        assert_eq!(pit.deadline(), Some(at(1 + 6000)));
    }

    #[test]
    fn tiny_periods_wake_nobody_more_often_than_every_20_microseconds() {
        let mut pit = programmed(0, 0x34, 2);
        let first = pit.deadline().unwrap();
        pit.settle(first);
        assert!(pit.deadline().unwrap() - first >= 20_000);
    }

    #[test]
    fn rate_generator_counts_down_and_reloads() {
        let mut pit = programmed(0, 0x34, 1000);
        assert_eq!(latched(&mut pit, 0, 1), 1000);
        assert_eq!(latched(&mut pit, 0, 1 + 999), 1);
        assert_eq!(latched(&mut pit, 0, 1 + 1000), 1000);
    }

    #[test]
    fn latched_count_stays_until_it_was_read() {
        let mut pit = programmed(0, 0x34, 1000);
        pit.write(3, 0, at(101));
        pit.write(3, 0, at(201));
        assert_eq!(pit.read(0, at(301)), (900u16 & 0xff) as u8);
        assert_eq!(pit.read(0, at(301)), (900u16 >> 8) as u8);
        assert_eq!(latched(&mut pit, 0, 401), 600);
    }

    #[test]
    fn terminal_count_raises_the_output_once() {
        let mut pit = programmed(0, 0x30, 100);
        assert!(!pit.settle(at(100)));
        assert!(!pit.interrupt());
        assert_eq!(pit.deadline(), Some(at(101)));
        assert!(pit.settle(at(101)));
        assert!(pit.interrupt());
        assert_eq!(pit.deadline(), None);
        assert!(!pit.settle(at(100_000)));
    }

    #[test]
    fn terminal_count_goes_on_counting_below_zero() {
        let mut pit = programmed(0, 0x30, 100);
        assert_eq!(latched(&mut pit, 0, 1 + 101), 0xffff);
    }

    /// Linux stops the timer this way (pit_shutdown): a control word and no count.
    #[test]
    fn control_word_without_a_count_stops_the_channel() {
        let mut pit = programmed(0, 0x34, 1000);
        pit.write(3, 0x30, at(10));
        assert_eq!(pit.deadline(), None);
        assert!(!pit.settle(at(5000)));
    }

    #[test]
    fn software_strobe_fires_one_tick_after_the_count() {
        let mut pit = programmed(0, 0x38, 100);
        assert_eq!(pit.deadline(), Some(at(102)));
        assert!(pit.settle(at(102)));
        assert_eq!(pit.deadline(), None);
    }

    #[test]
    fn square_wave_is_high_for_the_longer_half() {
        let mut pit = programmed(2, 0xb6, 5);
        pit.write_control_b(1, 0);
        let high: Vec<bool> = (1..11)
            .map(|tick| pit.read_control_b(at(tick)) & 0x20 != 0)
            .collect();
        assert_eq!(
            high,
            [
                true, true, true, false, false, true, true, true, false, false
            ]
        );
    }

    #[test]
    fn square_wave_counts_by_two() {
        let mut pit = programmed(0, 0x36, 1000);
        assert_eq!(latched(&mut pit, 0, 1 + 100), 800);
        assert_eq!(latched(&mut pit, 0, 1 + 600), 800);
    }

    /// Linux measures the TSC so (pit_calibrate_tsc): channel 2 in mode 0, polling OUT2 in port B.
    #[test]
    fn channel_2_counts_while_its_gate_is_high() {
        let mut pit = Pit::new();
        pit.write_control_b(0x01, 0);
        pit.write(3, 0xb0, 0);
        pit.write(2, 0xe8, 0);
        pit.write(2, 0x03, 0);
        assert_eq!(pit.read_control_b(at(1000)) & 0x20, 0);
        assert_eq!(pit.read_control_b(at(1001)) & 0x20, 0x20);
    }

    #[test]
    fn gate_pauses_mode_0() {
        let mut pit = programmed(2, 0xb0, 1000);
        assert_eq!(pit.read_control_b(at(5000)) & 0x20, 0);
        pit.write_control_b(1, at(5000));
        pit.write_control_b(0, at(5500));
        assert_eq!(latched(&mut pit, 2, 9000), 500);
        pit.write_control_b(1, at(9000));
        assert_eq!(pit.read_control_b(at(9499)) & 0x20, 0);
        assert_eq!(pit.read_control_b(at(9500)) & 0x20, 0x20);
    }

    #[test]
    fn gate_triggers_the_one_shot_of_mode_1() {
        let mut pit = programmed(2, 0xb2, 100);
        assert_eq!(pit.read_control_b(at(50)) & 0x20, 0x20);
        pit.write_control_b(1, at(50));
        assert_eq!(pit.read_control_b(at(52)) & 0x20, 0);
        assert_eq!(pit.read_control_b(at(151)) & 0x20, 0x20);
    }

    #[test]
    fn read_back_latches_status_before_count() {
        let mut pit = programmed(0, 0x34, 1000);
        pit.write(3, 0xc2, at(101));
        assert_eq!(pit.read(0, at(101)), 0x80 | 0x34);
        assert_eq!(pit.read(0, at(101)), (900u16 & 0xff) as u8);
    }

    #[test]
    fn null_count_shows_until_a_count_is_loaded() {
        let mut pit = Pit::new();
        pit.write(3, 0x34, 0);
        pit.write(3, 0xe2, 0);
        assert_eq!(pit.read(0, 0) & 0x40, 0x40);
    }

    #[test]
    fn new_count_of_a_rate_generator_waits_for_the_end_of_the_period() {
        let mut pit = programmed(0, 0x34, 1000);
        pit.write(0, 0xf4, at(500));
        pit.write(0, 0x01, at(500));
        assert_eq!(pit.deadline(), Some(at(1001)));
        assert!(pit.settle(at(1001)));
        assert_eq!(pit.deadline(), Some(at(1501)));
    }

    #[test]
    fn bcd_counts_in_decimal() {
        let mut pit = programmed(0, 0x35, 0x1000);
        assert_eq!(latched(&mut pit, 0, 1 + 1), 0x0999);
    }

    #[test]
    fn count_of_zero_is_the_largest() {
        let pit = programmed(0, 0x34, 0);
        assert_eq!(pit.deadline(), Some(at(65_537)));
    }

    #[test]
    fn refresh_bit_toggles() {
        let mut pit = Pit::new();
        assert_ne!(
            pit.read_control_b(0) & 0x10,
            pit.read_control_b(15_085) & 0x10
        );
    }
}
