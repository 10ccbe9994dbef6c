//! The sensitive instructions that are not privileged: the ones that tell, or use, what belongs to
//! the machine without trapping (Robin and Irvine, "Analysis of the Intel Pentium's ability to
//! support a secure virtual machine monitor", USENIX Security 2000, whose seventeen these are).
//!
//! The program gives the machine unusual values: tables at their own places with their own limits,
//! a task register and an LDT that no host has, flags that differ from ring to ring. Each
//! instruction must then show these, in ring 0 and in ring 3, with UMIP and without.
#![no_std]
#![no_main]

mod flags;
mod pieces;
mod transfers;

use pieces::Code;
use runtime::cpu::{self, cr4};
use runtime::interrupts::{self, Fault, catch};
use runtime::ring3::{self, Start};
use runtime::segments::{self, FIRST_FREE, TablePointer, set_descriptor};
use runtime::{print, println, report};

runtime::entry!(sensitive);

pub const LDT: u16 = FIRST_FREE; // two slots
pub const TASK: u16 = FIRST_FREE + 0x10; // two slots
/// The LDT's entries.
pub const LOCAL_DATA: u16 = 8 | 4 | 3;
pub const LOCAL_CODE: u16 = 16 | 4 | 3;
pub const LOCAL_KERNEL_DATA: u16 = 24 | 4;

/// The last entry of the larger GDT; the runtime's is shorter.
const FAR_DATA: u16 = 0x170;
const GDT_LIMIT: u16 = 0x177;
const IDT_LIMIT: u16 = 0xFA7; // 250 gates and a half
const LOCAL_LIMIT: u32 = 0x1234;

#[repr(C, align(4096))]
struct Tables {
    gdt: [u64; 64],
    local: [u64; 4],
    stack: [u64; 256],
    kernel_stack: [u64; 256],
}

static mut TABLES: Tables = Tables {
    gdt: [0; 64],
    local: [0; 4],
    stack: [0; 256],
    kernel_stack: [0; 256],
};

fn sensitive() {
    ring3::open_memory();
    prepare();
    let umip = cpu::cpuid(7, 0).ecx & 1 << 2 != 0;
    for umip in [false, true].into_iter().take(1 + usize::from(umip)) {
        let old = cpu::read_cr4();
        cpu::write_cr4(if umip { old | cr4::UMIP } else { old });
        let name = if umip { "umip" } else { "no umip" };
        for ring in [0, 3] {
            println!("ring {ring}, {name}:");
            tables(ring);
            machine_status(ring);
            registers(ring);
            segment_registers(ring);
            flags::show(ring);
            transfers::show(ring);
        }
        cpu::write_cr4(old);
    }
    // Last what a paravirtual KVM does not emulate in ring 0.
    for ring in [3, 0] {
        println!("ring {ring}, descriptors:");
        descriptors(ring);
    }
    for ring in [3, 0] {
        transfers::to_a_task(ring);
        transfers::interrupts(ring);
    }
    println!("sensitive: done");
}

