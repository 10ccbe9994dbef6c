//! Addresses at the ends of the address space (SDM vol. 1 3.3.7.1: each byte is to be canonical; vol. 3A 7.15, vectors 12 and
//! 13), and of the part of it that 32-bit code has (vol. 3A 6.3; where that leaves it open, a host CPU's answer).

use core::arch::naked_asm;

use runtime::interrupts::{self, Fault, catch};
use runtime::report::print_name;
use runtime::ring3::{self, Start};
use runtime::segments::{USER_CODE_32, USER_DATA};
use runtime::window::{PRESENT, USER, WRITABLE};
use runtime::{cpu, print, println};

use crate::{code, fill, load, load_long, run, show, store, store_long};

const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
const LARGE: u64 = 1 << 7;

#[repr(C, align(4096))]
struct Tables([[u64; 512]; 6]);

static mut TABLES: Tables = Tables([[0; 512]; 6]);

fn table(index: usize) -> u64 {
    (&raw mut TABLES) as u64 + index as u64 * 4096
}

pub fn wrapping() {
    // Last pages of the lower half, and of all: three tables each.
    let root = cpu::read_cr3() & ADDRESS;
    let everything = PRESENT | WRITABLE | USER;
    for (first, entry) in [(0, 255), (3, 511)] {
        store_long(root + entry * 8, table(first) | everything);
        store_long(table(first) + 511 * 8, table(first + 1) | everything);
        store_long(table(first + 1) + 511 * 8, table(first + 2) | everything);
        store_long(table(first + 2) + 511 * 8, code() | PRESENT | WRITABLE);
    }
    cpu::write_cr3(cpu::read_cr3());
    canonical();
    for entry in [255, 511] {
        store_long(root + entry * 8, 0);
    }
    compatibility();
}

#[unsafe(naked)]
unsafe extern "C" fn load_8(address: u64) -> u64 {
    naked_asm!("mov rax, [rdi]", "ret")
}

#[unsafe(naked)]
unsafe extern "C" fn load_8_by_rbp(address: u64) -> u64 {
    naked_asm!(
        "push rbp",
        "mov rbp, rdi",
        "mov rax, [rbp]",
        "pop rbp",
        "ret"
    )
}

#[unsafe(naked)]
unsafe extern "C" fn store_8(address: u64) -> u64 {
    naked_asm!("mov rax, -1", "mov [rdi], rax", "ret")
}

#[unsafe(naked)]
unsafe extern "C" fn copy_16(address: u64) -> u64 {
    naked_asm!(
        "mov ecx, 16",
        "mov rsi, rdi",
        "rep movsb",
        "mov rax, rcx",
        "ret"
    )
}

/// The ends of the two halves of canonical addresses.
fn canonical() {
    const LOWER_END: u64 = 1 << 47;
    fill(code() + 4096 - 16, 0x22, 16);
    for (what, body) in [
        ("load", load_8 as unsafe extern "C" fn(u64) -> u64),
        ("load by rbp", load_8_by_rbp),
        ("store", store_8),
        ("rep movsb", copy_16),
    ] {
        for distance in [8, 7, 0] {
            let ended = catch(body, LOWER_END - distance);
            let (vector, left) = match &ended {
                Ok(_) => (0, 0),
                Err(fault) => (fault.frame.vector, fault.frame.rcx),
            };
            let left = if what == "rep movsb" { left } else { 0 };
            let same = (2..=16).all(|back| load(code() + 4096 - back) == 0x22);
            println!(
                "{what}, {distance} before the end of the lower half: vector {vector}, {left} left, memory {}",
                u8::from(same)
            );
            fill(code() + 4096 - 16, 0x22, 16);
        }
    }
    fill(code() + 4096 - 16, 0x90, 16);
    show("running off the lower half", run(LOWER_END - 8), LOWER_END);
    store(code() + 4096 - 2, &[0xB8, 0x11]);
    show(
        "an instruction off the lower half",
        run(LOWER_END - 2),
        LOWER_END,
    );
    // The start of the upper half, and what is before it: not canonical.
    show(
        "a load before the upper half",
        catch(load_8, (1u64 << 47).wrapping_neg() - 4),
        0,
    );
}

