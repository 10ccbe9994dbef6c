//! The local APIC (SDM vol. 3A chapter 12): acceptance, priorities, errors, the local vector table, timers.

use core::sync::atomic::{AtomicU32, Ordering::Relaxed};

use runtime::cpu::{self, msr};
use runtime::interrupts::{self, TrapFrame, catch};
use runtime::local_apic::{self, register, timer};
use runtime::{pic, pit};

use crate::lines::{SERIAL, lower, raise};
use crate::{count, drain, forget, print_log, record, say};

const MASKED: u32 = 1 << 16;
const FIXED_SELF: u32 = 1 << 18 | 1 << 14;
const ALL: u32 = 2 << 18 | 1 << 14;
const OTHERS: u32 = 3 << 18 | 1 << 14;
const LOGICAL: u32 = 1 << 11 | 1 << 14;

fn acknowledge(frame: &mut TrapFrame) {
    record(frame);
    local_apic::end_of_interrupt();
}

pub fn show() {
    for vector in 0x40..=0xFE {
        interrupts::set_handler(vector, acknowledge);
    }
    priorities();
    requests();
    destinations();
    errors();
    pins();
    software_disable();
    timers();
    say();
    x2apic();
}

fn priority() -> u32 {
    local_apic::read(register::PROCESSOR_PRIORITY)
}

/// 12.8.3.1: the processor priority's class and subclass.
fn priorities() {
    static IN_HANDLER: [AtomicU32; 2] = [const { AtomicU32::new(0) }; 2];
    fn handler(frame: &mut TrapFrame) {
        record(frame);
        IN_HANDLER[0].store(local_apic::read(register::PROCESSOR_PRIORITY), Relaxed);
        local_apic::write(register::TASK_PRIORITY, 0x83);
        IN_HANDLER[1].store(local_apic::read(register::PROCESSOR_PRIORITY), Relaxed);
        local_apic::write(register::TASK_PRIORITY, 0x10);
        local_apic::end_of_interrupt();
    }
    local_apic::write(register::TASK_PRIORITY, 0x2A);
    println!(
        "task priority 0x2a: processor priority {:#x}, cr8 {:#x}",
        priority(),
        cpu::read_cr8()
    );
    cpu::write_cr8(7);
    println!(
        "cr8 7: task priority {:#x}, processor priority {:#x}",
        local_apic::read(register::TASK_PRIORITY),
        priority()
    );
    local_apic::write(register::TASK_PRIORITY, 0x1F);
    interrupts::set_handler(0x75, handler);
    forget();
    local_apic::interrupt_self(0x75);
    drain();
    println!(
        "0x75 in service: processor priority {:#x}, with a task priority of 0x83 {:#x}",
        IN_HANDLER[0].load(Relaxed),
        IN_HANDLER[1].load(Relaxed)
    );
    // A class that equals the task priority's waits, whatever the lower bits.
    for (task, vector) in [(0x40u32, 0x4Fu8), (0x4F, 0x50), (0x40, 0x50), (0x3F, 0x40)] {
        local_apic::write(register::TASK_PRIORITY, task);
        forget();
        local_apic::interrupt_self(vector);
        drain();
        print!("task priority {task:#x}, vector {vector:#x}: {}", count());
        local_apic::write(register::TASK_PRIORITY, 0);
        drain();
        println!(", at 0 {}", count());
    }
    interrupts::set_handler(0x75, acknowledge);
}

