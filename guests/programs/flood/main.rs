//! More code than any cache holds: one page at many addresses, code at every byte, code without end,
//! address spaces without end, in 64-bit code and in 32-bit code of ring 0.
//!
//! Each part says how often what came back was wrong, which must be never, and how long it took. What a
//! monitor keeps of all this must stay bounded: whoever runs the guest watches that. `long` on the command line
//! makes sixteen times as much of everything, `short` a sixteenth.
#![no_std]
#![no_main]

mod legacy;

use core::arch::asm;

use runtime::{boot_info, cpu, println, time};

runtime::entry!(flood);

/// Memory for code and page tables: the program and its loader are below. The machine needs 224 MiB.
const ARENA: u64 = 32 << 20;
const ARENA_BYTES: u64 = 192 << 20;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;

fn flood() {
    let line = boot_info::command_line();
    let scale = match (line.contains("long"), line.contains("short")) {
        (true, _) => 256,
        (_, true) => 1,
        _ => 16,
    };
    let start = cpu::read_tsc();
    aliases(6250 * scale);
    took("aliases", start);
    let start = cpu::read_tsc();
    entries(6 * scale);
    took("entries", start);
    distinct(scale);
    let start = cpu::read_tsc();
    address_spaces(625 * scale);
    took("address spaces", start);
    let start = cpu::read_tsc();
    legacy::flood(scale);
    took("32-bit code", start);
    // What was thrown away meanwhile is made again.
    aliases(6250 * scale);
    println!("flood: done");
}

fn took(what: &str, start: u64) {
    let ticks = cpu::read_tsc() - start;
    let milliseconds = time::nanoseconds(ticks, &time::tsc_frequency()) / 1_000_000;
    println!("note: {what}: {milliseconds} ms");
}

/// Stores bytes one after the other.
fn store(to: u64, bytes: &[u8]) {
    for (at, &byte) in (to..).zip(bytes) {
        // SAFETY: the callers stay inside the arena, or inside addresses that are mapped to it.
        unsafe { (at as *mut u8).write_volatile(byte) }
    }
}

fn store_long(to: u64, value: u64) {
    // SAFETY: as in `store`.
    unsafe { (to as *mut u64).write_volatile(value) }
}

fn load_long(from: u64) -> u64 {
    // SAFETY: as in `store`.
    unsafe { (from as *const u64).read_volatile() }
}

/// Calls code with a number in EAX and another in ECX; gives what it leaves in EAX.
fn call(code: u64, eax: u32, ecx: u32) -> u32 {
    let result;
    // SAFETY: what was stored there changes EAX and ECX only, and returns.
    unsafe {
        asm!("call {}", in(reg) code, inout("eax") eax => result, inout("ecx") ecx => _);
    }
    result
}

/// `mov eax, NUMBER; ret`
fn constant(number: u32) -> [u8; 6] {
    let [a, b, c, d] = number.to_le_bytes();
    [0xB8, a, b, c, d, 0xC3]
}

/// One page of memory under very many linear addresses: every entry of three page tables is the same.
fn aliases(most: u64) {
    const FUNCTIONS: u32 = 256;
    const CROSSING: u64 = 0xFFD;
    let page = ARENA;
    let mut below = page;
    for level in 1..=3 {
        let table = ARENA + level * 4096;
        for entry in 0..512 {
            store_long(table + entry * 8, below | PRESENT | WRITABLE);
        }
        below = table;
    }
    let root = cpu::read_cr3() & ADDRESS;
    for entry in [2, 300] {
        store_long(root + entry * 8, below | PRESENT | WRITABLE);
    }
    cpu::write_cr3(cpu::read_cr3());
    // One address in each half of the address space.
    let bases = [2 << 39, 0xFFFF_0000_0000_0000 | 300 << 39];
    let fill = |at: u64, first: u32| {
        for function in 0..FUNCTIONS {
            store(at + u64::from(function) * 16, &constant(first + function));
        }
    };
    for (count, what) in [(1000, "a thousand"), (most, "very many")] {
        let mut wrong = 0;
        for round in 0..2u32 {
            let first = count as u32 * (round + 1);
            // Written once, through an address that is one of many, and seen at all others.
            fill(bases[0] + (count - 1) * 4096, first);
            for alias in 0..count {
                let base = bases[(alias % 2) as usize] + alias / 2 * 4096;
                let function = alias as u32 % FUNCTIONS;
                let found = call(base + u64::from(function) * 16, 0, 0);
                wrong += u32::from(found != first + function);
            }
        }
        println!("one page at {what} addresses, run, rewritten, run: {wrong} wrong");
    }
    let mut wrong = 0;
    for alias in 0..1000 {
        store(bases[1] + alias * 4096, &constant(alias as u32));
        wrong += u32::from(call(bases[0] + alias * 8192, 0, 0) != alias as u32);
    }
    println!("written at each of a thousand addresses, run at another: {wrong} wrong");
    // The page follows itself: an instruction that leaves it at its end goes on at its start.
    let mut wrong = 0;
    for number in 0..1000 {
        let code = constant(number);
        store(page + CROSSING, &code[..3]);
        store(page, &code[3..]);
        wrong += u32::from(call(bases[0] + u64::from(number) * 4096 + CROSSING, 0, 0) != number);
    }
    println!("an instruction across two of a thousand addresses: {wrong} wrong");
    for entry in [2, 300] {
        store_long(root + entry * 8, 0);
    }
    cpu::write_cr3(cpu::read_cr3());
}

