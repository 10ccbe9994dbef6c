//! The I/O APIC (Intel 82093AA data sheet; version 0x20 as in Intel's I/O controller hubs, which adds
//! the EOI register).

mod saved;

pub use saved::IoApicState;

use crate::lapic::{Delivery, InterruptMessage, destination_8_bit};
use crate::map::IO_APIC_PINS;

const PINS: usize = IO_APIC_PINS as usize;
const VERSION: u32 = 0x20 | (IO_APIC_PINS - 1) << 16;

const INDEX: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

/// A redirection entry (82093AA, 3.2.4). The guest may write only [`Self::WRITABLE`]; delivery status
/// and remote IRR belong to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedirectionEntry(u64);

impl RedirectionEntry {
    /// Everything but delivery status (bit 12), remote IRR (bit 14) and the reserved bits.
    pub const WRITABLE: u64 = 0xff00_0000_0001_afff;
    const LEVEL: u64 = 1 << 15;
    const REMOTE_IRR: u64 = 1 << 14;
    const MASKED: u64 = 1 << 16;

    /// After reset: masked.
    pub const RESET: Self = Self(Self::MASKED);

    /// The vector it sends.
    pub fn vector(self) -> u8 {
        self.0 as u8
    }

    /// Whether it is level triggered.
    pub fn is_level(self) -> bool {
        self.0 & Self::LEVEL != 0
    }

    /// Whether it is masked.
    pub fn is_masked(self) -> bool {
        self.0 & Self::MASKED != 0
    }

    /// Whether a local APIC has accepted its level interrupt and not ended it.
    pub fn remote_irr(self) -> bool {
        self.0 & Self::REMOTE_IRR != 0
    }

    fn message(self) -> InterruptMessage {
        InterruptMessage {
            destination: destination_8_bit((self.0 >> 56) as u32, self.0 & 1 << 11 != 0),
            delivery: Delivery::from_bits((self.0 >> 8) as u32),
            vector: self.vector(),
            level: self.is_level(),
        }
    }
}

/// The I/O APIC. After each change the owner calls [`take_requests`](Self::take_requests), sends the
/// [`message`](Self::message) of every pin in it, and tells which were [`accepted`](Self::accepted).
///
/// Levels are logical: an asserted pin is one whose device wants service, in the polarity that the
/// ACPI tables declare. The polarity bit of an entry is kept for the guest to read and changes
/// nothing; on a board whose tables are right it could not.
#[derive(Clone, Debug)]
pub struct IoApic {
    id: u32,
    index: u8,
    entries: [RedirectionEntry; PINS],
    asserted: u32,
    /// Edges on unmasked pins that are still to be sent.
    edges: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new()
    }
}

impl IoApic {
    /// After reset: every pin masked.
    pub fn new() -> Self {
        Self {
            id: 0,
            index: 0,
            entries: [RedirectionEntry::RESET; PINS],
            asserted: 0,
            edges: 0,
        }
    }

    /// The redirection entry of a pin (0 to 23).
    pub fn entry(&self, pin: usize) -> RedirectionEntry {
        self.entries
            .get(pin)
            .copied()
            .unwrap_or(RedirectionEntry::RESET)
    }

    /// Sets the level of a pin; whether there may be something to send.
    pub fn set_pin(&mut self, pin: usize, level: bool) -> bool {
        let Some(entry) = self.entries.get(pin) else {
            return false;
        };
        let bit = 1 << pin;
        if (self.asserted & bit != 0) == level {
            return false;
        }
        self.asserted ^= bit;
        // "When this bit is 1, the interrupt signal is masked. Edge-sensitive interrupts signaled on
        // a masked interrupt pin are ignored (i.e., not delivered or held pending)" (3.2.4).
        if level && !entry.is_level() && !entry.is_masked() {
            self.edges |= bit;
        }
        level
    }

    /// Pins whose message must be sent now. Edges are forgotten with this call; levels are asked for
    /// again until they are [`accepted`](Self::accepted).
    pub fn take_requests(&mut self) -> u32 {
        let mut requests = std::mem::take(&mut self.edges);
        for (pin, entry) in self.entries.iter().enumerate() {
            let bit = 1 << pin;
            if entry.is_level()
                && !entry.is_masked()
                && !entry.remote_irr()
                && self.asserted & bit != 0
            {
                requests |= bit;
            }
        }
        requests
    }

    /// What a pin sends.
    pub fn message(&self, pin: usize) -> InterruptMessage {
        self.entry(pin).message()
    }

