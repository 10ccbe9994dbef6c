//! The interrupt controllers themselves: the pair of 8259A, the I/O APIC, the local APIC; what their registers
//! hold and in which order they let interrupts through.
//!
//! Interrupts come from devices that raise their lines when told to, see `lines`.
#![no_std]
#![no_main]

/// What the program says is kept until [`say`]: the serial port is also a source of interrupts here, and a character that
/// goes out is an edge.
macro_rules! print {
    ($($argument:tt)*) => {{
        let _ = core::fmt::Write::write_fmt(&mut $crate::Notes, format_args!($($argument)*));
    }};
}
macro_rules! println {
    () => { print!("\n") };
    ($($argument:tt)*) => {{ print!($($argument)*); print!("\n"); }};
}

mod io_apic;
mod lines;
mod local;
mod pics;

use core::arch::naked_asm;
use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use runtime::interrupts::TrapFrame;

runtime::entry!(controllers);

fn controllers() {
    lines::initialise();
    pics::show();
    say();
    io_apic::show();
    say();
    local::show();
    println!("controllers: done");
    say();
}

/// A sink for text, see `print!`.
pub struct Notes;

static mut NOTES: ([u8; 8192], usize) = ([0; 8192], 0);

impl fmt::Write for Notes {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // SAFETY: one CPU, and handlers do not print.
        let (buffer, length) = unsafe { &mut *(&raw mut NOTES) };
        let end = *length + text.len();
        buffer[*length..end].copy_from_slice(text.as_bytes());
        *length = end;
        Ok(())
    }
}

/// Lets out what was noted.
pub fn say() {
    // SAFETY: as above.
    let (buffer, length) = unsafe { &mut *(&raw mut NOTES) };
    runtime::print!(
        "{}",
        core::str::from_utf8(&buffer[..*length]).unwrap_or("?")
    );
    *length = 0;
}

static LOG: [AtomicUsize; 32] = [const { AtomicUsize::new(0) }; 32];
static COUNT: AtomicUsize = AtomicUsize::new(0);

pub fn forget() {
    COUNT.store(0, Relaxed);
}

pub fn count() -> usize {
    COUNT.load(Relaxed)
}

pub fn record(frame: &TrapFrame) {
    let index = COUNT.fetch_add(1, Relaxed);
    if let Some(slot) = LOG.get(index) {
        slot.store(frame.vector as usize, Relaxed);
    }
}

/// Prints the vectors since [`forget`], and the end of the line.
pub fn print_log() {
    for slot in LOG.iter().take(count()) {
        print!(" {:#x}", slot.load(Relaxed));
    }
    println!();
}

/// Lets interrupts in until none has come for a while.
pub fn drain() {
    for _ in 0..20 {
        breathe();
    }
}

/// Lets interrupts in for a moment.
#[unsafe(naked)]
pub extern "C" fn breathe() {
    naked_asm!("sti", "nop", "nop", "cli", "ret")
}
