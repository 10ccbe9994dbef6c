//! The PC's chipset as deterministic state machines: interrupt controllers (8259A pair, I/O APIC,
//! local APICs), timers (8254 PIT, MC146818 RTC, HPET, ACPI PM timer), 16550A serial ports, the
//! i8042 keyboard controller, the ACPI fixed registers, and a few debug ports.
//!
//! Nothing here has threads, clocks or files. Time comes in as `now`, nanoseconds of VM time; what
//! must happen outside (wake a vCPU, print a byte, power off) goes out through [`Effects`].
//! [`Chipset`] wires the devices together as a PC does and is what a machine owns.
#![forbid(unsafe_code)]

pub mod acpi_pm;
mod chipset;
mod effects;
pub mod hpet;
pub mod i8042;
pub mod ioapic;
pub mod lapic;
pub mod map;
pub mod pic;
pub mod pit;
pub mod rtc;
pub mod saved;
pub mod serial;
pub mod ticks;

pub use chipset::{
    BoardState, Chipset, ChipsetConfig, ChipsetState, ConfigError, ControllersState,
    GeneralProtection, RestoreError,
};
pub use effects::{CpuSignal, Effects, PowerRequest, ResetCause, Signal};
