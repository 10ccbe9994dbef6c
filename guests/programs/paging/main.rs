//! What the page tables permit, and what the CPU notes down in them (SDM vol. 3A 5.5 to 5.10).
#![no_std]
#![no_main]

mod bodies;
mod structures;

use bodies::{fetch, fetch_with_ac, read, read_with_ac, write, write_with_ac};
use runtime::cpu::{self, cr0, cr4, msr};
use runtime::interrupts::{self, catch};
use runtime::ring3::{self, Start};
use runtime::window::{
    self, ACCESSED, DIRTY, GLOBAL, LARGE, NO_EXECUTE, PRESENT, USER, Upper, WRITABLE,
};
use runtime::{print, println};

runtime::entry!(paging);

const RETURN_INSTRUCTION: u8 = 0xC3;
const FINISHED: u8 = 0x30;

#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Two pages to map. Each byte is a RET, so that a call into them comes back.
static mut FIRST: Page = Page([RETURN_INSTRUCTION; 4096]);
static mut SECOND: Page = Page([RETURN_INSTRUCTION; 4096]);
static mut USER_STACK: Page = Page([0; 4096]);

const TARGET: usize = 1;
const USER_CODE: usize = 8;
const USER_STACK_PAGE: usize = 9;

fn paging() {
    window::open();
    interrupts::allow_from_ring3(FINISHED);
    permission_matrix();
    permissions_of_upper_levels();
    accessed_and_dirty();
    page_sizes();
    no_execute_off();
    translations_are_forgotten();
    control_bits_hold_at_once();
    structures::show();
    println!("paging: done");
}

#[derive(Clone, Copy)]
enum Access {
    Read,
    Write,
    Fetch,
}

const ACCESSES: [(Access, char); 3] = [
    (Access::Read, 'r'),
    (Access::Write, 'w'),
    (Access::Fetch, 'x'),
];

/// Whether ring 0 may do it. A page fault must have the right error code and address.
fn supervisor(access: Access, address: u64, ac: bool) -> bool {
    let body = match (access, ac) {
        (Access::Read, false) => read,
        (Access::Read, true) => read_with_ac,
        (Access::Write, false) => write,
        (Access::Write, true) => write_with_ac,
        (Access::Fetch, false) => fetch,
        (Access::Fetch, true) => fetch_with_ac,
    };
    match catch(body, address) {
        Ok(_) => true,
        Err(fault) => {
            check_fault(&fault, access, false, address);
            false
        }
    }
}

/// Whether ring 3 may do it.
fn user(access: Access, address: u64) -> bool {
    let code = window::map_memory(USER_CODE, bodies::user_page(), PRESENT | USER);
    let stack = window::map_memory(
        USER_STACK_PAGE,
        &raw const USER_STACK,
        PRESENT | USER | WRITABLE,
    ) + 4096;
    let offset = match access {
        Access::Read => bodies::USER_READ,
        Access::Write => bodies::USER_WRITE,
        Access::Fetch => bodies::USER_FETCH,
    };
    let fault = ring3::run(&Start::new(code + offset, stack, address));
    if fault.frame.vector == u64::from(FINISHED) {
        return true;
    }
    check_fault(&fault, access, true, address);
    false
}

/// The error code of a page that is present: bit 0, and what was tried.
fn check_fault(fault: &interrupts::Fault, access: Access, user: bool, address: u64) {
    let error = match access {
        Access::Read => 0x01,
        Access::Write => 0x03,
        Access::Fetch => 0x11,
    } | if user { 0x04 } else { 0 };
    let frame = &fault.frame;
    if (frame.vector, frame.error, fault.cr2) != (14, error, address) {
        println!(
            "wrong: vector {} error {:#x} cr2 {:#x} instead of #PF({error:#x}) at {address:#x}",
            frame.vector, frame.error, fault.cr2
        );
    }
}

/// `rwx/rwx`: what ring 0 and ring 3 may do with the page at `address`.
fn print_rights(address: u64, ac: bool) {
    for (access, letter) in ACCESSES {
        print!(
            "{}",
            if supervisor(access, address, ac) {
                letter
            } else {
                '-'
            }
        );
    }
    print!("/");
    for (access, letter) in ACCESSES {
        print!("{}", if user(access, address) { letter } else { '-' });
    }
}

