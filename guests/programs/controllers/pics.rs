//! The pair of 8259A (data sheet 231468) with the edge/level registers of EISA and PCI boards.

use core::sync::atomic::{AtomicU8, AtomicU16, Ordering::Relaxed};

use runtime::interrupts::{self, TrapFrame};
use runtime::{pic, port};

use crate::lines::{CLOCK, KEYBOARD, MOUSE, PIT, SERIAL, lower, raise};
use crate::{drain, forget, print_log, record};

const MASTER: u16 = 0x20;
const SLAVE: u16 = 0xA0;
const LEVELS: u16 = 0x4D0;

pub fn show() {
    initialisation();
    order();
    edges_and_levels();
    in_service();
    rotation();
    special_mask();
    poll();
    cascade();
    through_the_processor();
    pic::remap();
}

/// The four initialization words, and no interrupt masked afterwards.
fn initialise(icw4: u8) {
    for (chip, vector, wiring) in [(MASTER, 0x20, 4), (SLAVE, 0x28, 2)] {
        port::write8(chip, 0x11);
        port::write8(chip + 1, vector);
        port::write8(chip + 1, wiring);
        port::write8(chip + 1, icw4);
    }
}

fn set_masks(master: u8, slave: u8) {
    port::write8(MASTER + 1, master);
    port::write8(SLAVE + 1, slave);
}

/// OCW3 with P, then the level that is asked for, which is acknowledged with it.
fn poll_chip(chip: u16) -> u8 {
    port::write8(chip, 0x0C);
    port::read8(chip)
}

fn print_polls(what: &str, count: usize) {
    print!("{what}:");
    for _ in 0..count {
        match poll_chip(MASTER) {
            level if level & 0x80 != 0 => print!(" {}", level & 7),
            _ => print!(" none"),
        }
    }
    println!();
}

/// "Initialization command words": masks, in-service bits, special mask and priorities are cleared.
fn initialisation() {
    initialise(1);
    println!(
        "after initialisation: masks {:#x} {:#x}, requests {:#x}, in service {:#x}",
        port::read8(MASTER + 1),
        port::read8(SLAVE + 1),
        pic::requested(),
        pic::in_service()
    );
    set_masks(0xA5, 0x5A);
    println!(
        "masks read back: {:#x} {:#x}",
        port::read8(MASTER + 1),
        port::read8(SLAVE + 1)
    );
    // The register that the next read gives stays chosen.
    raise(SERIAL);
    port::write8(MASTER, 0x0A);
    let requests = [port::read8(MASTER), port::read8(MASTER)];
    port::write8(MASTER, 0x0B);
    let in_service = [port::read8(MASTER), port::read8(MASTER)];
    lower(SERIAL);
    println!(
        "request register twice: {:#x} {:#x}, in-service register twice: {:#x} {:#x}",
        requests[0], requests[1], in_service[0], in_service[1]
    );
    for value in [0xFFu8, 0] {
        port::write8(LEVELS, value);
        port::write8(LEVELS + 1, value);
        println!(
            "edge/level registers after {value:#x}: {:#x} {:#x}",
            port::read8(LEVELS),
            port::read8(LEVELS + 1)
        );
    }
}

/// The fixed order: 0 first, the slave's in place of 2.
fn order() {
    initialise(1);
    set_masks(0xFF, 0xFF);
    for line in [SERIAL, CLOCK, KEYBOARD, PIT] {
        raise(line);
    }
    println!("requests, all masked: {:#x}", pic::requested());
    set_masks(0, 0);
    println!("requests, none masked: {:#x}", pic::requested());
    // Polling the master gives 2 for the slave; an in-service bit holds back those below.
    let mut order = [0u8; 4];
    for place in &mut order {
        *place = poll_chip(MASTER) & 0x87;
        port::write8(MASTER, 0x20);
        if *place == 0x82 {
            *place = 0x80 | 8 + (poll_chip(SLAVE) & 7);
            port::write8(SLAVE, 0x20);
        }
    }
    print!("order:");
    for level in order {
        print!(" {}", level & 0x7F);
    }
    println!(", requests left {:#x}", pic::requested());
    for line in [SERIAL, CLOCK, KEYBOARD, PIT] {
        lower(line);
    }
}

/// "Edge and level triggered modes": a request lasts while the line is high; after its acknowledge an edge is
/// needed for the next, or in level mode none.
fn edges_and_levels() {
    for level in [false, true] {
        initialise(1);
        set_masks(!(1 << SERIAL), 0xFF);
        port::write8(LEVELS, if level { 1 << SERIAL } else { 0 });
        raise(SERIAL);
        let high = pic::requested();
        lower(SERIAL);
        let low = pic::requested();
        raise(SERIAL);
        let polled = poll_chip(MASTER);
        let acknowledged = pic::requested();
        port::write8(MASTER, 0x20);
        let again = poll_chip(MASTER);
        port::write8(MASTER, 0x20);
        lower(SERIAL);
        raise(SERIAL);
        let edge = poll_chip(MASTER);
        port::write8(MASTER, 0x20);
        lower(SERIAL);
        println!(
            "{}: high {high:#x}, low again {low:#x}, polled {polled:#x}, requested after that {acknowledged:#x}, after the end of interrupt {again:#x}, after another edge {edge:#x}",
            if level { "level" } else { "edge" }
        );
    }
    port::write8(LEVELS, 0);
}

