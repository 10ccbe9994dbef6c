//! The real-time clock and CMOS memory (Motorola MC146818A data sheet, with the PC's memory bytes).

mod saved;

pub use saved::RtcState;

use crate::map::RTC_CENTURY;
use crate::ticks::{NS_PER_SECOND, ticks_at, time_of};

const SECONDS: usize = 0;
const SECONDS_ALARM: usize = 1;
const MINUTES: usize = 2;
const MINUTES_ALARM: usize = 3;
const HOURS: usize = 4;
const HOURS_ALARM: usize = 5;
const WEEKDAY: usize = 6;
const DAY: usize = 7;
const MONTH: usize = 8;
const YEAR: usize = 9;
const A: usize = 10;
const B: usize = 11;
const C: usize = 12;
const D: usize = 13;
const CENTURY: usize = RTC_CENTURY as usize;

const A_UPDATE_IN_PROGRESS: u8 = 0x80;
const B_SET: u8 = 0x80;
const B_PERIODIC: u8 = 0x40;
const B_ALARM: u8 = 0x20;
const B_UPDATE: u8 = 0x10;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
const C_REQUEST: u8 = 0x80;
const D_VALID: u8 = 0x80;

const SECONDS_PER_DAY: i64 = 86_400;
const OSCILLATOR_HZ: u64 = 32_768;

/// Update in progress is set 244 µs before an update cycle, which takes 1984 µs.
const UPDATE_NS: i128 = 2_228_000;

/// After the divider is started, the first update comes half a second later.
const FIRST_UPDATE_NS: i128 = 500_000_000;

/// The clock, its alarms, and 128 bytes of memory.
#[derive(Clone, Debug)]
pub struct Rtc {
    index: u8,
    /// Bit 7 of the index port.
    nmi_masked: bool,
    /// Registers A, B, C, the alarms and memory; the time registers only while the clock stands.
    cells: [u8; 128],
    /// The clock's time (seconds since 1970 in its own calendar) at `base_ns`.
    base_seconds: i64,
    /// Some beginning of a second, nanoseconds of VM time; negative if it was before VM time 0.
    base_ns: i64,
    /// What is to be added to the day of the week, for a guest that sets a wrong one.
    weekday_offset: i64,
    /// The divider was reset: the next second begins half a second after it starts.
    divider_reset: bool,
    settled: u64,
}