/// Another GDT, IDT limit, LDT and task register than the runtime's.
fn prepare() {
    let tables = &raw mut TABLES;
    let tss = segments::descriptor(segments::TASK);
    let high = segments::descriptor(segments::TASK + 8);
    // As it was before LTR.
    set_descriptor(TASK, tss & !(2 << 40));
    set_descriptor(TASK + 8, high);
    // SAFETY: one CPU; the new table has the entries of the old, and those in use stay.
    unsafe {
        let [low, high] =
            segments::system_descriptor((&raw const (*tables).local) as u64, 31, 0x82);
        set_descriptor(LDT, low);
        set_descriptor(LDT + 8, high);
        let local = (&raw mut (*tables).local).cast::<u64>();
        let [data, _] = segments::system_descriptor(0, LOCAL_LIMIT, 0xF3);
        local.add(1).write_volatile(data | 1 << 54);
        local.add(2).write_volatile(0x00AF_FB00_0000_FFFF);
        let [kernel, _] = segments::system_descriptor(0, 0xFFF, 0x93);
        local.add(3).write_volatile(kernel | 1 << 54);
        let gdt = (&raw mut (*tables).gdt).cast::<u64>();
        core::ptr::copy_nonoverlapping(segments::gdt_base() as *const u64, gdt, 32);
        let [far, _] = segments::system_descriptor(0, 0xABC, 0xF1);
        gdt.add(usize::from(FAR_DATA / 8))
            .write_volatile(far | 1 << 54);
        let mut idt = TablePointer { limit: 0, base: 0 };
        core::arch::asm!(
            "sidt [{idt}]",
            "mov word ptr [{idt}], {limit:x}",
            "lidt [{idt}]",
            "lgdt [{gdt}]",
            "lldt {ldt:x}",
            "ltr {task:x}",
            idt = in(reg) &mut idt,
            limit = in(reg) IDT_LIMIT,
            gdt = in(reg) &TablePointer { limit: GDT_LIMIT, base: gdt as u64 },
            ldt = in(reg) LDT,
            task = in(reg) TASK,
            options(nostack),
        );
    }
    // SAFETY: an address, no access.
    segments::set_ring0_stack(unsafe { &raw const TABLES.kernel_stack } as u64 + 2048);
}

fn gdt() -> u64 {
    (&raw const TABLES) as u64
}

pub fn user_stack() -> u64 {
    // SAFETY: an address, no access.
    unsafe { (&raw const TABLES.stack) as u64 + 2048 }
}

/// Runs a piece in ring 0 or ring 3.
pub fn run(ring: u64, code: Code, argument: u64) -> Fault {
    run_with(ring, code, 2, argument)
}

/// With these flags.
pub fn run_with(ring: u64, code: Code, rflags: u64, argument: u64) -> Fault {
    if ring == 0 {
        return match catch(code, argument) {
            Err(fault) => fault,
            Ok(_) => unreachable!("every piece ends with UD2"),
        };
    }
    let mut start = Start::new(code as *const () as u64, user_stack(), argument);
    start.rflags = rflags;
    ring3::run(&start)
}

/// The exception, unless the piece came to its end.
pub fn refused(fault: &Fault) -> bool {
    if fault.frame.rip == pieces::finished as *const () as u64 {
        return false;
    }
    report::print_name(fault);
    true
}

/// ` NAME VALUE`, where the value is RAX.
fn show(ring: u64, name: &str, code: Code, argument: u64) {
    print!(" {name} ");
    let fault = run(ring, code, argument);
    if !refused(&fault) {
        print!("{:#x}", fault.frame.rax);
    }
}

/// SGDT and SIDT.
fn tables(ring: u64) {
    print!("  sgdt: limit, base, bytes:");
    table(ring, pieces::sgdt, gdt());
    print!("; sidt:");
    table(ring, pieces::sidt, idt_base());
    println!();
}

fn table(ring: u64, code: Code, base: u64) {
    let fault = run(ring, code, 0);
    print!(" ");
    if !refused(&fault) {
        // RAX: the limit; RDX: the base; RCX: what is behind the ten bytes.
        print!(
            "{:#x} {} {}",
            fault.frame.rax,
            if fault.frame.rdx == base {
                "right"
            } else {
                "wrong"
            },
            if fault.frame.rcx & 0xFFFF_FFFF_FFFF == 0xEEEE_EEEE_EEEE {
                10
            } else {
                0
            }
        );
    }
}

/// Where the runtime's IDT is, by a privileged way: its gates point to the stubs.
fn idt_base() -> u64 {
    let mut pointer = TablePointer { limit: 0, base: 0 };
    // SAFETY: writes ten bytes; ring 0 may always.
    unsafe {
        core::arch::asm!("sidt [{}]", in(reg) &mut pointer, options(nostack, preserves_flags));
        let low = *(pointer.base as *const u64);
        let stub = interrupts::stub_address(0);
        if low & 0xFFFF != stub & 0xFFFF {
            return 0;
        }
    }
    pointer.base
}