/// 32-bit code of ring 3 at the last page below 4 GiB goes on at 0, as a host CPU does; data does not.
fn compatibility() {
    const TOP: u64 = 0xFFFF_F000;
    let root = cpu::read_cr3() & ADDRESS;
    let everything = PRESENT | WRITABLE | USER;
    ring3::open_memory();
    interrupts::allow_from_ring3(3);
    // IRET to ring 3 takes segments of ring 0 away, and flat ones are what a translator may count on.
    // SAFETY: 64-bit code does not use them.
    unsafe {
        core::arch::asm!("mov ds, {0:e}", "mov es, {0:e}", in(reg) u32::from(USER_DATA), options(nostack))
    }
    // The last 2 MiB below 4 GiB by small pages, of which one is there.
    let pointers = load_long(root) & ADDRESS;
    store_long(pointers + 3 * 8, load_long(pointers + 3 * 8) | USER);
    let directory = load_long(pointers + 3 * 8) & ADDRESS;
    let old = load_long(directory + 511 * 8);
    fill(table(0), 0, 4096);
    store_long(table(0) + 511 * 8, code() | everything);
    store_long(directory + 511 * 8, table(0) | everything);
    // And the first 2 MiB, of which the first page can be taken away.
    let low = load_long(pointers) & ADDRESS;
    let old_low = load_long(low);
    for page in 0..512 {
        store_long(table(1) + page * 8, page * 4096 | everything);
    }
    assert!(old_low & LARGE != 0, "the boot tables have large pages");
    store_long(low, table(1) | everything);
    let zero = |entry| {
        store_long(table(1), entry);
        cpu::write_cr3(cpu::read_cr3());
    };
    let mut kept = [0; 16];
    zero(everything);
    for (at, byte) in (0..).zip(&mut kept) {
        // SAFETY: address 0 is mapped to memory; Rust would not have it called a pointer.
        *byte = unsafe { peek(at) };
    }

    let top = code() + 4096;
    fill(top - 16, 0x90, 16);
    zero(0);
    user("running over 4 GiB, nothing at 0", TOP + 0xFF0);
    store(top - 2, &[0xB8, 0x11]);
    user("an instruction across 4 GiB, nothing at 0", TOP + 0xFFE);
    zero(everything);
    // SAFETY: as above.
    let low_bytes = |bytes: &[u8]| unsafe {
        for (at, &byte) in (0..).zip(bytes) {
            poke(at, byte);
        }
    };
    // mov eax, 0x44332211; hlt
    low_bytes(&[0x22, 0x33, 0x44, 0xF4]);
    for _ in 0..3 {
        let eax = user("an instruction across 4 GiB", TOP + 0xFFE);
        println!("  eax {eax:#x}");
    }
    low_bytes(&[0x55]);
    let eax = user("the same, its second page written", TOP + 0xFFE);
    println!("  eax {eax:#x}");
    fill(top - 16, 0x90, 16);
    low_bytes(&[0xF4]);
    user("running over 4 GiB", TOP + 0xFF0);
    // mov ecx, 3; dec ecx; jnz to it; then over the end
    store(top - 16, &[0xB9, 3, 0, 0, 0, 0x49, 0x75, 0xFD]);
    user("a loop, then over 4 GiB", TOP + 0xFF0);
    store(top - 1, &[0xCC]);
    user("int3 in the last byte below 4 GiB", TOP + 0xFFF);
    store(top - 2, &[0xEB, 0x00]);
    user("a jump from the last bytes to the next", TOP + 0xFFE);
    store(top - 2, &[0xEB, 0x02]);
    low_bytes(&[0x90, 0x90, 0xF4]);
    user("a jump over 4 GiB", TOP + 0xFFE);
    // mov eax, [0xFFFFFFFE]; hlt
    store(code(), &[0xA1, 0xFE, 0xFF, 0xFF, 0xFF, 0xF4]);
    user("a load across 4 GiB", TOP);
    // mov eax, [0xFFFFFFFC]; hlt
    store(code(), &[0xA1, 0xFC, 0xFF, 0xFF, 0xFF, 0xF4]);
    let eax = user("a load below 4 GiB", TOP);
    println!("  eax {eax:#x}");

    low_bytes(&kept);
    store_long(low, old_low);
    store_long(directory + 511 * 8, old);
    cpu::write_cr3(cpu::read_cr3());
}

/// SAFETY: the address is mapped to memory.
unsafe fn peek(address: u64) -> u8 {
    let value: u8;
    // SAFETY: as the caller says.
    unsafe {
        core::arch::asm!("mov {}, [{}]", out(reg_byte) value, in(reg) address, options(nostack))
    }
    value
}

/// SAFETY: the address is mapped to memory of nobody else.
unsafe fn poke(address: u64, value: u8) {
    // SAFETY: as the caller says.
    unsafe {
        core::arch::asm!("mov [{}], {}", in(reg) address, in(reg_byte) value, options(nostack))
    }
}

/// Runs 32-bit code of ring 3, which ends with an exception.
fn user(what: &str, address: u64) -> u32 {
    let mut start = Start::new(address, code() + 2048, 0);
    start.cs = u64::from(USER_CODE_32);
    start.ss = u64::from(USER_DATA);
    let fault: Fault = ring3::run(&start);
    print!("{what}: ");
    print_name(&fault);
    print!(" rip {:#x}", fault.frame.rip);
    if fault.frame.vector == 14 {
        print!(" cr2 {:#x}", fault.cr2);
    }
    println!();
    fault.frame.rax as u32
}
