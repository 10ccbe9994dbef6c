//! The devices wired together as a PC's: ports, addresses, interrupt lines, time.

use crate::acpi_pm::AcpiPm;
use crate::effects::{CpuSignal, Effects, PowerRequest, Signal};
use crate::hpet::Hpet;
use crate::i8042::I8042;
use crate::ioapic::IoApic;
use crate::lapic::{
    ApicAction, Delivery, Destination, InterruptMessage, Ipi, LocalApic, Shorthand,
};
use crate::map;
use crate::pic::Pic;
use crate::pit::Pit;
use crate::rtc::Rtc;
use crate::serial::Serial;
use crate::ticks;

mod lent;
mod ports;
mod saved;
#[cfg(test)]
mod tests;

pub use lent::ControllersState;
pub use saved::{BoardState, ChipsetState, RestoreError};

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
    /// UTC at VM time 0, nanoseconds since 1970-01-01.
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

impl ChipsetConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        if !(1..=255).contains(&self.cpus) {
            return Err(ConfigError::Cpus(self.cpus));
        }
        if self.tsc_hz == 0 {
            return Err(ConfigError::TscRate);
        }
        if !(36..=52).contains(&self.physical_address_bits) {
            return Err(ConfigError::PhysicalAddressBits(self.physical_address_bits));
        }
        Ok(())
    }
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

/// Who asserts a GSI; a line is high while anybody does.
mod source {
    /// A device outside of the chipset.
    pub(super) const EXTERNAL: u8 = 1;
    /// The chipset's own device on that line.
    pub(super) const DEVICE: u8 = 2;
    /// An edge-triggered HPET timer in legacy mode, which stays high until its next edge.
    pub(super) const HPET_EDGE: u8 = 4;
    /// A level-triggered HPET timer.
    pub(super) const HPET_LEVEL: u8 = 8;
}

/// The whole chipset. Every `now` is nanoseconds of VM time; where vCPU threads race and one is late,
/// its `now` is taken as the latest seen.
///
/// After each call, ask [`has_effects`](Self::has_effects); effects that are not taken add up.
#[derive(Clone, Debug)]
pub struct Chipset {
    config: ChipsetConfig,
    effects: Effects,
    has_effects: bool,
    now: u64,
    /// When [`advance`](Self::advance) has something to do; `u64::MAX` for never. May be too early.
    deadline: u64,
    deadline_is_stale: bool,
    /// Somebody else runs the interrupt controllers, see [`lent`].
    lent: bool,
    apics: Vec<LocalApic>,
    /// What [`interrupt_pending`](Self::interrupt_pending) answers, by vCPU.
    pending: Vec<bool>,
    /// Where the search for the next lowest-priority destination begins, so that equals take turns.
    lowest_priority_turn: usize,
    io_apic: IoApic,
    /// Sources that assert each GSI.
    lines: [u8; map::IO_APIC_PINS as usize],
    pic: Pic,
    pit: Pit,
    rtc: Rtc,
    hpet: Hpet,
    pm: AcpiPm,
    serial: [Serial; 2],
    i8042: I8042,
    reset_control: u8,
    post_code: u8,
}

impl Chipset {
    /// Builds the chipset as it is after power-on and what firmware would set up: the bootstrap
    /// processor in virtual wire mode, 8259As masked, RTC running.
    pub fn new(config: ChipsetConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        let mut apics: Vec<LocalApic> = (0..config.cpus as u32)
            .map(|id| LocalApic::new(id, config.tsc_hz, config.physical_address_bits))
            .collect();
        apics[0].set_virtual_wire();
        Ok(Self {
            effects: Effects::default(),
            has_effects: false,
            now: 0,
            deadline: u64::MAX,
            deadline_is_stale: true,
            pending: vec![false; config.cpus],
            lowest_priority_turn: 0,
            lent: false,
            apics,
            io_apic: IoApic::new(),
            lines: [0; map::IO_APIC_PINS as usize],
            pic: Pic::new(),
            pit: Pit::new(),
            rtc: Rtc::new(
                config.utc_base,
                config.memory_below_4g,
                config.memory_above_4g,
            ),
            hpet: Hpet::new(),
            pm: AcpiPm::new(),
            serial: [Serial::new(), Serial::new()],
            i8042: I8042::new(),
            reset_control: 0,
            post_code: 0,
            config,
        })
    }

    /// The configuration it was built from.
    pub fn config(&self) -> &ChipsetConfig {
        &self.config
    }

    fn clock(&mut self, now: u64) -> u64 {
        self.now = self.now.max(now);
        self.now
    }

