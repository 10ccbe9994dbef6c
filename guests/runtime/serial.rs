//! The first serial port (a 16550 at 0x3F8): text out, lines in.

use core::arch::asm;
use core::fmt::{self, Write};

use crate::{interrupts, pic, port};

const COM1: u16 = 0x3F8;
const DATA: u16 = COM1;
const INTERRUPT_ENABLE: u16 = COM1 + 1;
const LINE_CONTROL: u16 = COM1 + 3;
const MODEM_CONTROL: u16 = COM1 + 4;
const LINE_STATUS: u16 = COM1 + 5;

const DATA_READY: u8 = 1 << 0;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
const IRQ: u8 = 4;

const BACKSPACE: u8 = 0x08;
const DELETE: u8 = 0x7F;
const END_OF_TRANSMISSION: u8 = 0x04;

pub(crate) fn initialise() {
    port::write8(INTERRUPT_ENABLE, 0);
    port::write8(LINE_CONTROL, 0x80); // divisor latch
    port::write8(DATA, 1); // 115200 baud
    port::write8(INTERRUPT_ENABLE, 0);
    port::write8(LINE_CONTROL, 0x03); // 8 data bits, no parity, 1 stop bit
    // The FIFOs stay as they are: switching them drops what was typed before the guest came up.
    port::write8(MODEM_CONTROL, 0x0B); // DTR, RTS, OUT2 (lets the interrupt through)
}

/// The serial port as a sink for formatted text. A newline goes out as CR LF, as a terminal in raw
/// mode wants it.
pub struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                write_byte(b'\r');
            }
            write_byte(byte);
        }
        Ok(())
    }
}

pub fn write_byte(byte: u8) {
    while port::read8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
    port::write8(DATA, byte);
}

#[macro_export]
macro_rules! print {
    ($($argument:tt)*) => {{
        let _ = core::fmt::Write::write_fmt(&mut $crate::serial::Serial, format_args!($($argument)*));
    }};
}

#[macro_export]
macro_rules! println {
    () => { $crate::print!("\n") };
    ($($argument:tt)*) => {{ $crate::print!($($argument)*); $crate::print!("\n"); }};
}

/// Waits for a byte. The CPU sleeps meanwhile: a guest that polls for a person's key takes a whole
/// host CPU.
pub fn read_byte() -> u8 {
    interrupts::set_handler(pic::FIRST_VECTOR + IRQ, |_| pic::end_of_interrupt(IRQ));
    port::write8(INTERRUPT_ENABLE, 1);
    pic::unmask(IRQ);
    while port::read8(LINE_STATUS) & DATA_READY == 0 {
        // SAFETY: an interrupt between the check and the HLT cannot be lost: interrupts are off
        // until the instruction after STI has begun (SDM vol. 2B, STI).
        unsafe { asm!("sti", "hlt", "cli", options(nostack)) }
    }
    pic::mask(IRQ);
    port::write8(INTERRUPT_ENABLE, 0);
    port::read8(DATA)
}

/// Reads a line with echo and backspace into `buffer`; what does not fit is refused with a bell.
/// `None` at Ctrl-D on an empty line. Bytes that are not printable ASCII are ignored.
pub fn read_line(buffer: &mut [u8]) -> Option<&str> {
    let mut length = 0;
    loop {
        match read_byte() {
            b'\r' | b'\n' => break,
            END_OF_TRANSMISSION if length == 0 => {
                print!("\n");
                return None;
            }
            BACKSPACE | DELETE if length > 0 => {
                length -= 1;
                print!("\x08 \x08");
            }
            byte @ b' '..=b'~' if length < buffer.len() => {
                buffer[length] = byte;
                length += 1;
                write_byte(byte);
            }
            b' '..=b'~' => write_byte(0x07),
            _ => {}
        }
    }
    print!("\n");
    core::str::from_utf8(&buffer[..length]).ok()
}
