//! Control and debug registers, and XCR0.

use core::arch::asm;

use runtime::interrupts::catch;
use runtime::{cpu, print, println, report};

use crate::register::{Register, bits, print_read, print_write};

const ALL: u64 = u64::MAX;

pub fn show() {
    println!("control and debug registers: the bits that can be changed");
    cr0();
    // SDM vol. 3A 2.5: "All 64 bits of CR2 are writable by software".
    bits("cr2", Register::Cr2, 0, ALL);
    cr3();
    // As the features that CPUID enumerates; PAE cannot be cleared in long mode (SDM vol. 3A 2.5).
    bits("cr4", Register::Cr4, cpu::read_cr4(), ALL);
    pcid();
    debug();
}

/// SDM vol. 2B MOV to control registers: reserved bits of the lower half are ignored, in the upper
/// half they are refused. ET is always set. PE, PG and NW are refused because of others (PG, 64-bit
/// code, CD).
fn cr0() {
    bits("cr0", Register::Cr0, cpu::read_cr0(), ALL);
    const CACHES_OFF: u64 = 1 << 30;
    let off = cpu::read_cr0() | CACHES_OFF;
    bits("cr0.nw with cr0.cd", Register::Cr0, off, 1 << 29);
}

/// SDM vol. 3A 5.5.2 (table 5-12): PWT and PCD; bits 52 and up are reserved. So are those from bit 40 on,
/// behind the physical address, but virtualization hardware knows the host's width only.
fn cr3() {
    let asked = 3 << 3 | ALL << 52;
    bits("cr3, without pcids", Register::Cr3, cpu::read_cr3(), asked);
}

/// SDM vol. 3A 5.10.1.
fn pcid() {
    const PCIDE: u64 = 1 << 17;
    const PWT: u64 = 1 << 3;
    let (cr3, cr4) = (cpu::read_cr3(), cpu::read_cr4());
    cpu::write_cr3(cr3 | PWT);
    print!("cr4.pcide while cr3's low bits are not zero:");
    print_write(Register::Cr4, cr4 | PCIDE);
    println!();
    cpu::write_cr3(cr3);
    cpu::write_cr4(cr4);
    if Register::Cr4.write(cr4 | PCIDE).is_err() {
        println!("no pcids");
        return;
    }
    // Bit 63 is an order, not kept.
    bits("cr3, with pcids", Register::Cr3, cr3, 0xFFF | ALL << 52);
    cpu::write_cr3(cr3);
    cpu::write_cr4(cr4);
}

/// SDM vol. 3B 19.2.1 to 19.2.6. No breakpoint is set where anything happens. Not asked of
/// DR7: bit 13, which makes reading it fault, and bit 11 (RTM), which KVM keeps without RTM too.
fn debug() {
    bits("dr0", Register::Dr0, 0, ALL);
    let old = cpu::read_dr6();
    bits("dr6", Register::Dr6, 0xFFFF_0FF0, ALL);
    cpu::write_dr6(old);
    bits("dr7", Register::Dr7, 0x400, !(1 << 13 | 1 << 11));
}

/// SDM vol. 1 13.3, vol. 2D XGETBV, XSETBV.
pub fn extended() {
    const OSXSAVE: u64 = 1 << 18;
    let old = cpu::read_cr4();
    print!("without cr4.osxsave: xgetbv");
    print_read(Register::Xcr(0));
    print!(", xsetbv");
    print_write(Register::Xcr(0), 1);
    println!();
    if Register::Cr4.write(old | OSXSAVE).is_err() {
        println!("no xsave");
        return;
    }
    print!("xcr0:");
    print_read(Register::Xcr(0));
    println!();
    bits("xcr0, from 1", Register::Xcr(0), 1, ALL);
    bits("xcr0, from 3", Register::Xcr(0), 3, ALL);
    // Reading it is not asked: virtualization hardware does not stop XGETBV, and the host's
    // processor may have XCR1 (XINUSE).
    print!("xcr1, written:");
    print_write(Register::Xcr(1), 1);
    println!();
    cpu::write_cr4(old);
}

/// No counters are enumerated (leaf 0xA is zero): RDPMC has none to read.
pub fn counters() {
    unsafe extern "C" fn rdpmc(index: u64) -> u64 {
        let value: u64;
        // SAFETY: reads a counter, or faults.
        unsafe {
            asm!("rdpmc", in("rcx") index, out("rax") value, out("rdx") _, options(nostack, preserves_flags));
        }
        value
    }
    print!("rdpmc:");
    for index in [0, 1 << 30] {
        print!(" {index:#x} ");
        match catch(rdpmc, index) {
            Ok(_) => print!("counts"),
            Err(fault) => report::print_name(&fault),
        }
    }
    println!();
}
