//! The tables that descriptors are in (SDM vol. 3A 2.4, 3.5).

use core::arch::asm;

use runtime::interrupts::catch;
use runtime::segments::{self, FIRST_FREE, TablePointer, set_descriptor};
use runtime::{cpu, println, report};

use crate::code::{Access, access};
use crate::{SEGMENT, descriptor, memory, print_ended};
use runtime::print;

const LDT: u16 = FIRST_FREE + 8; // two slots
const TABLE: u64 = 4;

static mut LOCAL: [u64; 8] = [0; 8];
static mut COPY: [u64; 32] = [0; 32];

pub fn show() {
    local();
    the_end_of_the_table();
    bases();
}

/// SDM vol. 3A 4.5.1, vol. 2A LLDT.
fn local() {
    print!("no ldt: ");
    print_ended(access(Access::LoadDs, (8 | TABLE) as u16, 0));
    let data = descriptor(memory(), 0xFFF, 0x92, 4);
    // SAFETY: one CPU.
    unsafe { (&raw mut LOCAL).cast::<u64>().add(1).write_volatile(data) }
    let load = |limit: u32, access: u8| {
        let [low, high] = segments::system_descriptor((&raw const LOCAL) as u64, limit, access);
        set_descriptor(LDT, low);
        set_descriptor(LDT + 8, high);
        catch(lldt, LDT.into())
    };
    print!("; loaded ");
    print_ended(load(15, 0x82));
    print!(", its second entry ");
    print_ended(access(Access::Read, (8 | TABLE) as u16, 0));
    // SAFETY: as above.
    let now = unsafe { (&raw const LOCAL).cast::<u64>().add(1).read_volatile() };
    print!(", then accessed {}, ", now >> 40 & 1);
    print!("behind its limit ");
    print_ended(access(Access::LoadDs, (16 | TABLE) as u16, 0));
    print!(", limit one less ");
    let _ = load(14, 0x82);
    print_ended(access(Access::LoadDs, (8 | TABLE) as u16, 0));
    println!();
    print!("lldt: not present ");
    print_ended(load(15, 0x02));
    print!(", a tss ");
    print_ended(load(15, 0x89));
    print!(", data ");
    print_ended(load(15, 0x92));
    print!(", in the ldt itself ");
    print_ended(catch(lldt, 8 | TABLE));
    print!(", null ");
    print_ended(catch(lldt, 0));
    println!();
}

unsafe extern "C" fn lldt(selector: u64) -> u64 {
    // SAFETY: whoever uses the table is catching what comes of it.
    unsafe { asm!("lldt {:x}", in(reg) selector, options(nostack, preserves_flags)) }
    0
}

unsafe extern "C" fn lgdt(pointer: u64) -> u64 {
    // SAFETY: the tables that are given have the entries in use.
    unsafe { asm!("lgdt [{}]", in(reg) pointer, options(nostack, preserves_flags)) }
    0
}

/// SDM vol. 3A 3.5.1. A descriptor counts only if all its eight bytes are in the table.
fn the_end_of_the_table() {
    let old = TablePointer {
        limit: 255,
        base: segments::gdt_base(),
    };
    const LAST: u16 = 31 * 8;
    set_descriptor(LAST, descriptor(memory(), 0xFFF, 0x92, 4));
    for limit in [255, 254, 248, 247] {
        let shorter = TablePointer {
            limit,
            base: old.base,
        };
        let _ = catch(lgdt, &raw const shorter as u64);
        print!("gdt limit {limit}: the last entry ");
        let ended = access(Access::LoadDs, LAST, 0);
        let _ = catch(lgdt, &raw const old as u64);
        print_ended(ended);
        println!();
    }
    // Another table at another place, with the same entries and one more.
    // SAFETY: one CPU, both are there.
    unsafe {
        core::ptr::copy_nonoverlapping(old.base as *const u64, (&raw mut COPY).cast::<u64>(), 32);
        (&raw mut COPY).cast::<u64>().add(31).write_volatile(0);
    }
    let copy = TablePointer {
        limit: 255,
        base: (&raw const COPY) as u64,
    };
    let _ = catch(lgdt, &raw const copy as u64);
    let ended = access(Access::LoadDs, LAST, 0);
    let _ = catch(lgdt, &raw const old as u64);
    print!("another gdt, where it is null: ");
    print_ended(ended);
    println!();
    let nowhere = TablePointer {
        limit: 255,
        // Nor with 57 bits: the check is made for what the processor has, whatever CR4.LA57 says.
        base: 1 << 63,
    };
    print!("lgdt with a base that is not canonical: ");
    match catch(lgdt, &raw const nowhere as u64) {
        Ok(_) => print!("yes"),
        Err(fault) => report::print_name(&fault),
    }
    println!();
}

/// SDM vol. 3A 3.4.4. FS and GS have bases in 64-bit code: from the descriptor (32 bits), or from the MSRs.
fn bases() {
    use cpu::msr::{FS_BASE, GS_BASE};
    set_descriptor(SEGMENT, descriptor(0xFEDC_BA98, 0xFFF, 0x92, 4));
    // SAFETY: nothing uses FS and GS.
    unsafe {
        asm!("mov fs, {0:e}", "mov gs, {0:e}", in(reg) u32::from(SEGMENT), options(nostack, preserves_flags));
    }
    println!(
        "bases from a descriptor: fs {:#x}, gs {:#x}",
        cpu::read_msr(FS_BASE),
        cpu::read_msr(GS_BASE)
    );
    cpu::write_msr(FS_BASE, 0xFFFF_8000_1234_5678);
    cpu::write_msr(GS_BASE, memory());
    println!(
        "bases from the msrs: fs {:#x}, gs is the memory's {}",
        cpu::read_msr(FS_BASE),
        u8::from(cpu::read_msr(GS_BASE) == memory())
    );
    let (byte, ds_byte): (u8, u8);
    // SAFETY: GS points to the memory; DS and ES have no base in 64-bit code.
    unsafe {
        asm!("mov es, {:e}", in(reg) u32::from(SEGMENT), options(nostack, preserves_flags));
        asm!("mov {}, gs:[0x10]", out(reg_byte) byte, options(nostack, preserves_flags));
        asm!("mov {}, es:[{}]", out(reg_byte) ds_byte, in(reg) memory() + 0x11, options(nostack, preserves_flags));
    }
    println!("through gs {byte:#x}, through es without its base {ds_byte:#x}");
    cpu::write_msr(GS_BASE, 0);
    cpu::write_msr(FS_BASE, 0);
}
