//! What the interval timer counts, by the clock of ACPI's power management timer, which stands still with the machine:
//! interrupts that come again and again through both interrupt controllers, counts that end once, channel 2, what can be read
//! back, and the HPET that stands in for channel 0.
//!
//! A timer that loses its place when the machine is paused, or gains one, has counted another number of interrupts,
//! or ends at another time. What a busy host does to it is less than what is looked for here.
#![no_std]
#![no_main]

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use runtime::interrupts::{self, TrapFrame};
use runtime::{cpu, local_apic, pic, pit, port, println};

runtime::entry!(run);

/// The power management timer, which counts at [`CLOCK`] hertz in 32 bits.
const CLOCK_PORT: u16 = 0x608;
const CLOCK: u64 = 3_579_545;
const HPET: u64 = 0xfed0_0000;
const THROUGH_THE_IO_APIC: u8 = 0x42;
/// 50 ms of the timer's ticks.
const LONG: u16 = (pit::FREQUENCY / 20) as u16;

static TICKS: AtomicU32 = AtomicU32::new(0);

fn ticks() -> u32 {
    TICKS.load(Relaxed)
}

fn through_the_pic(_: &mut TrapFrame) {
    TICKS.fetch_add(1, Relaxed);
    pic::end_of_interrupt(0);
}

fn through_the_io_apic(_: &mut TrapFrame) {
    TICKS.fetch_add(1, Relaxed);
    local_apic::end_of_interrupt();
}

struct Clock(u32);

impl Clock {
    fn start() -> Clock {
        Clock(port::read32(CLOCK_PORT))
    }

    fn milliseconds(&self) -> u64 {
        u64::from(port::read32(CLOCK_PORT).wrapping_sub(self.0)) * 1000 / CLOCK
    }

    fn wait(&self, milliseconds: u64) {
        while self.milliseconds() < milliseconds {
            core::hint::spin_loop();
        }
    }
}

fn run() {
    interrupts::set_handler(pic::FIRST_VECTOR, through_the_pic);
    interrupts::set_handler(THROUGH_THE_IO_APIC, through_the_io_apic);
    pic::unmask(0);
    cpu::enable_interrupts();
    again_and_again("through the 8259s");
    once();
    channel_2();
    registers();
    the_hpet_stands_in();
    pic::mask(0);
    route(THROUGH_THE_IO_APIC.into());
    again_and_again("through the i/o apic");
    println!("interval: done");
}

/// Whether a number is no further from another than a busy host explains.
fn is_about(number: u64, expected: u64, slack: u64) -> bool {
    number.abs_diff(expected) <= slack
}

fn again_and_again(how: &str) {
    pit::interrupt_every(LONG);
    let before = ticks();
    let clock = Clock::start();
    clock.wait(1010);
    let came = u64::from(ticks() - before);
    if is_about(came, 20, 3) {
        println!("interval: every 50 ms {how}, as often as it should");
    } else {
        println!("interval: every 50 ms {how}: {came} in a second");
    }
}

fn once() {
    let (mut wrong, mut latest) = (0, 0);
    for _ in 0..10 {
        let before = ticks();
        let clock = Clock::start();
        pit::interrupt_once(LONG);
        while ticks() == before && clock.milliseconds() < 1000 {}
        let took = clock.milliseconds();
        latest = took.max(latest);
        wrong += u32::from(!is_about(took, 50, 20));
        // Nothing comes after it.
        clock.wait(took + 70);
        wrong += ticks() - before - 1;
    }
    if wrong == 0 {
        println!("interval: once after 50 ms, each of ten times");
    } else {
        println!("interval: once after 50 ms: {wrong} times wrong, after {latest} ms");
    }
}

/// Its count and its output, while nothing else looks at it.
fn channel_2() {
    const GATE: u16 = 0x61;
    const CHANNEL: u16 = 0x42;
    const COMMAND: u16 = 0x43;
    let (mut back, mut wrong, mut worst) = (0, 0, 50);
    for _ in 0..10 {
        let clock = Clock::start();
        port::write8(GATE, 1);
        port::write8(COMMAND, 0xb0);
        port::write8(CHANNEL, LONG as u8);
        port::write8(CHANNEL, (LONG >> 8) as u8);
        let mut last = u16::MAX;
        loop {
            port::write8(COMMAND, 0x80);
            let count = u16::from(port::read8(CHANNEL)) | u16::from(port::read8(CHANNEL)) << 8;
            if port::read8(GATE) & 0x20 != 0 {
                break;
            }
            back += u32::from(count > last);
            last = count;
        }
        let took = clock.milliseconds();
        if !is_about(took, 50, 20) {
            wrong += 1;
            worst = took;
        }
    }
    if wrong + back == 0 {
        println!("interval: channel 2 counts down to its end after 50 ms, ten times");
    } else {
        println!(
            "interval: channel 2 counted up {back} times, and ended {wrong} times after {worst} ms"
        );
    }
}

/// What is read back is what was written; a latch keeps.
fn registers() {
    port::write8(0x61, 3);
    let speaker = port::read8(0x61) & 3;
    port::write8(0x61, 0);
    // Low byte only, mode 2; the status without the output.
    port::write8(0x43, 0x94);
    port::write8(0x42, 100);
    port::write8(0x43, 0xe8);
    let status = port::read8(0x42) & 0x3f;
    port::write8(0x43, 0xb4);
    port::write8(0x42, 0x10);
    port::write8(0x42, 0x27);
    port::write8(0x61, 1);
    port::write8(0x43, 0x80);
    let low = port::read8(0x42);
    // The latch outlives whatever happens to the machine meanwhile.
    Clock::start().wait(30);
    let latched = u16::from(port::read8(0x42)) << 8 | u16::from(low);
    let near = (9000..=10_000).contains(&latched);
    println!("interval: port b {speaker:#x}, status {status:#x}, latched near its count {near}");
}

fn the_hpet_stands_in() {
    let set = |value: u64| {
        // SAFETY: the HPET's general configuration, identity-mapped.
        unsafe { ((HPET + 0x10) as *mut u64).write_volatile(value) }
    };
    pit::interrupt_every(LONG);
    set(3);
    let before = ticks();
    Clock::start().wait(300);
    let meanwhile = ticks() - before;
    set(0);
    let before = ticks();
    Clock::start().wait(300);
    let afterwards = ticks() - before;
    println!(
        "interval: the hpet stands in: {}, and no longer: {}",
        if meanwhile == 0 {
            "nothing comes"
        } else {
            "it comes"
        },
        if afterwards > 2 {
            "it comes"
        } else {
            "nothing comes"
        },
    );
}

/// The interval timer's entry in the I/O APIC: edge triggered, to this processor.
fn route(entry: u32) {
    for (register, value) in [
        (0x15, local_apic::read(local_apic::register::ID)),
        (0x14, entry),
    ] {
        // SAFETY: the I/O APIC's registers are identity-mapped.
        unsafe {
            (0xFEC0_0000 as *mut u32).write_volatile(register);
            (0xFEC0_0010 as *mut u32).write_volatile(value);
        }
    }
}
