//! Any accesses to the chipset's ports, memory, MSRs and lines, at any times: what it says about
//! itself holds, and no timer asks to be woken again and again without time passing.
#![no_main]
#![forbid(unsafe_code)]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use trapgate_chipset::lapic::{MSR_APIC_BASE, MSR_TSC_DEADLINE};
use trapgate_chipset::{Chipset, ChipsetConfig, map};

const CPUS: usize = 3;
const MSR_EOI: u32 = 0x80b;
const MSR_X2APIC: u32 = 0x800;
/// More than any chipset sends on one access: a broadcast to all processors from every pin.
const MOST_SIGNALS: usize = 100;

#[derive(Arbitrary, Debug)]
struct Input {
    x2apic: bool,
    steps: Vec<Step>,
}

/// One access, or one event from outside.
#[derive(Arbitrary, Debug)]
enum Step {
    Wait(Time),
    PortRead(Port, Size),
    PortWrite(Port, Size, u32),
    /// Memory is read as `cpu` sees it.
    MemoryRead(u8, Address, u8),
    MemoryWrite(u8, Address, u8, u64),
    MsrRead(u8, Msr),
    MsrWrite(u8, Msr, u64),
    /// The bootstrap processor's I/O APIC, whose registers lie behind an index.
    Redirect(u8, u32),
    TakeInterrupt(u8),
    EndOfInterrupt(u8),
    SetLine(u8, bool),
    Message(u32, u32),
    Serial(bool, Vec<u8>),
    Key(u16, bool),
    PowerButton,
    SetCr8(u8, u8),
    SetTscOffset(u8, u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Size {
    Byte = 1,
    Word = 2,
    Doubleword = 4,
}

#[derive(Arbitrary, Debug)]
enum Time {
    Nanoseconds(u16),
    Microseconds(u16),
    Milliseconds(u16),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Port {
    Pic(bool, bool),
    Elcr(bool),
    Pit(u8),
    SystemControlB,
    Rtc(bool),
    I8042(bool),
    SystemControlA,
    Serial(bool, u8),
    Pm(u8),
    Any(u16),
}

#[derive(Arbitrary, Debug)]
enum Address {
    IoApic(u16),
    Hpet(u16),
    LocalApic(u16),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Msr {
    Base,
    Deadline,
    X2apic(u8),
    Any(u32),
}

impl Time {
    fn nanoseconds(&self) -> u64 {
        match *self {
            Self::Nanoseconds(count) => count.into(),
            Self::Microseconds(count) => u64::from(count) * 1_000,
            Self::Milliseconds(count) => u64::from(count) * 1_000_000,
            Self::Any(nanoseconds) => nanoseconds,
        }
    }
}

impl Port {
    fn number(&self) -> u16 {
        match *self {
            Self::Pic(false, data) => map::PIC_MASTER_PORT + u16::from(data),
            Self::Pic(true, data) => map::PIC_SLAVE_PORT + u16::from(data),
            Self::Elcr(slave) => map::ELCR_PORT + u16::from(slave),
            Self::Pit(register) => map::PIT_PORT + u16::from(register & 3),
            Self::SystemControlB => map::SYSTEM_CONTROL_B_PORT,
            Self::Rtc(data) => map::RTC_PORT + u16::from(data),
            Self::I8042(false) => map::I8042_DATA_PORT,
            Self::I8042(true) => map::I8042_COMMAND_PORT,
            Self::SystemControlA => map::SYSTEM_CONTROL_A_PORT,
            Self::Serial(second, register) => {
                map::SERIAL_PORTS[usize::from(second)] + u16::from(register & 7)
            }
            Self::Pm(offset) => map::PM_BASE + u16::from(offset & 0x3f),
            Self::Any(port) => port,
        }
    }
}

impl Address {
    fn gpa(&self) -> u64 {
        match *self {
            Self::IoApic(offset) => map::IO_APIC_ADDRESS + u64::from(offset & 0xfff),
            Self::Hpet(offset) => map::HPET_ADDRESS + u64::from(offset & 0x3ff),
            Self::LocalApic(offset) => map::LOCAL_APIC_ADDRESS + u64::from(offset & 0xfff),
            Self::Any(gpa) => gpa,
        }
    }
}

impl Msr {
    fn index(&self) -> u32 {
        match *self {
            Self::Base => MSR_APIC_BASE,
            Self::Deadline => MSR_TSC_DEADLINE,
            Self::X2apic(register) => MSR_X2APIC + u32::from(register),
            Self::Any(index) => index,
        }
    }
}

fuzz_target!(|input: Input| {
    let mut chipset = Chipset::new(ChipsetConfig {
        cpus: CPUS,
        com2: true,
        ..ChipsetConfig::default()
    })
    .expect("the configuration is valid");
    if input.x2apic {
        for cpu in 0..CPUS {
            let base = map::LOCAL_APIC_ADDRESS | 0xc00;
            chipset
                .apic_msr_write(cpu, MSR_APIC_BASE, base, 0)
                .expect("every local APIC can be put into x2APIC mode");
        }
    }
    let mut now = 0;
    for step in &input.steps {
        take(step, &mut chipset, &mut now);
        check(&mut chipset, now);
    }
});

fn take(step: &Step, chipset: &mut Chipset, now: &mut u64) {
    // One more than there are: a processor that is not there asks too.
    let processor = |cpu: u8| usize::from(cpu) % (CPUS + 1);
    let length = |length: u8| usize::from(length % 8) + 1;
    match *step {
        Step::Wait(ref time) => *now = now.saturating_add(time.nanoseconds()),
        Step::PortRead(ref port, size) => {
            chipset.port_read(port.number(), size as u8, *now);
        }
        Step::PortWrite(ref port, size, value) => {
            chipset.port_write(port.number(), size as u8, value, *now);
        }
        Step::MemoryRead(cpu, ref address, size) => {
            let data = &mut [0; 8][..length(size)];
            chipset.mmio_read(processor(cpu), address.gpa(), data, *now);
        }
        Step::MemoryWrite(cpu, ref address, size, value) => {
            let data = &value.to_le_bytes()[..length(size)];
            chipset.mmio_write(processor(cpu), address.gpa(), data, *now);
        }
        // A refusal is #GP in the guest.
        Step::MsrRead(cpu, ref msr) => {
            let _ = chipset.apic_msr_read(processor(cpu), msr.index(), *now);
        }
        Step::MsrWrite(cpu, ref msr, value) => {
            let _ = chipset.apic_msr_write(processor(cpu), msr.index(), value, *now);
        }
        Step::Redirect(index, value) => {
            let select = u32::from(index).to_le_bytes();
            chipset.mmio_write(0, map::IO_APIC_ADDRESS, &select, *now);
            chipset.mmio_write(0, map::IO_APIC_ADDRESS + 0x10, &value.to_le_bytes(), *now);
        }
        Step::TakeInterrupt(cpu) => {
            chipset.take_interrupt(processor(cpu));
        }
        Step::EndOfInterrupt(cpu) => {
            let _ = chipset.apic_msr_write(processor(cpu), MSR_EOI, 0, *now);
        }
        Step::SetLine(gsi, level) => chipset.set_line(gsi.into(), level, *now),
        Step::Message(address, data) => {
            chipset.send_msi(0xfee0_0000 | u64::from(address & 0xf_ffff), data);
        }
        Step::Serial(second, ref bytes) => {
            chipset.serial_receive(second.into(), bytes, *now);
        }
        Step::Key(code, pressed) => chipset.key(code, pressed, *now),
        Step::PowerButton => chipset.press_power_button(*now),
        Step::SetCr8(cpu, value) => chipset.set_cr8(processor(cpu), value),
        Step::SetTscOffset(cpu, offset) => chipset.set_tsc_offset(processor(cpu), offset, *now),
    }
}

fn check(chipset: &mut Chipset, now: u64) {
    chipset.advance(now);
    if let Some(deadline) = chipset.next_deadline() {
        assert!(deadline > now, "deadline {deadline} at {now}");
    }
    for cpu in 0..=CPUS {
        let taken = chipset.clone().take_interrupt(cpu);
        assert_eq!(taken.is_some(), chipset.interrupt_pending(cpu), "{cpu}");
    }
    let effects = chipset.take_effects();
    assert!(effects.signals.iter().all(|signal| signal.cpu < CPUS));
    assert!(
        effects.signals.len() < MOST_SIGNALS,
        "{:?}",
        effects.signals
    );
    assert!(!chipset.has_effects());
}