/// SMSW: CR0's sixteen lower bits to memory, all to a larger register (SDM vol. 2B SMSW).
fn machine_status(ring: u64) {
    let old = cpu::read_cr0();
    print!("  smsw:");
    // MP and AM as they were, and changed.
    for cr0 in [old | 1 << 18, old & !(1 << 18) & !2] {
        cpu::write_cr0(cr0);
        let names = [
            ("16", pieces::smsw16 as Code, u64::MAX << 16 | cr0 & 0xFFFF),
            ("32", pieces::smsw32, cr0 & 0xFFFF_FFFF),
            ("64", pieces::smsw64, cr0),
            ("m16", pieces::smsw_memory, u64::MAX << 16 | cr0 & 0xFFFF),
        ];
        for (name, code, expected) in names {
            let fault = run(ring, code, 0);
            print!(" {name} ");
            if !refused(&fault) {
                print!(
                    "{}",
                    if fault.frame.rax == expected {
                        "right"
                    } else {
                        "wrong"
                    }
                );
            }
        }
    }
    cpu::write_cr0(old);
    println!();
}

/// SLDT and STR.
fn registers(ring: u64) {
    print!("  sldt:");
    for (name, code) in [
        ("16", pieces::sldt16 as Code),
        ("32", pieces::sldt32),
        ("64", pieces::sldt64),
        ("m16", pieces::sldt_memory),
    ] {
        show(ring, name, code, 0);
    }
    println!();
    print!("  str:");
    for (name, code) in [
        ("16", pieces::str16 as Code),
        ("32", pieces::str32),
        ("64", pieces::str64),
        ("m16", pieces::str_memory),
    ] {
        show(ring, name, code, 0);
    }
    println!();
}

/// LAR, LSL, VERR, VERW.
fn descriptors(ring: u64) {
    for (name, selector) in [
        ("local data", LOCAL_DATA),
        ("local code", LOCAL_CODE),
        ("local ring 0 data", LOCAL_KERNEL_DATA),
        ("the ldt", LDT),
        ("the task", TASK),
        ("in the gdt, not in its old limit", FAR_DATA),
        ("beyond the gdt", GDT_LIMIT + 1),
        ("beyond the ldt", 32 | 4),
    ] {
        print!("  {name}:");
        for (name, code) in [
            ("lar", pieces::lar as Code),
            ("lar16", pieces::lar16),
            ("lsl", pieces::lsl),
            ("lsl16", pieces::lsl16),
        ] {
            let fault = run(ring, code, selector.into());
            print!(" {name} ");
            match fault.frame.rcx {
                // Bits 16 to 19 of LAR's answer are undefined.
                1 if name == "lar" => print!("{:#x}", fault.frame.rax & !0xF_0000),
                1 => print!("{:#x}", fault.frame.rax),
                _ => print!("no"),
            }
        }
        for (name, code) in [("verr", pieces::verr as Code), ("verw", pieces::verw)] {
            print!(" {name} {}", run(ring, code, selector.into()).frame.rcx);
        }
        println!();
    }
}

/// MOV, PUSH and POP of segment registers.
fn segment_registers(ring: u64) {
    let rpl = ring as u16;
    print!("  mov from cs");
    for (name, code) in [
        ("16", pieces::mov_cs16 as Code),
        ("32", pieces::mov_cs32),
        ("64", pieces::mov_cs64),
        ("m16", pieces::mov_cs_memory),
    ] {
        show(ring, name, code, 0);
    }
    print!("; from ss");
    show(ring, "32", pieces::mov_ss32, 0);
    print!("; through fs");
    show(ring, "32", pieces::mov_fs32, LOCAL_DATA.into());
    println!();
    print!("  push and pop of fs:");
    show(ring, "local", pieces::push_pop_fs, LOCAL_DATA.into());
    show(ring, "null", pieces::push_pop_fs, u64::from(rpl));
    show(
        ring,
        "ring 0",
        pieces::push_pop_fs,
        u64::from(LOCAL_KERNEL_DATA),
    );
    show(ring, "beyond", pieces::push_pop_fs, 32 | 4 | 3);
    show(ring, "16 bits", pieces::push_pop_fs16, LOCAL_DATA.into());
    println!();
}
