//! What every guest program stands on: start-up, serial port, interrupts, CPU access, power-off.
//!
//! The machine it expects: a 16550 at COM1, two 8259 PICs, a local APIC at 0xFEE0_0000, and one of
//! ACPI's PM1a control register at port 0x604 or isa-debug-exit at port 0xF4 to end the run.
//! One CPU, no threads: a `static mut` here is touched by the program and by the interrupt
//! handlers it installed itself.
#![no_std]

pub mod boot_info;
pub mod cpu;
pub mod interrupts;
pub mod local_apic;
mod memory_functions;
pub mod pic;
pub mod pit;
pub mod port;
pub mod power;
pub mod report;
pub mod ring3;
pub mod segments;
pub mod serial;
mod start;
pub mod time;
pub mod window;

/// Names the function that runs as the program: `entry!(run);` for `fn run()`. The machine is
/// powered off when it returns.
#[macro_export]
macro_rules! entry {
    ($function:path) => {
        #[unsafe(no_mangle)]
        fn guest_main() {
            $function()
        }
    };
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    println!("panic: {info}");
    power::fail()
}
