//! The I/O APIC (82093AA data sheet; version 0x20, which has an EOI register).

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use runtime::cpu;
use runtime::interrupts::{self, TrapFrame};
use runtime::local_apic::{self, register};
use runtime::{pic, pit};

use crate::lines::{CLOCK, KEYBOARD, PIT, SERIAL, lower, raise};
use crate::{count, drain, forget, print_log, record};

const BASE: u64 = 0xFEC0_0000;
const ID: u32 = 0;
const VERSION: u32 = 1;
const END_OF_INTERRUPT: u64 = 0x40;

const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;
const LOGICAL: u32 = 1 << 11;
const LOWEST_PRIORITY: u32 = 1 << 8;
const NMI: u32 = 4 << 8;
const REMOTE_IRR: u32 = 1 << 14;

const VECTOR: u8 = 0x61;

fn write_at(offset: u64, value: u32) {
    // SAFETY: the I/O APIC's registers are identity-mapped.
    unsafe { ((BASE + offset) as *mut u32).write_volatile(value) }
}

pub fn read(register: u32) -> u32 {
    write_at(0, register);
    // SAFETY: as above.
    unsafe { ((BASE + 0x10) as *const u32).read_volatile() }
}

pub fn write(register: u32, value: u32) {
    write_at(0, register);
    write_at(0x10, value);
}

fn entry(pin: u8) -> u32 {
    read(0x10 + 2 * u32::from(pin))
}

/// Writes a pin's entry, the destination first.
fn set_entry(pin: u8, low: u32, destination: u32) {
    write(0x11 + 2 * u32::from(pin), destination << 24);
    write(0x10 + 2 * u32::from(pin), low);
}

fn mask(pin: u8) {
    set_entry(pin, MASKED, 0);
}

static ENTRY_IN_HANDLER: AtomicU32 = AtomicU32::new(0);
static TRIGGER_IN_HANDLER: AtomicU32 = AtomicU32::new(0);

fn acknowledge(frame: &mut TrapFrame) {
    record(frame);
    ENTRY_IN_HANDLER.store(entry(SERIAL), Relaxed);
    TRIGGER_IN_HANDLER.store(
        local_apic::vector_bit(register::TRIGGER_MODE, frame.vector as u8).into(),
        Relaxed,
    );
    // A level that stays would come for ever.
    if count() >= 3 {
        lower(SERIAL);
    }
    local_apic::end_of_interrupt();
}

pub fn show() {
    pic::remap();
    for vector in [VECTOR, 0x62, 0x63, 0x64] {
        interrupts::set_handler(vector, acknowledge);
    }
    registers();
    edges();
    levels();
    destinations();
    delivery_modes();
    ends();
    pins();
    for pin in 0..24 {
        mask(pin);
    }
}

fn registers() {
    let old = read(ID);
    write(ID, 0xFFFF_FFFF);
    let id = read(ID);
    write(ID, old);
    let version = read(VERSION);
    println!(
        "id register: {id:#x}, version {:#x}, last entry {}",
        version & 0xFF,
        version >> 16 & 0xFF
    );
    // Delivery status and remote IRR are the chip's.
    write(0x10 + 46, 0xFFFE_FFFF | MASKED);
    write(0x11 + 46, 0xFFFF_FFFF);
    println!(
        "last entry, all ones: {:#x} {:#x}",
        read(0x10 + 46),
        read(0x11 + 46) & 0xFF00_0000
    );
    mask(23);
    println!("last entry, masked: {:#x}", entry(23));
}

