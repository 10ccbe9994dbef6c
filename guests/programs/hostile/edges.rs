//! Accesses at the end of memory, where half of them go nowhere: an open bus reads as ones and forgets what is written. What
//! follows from the ones is the manual's: reserved bits of page tables (SDM vol. 3A 5.7), of XSAVE's header (vol. 1 13.8.1),
//! descriptors (vol. 3A 3.4.5, 6.5).

use core::arch::naked_asm;

use runtime::interrupts::catch;
use runtime::segments::{self, TablePointer};
use runtime::window::{self, PRESENT, USER, Upper, WRITABLE};
use runtime::{cpu, println};

use crate::{code, fill, has_bus, load, load_long, run, show, store, store_long};

/// Where memory ends.
const END: u64 = 256 << 20;

pub fn edges() {
    let mut kept = [0; 1024];
    for (at, byte) in (END - 1024..).zip(&mut kept) {
        *byte = load(at);
    }
    fill(END - 1024, 0x11, 1024);
    loads();
    stores();
    strings();
    wide();
    code_at_the_end();
    tables();
    store(END - 1024, &kept);
}

/// Two accesses of `[RDI]`, of every width there is among general registers.
macro_rules! accesses {
    ($($name:ident: $($line:literal),*;)*) => {
        $(#[unsafe(naked)]
        unsafe extern "C" fn $name(address: u64) -> u64 {
            naked_asm!("xor eax, eax", $($line,)* "ret")
        })*
    };
}

accesses! {
    load_byte: "mov al, [rdi]";
    load_word: "mov ax, [rdi]";
    load_dword: "mov eax, [rdi]";
    load_qword: "mov rax, [rdi]";
    store_qword: "mov rax, 0x2726252423222120", "mov [rdi], rax";
    add_qword: "mov rax, 0x0101010101010101", "add [rdi], rax";
    exchange: "mov eax, 0x33333333", "xchg [rdi], eax";
    pop: "mov rdx, rsp", "mov rsp, rdi", "pop rax", "mov rsp, rdx";
    push: "mov rdx, rsp", "lea rsp, [rdi + 8]", "push 0x44", "mov rsp, rdx";
    compare_exchange: "mov eax, 0x11111111", "mov ecx, 0x55555555", "lock cmpxchg [rdi], ecx";
    return_address: "mov rdx, rsp", "lea rsp, [rdi + 8]", "call 2f", "jmp 3f", "2: ret", "3: mov rsp, rdx";
}

fn loads() {
    for distance in [8, 4, 1, 0] {
        let at = END - distance;
        for (what, body) in [
            ("1 byte", load_byte as unsafe extern "C" fn(u64) -> u64),
            ("2 bytes", load_word),
            ("4 bytes", load_dword),
            ("8 bytes", load_qword),
            ("a word of the stack", pop),
        ] {
            show(
                format_args!("{what}, {distance} before the end"),
                catch(body, at),
                0,
            );
        }
    }
}

/// What the last bytes are after an access.
fn stores() {
    for (what, body) in [
        ("store", store_qword as unsafe extern "C" fn(u64) -> u64),
        ("add", add_qword),
        ("exchange", exchange),
        ("locked compare and exchange", compare_exchange),
        ("push", push),
    ] {
        for distance in [8, 3, 0] {
            fill(END - 16, 0x11, 16);
            let ended = catch(body, END - distance);
            let before = u8::from((9..=16).all(|back| load(END - back) == 0x11));
            let last = (1..=8)
                .rev()
                .fold(0, |value, back| value << 8 | u64::from(load(END - back)));
            show(
                format_args!(
                    "{what}, {distance} before the end, leaves {last:#018x}, the others {before}"
                ),
                ended,
                0,
            );
        }
    }
    show(
        "a return address where there is no memory",
        catch(return_address, END),
        0,
    );
    fill(END - 16, 0x11, 16);
}

fn strings() {
    #[unsafe(naked)]
    unsafe extern "C" fn copy(pointers: u64) -> u64 {
        naked_asm!(
            "mov rsi, [rdi]",
            "mov rcx, [rdi + 16]",
            "mov rdi, [rdi + 8]",
            "rep movsb",
            "mov rax, rcx",
            "ret"
        )
    }
    let buffer = code();
    fill(buffer, 0, 64);
    let arguments = [END - 16, buffer, 32];
    let ended = catch(copy, &raw const arguments as u64);
    let [half, rest] =
        [0x11, 0xFF].map(|byte| (0..32).filter(|at| load(buffer + at) == byte).count());
    show(
        format_args!("rep movsb out over the end, {half} {rest}"),
        ended,
        0,
    );
    fill(buffer, 0x66, 64);
    let arguments = [buffer, END - 16, 32];
    let ended = catch(copy, &raw const arguments as u64);
    let there = (END - 32..END).filter(|&at| load(at) == 0x66).count();
    show(format_args!("rep movsb in over the end, {there}"), ended, 0);
    fill(END - 32, 0x11, 32);
}