    // Effects

    /// Whether [`take_effects`](Self::take_effects) would return anything.
    pub fn has_effects(&self) -> bool {
        self.has_effects
    }

    /// Takes what happened since the last call.
    pub fn take_effects(&mut self) -> Effects {
        self.has_effects = false;
        std::mem::take(&mut self.effects)
    }

    /// Like [`take_effects`](Self::take_effects), into buffers the caller keeps (their old contents
    /// are dropped).
    pub fn swap_effects(&mut self, into: &mut Effects) {
        into.clear();
        self.has_effects = false;
        std::mem::swap(&mut self.effects, into);
    }

    fn signal(&mut self, cpu: usize, kind: CpuSignal) {
        self.effects.signals.push(Signal { cpu, kind });
        self.has_effects = true;
    }

    fn request_power(&mut self, request: PowerRequest) {
        self.effects.power.get_or_insert(request);
        self.has_effects = true;
    }

    // Interrupts to vCPUs

    /// Whether vCPU `cpu` has an interrupt to take as soon as it accepts one (IF, no shadow).
    pub fn interrupt_pending(&self, cpu: usize) -> bool {
        self.pending.get(cpu).copied().unwrap_or(false)
    }

    /// Acknowledges the interrupt that vCPU `cpu` is to take and returns its vector.
    pub fn take_interrupt(&mut self, cpu: usize) -> Option<u8> {
        if !self.interrupt_pending(cpu) {
            return None;
        }
        let vector = if cpu == 0 && self.pic_interrupts() {
            let vector = self.pic.acknowledge();
            self.pic_output_changed();
            Some(vector)
        } else {
            self.apics[cpu].acknowledge()
        };
        self.refresh(cpu);
        vector
    }

    /// The 8259As' output is wired to LINT0 of the bootstrap processor only.
    fn pic_interrupts(&self) -> bool {
        self.pic.output() && self.apics[0].accepts_ext_int()
    }

    /// Brings [`interrupt_pending`](Self::interrupt_pending) up to date after a change to a vCPU's
    /// APIC or, for vCPU 0, to the 8259As.
    fn refresh(&mut self, cpu: usize) {
        let pending = self.apics[cpu].deliverable().is_some() || cpu == 0 && self.pic_interrupts();
        if pending && !self.pending[cpu] {
            self.signal(cpu, CpuSignal::Interrupt);
        }
        self.pending[cpu] = pending;
    }

    fn pic_output_changed(&mut self) {
        if self.apics[0].set_lint(0, self.pic.output()) {
            self.signal(0, CpuSignal::Nmi);
        }
        self.refresh(0);
    }

    /// Sends a message to whom it is for; whether anybody took it.
    fn deliver(&mut self, message: InterruptMessage) -> bool {
        if message.delivery == Delivery::LowestPriority {
            return self
                .lowest_priority(message.destination)
                .is_some_and(|cpu| self.deliver_to(cpu, message));
        }
        if let Destination::Physical(id) = message.destination {
            // vCPU i has APIC ID i.
            let cpu = id as usize;
            return cpu < self.apics.len() && self.deliver_to(cpu, message);
        }
        let mut taken = false;
        for cpu in 0..self.apics.len() {
            taken |=
                self.apics[cpu].is_addressed(message.destination) && self.deliver_to(cpu, message);
        }
        taken
    }

    fn lowest_priority(&mut self, destination: Destination) -> Option<usize> {
        let cpus = self.apics.len();
        let cpu = (0..cpus)
            .map(|step| (self.lowest_priority_turn + step) % cpus)
            .filter(|&cpu| {
                self.apics[cpu].accepts_fixed() && self.apics[cpu].is_addressed(destination)
            })
            .min_by_key(|&cpu| self.apics[cpu].ppr())?;
        self.lowest_priority_turn = (cpu + 1) % cpus;
        Some(cpu)
    }

    fn deliver_to(&mut self, cpu: usize, message: InterruptMessage) -> bool {
        if !self.apics[cpu].is_globally_enabled() {
            return false;
        }
        match message.delivery {
            Delivery::Fixed | Delivery::LowestPriority => {
                let taken = self.apics[cpu].accept(message.vector, message.level);
                self.refresh(cpu);
                return taken;
            }
            Delivery::Nmi => self.signal(cpu, CpuSignal::Nmi),
            Delivery::Init => {
                self.apics[cpu].reset();
                self.deadline_is_stale = true;
                self.refresh(cpu);
                self.signal(cpu, CpuSignal::Init);
            }
            Delivery::StartUp => self.signal(cpu, CpuSignal::Sipi(message.vector)),
            Delivery::Smi | Delivery::Reserved | Delivery::ExtInt => return false,
        }
        true
    }

