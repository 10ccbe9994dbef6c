//! The ACPI fixed registers (ACPI 6.5, 4.8): power management event and control, PM timer, and a
//! general-purpose event block that has no events yet.

mod saved;

pub use saved::AcpiPmState;

use crate::map::SLEEP_TYPE_S5;
use crate::ticks::{ticks_at, time_of};

/// The PM timer's rate, Hz (ACPI 6.5, 4.8.2.1).
pub const PM_TIMER_HZ: u64 = 3_579_545;

const TIMER_OVERFLOW: u16 = 1;
const GLOBAL: u16 = 1 << 5;
const POWER_BUTTON: u16 = 1 << 8;
const SLEEP_BUTTON: u16 = 1 << 9;
const RTC_ALARM: u16 = 1 << 10;
const WAKE: u16 = 1 << 15;
const ENABLES: u16 = TIMER_OVERFLOW | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC_ALARM;
const STATUSES: u16 = ENABLES | WAKE;

const SCI_ENABLE: u16 = 1;
const SLEEP_TYPE_SHIFT: u16 = 10;
const SLEEP_ENABLE: u16 = 1 << 13;
/// Bus-master reload and sleep type; global release and sleep enable read as zero.
const CONTROL_KEPT: u16 = 1 << 1 | 7 << SLEEP_TYPE_SHIFT;

/// The timer is 32 bits wide; its overflow event is a change of the highest bit.
const OVERFLOW_SHIFT: u32 = 31;

/// The fixed registers.
#[derive(Clone, Debug)]
pub struct AcpiPm {
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    /// Changes of the timer's highest bit seen so far.
    overflows: u64,
}

impl Default for AcpiPm {
    fn default() -> Self {
        Self::new()
    }
}

impl AcpiPm {
    /// In ACPI mode from the start: there is no SMI command port, as on machines without system
    /// management mode (ACPI 6.5, 4.8.2.5), so `SCI_EN` is always set.
    pub fn new() -> Self {
        Self {
            status: 0,
            enable: 0,
            control: SCI_ENABLE,
            gpe_status: 0,
            gpe_enable: 0,
            overflows: 0,
        }
    }

    /// Lets time pass.
    pub fn settle(&mut self, now: u64) {
        let overflows = ticks_at(now, PM_TIMER_HZ) >> OVERFLOW_SHIFT;
        if overflows > self.overflows {
            self.overflows = overflows;
            self.status |= TIMER_OVERFLOW;
        }
    }

    /// When the timer next overflows, if that is to interrupt.
    pub fn deadline(&self) -> Option<u64> {
        (self.enable & !self.status & TIMER_OVERFLOW != 0)
            .then(|| time_of((self.overflows + 1) << OVERFLOW_SHIFT, PM_TIMER_HZ))
    }

    /// The level of the system control interrupt.
    pub fn interrupt(&self) -> bool {
        self.status & self.enable & ENABLES != 0 || self.gpe_status & self.gpe_enable != 0
    }