/// FXSAVE and XSAVE, and what they saved where there is no memory.
fn wide() {
    #[unsafe(naked)]
    unsafe extern "C" fn save_and_restore(address: u64) -> u64 {
        naked_asm!(
            "fxsave64 [rdi]",
            "fxrstor64 [rdi]",
            "mov eax, [rdi + 28]",
            "ret"
        )
    }
    #[unsafe(naked)]
    unsafe extern "C" fn vectors(address: u64) -> u64 {
        naked_asm!(
            "movdqu xmm0, [rdi]",
            "movdqu [rdi - 64], xmm0",
            "movdqu [rdi], xmm0",
            "pxor xmm0, xmm0",
            "mov rax, [rdi - 56]",
            "ret"
        )
    }
    #[unsafe(naked)]
    unsafe extern "C" fn xsave(address: u64) -> u64 {
        naked_asm!(
            "mov eax, 3",
            "xor edx, edx",
            "xsave64 [rdi]",
            "xrstor64 [rdi]",
            "ret"
        )
    }
    show(
        "fxsave, 256 before the end",
        catch(save_and_restore, END - 256),
        0,
    );
    fill(END - 1024, 0x11, 1024);
    show("16 bytes, 8 before the end", catch(vectors, END - 8), 0);
    fill(END - 1024, 0x11, 1024);
    // The header, which would say what was saved, is lost: XRSTOR finds reserved bits in it.
    let old = cpu::read_cr4();
    cpu::write_cr4(old | 1 << 18);
    let fault = catch(xsave, END - 512);
    match fault {
        Ok(value) => println!("xsave, its header behind the end: {value:#x}"),
        Err(fault) => println!(
            "xsave, its header behind the end: vector {}",
            fault.frame.vector
        ),
    }
    cpu::write_cr4(old);
    fill(END - 1024, 0x11, 1024);
}

/// Code that runs out of memory.
fn code_at_the_end() {
    if !has_bus() {
        return;
    }
    fill(END - 16, 0x90, 16);
    show("running off the end of memory", run(END - 16), END);
    store(END - 3, &[0xB8, 0x12, 0x34]);
    show("an instruction across the end of memory", run(END - 3), END);
    fill(END - 16, 0x11, 16);
}

/// Page tables and descriptors where there is no memory.
fn tables() {
    let address = window::BASE + 4096;
    window::map(1, code(), PRESENT | WRITABLE);
    // The same page table in the last page of memory, then behind it.
    let directory = directory_entry();
    let old = load_long(directory);
    let last = END - 4096;
    let mut kept = [0; 8];
    for (at, byte) in (last + 8..).zip(&mut kept) {
        *byte = load(at);
    }
    store(last + 8, &(code() | PRESENT | WRITABLE).to_le_bytes());
    store(code(), &[0x5A]);
    for (what, table) in [
        ("in the last page", last),
        ("behind the end", END),
        ("in the local APIC", 0xFEE0_0000),
    ] {
        store_long(directory, table | PRESENT | WRITABLE | USER);
        cpu::write_cr3(cpu::read_cr3());
        let ended = catch(load_byte, address);
        if what == "in the local APIC" {
            // What is there is read as a page table in some way, or not; it must not matter.
            println!("a page table {what}: it ended");
        } else {
            show(format_args!("a page table {what}"), ended, address);
        }
    }
    store_long(directory, old);
    store(last + 8, &kept);
    window::set_upper(Upper::Directory, PRESENT | WRITABLE | USER);

    // The descriptor table's first slots are the last ones of memory.
    #[unsafe(naked)]
    unsafe extern "C" fn load_gs(selector: u64) -> u64 {
        naked_asm!("mov gs, edi", "mov eax, gs", "ret")
    }
    let table = END - 128;
    for slot in 0..16 {
        store(
            table + slot * 8,
            &segments::descriptor(slot as u16 * 8).to_le_bytes(),
        );
    }
    let pointer = TablePointer {
        limit: 255,
        base: table,
    };
    // SAFETY: the segments that are in use are the same in both tables.
    unsafe { core::arch::asm!("lgdt [{}]", in(reg) &pointer, options(nostack)) }
    // All ones: conforming code that may be read, present, of level 3.
    show("a descriptor behind the end", catch(load_gs, 16 * 8), 0);
    show("a descriptor behind the table", catch(load_gs, 32 * 8), 0);
    show(
        "a descriptor before the end",
        catch(load_gs, u64::from(segments::KERNEL_DATA)),
        0,
    );
    segments::load();
}

/// Where the window's page directory has the entry of its page table.
fn directory_entry() -> u64 {
    const ADDRESS: u64 = 0x000F_FFFF_FFFF_F000;
    let root = cpu::read_cr3() & ADDRESS;
    let pointers = load_long(root + 8) & ADDRESS;
    load_long(pointers) & ADDRESS
}
