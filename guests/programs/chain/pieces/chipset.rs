//! Registers of the devices around the processor.

use runtime::local_apic::{self, register};
use runtime::port;

use super::Piece;
use crate::timers::{read_io_apic, write_io_apic};

const MASKED: u64 = 1 << 16;
/// An entry of the I/O APIC that nothing uses.
const PIN: u32 = 20;

pub(super) static PIECES: [Piece; 11] = [
    Piece::new(
        "apic_error",
        |random| random & 0xFF | 0x10 | MASKED,
        |value| local_apic::write(register::ERROR, value as u32),
        || local_apic::read(register::ERROR).into(),
    ),
    Piece::new(
        "apic_lint1",
        |random| random & 0xEF | 0x10 | MASKED,
        |value| local_apic::write(register::LINT1, value as u32),
        || local_apic::read(register::LINT1).into(),
    ),
    Piece::new(
        "apic_logical_id",
        |random| random & 0xFF00_0000,
        |value| local_apic::write(register::LOGICAL_DESTINATION, value as u32),
        || local_apic::read(register::LOGICAL_DESTINATION).into(),
    ),
    Piece::new(
        "apic_destination_format",
        |random| random & 0xF000_0000 | 0x0FFF_FFFF,
        |value| local_apic::write(register::DESTINATION_FORMAT, value as u32),
        || local_apic::read(register::DESTINATION_FORMAT).into(),
    ),
    Piece::new(
        "apic_command_high",
        |random| random & 0xFF00_0000,
        |value| local_apic::write(register::COMMAND_HIGH, value as u32),
        || local_apic::read(register::COMMAND_HIGH).into(),
    ),
    Piece::new(
        "ioapic_entry",
        // Vector, destination mode, polarity, trigger.
        |random| random & 0xA8FF | 0x10 | MASKED | (random >> 32 & 0xFF) << 56,
        |value| {
            write_io_apic(0x10 + 2 * PIN, value as u32);
            write_io_apic(0x11 + 2 * PIN, (value >> 32) as u32);
        },
        || u64::from(read_io_apic(0x10 + 2 * PIN)) | u64::from(read_io_apic(0x11 + 2 * PIN)) << 32,
    ),
    // The slave's sources stay quiet, and its line to the master masked.
    Piece::new(
        "pic_mask",
        |random| random & 0xFF,
        |value| port::write8(0xA1, value as u8),
        || port::read8(0xA1).into(),
    ),
    Piece::new(
        "pic_trigger",
        |random| random & 0xDE,
        |value| port::write8(0x4D1, value as u8),
        || port::read8(0x4D1).into(),
    ),
    Piece::new(
        "speaker_gate",
        |random| random & 3,
        |value| port::write8(0x61, value as u8),
        || u64::from(port::read8(0x61)) & 3,
    ),
    Piece::new(
        "serial_scratch",
        |random| random & 0xFF,
        |value| port::write8(0x3FF, value as u8),
        || port::read8(0x3FF).into(),
    ),
    Piece::new(
        "pci_address",
        |random| random & 0x00FF_FFFC | 1 << 31,
        |value| port::write32(0xCF8, value as u32),
        || port::read32(0xCF8).into(),
    ),
];