    /// Somebody presses the power button.
    pub fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON;
    }

    /// Raises general-purpose event 0 to 15.
    pub fn raise_gpe(&mut self, event: u8) {
        self.gpe_status |= 1 << (event & 15);
    }

    /// Reads a byte at `offset` from the block's first port.
    pub fn read(&mut self, offset: u16, now: u64) -> u8 {
        self.settle(now);
        let (register, byte) = match offset {
            0x08..0x0c => (ticks_at(now, PM_TIMER_HZ) as u32, offset - 0x08),
            0x00..0x02 => (self.status.into(), offset),
            0x02..0x04 => (self.enable.into(), offset - 0x02),
            0x04..0x06 => (self.control.into(), offset - 0x04),
            0x20..0x22 => (self.gpe_status.into(), offset - 0x20),
            0x22..0x24 => (self.gpe_enable.into(), offset - 0x22),
            _ => (0, 0),
        };
        register.to_le_bytes()[usize::from(byte)]
    }

    /// Writes a byte at `offset` from the block's first port; whether that is the order to turn the
    /// machine off.
    pub fn write(&mut self, offset: u16, value: u8, now: u64) -> bool {
        self.settle(now);
        let shift = 8 * (offset & 1);
        let value = u16::from(value) << shift;
        let others = !(0xff << shift);
        match offset {
            // Write one to clear.
            0x00..0x02 => self.status &= !(value & STATUSES),
            0x02..0x04 => self.enable = (self.enable & others | value) & ENABLES,
            0x04..0x06 => {
                self.control = (self.control & others | value) & CONTROL_KEPT | SCI_ENABLE;
                let sleep_type = self.control >> SLEEP_TYPE_SHIFT & 7;
                return value & SLEEP_ENABLE != 0 && sleep_type == u16::from(SLEEP_TYPE_S5);
            }
            0x20..0x22 => self.gpe_status &= !value,
            0x22..0x24 => self.gpe_enable = self.gpe_enable & others | value,
            _ => {}
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read16(pm: &mut AcpiPm, offset: u16, now: u64) -> u16 {
        u16::from_le_bytes([pm.read(offset, now), pm.read(offset + 1, now)])
    }

    fn write16(pm: &mut AcpiPm, offset: u16, value: u16, now: u64) -> bool {
        let [low, high] = value.to_le_bytes();
        let first = pm.write(offset, low, now);
        pm.write(offset + 1, high, now) || first
    }

    fn timer(pm: &mut AcpiPm, now: u64) -> u32 {
        u32::from_le_bytes([8, 9, 10, 11].map(|offset| pm.read(offset, now)))
    }

    #[test]
    fn timer_runs_at_its_rate_and_wraps_at_32_bits() {
        let mut pm = AcpiPm::new();
        assert_eq!(timer(&mut pm, 1_000_000_000), 3_579_545);
        let hour = 3_600_000_000_000;
        assert_eq!(timer(&mut pm, hour), (3_579_545u64 * 3600) as u32);
    }

    #[test]
    fn acpi_mode_is_on_and_stays_on() {
        let mut pm = AcpiPm::new();
        assert_eq!(read16(&mut pm, 4, 0), 1);
        write16(&mut pm, 4, 0, 0);
        assert_eq!(read16(&mut pm, 4, 0), 1);
    }

    #[test]
    fn sleep_enable_with_the_type_of_s5_turns_off() {
        let mut pm = AcpiPm::new();
        assert!(!write16(&mut pm, 4, 5 << 10, 0));
        assert!(write16(&mut pm, 4, 5 << 10 | 1 << 13, 0));
    }

    #[test]
    fn other_sleep_types_do_nothing() {
        let mut pm = AcpiPm::new();
        for kind in [0, 1, 2, 3, 4, 6, 7] {
            assert!(!write16(&mut pm, 4, kind << 10 | 1 << 13, 0));
        }
        assert_eq!(read16(&mut pm, 4, 0) & 1 << 13, 0);
    }

    #[test]
    fn power_button_interrupts_if_enabled_until_cleared() {
        let mut pm = AcpiPm::new();
        pm.press_power_button();
        assert!(!pm.interrupt());
        write16(&mut pm, 2, POWER_BUTTON, 0);
        assert!(pm.interrupt());
        write16(&mut pm, 0, POWER_BUTTON, 0);
        assert!(!pm.interrupt());
        assert_eq!(read16(&mut pm, 2, 0), POWER_BUTTON);
    }

    #[test]
    fn zeros_written_to_the_status_clear_nothing() {
        let mut pm = AcpiPm::new();
        pm.press_power_button();
        write16(&mut pm, 0, !POWER_BUTTON, 0);
        assert_eq!(read16(&mut pm, 0, 0), POWER_BUTTON);
    }

    #[test]
    fn timer_overflow_is_an_event_when_the_highest_bit_changes() {
        let mut pm = AcpiPm::new();
        assert_eq!(pm.deadline(), None);
        write16(&mut pm, 2, TIMER_OVERFLOW, 0);
        let due = pm.deadline().unwrap();
        assert_eq!(due, time_of(1 << 31, PM_TIMER_HZ));
        pm.settle(due - 1);
        assert!(!pm.interrupt());
        pm.settle(due);
        assert!(pm.interrupt());
        write16(&mut pm, 0, TIMER_OVERFLOW, due);
        assert_eq!(pm.deadline(), Some(time_of(1 << 32, PM_TIMER_HZ)));
    }

    #[test]
    fn reserved_enables_do_not_stick() {
        let mut pm = AcpiPm::new();
        write16(&mut pm, 2, 0xffff, 0);
        assert_eq!(read16(&mut pm, 2, 0), 0x0721);
    }

    #[test]
    fn general_purpose_events_share_the_interrupt() {
        let mut pm = AcpiPm::new();
        write16(&mut pm, 0x22, 1 << 9, 0);
        pm.raise_gpe(9);
        assert!(pm.interrupt());
        write16(&mut pm, 0x20, 1 << 9, 0);
        assert!(!pm.interrupt());
    }

    #[test]
    fn unused_offsets_read_zero() {
        let mut pm = AcpiPm::new();
        for offset in [6, 7, 0x0c, 0x1f, 0x24, 0x3f] {
            assert!(!pm.write(offset, 0xff, 0));
            assert_eq!(pm.read(offset, 0), 0);
        }
    }
}
