//! Interrupts from the PIC, the local APIC and the I/O APIC: when they arrive, and in what order.
#![no_std]
#![no_main]

mod bodies;

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use runtime::cpu::{self, msr};
use runtime::interrupts::{self, TrapFrame, catch};
use runtime::local_apic::{self, register, timer};
use runtime::{pic, pit, print, println, segments, time};

runtime::entry!(run);

fn run() {
    FREQUENCY.store(time::tsc_frequency().hertz, Relaxed);
    through_the_pic();
    when_it_arrives();
    priorities();
    nested();
    non_maskable();
    local_timer();
    deadline_timer();
    io_apic();
    in_a_string_instruction();
    x2apic();
    println!("interrupts: done");
}

static FREQUENCY: AtomicU64 = AtomicU64::new(0);

/// The vectors of the interrupts since the last [`forget`], in order.
static LOG: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];
static COUNT: AtomicUsize = AtomicUsize::new(0);
static LAST_RIP: AtomicU64 = AtomicU64::new(0);
static NMI_DEPTH: AtomicUsize = AtomicUsize::new(0);
static NMI_DEEPEST: AtomicUsize = AtomicUsize::new(0);

fn forget() {
    COUNT.store(0, Relaxed);
}

fn count() -> usize {
    COUNT.load(Relaxed)
}

fn record(frame: &TrapFrame) {
    let index = COUNT.fetch_add(1, Relaxed);
    if let Some(slot) = LOG.get(index) {
        slot.store(frame.vector as usize, Relaxed);
    }
    LAST_RIP.store(frame.rip, Relaxed);
}

fn print_log() {
    for slot in LOG.iter().take(count()) {
        print!(" {:#x}", slot.load(Relaxed));
    }
    println!();
}

/// Lets interrupts in until `enough` have come, for two seconds at most.
fn wait_for(enough: usize) -> usize {
    let end = cpu::read_tsc() + 2 * FREQUENCY.load(Relaxed);
    while count() < enough && cpu::read_tsc() < end {
        bodies::breathe();
    }
    count()
}

fn acknowledge(frame: &mut TrapFrame) {
    record(frame);
    local_apic::end_of_interrupt();
}

fn through_the_pic() {
    static IN_SERVICE: AtomicU64 = AtomicU64::new(0);
    static AFTERWARDS: AtomicU64 = AtomicU64::new(0);
    fn timer_tick(frame: &mut TrapFrame) {
        record(frame);
        IN_SERVICE.store(pic::in_service().into(), Relaxed);
        pic::end_of_interrupt(0);
        AFTERWARDS.store(pic::in_service().into(), Relaxed);
    }
    interrupts::set_handler(pic::FIRST_VECTOR, timer_tick);
    forget();
    pic::unmask(0);
    pit::interrupt_once(1000);
    wait_for(1);
    print!("pit once:");
    print_log();
    println!(
        "pit in service: {:#x}, after the end of interrupt {:#x}",
        IN_SERVICE.load(Relaxed),
        AFTERWARDS.load(Relaxed)
    );

    forget();
    pit::interrupt_every(1000);
    println!("pit periodic: {}", wait_for(5).min(5));
    pic::mask(0);

    // What a masked line asks for waits in the request register.
    pit::interrupt_once(1000);
    pit::wait(5000);
    forget();
    bodies::breathe();
    print!(
        "pit masked: requested {}, delivered {}, ",
        pic::requested() & 1,
        count()
    );
    pic::unmask(0);
    println!("unmasked {}", wait_for(1));
    pic::mask(0);
}

