//! The paging structures entry by entry: reserved bits of each level, accessed bits on the way, what CR3 and INVPCID
//! refuse, and accesses that the CPU makes itself (SDM vol. 3A 5.5, 5.6.1, 5.8, 5.10).

use core::arch::asm;

use runtime::cpu::{self, cr4};
use runtime::interrupts::{self, Fault, catch};
use runtime::report;
use runtime::segments::{self, FIRST_FREE, TablePointer};
use runtime::window::{self, ACCESSED, DIRTY, LARGE, PRESENT, USER, Upper, WRITABLE};
use runtime::{print, println};

use crate::bodies::{read, write};

const TARGET: usize = 1;
const FULL: u64 = PRESENT | WRITABLE | USER;
const PCIDE: u64 = 1 << 17;

#[repr(C, align(4096))]
struct Page([u8; 4096]);
static mut FRAME: Page = Page([0; 4096]);
static mut TABLES: [Page; 2] = [const { Page([0; 4096]) }; 2];

pub fn show() {
    reserved_bits();
    ignored_bits();
    accessed_bits();
    huge_pages();
    control();
    invalidations();
    implicit();
}

fn print_fault(ended: &Result<u64, Fault>) {
    match ended {
        Ok(_) => print!("no exception"),
        Err(fault) => report::print_name(fault),
    }
}

const LEVELS: [(&str, Upper); 3] = [
    ("pml4", Upper::Pml4),
    ("pdpt", Upper::DirectoryPointers),
    ("directory", Upper::Directory),
];

/// Tables 5-15 to 5-20: bits from the physical address' width (40 here) to 51, PS in a PML4 entry, address bits below a
/// large page's size. `r` reserved: error code 9.
fn reserved_bits() {
    let mark = |ended: &Result<u64, Fault>| match ended {
        Ok(_) => '-',
        Err(fault) if (fault.frame.vector, fault.frame.error) == (14, 9) => 'r',
        Err(_) => '?',
    };
    println!("reserved: bits 7, 39 to 52, 62 of each level's entry");
    const BITS: [u32; 16] = [
        7, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 62,
    ];
    for (name, level) in LEVELS {
        print!("{name}: ");
        for bit in BITS {
            // Where 7 or 39 change the meaning, the walk goes elsewhere: not asked.
            if bit == 39 || bit == 7 && !matches!(level, Upper::Pml4) {
                print!(".");
                continue;
            }
            let address = window::map_memory(TARGET, &raw const FRAME, FULL);
            window::set_upper(level, FULL | 1 << bit);
            print!("{}", mark(&catch(read, address)));
            window::set_upper(level, FULL);
        }
        println!();
    }
    print!("page: ");
    for bit in BITS {
        if bit == 39 {
            print!(".");
            continue;
        }
        let address = window::map_memory(TARGET, &raw const FRAME, FULL | 1 << bit);
        print!("{}", mark(&catch(read, address)));
    }
    println!();
    window::unmap(TARGET);
    print!("2 MiB page, bits 12 to 21: ");
    for bit in 12..22 {
        let address = window::set_large(FULL | LARGE | 1 << bit);
        print!("{}", mark(&catch(read, address)));
    }
    window::set_large(0);
    println!();
    print!("1 GiB page, bits 12 to 30: ");
    for bit in 12..31 {
        let address = window::set_huge(FULL | LARGE | 1 << bit);
        print!("{}", mark(&catch(read, address)));
    }
    window::set_huge(0);
    println!();
    // Present is looked at first.
    let address = window::set_entry(TARGET, 1 << 45);
    print!("a reserved bit, not present: ");
    print_fault(&catch(read, address));
    println!();
}

/// Bits 9 to 11 and 52 to 58 are software's.
fn ignored_bits() {
    const SOFTWARE: u64 = 7 << 9 | 0x7F << 52;
    let address = window::map_memory(TARGET, &raw const FRAME, FULL | SOFTWARE);
    let ended = catch(write, address);
    print!("software's bits: ");
    print_fault(&ended);
    println!(
        ", kept {}",
        u8::from(window::entry(TARGET) & SOFTWARE == SOFTWARE)
    );
}

