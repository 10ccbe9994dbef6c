//! The HPET (IA-PC HPET Specification 1.0a), and ACPI's PM timer (ACPI 6.5, 4.8.3.3).

use runtime::interrupts::{self, TrapFrame};
use runtime::{local_apic, port, print, println};

use crate::{count, forget, listen, microseconds, note, route, until, wait_for};

const BASE: u64 = 0xFED0_0000;
const CAPABILITIES: u64 = 0;
const CONFIGURATION: u64 = 0x10;
const STATUS: u64 = 0x20;
const COUNTER: u64 = 0xF0;
const VECTOR: u8 = 0x5A;

const LEVEL: u64 = 1 << 1;
const INTERRUPT: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const SET_VALUE: u64 = 1 << 6;
const MODE_32: u64 = 1 << 8;

/// A level comes again until its status is cleared, here at the second time.
fn second_clears(_: &mut TrapFrame) {
    note();
    if count() >= 2 {
        write(STATUS, 4);
    }
    local_apic::end_of_interrupt();
}

fn read(offset: u64) -> u64 {
    // SAFETY: the HPET's registers are identity-mapped.
    unsafe { ((BASE + offset) as *const u64).read_volatile() }
}

fn write(offset: u64, value: u64) {
    // SAFETY: as above.
    unsafe { ((BASE + offset) as *mut u64).write_volatile(value) }
}

fn configuration(timer: u64) -> u64 {
    0x100 + 0x20 * timer
}

fn comparator(timer: u64) -> u64 {
    0x108 + 0x20 * timer
}

pub fn show() {
    counter();
    one_shot();
    periodic();
    legacy();
    pm_timer();
}

/// Main counter: stands, counts, is written while it stands.
fn counter() {
    let capabilities = read(CAPABILITIES);
    println!(
        "hpet: 64 bits {}, legacy {}, three timers {}, period below 100 ns {}",
        capabilities >> 13 & 1,
        capabilities >> 15 & 1,
        u8::from(capabilities >> 8 & 0x1F >= 2),
        u8::from((1..=100_000_000).contains(&(capabilities >> 32)))
    );
    write(CONFIGURATION, 0);
    write(COUNTER, 0x1_2345_6789);
    let stands = [read(COUNTER), read(COUNTER)];
    write(CONFIGURATION, 1);
    let goes = until(|| read(COUNTER) > 0x1_2345_6789);
    write(CONFIGURATION, 0);
    let stopped = [read(COUNTER), read(COUNTER)];
    println!(
        "stands at {:#x} {:#x}, goes {}, stopped {}",
        stands[0],
        stands[1],
        u8::from(goes),
        u8::from(stopped[0] == stopped[1] && stopped[0] > 0x1_2345_6789)
    );
    // In halves.
    write(COUNTER, 0);
    // SAFETY: as in `write`.
    unsafe {
        ((BASE + COUNTER) as *mut u32).write_volatile(0x1111_1111);
        ((BASE + COUNTER + 4) as *mut u32).write_volatile(0x2222_2222);
    }
    println!("written in halves: {:#x}", read(COUNTER));
    write(CAPABILITIES, 0);
    println!(
        "capabilities are read-only: {}",
        u8::from(read(CAPABILITIES) == capabilities)
    );
    for timer in 0..3 {
        let bits = read(configuration(timer));
        println!(
            "timer {timer}: 64 bits {}, periodic {}, some route {}",
            bits >> 5 & 1,
            u8::from(timer != 0 || bits >> 4 & 1 != 0),
            u8::from(bits >> 32 != 0)
        );
    }
}

/// The lowest input of the I/O APIC that timer 2 may use.
fn some_pin() -> u8 {
    (read(configuration(2)) >> 32).trailing_zeros() as u8
}

/// Counts of the main counter in so many microseconds.
fn counts(time: u64) -> u64 {
    time * 1_000_000_000 / (read(CAPABILITIES) >> 32)
}