/// How many instructions run between the one that lets interrupts in and a waiting interrupt
/// (SDM vol. 3A 7.8.1, vol. 2B STI).
fn when_it_arrives() {
    const VECTOR: u8 = 0x50;
    interrupts::set_handler(VECTOR, acknowledge);
    let arrives = |what: &str, door: extern "C" fn() -> u64| {
        forget();
        local_apic::interrupt_self(VECTOR);
        let behind = door();
        match count() {
            0 => println!("{what}: not delivered"),
            _ => println!(
                "{what}: after {} instructions",
                LAST_RIP.load(Relaxed) - behind
            ),
        }
    };
    arrives("sti", bodies::sti);
    arrives("sti and cli", bodies::sti_cli);
    println!("left over from sti and cli: {}", wait_for(1));
    arrives("popf", bodies::popf);
    arrives("iret", bodies::iret);
    arrives("sti and hlt", bodies::sti_hlt);
    cpu::write_cr8(15);
    forget();
    local_apic::interrupt_self(VECTOR);
    bodies::breathe();
    print!("cr8=15: {}, ", count());
    bodies::lower_cr8();
    println!("cr8=0: {}", wait_for(1));
}

/// SDM vol. 3A 12.8.3 and 12.8.4.
fn priorities() {
    for vector in [0x41, 0x51, 0x52, 0x61] {
        interrupts::set_handler(vector, acknowledge);
    }
    let send = || {
        forget();
        for vector in [0x51, 0x41, 0x61, 0x52, 0x51] {
            local_apic::interrupt_self(vector);
        }
    };
    send();
    let requested = |vector| u8::from(local_apic::vector_bit(register::REQUESTED, vector));
    println!(
        "requested: {} {} {}",
        requested(0x41),
        requested(0x52),
        requested(0x60)
    );
    wait_for(4);
    print!("highest first, the same one once:");
    print_log();

    local_apic::write(register::TASK_PRIORITY, 0x50);
    println!(
        "task priority 0x50: cr8 {:#x}, processor priority {:#x}",
        cpu::read_cr8(),
        local_apic::read(register::PROCESSOR_PRIORITY)
    );
    send();
    wait_for(1);
    bodies::breathe();
    print!("task priority 0x50:");
    print_log();
    cpu::write_cr8(4);
    wait_for(3);
    println!(
        "cr8=4: task priority {:#x}",
        local_apic::read(register::TASK_PRIORITY)
    );
    print!("cr8=4:");
    print_log();
    cpu::write_cr8(0);
    wait_for(4);
    print!("cr8=0:");
    print_log();
}

/// A handler that lets interrupts in is interrupted by higher classes only (a class is the
/// vector's upper four bits). These gates have no interrupt stack: a second interrupt would
/// overwrite the first one's frame on it.
fn nested() {
    fn outer(frame: &mut TrapFrame) {
        record(frame);
        println!(
            "in 0x51: processor priority {:#x}, in service {}",
            local_apic::read(register::PROCESSOR_PRIORITY),
            u8::from(local_apic::vector_bit(register::IN_SERVICE, 0x51))
        );
        for vector in [0x41, 0x52, 0x61] {
            local_apic::interrupt_self(vector);
        }
        bodies::breathe();
        println!("in 0x51: {} so far", count());
        local_apic::end_of_interrupt();
    }
    for vector in [0x41, 0x51, 0x52, 0x61] {
        interrupts::set_gate(
            vector,
            segments::KERNEL_CODE,
            interrupts::stub_address(vector),
            0x8E,
            0,
        );
    }
    interrupts::set_handler(0x51, outer);
    forget();
    local_apic::interrupt_self(0x51);
    wait_for(4);
    print!("nested:");
    print_log();
    interrupts::load();
}

/// An NMI needs no IF, and the next one waits for the IRET of the first (SDM vol. 3A 7.7.1).
fn non_maskable() {
    fn handler(frame: &mut TrapFrame) {
        record(frame);
        NMI_DEEPEST.fetch_max(NMI_DEPTH.fetch_add(1, Relaxed) + 1, Relaxed);
        if count() == 1 {
            local_apic::nmi_self();
            pit::wait(100);
        }
        NMI_DEPTH.fetch_sub(1, Relaxed);
    }
    interrupts::set_handler(2, handler);
    forget();
    local_apic::nmi_self();
    pit::wait(1000);
    println!(
        "nmi with interrupts off: {}, at most {} at a time",
        count(),
        NMI_DEEPEST.load(Relaxed)
    );
}

