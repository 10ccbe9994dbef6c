//! Cross-modifying code (SDM vol. 3A 10.1.3): each processor writes the code that the other executes, says so by a flag,
//! and the other executes a serializing instruction before it goes there. Both are in long mode, on the same tables.

use core::arch::{asm, global_asm};
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use runtime::{cpu, println};

use crate::{INIT, PAGE, START_UP, a_while, send, until};

/// Times that each writes the other's code.
const ROUNDS: u32 = 100;
/// Times that it is executed each time: often enough to be worth a translation.
const CALLS: u32 = 64;

/// For each processor a page of code.
#[repr(C, align(4096))]
struct Pages([[u8; 4096]; 2]);

static mut CODE: Pages = Pages([[0; 4096]; 2]);
/// The round whose code each may execute.
static WRITTEN: [AtomicU32; 2] = [AtomicU32::new(0), AtomicU32::new(0)];
/// Calls in which each found old code.
static WRONG: [AtomicU32; 2] = [AtomicU32::new(0), AtomicU32::new(0)];
static DONE: [AtomicU32; 2] = [AtomicU32::new(0), AtomicU32::new(0)];

#[repr(C, align(16))]
struct Stack([u8; 32 << 10]);

static mut STACK: Stack = Stack([0; 32 << 10]);

/// What the second processor needs for long mode, where the code below finds it in its page.
#[repr(C)]
struct Start {
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    stack: u64,
    entry: u64,
}

const START: u64 = 0xF80;

unsafe extern "C" {
    static crossing_begin: u8;
    static crossing_end: u8;
}

pub(crate) fn crossing() {
    for processor in 0..2 {
        // mov eax, 0; ret
        for (index, byte) in [0xB8, 0, 0, 0, 0, 0xC3].into_iter().enumerate() {
            // SAFETY: inside its page; the other processor does not run yet.
            unsafe { code(processor).add(index).write_volatile(byte) }
        }
    }
    start();
    take_part(0);
    until(|| DONE[1].load(Ordering::Acquire) != 0);
    let of = |all: &[AtomicU32; 2]| [0, 1].map(|processor| all[processor].load(Ordering::Acquire));
    let (done, wrong) = (of(&DONE), of(&WRONG));
    println!(
        "each writes what the other executes: {} and {} rounds, wrong {} and {}",
        done[0], done[1], wrong[0], wrong[1]
    );
    send(INIT, 1);
}

/// Its code begins so that the constant is aligned, and stored at once.
fn code(processor: usize) -> *mut u8 {
    // SAFETY: a place inside of what is there.
    unsafe { (&raw mut CODE).cast::<u8>().add(processor * 4096 + 3) }
}

/// One processor's part, in turns with the other's. It ends early if the other does not answer.
fn take_part(own: usize) {
    let other = 1 - own;
    for round in 1..=ROUNDS {
        if own == 0 {
            write(other, round);
        }
        if !until(|| WRITTEN[own].load(Ordering::Acquire) == round) {
            return;
        }
        // It serializes.
        cpu::cpuid(0, 0);
        for _ in 0..CALLS {
            // SAFETY: it is a function that changes EAX only.
            let found =
                unsafe { core::mem::transmute::<*mut u8, extern "C" fn() -> u32>(code(own))() };
            if found != round {
                WRONG[own].fetch_add(1, Ordering::Relaxed);
            }
        }
        if own == 1 {
            write(other, round);
        }
        DONE[own].store(round, Ordering::Release);
    }
}

fn write(processor: usize, round: u32) {
    // SAFETY: the constant in the other's code, which it does not execute until the flag says so.
    unsafe { code(processor).add(1).cast::<u32>().write_volatile(round) }
    WRITTEN[processor].store(round, Ordering::Release);
}

extern "C" fn second() -> ! {
    take_part(1);
    loop {
        // SAFETY: nothing wakes it but INIT.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}

/// Starts the second processor in long mode.
fn start() {
    let begin = &raw const crossing_begin;
    let size = (&raw const crossing_end) as usize - begin as usize;
    let (cr0, cr3, cr4): (u64, u64, u64);
    // SAFETY: they are read.
    unsafe {
        asm!("mov {}, cr0", "mov {}, cr3", "mov {}, cr4", out(reg) cr0, out(reg) cr3, out(reg) cr4);
    }
    let start = Start {
        cr0,
        cr3,
        cr4,
        efer: cpu::read_msr(0xC000_0080) & !(1 << 10),
        stack: (&raw const STACK) as u64 + size_of::<Stack>() as u64 - 8,
        entry: second as *const () as u64,
    };
    send(INIT, 1);
    a_while();
    // SAFETY: low memory is not used for anything else, and the second processor waits.
    unsafe {
        ptr::write_bytes(PAGE as *mut u8, 0, 4096);
        ptr::copy_nonoverlapping(begin, PAGE as *mut u8, size);
        ((PAGE + START) as *mut Start).write_volatile(start);
    }
    send(START_UP | (PAGE >> 12) as u32, 1);
}

// The page is at 0x8000.
global_asm!(
    r#"
    .section .text.crossing, "ax"
    .code16
    .global crossing_begin, crossing_end
crossing_begin:
    cli
    mov ax, cs
    mov ds, ax
    mov eax, [0xF80 + 16]
    mov cr4, eax
    mov eax, [0xF80 + 8]
    mov cr3, eax
    mov ecx, 0xC0000080
    mov eax, [0xF80 + 24]
    xor edx, edx
    wrmsr
    mov eax, [0xF80]
    .byte 0x66, 0x0F, 0x01, 0x16            // lgdt, 32 bits of base
    .word crossing_pointer - crossing_begin
    mov cr0, eax
    .byte 0x66, 0xEA                        // jmp far 0x08:
    .long 0x8000 + crossing_long - crossing_begin
    .word 0x08
crossing_pointer:
    .word 23
    .long 0x8000 + crossing_table - crossing_begin
    .balign 8
crossing_table:
    .quad 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF
    .code64
crossing_long:
    mov eax, 0x10
    mov ds, eax
    mov es, eax
    mov ss, eax
    mov rsp, [0x8000 + 0xF80 + 32]
    jmp [0x8000 + 0xF80 + 40]
crossing_end:
    .text
    "#
);