    fn send_ipi(&mut self, from: usize, ipi: Ipi) {
        let except = match ipi.shorthand {
            Shorthand::None => {
                self.deliver(ipi.message);
                return;
            }
            Shorthand::ToSelf => {
                self.deliver_to(from, ipi.message);
                return;
            }
            Shorthand::AllIncludingSelf => None,
            Shorthand::AllExcludingSelf => Some(from),
        };
        for cpu in (0..self.apics.len()).filter(|&cpu| Some(cpu) != except) {
            self.deliver_to(cpu, ipi.message);
        }
    }

    /// A message-signalled interrupt: the write of `data` to `address` by a device.
    pub fn send_msi(&mut self, address: u64, data: u32) {
        if self.lent {
            self.effects.messages.push((address, data));
            self.has_effects = true;
            return;
        }
        if let Some(message) = InterruptMessage::from_msi(address, data) {
            self.deliver(message);
        }
    }

    fn service_io_apic(&mut self) {
        let mut requests = self.io_apic.take_requests();
        while requests != 0 {
            let pin = requests.trailing_zeros() as usize;
            requests &= requests - 1;
            if self.deliver(self.io_apic.message(pin)) {
                self.io_apic.accepted(pin);
            }
        }
    }

    fn perform(&mut self, cpu: usize, action: ApicAction) {
        match action {
            ApicAction::None => {}
            ApicAction::BroadcastEoi(vector) => {
                self.io_apic.end_of_interrupt(vector);
                self.service_io_apic();
            }
            ApicAction::Send(ipi) => self.send_ipi(cpu, ipi),
            ApicAction::Enabled => self.service_io_apic(),
        }
        self.refresh(cpu);
    }

    // Interrupt lines

    /// Asserts or releases an external source's share of a GSI (0 to 23). Sources that share a GSI
    /// are the caller's to OR; the chipset's own devices have shares of their own.
    pub fn set_line(&mut self, gsi: u32, level: bool, now: u64) {
        self.clock(now);
        self.set_share(gsi, source::EXTERNAL, level);
    }

    fn set_share(&mut self, gsi: u32, source: u8, level: bool) {
        let Some(line) = self.lines.get_mut(gsi as usize) else {
            return;
        };
        let was_high = *line != 0;
        *line = if level {
            *line | source
        } else {
            *line & !source
        };
        let is_high = *line != 0;
        if was_high == is_high {
            return;
        }
        if self.lent {
            self.effects.lines.push((gsi, is_high));
            self.has_effects = true;
            return;
        }
        if self.io_apic.set_pin(gsi as usize, is_high) {
            self.service_io_apic();
        }
        let irq = match gsi {
            map::TIMER_GSI => 0,
            // The only way to input 0 is the timer's.
            0 | 16.. => return,
            _ => gsi as u8,
        };
        let output = self.pic.output();
        self.pic.set_irq(irq, is_high);
        if self.pic.output() != output {
            self.pic_output_changed();
        }
    }

    /// An edge for a line that must be seen to fall before it rises.
    fn pulse(&mut self, gsi: u32, source: u8) {
        self.set_share(gsi, source, false);
        self.set_share(gsi, source, true);
    }

    /// Whether an interrupt on this GSI could get anywhere.
    fn is_heard(&self, gsi: u32) -> bool {
        let irq = if gsi == map::TIMER_GSI { 0 } else { gsi as u8 };
        // Whoever has the controllers knows.
        self.lent
            || !self.io_apic.entry(gsi as usize).is_masked()
            || self.pic.is_unmasked(irq) && self.apics[0].listens_to_pic()
    }

    fn settle_pit(&mut self, now: u64) {
        let rose = self.pit.settle(now);
        let connected = !self.hpet.is_legacy();
        if rose && connected {
            self.pulse(map::TIMER_GSI, source::DEVICE);
        } else {
            self.set_share(
                map::TIMER_GSI,
                source::DEVICE,
                self.pit.interrupt() && connected,
            );
        }
        self.deadline_is_stale = true;
    }

    fn settle_rtc(&mut self, now: u64) {
        self.rtc.settle(now);
        let level = self.rtc.interrupt() && !self.hpet.is_legacy();
        self.set_share(map::RTC_GSI, source::DEVICE, level);
        self.deadline_is_stale = true;
    }