/// Every byte of many pages is called: XCHG EAX, ECX some times, and RET; and nothing but RET.
fn entries(pages: u64) {
    let pages = pages.min(ARENA_BYTES / 4096);
    let mut wrong = 0;
    for page in 0..pages {
        let at = ARENA + page * 4096;
        for word in 0..512 {
            let code = if page % 2 == 0 {
                0xC391_9191_9191_9191
            } else {
                0xC3C3_C3C3_C3C3_C3C3
            };
            store_long(at + word * 8, code);
        }
        for byte in 0..4096 {
            let found = call(at + byte, 1, 2);
            let exchanges = if page % 2 == 0 { 7 - byte % 8 } else { 0 };
            wrong += u32::from(u64::from(found) != 1 + exchanges % 2);
        }
    }
    println!("every byte of many pages called: {wrong} wrong");
}

/// Jumps from one piece of code to the next, all of them different, over 64 MiB of memory.
fn distinct(scale: u64) {
    const BYTES: u64 = 64 << 20;
    let step = 8192 / scale;
    let quarter = BYTES / step / 4;
    for part in 0..4 {
        for piece in 0..quarter {
            let at = ARENA + (part * quarter + piece) * step;
            let [a, b, c, d] = ((part * quarter + piece) as u32).to_le_bytes();
            store(at, &[0x05, a, b, c, d]); // add eax, number
            if piece == quarter - 1 {
                store(at + 5, &[0xC3]);
            } else {
                let [a, b, c, d] = (step as u32 - 10).to_le_bytes();
                store(at + 5, &[0xE9, a, b, c, d]); // jmp to the next
            }
        }
    }
    let mut wrong = 0;
    for round in 0..2 {
        for part in 0..4 {
            let (from, to) = (part * quarter, (part + 1) * quarter);
            let sum = (to * (to - 1) - from * from.wrapping_sub(1)) / 2;
            let start = cpu::read_tsc();
            let found = call(ARENA + from * step, 0, 0);
            let ticks = cpu::read_tsc() - start;
            wrong += u32::from(found != sum as u32);
            let nanoseconds = time::nanoseconds(ticks, &time::tsc_frequency());
            println!(
                "note: 64 MiB of code, pass {round}, part {part}: {} ns for each of {quarter}",
                nanoseconds / quarter
            );
        }
    }
    println!("64 MiB of code, twice: {wrong} wrong");
}

/// Thousands of page-table roots, with process-context identifiers where there are some, and the same address
/// in each leads elsewhere.
fn address_spaces(switches: u64) {
    const ROOTS: u64 = 4096;
    const KINDS: u64 = 16;
    const PCIDE: u64 = 1 << 17;
    const KEEP: u64 = 1 << 63;
    const ENTRY: u64 = 3;
    let tables = ARENA;
    let roots = ARENA + (1 << 20);
    for kind in 0..KINDS {
        let [directories, directory, table, page] =
            [0, 1, 2, 3].map(|n| tables + (kind * 4 + n) * 4096);
        for (from, to) in [(directories, directory), (directory, table), (table, page)] {
            store_long(from, to | PRESENT | WRITABLE);
        }
        store(page, &constant(kind as u32));
    }
    let (old_cr3, old_cr4) = (cpu::read_cr3(), cpu::read_cr4());
    for root in 0..ROOTS {
        let at = roots + root * 4096;
        for entry in 0..512 {
            store_long(at + entry * 8, load_long((old_cr3 & ADDRESS) + entry * 8));
        }
        store_long(
            at + ENTRY * 8,
            (tables + root % KINDS * 4 * 4096) | PRESENT | WRITABLE,
        );
    }
    let has_pcid = cpu::cpuid(1, 0).ecx & 1 << 17 != 0;
    for pcid in [false, true] {
        let pcid = pcid && has_pcid;
        if pcid {
            cpu::write_cr4(old_cr4 | PCIDE);
        }
        let mut wrong = 0;
        for switch in 0..switches {
            let root = switch * 2_654_435_761 % ROOTS;
            let mut cr3 = roots + root * 4096;
            if pcid {
                // Each identifier stands for one root, so what is kept for it is right.
                cr3 |= root | if switch % 4 != 0 { KEEP } else { 0 };
            }
            cpu::write_cr3(cr3);
            wrong += u32::from(call(ENTRY << 39, 0, 0) != (root % KINDS) as u32);
        }
        cpu::write_cr3(old_cr3);
        cpu::write_cr4(old_cr4);
        println!("thousands of address spaces: {wrong} wrong");
    }
}
