//! What the chipset asks of the world outside it.

/// What happened on one call that somebody outside the chipset must act on.
///
/// The caller takes it after each call for which [`Chipset::has_effects`](crate::Chipset::has_effects)
/// says so; nothing in it is state of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Signals to vCPUs, in the order in which they were sent.
    pub signals: Vec<Signal>,
    /// While the interrupt controllers are lent: levels that changed, by GSI, in their order.
    pub lines: Vec<(u32, bool)>,
    /// While the interrupt controllers are lent: message-signalled interrupts, as address and data.
    pub messages: Vec<(u64, u32)>,
    /// The machine is to stop. The first request wins.
    pub power: Option<PowerRequest>,
    /// Bytes written to COM1 and COM2.
    pub serial: [Vec<u8>; 2],
    /// COM1, COM2: the guest made room after `serial_receive` had turned bytes away.
    pub serial_room: [bool; 2],
    /// Bytes written to the debug console (port 0xe9).
    pub debug: Vec<u8>,
}

impl Effects {
    /// Whether there is nothing to act on.
    pub fn is_empty(&self) -> bool {
        self.signals.is_empty()
            && self.lines.is_empty()
            && self.messages.is_empty()
            && self.power.is_none()
            && self.serial.iter().all(Vec::is_empty)
            && !self.serial_room.contains(&true)
            && self.debug.is_empty()
    }

    /// Forgets everything, keeping the buffers' memory.
    pub fn clear(&mut self) {
        let Self {
            signals,
            lines,
            messages,
            power,
            serial,
            serial_room,
            debug,
        } = self;
        signals.clear();
        lines.clear();
        messages.clear();
        *power = None;
        serial.iter_mut().for_each(Vec::clear);
        *serial_room = [false; 2];
        debug.clear();
    }
}

/// A signal to one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Signal {
    /// The vCPU's index, which is its initial APIC ID too.
    pub cpu: usize,
    /// What it is told.
    pub kind: CpuSignal,
}

/// What a vCPU is told from outside its instruction stream (SDM vol. 3A, 11.4 and 9.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuSignal {
    /// [`Chipset::interrupt_pending`](crate::Chipset::interrupt_pending) became true: wake it if it is
    /// halted.
    Interrupt,
    /// A non-maskable interrupt.
    Nmi,
    /// INIT: reset the vCPU's registers and wait for a start-up IPI (the bootstrap processor starts
    /// at its reset vector). Its local APIC has been reset already.
    Init,
    /// Start-up IPI: a vCPU that waits for one starts in real mode at `vector << 12`; any other
    /// ignores it.
    Sipi(u8),
}

/// The machine asks to be stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// ACPI S5.
    Off,
    /// Reset the whole machine.
    Reset(ResetCause),
    /// The guest wrote the isa-debug-exit port: end with this status, always odd.
    Exit(u32),
}

/// Which of the PC's ways to reset was used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetCause {
    /// The reset control register (port 0xcf9), which is the ACPI reset register too.
    ResetControl,
    /// The keyboard controller pulsed its reset line (command 0xfe, or output port bit 0).
    KeyboardController,
    /// System control port A (port 0x92, bit 0).
    FastReset,
}