/// SDM vol. 3A 12.5.4.
fn local_timer() {
    const VECTOR: u8 = 0x45;
    const DIVIDE_BY_1: u32 = 0b1011;
    interrupts::set_handler(VECTOR, acknowledge);
    local_apic::write(register::DIVIDE, DIVIDE_BY_1);

    forget();
    local_apic::write(register::TIMER, u32::from(VECTOR));
    local_apic::write(register::INITIAL_COUNT, 10_000);
    wait_for(1);
    pit::wait(1000);
    bodies::breathe();
    println!(
        "timer once: {}, current count {}",
        count(),
        local_apic::read(register::CURRENT_COUNT)
    );

    forget();
    local_apic::write(register::TIMER, u32::from(VECTOR) | timer::PERIODIC);
    local_apic::write(register::INITIAL_COUNT, 100_000);
    println!("timer periodic: {}", wait_for(3).min(3));
    local_apic::write(register::INITIAL_COUNT, 0);
    bodies::breathe();
    forget();
    pit::wait(10_000);
    bodies::breathe();
    println!("timer stopped by an initial count of 0: {}", count());

    forget();
    local_apic::write(register::TIMER, u32::from(VECTOR) | timer::MASKED);
    local_apic::write(register::INITIAL_COUNT, 10_000);
    pit::wait(10_000);
    bodies::breathe();
    println!(
        "timer masked: {}, current count {}",
        count(),
        local_apic::read(register::CURRENT_COUNT)
    );
}

fn deadline_timer() {
    const VECTOR: u8 = 0x46;
    if cpu::cpuid(1, 0).ecx & 1 << 24 == 0 {
        println!("note: no tsc-deadline timer");
        return;
    }
    interrupts::set_handler(VECTOR, acknowledge);
    local_apic::write(register::TIMER, u32::from(VECTOR) | timer::TSC_DEADLINE);
    let armed = |what: &str, deadline: u64| {
        forget();
        cpu::write_msr(msr::TSC_DEADLINE, deadline);
        let reached = wait_for(1) == 1 && cpu::read_tsc() >= deadline;
        println!(
            "tsc deadline {what}: delivered {}, then reads {:#x}",
            u8::from(reached),
            cpu::read_msr(msr::TSC_DEADLINE)
        );
    };
    armed("ahead", cpu::read_tsc() + FREQUENCY.load(Relaxed) / 1000);
    armed("in the past", 1);
    forget();
    // 40 ms ahead, so that a host which looks away between the two writes does no harm; the wait
    // takes 50.
    cpu::write_msr(
        msr::TSC_DEADLINE,
        cpu::read_tsc() + FREQUENCY.load(Relaxed) / 25,
    );
    cpu::write_msr(msr::TSC_DEADLINE, 0);
    pit::wait(60_000);
    bodies::breathe();
    println!("tsc deadline taken back: {}", count());
    local_apic::write(register::TIMER, timer::MASKED);
}

/// The interval timer through the I/O APIC. It is on pin 2 of most machines, on pin 0 of some.
fn io_apic() {
    const VECTOR: u8 = 0x48;
    const SELECT: *mut u32 = 0xFEC0_0000 as *mut u32;
    const WINDOW: *mut u32 = 0xFEC0_0010 as *mut u32;
    const MASKED: u32 = 1 << 16;
    let write = |register: u32, value: u32| {
        // SAFETY: the I/O APIC's registers are identity-mapped.
        unsafe {
            SELECT.write_volatile(register);
            WINDOW.write_volatile(value);
        }
    };
    interrupts::set_handler(VECTOR, acknowledge);
    let destination = local_apic::read(register::ID) & 0xFF00_0000;
    for pin in [0, 2] {
        write(0x11 + 2 * pin, destination);
        write(0x10 + 2 * pin, u32::from(VECTOR));
    }
    forget();
    pit::interrupt_once(1000);
    wait_for(1);
    for pin in [0, 2] {
        write(0x10 + 2 * pin, MASKED);
    }
    print!("through the i/o apic:");
    print_log();
}

