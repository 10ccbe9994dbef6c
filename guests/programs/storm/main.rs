//! Interrupts faster than any processor can take them. A processor that takes what is pending right after IRET (SDM vol.
//! 3A, 7.9) may have no time for anything else as long as they come, so each storm ends after a while; the program must
//! then go on where it was.
//!
//! `forever` on the command line ends in such a storm that does not end, for whoever wants to stop the machine in it.
#![no_std]
#![no_main]

use core::arch::asm;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use runtime::interrupts::{clear_handler, set_handler};
use runtime::local_apic::{self, register, timer};
use runtime::{boot_info, cpu, pic, pit, port, println, time};

runtime::entry!(storm);

/// Vectors: IDT entries above those of the PIC.
const TIMER: u8 = 0x40;
const SELF: u8 = 0x51;
const LOWER: u8 = 0x41;
const LINE: u8 = 0x61;

/// After so many, a storm that leaves the program nothing ends.
const MANY: u64 = 5000;
/// How far each part counts.
const FAR: u64 = 20_000;

static TAKEN: AtomicU64 = AtomicU64::new(0);

fn storm() {
    timer_storm();
    self_storm();
    two_levels();
    line_storm();
    pit_storm();
    nmi_storm();
    exceptions();
    if boot_info::command_line().contains("forever") {
        println!("storm: on and on");
        set_handler(SELF, |_| {
            local_apic::interrupt_self(SELF);
            local_apic::end_of_interrupt();
        });
        local_apic::interrupt_self(SELF);
        cpu::enable_interrupts();
        loop {
            // SAFETY: has no effect but its time.
            unsafe { asm!("nop") }
        }
    }
    println!("storm: done");
}

/// Counts while interrupts are on. Says that it came to the end, and that the storm was one.
fn count_through(what: &str, at_least: u64) {
    TAKEN.store(0, Relaxed);
    let start = cpu::read_tsc();
    cpu::enable_interrupts();
    let mut count = 0u64;
    // A storm that comes slower than the loop is waited for.
    while count < FAR || TAKEN.load(Relaxed) < at_least {
        // SAFETY: one register.
        unsafe { asm!("inc {}", inout(reg) count, options(nostack)) }
    }
    cpu::disable_interrupts();
    let ticks = cpu::read_tsc() - start;
    let taken = TAKEN.load(Relaxed);
    println!("{what}: the program goes on");
    println!(
        "note: {what}: {taken} interrupts, counted to {count} in {} us",
        time::nanoseconds(ticks, &time::tsc_frequency()) / 1000
    );
}

/// Counts an interrupt. Says if there may be more.
fn took() -> bool {
    TAKEN.fetch_add(1, Relaxed) < MANY
}

fn local_apic_timer(count: u32) {
    local_apic::write(register::DIVIDE, 0b1011); // by 1
    local_apic::write(register::TIMER, timer::PERIODIC | u32::from(TIMER));
    local_apic::write(register::INITIAL_COUNT, count);
}

/// The timer expires with every tick of its clock.
fn timer_storm() {
    set_handler(TIMER, |_| {
        if !took() {
            local_apic::write(register::INITIAL_COUNT, 0);
        }
        local_apic::end_of_interrupt();
    });
    local_apic_timer(1);
    count_through("local timer at its fastest", 1000);
    // The deadline is always in the past.
    local_apic::write(register::INITIAL_COUNT, 0);
    if cpu::cpuid(1, 0).ecx & 1 << 24 != 0 {
        set_handler(TIMER, |_| {
            if took() {
                cpu::write_msr(cpu::msr::TSC_DEADLINE, 1);
            }
            local_apic::end_of_interrupt();
        });
        local_apic::write(register::TIMER, timer::TSC_DEADLINE | u32::from(TIMER));
        cpu::write_msr(cpu::msr::TSC_DEADLINE, 1);
        count_through("deadlines in the past", MANY);
        cpu::write_msr(cpu::msr::TSC_DEADLINE, 0);
    } else {
        println!("deadlines in the past: the program goes on");
    }
    local_apic::write(register::TIMER, timer::MASKED);
    clear_handler(TIMER);
}

