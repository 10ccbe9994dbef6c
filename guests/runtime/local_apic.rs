//! The local APIC, through memory (xAPIC) or MSRs (x2APIC).

use core::sync::atomic::{AtomicBool, Ordering};

use crate::cpu::{self, msr};

/// Register numbers: the memory offset divided by 16, which is also the MSR's number above 0x800
/// (SDM vol. 3A table 12-6).
pub mod register {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TASK_PRIORITY: u32 = 0x08;
    pub const PROCESSOR_PRIORITY: u32 = 0x0A;
    pub const END_OF_INTERRUPT: u32 = 0x0B;
    pub const LOGICAL_DESTINATION: u32 = 0x0D;
    pub const DESTINATION_FORMAT: u32 = 0x0E;
    pub const SPURIOUS_VECTOR: u32 = 0x0F;
    pub const IN_SERVICE: u32 = 0x10;
    pub const TRIGGER_MODE: u32 = 0x18;
    pub const REQUESTED: u32 = 0x20;
    pub const ERROR_STATUS: u32 = 0x28;
    pub const COMMAND_LOW: u32 = 0x30;
    pub const COMMAND_HIGH: u32 = 0x31;
    pub const TIMER: u32 = 0x32;
    pub const LINT0: u32 = 0x35;
    pub const LINT1: u32 = 0x36;
    pub const ERROR: u32 = 0x37;
    pub const INITIAL_COUNT: u32 = 0x38;
    pub const CURRENT_COUNT: u32 = 0x39;
    pub const DIVIDE: u32 = 0x3E;
    pub const SELF_IPI: u32 = 0x3F;
}

/// Bits of the timer's entry in the local vector table.
pub mod timer {
    pub const MASKED: u32 = 1 << 16;
    pub const PERIODIC: u32 = 1 << 17;
    pub const TSC_DEADLINE: u32 = 2 << 17;
}

const BASE: u64 = 0xFEE0_0000;
const GLOBAL_ENABLE: u64 = 1 << 11;
const X2APIC_ENABLE: u64 = 1 << 10;

static X2APIC: AtomicBool = AtomicBool::new(false);

/// The vector of spurious interrupts.
pub const SPURIOUS_VECTOR: u8 = 0xFF;

/// Turns the APIC on in virtual wire mode: the PIC's interrupts pass through it (SDM vol. 3A
/// 12.1; firmware leaves it like this, but there was no firmware).
pub(crate) fn enable() {
    const HAS_APIC: u32 = 1 << 9;
    const EXTERNAL_INTERRUPT: u32 = 7 << 8;
    const NMI: u32 = 4 << 8;
    if cpu::cpuid(1, 0).edx & HAS_APIC == 0 {
        return;
    }
    cpu::write_msr(
        msr::APIC_BASE,
        cpu::read_msr(msr::APIC_BASE) | GLOBAL_ENABLE,
    );
    write(
        register::SPURIOUS_VECTOR,
        1 << 8 | u32::from(SPURIOUS_VECTOR),
    );
    write(register::TASK_PRIORITY, 0);
    write(register::LINT0, EXTERNAL_INTERRUPT);
    write(register::LINT1, NMI);
}

pub fn has_x2apic() -> bool {
    cpu::cpuid(1, 0).ecx & 1 << 21 != 0
}

pub fn switch_to_x2apic() {
    cpu::write_msr(
        msr::APIC_BASE,
        cpu::read_msr(msr::APIC_BASE) | GLOBAL_ENABLE | X2APIC_ENABLE,
    );
    X2APIC.store(true, Ordering::Relaxed);
}

pub fn read(register: u32) -> u32 {
    if X2APIC.load(Ordering::Relaxed) {
        cpu::read_msr(msr::X2APIC_FIRST + register) as u32
    } else {
        // SAFETY: the APIC's page is identity-mapped, its registers are 16 bytes apart.
        unsafe { ((BASE + u64::from(register) * 16) as *const u32).read_volatile() }
    }
}

pub fn write(register: u32, value: u32) {
    if X2APIC.load(Ordering::Relaxed) {
        cpu::write_msr(msr::X2APIC_FIRST + register, u64::from(value));
    } else {
        // SAFETY: as in `read`.
        unsafe { ((BASE + u64::from(register) * 16) as *mut u32).write_volatile(value) }
    }
}

pub fn end_of_interrupt() {
    write(register::END_OF_INTERRUPT, 0);
}

/// Sends this CPU an interrupt through the command register, with the shorthand "self".
pub fn interrupt_self(vector: u8) {
    write(register::COMMAND_LOW, 1 << 18 | 1 << 14 | u32::from(vector));
}

/// Sends this CPU a non-maskable interrupt. The shorthand "self" is for fixed interrupts only
/// (SDM vol. 3A table 12-3), so the destination is spelled out.
pub fn nmi_self() {
    const NMI: u32 = 4 << 8 | 1 << 14;
    let id = read(register::ID);
    if X2APIC.load(Ordering::Relaxed) {
        cpu::write_msr(
            msr::X2APIC_FIRST + register::COMMAND_LOW,
            u64::from(id) << 32 | u64::from(NMI),
        );
    } else {
        write(register::COMMAND_HIGH, id);
        write(register::COMMAND_LOW, NMI);
    }
}

/// Whether the bit of `vector` is set in the 256-bit register that starts at `first`
/// ([`register::IN_SERVICE`], [`register::REQUESTED`]).
pub fn vector_bit(first: u32, vector: u8) -> bool {
    read(first + u32::from(vector / 32)) & 1 << (vector % 32) != 0
}