fn one_shot() {
    listen(VECTOR);
    let pin = some_pin();
    let pin_bits = u64::from(pin) << 9;
    // A route that is not there is not taken (2.3.8).
    let missing = (0..32)
        .find(|pin| read(configuration(2)) >> (32 + pin) & 1 == 0)
        .unwrap_or(0);
    write(configuration(2), pin_bits);
    write(configuration(2), missing << 9);
    println!(
        "route that is not there: kept out {}",
        u8::from(read(configuration(2)) >> 9 & 0x1F != missing)
    );
    for (what, level) in [("edge", false), ("level", true)] {
        route(pin, Some(VECTOR), level);
        write(CONFIGURATION, 0);
        write(STATUS, 7);
        write(COUNTER, 0);
        write(
            configuration(2),
            pin_bits | INTERRUPT | if level { LEVEL } else { 0 },
        );
        write(comparator(2), counts(2000));
        if level {
            interrupts::set_handler(VECTOR, second_clears);
        }
        forget();
        write(CONFIGURATION, 1);
        let came = wait_for(1 + usize::from(level));
        print!("one-shot, {what}: {came}, ");
        crate::breathe();
        forget();
        crate::until_some_time();
        crate::breathe();
        println!("later {}, status {:#x}", count(), read(STATUS) & 4);
        write(configuration(2), pin_bits);
        route(pin, None, false);
    }
    listen(VECTOR);
    // Interrupts off: the comparator matches all the same, and nothing comes.
    write(CONFIGURATION, 0);
    write(COUNTER, 0);
    route(pin, Some(VECTOR), false);
    write(configuration(2), pin_bits);
    write(comparator(2), counts(100));
    forget();
    write(CONFIGURATION, 1);
    crate::until_some_time();
    crate::breathe();
    println!("interrupt not enabled: {}", count());
    // 32 bits: the upper half of the counter is not compared.
    write(CONFIGURATION, 0);
    write(COUNTER, 0x5_0000_0000);
    write(configuration(2), pin_bits | INTERRUPT | MODE_32);
    write(comparator(2), counts(1000));
    forget();
    write(CONFIGURATION, 1);
    println!("32 bits, counter above: {}", wait_for(1));
    write(configuration(2), pin_bits);
    route(pin, None, false);
}

/// Timer 0 is the one that must have it (2.3.5).
fn periodic() {
    listen(VECTOR);
    let pin = (read(configuration(0)) >> 32).trailing_zeros() as u8;
    let bits = u64::from(pin) << 9 | INTERRUPT | PERIODIC;
    route(pin, Some(VECTOR), false);
    write(CONFIGURATION, 0);
    write(COUNTER, 0);
    // First the comparator, with the accumulator bit, then the period (2.3.9.2.2).
    write(configuration(0), bits | SET_VALUE);
    write(comparator(0), counts(1000));
    println!(
        "accumulator bit after the write: {}",
        read(configuration(0)) >> 6 & 1
    );
    write(comparator(0), counts(2000));
    forget();
    write(CONFIGURATION, 1);
    let came = wait_for(4);
    let at_least = counts(1000 + 3 * 2000);
    println!(
        "periodic: {came}, not early {}",
        u8::from(read(COUNTER) >= at_least)
    );
    // The comparator has gone on to the next multiple.
    let ahead = read(comparator(0));
    println!(
        "comparator ahead {}, in phase {}",
        u8::from(ahead > counts(1000)),
        u8::from((ahead - counts(1000)) % counts(2000) == 0)
    );
    write(configuration(0), 0);
    write(CONFIGURATION, 0);
    route(pin, None, false);
}

/// Legacy replacement: timers 0 and 1 in the places of PIT and RTC (2.2.4).
fn legacy() {
    listen(VECTOR);
    for (timer, pin) in [(0u64, 2u8), (1, 8)] {
        route(pin, Some(VECTOR), false);
        write(CONFIGURATION, 0);
        write(COUNTER, 0);
        write(configuration(timer), INTERRUPT);
        write(comparator(timer), counts(1000));
        forget();
        write(CONFIGURATION, 3);
        println!("legacy, timer {timer} on input {pin}: {}", wait_for(1));
        write(configuration(timer), 0);
    }
    // The PIT is disconnected meanwhile.
    crate::breathe();
    forget();
    runtime::pit::interrupt_once(500);
    crate::until_some_time();
    crate::breathe();
    print!("pit while legacy: {}", count());
    write(CONFIGURATION, 0);
    forget();
    runtime::pit::interrupt_once(500);
    println!(", afterwards {}", wait_for(1));
    route(2, None, false);
    route(8, None, false);
}

/// 3.579545 MHz, 24 or 32 bits.
fn pm_timer() {
    const PORT: u16 = 0x608;
    let start = (runtime::cpu::read_tsc(), port::read32(PORT));
    until(|| runtime::cpu::read_tsc() - start.0 > microseconds(20_000));
    let ticks = port::read32(PORT).wrapping_sub(start.1) & 0xFF_FFFF;
    let elapsed = runtime::cpu::read_tsc() - start.0;
    let expected = 3_579_545 * elapsed / microseconds(1_000_000);
    println!(
        "pm timer: right within an eighth {}",
        u8::from((u64::from(ticks)).abs_diff(expected) * 8 <= expected)
    );
}
