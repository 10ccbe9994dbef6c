//! Code that writes over itself: the next instruction is the new one (SDM vol. 3A 10.1.3, 13.6). By another linear address too,
//! as a host CPU does: there the manual wants a serializing instruction in between.

use core::arch::{global_asm, naked_asm};

use runtime::interrupts::catch;
use runtime::window::{self, PRESENT, WRITABLE};
use runtime::{cpu, println, time};

use crate::{call, code, constant, fill, run, store};

pub fn rewriting() {
    own_immediate();
    own_opcode();
    string_over_itself();
    across_pages();
    next_in_a_loop();
    data_beside_code();
    stack_beside_code();
}

fn timed(what: &str, count: u64, work: impl FnOnce() -> u64) {
    let start = cpu::read_tsc();
    let wrong = work();
    let ticks = cpu::read_tsc() - start;
    println!("{what}, {count} times: {wrong} wrong");
    let each = time::nanoseconds(ticks, &time::tsc_frequency()) / count;
    println!("note: {what}: {each} ns each");
}

/// ADD of an instruction's own immediate to itself: it doubles each time.
fn own_immediate() {
    // add byte ptr [rip - 1], 1; mov al, [rip - 7]; ret
    let instruction = [
        0x80, 0x05, 0xFF, 0xFF, 0xFF, 0xFF, 1, 0x8A, 0x05, 0xF9, 0xFF, 0xFF, 0xFF, 0xC3,
    ];
    timed(
        "an instruction that doubles its own immediate",
        2000,
        || {
            let mut wrong = 0;
            for round in 0..250 {
                let at = code() + round % 64;
                store(at, &instruction);
                let mut expected = 1u8;
                for _ in 0..8 {
                    expected = expected.wrapping_add(expected);
                    wrong += u64::from(run(at).unwrap_or(1) as u8 != expected);
                }
            }
            wrong
        },
    );
}

/// MOV over its own opcode: it is done, and the next time it is another instruction.
fn own_opcode() {
    // mov byte ptr [rip - 7], 0xF6; mov eax, 5; ret. Opcode F6 /0 is TEST, which changes nothing.
    let instruction = [
        0xC6, 0x05, 0xF9, 0xFF, 0xFF, 0xFF, 0xF6, 0xB8, 5, 0, 0, 0, 0xC3,
    ];
    timed("an instruction that makes itself another", 1000, || {
        let mut wrong = 0;
        for _ in 0..1000 {
            store(code(), &instruction);
            wrong += u64::from(call(code()) != 5);
            wrong += u64::from(crate::load(code()) != 0xF6);
            wrong += u64::from(call(code()) != 5);
        }
        wrong
    });
}

/// REP STOSB writes NOPs over itself and what is around it, which are NOPs already: how far it comes before the
/// processor sees that it is gone is the processor's choice.
fn string_over_itself() {
    const AT: u64 = 256;
    timed("rep stosb over itself", 1000, || {
        let mut wrong = 0;
        for round in 0..1000 {
            fill(code() + AT - 8, 0x90, 48);
            store(code() + AT, &[0xF3, 0xAA]);
            store(code() + AT + 40, &[0xC3]);
            let arguments = [code() + AT, code() + AT - round % 8, 16];
            wrong += u64::from(catch(stosb, &raw const arguments as u64).is_err());
            wrong += u64::from(crate::load(code() + AT) != 0x90);
        }
        wrong
    });
}

/// Jumps to `[0]` with RDI = `[8]`, RCX = `[16]`, AL a NOP.
#[unsafe(naked)]
unsafe extern "C" fn stosb(arguments: u64) -> u64 {
    naked_asm!(
        "mov rdx, [rdi]",
        "mov rcx, [rdi + 16]",
        "mov rdi, [rdi + 8]",
        "mov eax, 0x90",
        "jmp rdx",
    )
}

/// An instruction across two pages is rewritten now on this side, now on that, through other addresses.
fn across_pages() {
    let executed = window::map(1, code(), PRESENT);
    window::map(2, code() + 4096, PRESENT);
    let written = window::map(4, code() + 4096, PRESENT | WRITABLE);
    window::map(5, code(), PRESENT | WRITABLE);
    timed(
        "an instruction across two pages, one of them written",
        2000,
        || {
            let mut wrong = 0;
            let mut bytes = constant(0);
            store(code() + 4096 - 2, &bytes);
            for round in 0..2000u32 {
                let byte = 1 + (round % 4) as usize;
                bytes[byte] = round as u8;
                // The first page is mapped behind the second one there.
                let at = if byte < 2 {
                    written + 2 * 4096 - 2 + byte as u64
                } else {
                    written + byte as u64 - 2
                };
                store(at, &bytes[byte..=byte]);
                let [_, a, b, c, d, _] = bytes;
                let expected = u32::from_le_bytes([a, b, c, d]);
                wrong += u64::from(call(executed + 4096 - 2) != expected);
            }
            wrong
        },
    );
}

/// A loop whose every turn changes the next instruction.
fn next_in_a_loop() {
    #[unsafe(naked)]
    unsafe extern "C" fn body(turns: u64) -> u64 {
        naked_asm!(
            "xor eax, eax",
            "mov ecx, edi",
            "2: mov dword ptr [rip + 3f + 1], ecx",
            "jmp 3f",
            "3: .byte 0x05, 0, 0, 0, 0", // add eax, ecx as it was written
            "dec ecx",
            "jnz 2b",
            "ret"
        )
    }
    timed("a loop that changes its next instruction", 5000, || {
        u64::from(catch(body, 5000).unwrap_or(0) != 5000 * 5001 / 2)
    });
}

global_asm!(
    r#"
    .pushsection .data
    .balign 64
    // Adds 1 to a counter that lies right behind its code: in the same 32 bytes.
    hostile_counter:
        inc dword ptr [rip + 2f]
        mov eax, [rip + 2f]
        ret
    2:  .long 0
    .popsection
    "#
);

unsafe extern "C" {
    static hostile_counter: u8;
}

fn data_beside_code() {
    let counter = (&raw const hostile_counter) as u64;
    timed("a counter beside its code", 5000, || {
        let first = u64::from(call(counter));
        (1..5000)
            .map(|round| u64::from(u64::from(call(counter)) != first + round))
            .sum()
    });
}

/// The stack lies on the page of the code, right below it.
fn stack_beside_code() {
    #[unsafe(naked)]
    unsafe extern "C" fn body(code: u64) -> u64 {
        naked_asm!(
            "mov rdx, rsp",
            "mov rsp, rdi",
            "call rdi",
            "mov rsp, rdx",
            "ret"
        )
    }
    let at = code() + 512;
    // push 7; pop rax; ret
    store(at, &[0x6A, 7, 0x58, 0xC3]);
    timed("a stack beside its code", 5000, || {
        (0..5000)
            .map(|_| u64::from(catch(body, at).unwrap_or(0) != 7))
            .sum()
    });
}
