//! Debug exceptions (SDM vol. 3B 19.2, 19.3), and the order of events that come together (vol. 3A 7.9, table 7-2).
//!
//! A line `dr6 …` gives the bits of DR6 that say why: 0 to 3 breakpoints, 0x2000 BD, 0x4000 BS.
#![no_std]
#![no_main]

mod bodies;
mod breakpoints;
mod order;

use bodies::*;
use runtime::interrupts::{self, TrapFrame, catch};
use runtime::report::{self, Body};
use runtime::{cpu, print, println};

runtime::entry!(debugging);

const TF: u64 = 1 << 8;

fn debugging() {
    single_steps();
    resume_flag();
    breakpoints::show();
    order::show();
    println!("debugging: done");
}

pub fn show(what: &str, body: Body, argument: u64) {
    cpu::write_dr6(0);
    report::show(what, catch(body, argument), body);
}

/// The same with a text in two parts.
pub fn show_as(before: &str, what: &str, body: Body, argument: u64) {
    print!("{before}");
    show(what, body, argument);
}

/// All debug exceptions between the body's start and its return: how far behind the instruction in question each was,
/// its DR6, and RF if the frame has it: for traps in the middle of a repeated string instruction (19.3.1.1).
pub fn trace(what: &str, body: Body, argument: u64) {
    // SAFETY: one CPU; handlers only add.
    unsafe { (&raw mut STEPS).write_volatile(0) }
    interrupts::set_handler(1, note);
    cpu::write_dr6(0);
    let ended = catch(body, argument);
    interrupts::clear_handler(1);
    cpu::write_dr6(0);
    print!("{what}:");
    // SAFETY: as above.
    let steps = unsafe { (&raw const STEPS).read_volatile() };
    for step in 0..steps.min(SLOTS) {
        // SAFETY: as above.
        let (rip, dr6, rf) = unsafe { (&raw const LOG).cast::<Step>().add(step).read_volatile() };
        print!(" {:+}", rip.wrapping_sub(report::at(body)) as i64);
        print!(" dr6 {dr6:#x}{}", if rf { " rf" } else { "" });
    }
    if let Err(fault) = ended {
        print!(" then ");
        report::print_name(&fault);
    }
    println!();
}

const SLOTS: usize = 12;
static mut STEPS: usize = 0;
/// RIP, DR6 and RF of the frame.
type Step = (u64, u64, bool);
static mut LOG: [Step; SLOTS] = [(0, 0, false); SLOTS];

/// Notes where it happened. A single step goes on while TF is in the frame.
fn note(frame: &mut TrapFrame) {
    // SAFETY: one CPU.
    unsafe {
        let step = (&raw const STEPS).read_volatile();
        if step < SLOTS {
            (&raw mut LOG).cast::<Step>().add(step).write_volatile((
                frame.rip,
                cpu::read_dr6() & 0xE00F,
                frame.rflags >> 16 & 1 != 0,
            ));
        }
        (&raw mut STEPS).write_volatile(step + 1);
    }
    cpu::write_dr6(0);
    // An instruction breakpoint is a fault: without RF it would come again.
    frame.rflags |= 1 << 16;
}

/// 19.3.1.4: after each instruction that began with TF set; not after one that a fault or an interrupt gate ended.
fn single_steps() {
    trace("steps", steps, 0);
    trace(
        "steps over a taken and an untaken branch",
        steps_branches,
        0,
    );
    trace("steps over mov ss and lss", steps_stack_segment, 0);
    trace("steps over sti, cli and pushf", steps_flags, 0);
    trace("steps over an iret that clears tf", steps_iret, 0);
    trace("steps into ud2", steps_fault, 0);
    trace(
        "steps over rep stosb of 3",
        steps_string,
        (&raw const BUFFER) as u64,
    );
    // INT n goes through a gate that clears TF: no step in the handler, one after its IRET's next instruction.
    fn nothing(_: &mut TrapFrame) {}
    interrupts::set_handler(0x80, nothing);
    trace("steps over int 0x80", steps_int, 0);
    interrupts::clear_handler(0x80);
    // PUSHF saves TF as it is.
    let saved = catch(pushed_flags, 0).unwrap_or(0);
    println!("pushf while tf: {:#x}", saved & TF);
}

static mut BUFFER: [u8; 16] = [0; 16];

/// 19.3.1.1: RF holds back instruction breakpoints for one instruction.
fn resume_flag() {
    cpu::write_dr0(report::at(resumed));
    cpu::write_dr7(0x402);
    show("breakpoint without rf", resumed, 0);
    show("breakpoint with rf", resumed, 1 << 16);
    // RF is gone after the instruction, and does not survive POPF.
    cpu::write_dr0(report::at(resumed) + 1);
    trace(
        "breakpoint on the instruction after that with rf",
        resumed,
        1 << 16,
    );
    cpu::write_dr0(report::at(popped));
    show("breakpoint after popf of rf", popped, 1 << 16);
    cpu::write_dr7(0x400);
}
