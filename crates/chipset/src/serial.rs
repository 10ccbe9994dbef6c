//! The 16550A serial port (PC16550D data sheet, National Semiconductor, 1995).
//!
//! There is no wire: a byte written is sent at once, and bytes are received as fast as the FIFO has
//! room. So the transmitter is always empty, and a FIFO below its trigger level is already at its
//! character time-out.

mod saved;

pub use saved::SerialState;

use std::collections::VecDeque;

const FIFO_SIZE: usize = 16;

const IER_RECEIVED: u8 = 1;
const IER_TRANSMITTER_EMPTY: u8 = 2;
const IER_LINE_STATUS: u8 = 4;
const IER_MODEM_STATUS: u8 = 8;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM_STATUS: u8 = 0x00;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_TIME_OUT: u8 = 0x0c;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_RECEIVER: u8 = 2;

const LCR_DIVISOR: u8 = 0x80;

const MCR_OUT2: u8 = 8;
const MCR_LOOP: u8 = 0x10;

const LSR_DATA: u8 = 0x01;
const LSR_OVERRUN: u8 = 0x02;
const LSR_BREAK: u8 = 0x10;
const LSR_ERRORS: u8 = 0x1e;
const LSR_TRANSMITTER_EMPTY: u8 = 0x60;

/// Clear to send, data set ready, carrier: somebody is always listening.
const MSR_CONNECTED: u8 = 0xb0;

/// What a write to a register did outside of the chip.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SerialWrite {
    /// A byte went out.
    pub sent: Option<u8>,
    /// The interrupt line fell and rose again within the write, which an edge-triggered controller
    /// must see.
    pub pulsed: bool,
}

/// A 16550A.
#[derive(Clone, Debug)]
pub struct Serial {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// Overrun and break.
    line_errors: u8,
    msr: u8,
    scratch: u8,
    divisor: u16,
    received: VecDeque<u8>,
    last_received: u8,
    /// The transmitter-empty interrupt has not been acknowledged.
    transmitter_empty: bool,
    /// Bytes were turned away for want of room.
    refused: bool,
}

impl Default for Serial {
    fn default() -> Self {
        Self::new()
    }
}