/// In-service bits, and how they are ended ("End of interrupt", "Fully nested mode").
fn in_service() {
    initialise(1);
    set_masks(0, 0xFF);
    raise(SERIAL);
    print_polls("serial", 1);
    raise(KEYBOARD);
    print_polls("keyboard, above it", 1);
    println!("both in service: {:#x}", pic::in_service());
    raise(PIT);
    port::write8(MASTER, 0x60 | SERIAL);
    println!(
        "specific end of the serial port's: {:#x}",
        pic::in_service()
    );
    print_polls("timer, above", 1);
    port::write8(MASTER, 0x20);
    println!("end of interrupt: {:#x}", pic::in_service());
    port::write8(MASTER, 0x20);
    println!("again: {:#x}", pic::in_service());
    port::write8(MASTER, 0x20);
    println!("and with none in service: {:#x}", pic::in_service());
    for line in [SERIAL, KEYBOARD, PIT] {
        lower(line);
    }
    // What is below, or the same, waits.
    raise(KEYBOARD);
    print_polls("keyboard", 1);
    raise(SERIAL);
    lower(KEYBOARD);
    raise(KEYBOARD);
    print_polls("serial and keyboard while it is in service", 1);
    port::write8(MASTER, 0x20);
    print_polls("after its end", 1);
    port::write8(MASTER, 0x20);
    print_polls("and then", 1);
    port::write8(MASTER, 0x20);
    lower(SERIAL);
    lower(KEYBOARD);
}

/// "Automatic rotation", "Specific rotation".
fn rotation() {
    let two = |what: &str, lowest_first: &dyn Fn()| {
        initialise(1);
        set_masks(0, 0xFF);
        lowest_first();
        raise(SERIAL);
        raise(KEYBOARD);
        print!("{what}:");
        for _ in 0..2 {
            print!(" {}", poll_chip(MASTER) & 0x7F);
            port::write8(MASTER, 0x20);
        }
        println!();
        lower(SERIAL);
        lower(KEYBOARD);
    };
    two("keyboard and serial, as initialised", &|| ());
    two("lowest priority 0", &|| port::write8(MASTER, 0xC0));
    two("lowest priority 1", &|| {
        port::write8(MASTER, 0xC0 | KEYBOARD)
    });
    two("lowest priority 3", &|| port::write8(MASTER, 0xC3));
    two("lowest priority 4", &|| port::write8(MASTER, 0xC0 | SERIAL));
    two("the keyboard's ended with rotation", &|| {
        raise(KEYBOARD);
        poll_chip(MASTER);
        lower(KEYBOARD);
        port::write8(MASTER, 0xA0);
    });
    two("the keyboard's ended with specific rotation", &|| {
        raise(KEYBOARD);
        poll_chip(MASTER);
        lower(KEYBOARD);
        port::write8(MASTER, 0xE0 | KEYBOARD);
    });
    // Automatic end of interrupt, without and with rotation.
    for (what, rotate) in [
        ("automatic end", 0x00u8),
        ("automatic end with rotation", 0x80),
    ] {
        initialise(3);
        set_masks(0, 0xFF);
        port::write8(MASTER, rotate);
        raise(KEYBOARD);
        let first = poll_chip(MASTER) & 0x7F;
        let in_service = pic::in_service();
        lower(KEYBOARD);
        raise(KEYBOARD);
        raise(SERIAL);
        println!(
            "{what}: {first}, in service {in_service:#x}, then {} {}",
            poll_chip(MASTER) & 0x7F,
            poll_chip(MASTER) & 0x7F
        );
        lower(KEYBOARD);
        lower(SERIAL);
    }
    port::write8(MASTER, 0x00);
}

/// "Special mask mode": a level that is masked while in service holds nothing back.
fn special_mask() {
    initialise(1);
    set_masks(0, 0xFF);
    raise(KEYBOARD);
    print_polls("keyboard", 1);
    raise(SERIAL);
    set_masks(1 << KEYBOARD, 0xFF);
    print_polls("masked while in service", 1);
    port::write8(MASTER, 0x68);
    print_polls("the same in special mask mode", 1);
    println!("in service: {:#x}", pic::in_service());
    port::write8(MASTER, 0x20);
    println!(
        "end of interrupt, which passes over masked ones: {:#x}",
        pic::in_service()
    );
    // Without ESMM the SMM bit is ignored.
    port::write8(MASTER, 0x08);
    lower(SERIAL);
    raise(SERIAL);
    print_polls("still in special mask mode", 1);
    port::write8(MASTER, 0x20);
    port::write8(MASTER, 0x48);
    lower(SERIAL);
    raise(SERIAL);
    print_polls("out of it", 1);
    port::write8(MASTER, 0x60 | KEYBOARD);
    print_polls("after the keyboard's end", 1);
    port::write8(MASTER, 0x20);
    lower(SERIAL);
    lower(KEYBOARD);
}