fn permission_matrix() {
    println!("rights of ring 0 / ring 3 by the page's bits (u user, w writable, n no-execute)");
    print!("wp smep smap ac ");
    for bits in 0..8 {
        print!(" {:>7}", page_name(bits));
    }
    println!();
    let (old_cr0, old_cr4) = (cpu::read_cr0(), cpu::read_cr4());
    for setting in 0..16u64 {
        let [wp, smep, smap, ac] = [8, 4, 2, 1].map(|bit| setting & bit != 0);
        print!(
            " {}    {}    {}  {} ",
            u8::from(wp),
            u8::from(smep),
            u8::from(smap),
            u8::from(ac)
        );
        for bits in 0..8 {
            let address = window::map_memory(TARGET, &raw const FIRST, page_flags(bits));
            cpu::write_cr0(if wp { old_cr0 } else { old_cr0 & !cr0::WP });
            cpu::write_cr4(
                old_cr4 | if smep { cr4::SMEP } else { 0 } | if smap { cr4::SMAP } else { 0 },
            );
            print!(" ");
            print_rights(address, ac);
        }
        println!();
        cpu::write_cr0(old_cr0);
        cpu::write_cr4(old_cr4);
    }
}

fn page_flags(bits: u32) -> u64 {
    let flag = |bit: u32, flag: u64| if bits & bit != 0 { flag } else { 0 };
    PRESENT | flag(4, USER) | flag(2, WRITABLE) | flag(1, NO_EXECUTE)
}

fn page_name(bits: u32) -> &'static str {
    ["---", "--n", "-w-", "-wn", "u--", "u-n", "uw-", "uwn"][bits as usize]
}

/// A right that one level withholds is withheld (SDM vol. 3A 5.6).
fn permissions_of_upper_levels() {
    let address = window::map_memory(TARGET, &raw const FIRST, PRESENT | USER | WRITABLE);
    for (name, level) in [
        ("pml4", Upper::Pml4),
        ("pdpt", Upper::DirectoryPointers),
        ("directory", Upper::Directory),
    ] {
        // The user code and stack are below the same entries, so only ring 0 is asked here, and
        // ring 3's side is asked through SMEP and SMAP: does the CPU take the page for a user's?
        let everything = PRESENT | USER | WRITABLE;
        print!("{name}: not writable ");
        window::set_upper(level, everything & !WRITABLE);
        print_supervisor_rights(address);
        print!(", no-execute ");
        window::set_upper(level, everything | NO_EXECUTE);
        print_supervisor_rights(address);
        let old = cpu::read_cr4();
        cpu::write_cr4(old | cr4::SMEP | cr4::SMAP);
        print!(", with smep and smap: not user ");
        window::set_upper(level, everything & !USER);
        print_supervisor_rights(address);
        print!(", user ");
        window::set_upper(level, everything);
        print_supervisor_rights(address);
        cpu::write_cr4(old);
        println!();
    }
}

fn print_supervisor_rights(address: u64) {
    for (access, letter) in ACCESSES {
        print!(
            "{}",
            if supervisor(access, address, false) {
                letter
            } else {
                '-'
            }
        );
    }
}

/// SDM vol. 3A 5.8.
fn accessed_and_dirty() {
    let noted = |what: &str, flags: u64, access: Access| {
        let address = window::map_memory(TARGET, &raw const FIRST, flags);
        let allowed = supervisor(access, address, false);
        let entry = window::entry(TARGET);
        println!(
            "{what}: {}, accessed {}, dirty {}",
            if allowed { "allowed" } else { "refused" },
            u8::from(entry & ACCESSED != 0),
            u8::from(entry & DIRTY != 0)
        );
    };
    noted("read", PRESENT | WRITABLE, Access::Read);
    noted("write", PRESENT | WRITABLE, Access::Write);
    noted("fetch", PRESENT | WRITABLE, Access::Fetch);
    noted(
        "write of an accessed page",
        PRESENT | WRITABLE | ACCESSED,
        Access::Write,
    );
    let old = cpu::read_cr0();
    cpu::write_cr0(old & !cr0::WP);
    noted(
        "write of a read-only page without wp",
        PRESENT,
        Access::Write,
    );
    cpu::write_cr0(old);

    // A write after a read that left the translation in the TLB must still set the dirty bit.
    let address = window::map_memory(TARGET, &raw const FIRST, PRESENT | WRITABLE);
    supervisor(Access::Read, address, false);
    supervisor(Access::Write, address, false);
    println!(
        "read, then write: dirty {}",
        u8::from(window::entry(TARGET) & DIRTY != 0)
    );
    // A write that is refused leaves the dirty bit alone.
    let address = window::map_memory(TARGET, &raw const FIRST, PRESENT);
    supervisor(Access::Write, address, false);
    println!(
        "refused write: dirty {}",
        u8::from(window::entry(TARGET) & DIRTY != 0)
    );
    // What is not present is not touched.
    let address = window::set_entry(TARGET, 0xDEAD_B000 & !PRESENT);
    let refused = catch(read, address).is_err();
    println!(
        "not present: refused {}, entry {:#x}",
        u8::from(refused),
        window::entry(TARGET)
    );
}

