//! The devices wired together as a PC's: ports, addresses, interrupt lines, time.

use crate::effects::Effects;
use crate::ticks;

/// The access is refused: the vCPU must see #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the register, a bit of it, or the change of mode is reserved (#GP)")]
pub struct GeneralProtection;

/// A configuration no chipset can be built from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// APIC ID 255 is the broadcast address of xAPIC mode, so there is room for 255 of them.
    #[error("a machine has 1 to 255 CPUs, not {0}")]
    Cpus(usize),
    /// TSC deadlines could not be told in nanoseconds.
    #[error("the time-stamp counter's rate must be more than 0 Hz")]
    TscRate,
    /// `IA32_APIC_BASE` could not hold its reset value, or is not an x86-64 width.
    #[error("physical addresses have 36 to 52 bits, not {0}")]
    PhysicalAddressBits(u8),
}

/// What a [`Chipset`] is built from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChipsetConfig {
    /// Number of vCPUs; vCPU `i` has APIC ID `i`, and vCPU 0 is the bootstrap processor.
    pub cpus: usize,
    /// Rate of the time-stamp counter, Hz: TSC = `now * tsc_hz / 1e9` + the vCPU's offset.
    pub tsc_hz: u64,
    /// UTC at VM time 0, seconds since 1970-01-01.
    pub utc_base: u64,
    /// MAXPHYADDR, which bounds the address in `IA32_APIC_BASE`.
    pub physical_address_bits: u8,
    /// RAM below 4 GiB, bytes, as the CMOS tells it.
    pub memory_below_4g: u64,
    /// RAM above 4 GiB, bytes, as the CMOS tells it.
    pub memory_above_4g: u64,
    /// Whether there is a second serial port.
    pub com2: bool,
}

impl Default for ChipsetConfig {
    /// One vCPU at 1 GHz in 1970 with 128 MiB.
    fn default() -> Self {
        Self {
            cpus: 1,
            tsc_hz: ticks::NS_PER_SECOND,
            utc_base: 0,
            physical_address_bits: 46,
            memory_below_4g: 128 << 20,
            memory_above_4g: 0,
            com2: false,
        }
    }
}

/// The whole chipset. Every `now` is nanoseconds of VM time; it may not run backwards, and where
/// threads race it is held at the latest seen.
#[derive(Clone, Debug)]
pub struct Chipset {
    config: ChipsetConfig,
    effects: Effects,
}

impl Chipset {
    /// Builds the chipset as it is after power-on and what firmware would set up.
    pub fn new(config: ChipsetConfig) -> Result<Self, ConfigError> {
        if !(1..=255).contains(&config.cpus) {
            return Err(ConfigError::Cpus(config.cpus));
        }
        Ok(Self {
            config,
            effects: Effects::default(),
        })
    }

    /// Reads `size` (1, 2 or 4) bytes from ports; `None` where nothing answers (all ones, then).
    pub fn port_read(&mut self, port: u16, size: u8, now: u64) -> Option<u32> {
        let _ = (port, size, now);
        None
    }

    /// Writes `size` (1, 2 or 4) bytes to ports; whether something took it.
    pub fn port_write(&mut self, port: u16, size: u8, value: u32, now: u64) -> bool {
        let _ = (port, size, value, now);
        false
    }

    /// Reads guest-physical addresses as vCPU `cpu`; whether something answered.
    pub fn mmio_read(&mut self, cpu: usize, gpa: u64, data: &mut [u8], now: u64) -> bool {
        let _ = (cpu, gpa, data, now);
        false
    }

    /// Writes guest-physical addresses as vCPU `cpu`; whether something took it.
    pub fn mmio_write(&mut self, cpu: usize, gpa: u64, data: &[u8], now: u64) -> bool {
        let _ = (cpu, gpa, data, now);
        false
    }

    /// Reads `IA32_APIC_BASE` (0x1b), `IA32_TSC_DEADLINE` (0x6e0) or an x2APIC register
    /// (0x800 to 0x83f).
    pub fn apic_msr_read(
        &mut self,
        cpu: usize,
        msr: u32,
        now: u64,
    ) -> Result<u64, GeneralProtection> {
        let _ = (cpu, msr, now);
        Err(GeneralProtection)
    }

