//! Who the processor says it is, and which bits of its registers are there: CPUID, MSRs, control and
//! debug registers, XCR0.
//!
//! What is expected is the profile x86-64-v2 of trapgate with one processor, held against the manuals:
//! CPUID's answers against each other, a register's writable bits against what CPUID enumerates. The
//! frequency of the TSC is the host's on some engines, so only relations of it are shown.
#![no_std]
#![no_main]

mod clock;
mod control;
mod leaves;
mod msrs;
mod register;

use runtime::println;

runtime::entry!(identity);

fn identity() {
    leaves::show();
    msrs::show();
    control::show();
    clock::show();
    msrs::apic_off_and_on();
    // Last what a paravirtual KVM does not emulate.
    control::counters();
    msrs::swapgs();
    control::extended();
    msrs::tsc_aux();
    println!("identity: done");
}