/// The same physical byte through pages of 4 KiB, 2 MiB and 1 GiB.
fn page_sizes() {
    let physical = (&raw const SECOND) as u64 + 0x321;
    // SAFETY: the byte is this program's own.
    unsafe { (physical as *mut u8).write_volatile(0x5A) }
    let small = window::map(TARGET, physical, PRESENT) + (physical & 0xFFF);
    println!("4 KiB page: {:#x}", peek(small));
    let large = window::set_large((physical & !0x1F_FFFF) | PRESENT | LARGE | WRITABLE);
    println!(
        "2 MiB page: {:#x}, accessed {}",
        peek(large + (physical & 0x1F_FFFF)),
        large_bit(ACCESSED)
    );
    supervisor(Access::Write, large + (physical & 0x1F_FFFF) + 1, false);
    println!("2 MiB page, written: dirty {}", large_bit(DIRTY));
    window::set_large(0);
    if cpu::cpuid(0x8000_0001, 0).edx & 1 << 26 != 0 {
        let huge = window::set_huge(PRESENT | LARGE);
        println!("1 GiB page: {:#x}", peek(huge + physical));
        window::set_huge(0);
    }
}

fn large_bit(bit: u64) -> u8 {
    u8::from(window::large_entry() & bit != 0)
}

fn peek(address: u64) -> u8 {
    match catch(read, address) {
        Ok(value) => value as u8,
        Err(fault) => {
            println!("wrong: vector {} cr2 {:#x}", fault.frame.vector, fault.cr2);
            0
        }
    }
}

/// Without EFER.NXE bit 63 is reserved, and a fetch is not told apart in the error code.
fn no_execute_off() {
    const NXE: u64 = 1 << 11;
    let address = window::map_memory(TARGET, &raw const FIRST, PRESENT | NO_EXECUTE);
    let missing = window::unmap(TARGET + 1);
    let old = cpu::read_msr(msr::EFER);
    cpu::write_msr(msr::EFER, old & !NXE);
    cpu::write_cr3(cpu::read_cr3());
    let read_reserved = catch(read, address);
    let fetch_missing = catch(fetch, missing);
    cpu::write_msr(msr::EFER, old);
    cpu::write_cr3(cpu::read_cr3());
    for (what, ended) in [
        ("read with bit 63", read_reserved),
        ("fetch, not present", fetch_missing),
    ] {
        match ended {
            Ok(_) => println!("without nxe, {what}: allowed"),
            Err(fault) => println!(
                "without nxe, {what}: vector {} error {:#x}",
                fault.frame.vector, fault.frame.error
            ),
        }
    }
}

/// What CR0.WP, CR4.SMEP and CR4.SMAP take away is gone at once, from a page that was in use too: they decide about each
/// access (SDM vol. 3A 5.6.1), and changes of WP and SMAP invalidate nothing (5.10.4.1).
fn control_bits_hold_at_once() {
    let (old_cr0, old_cr4) = (cpu::read_cr0(), cpu::read_cr4());
    for (what, flags, access, cr0, cr4) in [
        ("wp", PRESENT, Access::Write, cr0::WP, 0),
        ("smep", PRESENT | USER, Access::Fetch, 0, cr4::SMEP),
        ("smap", PRESENT | USER, Access::Read, 0, cr4::SMAP),
    ] {
        let address = window::map_memory(TARGET, &raw const FIRST, flags);
        print!("{what} off, on, off:");
        for on in [false, true, false] {
            cpu::write_cr0(old_cr0 & !cr0::WP | if on { cr0 } else { 0 });
            cpu::write_cr4(old_cr4 | if on { cr4 } else { 0 });
            let allowed = supervisor(access, address, false);
            cpu::write_cr4(old_cr4);
            print!(" {}", if allowed { "allowed" } else { "refused" });
        }
        println!();
    }
    cpu::write_cr0(old_cr0);
}

