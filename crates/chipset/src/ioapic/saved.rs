//! The saved state of the I/O APIC.

use serde::{Deserialize, Serialize};

use super::{IoApic, PINS, RedirectionEntry};
use crate::saved::{Check, StateError};

/// The I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApicState {
    /// The ID register: bits 27:24.
    pub id: u32,
    /// The index register.
    pub index: u8,
    /// The redirection entries as the guest reads them (82093AA, 3.2.4); delivery status is 0.
    pub entries: [u64; PINS],
    /// Pins that are asserted, a bit each.
    pub asserted: u32,
    /// Edges on unmasked pins that are still to be sent, a bit each.
    pub edges: u32,
}

impl IoApic {
    /// Its state.
    pub fn save(&self) -> IoApicState {
        let Self {
            id,
            index,
            entries,
            asserted,
            edges,
        } = self;
        IoApicState {
            id: *id,
            index: *index,
            entries: entries.map(|entry| entry.0),
            asserted: *asserted,
            edges: *edges,
        }
    }

    /// The I/O APIC in a state.
    ///
    /// # Errors
    /// For a state that it can't be in.
    pub fn restore(state: &IoApicState) -> Result<Self, StateError> {
        let IoApicState {
            id,
            index,
            entries,
            asserted,
            edges,
        } = state;
        let check = Check("ioapic");
        let pins = (1u32 << PINS) - 1;
        check.bits("id", *id, 0x0f00_0000u32)?;
        check.bits("asserted", *asserted, pins)?;
        check.bits("edges", *edges, pins)?;
        for &entry in entries {
            let kept = RedirectionEntry::WRITABLE | RedirectionEntry::REMOTE_IRR;
            check.bits("a redirection entry", entry, kept)?;
            let level_or_idle =
                entry & RedirectionEntry::REMOTE_IRR == 0 || entry & RedirectionEntry::LEVEL != 0;
            check.that(level_or_idle, "remote IRR of an edge", entry)?;
        }
        Ok(Self {
            id: *id,
            index: *index,
            entries: entries.map(RedirectionEntry),
            asserted: *asserted,
            edges: *edges,
        })
    }
}
