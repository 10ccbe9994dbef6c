//! The timers of a PC: the 8254 in all its modes, the real-time clock, the HPET, ACPI's PM timer.
//!
//! How long something takes is compared loosely, and only between timers of the machine: a host that looks away
//! stretches everything.
#![no_std]
#![no_main]

mod clock;
mod hpet;
mod interval;

use core::arch::naked_asm;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use runtime::interrupts::{self, TrapFrame};
use runtime::{cpu, local_apic, println, time};

runtime::entry!(timers);

fn timers() {
    TSC_HZ.store(time::tsc_frequency().hertz as usize, Relaxed);
    interval::show();
    clock::show();
    hpet::show();
    println!("timers: done");
}

static TSC_HZ: AtomicUsize = AtomicUsize::new(0);
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// Waits for a condition, for two seconds at most.
pub fn until(condition: impl Fn() -> bool) -> bool {
    let end = cpu::read_tsc() + 2 * TSC_HZ.load(Relaxed) as u64;
    while cpu::read_tsc() < end {
        if condition() {
            return true;
        }
    }
    condition()
}

/// Three milliseconds.
pub fn until_some_time() {
    let end = cpu::read_tsc() + microseconds(3000);
    until(|| cpu::read_tsc() > end);
}

/// Ticks of the TSC in so many microseconds.
pub fn microseconds(count: u64) -> u64 {
    count * TSC_HZ.load(Relaxed) as u64 / 1_000_000
}

pub fn note() {
    COUNT.fetch_add(1, Relaxed);
}

pub fn forget() {
    COUNT.store(0, Relaxed);
}

pub fn count() -> usize {
    COUNT.load(Relaxed)
}

/// Counts interrupts of the local APIC with this vector.
pub fn listen(vector: u8) {
    fn handler(_: &mut TrapFrame) {
        note();
        local_apic::end_of_interrupt();
    }
    interrupts::set_handler(vector, handler);
}

/// Lets interrupts in until so many have come; how many did, but no more.
pub fn wait_for(enough: usize) -> usize {
    until(|| {
        breathe();
        count() >= enough
    });
    count().min(enough)
}

/// Lets interrupts in for a moment.
#[unsafe(naked)]
pub extern "C" fn breathe() {
    naked_asm!("sti", "nop", "nop", "cli", "ret")
}

/// Routes an input of the I/O APIC to a vector, edge triggered or by level; `None` masks it.
pub fn route(pin: u8, vector: Option<u8>, level: bool) {
    const SELECT: *mut u32 = 0xFEC0_0000 as *mut u32;
    const WINDOW: *mut u32 = 0xFEC0_0010 as *mut u32;
    let entry = match vector {
        Some(vector) => u32::from(vector) | u32::from(level) << 15,
        None => 1 << 16,
    };
    for (register, value) in [
        (
            0x11 + 2 * u32::from(pin),
            local_apic::read(local_apic::register::ID) & 0xFF00_0000,
        ),
        (0x10 + 2 * u32::from(pin), entry),
    ] {
        // SAFETY: the I/O APIC's registers are identity-mapped.
        unsafe {
            SELECT.write_volatile(register);
            WINDOW.write_volatile(value);
        }
    }
}
