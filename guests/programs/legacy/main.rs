//! The processor outside long mode, as its own kind of kernel would use it: gates and stacks of 32-bit and
//! 16-bit code, exceptions that 64-bit code cannot raise, tasks, system calls, virtual-8086 mode with its
//! extensions, real mode, and both of its ways of paging.
//!
//! Every case leaves long mode, runs a few instructions, and comes back with the first event.
#![no_std]
#![no_main]

mod entries;
mod events;
mod faults;
mod gates;
mod machine;
mod paging;
mod tasks;
mod virtual_8086;

use runtime::println;

runtime::entry!(legacy);

fn legacy() {
    machine::reset();
    faults::show();
    events::show();
    gates::show();
    entries::show();
    virtual_8086::show();
    tasks::show();
    paging::show();
    entries::show_last();
    faults::show_last();
    println!("legacy: done");
}
