//! The saved state of the ACPI fixed registers.

use serde::{Deserialize, Serialize};

use super::{AcpiPm, CONTROL_KEPT, ENABLES, OVERFLOW_SHIFT, PM_TIMER_HZ, SCI_ENABLE, STATUSES};
use crate::saved::{Check, StateError};
use crate::ticks::ticks_at;

/// The fixed registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AcpiPmState {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control.
    pub control: u16,
    /// GPE0 status.
    pub gpe_status: u16,
    /// GPE0 enable.
    pub gpe_enable: u16,
    /// Changes of the timer's highest bit seen so far.
    pub overflows: u64,
}

impl AcpiPm {
    /// Its state.
    pub fn save(&self) -> AcpiPmState {
        let Self {
            status,
            enable,
            control,
            gpe_status,
            gpe_enable,
            overflows,
        } = *self;
        AcpiPmState {
            status,
            enable,
            control,
            gpe_status,
            gpe_enable,
            overflows,
        }
    }

    /// The registers in a state that they were in at `now`, nanoseconds of VM time.
    ///
    /// # Errors
    /// For a state that they can't be in.
    pub fn restore(state: &AcpiPmState, now: u64) -> Result<Self, StateError> {
        let AcpiPmState {
            status,
            enable,
            control,
            gpe_status,
            gpe_enable,
            overflows,
        } = *state;
        let check = Check("acpi-pm");
        check.time("VM time", now)?;
        check.bits("status", status, STATUSES)?;
        check.bits("enable", enable, ENABLES)?;
        check.bits("control", control, CONTROL_KEPT | SCI_ENABLE)?;
        check.that(control & SCI_ENABLE != 0, "control", control)?;
        let seen = ticks_at(now, PM_TIMER_HZ) >> OVERFLOW_SHIFT;
        check.at_most("overflows", overflows, seen)?;
        Ok(Self {
            status,
            enable,
            control,
            gpe_status,
            gpe_enable,
            overflows,
        })
    }
}