/// 12.8.4: one vector waits once, and once more while it is in service.
fn requests() {
    static AGAIN: AtomicU32 = AtomicU32::new(0);
    fn handler(frame: &mut TrapFrame) {
        record(frame);
        if count() == 1 {
            for _ in 0..3 {
                local_apic::interrupt_self(0x76);
            }
            AGAIN.store(
                u32::from(local_apic::vector_bit(register::REQUESTED, 0x76)) << 1
                    | u32::from(local_apic::vector_bit(register::IN_SERVICE, 0x76)),
                Relaxed,
            );
        }
        local_apic::end_of_interrupt();
    }
    interrupts::set_handler(0x76, handler);
    forget();
    for _ in 0..3 {
        local_apic::interrupt_self(0x76);
    }
    drain();
    println!(
        "three times, and three times in service: {}, requested and in service {:#x}",
        count(),
        AGAIN.load(Relaxed)
    );
    interrupts::set_handler(0x76, acknowledge);
    // An end of interrupt with nothing in service.
    local_apic::end_of_interrupt();
    forget();
    local_apic::interrupt_self(0x76);
    drain();
    println!("after an end of nothing: {}", count());
    // The highest and lowest vectors that may be.
    interrupts::set_handler(0x10, acknowledge_16);
    forget();
    local_apic::interrupt_self(0xFE);
    local_apic::interrupt_self(0x40);
    drain();
    print!("0xfe and 0x40:");
    print_log();
    interrupts::clear_handler(0x10);
}

fn acknowledge_16(frame: &mut TrapFrame) {
    acknowledge(frame);
}

fn command(low: u32, high: u32) -> usize {
    forget();
    local_apic::write(register::COMMAND_HIGH, high << 24);
    local_apic::write(register::COMMAND_LOW, low);
    drain();
    count()
}

/// 12.6.1, 12.6.2: destinations and shorthands of interprocessor interrupts.
fn destinations() {
    let id = local_apic::read(register::ID) >> 24;
    let physical = 1 << 14 | 0x77;
    println!(
        "physical: own {}, another {}, broadcast {}",
        command(physical, id),
        command(physical, id + 1),
        command(physical, 0xFF)
    );
    println!(
        "shorthands: self {}, all {}, others {}",
        command(FIXED_SELF | 0x77, 0),
        command(ALL | 0x77, 0),
        command(OTHERS | 0x77, 0)
    );
    for (what, format, own) in [
        ("flat", 0xFFFF_FFFFu32, 0x10u32),
        ("cluster", 0x0FFF_FFFF, 0x31),
    ] {
        local_apic::write(register::DESTINATION_FORMAT, format);
        local_apic::write(register::LOGICAL_DESTINATION, own << 24);
        print!("logical, {what} {own:#x}:");
        for destination in [0x10u32, 0x01, 0x31, 0x32, 0x21, 0xFF] {
            print!(" {destination:#x} {}", command(LOGICAL | 0x77, destination));
        }
        println!();
    }
    local_apic::write(register::DESTINATION_FORMAT, 0xFFFF_FFFF);
    println!(
        "format register {:#x}, logical destination {:#x}",
        local_apic::read(register::DESTINATION_FORMAT),
        local_apic::read(register::LOGICAL_DESTINATION)
    );
    let lowest = 1 << 8 | LOGICAL | 0x77;
    local_apic::write(register::LOGICAL_DESTINATION, 0x01 << 24);
    println!(
        "lowest priority: {}, to nobody {}",
        command(lowest, 1),
        command(lowest, 2)
    );
    local_apic::write(register::COMMAND_HIGH, 0xFFFF_FFFF);
    local_apic::write(register::COMMAND_LOW, LOGICAL | 0x77);
    drain();
    // Delivery status is the APIC's, and idle.
    println!(
        "command reads back: {:#x} {:#x}",
        local_apic::read(register::COMMAND_HIGH),
        local_apic::read(register::COMMAND_LOW)
    );
}

