//! A long hash chain, for moving a guest from one engine to another while it runs.
//!
//! Everything that a processor or a chipset remembers goes into it: what is written comes from the
//! hash, waits for a while, is read back, compared, and goes into the hash. So a guest that was
//! saved and restored at any moment, and lost anything, ends with another result, and says what it
//! lost. Interrupts from the local APIC's timer and from the interval timer arrive all the while;
//! the result does not depend on when.
//!
//! The command line `rounds=N` makes it longer (2000 without it), `tick=N` sets the microseconds
//! between two timer interrupts, `without=NAME,…` leaves pieces of state out (see `pieces`), and
//! with them the names `ring3`, `watch` (a breakpoint) and `nmi`.
#![no_std]
#![no_main]

mod mix;
mod pieces;
mod timers;

use pieces::Pieces;
use runtime::{boot_info, cpu, println};

runtime::entry!(chain);

/// Rounds between two looks at the pieces of state.
const VISIT: u64 = 32;
/// Parts of the chain after which the hash is printed.
const PARTS: u64 = 8;

fn chain() {
    let rounds = number("rounds=", 2000).max(PARTS);
    let tick = number("tick=", 1000);
    println!("chain: {rounds} rounds");
    mix::prepare();
    timers::start(tick);
    let left_out = word("without=").unwrap_or("");
    let has_ring_3 = left_out.split(',').all(|name| name != "ring3");
    let mut pieces = Pieces::new(left_out);
    let mut hash = mix::Hash::new();
    let mut clock = cpu::read_tsc();
    let (mut backwards, mut visits) = (0, 0u64);
    cpu::enable_interrupts();
    for round in 0..rounds {
        hash.in_ring_0();
        if has_ring_3 && round % 4 == 0 {
            hash.in_ring_3();
        }
        if round % VISIT == 0 {
            pieces.visit(visits, &mut hash);
            visits += 1;
            let now = cpu::read_tsc();
            backwards += u32::from(now < clock);
            clock = now;
        }
        let part = (round + 1) * PARTS / rounds;
        if part != round * PARTS / rounds {
            timers::wait_for_each();
            timers::change(part);
            println!("chain: part {part} of {PARTS}, hash {:#018x}", hash.value());
        }
    }
    timers::stop();
    println!("chain: the clock went back {backwards} times");
    println!("chain: {} pieces of state lost", pieces.lost);
    println!("chain: timer interrupts arrived: {}", timers::summary());
    println!("chain: result {:#018x}", hash.value());
    println!("chain: done");
}

fn word(name: &str) -> Option<&'static str> {
    boot_info::command_line()
        .split_whitespace()
        .find_map(|word| word.strip_prefix(name))
}

fn number(name: &str, otherwise: u64) -> u64 {
    word(name)
        .and_then(|text| text.parse().ok())
        .unwrap_or(otherwise)
}
