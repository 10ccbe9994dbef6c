//! Loops of a known number of instructions, timed by the guest itself.
//!
//! Each line reads `bench NAME instructions=N ns=M mips=R`: N counts every instruction of the loop,
//! a repeated string instruction as one. Before it stands what the loop computed, which is the
//! same on every CPU.
//!
//! The command line `scale=K` makes every loop but the last K times as long, `share=K` a Kth (other results, then).
#![no_std]
#![no_main]

mod loops;

use loops::{MEMORY_SIZE, run_all};
use runtime::{boot_info, cpu, println, time};

runtime::entry!(bench);

#[repr(C, align(4096))]
struct Memory([u8; MEMORY_SIZE]);

static mut MEMORY: Memory = Memory([0; MEMORY_SIZE]);

fn bench() {
    let frequency = time::tsc_frequency();
    println!(
        "note: tsc {} Hz, from {}",
        frequency.hertz, frequency.source
    );
    let memory = (&raw mut MEMORY) as *mut u8;
    let (mut instructions, mut ns) = (0, 0);
    // SAFETY: the memory is what it is to be; nobody listens to the port; there is one CPU.
    unsafe {
        let (scale, share) = (number("scale="), number("share="));
        run_all(
            memory,
            |rounds| rounds * scale / share,
            true,
            cpu::read_tsc,
            |measured| {
                let elapsed = time::nanoseconds(measured.ticks, &frequency);
                println!("result {} {:#x}", measured.name, measured.result);
                report(measured.name, measured.instructions, elapsed);
                instructions += measured.instructions;
                ns += elapsed;
            },
        );
    }
    report("all", instructions, ns);
    println!("bench: done");
}

fn report(name: &str, instructions: u64, ns: u64) {
    let mips = instructions * 1000 / ns.max(1);
    println!("bench {name} instructions={instructions} ns={ns} mips={mips}");
}

fn number(key: &str) -> u64 {
    let text = boot_info::command_line()
        .split_whitespace()
        .find_map(|word| word.strip_prefix(key));
    text.and_then(|number| number.parse().ok())
        .unwrap_or(1)
        .clamp(1, 1000)
}
