//! What comes first when several events wait (vol. 3A table 7-2), and the shadows (7.8.3).

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use runtime::interrupts::{self, TrapFrame, catch};
use runtime::report::{self, Body};
use runtime::{cpu, local_apic, print, println};

use crate::bodies::*;

const SLOTS: usize = 8;
static LOG: [(AtomicUsize, AtomicU64); SLOTS] =
    [const { (AtomicUsize::new(0), AtomicU64::new(0)) }; SLOTS];
static COUNT: AtomicUsize = AtomicUsize::new(0);

fn note(frame: &mut TrapFrame) {
    let index = COUNT.fetch_add(1, Relaxed);
    if let Some((vector, rip)) = LOG.get(index) {
        vector.store(frame.vector as usize, Relaxed);
        rip.store(frame.rip, Relaxed);
    }
    match frame.vector {
        1 => {
            cpu::write_dr6(0);
            frame.rflags |= 1 << 16;
        }
        2 => {}
        _ => local_apic::end_of_interrupt(),
    }
}

const INTERRUPT: u8 = 0x60;
const HIGHER: u8 = 0x70;

/// Runs the body with interrupts waiting: which event came, and how many bytes behind the instruction in question.
fn events(what: &str, body: Body, before: impl FnOnce()) {
    for vector in [1, 2, INTERRUPT, HIGHER] {
        interrupts::set_handler(vector, note);
    }
    COUNT.store(0, Relaxed);
    before();
    let ended = catch(body, 0);
    for vector in [1, 2, INTERRUPT, HIGHER] {
        interrupts::clear_handler(vector);
    }
    cpu::write_dr7(0x400);
    cpu::write_dr6(0);
    print!("{what}:");
    for (vector, rip) in LOG.iter().take(COUNT.load(Relaxed)) {
        print!(
            " {:#x} {:+}",
            vector.load(Relaxed),
            rip.load(Relaxed).wrapping_sub(report::at(body)) as i64
        );
    }
    if let Err(fault) = ended {
        print!(" then ");
        report::print_name(&fault);
    }
    println!();
}

pub fn show() {
    let send = || local_apic::interrupt_self(INTERRUPT);
    events("an interrupt", let_in, send);
    events("two interrupts", let_in, || {
        send();
        local_apic::interrupt_self(HIGHER);
    });
    // A trap on the instruction before goes first; the handler keeps interrupts off until its IRET.
    events("an interrupt and single steps", let_in_stepping, send);
    // An interrupt goes before the next instruction's breakpoint, which comes after it.
    events(
        "an interrupt and a code breakpoint where it arrives",
        let_in,
        || {
            cpu::write_dr0(report::at(let_in) + 2);
            cpu::write_dr7(0x402);
            send();
        },
    );
    events(
        "an interrupt, and a code breakpoint one before",
        let_in,
        || {
            cpu::write_dr0(report::at(let_in) + 1);
            cpu::write_dr7(0x402);
            send();
        },
    );
    // The breakpoint goes before what the instruction raises.
    events("a code breakpoint on ud2", undefined, || {
        cpu::write_dr0(report::at(undefined));
        cpu::write_dr7(0x402);
    });
    // #UD before the privilege check: LOCK is not for this instruction.
    crate::show(
        "lock before a privileged instruction",
        privileged_undefined,
        0,
    );
}