impl Rtc {
    /// A clock that shows `utc` (nanoseconds since 1970) at VM time 0, and memory sizes (bytes)
    /// where firmware writes them. Its seconds begin when the world's do: dropping the fraction
    /// would put a guest's clock behind by up to a second.
    pub fn new(utc: u64, memory_below_4g: u64, memory_above_4g: u64) -> Self {
        let mut cells = [0; 128];
        cells[A] = 0x26;
        cells[B] = B_24_HOURS;
        // Equipment: mathematics coprocessor and pointing device.
        cells[0x14] = 0x06;
        let mut put = |at: usize, value: u64, bytes: usize| {
            let value = value.min((1 << (8 * bytes)) - 1);
            cells[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        };
        put(0x15, 640, 2);
        let extended_kib = (memory_below_4g >> 10).saturating_sub(1024);
        put(0x17, extended_kib, 2);
        put(0x30, extended_kib, 2);
        put(0x34, memory_below_4g.saturating_sub(16 << 20) >> 16, 2);
        put(0x5b, memory_above_4g >> 16, 3);
        Self {
            index: 0,
            nmi_masked: false,
            cells,
            base_seconds: (utc / NS_PER_SECOND) as i64,
            base_ns: -((utc % NS_PER_SECOND) as i64),
            weekday_offset: 0,
            divider_reset: false,
            settled: 0,
        }
    }

    /// Whether the guest masked NMI (bit 7 of port 0x70).
    pub fn is_nmi_masked(&self) -> bool {
        self.nmi_masked
    }

    fn divider_runs(&self) -> bool {
        self.cells[A] & 0x70 == 0x20
    }

    fn runs(&self) -> bool {
        self.cells[B] & B_SET == 0 && self.divider_runs()
    }

    /// Whole seconds from `base_ns`, and nanoseconds into the current one.
    fn since_base(&self, now: u64) -> (i64, i128) {
        let ns = i128::from(now) - i128::from(self.base_ns);
        let second = i128::from(NS_PER_SECOND);
        (ns.div_euclid(second) as i64, ns.rem_euclid(second))
    }

    fn seconds(&self, now: u64) -> i64 {
        self.base_seconds.saturating_add(self.since_base(now).0)
    }

    /// When the clock shows `seconds`, nanoseconds of VM time.
    fn time_of_second(&self, seconds: i64) -> Option<u64> {
        let ahead = i128::from(seconds) - i128::from(self.base_seconds);
        u64::try_from(i128::from(self.base_ns) + ahead * i128::from(NS_PER_SECOND)).ok()
    }

    // Interrupts

    /// Oscillator cycles a period of the periodic interrupt takes.
    fn period(&self) -> Option<u64> {
        match self.cells[A] & 15 {
            0 => None,
            // With the 32.768 kHz crystal, rates 1 and 2 are those of 8 and 9.
            rate @ (1 | 2) => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
        .filter(|_| self.divider_runs())
    }

    /// Lets time pass: sets the interrupt flags for what happened since the last call.
    pub fn settle(&mut self, now: u64) {
        if now <= self.settled {
            return;
        }
        let before = std::mem::replace(&mut self.settled, now);
        if let Some(period) = self.period()
            && ticks_at(now, OSCILLATOR_HZ) / period > ticks_at(before, OSCILLATOR_HZ) / period
        {
            self.cells[C] |= B_PERIODIC;
        }
        if self.runs() {
            self.note_seconds(self.seconds(before), self.seconds(now));
        }
    }

    /// Sets the interrupt flags for the clock's way from one second to another.
    fn note_seconds(&mut self, from: i64, to: i64) {
        if to > from {
            self.cells[C] |= B_UPDATE;
            if self.next_alarm(from).is_some_and(|alarm| alarm <= to) {
                self.cells[C] |= B_ALARM;
            }
        }
    }

    /// Lets the clock go on by `away` nanoseconds in which there was no VM time. An alarm that was due then
    /// rings now.
    pub fn run_on_battery(&mut self, away: u64, now: u64) {
        self.settle(now);
        if !self.runs() {
            return;
        }
        let from = self.seconds(now);
        let second = i128::from(NS_PER_SECOND);
        let begun = i128::from(self.base_ns) - i128::from(away);
        // Back into the second before VM time 0, if it is further away.
        let seconds = (-begun).div_euclid(second).max(0);
        // Less than 2^64 ns are less than 2^35 seconds.
        self.base_seconds = self.base_seconds.saturating_add(seconds as i64);
        self.base_ns = (begun + seconds * second) as i64;
        self.note_seconds(from, self.seconds(now));
    }

    /// The level of the interrupt line (register C, bit 7).
    pub fn interrupt(&self) -> bool {
        self.cells[B] & self.cells[C] & (B_PERIODIC | B_ALARM | B_UPDATE) != 0
    }

    /// When an enabled interrupt is next due. `None` while one is pending: the line is high until the
    /// guest reads register C.
    pub fn deadline(&self) -> Option<u64> {
        if self.interrupt() {
            return None;
        }
        let enabled = self.cells[B];
        let mut deadline = None;
        let mut earliest = |at: Option<u64>| deadline = deadline.into_iter().chain(at).min();
        if enabled & B_PERIODIC != 0
            && let Some(period) = self.period()
        {
            let tick = (ticks_at(self.settled, OSCILLATOR_HZ) / period + 1) * period;
            earliest(Some(time_of(tick, OSCILLATOR_HZ)));
        }
        if self.runs() {
            let seconds = self.seconds(self.settled);
            if enabled & B_UPDATE != 0 {
                earliest(self.time_of_second(seconds.saturating_add(1)));
            }
            if enabled & B_ALARM != 0 {
                earliest(
                    self.next_alarm(seconds)
                        .and_then(|alarm| self.time_of_second(alarm)),
                );
            }
        }
        deadline
    }

    /// The first second after `after` that the alarm registers match; `None` if there is none.
    fn next_alarm(&self, after: i64) -> Option<i64> {
        let field = |cell: usize, limit: u32, decode: &dyn Fn(u8) -> u32| match self.cells[cell] {
            // "Don't care" codes.
            0xc0.. => Some(None),
            value => Some(Some(decode(value))).filter(|field| *field < Some(limit)),
        };
        let hour = field(HOURS_ALARM, 24, &|value| self.decode_hours(value))?;
        let minute = field(MINUTES_ALARM, 60, &|value| self.decode(value))?;
        let second = field(SECONDS_ALARM, 60, &|value| self.decode(value))?;
        let start = after.checked_add(1)?;
        let (day, second_of_day) = (
            start.div_euclid(SECONDS_PER_DAY),
            start.rem_euclid(SECONDS_PER_DAY),
        );
        [(day, second_of_day as u32), (day.saturating_add(1), 0)]
            .into_iter()
            .find_map(|(day, from)| {
                let found = first_match(from, hour, minute, second)?;
                day.checked_mul(SECONDS_PER_DAY)?
                    .checked_add(i64::from(found))
            })
    }

    // Encoding

    fn decode(&self, value: u8) -> u32 {
        if self.cells[B] & B_BINARY != 0 {
            u32::from(value)
        } else {
            u32::from(value >> 4) * 10 + u32::from(value & 15)
        }
    }

    fn encode(&self, value: u32) -> u8 {
        if self.cells[B] & B_BINARY != 0 {
            value as u8
        } else {
            (((value / 10) << 4) | (value % 10)) as u8
        }
    }

    fn decode_hours(&self, value: u8) -> u32 {
        if self.cells[B] & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let hour = self.decode(value & 0x7f) % 12;
        if value & 0x80 != 0 { hour + 12 } else { hour }
    }

    fn encode_hours(&self, hours: u32) -> u8 {
        if self.cells[B] & B_24_HOURS != 0 {
            return self.encode(hours);
        }
        self.encode((hours + 11) % 12 + 1) | if hours >= 12 { 0x80 } else { 0 }
    }

    fn weekday(&self, days: i64) -> u32 {
        // 1 is Sunday; 1970-01-01 was a Thursday.
        (days + 4 + self.weekday_offset).rem_euclid(7) as u32 + 1
    }

    /// Writes the time the clock shows to its cells.
    fn show(&mut self, now: u64) {
        let seconds = self.seconds(now);
        let (days, second) = (
            seconds.div_euclid(SECONDS_PER_DAY),
            seconds.rem_euclid(SECONDS_PER_DAY) as u32,
        );
        let (year, month, day) = civil_from_days(days);
        self.cells[SECONDS] = self.encode(second % 60);
        self.cells[MINUTES] = self.encode(second / 60 % 60);
        self.cells[HOURS] = self.encode_hours(second / 3600);
        self.cells[WEEKDAY] = self.encode(self.weekday(days));
        self.cells[DAY] = self.encode(day);
        self.cells[MONTH] = self.encode(month);
        self.cells[YEAR] = self.encode(year.rem_euclid(100) as u32);
        // The century byte is plain memory to the chip, and BCD.
        let century = year.div_euclid(100).rem_euclid(100) as u8;
        self.cells[CENTURY] = ((century / 10) << 4) | (century % 10);
    }

    /// The time in the cells. What is no date is brought to the next one that is.
    fn shown(&self) -> i64 {
        let century = self.cells[CENTURY];
        let century = i64::from(century >> 4) * 10 + i64::from(century & 15);
        let year = century * 100 + i64::from(self.decode(self.cells[YEAR]));
        let month = self.decode(self.cells[MONTH]).clamp(1, 12);
        let days = days_from_civil(year, month, self.decode(self.cells[DAY]).max(1));
        let second = self.decode_hours(self.cells[HOURS]) * 3600
            + self.decode(self.cells[MINUTES]) * 60
            + self.decode(self.cells[SECONDS]);
        days * SECONDS_PER_DAY + i64::from(second)
    }

    /// Sets the clock to the time in its cells, within the second it is in.
    fn set_from_cells(&mut self, now: u64) {
        if std::mem::take(&mut self.divider_reset) {
            self.base_ns =
                (i128::from(now) - FIRST_UPDATE_NS).clamp(i64::MIN.into(), i64::MAX.into()) as i64;
        }
        let seconds = self.shown();
        let weekday = i64::from(self.decode(self.cells[WEEKDAY]));
        let expected = (seconds.div_euclid(SECONDS_PER_DAY) + 4).rem_euclid(7) + 1;
        self.weekday_offset = (weekday - expected).rem_euclid(7);
        self.base_seconds = seconds.saturating_sub(self.since_base(now).0);
    }

    // Ports

    /// Reads port 0x70 (which gives nothing) or 0x71.
    pub fn read(&mut self, port: u16, now: u64) -> u8 {
        if port & 1 == 0 {
            return 0xff;
        }
        self.settle(now);
        let cell = usize::from(self.index);
        match cell {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY if self.runs() => {
                self.show(now);
                self.cells[cell]
            }
            A => {
                let ns_left = i128::from(NS_PER_SECOND) - self.since_base(now).1;
                let updating = self.runs() && ns_left <= UPDATE_NS;
                self.cells[A] | if updating { A_UPDATE_IN_PROGRESS } else { 0 }
            }
            C => {
                let request = if self.interrupt() { C_REQUEST } else { 0 };
                std::mem::take(&mut self.cells[C]) | request
            }
            D => D_VALID,
            _ => self.cells[cell],
        }
    }

    /// Writes port 0x70 or 0x71.
    pub fn write(&mut self, port: u16, value: u8, now: u64) {
        if port & 1 == 0 {
            self.index = value & 0x7f;
            self.nmi_masked = value & 0x80 != 0;
            return;
        }
        self.settle(now);
        let cell = usize::from(self.index);
        match cell {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => {
                if self.runs() {
                    self.show(now);
                    self.cells[cell] = value;
                    self.set_from_cells(now);
                } else {
                    self.cells[cell] = value;
                }
            }
            A => self.write_control(A, value & !A_UPDATE_IN_PROGRESS, now),
            // Setting SET clears the update interrupt's enable.
            B if value & B_SET != 0 => self.write_control(B, value & !B_UPDATE, now),
            B => self.write_control(B, value, now),
            C | D => {}
            _ => self.cells[cell] = value,
        }
    }

    /// Writes register A or B, stopping or starting the clock with it.
    fn write_control(&mut self, cell: usize, value: u8, now: u64) {
        let ran = self.runs();
        if ran {
            self.show(now);
        }
        self.cells[cell] = value;
        self.divider_reset |= !self.divider_runs();
        if self.runs() && !ran {
            self.set_from_cells(now);
        }
    }
}

/// The first second of a day, from `from` on, that matches the fields given.
fn first_match(
    from: u32,
    hour: Option<u32>,
    minute: Option<u32>,
    second: Option<u32>,
) -> Option<u32> {
    let matches = |field: Option<u32>, value: u32| field.is_none_or(|field| field == value);
    for h in (from / 3600..24).filter(|&h| matches(hour, h)) {
        let from_minute = if h == from / 3600 { from / 60 % 60 } else { 0 };
        for m in (from_minute..60).filter(|&m| matches(minute, m)) {
            let from_second = if h * 60 + m == from / 60 {
                from % 60
            } else {
                0
            };
            let s = second.unwrap_or(from_second);
            if s >= from_second {
                return Some((h * 60 + m) * 60 + s);
            }
        }
    }
    None
}

/// Days since 1970-01-01 of a date in the proleptic Gregorian calendar. Years are counted from March,
/// so that the leap day is a year's last; `day` may exceed the month.
fn days_from_civil(year: i64, month: u32, day: u32) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let month_from_march = i64::from((month + 9) % 12);
    let day_of_year = (153 * month_from_march + 2) / 5 + i64::from(day) - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// Year, month and day of a day since 1970-01-01.
fn civil_from_days(days: i64) -> (i64, u32, u32) {
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u32;
    let month = ((month_from_march + 2) % 12 + 1) as u32;
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = NS_PER_SECOND;
    /// 2024-02-28 23:59:58 UTC, a Wednesday.
    const UTC: u64 = 1_709_164_798;

    fn rtc() -> Rtc {
        Rtc::new(UTC * S, 512 << 20, 3 << 30)
    }

    /// Seconds change when the world's do, wherever in a second VM time began.
    #[test]
    fn seconds_begin_where_those_of_utc_do() {
        let mut rtc = Rtc::new(UTC * S + S / 4, 512 << 20, 3 << 30);
        rtc.write(0x70, B as u8, 0);
        rtc.write(0x71, B_24_HOURS | B_BINARY, 0);
        let second = |rtc: &mut Rtc, now| get(rtc, 0, now);
        assert_eq!(second(&mut rtc, 0), 58);
        assert_eq!(second(&mut rtc, S / 4 * 3 - 1), 58);
        assert_eq!(second(&mut rtc, S / 4 * 3), 59);
    }

    fn get(rtc: &mut Rtc, cell: usize, now: u64) -> u8 {
        rtc.write(0x70, cell as u8, now);
        rtc.read(0x71, now)
    }

    fn put(rtc: &mut Rtc, cell: usize, value: u8, now: u64) {
        rtc.write(0x70, cell as u8, now);
        rtc.write(0x71, value, now);
    }

    fn shown(rtc: &mut Rtc, now: u64) -> [u8; 8] {
        [CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS]
            .map(|cell| get(rtc, cell, now))
    }

    #[test]
    fn clock_shows_utc_in_bcd() {
        assert_eq!(
            shown(&mut rtc(), S),
            [0x20, 0x24, 0x02, 0x28, 4, 0x23, 0x59, 0x59]
        );
    }

    #[test]
    fn clock_rolls_over_into_the_leap_day() {
        assert_eq!(
            shown(&mut rtc(), 2 * S),
            [0x20, 0x24, 0x02, 0x29, 5, 0, 0, 0]
        );
    }

    #[test]
    fn binary_and_12_hour_modes_change_the_encoding() {
        let mut rtc = rtc();
        put(&mut rtc, B, B_BINARY, 0);
        assert_eq!(get(&mut rtc, HOURS, 0), 11 | 0x80);
        assert_eq!(get(&mut rtc, MINUTES, 0), 59);
        assert_eq!(get(&mut rtc, HOURS, 2 * S), 12);
    }

    #[test]
    fn calendar_conversions_are_inverse() {
        for days in (-800_000..800_000).step_by(97) {
            let (year, month, day) = civil_from_days(days);
            assert_eq!(days_from_civil(year, month, day), days);
        }
        assert_eq!(civil_from_days(0), (1970, 1, 1));
        assert_eq!(civil_from_days(11_016), (2000, 2, 29));
    }

    /// As Linux sets it (mc146818_set_time): SET, divider reset, values, SET and divider back.
    #[test]
    fn time_set_by_the_guest_runs_on_from_there() {
        let mut rtc = rtc();
        put(&mut rtc, B, B_SET | B_24_HOURS, 10 * S);
        put(&mut rtc, A, 0x76, 10 * S);
        for (cell, value) in [
            (YEAR, 0x30),
            (MONTH, 0x12),
            (DAY, 0x31),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0x58),
        ] {
            put(&mut rtc, cell, value, 10 * S);
        }
        assert_eq!(get(&mut rtc, SECONDS, 15 * S), 0x58);
        put(&mut rtc, B, B_24_HOURS, 20 * S);
        put(&mut rtc, A, 0x26, 20 * S);
        assert_eq!(get(&mut rtc, SECONDS, 20 * S + S / 2 - 1), 0x58);
        assert_eq!(get(&mut rtc, SECONDS, 20 * S + S / 2), 0x59);
        let time = shown(&mut rtc, 21 * S + S / 2);
        assert_eq!((time[1], time[2], time[3], time[5]), (0x31, 1, 1, 0));
    }

    #[test]
    fn invalid_time_written_by_the_guest_is_harmless() {
        let mut rtc = rtc();
        for cell in [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY] {
            put(&mut rtc, cell, 0xff, 0);
        }
        put(&mut rtc, MONTH, 0, 0);
        shown(&mut rtc, u64::MAX);
    }

    #[test]
    fn update_in_progress_shows_before_the_second_ends() {
        let mut rtc = rtc();
        assert_eq!(get(&mut rtc, A, S / 2), 0x26);
        assert_eq!(get(&mut rtc, A, S - 2_228_000), 0xa6);
        assert_eq!(get(&mut rtc, A, S), 0x26);
    }

    #[test]
    fn periodic_interrupt_has_its_rate_and_is_cleared_by_register_c() {
        let mut rtc = rtc();
        put(&mut rtc, B, B_PERIODIC | B_24_HOURS, 0);
        // Rate 6: 1024 Hz.
        let first = rtc.deadline().unwrap();
        assert_eq!(first, S.div_ceil(1024));
        rtc.settle(first);
        assert!(rtc.interrupt());
        assert_eq!(rtc.deadline(), None);
        assert_eq!(get(&mut rtc, C, first), 0xc0);
        assert!(!rtc.interrupt());
        assert_eq!(rtc.deadline(), Some((2 * S).div_ceil(1024)));
    }

    #[test]
    fn missed_periods_are_one_interrupt_and_the_phase_stays() {
        let mut rtc = rtc();
        put(&mut rtc, B, B_PERIODIC | B_24_HOURS, 0);
        rtc.settle(S / 2 + 1);
        assert_eq!(get(&mut rtc, C, S / 2 + 1), 0xc0);
        assert_eq!(get(&mut rtc, C, S / 2 + 2), 0);
        assert_eq!(rtc.deadline(), Some((513 * S).div_ceil(1024)));
    }

    #[test]
    fn update_interrupt_comes_with_the_second() {
        let mut rtc = rtc();
        put(&mut rtc, B, B_UPDATE | B_24_HOURS, S / 3);
        assert_eq!(rtc.deadline(), Some(S));
        rtc.settle(S);
        assert!(rtc.interrupt());
        assert_eq!(get(&mut rtc, C, S) & 0x90, 0x90);
    }

    #[test]
    fn alarm_rings_at_its_time() {
        let mut rtc = rtc();
        put(&mut rtc, HOURS_ALARM, 0x00, 0);
        put(&mut rtc, MINUTES_ALARM, 0x01, 0);
        put(&mut rtc, SECONDS_ALARM, 0x30, 0);
        put(&mut rtc, B, B_ALARM | B_24_HOURS, 0);
        assert_eq!(rtc.deadline(), Some(92 * S));
        rtc.settle(92 * S - 1);
        assert!(!rtc.interrupt());
        rtc.settle(92 * S);
        assert!(rtc.interrupt());
    }

    #[test]
    fn alarm_with_wildcards_rings_every_minute() {
        let mut rtc = rtc();
        put(&mut rtc, HOURS_ALARM, 0xff, 0);
        put(&mut rtc, MINUTES_ALARM, 0xc0, 0);
        put(&mut rtc, SECONDS_ALARM, 0x05, 0);
        put(&mut rtc, B, B_ALARM | B_24_HOURS, 0);
        assert_eq!(rtc.deadline(), Some(7 * S));
        rtc.settle(7 * S);
        get(&mut rtc, C, 7 * S);
        assert_eq!(rtc.deadline(), Some(67 * S));
    }

    #[test]
    fn impossible_alarm_never_rings() {
        let mut rtc = rtc();
        put(&mut rtc, SECONDS_ALARM, 0x75, 0);
        put(&mut rtc, B, B_ALARM | B_24_HOURS, 0);
        assert_eq!(rtc.deadline(), None);
    }

    #[test]
    fn alarm_passed_while_nobody_looked_is_not_lost() {
        let mut rtc = rtc();
        put(&mut rtc, HOURS_ALARM, 0x00, 0);
        put(&mut rtc, MINUTES_ALARM, 0x00, 0);
        put(&mut rtc, SECONDS_ALARM, 0x00, 0);
        put(&mut rtc, B, B_ALARM | B_24_HOURS, 0);
        rtc.settle(3 * 86_400 * S);
        assert!(rtc.interrupt());
    }

    #[test]
    fn clock_goes_on_while_the_machine_stands_still() {
        for (away, time) in [
            (0, [0x29, 0, 0, 0]),
            (S / 2, [0x29, 0, 0, 0]),
            (S, [0x29, 0, 0, 1]),
            (S + S / 2, [0x29, 0, 0, 1]),
            (100 * 86_400 * S, [0x08, 0, 0, 0]),
        ] {
            for start in [0, S / 4] {
                let mut rtc = Rtc::new(UTC * S + start, 512 << 20, 3 << 30);
                let now = 2 * S - start;
                rtc.run_on_battery(away, now);
                let [_, _, _, day, _, hour, minute, second] = shown(&mut rtc, now);
                assert_eq!([day, hour, minute, second], time, "{away} {start}");
                // Where in the second it is shows too.
                let rest = away % S;
                let next = now + S - rest;
                let seconds = [next - 1, next].map(|at| get(&mut rtc, SECONDS, at));
                assert_eq!(seconds, [time[3], time[3] + 1], "{away} {start}");
                Rtc::restore(&rtc.save(), next).unwrap();
            }
        }
        // Several times, and as long as can be.
        let mut rtc = rtc();
        for _ in 0..3 {
            rtc.run_on_battery(20 * S, S);
        }
        assert_eq!(shown(&mut rtc, S)[6..], [0x00, 0x59]);
        rtc.run_on_battery(u64::MAX, S);
        shown(&mut rtc, S);
    }

    #[test]
    fn alarm_that_was_due_while_the_machine_stood_still_rings() {
        let mut rtc = rtc();
        put(&mut rtc, HOURS_ALARM, 0x00, 0);
        put(&mut rtc, MINUTES_ALARM, 0x01, 0);
        put(&mut rtc, SECONDS_ALARM, 0x30, 0);
        put(&mut rtc, B, B_ALARM | B_24_HOURS, 0);
        rtc.run_on_battery(91 * S, S / 2);
        assert!(!rtc.interrupt());
        rtc.run_on_battery(S / 2, S / 2);
        assert!(rtc.interrupt());
    }

    #[test]
    fn clock_that_the_guest_stopped_stands() {
        let mut rtc = rtc();
        put(&mut rtc, B, B_SET | B_24_HOURS, 0);
        rtc.run_on_battery(100 * S, S);
        assert_eq!(get(&mut rtc, SECONDS, S), 0x58);
    }

    #[test]
    fn flags_are_set_without_their_interrupts_enabled() {
        let mut rtc = rtc();
        assert_eq!(get(&mut rtc, C, 2 * S) & 0xd0, B_PERIODIC | B_UPDATE);
        assert_eq!(rtc.deadline(), None);
    }

    #[test]
    fn memory_sizes_are_where_firmware_puts_them() {
        let mut rtc = rtc();
        assert_eq!(
            [0x15, 0x16].map(|cell| get(&mut rtc, cell, 0)),
            [0x80, 0x02]
        );
        assert_eq!(
            [0x17, 0x18].map(|cell| get(&mut rtc, cell, 0)),
            [0xff, 0xff]
        );
        // 496 MiB above 16 MiB, in 64 KiB.
        assert_eq!(
            [0x34, 0x35].map(|cell| get(&mut rtc, cell, 0)),
            [0x00, 0x1f]
        );
        assert_eq!(
            [0x5b, 0x5c, 0x5d].map(|cell| get(&mut rtc, cell, 0)),
            [0x00, 0xc0, 0x00]
        );
    }

    #[test]
    fn battery_is_good_and_memory_is_kept() {
        let mut rtc = rtc();
        put(&mut rtc, D, 0, 0);
        assert_eq!(get(&mut rtc, D, 0), 0x80);
        put(&mut rtc, 0x0f, 0x0a, 0);
        assert_eq!(get(&mut rtc, 0x0f, 0), 0x0a);
    }

    #[test]
    fn index_port_carries_the_nmi_mask() {
        let mut rtc = rtc();
        rtc.write(0x70, 0x8d, 0);
        assert!(rtc.is_nmi_masked());
        assert_eq!(rtc.read(0x71, 0), 0x80);
    }
}
