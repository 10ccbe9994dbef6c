//! Port I/O.

use core::arch::asm;

pub fn write8(port: u16, value: u8) {
    // SAFETY: the device behind the port is the program's to drive; no memory is touched.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

pub fn write16(port: u16, value: u16) {
    // SAFETY: as in `write8`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) }
}

pub fn write32(port: u16, value: u32) {
    // SAFETY: as in `write8`.
    unsafe {
        asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags))
    }
}

pub fn read8(port: u16) -> u8 {
    let value;
    // SAFETY: as in `write8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) }
    value
}

pub fn read32(port: u16) -> u32 {
    let value;
    // SAFETY: as in `write8`.
    unsafe {
        asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags))
    }
    value
}