    fn settle_hpet(&mut self, now: u64) {
        self.hpet.settle(now);
        let mut pulses = self.hpet.take_pulses();
        while pulses != 0 {
            let gsi = pulses.trailing_zeros();
            pulses &= pulses - 1;
            self.pulse(gsi, source::HPET_EDGE);
            if gsi >= 16 {
                self.set_share(gsi, source::HPET_EDGE, false);
            }
        }
        let levels = self.hpet.levels();
        for gsi in [map::TIMER_GSI, map::RTC_GSI, 20, 21, 22, 23] {
            self.set_share(gsi, source::HPET_LEVEL, levels >> gsi & 1 != 0);
        }
        if !self.hpet.is_legacy() {
            self.set_share(map::TIMER_GSI, source::HPET_EDGE, false);
            self.set_share(map::RTC_GSI, source::HPET_EDGE, false);
        }
        self.deadline_is_stale = true;
    }

    fn settle_pm(&mut self, now: u64) {
        self.pm.settle(now);
        self.set_share(map::SCI_GSI, source::DEVICE, self.pm.interrupt());
        self.deadline_is_stale = true;
    }

    /// Lets every timer but the APICs' see the time.
    fn settle_timers(&mut self, now: u64) {
        self.settle_pit(now);
        self.settle_rtc(now);
        self.settle_hpet(now);
        self.settle_pm(now);
    }

    // Time

    /// Lets the timers that are due at `now` fire.
    pub fn advance(&mut self, now: u64) {
        let now = self.clock(now);
        if self.next_deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        for cpu in 0..self.apics.len() {
            if self.apics[cpu]
                .timer_deadline()
                .is_some_and(|deadline| deadline <= now)
            {
                self.apics[cpu].settle_timer(now);
                self.refresh(cpu);
            }
        }
        self.settle_timers(now);
    }

    /// The machine stood still while the time of day went on by `away` nanoseconds: the real-time clock has a battery.
    pub fn time_of_day_went_on(&mut self, away: u64, now: u64) {
        let now = self.clock(now);
        self.rtc.run_on_battery(away, now);
        self.settle_rtc(now);
    }

    /// When [`advance`](Self::advance) must next be called; `None` while nothing is armed. A timer
    /// whose interrupt is masked wherever it goes is not waited for.
    pub fn next_deadline(&mut self) -> Option<u64> {
        if self.deadline_is_stale {
            self.deadline = self.find_deadline();
            self.deadline_is_stale = false;
        }
        (self.deadline != u64::MAX).then_some(self.deadline)
    }

    /// When the local APIC timer of vCPU `cpu` is due; `None` while it is not armed. It is one of those of
    /// [`Self::next_deadline`].
    pub fn own_deadline(&self, cpu: usize) -> Option<u64> {
        self.apics.get(cpu)?.timer_deadline()
    }

    fn find_deadline(&self) -> u64 {
        let never = u64::MAX;
        let mut deadline = self
            .apics
            .iter()
            .filter_map(LocalApic::timer_deadline)
            .min()
            .unwrap_or(never);
        if !self.hpet.is_legacy() {
            if self.is_heard(map::TIMER_GSI) {
                deadline = deadline.min(self.pit.deadline().unwrap_or(never));
            }
            if self.is_heard(map::RTC_GSI) {
                deadline = deadline.min(self.rtc.deadline().unwrap_or(never));
            }
        }
        deadline = deadline.min(
            self.hpet
                .deadline(|gsi| self.is_heard(gsi))
                .unwrap_or(never),
        );
        deadline.min(self.pm.deadline().unwrap_or(never))
    }

    /// The time-stamp counter of vCPU `cpu`.
    pub fn tsc(&self, cpu: usize, now: u64) -> u64 {
        ticks::ticks_at(now, self.config.tsc_hz).wrapping_add(self.tsc_offset(cpu))
    }

    /// What is added to the common time-stamp counter for vCPU `cpu`.
    pub fn tsc_offset(&self, cpu: usize) -> u64 {
        self.apics.get(cpu).map_or(0, LocalApic::tsc_offset)
    }

    /// Sets the TSC offset of vCPU `cpu` (wrapping) and moves its TSC deadline with it.
    pub fn set_tsc_offset(&mut self, cpu: usize, offset: u64, now: u64) {
        let now = self.clock(now);
        if let Some(apic) = self.apics.get_mut(cpu) {
            apic.set_tsc_offset(offset, now);
            self.deadline_is_stale = true;
            self.refresh(cpu);
        }
    }

    // Local APICs

