//! The real-time clock (MC146818A data sheet): time, encodings, calendar, its three interrupts.

use runtime::{port, print, println};

use crate::{count, forget, listen, route, until, wait_for};

const VECTOR: u8 = 0x59;
const PIN: u8 = 8;
const A: u8 = 10;
const B: u8 = 11;
const C: u8 = 12;
const D: u8 = 13;

const SET: u8 = 0x80;
const PERIODIC: u8 = 0x40;
const ALARM: u8 = 0x20;
const UPDATE: u8 = 0x10;
const BINARY: u8 = 0x04;
const HOURS_24: u8 = 0x02;

fn read(register: u8) -> u8 {
    port::write8(0x70, register);
    port::read8(0x71)
}

fn write(register: u8, value: u8) {
    port::write8(0x70, register);
    port::write8(0x71, value);
}

/// Seconds, minutes, hours, weekday, day, month, year.
const TIME: [u8; 7] = [0, 2, 4, 6, 7, 8, 9];

/// Sets the time while the divider stands: the first second is over half a second after it is let go.
fn set(format: u8, time: [u8; 7], alarm: [u8; 3]) {
    write(B, SET | format);
    write(A, 0x70);
    for (register, value) in TIME.into_iter().zip(time) {
        write(register, value);
    }
    for (register, value) in [1, 3, 5].into_iter().zip(alarm) {
        write(register, value);
    }
    read(C);
}

fn go(format: u8, interrupts: u8) {
    write(A, 0x26);
    write(B, format | interrupts);
}

fn print_time() {
    for register in TIME {
        print!(" {:02x}", read(register));
    }
}

pub fn show() {
    let old = [read(B), read(A)];
    registers();
    formats();
    a_second_passes();
    periodic();
    write(A, old[1]);
    write(B, old[0]);
}

fn registers() {
    println!("valid: {:#x}", read(D));
    write(D, 0);
    println!("valid, after a write: {:#x}", read(D));
    write(0x40, 0x5A);
    write(0x41, 0xA5);
    println!("memory: {:#x} {:#x}", read(0x40), read(0x41));
    // Bit 7 of the index is another thing (NMI), and not of the address.
    port::write8(0x70, 0x80 | 0x40);
    println!("memory, with the index' bit 7: {:#x}", port::read8(0x71));
    port::write8(0x70, 0);
    write(B, SET | HOURS_24);
    println!("set: update in progress {}", read(A) >> 7);
    // SET clears the update interrupt's enable.
    write(B, SET | UPDATE | PERIODIC | HOURS_24);
    println!("set with all interrupts: {:#x}", read(B));
    write(B, SET | HOURS_24);
}

/// What was written is read; the formats are of the one who writes.
fn formats() {
    for (what, format, time) in [
        (
            "bcd, 24 hours",
            HOURS_24,
            [0x59, 0x34, 0x23, 0x04, 0x28, 0x02, 0x24],
        ),
        (
            "binary, 24 hours",
            HOURS_24 | BINARY,
            [59, 34, 23, 4, 28, 2, 24],
        ),
        (
            "bcd, 12 hours",
            0,
            [0x59, 0x34, 0x91, 0x04, 0x28, 0x02, 0x24],
        ),
        ("binary, 12 hours", BINARY, [59, 34, 0x8B, 4, 28, 2, 24]),
    ] {
        set(format, time, [0xFF; 3]);
        print!("{what}:");
        print_time();
        println!();
    }
}

/// Midnight of the 28th of February of a leap year, with an alarm for it. The update's and the alarm's flags come at
/// once, and one interrupt for both; a read of register C ends it.
fn a_second_passes() {
    listen(VECTOR);
    route(PIN, Some(VECTOR), false);
    for (what, format, time, alarm) in [
        (
            "leap year, bcd",
            HOURS_24,
            [0x59, 0x59, 0x23, 0x04, 0x28, 0x02, 0x24],
            [0x00, 0x00, 0x00],
        ),
        (
            "new year, binary",
            HOURS_24 | BINARY,
            [59, 59, 23, 7, 31, 12, 99],
            [0, 0, 0],
        ),
        (
            "noon, 12 hours",
            0,
            [0x59, 0x59, 0x11, 0x04, 0x15, 0x04, 0x23],
            [0x00, 0xC0, 0xFF],
        ),
        (
            "no alarm",
            0,
            [0x59, 0x59, 0x11, 0x04, 0x15, 0x04, 0x23],
            [0x01, 0xC0, 0xFF],
        ),
    ] {
        set(format, time, alarm);
        forget();
        go(format, UPDATE | ALARM);
        let came = wait_for(1);
        print!("{what}: interrupts {came},");
        print_time();
        let flags = read(C);
        println!(
            ", flags {:#x}, again {:#x}",
            flags & !PERIODIC,
            read(C) & !PERIODIC
        );
        write(B, SET | format);
        read(C);
    }
    // Flags are set also where no interrupt is enabled, and then there is none.
    set(
        HOURS_24,
        [0x59, 0x59, 0x23, 0x04, 0x28, 0x02, 0x24],
        [0x00, 0x00, 0x00],
    );
    forget();
    go(HOURS_24, 0);
    let passed = until(|| read(0) == 0);
    crate::breathe();
    println!(
        "no interrupts enabled: the second passed {}, flags {:#x}, interrupts {}",
        u8::from(passed),
        read(C) & !PERIODIC,
        count()
    );
    route(PIN, None, false);
}

/// Rates 3 to 15: 8192 Hz and down by halves; 0 is none.
fn periodic() {
    listen(VECTOR);
    write(B, HOURS_24);
    for (what, rate, enough) in [
        ("1024 Hz", 0x26u8, 5usize),
        ("8192 Hz", 0x23, 5),
        ("none", 0x20, 0),
    ] {
        write(A, rate);
        read(C);
        crate::breathe();
        route(PIN, Some(VECTOR), false);
        forget();
        write(B, HOURS_24 | PERIODIC);
        let mut came = 0;
        let mut flags = 0;
        for _ in 0..enough {
            // The line stays high until register C is read: one edge each.
            forget();
            came += wait_for(1);
            flags = read(C);
        }
        if enough == 0 {
            crate::until_some_time();
            crate::until_some_time();
            crate::breathe();
            came = count();
            flags = read(C);
        }
        println!(
            "periodic, {what}: {came}, flags {:#x}",
            flags & !(UPDATE | ALARM)
        );
        write(B, HOURS_24);
        read(C);
        route(PIN, None, false);
    }
    // Not read, there is no second one.
    write(A, 0x26);
    route(PIN, Some(VECTOR), false);
    forget();
    write(B, HOURS_24 | PERIODIC);
    wait_for(1);
    for _ in 0..3 {
        crate::until_some_time();
        crate::breathe();
    }
    println!("flags not read: {}", count());
    write(B, HOURS_24);
    read(C);
    route(PIN, None, false);
}
