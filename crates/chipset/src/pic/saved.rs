//! The saved state of the pair of 8259As.

use serde::{Deserialize, Serialize};

use super::{Chip, Expects, Pic};
use crate::saved::{Check, StateError};

/// One 8259A.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChipState {
    /// Levels at the inputs.
    pub lines: u8,
    /// Edges seen and not acknowledged, on inputs that are still high.
    pub edges: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// In-service register.
    pub isr: u8,
    /// Inputs that are level triggered.
    pub elcr: u8,
    /// Vector of input 0: a multiple of 8.
    pub vector: u8,
    /// The word that the data port expects.
    pub expects: Expects,
    /// ICW1, bit 0.
    pub icw4_follows: bool,
    /// ICW1, bit 1.
    pub single: bool,
    /// The input of lowest priority, 0 to 7.
    pub lowest: u8,
    /// ICW4, bit 1.
    pub auto_eoi: bool,
    /// OCW2: rotate in automatic EOI mode.
    pub rotate_on_auto_eoi: bool,
    /// OCW3: special mask mode.
    pub special_mask: bool,
    /// ICW4, bit 4.
    pub special_fully_nested: bool,
    /// OCW3: the command port reads ISR rather than IRR.
    pub read_isr: bool,
    /// OCW3: the next read is a poll.
    pub poll: bool,
}

/// Both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PicState {
    /// ISA interrupts 0 to 7.
    pub master: ChipState,
    /// ISA interrupts 8 to 15.
    pub slave: ChipState,
}

impl Chip {
    fn save(&self) -> ChipState {
        let Self {
            lines,
            edges,
            imr,
            isr,
            elcr,
            // How the board is wired.
            elcr_writable: _,
            vector,
            expects,
            icw4_follows,
            single,
            lowest,
            auto_eoi,
            rotate_on_auto_eoi,
            special_mask,
            special_fully_nested,
            read_isr,
            poll,
            slaves: _,
        } = *self;
        ChipState {
            lines,
            edges,
            imr,
            isr,
            elcr,
            vector,
            expects,
            icw4_follows,
            single,
            lowest,
            auto_eoi,
            rotate_on_auto_eoi,
            special_mask,
            special_fully_nested,
            read_isr,
            poll,
        }
    }

    fn restore(state: &ChipState, elcr_writable: u8, slaves: u8) -> Result<Self, StateError> {
        let ChipState {
            lines,
            edges,
            imr,
            isr,
            elcr,
            vector,
            expects,
            icw4_follows,
            single,
            lowest,
            auto_eoi,
            rotate_on_auto_eoi,
            special_mask,
            special_fully_nested,
            read_isr,
            poll,
        } = *state;
        let check = Check("pic");
        check.bits("an edge on an input that is low", edges, lines)?;
        check.bits("elcr", elcr, elcr_writable)?;
        check.bits("vector", vector, 0xf8u8)?;
        check.at_most("lowest", lowest.into(), 7)?;
        Ok(Self {
            lines,
            edges,
            imr,
            isr,
            elcr,
            elcr_writable,
            vector,
            expects,
            icw4_follows,
            single,
            lowest,
            auto_eoi,
            rotate_on_auto_eoi,
            special_mask,
            special_fully_nested,
            read_isr,
            poll,
            slaves,
        })
    }
}

impl Pic {
    /// Its state.
    pub fn save(&self) -> PicState {
        let Self {
            master,
            slave,
            // Follows from the two.
            output: _,
        } = self;
        PicState {
            master: master.save(),
            slave: slave.save(),
        }
    }

    /// The pair in a state.
    ///
    /// # Errors
    /// For a state that it can't be in.
    pub fn restore(state: &PicState) -> Result<Self, StateError> {
        let PicState { master, slave } = state;
        let wired = Self::new();
        let mut pic = Self {
            master: Chip::restore(master, wired.master.elcr_writable, wired.master.slaves)?,
            slave: Chip::restore(slave, wired.slave.elcr_writable, wired.slave.slaves)?,
            output: false,
        };
        pic.output = pic.master.pending().is_some();
        Ok(pic)
    }
}
