//! A tour through all modes of the CPU, the way firmware, kernels and the trampolines of
//! application processors take it: from 64-bit code down to real mode and back (SDM vol. 3A 2.2; 11.8.5 and 11.9 have
//! the order of the steps). What each mode does is cited at its part.
//!
//! Each step prints its line from within the mode it talks about.
#![no_std]
#![no_main]

use core::arch::global_asm;

use runtime::interrupts::{self, TrapFrame};
use runtime::{cpu, println, segments};

runtime::entry!(modes);

/// Where the tour runs: 16-bit code reaches the first 64 KiB only.
const LOW_MEMORY: u64 = 0x8000;
const COMPATIBILITY_CODE: u64 = 0x18;
const NOTICE: u8 = 0x41;

global_asm!(include_str!("text.s"), options(att_syntax, raw));
global_asm!(include_str!("tour.s"), options(att_syntax, raw));
global_asm!(include_str!("legacy_paging.s"), options(att_syntax, raw));
global_asm!(include_str!("real.s"), options(att_syntax, raw));
global_asm!(include_str!("tasks.s"), options(att_syntax, raw));
global_asm!(include_str!("virtual_8086.s"), options(att_syntax, raw));
global_asm!(include_str!("tables.s"), options(att_syntax, raw));

unsafe extern "C" {
    static tour_begin: u8;
    static tour_entry: u8;
    static tour_end: u8;
}

fn modes() {
    // An interrupt from 32-bit code arrives in the 64-bit handler, and IRET goes back.
    fn notice(frame: &mut TrapFrame) {
        if frame.cs == COMPATIBILITY_CODE {
            frame.rax += 0x100;
        }
    }
    interrupts::set_handler(NOTICE, notice);
    let begin = &raw const tour_begin;
    let size = (&raw const tour_end) as usize - begin as usize;
    let entry = LOW_MEMORY + (&raw const tour_entry) as u64 - begin as u64;
    assert!(
        LOW_MEMORY as usize + size <= 0xC000,
        "the tour's tables begin there"
    );
    println!(
        "64-bit mode: efer {:#x}",
        cpu::read_msr(cpu::msr::EFER) & 0x500
    );
    // SAFETY: the first 64 KiB are RAM that holds nothing but what the loader left for this
    // program, which has read it. The tour keeps what a C function keeps.
    unsafe {
        core::ptr::copy_nonoverlapping(begin, LOW_MEMORY as *mut u8, size);
        let tour: extern "C" fn() = core::mem::transmute(entry);
        tour();
    }
    segments::load();
    interrupts::load();
    println!(
        "64-bit mode again: efer {:#x}",
        cpu::read_msr(cpu::msr::EFER) & 0x500
    );
    println!("modes: done");
}