    /// A local APIC took the message of this pin.
    pub fn accepted(&mut self, pin: usize) {
        if let Some(entry) = self.entries.get_mut(pin)
            && entry.is_level()
            && matches!(
                Delivery::from_bits((entry.0 >> 8) as u32),
                Delivery::Fixed | Delivery::LowestPriority
            )
        {
            entry.0 |= RedirectionEntry::REMOTE_IRR;
        }
    }

    /// End of interrupt: entries with this vector may send again.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for entry in &mut self.entries {
            if entry.vector() == vector && entry.is_level() {
                entry.0 &= !RedirectionEntry::REMOTE_IRR;
            }
        }
    }

    /// Reads a register.
    pub fn read(&self, offset: u64) -> u32 {
        match offset {
            INDEX => u32::from(self.index),
            WINDOW => self.read_indirect(),
            _ => 0,
        }
    }

    fn read_indirect(&self) -> u32 {
        match self.index {
            0 | 2 => self.id,
            1 => VERSION,
            0x10.. => {
                let index = usize::from(self.index - 0x10);
                self.entries
                    .get(index / 2)
                    .map_or(0, |entry| (entry.0 >> (32 * (index % 2))) as u32)
            }
            _ => 0,
        }
    }

    /// Writes a register; whether there may be something to send.
    pub fn write(&mut self, offset: u64, value: u32) -> bool {
        match offset {
            INDEX => {
                self.index = value as u8;
                false
            }
            WINDOW => self.write_indirect(value),
            EOI => {
                self.end_of_interrupt(value as u8);
                true
            }
            _ => false,
        }
    }

    fn write_indirect(&mut self, value: u32) -> bool {
        if self.index == 0 {
            self.id = value & 0x0f00_0000;
            return false;
        }
        let Some(index) = self.index.checked_sub(0x10).map(usize::from) else {
            return false;
        };
        let Some(entry) = self.entries.get_mut(index / 2) else {
            return false;
        };
        let shift = 32 * (index % 2);
        let writable = RedirectionEntry::WRITABLE & 0xffff_ffff << shift;
        entry.0 = entry.0 & !writable | u64::from(value) << shift & writable;
        if !entry.is_level() {
            // Linux ends an interrupt without the EOI register by making the pin edge triggered for
            // a moment.
            entry.0 &= !RedirectionEntry::REMOTE_IRR;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lapic::Destination;

    fn program(apic: &mut IoApic, pin: u32, entry: u64) {
        apic.write(INDEX, 0x11 + 2 * pin);
        apic.write(WINDOW, (entry >> 32) as u32);
        apic.write(INDEX, 0x10 + 2 * pin);
        apic.write(WINDOW, entry as u32);
    }

    fn read(apic: &mut IoApic, register: u32) -> u32 {
        apic.write(INDEX, register);
        apic.read(WINDOW)
    }

    const LEVEL: u64 = 1 << 15;
    const MASKED: u64 = 1 << 16;

    #[test]
    fn version_register_names_24_pins() {
        let mut apic = IoApic::new();
        assert_eq!(read(&mut apic, 1), 0x0017_0020);
    }

    #[test]
    fn id_keeps_its_four_bits() {
        let mut apic = IoApic::new();
        apic.write(INDEX, 0);
        apic.write(WINDOW, 0xffff_ffff);
        assert_eq!(read(&mut apic, 0), 0x0f00_0000);
        assert_eq!(read(&mut apic, 2), 0x0f00_0000);
    }

    #[test]
    fn entries_are_masked_after_reset() {
        let mut apic = IoApic::new();
        for pin in 0..24 {
            assert_eq!(read(&mut apic, 0x10 + 2 * pin), 0x0001_0000);
            assert_eq!(read(&mut apic, 0x11 + 2 * pin), 0);
        }
    }

    #[test]
    fn read_only_and_reserved_bits_of_an_entry_stay_zero() {
        let mut apic = IoApic::new();
        program(&mut apic, 5, u64::MAX);
        assert_eq!(read(&mut apic, 0x10 + 10), 0x0001_afff);
        assert_eq!(read(&mut apic, 0x11 + 10), 0xff00_0000);
    }

    #[test]
    fn registers_beyond_the_last_entry_read_zero_and_ignore_writes() {
        let mut apic = IoApic::new();
        for register in [3, 0x0f, 0x40, 0xff] {
            apic.write(INDEX, register);
            assert!(!apic.write(WINDOW, u32::MAX));
            assert_eq!(apic.read(WINDOW), 0);
        }
    }

    #[test]
    fn rising_edge_is_sent_once() {
        let mut apic = IoApic::new();
        program(&mut apic, 4, 0x31);
        apic.set_pin(4, true);
        assert_eq!(apic.take_requests(), 1 << 4);
        assert_eq!(apic.take_requests(), 0);
        // Still high, then a new edge.
        apic.set_pin(4, true);
        assert_eq!(apic.take_requests(), 0);
        apic.set_pin(4, false);
        apic.set_pin(4, true);
        assert_eq!(apic.take_requests(), 1 << 4);
    }

    #[test]
    fn edge_on_a_masked_pin_is_lost() {
        let mut apic = IoApic::new();
        program(&mut apic, 4, 0x31 | MASKED);
        apic.set_pin(4, true);
        program(&mut apic, 4, 0x31);
        assert_eq!(apic.take_requests(), 0);
    }

    #[test]
    fn level_on_a_masked_pin_is_sent_when_it_is_unmasked() {
        let mut apic = IoApic::new();
        program(&mut apic, 9, 0x41 | LEVEL | MASKED);
        apic.set_pin(9, true);
        assert_eq!(apic.take_requests(), 0);
        program(&mut apic, 9, 0x41 | LEVEL);
        assert_eq!(apic.take_requests(), 1 << 9);
    }

    /// A level-triggered interrupt whose line is still high at end of interrupt is sent again.
    #[test]
    fn level_interrupt_is_redelivered_until_the_line_falls() {
        let mut apic = IoApic::new();
        program(&mut apic, 10, 0x51 | LEVEL);
        apic.set_pin(10, true);
        assert_eq!(apic.take_requests(), 1 << 10);
        apic.accepted(10);
        assert!(apic.entry(10).remote_irr());
        assert_eq!(apic.take_requests(), 0);
        apic.end_of_interrupt(0x51);
        assert_eq!(apic.take_requests(), 1 << 10);
        apic.accepted(10);
        apic.set_pin(10, false);
        apic.end_of_interrupt(0x51);
        assert_eq!(apic.take_requests(), 0);
    }

    #[test]
    fn level_interrupt_nobody_accepted_is_asked_for_again() {
        let mut apic = IoApic::new();
        program(&mut apic, 10, 0x51 | LEVEL);
        apic.set_pin(10, true);
        assert_eq!(apic.take_requests(), 1 << 10);
        assert_eq!(apic.take_requests(), 1 << 10);
    }

    #[test]
    fn end_of_another_vector_leaves_remote_irr() {
        let mut apic = IoApic::new();
        program(&mut apic, 10, 0x51 | LEVEL);
        apic.set_pin(10, true);
        apic.accepted(10);
        apic.end_of_interrupt(0x52);
        assert!(apic.entry(10).remote_irr());
    }

    #[test]
    fn eoi_register_ends_the_interrupt() {
        let mut apic = IoApic::new();
        program(&mut apic, 10, 0x51 | LEVEL);
        apic.set_pin(10, true);
        apic.accepted(10);
        assert!(apic.write(EOI, 0x51));
        assert!(!apic.entry(10).remote_irr());
    }

    #[test]
    fn making_a_pin_edge_triggered_clears_remote_irr() {
        let mut apic = IoApic::new();
        program(&mut apic, 10, 0x51 | LEVEL);
        apic.set_pin(10, true);
        apic.accepted(10);
        program(&mut apic, 10, 0x51 | MASKED);
        program(&mut apic, 10, 0x51 | LEVEL);
        assert!(!apic.entry(10).remote_irr());
        assert_eq!(apic.take_requests(), 1 << 10);
    }

    #[test]
    fn guest_cannot_write_remote_irr() {
        let mut apic = IoApic::new();
        program(&mut apic, 10, 0x51 | LEVEL | 1 << 14);
        assert!(!apic.entry(10).remote_irr());
    }

    #[test]
    fn message_carries_the_entry() {
        let mut apic = IoApic::new();
        program(&mut apic, 3, 0x0300_0000_0000_0962);
        let message = apic.message(3);
        assert_eq!(message.destination, Destination::Logical(3));
        assert_eq!(message.delivery, Delivery::LowestPriority);
        assert_eq!(message.vector, 0x62);
        assert!(!message.level);
        program(&mut apic, 3, 0xff00_0000_0000_8062);
        assert_eq!(apic.message(3).destination, Destination::All);
        assert!(apic.message(3).level);
    }

    #[test]
    fn pins_out_of_range_do_nothing() {
        let mut apic = IoApic::new();
        assert!(!apic.set_pin(24, true));
        apic.accepted(24);
        assert_eq!(apic.entry(99), RedirectionEntry::RESET);
    }
}
