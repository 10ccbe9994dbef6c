//! What a guest may do to confuse whoever runs it: jump into data, rewrite what it is executing, go where there
//! is no memory, wrap around.
//!
//! What is wanted: code is what is in memory when it is executed, also after it was written (SDM vol. 3A 10.1.3, 13.6); pages
//! decide about fetches as about data (5.6, 5.7, 5.10); addresses that are not canonical are #GP, and #SS by the stack (vol. 1
//! 3.3.7.1); what 4 GiB are to 32-bit code is the host CPU's answer. What is where no memory is, is this machine's.
//!
//! It wants 256 MiB of memory from address 0, and nothing behind that: reads there give ones, as an open bus does,
//! and what is written is lost. `no-devices` on the command line leaves out what a machine without such a bus, or that
//! gives up when code is where there is no memory, can't do.
#![no_std]
#![no_main]

mod data;
mod edges;
mod rewriting;
mod wrapping;

use core::arch::naked_asm;

use runtime::interrupts::{Fault, catch};
use runtime::report::print_name;
use runtime::{boot_info, print, println, window};

runtime::entry!(hostile);

#[repr(C, align(4096))]
struct Pages([u8; 4 * 4096]);

/// Code that the program writes itself.
static mut CODE: Pages = Pages([0; 4 * 4096]);

fn hostile() {
    window::open();
    data::jumps();
    rewriting::rewriting();
    edges::edges();
    wrapping::wrapping();
    println!("hostile: done");
}

/// Whether the machine does what this program expects where there is no memory.
fn has_bus() -> bool {
    !boot_info::command_line().contains("no-devices")
}

/// Where its code lies; addresses are physical ones too.
fn code() -> u64 {
    (&raw mut CODE) as u64
}

/// Stores bytes at an address, one at a time.
fn store(to: u64, bytes: &[u8]) {
    for (at, &byte) in (to..).zip(bytes) {
        // SAFETY: the callers store to memory that is their own.
        unsafe { (at as *mut u8).write_volatile(byte) }
    }
}

fn load(from: u64) -> u8 {
    // SAFETY: as in `store`.
    unsafe { (from as *const u8).read_volatile() }
}

/// Stores an entry of a table in one piece: it may be in use.
fn store_long(to: u64, value: u64) {
    // SAFETY: as in `store`.
    unsafe { (to as *mut u64).write_volatile(value) }
}

fn load_long(from: u64) -> u64 {
    // SAFETY: as in `store`.
    unsafe { (from as *const u64).read_volatile() }
}

/// Fills memory with a byte.
fn fill(to: u64, byte: u8, length: u64) {
    for at in to..to + length {
        store(at, &[byte]);
    }
}

/// `mov eax, NUMBER; ret`
fn constant(number: u32) -> [u8; 6] {
    let [a, b, c, d] = number.to_le_bytes();
    [0xB8, a, b, c, d, 0xC3]
}

/// Runs what is at an address until it returns, or raises an exception.
fn run(address: u64) -> Result<u64, Fault> {
    catch(jump, address)
}

/// The same where nothing can go wrong.
fn call(address: u64) -> u32 {
    // SAFETY: what was stored there ends with RET and changes EAX, ECX and EDX only.
    unsafe { core::mem::transmute::<u64, extern "C" fn() -> u32>(address)() }
}

#[unsafe(naked)]
unsafe extern "C" fn jump(address: u64) -> u64 {
    naked_asm!("xor eax, eax", "jmp rdi")
}

/// Says how something ended; addresses of exceptions are told relative to `base`.
fn show(what: impl core::fmt::Display, ended: Result<u64, Fault>, base: u64) {
    print!("{what}: ");
    match ended {
        Ok(value) => println!("{value:#x}"),
        Err(fault) => {
            print_name(&fault);
            let rip = fault.frame.rip.wrapping_sub(base);
            // Else it is somewhere in this program.
            if rip.wrapping_add(1 << 16) < 1 << 17 {
                print!(" rip +{rip:#x}");
            }
            if fault.frame.vector == 14 {
                print!(" cr2 +{:#x}", fault.cr2.wrapping_sub(base));
            }
            println!();
        }
    }
}
