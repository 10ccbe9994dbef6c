//! The tables, read back by a parser that knows only the specification's layouts.

use super::*;
use crate::platform::{Hpet, Window};

fn platform(processors: u32) -> Platform {
    Platform {
        apic_ids: (0..processors).collect(),
        hpet: Some(Hpet {
            address: 0xfed0_0000,
            capabilities: 0x8086_a201,
        }),
        pci_window_64: Some(Window {
            start: 1 << 38,
            length: 1 << 36,
        }),
        ..Platform::default()
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}
