//! x87 and SSE in ring 0: when they are refused, and the exceptions they raise.
//!
//! The only program but `bench` with such instructions. What a line says: see `runtime::report`.
#![no_std]
#![no_main]

use runtime::interrupts::catch;
use runtime::report::{self, Body};
use runtime::{bodies, cpu, println};

runtime::entry!(coprocessor);

bodies! {
    fld1: [] "fld1";
    fwait: [] "fwait";
    sse_add: [] "addps xmm0, xmm0";
    x87_divide_by_zero: ["fninit", "push 0x037B", "fldcw [rsp]", "pop rax", "fld1", "fldz", "fdivp"] "fwait";
    sse_divide_by_zero: [
        "push 0x1D80", "ldmxcsr [rsp]", "pop rax",
        "mov eax, 1", "cvtsi2ss xmm1, eax", "xorps xmm0, xmm0"
    ] "divss xmm1, xmm0";
    reset_fpu: ["fninit", "push 0x1F80", "ldmxcsr [rsp]", "pop rax"] "nop";
    movaps: [] "movaps xmm0, [rdi]";
    load_mxcsr: ["push rdi", "pop rax"] "ldmxcsr [rsp - 8]";
}

#[repr(C, align(16))]
struct Aligned([u8; 32]);

static ALIGNED: Aligned = Aligned([0; 32]);

/// SDM vol. 3A 2.5 (CR0.TS, EM, MP) and table 15-1 ff. (SSE).
fn coprocessor() {
    const EM: u64 = 1 << 2;
    let _ = catch(reset_fpu, 0);
    for (flags, body, what) in [
        (cpu::cr0::TS, fld1 as Body, "x87 while cr0.ts"),
        (cpu::cr0::TS, sse_add, "sse while cr0.ts"),
        (cpu::cr0::TS, fwait, "fwait while cr0.ts and cr0.mp"),
        (EM, fld1, "x87 while cr0.em"),
        (EM, sse_add, "sse while cr0.em"),
        (EM, fwait, "fwait while cr0.em"),
    ] {
        // While the flags are on nothing else may happen: not even printing.
        let cr0 = cpu::read_cr0();
        cpu::write_cr0(cr0 | flags);
        let ended = catch(body, 0);
        cpu::write_cr0(cr0);
        report::show(what, ended, body);
    }
    show(
        "x87 division by zero, at the next x87 instruction",
        x87_divide_by_zero,
        0,
    );
    show("sse division by zero", sse_divide_by_zero, 0);
    let _ = catch(reset_fpu, 0);
    show(
        "movaps of an odd address",
        movaps,
        (&raw const ALIGNED) as u64 + 1,
    );
    show("mxcsr: a reserved bit", load_mxcsr, 0x1_0000);
    println!("coprocessor: done");
}

fn show(what: &str, body: Body, argument: u64) {
    report::show(what, catch(body, argument), body);
}