/// The ways to make the CPU forget a translation (SDM vol. 3A 5.10.4). That it remembers without
/// them is allowed, not required, so it is not asked.
fn translations_are_forgotten() {
    let (first, second) = (&raw const FIRST, &raw const SECOND);
    // SAFETY: both pages are this program's own.
    unsafe {
        (first as *mut u8).write_volatile(1);
        (second as *mut u8).write_volatile(2);
    }
    let remap = |what: &str, flags: u64, forget: fn(u64)| {
        let address = window::map_memory(TARGET, first, PRESENT | flags);
        let before = peek(address);
        window::set_entry_silently(TARGET, second as u64 | PRESENT | flags);
        forget(address);
        println!("remapped, {what}: {before} {}", peek(address));
    };
    remap("invlpg", 0, cpu::invalidate_page);
    remap("cr3", 0, |_| cpu::write_cr3(cpu::read_cr3()));
    let old = cpu::read_cr4();
    cpu::write_cr4(old | cr4::PGE);
    remap("global, invlpg", GLOBAL, cpu::invalidate_page);
    remap("global, cr4.pge off and on", GLOBAL, |_| {
        let cr4 = cpu::read_cr4();
        cpu::write_cr4(cr4 & !cr4::PGE);
        cpu::write_cr4(cr4);
    });
    cpu::write_cr4(old);
    remap("invlpg of another address in the page", 0, |address| {
        cpu::invalidate_page(address + 0xFFF);
    });

    // No invalidation is needed for what was not present.
    let address = window::unmap(TARGET);
    let missing = catch(read, address).is_err();
    window::set_entry_silently(TARGET, second as u64 | PRESENT);
    println!(
        "mapped after a fault: {} {}",
        u8::from(missing),
        peek(address)
    );

    if cpu::cpuid(1, 0).ecx & 1 << 17 != 0 {
        address_spaces(first, second);
    } else {
        println!("note: no pcid");
    }
}

/// Translations carry the PCID they were made under (SDM vol. 3A 5.10.1).
fn address_spaces(first: *const Page, second: *const Page) {
    const PCIDE: u64 = 1 << 17;
    const KEEP: u64 = 1 << 63;
    let (old_cr3, old_cr4) = (cpu::read_cr3(), cpu::read_cr4());
    cpu::write_cr4(old_cr4 | PCIDE);
    let address = window::map_memory(TARGET, first, PRESENT);
    cpu::write_cr3(old_cr3 | 1);
    let in_first = peek(address);
    window::set_entry_silently(TARGET, second as u64 | PRESENT);
    cpu::write_cr3(old_cr3 | 2);
    let in_second = peek(address);
    println!("pcid 1, remapped, pcid 2: {in_first} {in_second}");
    cpu::write_cr3(old_cr3 | 1);
    println!("pcid 1 again, forgotten by the load: {}", peek(address));
    println!(
        "cr3 reads back without bit 63: {}",
        u8::from({
            cpu::write_cr3(old_cr3 | 2 | KEEP);
            cpu::read_cr3() == old_cr3 | 2
        })
    );
    if cpu::cpuid(7, 0).ebx & 1 << 10 != 0 {
        let kinds = [
            ("one address", 0u64),
            ("one pcid", 1),
            ("everything", 2),
            ("everything but global", 3),
        ];
        for (what, kind) in kinds {
            window::map_memory(TARGET, first, PRESENT);
            let before = peek(address);
            window::set_entry_silently(TARGET, second as u64 | PRESENT);
            cpu::invalidate_pcid(kind, 2, address);
            println!("invpcid of {what}: {before} {}", peek(address));
        }
    } else {
        println!("note: no invpcid");
    }
    cpu::write_cr3(old_cr3);
    cpu::write_cr4(old_cr4);
}
