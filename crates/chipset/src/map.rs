//! Where the devices are: ports, guest-physical addresses, interrupt numbers. The ACPI tables and
//! whoever else describes the machine to a guest take them from here.

/// First port of the master 8259A; the slave is at 0xa0, the trigger-mode registers at 0x4d0.
pub const PIC_MASTER_PORT: u16 = 0x20;
/// First port of the slave 8259A.
pub const PIC_SLAVE_PORT: u16 = 0xa0;
/// Edge/level control registers of the two 8259As.
pub const ELCR_PORT: u16 = 0x4d0;
/// First port of the 8254.
pub const PIT_PORT: u16 = 0x40;
/// System control port B: gate and output of PIT channel 2, speaker.
pub const SYSTEM_CONTROL_B_PORT: u16 = 0x61;
/// Index port of the RTC and CMOS memory; data is at the next port.
pub const RTC_PORT: u16 = 0x70;
/// CMOS index of the century byte (FADT `CENTURY`).
pub const RTC_CENTURY: u8 = 0x32;
/// Data port of the i8042.
pub const I8042_DATA_PORT: u16 = 0x60;
/// Command and status port of the i8042.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// System control port A: fast A20 and reset.
pub const SYSTEM_CONTROL_A_PORT: u16 = 0x92;
/// First ports of COM1 and COM2, eight each.
pub const SERIAL_PORTS: [u16; 2] = [0x3f8, 0x2f8];
/// ISA interrupts of COM1 and COM2.
pub const SERIAL_IRQS: [u32; 2] = [4, 3];
/// Power-on self test codes; Linux writes here to wait about a microsecond.
pub const POST_PORT: u16 = 0x80;
/// Debug console: what is written comes out as [`Effects::debug`](crate::Effects); reads give 0xe9.
pub const DEBUG_CONSOLE_PORT: u16 = 0xe9;
/// isa-debug-exit: writing `v` ends the VM with status `v << 1 | 1`.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;
/// Reset control register, which is the FADT's `RESET_REG` too (one byte, I/O space).
pub const RESET_PORT: u16 = 0xcf9;
/// What to write to [`RESET_PORT`] for a reset (FADT `RESET_VALUE`).
pub const RESET_VALUE: u8 = 0x06;

/// First port of the ACPI fixed registers.
pub const PM_BASE: u16 = 0x600;
/// PM1a event block: status (2 bytes), then enable (2 bytes). FADT `PM1a_EVT_BLK`, length 4.
pub const PM1A_EVENT_PORT: u16 = PM_BASE;
/// Length of the PM1a event block, bytes.
pub const PM1A_EVENT_LENGTH: u8 = 4;
/// PM1a control block. FADT `PM1a_CNT_BLK`, length 2.
pub const PM1A_CONTROL_PORT: u16 = PM_BASE + 4;
/// Length of the PM1a control block, bytes.
pub const PM1A_CONTROL_LENGTH: u8 = 2;
/// PM timer, 32 bits wide (set the FADT's `TMR_VAL_EXT`). FADT `PM_TMR_BLK`, length 4.
pub const PM_TIMER_PORT: u16 = PM_BASE + 8;
/// Length of the PM timer block, bytes.
pub const PM_TIMER_LENGTH: u8 = 4;
/// General-purpose event block 0: status (2 bytes), then enable (2 bytes). FADT `GPE0_BLK`, length 4.
pub const GPE0_PORT: u16 = PM_BASE + 0x20;
/// Length of GPE block 0, bytes.
pub const GPE0_LENGTH: u8 = 4;
/// End of the ACPI fixed registers (exclusive).
pub const PM_END: u16 = PM_BASE + 0x40;
/// The value of `SLP_TYP` that means S5, soft off: the DSDT's `_S5` package is `{5, 5, 0, 0}`.
pub const SLEEP_TYPE_S5: u8 = 5;

/// The I/O APIC's registers, guest-physical.
pub const IO_APIC_ADDRESS: u64 = 0xfec0_0000;
/// Bytes of address space the I/O APIC answers to.
pub const IO_APIC_SIZE: u64 = 0x1000;
/// Pins of the I/O APIC, which are GSIs 0 to 23.
pub const IO_APIC_PINS: u32 = 24;
/// Where the local APICs' registers are after reset, guest-physical.
pub const LOCAL_APIC_ADDRESS: u64 = 0xfee0_0000;
/// The HPET's registers, guest-physical.
pub const HPET_ADDRESS: u64 = 0xfed0_0000;
/// Bytes of address space the HPET answers to.
pub const HPET_SIZE: u64 = 0x400;

/// GSI of ISA interrupt 0 (PIT, or HPET timer 0 in legacy mode): the MADT needs an interrupt source
/// override 0 → 2, edge triggered and active high. All other ISA interrupts are identity mapped.
pub const TIMER_GSI: u32 = 2;
/// GSI of the ACPI system control interrupt: level triggered, active high (MADT override 9 → 9, FADT
/// `SCI_INT`).
pub const SCI_GSI: u32 = 9;
/// GSI of the keyboard.
pub const KEYBOARD_GSI: u32 = 1;
/// GSI of the PS/2 mouse.
pub const MOUSE_GSI: u32 = 12;
/// GSI of the RTC.
pub const RTC_GSI: u32 = 8;

/// Rate of the local APIC timer before its divider, Hz: CPUID leaf 0x15 must name it as the core
/// crystal clock, if there is such a leaf.
pub const APIC_TIMER_HZ: u64 = 1_000_000_000;
