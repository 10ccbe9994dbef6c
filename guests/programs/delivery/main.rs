//! The delivery of events in long mode: what a gate may be, which stack is taken, what happens when either is bad while
//! another exception is being delivered, NMIs, HLT, compatibility mode (SDM vol. 3A 7.7, 7.12 to 7.14, table 7-5).
#![no_std]
#![no_main]

mod bodies;
mod compatibility;
mod doubles;
mod gates;
mod masking;

use runtime::interrupts::{self, Fault};
use runtime::ring3::{self, Start};
use runtime::{print, println, report, segments};

runtime::entry!(delivery);

/// Has no translation: above the identity map.
pub const UNMAPPED: u64 = 5 << 30;
pub const NON_CANONICAL: u64 = 0x8000_0000_0000;

#[repr(C, align(4096))]
pub struct Page([u8; 4096]);
static mut USER_STACK: Page = Page([0; 4096]);
static mut RING0_STACK: Page = Page([0; 4096]);

fn delivery() {
    ring3::open_memory();
    restore();
    doubles::show();
    gates::show();
    masking::show();
    compatibility::show();
    println!("delivery: done");
}

pub fn ring0_top() -> u64 {
    (&raw const RING0_STACK) as u64 + 4096
}

pub fn user_top() -> u64 {
    (&raw const USER_STACK) as u64 + 4096
}

/// Tables as the runtime makes them.
pub fn restore() {
    segments::load();
    interrupts::load();
    segments::set_ring0_stack(ring0_top());
}

/// Runs a body in ring 3.
pub fn run3(body: report::Body, argument: u64) -> Fault {
    ring3::run(&Start::new(body as *const () as u64, user_top(), argument))
}

pub fn print_ended(ended: &Result<u64, Fault>) {
    match ended {
        Ok(_) => print!("no exception"),
        Err(fault) => report::print_name(fault),
    }
}
