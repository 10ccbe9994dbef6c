//! x87, MMX, SSE and AVX in ring 0: when they are refused, and the exceptions they raise.
//!
//! The only program but `bench` with such instructions. What a line says: see `runtime::report`.
#![no_std]
#![no_main]

mod causes;
mod refusals;

use runtime::interrupts::catch;
use runtime::report::{self, Body};
use runtime::{bodies, println};

runtime::entry!(coprocessor);

bodies! {
    movaps: [] "movaps xmm0, [rdi]";
    load_mxcsr: ["push rdi", "pop rax"] "ldmxcsr [rsp - 8]";
}

#[repr(C, align(16))]
struct Aligned([u8; 32]);

static ALIGNED: Aligned = Aligned([0; 32]);

fn coprocessor() {
    refusals::show();
    causes::show();
    // SDM vol. 2A 2.4, class 1 (alignment); vol. 1 10.2.3 (MXCSR).
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
