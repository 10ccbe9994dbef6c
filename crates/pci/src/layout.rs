//! Where PCI lies in the PC's address space and interrupts. Firmware tables (ACPI MCFG, `_CRS` and
//! `_PRT`) are to say the same, so they are made from these constants.

/// Guest-physical start of the memory-mapped configuration space (ECAM).
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Bytes of ECAM: 4 KiB for each of the 256 functions of bus 0.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// The last bus that ECAM covers; there is only bus 0.
pub const ECAM_LAST_BUS: u8 = 0;
/// Guest-physical start of the window from which base address registers are assigned.
pub const MMIO_BASE: u64 = 0xc000_0000;
/// Bytes of that window.
pub const MMIO_SIZE: u64 = 0x2000_0000;
/// Device numbers on the bus.
pub const SLOTS: usize = 32;

/// The global system interrupt that the INTA# pin of the function in `slot` is wired to.
///
/// Lines 10 and 11 are free on a PC, and reach the 8259 as well as the I/O APIC, so a guest that
/// knows no ACPI can use them too. Level-triggered.
pub const fn slot_gsi(slot: u8) -> u32 {
    10 + (slot as u32 & 1)
}
