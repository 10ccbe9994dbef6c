//! A local APIC (SDM vol. 3A, chapter 11), in xAPIC and x2APIC mode.

mod message;
mod saved;
mod timer;
mod vectors;

#[cfg(test)]
mod tests;

pub use message::{Delivery, Destination, InterruptMessage, Ipi, Shorthand, destination_8_bit};
pub use saved::LocalApicState;
pub use timer::{ApicTimer, MIN_PERIOD_NS, TimerMode, TimerState};
pub use vectors::VectorSet;

use crate::GeneralProtection;
use crate::map::LOCAL_APIC_ADDRESS;

/// `IA32_APIC_BASE`.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// `IA32_TSC_DEADLINE`.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The first of the 64 x2APIC registers.
pub const MSR_X2APIC_FIRST: u32 = 0x800;
/// The last of the x2APIC registers.
pub const MSR_X2APIC_LAST: u32 = 0x83f;

const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;

/// Registers by number: MMIO offset `n << 4` in xAPIC mode, MSR `0x800 + n` in x2APIC mode
/// (SDM vol. 3A, tables 11-1 and 11-6).
mod reg {
    pub(super) const ID: u8 = 0x02;
    pub(super) const VERSION: u8 = 0x03;
    pub(super) const TPR: u8 = 0x08;
    pub(super) const APR: u8 = 0x09;
    pub(super) const PPR: u8 = 0x0a;
    pub(super) const EOI: u8 = 0x0b;
    pub(super) const RRD: u8 = 0x0c;
    pub(super) const LDR: u8 = 0x0d;
    pub(super) const DFR: u8 = 0x0e;
    pub(super) const SVR: u8 = 0x0f;
    pub(super) const ISR: u8 = 0x10;
    pub(super) const ISR_LAST: u8 = 0x17;
    pub(super) const TMR: u8 = 0x18;
    pub(super) const TMR_LAST: u8 = 0x1f;
    pub(super) const IRR: u8 = 0x20;
    pub(super) const IRR_LAST: u8 = 0x27;
    pub(super) const ESR: u8 = 0x28;
    pub(super) const LVT_CMCI: u8 = 0x2f;
    pub(super) const ICR: u8 = 0x30;
    pub(super) const ICR_HIGH: u8 = 0x31;
    pub(super) const LVT_TIMER: u8 = 0x32;
    pub(super) const LVT_LINT0: u8 = 0x35;
    pub(super) const LVT_LINT1: u8 = 0x36;
    pub(super) const LVT_ERROR: u8 = 0x37;
    pub(super) const INITIAL_COUNT: u8 = 0x38;
    pub(super) const CURRENT_COUNT: u8 = 0x39;
    pub(super) const DIVIDE: u8 = 0x3e;
    pub(super) const SELF_IPI: u8 = 0x3f;
}

/// Integrated APIC, seven LVT entries (bits 23:16 hold the highest), EOI broadcast suppression.
const VERSION: u32 = 0x14 | 6 << 16 | 1 << 24;

const SVR_ENABLE: u32 = 1 << 8;
const SVR_SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;

const LVT_MASKED: u32 = 1 << 16;
/// Delivery status and remote IRR: the APIC's own, ignored when written.
const LVT_READ_ONLY: u32 = 1 << 12 | 1 << 14;

const ERROR_SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
const ERROR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Order of the LVT in [`LocalApic`]; CMCI stands last because its register does not follow the rest.
const TIMER: usize = 0;
const LINT0: usize = 3;
const LINT1: usize = 4;
const ERROR: usize = 5;
const LVT_ENTRIES: usize = 7;

/// What a write to a register asks of the rest of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApicAction {
    /// Nothing.
    None,
    /// Tell the I/O APIC that a level-triggered interrupt has ended.
    BroadcastEoi(u8),
    /// Send an inter-processor interrupt.
    Send(Ipi),
    /// It can accept interrupts now that it could not before: messages that were refused may be
    /// sent again.
    Enabled,
}