impl Serial {
    /// After reset, at 9600 baud as firmware leaves it.
    pub fn new() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 3,
            mcr: 0,
            line_errors: 0,
            msr: MSR_CONNECTED,
            scratch: 0,
            divisor: 12,
            received: VecDeque::with_capacity(FIFO_SIZE),
            last_received: 0,
            transmitter_empty: false,
            refused: false,
        }
    }

    fn is_looped(&self) -> bool {
        self.mcr & MCR_LOOP != 0
    }

    fn capacity(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 {
            FIFO_SIZE
        } else {
            1
        }
    }

    fn trigger_level(&self) -> usize {
        if self.fcr & FCR_ENABLE == 0 {
            return 1;
        }
        [1, 4, 8, 14][usize::from(self.fcr >> 6)]
    }

    /// Takes bytes from outside as far as there is room; how many.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let room = if self.is_looped() {
            0
        } else {
            self.capacity().saturating_sub(self.received.len())
        };
        let taken = room.min(bytes.len());
        self.received.extend(&bytes[..taken]);
        self.refused = taken < bytes.len();
        taken
    }

    /// Whether there is room now for bytes that were turned away; true once.
    pub fn take_room(&mut self) -> bool {
        self.refused
            && !self.is_looped()
            && self.received.len() < self.capacity()
            && std::mem::take(&mut self.refused)
    }

    /// Interrupt identification, without the FIFO bits.
    fn cause(&self) -> u8 {
        if self.ier & IER_LINE_STATUS != 0 && self.line_errors != 0 {
            IIR_LINE_STATUS
        } else if self.ier & IER_RECEIVED != 0 && self.received.len() >= self.trigger_level() {
            IIR_RECEIVED
        } else if self.ier & IER_RECEIVED != 0 && !self.received.is_empty() {
            IIR_TIME_OUT
        } else if self.ier & IER_TRANSMITTER_EMPTY != 0 && self.transmitter_empty {
            IIR_TRANSMITTER_EMPTY
        } else if self.ier & IER_MODEM_STATUS != 0 && self.msr & 0x0f != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    /// The level of the board's interrupt line: OUT2 gates it, and is disconnected in loopback.
    pub fn interrupt(&self) -> bool {
        self.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 && self.cause() != IIR_NONE
    }

    /// Reads register 0 to 7.
    pub fn read(&mut self, register: u8) -> u8 {
        let divisor = self.lcr & LCR_DIVISOR != 0;
        match register & 7 {
            0 if divisor => self.divisor as u8,
            1 if divisor => (self.divisor >> 8) as u8,
            0 => {
                // An empty receiver gives the last byte again.
                self.last_received = self.received.pop_front().unwrap_or(self.last_received);
                self.last_received
            }
            1 => self.ier,
            2 => {
                let cause = self.cause();
                if cause == IIR_TRANSMITTER_EMPTY {
                    self.transmitter_empty = false;
                }
                cause
                    | if self.fcr & FCR_ENABLE != 0 {
                        IIR_FIFOS
                    } else {
                        0
                    }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let errors = std::mem::take(&mut self.line_errors);
                let data = if self.received.is_empty() {
                    0
                } else {
                    LSR_DATA
                };
                LSR_TRANSMITTER_EMPTY | data | errors
            }
            6 => {
                let value = self.msr;
                self.msr &= 0xf0;
                value
            }
            _ => self.scratch,
        }
    }

    /// Writes register 0 to 7.
    pub fn write(&mut self, register: u8, value: u8) -> SerialWrite {
        let divisor = self.lcr & LCR_DIVISOR != 0;
        match register & 7 {
            0 if divisor => self.divisor = self.divisor & 0xff00 | u16::from(value),
            1 if divisor => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            0 => return self.transmit(value),
            1 => {
                // Enabling it while the transmitter is empty interrupts at once, every time: Linux
                // tests for chips that don't (UART_BUG_THRE, UART_BUG_TXEN).
                self.transmitter_empty |= value & !self.ier & IER_TRANSMITTER_EMPTY != 0;
                self.ier = value & 0x0f;
            }
            2 => self.set_fifo_control(value),
            3 => self.lcr = value,
            4 => {
                self.mcr = value & 0x1f;
                self.update_modem_status();
            }
            // The line status register is for factory tests; the modem status is read only.
            5 | 6 => {}
            _ => self.scratch = value,
        }
        SerialWrite::default()
    }

    fn transmit(&mut self, value: u8) -> SerialWrite {
        self.transmitter_empty = false;
        let fell = !self.interrupt();
        let mut sent = None;
        if !self.is_looped() {
            sent = Some(value);
        } else if self.received.len() < self.capacity() {
            self.received.push_back(value);
        } else {
            self.line_errors |= LSR_OVERRUN;
        }
        self.transmitter_empty = true;
        SerialWrite {
            sent,
            pulsed: fell && self.interrupt(),
        }
    }

    fn set_fifo_control(&mut self, value: u8) {
        if (value ^ self.fcr) & FCR_ENABLE != 0 || value & FCR_CLEAR_RECEIVER != 0 {
            self.received.clear();
        }
        // "This bit must already be 1 when other FCR bits are written to or they will not be
        // programmed."
        self.fcr = if value & FCR_ENABLE != 0 {
            value & 0xc9
        } else {
            0
        };
    }

    fn update_modem_status(&mut self) {
        let lines = if self.is_looped() {
            // RTS to CTS, DTR to DSR, OUT1 to RI, OUT2 to DCD.
            (self.mcr & 2) << 3 | (self.mcr & 1) << 5 | (self.mcr & 4) << 4 | (self.mcr & 8) << 4
        } else {
            MSR_CONNECTED
        };
        let changed = (lines ^ self.msr) & 0xf0;
        // The ring indicator counts only when it ends.
        let ring_ended = changed & !lines & 0x40;
        self.msr = lines | self.msr & 0x0f | (changed & 0xb0 | ring_ended) >> 4;
    }

    /// The sender holds the line low: a zero byte with the break flag, for the magic SysRq key.
    pub fn receive_break(&mut self) {
        if !self.is_looped() && self.received.len() < self.capacity() {
            self.received.push_back(0);
            self.line_errors |= LSR_BREAK & LSR_ERRORS;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIFOs on with trigger level 8, OUT2 on.
    fn open() -> Serial {
        let mut serial = Serial::new();
        serial.write(2, 0x81);
        serial.write(4, 0x0b);
        serial
    }

    #[test]
    fn byte_written_is_sent_at_once() {
        let mut serial = open();
        assert_eq!(serial.write(0, b'x').sent, Some(b'x'));
        assert_eq!(serial.read(5) & 0x60, 0x60);
    }

    #[test]
    fn divisor_latch_hides_the_data_registers() {
        let mut serial = open();
        serial.write(3, 0x83);
        assert_eq!(serial.write(0, 0x34).sent, None);
        serial.write(1, 0x12);
        assert_eq!((serial.read(0), serial.read(1)), (0x34, 0x12));
        serial.write(3, 0x03);
        assert_eq!(serial.read(1), 0);
    }

    #[test]
    fn received_bytes_come_in_order_and_fill_the_fifo() {
        let mut serial = open();
        assert_eq!(serial.receive(b"0123456789abcdefgh"), 16);
        assert_eq!(serial.read(5) & 1, 1);
        let read: Vec<u8> = (0..16).map(|_| serial.read(0)).collect();
        assert_eq!(read, b"0123456789abcdef");
        assert_eq!(serial.read(5) & 1, 0);
    }

    #[test]
    fn without_fifo_there_is_room_for_one_byte() {
        let mut serial = Serial::new();
        assert_eq!(serial.receive(b"ab"), 1);
        assert_eq!(serial.read(0), b'a');
    }

    #[test]
    fn room_is_told_once_after_bytes_were_turned_away() {
        let mut serial = Serial::new();
        serial.receive(b"ab");
        assert!(!serial.take_room());
        serial.read(0);
        assert!(serial.take_room());
        assert!(!serial.take_room());
    }

    #[test]
    fn received_interrupt_at_the_trigger_level_and_time_out_below_it() {
        let mut serial = open();
        serial.write(1, 1);
        serial.receive(b"1234567");
        assert_eq!(serial.read(2), 0xcc);
        serial.receive(b"8");
        assert_eq!(serial.read(2), 0xc4);
        assert!(serial.interrupt());
    }

    #[test]
    fn reading_the_last_byte_ends_the_interrupt() {
        let mut serial = open();
        serial.write(1, 1);
        serial.receive(b"1");
        assert!(serial.interrupt());
        serial.read(0);
        assert!(!serial.interrupt());
        assert_eq!(serial.read(2), 0xc1);
    }

    /// Linux' test for UART_BUG_THRE (serial8250_THRE_test): the interrupt must come both times.
    #[test]
    fn enabling_the_transmitter_interrupt_raises_it_every_time() {
        let mut serial = open();
        serial.write(1, 2);
        assert_eq!(serial.read(2), 0xc2);
        serial.write(1, 0);
        serial.write(1, 2);
        assert_eq!(serial.read(2), 0xc2);
    }

    #[test]
    fn reading_the_identification_acknowledges_the_transmitter_interrupt() {
        let mut serial = open();
        serial.write(1, 2);
        assert!(serial.interrupt());
        serial.read(2);
        assert!(!serial.interrupt());
        assert_eq!(serial.read(2), 0xc1);
    }

    #[test]
    fn reading_another_cause_keeps_the_transmitter_interrupt() {
        let mut serial = open();
        serial.write(1, 3);
        serial.receive(b"1");
        assert_eq!(serial.read(2), 0xcc);
        serial.read(0);
        assert_eq!(serial.read(2), 0xc2);
    }

    #[test]
    fn sending_pulses_the_interrupt_line() {
        let mut serial = open();
        serial.write(1, 2);
        assert!(serial.write(0, b'x').pulsed);
        assert!(serial.interrupt());
        // With received data waiting, the line does not fall.
        serial.write(1, 3);
        serial.receive(b"1");
        assert!(!serial.write(0, b'x').pulsed);
    }

    #[test]
    fn out2_gates_the_interrupt_line() {
        let mut serial = open();
        serial.write(4, 0x03);
        serial.write(1, 2);
        assert!(!serial.interrupt());
        serial.write(4, 0x0b);
        assert!(serial.interrupt());
    }

    /// Linux' autoconfig: with loopback, RTS and OUT2, the modem status must be 0x90.
    #[test]
    fn loopback_connects_the_modem_lines() {
        let mut serial = open();
        serial.write(4, 0x1a);
        assert_eq!(serial.read(6) & 0xf0, 0x90);
        serial.write(4, 0x15);
        assert_eq!(serial.read(6) & 0xf0, 0x60);
    }

    #[test]
    fn loopback_returns_what_is_sent_and_nothing_from_outside() {
        let mut serial = open();
        serial.write(4, 0x1b);
        assert_eq!(serial.write(0, 0x5a).sent, None);
        assert_eq!(serial.receive(b"x"), 0);
        assert_eq!(serial.read(0), 0x5a);
        assert_eq!(serial.read(5) & 1, 0);
    }

    #[test]
    fn loopback_overrun_is_a_line_status_interrupt_until_read() {
        let mut serial = open();
        serial.write(1, 4);
        serial.write(4, 0x1b);
        for byte in 0..17 {
            serial.write(0, byte);
        }
        serial.write(4, 0x0b);
        assert!(serial.interrupt());
        assert_eq!(serial.read(2), 0xc6);
        assert_eq!(serial.read(5) & 2, 2);
        assert!(!serial.interrupt());
    }

    #[test]
    fn modem_change_interrupts_until_the_status_is_read() {
        let mut serial = open();
        serial.write(1, 8);
        serial.write(4, 0x18);
        serial.write(4, 0x0b);
        assert_eq!(serial.read(2), 0xc0);
        assert_ne!(serial.read(6) & 0x0f, 0);
        assert_eq!(serial.read(2), 0xc1);
    }

    #[test]
    fn turning_the_fifos_on_or_off_clears_them() {
        let mut serial = open();
        serial.receive(b"123");
        serial.write(2, 0);
        assert_eq!(serial.read(5) & 1, 0);
        assert_eq!(serial.read(2) & 0xc0, 0);
    }

    /// Linux' tests for later chips: no 64-byte FIFO (IIR bit 5), no UART enable bit (IER bit 6).
    #[test]
    fn registers_of_later_chips_do_not_stick() {
        let mut serial = open();
        serial.write(3, 0x83);
        serial.write(2, 0xe1);
        assert_eq!(serial.read(2) & 0x20, 0);
        serial.write(3, 0x03);
        serial.write(1, 0xff);
        assert_eq!(serial.read(1), 0x0f);
        serial.write(7, 0xa5);
        assert_eq!(serial.read(7), 0xa5);
    }

    #[test]
    fn break_is_a_zero_byte_with_a_flag() {
        let mut serial = open();
        serial.write(1, 4);
        serial.receive_break();
        assert!(serial.interrupt());
        assert_eq!(serial.read(5) & 0x11, 0x11);
        assert_eq!(serial.read(0), 0);
    }
}