/// An edge is one interrupt; one at a masked pin is lost (3.2.4, interrupt mask).
fn edges() {
    set_entry(SERIAL, VECTOR.into(), 0);
    forget();
    raise(SERIAL);
    drain();
    let once = count();
    drain();
    print!("edge: {once}, while high {}, ", count());
    println!(
        "remote irr in the handler {}, trigger mode {}",
        u8::from(ENTRY_IN_HANDLER.load(Relaxed) & REMOTE_IRR != 0),
        TRIGGER_IN_HANDLER.load(Relaxed)
    );
    lower(SERIAL);
    raise(SERIAL);
    drain();
    println!("edge: after another {}", count());
    lower(SERIAL);
    set_entry(SERIAL, u32::from(VECTOR) | MASKED, 0);
    forget();
    raise(SERIAL);
    drain();
    let masked = count();
    set_entry(SERIAL, VECTOR.into(), 0);
    drain();
    println!("edge at a masked pin: {masked}, unmasked {}", count());
    lower(SERIAL);
    // Two edges before the first is taken are one.
    forget();
    for _ in 0..2 {
        raise(SERIAL);
        lower(SERIAL);
    }
    drain();
    println!("two edges before the first is taken: {}", count());
}

/// A level is held back by remote IRR until its end, then sent again while the line is high.
fn levels() {
    set_entry(SERIAL, u32::from(VECTOR) | LEVEL, 0);
    forget();
    raise(SERIAL);
    let requested = entry(SERIAL) & REMOTE_IRR != 0;
    drain();
    println!(
        "level: remote irr when accepted {}, in the handler {}, trigger mode {}, taken until it fell {}, remote irr afterwards {}",
        u8::from(requested),
        u8::from(ENTRY_IN_HANDLER.load(Relaxed) & REMOTE_IRR != 0),
        TRIGGER_IN_HANDLER.load(Relaxed),
        count(),
        u8::from(entry(SERIAL) & REMOTE_IRR != 0)
    );
    set_entry(SERIAL, u32::from(VECTOR) | LEVEL | MASKED, 0);
    forget();
    raise(SERIAL);
    drain();
    let masked = count();
    set_entry(SERIAL, u32::from(VECTOR) | LEVEL, 0);
    drain();
    println!("level at a masked pin: {masked}, unmasked {}", count());
    lower(SERIAL);
    // A level that is gone before it was sent is nothing; one that was accepted stays.
    set_entry(SERIAL, u32::from(VECTOR) | LEVEL | MASKED, 0);
    forget();
    raise(SERIAL);
    lower(SERIAL);
    set_entry(SERIAL, u32::from(VECTOR) | LEVEL, 0);
    drain();
    let gone = count();
    raise(SERIAL);
    lower(SERIAL);
    drain();
    println!(
        "level gone while masked: {gone}, gone when accepted {}",
        count()
    );
    mask(SERIAL);
}

/// Physical and logical destinations (SDM vol. 3A 12.6.2).
fn destinations() {
    const FLAT: u32 = 0xFFFF_FFFF;
    const CLUSTER: u32 = 0x0FFF_FFFF;
    let id = local_apic::read(register::ID) >> 24;
    let reaches = |low: u32, destination: u32| {
        set_entry(SERIAL, u32::from(VECTOR) | low, destination);
        forget();
        raise(SERIAL);
        drain();
        lower(SERIAL);
        mask(SERIAL);
        u8::from(count() != 0)
    };
    println!(
        "physical: own {}, another {}, broadcast {}",
        reaches(0, id),
        reaches(0, id + 1),
        reaches(0, 0xFF)
    );
    for (what, format, logical) in [
        ("flat, 0x04", FLAT, 0x04u32),
        ("cluster, 0x24", CLUSTER, 0x24),
    ] {
        local_apic::write(register::DESTINATION_FORMAT, format);
        local_apic::write(register::LOGICAL_DESTINATION, logical << 24);
        print!("logical {what}:");
        for destination in [0x04u32, 0x02, 0x0C, 0x24, 0x22, 0x34, 0xFF, 0] {
            print!(" {destination:#x} {}", reaches(LOGICAL, destination));
        }
        println!(
            ", lowest priority {}",
            reaches(LOGICAL | LOWEST_PRIORITY, logical)
        );
    }
    local_apic::write(register::DESTINATION_FORMAT, FLAT);
    local_apic::write(register::LOGICAL_DESTINATION, 0);
}

