//! NMIs (7.7), and what wakes a halt (vol. 2A HLT).

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use runtime::interrupts::{self, TrapFrame, catch};
use runtime::{local_apic, pit, print, println, report, segments};

use crate::bodies::*;
use crate::{restore, run3};

static LOG: [AtomicUsize; 8] = [const { AtomicUsize::new(0) }; 8];
static COUNT: AtomicUsize = AtomicUsize::new(0);
static LAST_RIP: AtomicU64 = AtomicU64::new(0);

fn note(frame: &TrapFrame) {
    if let Some(slot) = LOG.get(COUNT.fetch_add(1, Relaxed)) {
        slot.store(frame.vector as usize, Relaxed);
    }
    LAST_RIP.store(frame.rip, Relaxed);
}

fn print_log(what: &str) {
    print!("{what}:");
    for slot in LOG.iter().take(COUNT.load(Relaxed)) {
        print!(" {:#x}", slot.load(Relaxed));
    }
    println!();
    COUNT.store(0, Relaxed);
}

fn simple(frame: &mut TrapFrame) {
    note(frame);
    if frame.vector >= 32 {
        local_apic::end_of_interrupt();
    }
}

const INTERRUPT: u8 = 0x60;

pub fn show() {
    interrupts::set_handler(INTERRUPT, simple);
    blocking();
    order();
    halts();
    interrupts::clear_handler(2);
    interrupts::clear_handler(INTERRUPT);
}

/// The next NMI waits for an IRET, any IRET, also one that faults (7.7.1).
fn blocking() {
    fn twice(frame: &mut TrapFrame) {
        note(frame);
        if COUNT.load(Relaxed) == 1 {
            local_apic::nmi_self();
            local_apic::nmi_self();
            pit::wait(200);
        }
    }
    interrupts::set_handler(2, twice);
    local_apic::nmi_self();
    pit::wait(500);
    // Two that come meanwhile are one.
    print_log("an nmi, and two more in its handler");
    // An exception in the handler: its IRET lets the next in, inside of the first.
    fn with_exception(frame: &mut TrapFrame) {
        note(frame);
        if COUNT.load(Relaxed) == 1 {
            local_apic::nmi_self();
            pit::wait(200);
            // SAFETY: the handler below skips it.
            unsafe { core::arch::asm!("int3") }
            pit::wait(200);
            COUNT.fetch_add(1, Relaxed);
            LOG[COUNT.load(Relaxed) - 1].store(0xEE, Relaxed);
        }
    }
    fn skip(frame: &mut TrapFrame) {
        note(frame);
    }
    interrupts::set_handler(2, with_exception);
    interrupts::set_handler(3, skip);
    // The second must not use the first's stack.
    interrupts::set_gate(
        2,
        segments::KERNEL_CODE,
        interrupts::stub_address(2),
        0x8E,
        0,
    );
    local_apic::nmi_self();
    pit::wait(500);
    print_log("an nmi, one more, a breakpoint in its handler, its end");
    interrupts::clear_handler(3);
    restore();
}

/// Table 7-2: NMI before maskable interrupts.
fn order() {
    interrupts::set_handler(2, simple);
    local_apic::interrupt_self(INTERRUPT);
    local_apic::nmi_self();
    pit::wait(200);
    let _ = catch(nmi_then_sti, 0);
    print_log("an interrupt and an nmi, interrupts off, then on");
    // In ring 3: whatever IF says.
    fn end_ring3(frame: &mut TrapFrame) {
        note(frame);
    }
    interrupts::set_handler(2, end_ring3);
    local_apic::nmi_self();
    let fault = run3(undefined, 0);
    print!("ring 3 after an nmi: ");
    report::print_name(&fault);
    println!();
    COUNT.store(0, Relaxed);
}

fn halts() {
    interrupts::set_handler(2, simple);
    let behind = report::at(halt) + 1;
    local_apic::interrupt_self(INTERRUPT);
    let _ = catch(halt, 0);
    println!(
        "interrupt, sti, hlt: taken behind the hlt {}",
        u8::from(LAST_RIP.load(Relaxed) == behind)
    );
    print_log("taken");
    // A timer, later.
    local_apic::write(local_apic::register::DIVIDE, 0b1011);
    local_apic::write(local_apic::register::TIMER, INTERRUPT.into());
    local_apic::write(local_apic::register::INITIAL_COUNT, 3_000_000);
    let _ = catch(halt, 0);
    print_log("timer wakes hlt");
    // With interrupts off nothing but an NMI does: through the timer's entry of the I/O APIC's pin.
    const SELECT: *mut u32 = 0xFEC0_0000 as *mut u32;
    const WINDOW: *mut u32 = 0xFEC0_0010 as *mut u32;
    let write = |register: u32, value: u32| {
        // SAFETY: the I/O APIC's registers are identity-mapped.
        unsafe {
            SELECT.write_volatile(register);
            WINDOW.write_volatile(value);
        }
    };
    write(
        0x15,
        local_apic::read(local_apic::register::ID) & 0xFF00_0000,
    );
    write(0x14, 4 << 8);
    local_apic::interrupt_self(INTERRUPT);
    pit::interrupt_once(3000);
    let _ = catch(halt_off, 0);
    write(0x14, 1 << 16);
    print_log("hlt with interrupts off, an interrupt waits, an nmi later");
    let _ = catch(nmi_then_sti, 0);
    print_log("interrupts on");
}
