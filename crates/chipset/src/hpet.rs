//! The high-precision event timer (IA-PC HPET Specification 1.0a).

mod saved;

pub use saved::{HpetState, TimerState};

use crate::map::{RTC_GSI, TIMER_GSI};

/// Nanoseconds a count of the main counter takes: 100 MHz.
const COUNT_NS: u64 = 10;
const FEMTOSECONDS: u64 = COUNT_NS * 1_000_000;
const TIMERS: usize = 3;

/// Capabilities: revision 1, three timers, 64-bit counter, legacy replacement, vendor 0x8086.
const CAPABILITIES: u64 =
    FEMTOSECONDS << 32 | 0x8086 << 16 | 1 << 15 | 1 << 13 | (TIMERS as u64 - 1) << 8 | 1;

const ENABLE: u64 = 1;
const LEGACY: u64 = 2;

const LEVEL: u64 = 1 << 1;
const INTERRUPT: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const SET_ACCUMULATOR: u64 = 1 << 6;
const MODE_32: u64 = 1 << 8;
const ROUTE: u64 = 0x1f << 9;
const TIMER_WRITABLE: u64 = LEVEL | INTERRUPT | PERIODIC | SET_ACCUMULATOR | MODE_32 | ROUTE;
/// GSIs a timer may be routed to: 20 to 23, which nothing of ISA uses.
const ROUTES: u64 = 0x00f0_0000;
/// Periodic mode, 64-bit comparator, routes.
const TIMER_CAPABILITIES: u64 = ROUTES << 32 | 1 << 5 | 1 << 4;

/// Counts between two interrupts of a periodic timer at least (20 µs); the phase is kept.
const MIN_PERIOD: u64 = 20_000 / COUNT_NS;

/// One comparator.
#[derive(Clone, Debug)]
struct Timer {
    config: u64,
    comparator: u64,
    period: u64,
    /// Up to this count matches have been reported.
    settled: u64,
}

impl Timer {
    fn mask(&self) -> u64 {
        if self.config & MODE_32 != 0 {
            0xffff_ffff
        } else {
            u64::MAX
        }
    }

    /// Counts from `settled` to the next match, at least 1; `None` is 2^64.
    fn distance(&self) -> Option<u64> {
        match self.comparator.wrapping_sub(self.settled) & self.mask() {
            0 => self.mask().checked_add(1),
            distance => Some(distance),
        }
    }

    /// Lets the counter advance to `count`; whether it matched on the way.
    fn settle(&mut self, count: u64) -> bool {
        let span = count.wrapping_sub(self.settled);
        let Some(distance) = self.distance().filter(|&distance| distance <= span) else {
            self.settled = count;
            return false;
        };
        self.settled = count;
        if self.config & PERIODIC != 0 && self.period != 0 {
            let gap = if self.period < MIN_PERIOD {
                MIN_PERIOD
            } else {
                1
            };
            let periods = (span - distance).saturating_add(gap).div_ceil(self.period);
            self.comparator = self
                .comparator
                .wrapping_add(periods.wrapping_mul(self.period))
                & self.mask();
        }
        true
    }
}

/// The HPET.
#[derive(Clone, Debug)]
pub struct Hpet {
    config: u64,
    status: u64,
    /// Main counter, while it is halted; else what is to be added to the time.
    counter: u64,
    timers: [Timer; TIMERS],
    /// GSIs on which an edge is due.
    pulses: u32,
}

impl Default for Hpet {
    fn default() -> Self {
        Self::new()
    }
}

impl Hpet {
    /// After reset: halted at zero.
    pub fn new() -> Self {
        let timer = Timer {
            config: 20 << 9,
            comparator: u64::MAX,
            period: 0,
            settled: 0,
        };
        Self {
            config: 0,
            status: 0,
            counter: 0,
            timers: [timer.clone(), timer.clone(), timer],
            pulses: 0,
        }
    }

    fn is_enabled(&self) -> bool {
        self.config & ENABLE != 0
    }

    /// Whether timers 0 and 1 stand in for PIT and RTC, whose interrupts are disconnected then.
    pub fn is_legacy(&self) -> bool {
        self.config & (LEGACY | ENABLE) == LEGACY | ENABLE
    }

    fn count(&self, now: u64) -> u64 {
        if self.is_enabled() {
            (now / COUNT_NS).wrapping_add(self.counter)
        } else {
            self.counter
        }
    }

    /// Where a timer's interrupt goes.
    fn gsi(&self, timer: usize) -> u32 {
        match timer {
            0 if self.is_legacy() => TIMER_GSI,
            1 if self.is_legacy() => RTC_GSI,
            _ => (self.timers[timer].config >> 9 & 0x1f) as u32,
        }
    }

