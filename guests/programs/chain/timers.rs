//! The interrupts that arrive while the chain runs.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};

use runtime::cpu::{self, msr};
use runtime::interrupts::{self, TrapFrame};
use runtime::local_apic::{self, register, timer};
use runtime::{pic, pit, time};

const LOCAL: u8 = 0x41;
const THROUGH_THE_IO_APIC: u8 = 0x42;
const DIVIDE_BY_1: u32 = 0b1011;
const MASKED: u32 = 1 << 16;

/// How the local timer is used.
const PERIODIC: usize = 0;
const ONCE: usize = 1;
const DEADLINE: usize = 2;

static MODE: AtomicUsize = AtomicUsize::new(PERIODIC);
static HAS_DEADLINE: AtomicBool = AtomicBool::new(false);
static TICK_MICROSECONDS: AtomicU64 = AtomicU64::new(0);
/// Counts of the local timer, and ticks of the TSC, in a tick.
static LOCAL_COUNT: AtomicU64 = AtomicU64::new(0);
static TSC_COUNT: AtomicU64 = AtomicU64::new(0);
static LOCAL_TICKS: AtomicU64 = AtomicU64::new(0);
static PIT_TICKS: AtomicU64 = AtomicU64::new(0);

pub fn start(tick: u64) {
    TICK_MICROSECONDS.store(tick.clamp(50, 50_000), Relaxed);
    HAS_DEADLINE.store(cpu::cpuid(1, 0).ecx & 1 << 24 != 0, Relaxed);
    interrupts::set_handler(LOCAL, local_tick);
    interrupts::set_handler(pic::FIRST_VECTOR, tick_through_the_pic);
    interrupts::set_handler(THROUGH_THE_IO_APIC, tick_through_the_io_apic);
    measure();
    pit::interrupt_every((TICK_MICROSECONDS.load(Relaxed) * 2 * 1193 / 1000).min(65_535) as u16);
    change(0);
}

/// How fast the local timer counts, by the interval timer.
fn measure() {
    const TICKS: u16 = 1193; // 1 ms
    local_apic::write(register::DIVIDE, DIVIDE_BY_1);
    local_apic::write(register::TIMER, timer::MASKED);
    local_apic::write(register::INITIAL_COUNT, u32::MAX);
    let before = local_apic::read(register::CURRENT_COUNT);
    pit::wait(TICKS);
    let elapsed = u64::from(before - local_apic::read(register::CURRENT_COUNT));
    local_apic::write(register::INITIAL_COUNT, 0);
    let tick = TICK_MICROSECONDS.load(Relaxed);
    LOCAL_COUNT.store((elapsed * tick / 1000).clamp(1, u32::MAX.into()), Relaxed);
    TSC_COUNT.store(time::tsc_frequency().hertz * tick / 1_000_000, Relaxed);
}

/// Another mode of the local timer, another way for the interval timer's interrupts.
pub fn change(part: u64) {
    let on = cpu::read_rflags() & 1 << 9 != 0;
    cpu::disable_interrupts();
    local_apic::write(register::INITIAL_COUNT, 0);
    let mode = match part as usize % 3 {
        DEADLINE if !HAS_DEADLINE.load(Relaxed) => ONCE,
        mode => mode,
    };
    MODE.store(mode, Relaxed);
    let kind = [timer::PERIODIC, 0, timer::TSC_DEADLINE][mode];
    local_apic::write(register::TIMER, u32::from(LOCAL) | kind);
    arm();
    let through_the_pic = part % 2 == 0;
    let entry = u32::from(THROUGH_THE_IO_APIC);
    route(if through_the_pic {
        entry | MASKED
    } else {
        entry
    });
    if through_the_pic {
        pic::unmask(0);
    } else {
        pic::mask(0);
    }
    if on {
        cpu::enable_interrupts();
    }
}

pub fn stop() {
    cpu::disable_interrupts();
    local_apic::write(register::INITIAL_COUNT, 0);
    local_apic::write(register::TIMER, timer::MASKED);
    route(MASKED);
    pic::mask(0);
}

fn arm() {
    if MODE.load(Relaxed) == DEADLINE {
        cpu::write_msr(msr::TSC_DEADLINE, cpu::read_tsc() + TSC_COUNT.load(Relaxed));
    } else {
        local_apic::write(register::INITIAL_COUNT, LOCAL_COUNT.load(Relaxed) as u32);
    }
}

fn local_tick(_: &mut TrapFrame) {
    LOCAL_TICKS.fetch_add(1, Relaxed);
    if MODE.load(Relaxed) != PERIODIC {
        arm();
    }
    local_apic::end_of_interrupt();
}

fn tick_through_the_pic(_: &mut TrapFrame) {
    PIT_TICKS.fetch_add(1, Relaxed);
    pic::end_of_interrupt(0);
}

fn tick_through_the_io_apic(_: &mut TrapFrame) {
    PIT_TICKS.fetch_add(1, Relaxed);
    local_apic::end_of_interrupt();
}

/// Halts until each timer has ticked once more: a timer that was lost is noticed here, as a guest
/// that does not end.
pub fn wait_for_each() {
    for ticks in [&LOCAL_TICKS, &PIT_TICKS] {
        let before = ticks.load(Relaxed);
        while ticks.load(Relaxed) == before {
            // SAFETY: no memory is touched. Both timers tick again and again, so one that ticks
            // between the check and HLT does no harm.
            unsafe { asm!("hlt", options(nostack)) }
        }
    }
}

pub fn summary() -> &'static str {
    match (LOCAL_TICKS.load(Relaxed), PIT_TICKS.load(Relaxed)) {
        (0, 0) => "none",
        (0, _) => "the interval timer's only",
        (_, 0) => "the local apic's only",
        _ => "the local apic's and the interval timer's",
    }
}

/// The interval timer's entry in the I/O APIC. It is on pin 2 of most machines, on pin 0 of some.
fn route(entry: u32) {
    let destination = local_apic::read(register::ID) & 0xFF00_0000;
    for pin in [0, 2] {
        write_io_apic(0x11 + 2 * pin, destination);
        write_io_apic(0x10 + 2 * pin, entry);
    }
}

pub fn write_io_apic(register: u32, value: u32) {
    // SAFETY: the I/O APIC's registers are identity-mapped.
    unsafe {
        (0xFEC0_0000 as *mut u32).write_volatile(register);
        (0xFEC0_0010 as *mut u32).write_volatile(value);
    }
}

pub fn read_io_apic(register: u32) -> u32 {
    // SAFETY: as above.
    unsafe {
        (0xFEC0_0000 as *mut u32).write_volatile(register);
        (0xFEC0_0010 as *const u32).read_volatile()
    }
}