/// One processor's local APIC. Whoever changes it asks [`deliverable`](Self::deliverable) afterwards.
#[derive(Clone, Debug)]
pub struct LocalApic {
    id: u32,
    apic_base: u64,
    apic_base_reserved: u64,
    tpr: u32,
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: VectorSet,
    irr: VectorSet,
    tmr: VectorSet,
    esr: u32,
    /// Errors since ESR was last written.
    errors: u32,
    icr: u64,
    lvt: [u32; LVT_ENTRIES],
    lint: [bool; 2],
    timer: ApicTimer,
    /// Processor priority, and the vector of highest priority that is above it: asked for far more
    /// often than they change.
    ppr: u32,
    deliverable: Option<u8>,
}

impl LocalApic {
    /// An APIC after power-on: enabled in xAPIC mode at its default address, disabled by software.
    pub fn new(id: u32, tsc_hz: u64, physical_address_bits: u8) -> Self {
        let bsp = if id == 0 { BASE_BSP } else { 0 };
        let mut apic = Self {
            id,
            apic_base: LOCAL_APIC_ADDRESS | BASE_ENABLE | bsp,
            apic_base_reserved: Self::apic_base_reserved(physical_address_bits),
            tpr: 0,
            ldr: 0,
            dfr: 0,
            svr: 0,
            isr: VectorSet::default(),
            irr: VectorSet::default(),
            tmr: VectorSet::default(),
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [0; LVT_ENTRIES],
            lint: [false; 2],
            timer: ApicTimer::new(tsc_hz),
            ppr: 0,
            deliverable: None,
        };
        apic.reset();
        apic
    }

    /// Bits of `IA32_APIC_BASE` that cannot be set.
    fn apic_base_reserved(physical_address_bits: u8) -> u64 {
        let address_bits = (1u64 << physical_address_bits.min(63)) - 1;
        !(address_bits & !0xfff | BASE_ENABLE | BASE_X2APIC | BASE_BSP)
    }