/// Fixed has been asked; NMI ignores its vector and IF, a vector below 16 is an error (12.5.2, 12.5.3).
fn delivery_modes() {
    fn non_maskable(frame: &mut TrapFrame) {
        record(frame);
    }
    interrupts::set_handler(2, non_maskable);
    set_entry(SERIAL, NMI | 0x61, 0);
    forget();
    raise(SERIAL);
    pit::wait(1000);
    print!("nmi, interrupts off:");
    print_log();
    lower(SERIAL);
    mask(SERIAL);
    interrupts::clear_handler(2);
    local_apic::write(register::ERROR_STATUS, 0);
    set_entry(SERIAL, 0x0F, 0);
    forget();
    raise(SERIAL);
    drain();
    local_apic::write(register::ERROR_STATUS, 0);
    println!(
        "vector 15: taken {}, error {:#x}",
        count(),
        local_apic::read(register::ERROR_STATUS)
    );
    lower(SERIAL);
    mask(SERIAL);
    local_apic::write(register::ERROR_STATUS, 0);
}

/// Ends of level interrupts: the broadcast, its suppression (12.8.5), and the EOI register.
fn ends() {
    fn pending(frame: &mut TrapFrame) {
        record(frame);
    }
    interrupts::set_handler(VECTOR, pending);
    let remote = || u8::from(entry(SERIAL) & REMOTE_IRR != 0);
    set_entry(SERIAL, u32::from(VECTOR) | LEVEL, 0);
    forget();
    raise(SERIAL);
    drain();
    lower(SERIAL);
    print!("level in service: remote irr {}", remote());
    local_apic::interrupt_self(0x62);
    drain();
    print!(", after the end of a higher one {}", remote());
    local_apic::end_of_interrupt();
    println!(", after its own {}", remote());
    // Suppressed broadcasts, if there are any (bit 24 of the version).
    if local_apic::read(register::VERSION) & 1 << 24 != 0 {
        local_apic::write(register::SPURIOUS_VECTOR, 1 << 12 | 1 << 8 | 0xFF);
        raise(SERIAL);
        drain();
        lower(SERIAL);
        local_apic::end_of_interrupt();
        print!("broadcast suppressed: remote irr {}", remote());
        write_at(END_OF_INTERRUPT, 0x60);
        print!(", after the eoi register with another vector {}", remote());
        write_at(END_OF_INTERRUPT, VECTOR.into());
        println!(", with its own {}", remote());
        local_apic::write(register::SPURIOUS_VECTOR, 1 << 8 | 0xFF);
    } else {
        println!("note: no suppression");
    }
    // Made edge triggered, and level again: remote IRR is gone (Linux relies on it where there is no EOI register).
    raise(SERIAL);
    drain();
    lower(SERIAL);
    let before = remote();
    set_entry(SERIAL, u32::from(VECTOR) | MASKED, 0);
    set_entry(SERIAL, u32::from(VECTOR) | LEVEL | MASKED, 0);
    println!("remote irr {before}, after a moment as edge {}", remote());
    local_apic::end_of_interrupt();
    mask(SERIAL);
    interrupts::set_handler(VECTOR, acknowledge);
}

/// Which pin is which.
fn pins() {
    for (line, pin, vector) in [(PIT, 2u8, 0x62u32), (KEYBOARD, 1, 0x63), (CLOCK, 8, 0x64)] {
        set_entry(pin, vector, 0);
        forget();
        raise(line);
        drain();
        print!("line {line} on pin {pin}:");
        print_log();
        lower(line);
        mask(pin);
    }
    // By priority, not by pin or time.
    let _ = cpu::read_cr8();
    set_entry(1, 0x62, 0);
    set_entry(8, 0x63, 0);
    set_entry(SERIAL, 0x71, 0);
    interrupts::set_handler(0x71, acknowledge);
    forget();
    for line in [KEYBOARD, CLOCK, SERIAL] {
        raise(line);
    }
    drain();
    print!("three at once:");
    print_log();
    for (line, pin) in [(KEYBOARD, 1), (CLOCK, 8), (SERIAL, SERIAL)] {
        lower(line);
        mask(pin);
    }
}