/// "Poll command".
fn poll() {
    initialise(1);
    set_masks(0, 0);
    print_polls("poll of nothing", 1);
    println!("in service: {:#x}", pic::in_service());
    raise(MOUSE);
    let master = poll_chip(MASTER);
    let slave = poll_chip(SLAVE);
    println!(
        "poll of the mouse: master {master:#x}, slave {slave:#x}, in service {:#x}",
        pic::in_service()
    );
    // One poll is one read: the next gives the chosen register.
    port::write8(MASTER, 0x0B);
    port::write8(MASTER, 0x0C);
    port::read8(MASTER);
    println!("read after a poll: {:#x}", port::read8(MASTER));
    port::write8(SLAVE, 0x20);
    port::write8(MASTER, 0x20);
    lower(MOUSE);
}

/// "Cascade", "Special fully nested mode": the master lets a higher request of the same slave through.
fn cascade() {
    for (what, icw4) in [("fully nested", 1u8), ("special fully nested", 0x11)] {
        initialise(icw4);
        set_masks(0, 0);
        raise(MOUSE);
        poll_chip(MASTER);
        poll_chip(SLAVE);
        raise(CLOCK);
        println!(
            "{what}, mouse in service, clock above it in the slave: master asked {:#x}",
            poll_chip(MASTER)
        );
        initialise(1);
        lower(MOUSE);
        lower(CLOCK);
    }
    // Masking the cascade holds the slave back.
    set_masks(4, 0);
    raise(MOUSE);
    let masked = poll_chip(MASTER);
    set_masks(0, 0);
    println!(
        "cascade masked {masked:#x}, not masked {:#x}",
        poll_chip(MASTER)
    );
    initialise(1);
    lower(MOUSE);
}

static HOW_TO_END: AtomicU8 = AtomicU8::new(0);
static SEEN: AtomicU16 = AtomicU16::new(0);

/// What the processor gets: vectors, with bits 2 to 0 from the chip; one interrupt for each edge.
fn through_the_processor() {
    fn handler(frame: &mut TrapFrame) {
        record(frame);
        SEEN.fetch_or(pic::in_service(), Relaxed);
        let irq = (frame.vector & 15) as u8;
        match HOW_TO_END.load(Relaxed) {
            0 => pic::end_of_interrupt(irq),
            _ => {}
        }
    }
    for irq in 0..16 {
        interrupts::set_handler(0x20 + irq, handler);
        interrupts::set_handler(0x70 + irq, handler);
    }
    let all = [SERIAL, CLOCK, KEYBOARD, PIT];
    for (what, icw2, how) in [
        ("vectors from 0x20", [0x20u8, 0x28], 0),
        // The low three bits are the chip's.
        ("vectors from 0x77 and 0x7d", [0x77, 0x7D], 0),
    ] {
        for (chip, vector, wiring) in [(MASTER, icw2[0], 4), (SLAVE, icw2[1], 2)] {
            port::write8(chip, 0x11);
            port::write8(chip + 1, vector);
            port::write8(chip + 1, wiring);
            port::write8(chip + 1, 1);
        }
        HOW_TO_END.store(how, Relaxed);
        SEEN.store(0, Relaxed);
        forget();
        for line in all {
            raise(line);
        }
        drain();
        print!("{what}:");
        print_log();
        println!("  in service in the handlers: {:#x}", SEEN.load(Relaxed));
        for line in all {
            lower(line);
        }
    }
    // Automatic end of interrupt: nothing is in service in the handler.
    initialise(3);
    HOW_TO_END.store(1, Relaxed);
    SEEN.store(0, Relaxed);
    forget();
    raise(SERIAL);
    raise(MOUSE);
    drain();
    print!("automatic end:");
    print_log();
    println!("  in service in the handlers: {:#x}", SEEN.load(Relaxed));
    lower(SERIAL);
    lower(MOUSE);
    // A handler that never ends its interrupt.
    initialise(1);
    forget();
    raise(KEYBOARD);
    drain();
    raise(SERIAL);
    drain();
    raise(PIT);
    drain();
    print!("keyboard not ended, then serial, then timer:");
    print_log();
    port::write8(MASTER, 0x20);
    port::write8(MASTER, 0x20);
    drain();
    print!("both ended:");
    print_log();
    initialise(1);
    // A line that falls before anybody looked.
    forget();
    lower(SERIAL);
    raise(SERIAL);
    lower(SERIAL);
    drain();
    print!("high and low again before interrupts are on:");
    print_log();
    lower(KEYBOARD);
    lower(PIT);
}