/// Each entry on the way is marked, also where rights were withheld further down: which is allowed, not required, so
/// that is not asked. Entries above the page have no dirty bit.
fn accessed_bits() {
    for (what, body) in [("read", read as report::Body), ("write", write)] {
        let address = window::map_memory(TARGET, &raw const FRAME, FULL);
        for (_, level) in LEVELS {
            window::set_upper(level, FULL);
        }
        let _ = catch(body, address);
        print!("{what}:");
        for (name, level) in LEVELS {
            let entry = window::upper(level);
            print!(
                " {name} a {} bit 6 {}",
                u8::from(entry & ACCESSED != 0),
                u8::from(entry & DIRTY != 0)
            );
        }
        let entry = window::entry(TARGET);
        println!(
            " page a {} d {}",
            u8::from(entry & ACCESSED != 0),
            u8::from(entry & DIRTY != 0)
        );
    }
    // Not through an upper entry that is not present.
    let address = window::map_memory(TARGET, &raw const FRAME, FULL);
    window::set_upper(Upper::Directory, 0);
    let ended = catch(read, address);
    window::set_upper(Upper::Directory, FULL);
    print!("directory entry not present: ");
    print_fault(&ended);
    println!(
        ", page accessed {}",
        u8::from(window::entry(TARGET) & ACCESSED != 0)
    );
}

fn huge_pages() {
    let address = window::set_huge(PRESENT | WRITABLE | LARGE);
    let place = (&raw mut FRAME) as u64;
    let _ = catch(read, address + place);
    let after_read = window::huge_entry();
    let _ = catch(write, address + place);
    let after_write = window::huge_entry();
    println!(
        "1 GiB page: read a {} d {}, write d {}",
        u8::from(after_read & ACCESSED != 0),
        u8::from(after_read & DIRTY != 0),
        u8::from(after_write & DIRTY != 0)
    );
    window::set_huge(PRESENT | LARGE);
    print!("1 GiB page, read-only: ");
    print_fault(&catch(write, address + place));
    println!();
    window::set_huge(0);
}

unsafe extern "C" fn write_cr3(value: u64) -> u64 {
    cpu::write_cr3(value);
    0
}

unsafe extern "C" fn write_cr4(value: u64) -> u64 {
    cpu::write_cr4(value);
    0
}

unsafe extern "C" fn write_cr0(value: u64) -> u64 {
    cpu::write_cr0(value);
    0
}

/// Vol. 2B MOV to control registers.
fn control() {
    let (cr0, cr3, cr4) = (cpu::read_cr0(), cpu::read_cr3(), cpu::read_cr4());
    let tell = |what: &str, body: report::Body, value: u64| {
        let ended = catch(body, value);
        print!("{what}: ");
        print_fault(&ended);
        println!();
    };
    tell("cr3, bit 63 without pcids", write_cr3, cr3 | 1 << 63);
    tell("cr3, bit 52", write_cr3, cr3 | 1 << 52);
    tell("cr3, bit 62", write_cr3, cr3 | 1 << 62);
    if cpu::cpuid(1, 0).ecx & 1 << 17 == 0 {
        println!("note: no pcid");
        return;
    }
    tell("cr4.pcide", write_cr4, cr4 | PCIDE);
    tell("cr3, bit 63 with pcids", write_cr3, cr3 | 1 << 63 | 5);
    println!("cr3's low bits: {:#x}", cpu::read_cr3() & 0xFFF);
    tell("paging off with pcids", write_cr0, cr0 & !cpu::cr0::PG);
    tell("cr4.pcide off with pcid 5", write_cr4, cr4);
    cpu::write_cr3(cr3);
    cpu::write_cr4(cr4);
}

/// Vol. 2A INVPCID, INVLPG.
fn invalidations() {
    unsafe extern "C" fn invpcid(arguments: u64) -> u64 {
        // SAFETY: the caller's three words.
        let [kind, pcid, address] = unsafe { *(arguments as *const [u64; 3]) };
        cpu::invalidate_pcid(kind, pcid, address);
        0
    }
    unsafe extern "C" fn invlpg(address: u64) -> u64 {
        cpu::invalidate_page(address);
        0
    }
    // No fault, mapped or not, canonical or not.
    for (what, address) in [("not mapped", 5u64 << 30), ("not canonical", 1 << 63)] {
        print!("invlpg of an address that is {what}: ");
        print_fault(&catch(invlpg, address));
        println!();
    }
    if cpu::cpuid(7, 0).ebx & 1 << 10 == 0 {
        println!("note: no invpcid");
        return;
    }
    let tell = |what: &str, arguments: [u64; 3]| {
        print!("invpcid, {what}: ");
        print_fault(&catch(invpcid, &raw const arguments as u64));
        println!();
    };
    tell("one address, pcid 0", [0, 0, 0x1000]);
    tell("one address, pcid 1 without pcids", [0, 1, 0x1000]);
    tell("one pcid, 1 without pcids", [1, 1, 0]);
    tell("one address, not canonical", [0, 0, 1 << 63]);
    tell("one pcid, address not canonical", [1, 0, 1 << 63]);
    tell("a pcid of 13 bits", [1, 1 << 12, 0]);
    tell("everything, a pcid of 13 bits", [2, 1 << 12, 0]);
    tell("kind 4", [4, 0, 0]);
    tell("kind of 64 bits", [1 << 32, 0, 0]);
    let cr4 = cpu::read_cr4();
    cpu::write_cr4(cr4 | PCIDE);
    tell("one pcid, 4095, with pcids", [1, 4095, 0]);
    cpu::write_cr4(cr4);
}