    /// Lets time pass.
    pub fn settle(&mut self, now: u64) {
        if !self.is_enabled() {
            return;
        }
        let count = self.count(now);
        for index in 0..TIMERS {
            let timer = &mut self.timers[index];
            if timer.settle(count) && timer.config & INTERRUPT != 0 {
                if timer.config & LEVEL != 0 {
                    self.status |= 1 << index;
                } else {
                    self.pulses |= 1 << self.gsi(index);
                }
            }
        }
    }

    /// GSIs that edge-triggered timers have pulsed since the last call, a bit each.
    pub fn take_pulses(&mut self) -> u32 {
        std::mem::take(&mut self.pulses)
    }

    /// GSIs that level-triggered timers hold, a bit each.
    pub fn levels(&self) -> u32 {
        (0..TIMERS)
            .filter(|&timer| {
                self.status & 1 << timer != 0 && self.timers[timer].config & INTERRUPT != 0
            })
            .fold(0, |levels, timer| levels | 1 << self.gsi(timer))
    }

    /// When a timer whose interrupt is enabled, and not masked at the GSI it goes to, is next due:
    /// nanoseconds of VM time. A level-triggered timer that holds its line already is not waited for.
    pub fn deadline(&self, is_heard: impl Fn(u32) -> bool) -> Option<u64> {
        if !self.is_enabled() {
            return None;
        }
        let due = |index: usize| {
            let timer = &self.timers[index];
            let holds_line = self.status & 1 << index != 0;
            if timer.config & INTERRUPT == 0 || holds_line || !is_heard(self.gsi(index)) {
                return None;
            }
            // `settled` may be one count before VM time 0.
            let settled = i128::from(timer.settled.wrapping_sub(self.counter).cast_signed());
            let count = settled + i128::from(timer.distance()?);
            u64::try_from(count * i128::from(COUNT_NS)).ok()
        };
        (0..TIMERS).filter_map(due).min()
    }

    /// Reads bytes of the register block.
    pub fn read(&mut self, offset: u64, data: &mut [u8], now: u64) {
        data.fill(0);
        let value = self.read_register(offset & !7, now);
        let bytes = value.to_le_bytes();
        for (to, from) in data.iter_mut().zip(&bytes[(offset & 7) as usize..]) {
            *to = *from;
        }
    }

    fn read_register(&mut self, offset: u64, now: u64) -> u64 {
        self.settle(now);
        match offset {
            0x000 => CAPABILITIES,
            0x010 => self.config,
            0x020 => self.status,
            0x0f0 => self.count(now),
            _ => match self.timer_at(offset) {
                Some((index, 0x00)) => self.timers[index].config | TIMER_CAPABILITIES,
                Some((index, 0x08)) => self.timers[index].comparator,
                _ => 0,
            },
        }
    }

    fn timer_at(&self, offset: u64) -> Option<(usize, u64)> {
        let index = offset.checked_sub(0x100)? / 0x20;
        (index < TIMERS as u64).then_some((index as usize, offset & 0x18))
    }

    /// Writes an aligned 32 or 64-bit register; anything else is undefined (2.3.2) and ignored.
    pub fn write(&mut self, offset: u64, data: &[u8], now: u64) {
        let mut bytes = [0; 8];
        let start = (offset & 7) as usize;
        if !matches!((data.len(), start), (4, 0 | 4) | (8, 0)) {
            return;
        }
        bytes[start..start + data.len()].copy_from_slice(data);
        let mask = if data.len() == 8 {
            u64::MAX
        } else {
            0xffff_ffff << (8 * start)
        };
        self.settle(now);
        self.write_register(offset & !7, u64::from_le_bytes(bytes), mask, now);
    }

    /// Writes the bits in `mask` of a register.
    fn write_register(&mut self, offset: u64, value: u64, mask: u64, now: u64) {
        let merge = |old: u64| old & !mask | value & mask;
        match offset {
            0x010 => self.set_config(merge(self.config) & (ENABLE | LEGACY), now),
            // Write one to clear.
            0x020 => self.status &= !(value & mask),
            0x0f0 => {
                let count = merge(self.count(now));
                self.counter = if self.is_enabled() {
                    count.wrapping_sub(now / COUNT_NS)
                } else {
                    count
                };
                self.timers
                    .iter_mut()
                    .for_each(|timer| timer.settled = count);
            }
            _ => match self.timer_at(offset) {
                Some((index, 0x00)) => {
                    self.configure_timer(index, merge(self.timers[index].config))
                }
                Some((index, 0x08)) => self.write_comparator(index, value, mask, now),
                _ => {}
            },
        }
    }

