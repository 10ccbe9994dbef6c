//! An 8259A's state, between the chipset's form and the kernel's (`struct kvm_pic_state`).

use kvm_bindings::kvm_pic_state;
use trapgate_chipset::pic::{ChipState, Expects};

/// The master's input for the slave.
const CASCADE: u8 = 1 << 2;

/// Which of the pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    Master,
    Slave,
}

impl Which {
    /// Inputs that can be level triggered.
    fn elcr_writable(self) -> u8 {
        match self {
            Self::Master => 0xf8,
            Self::Slave => 0xde,
        }
    }
}

/// For the kernel.
pub(crate) fn to_kernel(which: Which, state: &ChipState) -> kvm_pic_state {
    let ChipState {
        lines,
        edges,
        imr,
        isr,
        elcr,
        vector,
        expects,
        icw4_follows,
        // The kernel knows the pair only.
        single: _,
        lowest,
        auto_eoi,
        rotate_on_auto_eoi,
        special_mask,
        special_fully_nested,
        read_isr,
        poll,
    } = state;
    // The kernel pulses the cascade, and would take a level for a pulse that has been.
    let wired = match which {
        Which::Master => CASCADE,
        Which::Slave => 0,
    };
    kvm_pic_state {
        last_irr: lines & !wired,
        irr: edges | lines & elcr,
        imr: *imr,
        isr: *isr,
        priority_add: (lowest + 1) & 7,
        irq_base: *vector,
        read_reg_select: u8::from(*read_isr),
        poll: u8::from(*poll),
        special_mask: u8::from(*special_mask),
        init_state: match expects {
            Expects::Ocw => 0,
            Expects::Icw2 => 1,
            Expects::Icw3 => 2,
            Expects::Icw4 => 3,
        },
        auto_eoi: u8::from(*auto_eoi),
        rotate_on_auto_eoi: u8::from(*rotate_on_auto_eoi),
        special_fully_nested_mode: u8::from(*special_fully_nested),
        init4: u8::from(*icw4_follows),
        elcr: *elcr,
        elcr_mask: which.elcr_writable(),
    }
}

/// The inverse of [`to_kernel`]; levels are the chipset's to know.
pub(crate) fn from_kernel(which: Which, kernel: &kvm_pic_state) -> ChipState {
    let kvm_pic_state {
        last_irr,
        irr,
        imr,
        isr,
        priority_add,
        irq_base,
        read_reg_select,
        poll,
        special_mask,
        init_state,
        auto_eoi,
        rotate_on_auto_eoi,
        special_fully_nested_mode,
        init4,
        elcr,
        elcr_mask: _,
    } = *kernel;
    ChipState {
        lines: last_irr,
        edges: irr & !elcr,
        imr,
        isr,
        elcr: elcr & which.elcr_writable(),
        vector: irq_base & 0xf8,
        expects: match init_state {
            1 => Expects::Icw2,
            2 => Expects::Icw3,
            3 => Expects::Icw4,
            _ => Expects::Ocw,
        },
        icw4_follows: init4 != 0,
        single: false,
        lowest: priority_add.wrapping_sub(1) & 7,
        auto_eoi: auto_eoi != 0,
        rotate_on_auto_eoi: rotate_on_auto_eoi != 0,
        special_mask: special_mask != 0,
        special_fully_nested: special_fully_nested_mode != 0,
        read_isr: read_reg_select != 0,
        poll: poll != 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn chip()(
            [lines, edges, imr, isr, elcr, vector] in any::<[u8; 6]>(),
            expects in prop::sample::select(vec![
                Expects::Ocw, Expects::Icw2, Expects::Icw3, Expects::Icw4,
            ]),
            lowest in 0u8..8,
            flags in any::<[bool; 7]>(),
        ) -> ChipState {
            let [
                icw4_follows, auto_eoi, rotate_on_auto_eoi, special_mask, special_fully_nested,
                read_isr, poll,
            ] = flags;
            let (lines, elcr) = (lines & !CASCADE, elcr & 0xd8);
            ChipState {
                lines,
                edges: edges & lines & !elcr,
                imr, isr, elcr,
                vector: vector & 0xf8,
                expects, icw4_follows,
                single: false,
                lowest, auto_eoi, rotate_on_auto_eoi, special_mask, special_fully_nested,
                read_isr, poll,
            }
        }
    }

    proptest! {
        #[test]
        fn chip_comes_back(chip in chip(), slave: bool) {
            let which = if slave { Which::Slave } else { Which::Master };
            prop_assert_eq!(from_kernel(which, &to_kernel(which, &chip)), chip);
        }
    }
}