/// 12.5.3: what was noted since the last write of the register comes with the next write.
fn errors() {
    const VECTOR: u32 = 0x55;
    let status = || {
        local_apic::write(register::ERROR_STATUS, 0);
        local_apic::read(register::ERROR_STATUS)
    };
    status();
    status();
    // Whether it is also an error of receiving (bit 6) is not clear from the manual: left out.
    const SENDING: u32 = !(1 << 6);
    local_apic::interrupt_self(0x0F);
    let before = local_apic::read(register::ERROR_STATUS);
    println!(
        "self-ipi with vector 15: error {before:#x} before a write, {:#x} after, then {:#x}",
        status() & SENDING,
        status()
    );
    // A reserved register (offset 0x40).
    local_apic::read(0x04);
    println!("read of a reserved register: {:#x}", status());
    local_apic::write(0x04, 0);
    println!("write of a reserved register: {:#x}", status());
    local_apic::write(register::TIMER, 0x05);
    local_apic::write(register::DIVIDE, 0b1011);
    local_apic::write(register::INITIAL_COUNT, 1000);
    pit::wait(1000);
    drain();
    println!("timer with vector 5: {:#x}", status());
    local_apic::write(register::TIMER, MASKED);
    // Its interrupt, once until the register is written.
    local_apic::write(register::ERROR, VECTOR);
    forget();
    local_apic::interrupt_self(0x03);
    drain();
    print!("error interrupt:");
    print_log();
    println!("error status {:#x}", status() & SENDING);
    local_apic::write(register::ERROR, MASKED | VECTOR);
    forget();
    local_apic::interrupt_self(0x03);
    drain();
    println!("masked: {}", count());
    status();
    status();
}

/// LINT0, to which the 8259As' output goes, in other modes than ExtINT (12.5.1).
fn pins() {
    const EXTERNAL: u32 = 7 << 8;
    const NMI: u32 = 4 << 8;
    fn non_maskable(frame: &mut TrapFrame) {
        record(frame);
    }
    pic::unmask(SERIAL);
    local_apic::write(register::LINT0, 0x79);
    forget();
    raise(SERIAL);
    drain();
    print!("lint0, fixed:");
    print_log();
    lower(SERIAL);
    pic::remap();
    pic::unmask(SERIAL);
    interrupts::set_handler(2, non_maskable);
    local_apic::write(register::LINT0, NMI);
    forget();
    raise(SERIAL);
    pit::wait(1000);
    print!("lint0, nmi:");
    print_log();
    lower(SERIAL);
    pic::remap();
    pic::unmask(SERIAL);
    local_apic::write(register::LINT0, MASKED | EXTERNAL);
    interrupts::set_handler(0x24, |frame| {
        record(frame);
        pic::end_of_interrupt(SERIAL);
    });
    forget();
    raise(SERIAL);
    drain();
    let masked = count();
    local_apic::write(register::LINT0, EXTERNAL);
    drain();
    print!("lint0, masked: {masked}, then external:");
    print_log();
    lower(SERIAL);
    // The task priority does not hold back external interrupts (12.8.3.1 is of the APIC's own).
    local_apic::write(register::TASK_PRIORITY, 0xF0);
    forget();
    raise(SERIAL);
    drain();
    print!("external with a task priority of 0xf0:");
    print_log();
    lower(SERIAL);
    local_apic::write(register::TASK_PRIORITY, 0);
    pic::remap();
    interrupts::clear_handler(2);
}

/// 12.4.7.2: the table's masks are set and stay, what was accepted stays, IPIs are not accepted.
fn software_disable() {
    local_apic::write(register::TIMER, 0x56);
    local_apic::interrupt_self(0x7A);
    local_apic::write(register::SPURIOUS_VECTOR, 0xFF);
    let table = [
        register::TIMER,
        register::LINT0,
        register::LINT1,
        register::ERROR,
    ]
    .map(local_apic::read);
    print!("software disabled: masks");
    for entry in table {
        print!(" {}", entry >> 16 & 1);
    }
    local_apic::write(register::TIMER, 0x56);
    print!(", timer written {:#x}", local_apic::read(register::TIMER));
    local_apic::interrupt_self(0x7B);
    println!(
        ", requested {} {}",
        u8::from(local_apic::vector_bit(register::REQUESTED, 0x7A)),
        u8::from(local_apic::vector_bit(register::REQUESTED, 0x7B))
    );
    local_apic::write(register::SPURIOUS_VECTOR, 1 << 8 | 0xFF);
    forget();
    drain();
    print!(
        "enabled again: timer {:#x}, taken",
        local_apic::read(register::TIMER)
    );
    print_log();
    local_apic::write(register::LINT0, 7 << 8);
    local_apic::write(register::LINT1, 4 << 8);
}

