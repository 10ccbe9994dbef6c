//! Ending the run.

use core::arch::asm;

use crate::port;

/// ACPI's PM1a control register (ACPI 6.5, 4.8.3.2.1) and what its bits mean on trapgate's chipset.
const PM1A_CONTROL: u16 = 0x604;
const SLEEP_TYPE_S5: u16 = 5 << 10;
const SLEEP_ENABLE: u16 = 1 << 13;

/// The isa-debug-exit port: the VMM exits with `(value << 1) | 1`.
const DEBUG_EXIT: u16 = 0xF4;
const SUCCESS: u32 = 0x10;
const FAILURE: u32 = 0x11;

/// Powers the machine off.
pub fn off() -> ! {
    port::write16(PM1A_CONTROL, SLEEP_TYPE_S5 | SLEEP_ENABLE);
    port::write32(DEBUG_EXIT, SUCCESS);
    triple_fault()
}

/// Ends the run so that whoever started it can tell that it failed.
pub fn fail() -> ! {
    port::write32(DEBUG_EXIT, FAILURE);
    port::write16(PM1A_CONTROL, SLEEP_TYPE_S5 | SLEEP_ENABLE);
    triple_fault()
}

/// Without a single IDT entry no exception can be delivered, nor the double fault that follows:
/// the CPU shuts down (SDM vol. 3A 7.15, double fault).
pub fn triple_fault() -> ! {
    let no_idt = [0u8; 10];
    // SAFETY: nothing runs after it.
    unsafe { asm!("lidt [{}]", "int3", "2:", "hlt", "jmp 2b", in(reg) &no_idt, options(noreturn)) }
}
