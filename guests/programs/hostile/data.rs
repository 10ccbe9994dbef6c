//! Jumps to what is no code, or not where code begins (SDM vol. 3A 5.6.1 and 5.7: rights and error codes of fetches; an
//! instruction across two pages is refused as a whole, and CR2 tells which page it was: 7.15, vector 14).

use core::arch::{global_asm, naked_asm};

use runtime::interrupts::catch;
use runtime::println;
use runtime::window::{self, NO_EXECUTE, PRESENT, WRITABLE};

use crate::{call, code, constant, fill, has_bus, run, show, store};

/// An address below 3 GiB with neither memory nor a device behind it.
const NOTHING: u64 = 0x8000_0000;

static mut DATA: [u64; 2] = [0xC3_0000_0007_B8, 0];

pub fn jumps() {
    let data = (&raw mut DATA) as u64;
    show("data as code", run(data), 0);
    store(data + 1, &[9]);
    show("data as code, written over", run(data), 0);
    let page = window::map(1, data, PRESENT | WRITABLE | NO_EXECUTE);
    show(
        "data that must not be executed",
        run(page + (data & 0xFFF)),
        page + (data & 0xFFF),
    );

    // mov eax, 0xC32AB090, whose middle is: mov al, 0x2A; ret
    store(code(), &[0xB8, 0x90, 0xB0, 0x2A, 0xC3, 0xC3]);
    let mut wrong = 0;
    for _ in 0..1000 {
        wrong += u32::from(call(code()) != 0xC32A_B090);
        wrong += u32::from(run(code() + 2).unwrap_or(0) != 0x2A);
    }
    println!("into the middle of an instruction, 1000 times: {wrong} wrong");

    off_the_page();
    if !has_bus() {
        return;
    }
    show("nothing there", run(NOTHING + 0x123), NOTHING + 0x123);
    // Whatever these registers are as code; it is not told what, but it must end.
    for (what, address) in [
        ("I/O APIC", 0xFEC0_0000u64),
        ("HPET", 0xFED0_0000),
        ("local APIC", 0xFEE0_0000),
    ] {
        let ended = catch(registers, address);
        println!(
            "{what} as code: it ended {}",
            if ended.is_err() {
                "with an exception"
            } else {
                ""
            }
        );
    }
}

/// Jumps to RDI with all registers pointing to memory that may be written: most registers of devices are zeros, which as code
/// add to what RAX points to.
#[unsafe(naked)]
unsafe extern "C" fn registers(address: u64) -> u64 {
    naked_asm!(
        "lea rax, [rip + hostile_scratch + 2048]",
        "mov rcx, rax",
        "mov rdx, rax",
        "mov rsi, rax",
        "mov rbx, rax",
        "mov rbp, rax",
        "mov r8, rdi",
        "mov rdi, rax",
        "jmp r8",
    )
}

global_asm!(
    ".pushsection .bss",
    ".balign 4096",
    "hostile_scratch: .skip 8192",
    ".popsection"
);

/// Code runs over the end of its page into another, which may not be executed.
fn off_the_page() {
    let first = window::map(1, code(), PRESENT | WRITABLE);
    let second = first + 4096;
    for (what, entry) in [
        ("a page that is not there", 0),
        (
            "a page without the right",
            (code() + 4096) | PRESENT | NO_EXECUTE,
        ),
        ("no memory", NOTHING | PRESENT),
    ] {
        if entry & !0xFFF == NOTHING && !has_bus() {
            continue;
        }
        window::set_entry(2, entry);
        fill(code() + 4096 - 16, 0x90, 16);
        show(format_args!("{what}, run into"), run(second - 8), second);
        store(code() + 4096 - 2, &[0xB8, 0x11]);
        show(
            format_args!("{what}, an instruction across"),
            run(second - 2),
            second,
        );
        show(format_args!("{what}, jumped to"), run(second), second);
    }
    window::map(2, code() + 4096, PRESENT);
    store(code() + 4096, &[0x22, 0x33, 0x44, 0xC3]);
    show("an instruction across, all there", run(second - 2), second);
    store(code(), &constant(1));
}
