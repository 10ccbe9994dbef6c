//! What else a repeated string instruction may meet.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use runtime::cpu::{self, msr};
use runtime::{interrupts, print, println, report};

use crate::run::{self, Registers, run};

const TRAP: u64 = 1 << 8;
const DIRECTION: u64 = 1 << 10;
const NON_CANONICAL: u64 = 0x8000_0000_0000;
const UPPER_HALF: u64 = 0xFFFF_FFFF_0000_0000;

const REP_MOVSB: &[u8] = &[0xF3, 0xA4];
const REP_STOSB: &[u8] = &[0xF3, 0xAA];
const REPE_CMPSB: &[u8] = &[0xF3, 0xA6];
const REPNE_SCASB: &[u8] = &[0xF2, 0xAE];

#[repr(C, align(64))]
struct Bytes([u8; 64]);

static mut LEFT: Bytes = Bytes([0; 64]);
static mut RIGHT: Bytes = Bytes([0; 64]);

fn left() -> *mut u8 {
    (&raw mut LEFT).cast()
}

fn right() -> *mut u8 {
    (&raw mut RIGHT).cast()
}

fn fill() {
    for index in 0..64 {
        // SAFETY: inside both.
        unsafe {
            left().add(index).write_volatile(index as u8 + 1);
            right().add(index).write_volatile(0);
        }
    }
}

/// How many bytes of the right side are the left side's, from its beginning.
fn copied() -> usize {
    // SAFETY: inside both.
    (0..64)
        .take_while(|&index| unsafe {
            right().add(index).read_volatile() == left().add(index).read_volatile()
        })
        .count()
}

fn start(count: u64) -> Registers {
    fill();
    Registers {
        rcx: count,
        rsi: left() as u64,
        rdi: right() as u64,
        rflags: 2,
        ..Registers::default()
    }
}

/// Prints the registers as distances from where they began, or the exception.
fn describe(what: &str, code: &[u8], begin: &Registers) {
    print!("{what}: ");
    match run(code, begin) {
        Ok(end) => println!(
            "rcx {:#x}, rsi {:+}, rdi {:+}, copied {}",
            end.rcx,
            end.rsi.wrapping_sub(begin.rsi) as i64,
            end.rdi.wrapping_sub(begin.rdi) as i64,
            copied()
        ),
        Err(fault) => {
            report::print_name(&fault);
            println!(
                ", {} left, rsi {:+}, rdi {:+}",
                fault.frame.rcx,
                fault.frame.rsi.wrapping_sub(begin.rsi) as i64,
                fault.frame.rdi.wrapping_sub(begin.rdi) as i64
            );
        }
    }
}

pub fn show() {
    address_sizes();
    operands();
    conditions();
    segments();
    single_steps();
    non_canonical();
}

/// With 32-bit addresses ECX counts, and what is written has its upper half cleared.
fn address_sizes() {
    describe("rep movsb of nothing", REP_MOVSB, &start(0));
    const A32_REP_MOVSB: &[u8] = &[0x67, 0xF3, 0xA4];
    let mut begin = start(UPPER_HALF | 3);
    describe(
        "rep movsb, 32-bit addresses, rcx with an upper half",
        A32_REP_MOVSB,
        &{
            begin.rflags = 2;
            begin
        },
    );
    begin = start(3);
    begin.rsi |= UPPER_HALF;
    begin.rdi |= UPPER_HALF;
    print!("rep movsb, 32-bit addresses, pointers with an upper half: ");
    match run(A32_REP_MOVSB, &begin) {
        Ok(end) => println!(
            "rsi {}, rdi {}, copied {}",
            end.rsi.wrapping_sub(left() as u64) as i64,
            end.rdi.wrapping_sub(right() as u64) as i64,
            copied()
        ),
        Err(fault) => {
            report::print_name(&fault);
            println!();
        }
    }
    let mut begin = start(3);
    begin.rsi += 10;
    begin.rdi += 10;
    begin.rflags |= DIRECTION;
    describe("rep movsb down", REP_MOVSB, &begin);
}

fn operands() {
    let mut begin = start(5);
    begin.rax = 0x1122_3344_5566_7788;
    for (what, code) in [
        ("lodsb", &[0xAC][..]),
        ("lodsw", &[0x66, 0xAD]),
        ("lodsd", &[0xAD]),
        ("lodsq", &[0x48, 0xAD]),
    ] {
        if let Ok(end) = run(code, &begin) {
            println!(
                "{what}: rax {:#x}, rsi {:+}, rcx {}",
                end.rax,
                (end.rsi - begin.rsi) as i64,
                end.rcx
            );
        }
    }
}

