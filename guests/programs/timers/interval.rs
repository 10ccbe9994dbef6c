//! The 8254 (data sheet 231164): modes 0 to 5, reading back, latches, BCD. Channel 2 is the one whose gate and output
//! can be seen, at port 0x61.

use runtime::{port, print, println};

use crate::{count, forget, listen, route, until, wait_for};

const CONTROL: u16 = 0x43;
const GATE: u16 = 0x61;
const VECTOR: u8 = 0x58;
/// Of the I/O APIC, where channel 0 arrives.
const PIN: u8 = 2;

pub fn show() {
    modes();
    gates();
    counts();
    latches();
    interrupts();
}

fn data(channel: u16) -> u16 {
    0x40 + channel
}

fn set_gate(on: bool) {
    port::write8(GATE, port::read8(GATE) & !3 | u8::from(on));
}

fn output() -> bool {
    port::read8(GATE) & 0x20 != 0
}

/// Control word: channel, low byte then high byte, mode.
fn program(channel: u8, mode: u8, bcd: bool) {
    port::write8(CONTROL, channel << 6 | 0x30 | mode << 1 | u8::from(bcd));
}

fn write(channel: u16, value: u16) {
    port::write8(data(channel), value as u8);
    port::write8(data(channel), (value >> 8) as u8);
}

fn read(channel: u16) -> u16 {
    let low = port::read8(data(channel));
    u16::from(low) | u16::from(port::read8(data(channel))) << 8
}

/// The count, held by the latch command.
fn latched(channel: u8) -> u16 {
    port::write8(CONTROL, channel << 6);
    read(channel.into())
}

/// The status that the read-back command holds: output, null count, access, mode, BCD.
fn status(channel: u8) -> u8 {
    port::write8(CONTROL, 0xE0 | 2 << channel);
    port::read8(data(channel.into()))
}

/// The output before the count, after it is written, and at its end.
fn modes() {
    for mode in 0..6u8 {
        set_gate(true);
        program(2, mode, false);
        let before = output();
        let null = status(2) >> 6 & 1;
        write(2, 3000);
        let after = output();
        print!(
            "mode {mode}: output {} null count {null}, counting {}",
            u8::from(before),
            u8::from(after)
        );
        if matches!(mode, 1 | 5) {
            // They wait for the gate to rise.
            let waiting = output();
            let idle = status(2) >> 6 & 1;
            set_gate(false);
            set_gate(true);
            print!(
                ", null count {idle}, triggered from {} to {}",
                u8::from(waiting),
                u8::from(output())
            );
        }
        match mode {
            0 | 1 => print!(", at its end {}", u8::from(until(output))),
            3 => print!(
                ", low {} and high {} again",
                u8::from(until(|| !output())),
                u8::from(until(output))
            ),
            // Low for one tick only.
            _ => print!(", high {}", u8::from(until(output))),
        }
        println!(", status {:#x}", status(2) & 0x3F);
    }
    // Modes 6 and 7 are 2 and 3 (the mode's first bit does not matter then).
    for mode in [6u8, 7] {
        program(2, mode, false);
        println!("mode {mode}: status {:#x}", status(2) & 0x37);
    }
}

/// What the gate does ("Gate pin operations").
fn gates() {
    // Mode 0: low stops the count, the output stays.
    set_gate(true);
    program(2, 0, false);
    write(2, 60000);
    set_gate(false);
    let stopped = [latched(2), latched(2)];
    set_gate(true);
    println!(
        "mode 0, gate low: stands still {}, output {}; gate high: goes on {}",
        u8::from(stopped[0] == stopped[1]),
        u8::from(output()),
        u8::from(until(|| latched(2) < stopped[0]))
    );
    // A count that is written while the gate is low is loaded and waits.
    set_gate(false);
    program(2, 0, false);
    write(2, 500);
    crate::until_some_time();
    println!(
        "mode 0, written with the gate low: {} output {}",
        latched(2),
        u8::from(output())
    );
    set_gate(true);
    println!("gate high: output {}", u8::from(until(output)));
    // Modes 2 and 3: low makes the output high, and the rising edge starts anew.
    for mode in [2, 3] {
        set_gate(true);
        program(2, mode, false);
        write(2, 0);
        crate::until_some_time();
        set_gate(false);
        let high = output();
        let stopped = [latched(2), latched(2)];
        set_gate(true);
        println!(
            "mode {mode}, gate low: output {}, stands still {}; gate high: starts anew {}",
            u8::from(high),
            u8::from(stopped[0] == stopped[1]),
            u8::from(until(|| latched(2) > stopped[0]))
        );
    }
    // Mode 1: a new trigger starts anew, a new count waits for it.
    set_gate(false);
    program(2, 1, false);
    write(2, 60000);
    set_gate(true);
    crate::until_some_time();
    let before = latched(2);
    set_gate(false);
    let low = output();
    set_gate(true);
    println!(
        "mode 1, gate low: output still {}, triggered again {}",
        u8::from(low),
        u8::from(latched(2) > before)
    );
    // Mode 4: a new count starts at once.
    program(2, 4, false);
    write(2, 60000);
    crate::until_some_time();
    let before = latched(2);
    write(2, 65000);
    println!(
        "mode 4, written again: starts anew {}",
        u8::from(until(|| latched(2) > before))
    );
}