    fn set_config(&mut self, value: u64, now: u64) {
        let count = self.count(now);
        self.config = value;
        self.counter = if self.is_enabled() {
            count.wrapping_sub(now / COUNT_NS)
        } else {
            count
        };
    }

    fn configure_timer(&mut self, index: usize, value: u64) {
        let timer = &mut self.timers[index];
        let mut value = value & TIMER_WRITABLE;
        if ROUTES >> (value >> 9 & 0x1f) & 1 == 0 {
            // Software finds out by reading back that the route is not there (2.3.8).
            value = value & !ROUTE | timer.config & ROUTE;
        }
        if value & PERIODIC == 0 {
            value &= !SET_ACCUMULATOR;
        }
        timer.config = value;
        if value & MODE_32 != 0 {
            timer.comparator &= 0xffff_ffff;
            timer.period &= 0xffff_ffff;
        }
        if value & LEVEL == 0 {
            self.status &= !(1 << index);
        }
    }

    fn write_comparator(&mut self, index: usize, value: u64, mask: u64, now: u64) {
        let count = self.count(now);
        let timer = &mut self.timers[index];
        let limit = timer.mask();
        let merge = |old: u64| (old & !mask | value & mask) & limit;
        if timer.config & PERIODIC == 0 || timer.config & SET_ACCUMULATOR != 0 {
            timer.comparator = merge(timer.comparator);
        }
        if timer.config & PERIODIC != 0 {
            // Without the accumulator bit, only the period changes (2.3.9.2.2).
            timer.period = merge(timer.period);
            timer.config &= !SET_ACCUMULATOR;
        }
        // A comparator equal to the counter matches now.
        timer.settled = count.wrapping_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(hpet: &mut Hpet, offset: u64, now: u64) -> u64 {
        let mut data = [0; 8];
        hpet.read(offset, &mut data, now);
        u64::from_le_bytes(data)
    }

    fn write(hpet: &mut Hpet, offset: u64, value: u64, now: u64) {
        hpet.write(offset, &value.to_le_bytes(), now);
    }

    fn enabled() -> Hpet {
        let mut hpet = Hpet::new();
        write(&mut hpet, 0x10, ENABLE, 0);
        hpet
    }

    #[test]
    fn capabilities_tell_period_and_timers() {
        let mut hpet = Hpet::new();
        let capabilities = read(&mut hpet, 0, 0);
        assert_eq!(capabilities >> 32, 10_000_000);
        assert_eq!(capabilities >> 8 & 0x1f, 2);
        assert_eq!(capabilities as u32, 0x8086_a201);
    }

    #[test]
    fn halves_of_a_register_can_be_read() {
        let mut hpet = Hpet::new();
        let mut half = [0; 4];
        hpet.read(4, &mut half, 0);
        assert_eq!(u32::from_le_bytes(half), 10_000_000);
    }

    #[test]
    fn counter_stands_until_enabled_and_keeps_its_value_when_halted() {
        let mut hpet = Hpet::new();
        assert_eq!(read(&mut hpet, 0xf0, 5000), 0);
        write(&mut hpet, 0x10, ENABLE, 1000);
        assert_eq!(read(&mut hpet, 0xf0, 2000), 100);
        write(&mut hpet, 0x10, 0, 3000);
        assert_eq!(read(&mut hpet, 0xf0, 9000), 200);
    }

    #[test]
    fn counter_can_be_set() {
        let mut hpet = Hpet::new();
        write(&mut hpet, 0xf0, 0xffff_ffff_0000_0000, 0);
        write(&mut hpet, 0x10, ENABLE, 0);
        assert_eq!(read(&mut hpet, 0xf0, 100), 0xffff_ffff_0000_000a);
    }

    #[test]
    fn one_shot_timer_pulses_its_route_once() {
        let mut hpet = enabled();
        write(&mut hpet, 0x140, INTERRUPT | 21 << 9, 0);
        write(&mut hpet, 0x148, 1000, 0);
        assert_eq!(hpet.deadline(|_| true), Some(10_000));
        hpet.settle(9_999);
        assert_eq!(hpet.take_pulses(), 0);
        hpet.settle(10_000);
        assert_eq!(hpet.take_pulses(), 1 << 21);
        assert_eq!(hpet.take_pulses(), 0);
        assert_eq!(hpet.deadline(|_| true), None);
    }

    #[test]
    fn comparator_equal_to_the_counter_matches_now() {
        let mut hpet = enabled();
        write(&mut hpet, 0x100, INTERRUPT, 0);
        write(&mut hpet, 0x108, 100, 1000);
        assert_eq!(hpet.deadline(|_| true), Some(1000));
        hpet.settle(1000);
        assert_eq!(hpet.take_pulses(), 1 << 20);
    }

    #[test]
    fn comparator_in_the_past_waits_for_the_32_bit_wrap() {
        let mut hpet = enabled();
        write(&mut hpet, 0x100, INTERRUPT | MODE_32, 0);
        write(&mut hpet, 0x108, 100, 2000);
        assert_eq!(hpet.deadline(|_| true), Some(((1 << 32) + 100) * 10));
    }

    /// As Linux programs it (hpet_clkevt_set_state_periodic): accumulator, then period.
    #[test]
    fn periodic_timer_does_not_drift() {
        let mut hpet = enabled();
        write(
            &mut hpet,
            0x100,
            INTERRUPT | PERIODIC | SET_ACCUMULATOR | MODE_32,
            0,
        );
        write(&mut hpet, 0x108, 500_000, 0);
        write(&mut hpet, 0x108, 100_000, 10);
        for tick in 5..50 {
            assert_eq!(hpet.deadline(|_| true), Some(tick * 1_000_000));
            hpet.settle(tick * 1_000_000 + 7);
            assert_eq!(hpet.take_pulses(), 1 << 20);
        }
    }

    #[test]
    fn missed_periods_are_one_pulse() {
        let mut hpet = enabled();
        write(&mut hpet, 0x100, INTERRUPT | PERIODIC | SET_ACCUMULATOR, 0);
        write(&mut hpet, 0x108, 100_000, 0);
        hpet.settle(5_500_000);
        assert_eq!(hpet.take_pulses(), 1 << 20);
        assert_eq!(hpet.deadline(|_| true), Some(6_000_000));
    }

    #[test]
    fn tiny_periods_are_clamped() {
        let mut hpet = enabled();
        write(&mut hpet, 0x100, INTERRUPT | PERIODIC | SET_ACCUMULATOR, 0);
        write(&mut hpet, 0x108, 1, 0);
        hpet.settle(10);
        assert!(hpet.deadline(|_| true).unwrap() >= 20_000);
    }

    #[test]
    fn level_timer_holds_its_line_until_cleared() {
        let mut hpet = enabled();
        write(&mut hpet, 0x100, INTERRUPT | LEVEL | 22 << 9, 0);
        write(&mut hpet, 0x108, 100, 0);
        hpet.settle(1000);
        assert_eq!(hpet.levels(), 1 << 22);
        assert_eq!(read(&mut hpet, 0x20, 1000), 1);
        write(&mut hpet, 0x20, 1, 1000);
        assert_eq!(hpet.levels(), 0);
    }

    #[test]
    fn legacy_replacement_takes_the_lines_of_pit_and_rtc() {
        let mut hpet = enabled();
        write(&mut hpet, 0x10, ENABLE | LEGACY, 0);
        write(&mut hpet, 0x100, INTERRUPT, 0);
        write(&mut hpet, 0x108, 100, 0);
        write(&mut hpet, 0x120, INTERRUPT, 0);
        write(&mut hpet, 0x128, 100, 0);
        hpet.settle(1000);
        assert!(hpet.is_legacy());
        assert_eq!(hpet.take_pulses(), 1 << 2 | 1 << 8);
    }

    #[test]
    fn route_that_is_not_there_is_not_taken() {
        let mut hpet = enabled();
        write(&mut hpet, 0x100, 23 << 9, 0);
        write(&mut hpet, 0x100, 3 << 9, 0);
        let config = read(&mut hpet, 0x100, 0);
        assert_eq!(config >> 9 & 0x1f, 23);
        assert_eq!(config >> 32, 0x00f0_0000);
    }

    #[test]
    fn disabled_interrupt_has_no_deadline() {
        let mut hpet = enabled();
        write(&mut hpet, 0x108, 100, 0);
        assert_eq!(hpet.deadline(|_| true), None);
        hpet.settle(5000);
        assert_eq!(hpet.take_pulses(), 0);
    }

    #[test]
    fn timer_nobody_hears_has_no_deadline() {
        let mut hpet = enabled();
        write(&mut hpet, 0x100, INTERRUPT | 21 << 9, 0);
        write(&mut hpet, 0x108, 100, 0);
        assert_eq!(hpet.deadline(|gsi| gsi != 21), None);
        assert_eq!(hpet.deadline(|gsi| gsi == 21), Some(1000));
    }

    #[test]
    fn odd_accesses_are_ignored() {
        let mut hpet = enabled();
        hpet.write(0x108, &[1, 2], 0);
        hpet.write(0x10c, &[0; 8], 0);
        assert_eq!(read(&mut hpet, 0x108, 0), u64::MAX);
        assert_eq!(read(&mut hpet, 0x3f8, 0), 0);
    }
}