/// Where REPE and REPNE end, and with which flags.
fn conditions() {
    const FLAGS: u64 = 0x8D5;
    let show = |what: &str, code: &[u8], begin: &Registers| match run(code, begin) {
        Ok(end) => println!(
            "{what}: {} left, rsi {:+}, rdi {:+}, flags {:#x}",
            end.rcx,
            (end.rsi - begin.rsi) as i64,
            (end.rdi - begin.rdi) as i64,
            end.rflags & FLAGS
        ),
        Err(fault) => println!("{what}: vector {}", fault.frame.vector),
    };
    let equal = || {
        let begin = start(20);
        for index in 0..64 {
            // SAFETY: inside both.
            unsafe { right().add(index).write_volatile(index as u8 + 1) }
        }
        begin
    };
    let differ_at = |index: usize, value: u8| {
        let begin = equal();
        // SAFETY: inside.
        unsafe { right().add(index).write_volatile(value) }
        begin
    };
    show("repe cmpsb, all equal", REPE_CMPSB, &equal());
    show(
        "repe cmpsb, the eighth is greater",
        REPE_CMPSB,
        &differ_at(7, 0xF0),
    );
    show(
        "repe cmpsb, the last is smaller",
        REPE_CMPSB,
        &differ_at(19, 1),
    );
    show("repne cmpsb, the first is equal", &[0xF2, 0xA6], &equal());
    let mut begin = equal();
    begin.rcx = 0;
    begin.rflags |= 0x891;
    show("repe cmpsb of nothing keeps the flags", REPE_CMPSB, &begin);
    let mut begin = equal();
    begin.rax = 9;
    show("repne scasb, found", REPNE_SCASB, &begin);
    begin.rax = 0x80;
    show("repne scasb, not found", REPNE_SCASB, &begin);
    begin.rax = 1;
    show("repe scasb, the second differs", &[0xF3, 0xAE], &begin);
    // F2 before an instruction that compares nothing repeats it all the same.
    let begin = start(4);
    describe("repne movsb", &[0xF2, 0xA4], &begin);
    describe("rep stosb", REP_STOSB, &begin);
}

/// A prefix moves the source, never the destination.
fn segments() {
    cpu::write_msr(msr::FS_BASE, 0x10);
    cpu::write_msr(msr::GS_BASE, 0x20);
    let first = |what: &str, code: &[u8]| {
        let begin = start(1);
        match run(code, &begin) {
            // SAFETY: inside.
            Ok(end) => println!("{what}: al {:#x}, copied {:#x}", end.rax, unsafe {
                right().read_volatile()
            }),
            Err(fault) => println!("{what}: vector {}", fault.frame.vector),
        }
    };
    first("lodsb fs", &[0x64, 0xAC]);
    first("lodsb gs", &[0x65, 0xAC]);
    first("movsb fs", &[0x64, 0xA4]);
    first("stosb with a prefix for gs", &[0x65, 0xAA]);
    cpu::write_msr(msr::FS_BASE, 0);
    cpu::write_msr(msr::GS_BASE, 0);
}

/// Each repetition is a step (SDM vol. 3B 19.3.1.4).
fn single_steps() {
    static TRAPS: AtomicU64 = AtomicU64::new(0);
    static INSIDE: AtomicU64 = AtomicU64::new(0);
    interrupts::set_handler(1, |frame| {
        TRAPS.fetch_add(1, Relaxed);
        if frame.rip == run::address() {
            INSIDE.fetch_add(1, Relaxed);
        } else {
            frame.rflags &= !TRAP;
        }
        cpu::write_dr6(0xFFFF_0FF0);
    });
    let mut begin = start(5);
    begin.rflags |= TRAP;
    // The RET behind POPF is a step as well, of which the trap says the instruction's address.
    match run(REP_MOVSB, &begin) {
        Ok(end) => println!(
            "rep movsb of 5, single steps: {} with more to do, {} in all, {} left, copied {}",
            INSIDE.load(Relaxed) - 1,
            TRAPS.load(Relaxed) - 1,
            end.rcx,
            copied()
        ),
        Err(fault) => println!("single steps: vector {}", fault.frame.vector),
    }
    interrupts::clear_handler(1);
}

fn non_canonical() {
    let mut begin = start(4);
    begin.rsi = NON_CANONICAL;
    describe("rep movsb from a non-canonical address", REP_MOVSB, &begin);
    let mut begin = start(4);
    begin.rdi = NON_CANONICAL;
    describe("rep stosb to a non-canonical address", REP_STOSB, &begin);
    let mut begin = start(0);
    begin.rsi = NON_CANONICAL;
    begin.rdi = NON_CANONICAL;
    describe("rep movsb of nothing there", REP_MOVSB, &begin);
}