/// Widths, BCD, the largest count.
fn counts() {
    set_gate(false);
    for (what, control, bytes, bcd) in [
        ("low byte only", 0x90u8, &[0x34u8][..], false),
        ("high byte only", 0xA0, &[0x12], false),
        ("both", 0xB0, &[0x34, 0x12], false),
        ("both, bcd", 0xB1, &[0x34, 0x12], true),
    ] {
        port::write8(CONTROL, control);
        for &byte in bytes {
            port::write8(data(2), byte);
        }
        port::write8(CONTROL, 0x80);
        let first = port::read8(data(2));
        let second = port::read8(data(2));
        println!(
            "{what}: reads {first:#x} {second:#x}, status {:#x}{}",
            status(2) & 0x3F,
            if bcd { " (bcd)" } else { "" }
        );
    }
    // In BCD 10000 is the largest, in binary 65536: after zero they go on from the top.
    set_gate(true);
    for (what, bcd, top) in [("binary", false, 0xFFFFu16), ("bcd", true, 0x9999)] {
        program(2, 0, bcd);
        write(2, 1);
        until(output);
        crate::until_some_time();
        let count = latched(2);
        println!(
            "{what}, after the end of the count: goes on below the top {}, digits {}",
            u8::from(count != 0 && count <= top),
            u8::from(!bcd || (0..4).all(|digit| count >> (4 * digit) & 15 < 10))
        );
    }
    // Mode 3 counts in twos.
    program(2, 3, false);
    write(2, 10000);
    let odd = (0..50).filter(|_| latched(2) & 1 != 0).count();
    println!("mode 3: odd counts seen {odd}");
}

/// A latched count stays until it is read; the second latch is ignored; a status comes first.
fn latches() {
    set_gate(true);
    program(2, 2, false);
    write(2, 0);
    crate::until_some_time();
    port::write8(CONTROL, 0x80);
    crate::until_some_time();
    port::write8(CONTROL, 0x80);
    let held = read(2);
    let later = latched(2);
    println!("latched twice: the first {}", u8::from(held > later));
    // Read-back of count and status together: status, then the count.
    port::write8(CONTROL, 0xC8);
    crate::until_some_time();
    let status_byte = port::read8(data(2));
    let held = read(2);
    println!(
        "read back of both: status {:#x}, count held {}",
        status_byte & 0x3F,
        u8::from(held > latched(2))
    );
    // Three channels with one command.
    for channel in [0, 1] {
        program(channel, 2, false);
    }
    port::write8(CONTROL, 0xEE);
    let all = [0u16, 1, 2].map(|channel| port::read8(data(channel)) & 0x30);
    println!(
        "read back of all: access {:#x} {:#x} {:#x}",
        all[0], all[1], all[2]
    );
    // Written counts are null until they are loaded: in mode 2 at the end of the period.
    write(2, 60000);
    println!("mode 2, a new count waits: null {}", status(2) >> 6 & 1);
}

/// Channel 0's output is an interrupt, by its rising edge.
fn interrupts() {
    listen(VECTOR);
    for (mode, enough) in [(0u8, 1), (1, 1), (2, 3), (3, 3), (4, 1), (5, 1)] {
        route(PIN, None, false);
        program(0, mode, false);
        // What the last mode sent is taken now.
        crate::until_some_time();
        crate::breathe();
        route(PIN, Some(VECTOR), false);
        forget();
        write(0, 1200);
        // Modes 1 and 5 wait for a gate that is always high.
        let came = if matches!(mode, 1 | 5) {
            crate::until_some_time();
            crate::until_some_time();
            crate::breathe();
            count()
        } else {
            wait_for(enough)
        };
        if enough == 1 {
            // Not again.
            for _ in 0..3 {
                crate::until_some_time();
                crate::breathe();
            }
            println!("mode {mode} on channel 0: {came}, later {}", count());
        } else {
            println!("mode {mode} on channel 0: {came}");
        }
    }
    route(PIN, None, false);
    program(0, 0, false);
}
