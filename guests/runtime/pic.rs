//! The two 8259 interrupt controllers.

use crate::port;

const MASTER: u16 = 0x20;
const SLAVE: u16 = 0xA0;

/// IRQ 0 arrives as this vector, IRQ 15 as this one plus 15: clear of the exceptions.
pub const FIRST_VECTOR: u8 = 0x20;

/// Moves the sixteen IRQs to [`FIRST_VECTOR`] and masks them all.
pub fn remap() {
    for (chip, vector, wiring) in [(MASTER, FIRST_VECTOR, 1 << 2), (SLAVE, FIRST_VECTOR + 8, 2)] {
        port::write8(chip, 0x11); // ICW1: edge triggered, cascaded, ICW4 follows
        port::write8(chip + 1, vector); // ICW2
        port::write8(chip + 1, wiring); // ICW3: the slave is on IRQ 2
        port::write8(chip + 1, 0x01); // ICW4: 8086 mode
        port::write8(chip + 1, 0xFF);
    }
}

pub fn unmask(irq: u8) {
    let (data, bit) = mask_bit(irq);
    port::write8(data, port::read8(data) & !bit);
    if irq >= 8 {
        unmask(2);
    }
}

pub fn mask(irq: u8) {
    let (data, bit) = mask_bit(irq);
    port::write8(data, port::read8(data) | bit);
}

fn mask_bit(irq: u8) -> (u16, u8) {
    if irq < 8 {
        (MASTER + 1, 1 << irq)
    } else {
        (SLAVE + 1, 1 << (irq - 8))
    }
}

pub fn end_of_interrupt(irq: u8) {
    if irq >= 8 {
        port::write8(SLAVE, 0x20);
    }
    port::write8(MASTER, 0x20);
}

/// The requests waiting in both chips (IRR), IRQ 0 in bit 0.
pub fn requested() -> u16 {
    read_register(0x0A)
}

/// The requests in service in both chips (ISR), IRQ 0 in bit 0.
pub fn in_service() -> u16 {
    read_register(0x0B)
}

fn read_register(select: u8) -> u16 {
    port::write8(MASTER, select);
    port::write8(SLAVE, select);
    u16::from(port::read8(MASTER)) | u16::from(port::read8(SLAVE)) << 8
}