    /// Writes one of the registers [`apic_msr_read`](Self::apic_msr_read) reads.
    pub fn apic_msr_write(
        &mut self,
        cpu: usize,
        msr: u32,
        value: u64,
        now: u64,
    ) -> Result<(), GeneralProtection> {
        let _ = (cpu, msr, value, now);
        Err(GeneralProtection)
    }

    /// CR8 of vCPU `cpu`: bits 7:4 of its task priority.
    pub fn cr8(&self, cpu: usize) -> u8 {
        let _ = cpu;
        0
    }

    /// Sets CR8 of vCPU `cpu`.
    pub fn set_cr8(&mut self, cpu: usize, value: u8) {
        let _ = (cpu, value);
    }

    /// What is added to the common time-stamp counter for vCPU `cpu`.
    pub fn tsc_offset(&self, cpu: usize) -> u64 {
        let _ = cpu;
        0
    }

    /// Sets the TSC offset of vCPU `cpu` (wrapping) and moves its TSC deadline with it.
    pub fn set_tsc_offset(&mut self, cpu: usize, offset: u64, now: u64) {
        let _ = (cpu, offset, now);
    }

    /// The page at which vCPU `cpu` sees its APIC registers, if it does (xAPIC mode).
    pub fn apic_page(&self, cpu: usize) -> Option<u64> {
        let _ = cpu;
        None
    }

    /// Asserts or releases an external source's share of a GSI (0 to 23). Sources that share a GSI
    /// are the caller's to OR; the chipset's own devices have shares of their own.
    pub fn set_line(&mut self, gsi: u32, level: bool, now: u64) {
        let _ = (gsi, level, now);
    }

    /// A message-signalled interrupt: the write of `data` to `address` by a device.
    pub fn send_msi(&mut self, address: u64, data: u32) {
        let _ = (address, data);
    }

    /// Whether vCPU `cpu` has an interrupt to take as soon as it accepts one (IF, no shadow).
    pub fn interrupt_pending(&self, cpu: usize) -> bool {
        let _ = cpu;
        false
    }

    /// Acknowledges the interrupt that vCPU `cpu` is to take and returns its vector.
    pub fn take_interrupt(&mut self, cpu: usize) -> Option<u8> {
        let _ = cpu;
        None
    }

    /// Lets the timers that are due at `now` fire.
    pub fn advance(&mut self, now: u64) {
        let _ = now;
    }

    /// When [`advance`](Self::advance) must next be called; `None` while nothing is armed.
    pub fn next_deadline(&mut self) -> Option<u64> {
        None
    }

    /// Hands bytes to a serial port's receiver (0: COM1); how many it took. After fewer than all,
    /// [`Effects::serial_room`] says when to try again.
    pub fn serial_receive(&mut self, port: usize, bytes: &[u8], now: u64) -> usize {
        let _ = (port, bytes, now);
        0
    }

    /// Presses or releases a key by its set 1 make code (0x01 to 0x7f), 0xe0xx for extended keys.
    pub fn key(&mut self, scancode: u16, pressed: bool, now: u64) {
        let _ = (scancode, pressed, now);
    }

    /// Presses the ACPI power button.
    pub fn press_power_button(&mut self, now: u64) {
        let _ = now;
    }

    /// Whether [`take_effects`](Self::take_effects) would return anything.
    pub fn has_effects(&self) -> bool {
        !self.effects.is_empty()
    }

    /// Takes what happened since the last call.
    pub fn take_effects(&mut self) -> Effects {
        std::mem::take(&mut self.effects)
    }

    /// Like [`take_effects`](Self::take_effects), into buffers the caller keeps (their old contents
    /// are dropped).
    pub fn swap_effects(&mut self, into: &mut Effects) {
        into.clear();
        std::mem::swap(&mut self.effects, into);
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &ChipsetConfig {
        &self.config
    }
}
