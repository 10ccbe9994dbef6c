//! The saved state of a local APIC.

use serde::{Deserialize, Serialize};

use super::timer::TimerState;
use super::{
    ApicTimer, BASE_ENABLE, BASE_X2APIC, LVT_ENTRIES, LVT_MASKED, LocalApic, VectorSet, reg,
};
use crate::saved::{Check, StateError};

/// A local APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LocalApicState {
    /// `IA32_APIC_BASE`.
    pub apic_base: u64,
    /// Task priority.
    pub tpr: u32,
    /// Logical destination, as the register reads in the present mode.
    pub ldr: u32,
    /// Destination format; bits 27:0 are ones.
    pub dfr: u32,
    /// Spurious interrupt vector register.
    pub svr: u32,
    /// In service.
    pub isr: VectorSet,
    /// Requested.
    pub irr: VectorSet,
    /// Level triggered.
    pub tmr: VectorSet,
    /// Error status, as it reads.
    pub esr: u32,
    /// Errors since it was last written.
    pub errors: u32,
    /// Interrupt command: in xAPIC mode its two registers, high and low.
    pub icr: u64,
    /// Local vector table: timer, thermal sensor, performance counters, LINT0, LINT1, error, CMCI.
    pub lvt: [u32; LVT_ENTRIES],
    /// Levels at LINT0 and LINT1.
    pub lint: [bool; 2],
    /// The timer.
    pub timer: TimerState,
}

impl LocalApic {
    /// Its state.
    pub fn save(&self) -> LocalApicState {
        let Self {
            // Both are the machine's: number of the processor, width of addresses.
            id: _,
            apic_base_reserved: _,
            apic_base,
            tpr,
            ldr,
            dfr,
            svr,
            isr,
            irr,
            tmr,
            esr,
            errors,
            icr,
            lvt,
            lint,
            timer,
            // Follow from the rest.
            ppr: _,
            deliverable: _,
        } = self;
        LocalApicState {
            apic_base: *apic_base,
            tpr: *tpr,
            ldr: *ldr,
            dfr: *dfr,
            svr: *svr,
            isr: *isr,
            irr: *irr,
            tmr: *tmr,
            esr: *esr,
            errors: *errors,
            icr: *icr,
            lvt: *lvt,
            lint: *lint,
            timer: timer.save(),
        }
    }

    /// The APIC in a state; the other arguments are those of [`Self::new`].
    ///
    /// # Errors
    /// For a state that it can't be in.
    pub fn restore(
        id: u32,
        tsc_hz: u64,
        physical_address_bits: u8,
        state: &LocalApicState,
    ) -> Result<Self, StateError> {
        let LocalApicState {
            apic_base,
            tpr,
            ldr,
            dfr,
            svr,
            isr,
            irr,
            tmr,
            esr,
            errors,
            icr,
            lvt,
            lint,
            timer,
        } = state;
        let mut apic = Self {
            id,
            apic_base_reserved: Self::apic_base_reserved(physical_address_bits),
            apic_base: *apic_base,
            tpr: *tpr,
            ldr: *ldr,
            dfr: *dfr,
            svr: *svr,
            isr: *isr,
            irr: *irr,
            tmr: *tmr,
            esr: *esr,
            errors: *errors,
            icr: *icr,
            lvt: *lvt,
            lint: *lint,
            timer: ApicTimer::restore(tsc_hz, timer)?,
            // Follow from the rest, below.
            ppr: 0,
            deliverable: None,
        };
        let check = Check("lapic");
        check.bits("IA32_APIC_BASE", *apic_base, !apic.apic_base_reserved)?;
        check.that(
            apic_base & (BASE_ENABLE | BASE_X2APIC) != BASE_X2APIC,
            "IA32_APIC_BASE",
            *apic_base,
        )?;
        check.at_most("tpr", (*tpr).into(), 0xff)?;
        check.that(
            if apic.is_x2apic() {
                *ldr == apic.x2apic_ldr()
            } else {
                ldr & 0x00ff_ffff == 0
            },
            "ldr",
            *ldr,
        )?;
        check.that(dfr | 0xf000_0000 == u32::MAX, "dfr", *dfr)?;
        check.bits("svr", *svr, 0x13ffu32)?;
        for (what, set) in [("isr", isr), ("irr", irr), ("tmr", tmr)] {
            check.bits(what, set.register(0), 0xffff_0000u32)?;
        }
        check.at_most("esr", (*esr).into(), 0xff)?;
        check.at_most("errors", (*errors).into(), 0xff)?;
        let icr_bits = Self::writable(reg::ICR).unwrap_or(0);
        check.bits("icr", *icr, u64::from(icr_bits) | 0xffff_ffff << 32)?;
        for (index, &entry) in lvt.iter().enumerate() {
            let register = if index == LVT_ENTRIES - 1 {
                reg::LVT_CMCI
            } else {
                reg::LVT_TIMER + index as u8
            };
            check.bits("lvt", entry, Self::writable(register).unwrap_or(0))?;
            let masked_or_enabled = apic.is_software_enabled() || entry & LVT_MASKED != 0;
            check.that(masked_or_enabled, "lvt of a disabled APIC", entry)?;
        }
        apic.update();
        Ok(apic)
    }
}