/// 12.5.4: divider, one-shot and periodic, changes while it runs.
fn timers() {
    const VECTOR: u32 = 0x57;
    // The same count takes twice as long with twice the divider.
    local_apic::write(register::TIMER, MASKED | VECTOR);
    // Ticks in a million of the TSC's: a host that looks away meanwhile stretches both.
    let rate = |divide: u32| {
        local_apic::write(register::DIVIDE, divide);
        let start = cpu::read_tsc();
        local_apic::write(register::INITIAL_COUNT, u32::MAX);
        pit::wait(12_000);
        let count = local_apic::read(register::CURRENT_COUNT);
        let elapsed = cpu::read_tsc() - start;
        local_apic::write(register::INITIAL_COUNT, 0);
        u64::from(u32::MAX - count) * 1_000_000 / elapsed.max(1)
    };
    let right = |divide: u32, by: u64| {
        let (whole, part) = (rate(0b1011), rate(divide));
        (whole.abs_diff(part * by)) * 8 <= whole
    };
    print!("divided by");
    for (divide, by) in [
        (0b0000, 2),
        (0b0001, 4),
        (0b0010, 8),
        (0b0011, 16),
        (0b1000, 32),
        (0b1001, 64),
        (0b1010, 128),
        (0b1011, 1),
    ] {
        // A busy host may get in between a count and its time.
        let right = (0..5).any(|_| right(divide, by));
        print!(" {by} {}", if right { "right" } else { "wrong" });
    }
    println!();
    local_apic::write(register::DIVIDE, 0b1011);
    // Reads of the current count go down; a new initial count starts it anew; 0 stops it.
    local_apic::write(register::INITIAL_COUNT, 1_000_000_000);
    let first = local_apic::read(register::CURRENT_COUNT);
    pit::wait(100);
    let second = local_apic::read(register::CURRENT_COUNT);
    local_apic::write(register::INITIAL_COUNT, 2_000_000_000);
    let third = local_apic::read(register::CURRENT_COUNT);
    local_apic::write(register::INITIAL_COUNT, 0);
    println!(
        "counts down {}, anew {}, stopped {:#x}",
        u8::from(second < first),
        u8::from(third > 1_000_000_000),
        local_apic::read(register::CURRENT_COUNT)
    );
    // Masked while it expires, unmasked afterwards: nothing is pending.
    local_apic::write(register::INITIAL_COUNT, 1000);
    pit::wait(1000);
    forget();
    local_apic::write(register::TIMER, VECTOR);
    drain();
    println!("expired while masked, then unmasked: {}", count());
    // One-shot to periodic while it counts.
    for _ in 0..10 {
        local_apic::write(register::TIMER, VECTOR);
        local_apic::write(register::INITIAL_COUNT, 5_000_000);
        local_apic::write(register::TIMER, VECTOR | timer::PERIODIC);
        if local_apic::read(register::CURRENT_COUNT) != 0 {
            break;
        }
        // The host looked away for the five milliseconds between the writes: it was over.
        drain();
    }
    forget();
    for _ in 0..100 {
        if count() >= 3 {
            break;
        }
        pit::wait(3000);
        drain();
    }
    println!("made periodic while it counts: {}", count().min(3));
    local_apic::write(register::INITIAL_COUNT, 0);
    drain();
    // To and from TSC-deadline mode disarms (12.5.4.1).
    if cpu::cpuid(1, 0).ecx & 1 << 24 != 0 {
        local_apic::write(register::TIMER, VECTOR);
        local_apic::write(register::INITIAL_COUNT, 100_000_000);
        local_apic::write(register::TIMER, VECTOR | timer::TSC_DEADLINE);
        let current = local_apic::read(register::CURRENT_COUNT);
        local_apic::write(register::INITIAL_COUNT, 5000);
        pit::wait(1000);
        forget();
        drain();
        print!(
            "deadline mode: current count {current}, initial count ignored {}",
            u8::from(count() == 0)
        );
        cpu::write_msr(msr::TSC_DEADLINE, cpu::read_tsc() + (1 << 40));
        local_apic::write(register::TIMER, VECTOR);
        println!(
            ", deadline after the mode {:#x}",
            cpu::read_msr(msr::TSC_DEADLINE)
        );
    }
    local_apic::write(register::TIMER, MASKED);
}