/// Descriptors, the IDT and the TSS are read as a supervisor, whoever runs (5.6.1): in user pages SMAP refuses that, and
/// AC, which lets explicit accesses through, does not help.
fn implicit() {
    // A GDT of which the runtime's part is in a supervisor page, and FIRST_FREE in a user page.
    let tables = (&raw mut TABLES) as u64;
    let offset = 4096 - u64::from(FIRST_FREE);
    // SAFETY: inside the two pages.
    unsafe {
        core::ptr::copy_nonoverlapping(
            segments::gdt_base() as *const u8,
            (tables + offset) as *mut u8,
            256,
        );
        // Not accessed yet: loading it writes.
        ((tables + 4096) as *mut u64).write_volatile(0x00CF_9200_0000_FFFF);
    }
    let old = cpu::read_cr4();
    for (what, page, smap) in [
        ("supervisor page", PRESENT | WRITABLE, true),
        ("user page, no smap", FULL, false),
        ("user page, smap", FULL, true),
        ("read-only page", PRESENT, false),
    ] {
        for ac in [0u64, 1 << 18] {
            let base = window::map(20, tables, PRESENT | WRITABLE) + offset;
            window::map(21, tables + 4096, page);
            // SAFETY: as above.
            unsafe { ((tables + 4096) as *mut u64).write_volatile(0x00CF_9200_0000_FFFF) }
            cpu::write_cr4(if smap { old | cr4::SMAP } else { old });
            let arguments = [base, ac];
            let ended = catch(load_segment, &raw const arguments as u64);
            cpu::write_cr4(old);
            segments::load();
            print!("descriptor in a {what}, ac {}: ", ac >> 18);
            print_fault(&ended);
            if let Err(fault) = ended {
                print!(
                    " cr2 {:+}",
                    fault.cr2.wrapping_sub(base + u64::from(FIRST_FREE)) as i64 & !7
                );
            }
            println!();
        }
    }
    // The IDT: vector 0x81 and above in the page in question.
    let offset = 4096 - 16 * 0x81;
    // SAFETY: inside the two pages.
    unsafe {
        core::ptr::copy_nonoverlapping(
            interrupts::table() as *const u8,
            (tables + offset) as *mut u8,
            4096,
        );
    }
    for (what, page, smap) in [
        ("supervisor page", PRESENT | WRITABLE, false),
        ("user page, no smap", FULL, false),
        ("user page, smap", FULL, true),
    ] {
        let base = window::map(20, tables, PRESENT | WRITABLE) + offset;
        window::map(21, tables + 4096, page);
        cpu::write_cr4(if smap { old | cr4::SMAP } else { old });
        let ended = catch(interrupt, base);
        cpu::write_cr4(old);
        interrupts::load();
        print!("idt entry in a {what}: ");
        print_fault(&ended);
        println!();
    }
}

unsafe extern "C" fn load_segment(arguments: u64) -> u64 {
    // SAFETY: the caller's two words; the table has the segments in use.
    unsafe {
        let [base, ac] = *(arguments as *const [u64; 2]);
        let pointer = TablePointer { limit: 255, base };
        asm!(
            "lgdt [{}]", "pushfq", "or [rsp], {}", "popfq", "mov es, {:x}",
            in(reg) &pointer, in(reg) ac, in(reg) FIRST_FREE
        );
    }
    0
}

unsafe extern "C" fn interrupt(base: u64) -> u64 {
    // SAFETY: the table has all vectors.
    unsafe {
        let pointer = TablePointer { limit: 4095, base };
        asm!("lidt [{}]", "pushfq", "or qword ptr [rsp], 0x40000", "popfq", "int 0x81", in(reg) &pointer);
    }
    0
}
