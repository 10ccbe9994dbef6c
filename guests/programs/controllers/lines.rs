//! Devices whose interrupt lines a program can raise and lower as it likes: the 8254 by its output in mode 0 (8254 data
//! sheet, mode definitions), keyboard and mouse by the 8042's commands 0xD2 and 0xD3 (IBM PS/2 technical reference, keyboard
//! and auxiliary device controller), the 16550 by its empty transmitter (PC16550D data sheet, table 4), the clock by its
//! periodic interrupt (MC146818A data sheet, registers A to C).

use runtime::{pit, port};

/// The interval timer: mode 0, which stays high when its count is over. It is on input 2 of the I/O APIC.
pub const PIT: u8 = 0;
pub const KEYBOARD: u8 = 1;
pub const SERIAL: u8 = 4;
pub const CLOCK: u8 = 8;
pub const MOUSE: u8 = 12;

const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;
const SERIAL_INTERRUPTS: u16 = 0x3F9;
const SERIAL_STATUS: u16 = 0x3FD;

fn command(command: u8, value: u8) {
    while port::read8(KEYBOARD_COMMAND) & 2 != 0 {}
    port::write8(KEYBOARD_COMMAND, command);
    while port::read8(KEYBOARD_COMMAND) & 2 != 0 {}
    port::write8(KEYBOARD_DATA, value);
}

fn clock(register: u8, value: u8) {
    port::write8(0x70, register);
    port::write8(0x71, value);
}

fn read_clock(register: u8) -> u8 {
    port::write8(0x70, register);
    port::read8(0x71)
}

/// All lines low; keyboard and mouse raise theirs when their byte waits.
pub fn initialise() {
    while port::read8(KEYBOARD_COMMAND) & 1 != 0 {
        port::read8(KEYBOARD_DATA);
    }
    command(0x60, 0x03);
    clock(11, 0x02);
    clock(10, 0x26);
    lower(CLOCK);
    lower(PIT);
}

pub fn raise(line: u8) {
    match line {
        PIT => {
            pit::interrupt_once(100);
            pit::wait(300);
        }
        // "Write output buffer" of keyboard and mouse.
        KEYBOARD => command(0xD2, 0x1E),
        MOUSE => command(0xD3, 0x1E),
        SERIAL => {
            while port::read8(SERIAL_STATUS) & 0x60 != 0x60 {}
            // The transmitter is empty.
            port::write8(SERIAL_INTERRUPTS, 2);
        }
        CLOCK => {
            clock(11, 0x42);
            // Its fastest period is 122 microseconds, this one a millisecond.
            pit::wait(3000);
        }
        _ => unreachable!("no such line"),
    }
}

pub fn lower(line: u8) {
    match line {
        // The control word alone makes the output low.
        PIT => port::write8(0x43, 0x30),
        KEYBOARD | MOUSE => {
            port::read8(KEYBOARD_DATA);
        }
        SERIAL => port::write8(SERIAL_INTERRUPTS, 0),
        CLOCK => {
            clock(11, 0x02);
            read_clock(12);
        }
        _ => unreachable!("no such line"),
    }
}