    /// What INIT does to the registers (SDM vol. 3A, 11.4.7.3): all but the IDs and
    /// `IA32_APIC_BASE` go back to their power-on values.
    pub fn reset(&mut self) {
        self.tpr = 0;
        self.dfr = u32::MAX;
        self.svr = 0xff;
        self.isr = VectorSet::default();
        self.irr = VectorSet::default();
        self.tmr = VectorSet::default();
        self.esr = 0;
        self.errors = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; LVT_ENTRIES];
        self.timer.reset();
        self.ldr = if self.is_x2apic() {
            self.x2apic_ldr()
        } else {
            0
        };
        self.update();
    }

    /// Virtual wire mode, in which firmware leaves the bootstrap processor (MultiProcessor
    /// Specification 1.4, 3.6.2.2): the 8259As interrupt through LINT0, NMI comes in at LINT1.
    pub fn set_virtual_wire(&mut self) {
        self.svr = SVR_ENABLE | 0x0f;
        self.lvt[LINT0] = 7 << 8;
        self.lvt[LINT1] = 4 << 8;
    }

    /// The APIC's ID, which never changes.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Whether it is in x2APIC mode.
    pub fn is_x2apic(&self) -> bool {
        self.apic_base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE | BASE_X2APIC
    }

    /// Whether `IA32_APIC_BASE` enables it at all. If not, the 8259As interrupt the processor directly.
    pub fn is_globally_enabled(&self) -> bool {
        self.apic_base & BASE_ENABLE != 0
    }

    fn is_software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }

    /// Whether it would take a fixed or lowest-priority interrupt.
    pub fn accepts_fixed(&self) -> bool {
        self.is_globally_enabled() && self.is_software_enabled()
    }

    /// The guest-physical page of its registers, in xAPIC mode.
    pub fn page(&self) -> Option<u64> {
        (self.apic_base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE)
            .then_some(self.apic_base & !self.apic_base_reserved & !0xfff)
    }

    fn x2apic_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }

    // Priorities

    /// The vector to be taken next, if there is one above the processor priority.
    pub fn deliverable(&self) -> Option<u8> {
        self.deliverable
    }

    /// Processor priority (SDM vol. 3A, 11.8.3.1).
    pub fn ppr(&self) -> u32 {
        self.ppr
    }

    fn update(&mut self) {
        let in_service = u32::from(self.isr.highest().unwrap_or(0));
        self.ppr = if self.tpr >> 4 >= in_service >> 4 {
            self.tpr
        } else {
            in_service & 0xf0
        };
        self.deliverable = self
            .irr
            .highest()
            .filter(|&vector| u32::from(vector) >> 4 > self.ppr >> 4);
    }

    /// Moves the interrupt to be taken from IRR to ISR and returns its vector.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable?;
        self.irr.remove(vector);
        self.isr.insert(vector);
        self.update();
        Some(vector)
    }

    /// CR8: bits 7:4 of the task priority (SDM vol. 3A, 11.8.6).
    pub fn cr8(&self) -> u8 {
        (self.tpr >> 4) as u8
    }

    /// Writes CR8; bits 3:0 of the task priority become zero.
    pub fn set_cr8(&mut self, value: u8) {
        self.set_tpr(u32::from(value & 15) << 4);
    }

    fn set_tpr(&mut self, value: u32) {
        if self.tpr != value {
            self.tpr = value;
            self.update();
        }
    }

    fn end_of_interrupt(&mut self) -> ApicAction {
        let Some(vector) = self.isr.highest() else {
            return ApicAction::None;
        };
        self.isr.remove(vector);
        self.update();
        if self.tmr.contains(vector) && self.svr & SVR_SUPPRESS_EOI_BROADCAST == 0 {
            ApicAction::BroadcastEoi(vector)
        } else {
            ApicAction::None
        }
    }

    // Accepting

    /// Whether a message with this destination is for this APIC (SDM vol. 3A, 11.6.2).
    pub fn is_addressed(&self, destination: Destination) -> bool {
        match destination {
            Destination::All => true,
            Destination::Physical(id) => id == self.id,
            Destination::Logical(mda) if self.is_x2apic() => {
                mda >> 16 == self.ldr >> 16 && mda & self.ldr & 0xffff != 0
            }
            // An xAPIC has an 8-bit logical ID, which a 32-bit address cannot name.
            Destination::Logical(mda) if mda > 0xff => false,
            Destination::Logical(mda) if self.dfr >> 28 == 0xf => mda & self.ldr >> 24 != 0,
            Destination::Logical(mda) => {
                let (cluster, ldr) = (mda >> 4, self.ldr >> 24);
                (cluster == 0xf || cluster == ldr >> 4) && mda & ldr & 0xf != 0
            }
        }
    }

    /// Puts a fixed or lowest-priority interrupt into IRR; whether it was accepted.
    pub fn accept(&mut self, vector: u8, level: bool) -> bool {
        if !self.accepts_fixed() {
            return false;
        }
        if vector < 16 {
            self.report_error(ERROR_RECEIVE_ILLEGAL_VECTOR);
            return false;
        }
        self.irr.insert(vector);
        if level {
            self.tmr.insert(vector);
        } else {
            self.tmr.remove(vector);
        }
        self.update();
        true
    }

    fn report_error(&mut self, error: u32) {
        let armed = self.errors == 0;
        self.errors |= error;
        let lvt = self.lvt[ERROR];
        if armed && lvt & LVT_MASKED == 0 {
            if lvt & 0xff < 16 {
                self.errors |= ERROR_RECEIVE_ILLEGAL_VECTOR;
            } else {
                self.accept(lvt as u8, false);
            }
        }
    }

    /// Whether the 8259As' output at LINT0 interrupts the processor with their own vector.
    pub fn accepts_ext_int(&self) -> bool {
        !self.is_globally_enabled() || self.lvt[LINT0] & (LVT_MASKED | 7 << 8) == 7 << 8
    }

    /// Whether the 8259As' output at LINT0 does anything at all.
    pub fn listens_to_pic(&self) -> bool {
        !self.is_globally_enabled() || self.lvt[LINT0] & LVT_MASKED == 0
    }

    /// Sets the level of LINT0 or LINT1 (`pin` 0 or 1); whether that is a non-maskable interrupt.
    pub fn set_lint(&mut self, pin: usize, level: bool) -> bool {
        let pin = pin & 1;
        let rose = level && !self.lint[pin];
        self.lint[pin] = level;
        if !rose {
            return false;
        }
        if !self.is_globally_enabled() {
            // The pins are INTR and NMI then (SDM vol. 3A, 11.4.3).
            return pin == 1;
        }
        let lvt = self.lvt[LINT0 + pin];
        if lvt & LVT_MASKED != 0 {
            return false;
        }
        match Delivery::from_bits(lvt >> 8) {
            Delivery::Nmi => return true,
            Delivery::Fixed => {
                self.accept(lvt as u8, false);
            }
            _ => {}
        }
        false
    }

    // Timer

    fn timer_mode(&self) -> TimerMode {
        match self.lvt[TIMER] >> 17 & 3 {
            1 => TimerMode::Periodic,
            2 => TimerMode::TscDeadline,
            _ => TimerMode::OneShot,
        }
    }

    /// Lets the timer expire if it is due.
    pub fn settle_timer(&mut self, now: u64) {
        let lvt = self.lvt[TIMER];
        if self.timer.settle(self.timer_mode(), now) && lvt & LVT_MASKED == 0 {
            self.accept(lvt as u8, false);
        }
    }

    /// When the timer must next be settled; a masked timer interrupts nobody and has no deadline.
    pub fn timer_deadline(&self) -> Option<u64> {
        if self.lvt[TIMER] & LVT_MASKED != 0 {
            None
        } else {
            self.timer.deadline()
        }
    }

    /// What is added to the common TSC for this processor.
    pub fn tsc_offset(&self) -> u64 {
        self.timer.tsc_offset()
    }

    /// Changes the TSC offset; an armed TSC deadline moves with it.
    pub fn set_tsc_offset(&mut self, offset: u64, now: u64) {
        self.settle_timer(now);
        self.timer.set_tsc_offset(offset, now);
        self.settle_timer(now);
    }

    // Registers

    fn lvt_index(register: u8) -> Option<usize> {
        match register {
            reg::LVT_TIMER..=reg::LVT_ERROR => Some(usize::from(register - reg::LVT_TIMER)),
            reg::LVT_CMCI => Some(LVT_ENTRIES - 1),
            _ => None,
        }
    }

    /// Bits of a register that may be written, in either mode; `None` if it can't be written.
    fn writable(register: u8) -> Option<u32> {
        Some(match register {
            reg::TPR | reg::SELF_IPI => 0xff,
            reg::EOI | reg::ESR => 0,
            reg::LDR => 0xff00_0000,
            reg::DFR => 0xf000_0000,
            reg::SVR => 0x13ff,
            reg::ICR => 0x000c_cfff,
            reg::ICR_HIGH => 0xff00_0000,
            reg::LVT_TIMER => 0x0007_00ff,
            reg::LVT_LINT0 | reg::LVT_LINT1 => 0x0001_a7ff,
            reg::LVT_ERROR => 0x0001_00ff,
            reg::LVT_CMCI | 0x33 | 0x34 => 0x0001_07ff,
            reg::INITIAL_COUNT => u32::MAX,
            reg::DIVIDE => 0xb,
            _ => return None,
        })
    }

    /// Reads a register that both modes have; `None` if it can't be read.
    fn read(&mut self, register: u8, now: u64) -> Option<u32> {
        Some(match register {
            reg::VERSION => VERSION,
            reg::TPR => self.tpr,
            reg::PPR => self.ppr,
            reg::LDR => self.ldr,
            reg::SVR => self.svr,
            reg::ISR..=reg::ISR_LAST => self.isr.register(register - reg::ISR),
            reg::TMR..=reg::TMR_LAST => self.tmr.register(register - reg::TMR),
            reg::IRR..=reg::IRR_LAST => {
                self.settle_timer(now);
                self.irr.register(register - reg::IRR)
            }
            reg::ESR => self.esr,
            reg::ICR => self.icr as u32,
            reg::INITIAL_COUNT => self.timer.initial(),
            reg::CURRENT_COUNT => {
                self.settle_timer(now);
                self.timer.current(self.timer_mode(), now)
            }
            reg::DIVIDE => self.timer.divide(),
            _ => self.lvt[Self::lvt_index(register)?],
        })
    }

    /// Writes the allowed bits of a writable register.
    fn write(&mut self, register: u8, value: u32, now: u64) -> ApicAction {
        match register {
            reg::EOI => return self.end_of_interrupt(),
            reg::TPR => self.set_tpr(value),
            reg::LDR => self.ldr = value,
            reg::DFR => self.dfr = value | 0x0fff_ffff,
            reg::SVR => return self.set_svr(value, now),
            reg::ESR => {
                // The timer's entry may have a vector that is an error.
                self.settle_timer(now);
                self.esr = self.errors;
                self.errors = 0;
            }
            reg::ICR => return self.send(self.icr & !0xffff_ffff | u64::from(value)),
            reg::ICR_HIGH => self.icr = self.icr & 0xffff_ffff | u64::from(value) << 32,
            reg::INITIAL_COUNT => {
                self.settle_timer(now);
                self.timer.set_initial(value, self.timer_mode(), now);
            }
            reg::DIVIDE => {
                self.settle_timer(now);
                self.timer.set_divide(value, self.timer_mode(), now);
            }
            reg::SELF_IPI => {
                // As an ICR write with the self shorthand (SDM vol. 3A, 11.12.11).
                if value < 16 {
                    self.report_error(ERROR_SEND_ILLEGAL_VECTOR);
                } else {
                    self.accept(value as u8, false);
                }
            }
            _ => {
                if let Some(index) = Self::lvt_index(register) {
                    self.set_lvt(index, value, now);
                }
            }
        }
        ApicAction::None
    }

    fn set_svr(&mut self, value: u32, now: u64) -> ApicAction {
        let was_enabled = self.is_software_enabled();
        if value & SVR_ENABLE == 0 {
            self.settle_timer(now);
            // SDM vol. 3A, 11.4.7.2: the mask bits are set, and stay set while it is disabled.
            self.lvt.iter_mut().for_each(|entry| *entry |= LVT_MASKED);
        }
        self.svr = value;
        if self.is_software_enabled() && !was_enabled {
            ApicAction::Enabled
        } else {
            ApicAction::None
        }
    }

    fn set_lvt(&mut self, index: usize, value: u32, now: u64) {
        let masked = if self.is_software_enabled() {
            0
        } else {
            LVT_MASKED
        };
        if index != TIMER {
            self.lvt[index] = value | masked;
            return;
        }
        // What expired up to now did so under the old entry.
        self.settle_timer(now);
        let before = self.timer_mode();
        self.lvt[TIMER] = value | masked;
        let after = self.timer_mode();
        if before != after && (before == TimerMode::TscDeadline || after == TimerMode::TscDeadline)
        {
            self.timer.disarm();
        }
    }

    fn send(&mut self, icr: u64) -> ApicAction {
        self.icr = icr;
        let Some(ipi) = Ipi::from_icr(icr, self.is_x2apic()) else {
            return ApicAction::None;
        };
        let has_vector = matches!(
            ipi.message.delivery,
            Delivery::Fixed | Delivery::LowestPriority
        );
        if has_vector && ipi.message.vector < 16 {
            self.report_error(ERROR_SEND_ILLEGAL_VECTOR);
            return ApicAction::None;
        }
        ApicAction::Send(ipi)
    }

    /// Reads bytes of the xAPIC register page. Registers are 32 bits wide, one in 16 bytes; what lies
    /// between them reads as zero.
    pub fn mmio_read(&mut self, offset: u64, data: &mut [u8], now: u64) {
        data.fill(0);
        let start = (offset & 15) as usize;
        if start >= 4 {
            return;
        }
        let register = (offset >> 4) as u8;
        let value = match register {
            reg::ID => self.id << 24,
            reg::DFR => self.dfr,
            reg::ICR_HIGH => (self.icr >> 32) as u32,
            reg::APR | reg::EOI | reg::RRD => 0,
            _ => self.read(register, now).unwrap_or_else(|| {
                self.report_error(ERROR_ILLEGAL_REGISTER);
                0
            }),
        };
        let bytes = value.to_le_bytes();
        for (to, from) in data.iter_mut().zip(&bytes[start..]) {
            *to = *from;
        }
    }

    /// Writes the xAPIC register page. Anything but an aligned 32-bit access is undefined
    /// (SDM vol. 3A, 11.4.1) and ignored.
    pub fn mmio_write(&mut self, offset: u64, data: &[u8], now: u64) -> ApicAction {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return ApicAction::None;
        };
        if offset & 15 != 0 {
            return ApicAction::None;
        }
        let register = (offset >> 4) as u8;
        match Self::writable(register) {
            Some(bits) if register != reg::SELF_IPI => {
                self.write(register, u32::from_le_bytes(bytes) & bits, now)
            }
            _ => {
                if !matches!(register, reg::ID | reg::APR | reg::RRD)
                    && self.read(register, now).is_none()
                {
                    self.report_error(ERROR_ILLEGAL_REGISTER);
                }
                ApicAction::None
            }
        }
    }

    /// Reads `IA32_APIC_BASE`, `IA32_TSC_DEADLINE` or an x2APIC register.
    pub fn msr_read(&mut self, msr: u32, now: u64) -> Result<u64, GeneralProtection> {
        match msr {
            MSR_APIC_BASE => Ok(self.apic_base),
            MSR_TSC_DEADLINE => {
                self.settle_timer(now);
                Ok(self.timer.tsc_deadline())
            }
            MSR_X2APIC_FIRST..=MSR_X2APIC_LAST if self.is_x2apic() => {
                match (msr - MSR_X2APIC_FIRST) as u8 {
                    reg::ID => Ok(u64::from(self.id)),
                    reg::ICR => Ok(self.icr),
                    register => self
                        .read(register, now)
                        .map(u64::from)
                        .ok_or(GeneralProtection),
                }
            }
            _ => Err(GeneralProtection),
        }
    }

    /// Writes `IA32_APIC_BASE`, `IA32_TSC_DEADLINE` or an x2APIC register.
    pub fn msr_write(
        &mut self,
        msr: u32,
        value: u64,
        now: u64,
    ) -> Result<ApicAction, GeneralProtection> {
        match msr {
            MSR_APIC_BASE => self.set_apic_base(value, now),
            MSR_TSC_DEADLINE => {
                // Ignored in the other modes (SDM vol. 3A, 11.5.4.1).
                if self.timer_mode() == TimerMode::TscDeadline && self.is_globally_enabled() {
                    self.timer.set_tsc_deadline(value, now);
                    self.settle_timer(now);
                }
                Ok(ApicAction::None)
            }
            MSR_X2APIC_FIRST..=MSR_X2APIC_LAST if self.is_x2apic() => {
                self.x2apic_write((msr - MSR_X2APIC_FIRST) as u8, value, now)
            }
            _ => Err(GeneralProtection),
        }
    }

    fn x2apic_write(
        &mut self,
        register: u8,
        value: u64,
        now: u64,
    ) -> Result<ApicAction, GeneralProtection> {
        match register {
            reg::LDR | reg::DFR | reg::ICR_HIGH => Err(GeneralProtection),
            reg::ICR => {
                // Delivery status (bit 12) does not exist in this mode (SDM vol. 3A, 11.12.9).
                const RESERVED: u64 = 0xfff3_2000;
                if value & RESERVED != 0 {
                    return Err(GeneralProtection);
                }
                Ok(self.send(value & !(1 << 12)))
            }
            _ => {
                let writable = Self::writable(register).ok_or(GeneralProtection)?;
                let ignored = if Self::lvt_index(register).is_some() {
                    LVT_READ_ONLY
                } else {
                    0
                };
                if value & !u64::from(writable | ignored) != 0 {
                    return Err(GeneralProtection);
                }
                Ok(self.write(register, value as u32 & writable, now))
            }
        }
    }

    /// SDM vol. 3A, 11.12.5, figure 11-27: the changes of mode there are.
    fn set_apic_base(&mut self, value: u64, now: u64) -> Result<ApicAction, GeneralProtection> {
        const MODE: u64 = BASE_ENABLE | BASE_X2APIC;
        if value & self.apic_base_reserved != 0 {
            return Err(GeneralProtection);
        }
        match (self.apic_base & MODE, value & MODE) {
            (_, BASE_X2APIC) | (MODE, BASE_ENABLE) | (0, MODE) => return Err(GeneralProtection),
            (from, 0) if from != 0 => {
                self.settle_timer(now);
                self.apic_base = value;
                self.reset();
            }
            (BASE_ENABLE, MODE) => {
                self.apic_base = value;
                self.ldr = self.x2apic_ldr();
                self.icr &= 0xffff_ffff;
            }
            _ => self.apic_base = value,
        }
        Ok(ApicAction::None)
    }
}