/// Each interrupt asks for the next, before it ends and after.
fn self_storm() {
    set_handler(SELF, |_| {
        let more = took();
        if more {
            local_apic::interrupt_self(SELF);
        }
        local_apic::end_of_interrupt();
        if more {
            local_apic::interrupt_self(SELF);
        }
    });
    local_apic::interrupt_self(SELF);
    count_through("an interrupt that sends itself", MANY);
    drain();
    clear_handler(SELF);
}

/// Two vectors that send each other.
fn two_levels() {
    set_handler(SELF, |_| {
        let more = took();
        local_apic::end_of_interrupt();
        if more {
            local_apic::interrupt_self(LOWER);
        }
    });
    set_handler(LOWER, |_| {
        let more = took();
        local_apic::end_of_interrupt();
        if more {
            local_apic::interrupt_self(SELF);
        }
    });
    local_apic::interrupt_self(SELF);
    count_through("two interrupts that send each other", MANY);
    drain();
    for vector in [SELF, LOWER] {
        clear_handler(vector);
    }
}

/// Lets what is pending come.
fn drain() {
    cpu::enable_interrupts();
    for _ in 0..100 {
        // SAFETY: has no effect but its time.
        unsafe { asm!("nop") }
    }
    cpu::disable_interrupts();
}

const IO_APIC: u64 = 0xFEC0_0000;
const COM1: u16 = 0x3F8;

fn io_apic(index: u32, value: u32) {
    // SAFETY: the I/O APIC's registers are identity-mapped.
    unsafe {
        (IO_APIC as *mut u32).write_volatile(index);
        ((IO_APIC + 0x10) as *mut u32).write_volatile(value);
    }
}

/// A level-triggered line that stays high: it comes again with every end of interrupt.
fn line_storm() {
    const PIN: u32 = 4;
    const LEVEL: u32 = 1 << 15;
    const MASKED: u32 = 1 << 16;
    set_handler(LINE, |_| {
        if !took() {
            // The line falls.
            port::write8(COM1 + 1, 0);
        }
        local_apic::end_of_interrupt();
    });
    io_apic(0x11 + PIN * 2, local_apic::read(register::ID));
    io_apic(0x10 + PIN * 2, LEVEL | u32::from(LINE));
    // It can send, and is not asked why it interrupts.
    port::write8(COM1 + 1, 0x02);
    count_through("a line that stays high", MANY);
    port::write8(COM1 + 1, 0);
    io_apic(0x10 + PIN * 2, MASKED);
    drain();
    clear_handler(LINE);
}

/// The interval timer at its fastest: 838 ns, through the PIC.
fn pit_storm() {
    set_handler(pic::FIRST_VECTOR, |_| {
        if !took() {
            pic::mask(0);
        }
        pic::end_of_interrupt(0);
    });
    pit::interrupt_every(2);
    pic::unmask(0);
    count_through("interval timer at its fastest", 1000);
    pic::mask(0);
    pit::interrupt_once(0xFFFF);
    drain();
    clear_handler(pic::FIRST_VECTOR);
}

/// Non-maskable interrupts that send the next: each is taken after IRET of the one before.
fn nmi_storm() {
    set_handler(2, |_| {
        if took() {
            local_apic::nmi_self();
        }
    });
    TAKEN.store(0, Relaxed);
    local_apic::nmi_self();
    let mut count = 0u64;
    while TAKEN.load(Relaxed) < MANY {
        count += 1;
    }
    println!("{MANY} NMIs, each sent by the one before: the program goes on");
    println!("note: nmi: counted to {count}");
    clear_handler(2);
}

/// An exception that its handler does not mend, over and over, and interrupts meanwhile.
fn exceptions() {
    set_handler(6, |frame| {
        if TAKEN.fetch_add(1, Relaxed) == FAR {
            frame.rip += 2;
        }
    });
    set_handler(TIMER, |_| local_apic::end_of_interrupt());
    TAKEN.store(0, Relaxed);
    local_apic_timer(1);
    cpu::enable_interrupts();
    // SAFETY: the handler steps over it in the end.
    unsafe { asm!("ud2") }
    cpu::disable_interrupts();
    local_apic::write(register::INITIAL_COUNT, 0);
    local_apic::write(register::TIMER, timer::MASKED);
    drain();
    clear_handler(TIMER);
    clear_handler(6);
    println!(
        "an exception {} times under interrupts: the program goes on",
        TAKEN.load(Relaxed)
    );
}