/// 12.12: registers as MSRs.
fn x2apic() {
    if !local_apic::has_x2apic() {
        println!("note: no x2apic");
        return;
    }
    let id = local_apic::read(register::ID) >> 24;
    local_apic::switch_to_x2apic();
    println!(
        "x2apic: logical id right {}",
        u8::from(
            local_apic::read(register::LOGICAL_DESTINATION) == (id >> 4) << 16 | 1 << (id & 15)
        )
    );
    for (what, register) in [
        ("destination format", register::DESTINATION_FORMAT),
        ("end of interrupt", register::END_OF_INTERRUPT),
        ("self-ipi", register::SELF_IPI),
        ("a reserved one", 0x04),
        ("high half of the command", register::COMMAND_HIGH),
    ] {
        let ended = catch(read_msr, u64::from(msr::X2APIC_FIRST + register));
        print!("x2apic, read of {what}: ");
        match ended {
            Ok(_) => println!("a value"),
            Err(fault) => println!("vector {}", fault.frame.vector),
        }
    }
    for (what, register, value) in [
        ("logical id", register::LOGICAL_DESTINATION, 1u64),
        ("error status, 1", register::ERROR_STATUS, 1),
        ("error status, 0", register::ERROR_STATUS, 0),
        (
            "spurious vector, reserved bit",
            register::SPURIOUS_VECTOR,
            0x81FF,
        ),
        ("timer, reserved bit", register::TIMER, 1 << 20 | 1 << 16),
        (
            "command, reserved bit",
            register::COMMAND_LOW,
            1 << 13 | 0x4077,
        ),
        ("divide, reserved bit", register::DIVIDE, 1 << 4),
    ] {
        let request = [u64::from(msr::X2APIC_FIRST + register), value];
        let ended = catch(write_msr, &raw const request as u64);
        print!("x2apic, write of {what}: ");
        match ended {
            Ok(_) => println!("taken"),
            Err(fault) => println!("vector {}", fault.frame.vector),
        }
    }
    let send = |value: u64| {
        forget();
        cpu::write_msr(msr::X2APIC_FIRST + register::COMMAND_LOW, value);
        drain();
        count()
    };
    let logical = u64::from(local_apic::read(register::LOGICAL_DESTINATION));
    println!(
        "x2apic, physical: own {}, another {}, broadcast {}; logical: own {}, another bit {}, another cluster {}",
        send(u64::from(id) << 32 | 0x4077),
        send(u64::from(id + 1) << 32 | 0x4077),
        send(0xFFFF_FFFF << 32 | 0x4077),
        send(logical << 32 | 0x4877),
        send((logical ^ 3) << 32 & !(logical << 32) | 0x4877),
        send((logical | 1 << 16) << 32 | 0x4877)
    );
}

unsafe extern "C" fn read_msr(index: u64) -> u64 {
    cpu::read_msr(index as u32)
}

unsafe extern "C" fn write_msr(request: u64) -> u64 {
    // SAFETY: the caller's request outlives the call.
    let [index, value] = unsafe { *(request as *const [u64; 2]) };
    cpu::write_msr(index as u32, value);
    0
}