    /// Reads `IA32_APIC_BASE` (0x1b), `IA32_TSC_DEADLINE` (0x6e0) or an x2APIC register
    /// (0x800 to 0x83f).
    pub fn apic_msr_read(
        &mut self,
        cpu: usize,
        msr: u32,
        now: u64,
    ) -> Result<u64, GeneralProtection> {
        let now = self.clock(now);
        let value = self
            .apics
            .get_mut(cpu)
            .ok_or(GeneralProtection)?
            .msr_read(msr, now);
        // The read may have let the timer expire.
        self.refresh(cpu);
        value
    }

    /// Writes one of the registers [`apic_msr_read`](Self::apic_msr_read) reads.
    pub fn apic_msr_write(
        &mut self,
        cpu: usize,
        msr: u32,
        value: u64,
        now: u64,
    ) -> Result<(), GeneralProtection> {
        let now = self.clock(now);
        let action = self
            .apics
            .get_mut(cpu)
            .ok_or(GeneralProtection)?
            .msr_write(msr, value, now)?;
        // Task priority, end of interrupt and IPIs arm no timer of this vCPU.
        self.deadline_is_stale |= !matches!(msr, 0x808 | 0x80b | 0x830);
        self.perform(cpu, action);
        Ok(())
    }

    /// CR8 of vCPU `cpu`: bits 7:4 of its task priority.
    pub fn cr8(&self, cpu: usize) -> u8 {
        self.apics.get(cpu).map_or(0, LocalApic::cr8)
    }

    /// Sets CR8 of vCPU `cpu`; bits 7:4 of `value` are the caller's to refuse.
    pub fn set_cr8(&mut self, cpu: usize, value: u8) {
        if let Some(apic) = self.apics.get_mut(cpu) {
            apic.set_cr8(value);
            self.refresh(cpu);
        }
    }

    /// The page at which vCPU `cpu` sees its APIC registers, if it does (xAPIC mode).
    pub fn apic_page(&self, cpu: usize) -> Option<u64> {
        self.apics.get(cpu)?.page()
    }

    // Guest-physical addresses

    /// Reads guest-physical addresses as vCPU `cpu`; whether something answered.
    pub fn mmio_read(&mut self, cpu: usize, gpa: u64, data: &mut [u8], now: u64) -> bool {
        let now = self.clock(now);
        if self.apic_page(cpu) == Some(gpa & !0xfff) {
            self.apics[cpu].mmio_read(gpa & 0xfff, data, now);
            self.refresh(cpu);
        } else if let Some(offset) = offset_in(gpa, map::IO_APIC_ADDRESS, map::IO_APIC_SIZE) {
            data.fill(0);
            let value = self.io_apic.read(offset & !3).to_le_bytes();
            for (to, from) in data.iter_mut().zip(&value[(offset & 3) as usize..]) {
                *to = *from;
            }
        } else if let Some(offset) = offset_in(gpa, map::HPET_ADDRESS, map::HPET_SIZE) {
            self.hpet.read(offset, data, now);
            self.settle_hpet(now);
        } else {
            return false;
        }
        true
    }

    /// Writes guest-physical addresses as vCPU `cpu`; whether something took it.
    pub fn mmio_write(&mut self, cpu: usize, gpa: u64, data: &[u8], now: u64) -> bool {
        let now = self.clock(now);
        if self.apic_page(cpu) == Some(gpa & !0xfff) {
            let action = self.apics[cpu].mmio_write(gpa & 0xfff, data, now);
            self.deadline_is_stale |= !matches!(gpa & 0xfff, 0x80 | 0xb0 | 0x300 | 0x310);
            self.perform(cpu, action);
        } else if let Some(offset) = offset_in(gpa, map::IO_APIC_ADDRESS, map::IO_APIC_SIZE) {
            // What happened before the write is not to be seen by what it unmasks.
            self.settle_timers(now);
            let value = data
                .iter()
                .take(4)
                .rev()
                .fold(0, |value, &byte| value << 8 | u32::from(byte));
            if self.io_apic.write(offset, value) {
                self.service_io_apic();
            }
        } else if let Some(offset) = offset_in(gpa, map::HPET_ADDRESS, map::HPET_SIZE) {
            self.hpet.write(offset, data, now);
            self.settle_hpet(now);
            // Legacy replacement may have connected or disconnected them.
            self.settle_pit(now);
            self.settle_rtc(now);
        } else {
            return false;
        }
        true
    }
}

fn offset_in(gpa: u64, start: u64, size: u64) -> Option<u64> {
    gpa.checked_sub(start).filter(|&offset| offset < size)
}
