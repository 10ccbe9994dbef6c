//! The saved state of a serial port.

use serde::{Deserialize, Serialize};

use super::{FCR_ENABLE, LSR_ERRORS, Serial};
use crate::saved::{Check, StateError};

/// A 16550A.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// Interrupt enable register.
    pub ier: u8,
    /// FIFO control register.
    pub fcr: u8,
    /// Line control register.
    pub lcr: u8,
    /// Modem control register.
    pub mcr: u8,
    /// Overrun and break, as in the line status register.
    pub line_errors: u8,
    /// Modem status register.
    pub msr: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Divisor latch.
    pub divisor: u16,
    /// Bytes in the receiver.
    pub received: Vec<u8>,
    /// What an empty receiver reads as.
    pub last_received: u8,
    /// The transmitter-empty interrupt has not been acknowledged.
    pub transmitter_empty: bool,
    /// Bytes from outside were turned away, and whoever has them waits for room.
    pub refused: bool,
}

impl Serial {
    /// Its state.
    pub fn save(&self) -> SerialState {
        let Self {
            ier,
            fcr,
            lcr,
            mcr,
            line_errors,
            msr,
            scratch,
            divisor,
            received,
            last_received,
            transmitter_empty,
            refused,
        } = self;
        SerialState {
            ier: *ier,
            fcr: *fcr,
            lcr: *lcr,
            mcr: *mcr,
            line_errors: *line_errors,
            msr: *msr,
            scratch: *scratch,
            divisor: *divisor,
            received: received.iter().copied().collect(),
            last_received: *last_received,
            transmitter_empty: *transmitter_empty,
            refused: *refused,
        }
    }

    /// The port in a state.
    ///
    /// # Errors
    /// For a state that it can't be in.
    pub fn restore(state: &SerialState) -> Result<Self, StateError> {
        let SerialState {
            ier,
            fcr,
            lcr,
            mcr,
            line_errors,
            msr,
            scratch,
            divisor,
            received,
            last_received,
            transmitter_empty,
            refused,
        } = state;
        let check = Check("serial");
        check.bits("ier", *ier, 0x0fu8)?;
        check.bits("fcr", *fcr, 0xc9u8)?;
        check.that(*fcr == 0 || fcr & FCR_ENABLE != 0, "fcr", *fcr)?;
        check.bits("mcr", *mcr, 0x1fu8)?;
        check.bits("line_errors", *line_errors, LSR_ERRORS)?;
        let serial = Self {
            ier: *ier,
            fcr: *fcr,
            lcr: *lcr,
            mcr: *mcr,
            line_errors: *line_errors,
            msr: *msr,
            scratch: *scratch,
            divisor: *divisor,
            received: received.iter().copied().collect(),
            last_received: *last_received,
            transmitter_empty: *transmitter_empty,
            refused: *refused,
        };
        check.length(
            "the receiver",
            received.len(),
            serial.capacity(),
            "it holds 16 with FIFOs on and 1 with FIFOs off",
        )?;
        Ok(serial)
    }
}