/// A string instruction is interrupted between its steps and goes on (SDM vol. 2B REP).
fn in_a_string_instruction() {
    const SIZE: usize = 1 << 20;
    static mut FROM: [u8; SIZE] = [0; SIZE];
    static mut TO: [u8; SIZE] = [0; SIZE];
    const VECTOR: u8 = 0x47;
    interrupts::set_handler(VECTOR, acknowledge);
    // SAFETY: the only use; the handlers touch neither.
    let (from, to) = unsafe { (&mut *(&raw mut FROM), &mut *(&raw mut TO)) };
    for (index, byte) in from.iter_mut().enumerate() {
        *byte = (index ^ index >> 8) as u8;
    }
    forget();
    local_apic::write(register::TIMER, u32::from(VECTOR) | timer::PERIODIC);
    local_apic::write(register::INITIAL_COUNT, 200_000);
    let (mut rounds, mut wrong) = (0, 0);
    while count() < 10 && rounds < 2000 {
        to.fill(0);
        // SAFETY: both have SIZE bytes.
        unsafe { bodies::copy(to.as_mut_ptr(), from.as_ptr(), SIZE) }
        wrong += usize::from(from[..] != to[..]);
        rounds += 1;
    }
    local_apic::write(register::INITIAL_COUNT, 0);
    local_apic::write(register::TIMER, timer::MASKED);
    println!(
        "copies under interrupts: {} interrupts, {wrong} wrong",
        count().min(10)
    );
    bodies::breathe();
}

/// SDM vol. 3A 12.12.
fn x2apic() {
    if !local_apic::has_x2apic() {
        println!("note: no x2apic");
        return;
    }
    let id = local_apic::read(register::ID) >> 24;
    local_apic::switch_to_x2apic();
    println!(
        "x2apic: same id {}",
        u8::from(local_apic::read(register::ID) == id)
    );
    interrupts::set_handler(0x53, acknowledge);
    forget();
    local_apic::write(register::SELF_IPI, 0x53);
    local_apic::interrupt_self(0x61);
    wait_for(2);
    print!("x2apic self-ipi:");
    print_log();
    forget();
    local_apic::nmi_self();
    pit::wait(100);
    println!("x2apic nmi: {}", count().min(1));
    local_apic::write(register::TASK_PRIORITY, 0x30);
    println!("x2apic task priority 0x30: cr8 {:#x}", cpu::read_cr8());
    local_apic::write(register::TASK_PRIORITY, 0);

    let refused = |what: &str, register: u32, value: u64| {
        let request = Request {
            index: msr::X2APIC_FIRST + register,
            value,
        };
        let ended = catch(write_msr, &raw const request as u64);
        println!(
            "x2apic, {what}: {}",
            ended.map_or_else(|fault| fault.frame.vector, |_| 0)
        );
    };
    refused("end of interrupt with 1", register::END_OF_INTERRUPT, 1);
    refused("write to the id", register::ID, 0);
    refused("write to the version", register::VERSION, 0);
    refused(
        "write to the high half of the command",
        register::COMMAND_HIGH,
        0,
    );
    refused(
        "a reserved bit of the task priority",
        register::TASK_PRIORITY,
        0x100,
    );
    let base = cpu::read_msr(msr::APIC_BASE);
    let back = Request {
        index: msr::APIC_BASE,
        value: base & !(1 << 10),
    };
    let ended = catch(write_msr, &raw const back as u64);
    println!(
        "x2apic back to xapic: {}",
        ended.map_or_else(|fault| fault.frame.vector, |_| 0)
    );
}

struct Request {
    index: u32,
    value: u64,
}

unsafe extern "C" fn write_msr(request: u64) -> u64 {
    // SAFETY: the caller's request outlives the call.
    let request = unsafe { &*(request as *const Request) };
    cpu::write_msr(request.index, request.value);
    0
}
