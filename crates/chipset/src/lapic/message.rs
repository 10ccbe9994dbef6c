//! Interrupt messages: what travels between I/O APIC, devices and local APICs.

/// Delivery mode (SDM vol. 3A, 11.6.1; 82093AA, 3.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// To every processor addressed.
    Fixed,
    /// To the addressed processor that runs at the lowest priority.
    LowestPriority,
    /// System management interrupt; there is no system management mode, so it is dropped.
    Smi,
    /// Reserved encoding 3, dropped.
    Reserved,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI.
    StartUp,
    /// From the 8259A, whose vector the processor asks for. Only LINT0 is wired to the 8259As, so it
    /// is dropped in messages.
    ExtInt,
}

impl Delivery {
    /// From the three bits every register and message encodes it in.
    pub fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            _ => Self::ExtInt,
        }
    }
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// Every processor.
    All,
    /// The processor with this APIC ID.
    Physical(u32),
    /// The processors whose logical ID matches. A message from outside a processor, or from one in
    /// xAPIC mode, has 8 bits; from one in x2APIC mode 32.
    Logical(u32),
}

/// An interrupt on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptMessage {
    /// For whom.
    pub destination: Destination,
    /// How it is to be delivered.
    pub delivery: Delivery,
    /// Vector, where the delivery mode has one.
    pub vector: u8,
    /// Level triggered: its end of interrupt is to be told to the I/O APIC.
    pub level: bool,
}

impl InterruptMessage {
    /// Decodes a message-signalled interrupt (SDM vol. 3A, 11.11); `None` if the address is not one
    /// of the interrupt messages'.
    pub fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address >> 20 != 0xfee {
            return None;
        }
        let destination = (address >> 12 & 0xff) as u32;
        let (hint, logical) = (address & 8 != 0, address & 4 != 0);
        let delivery = Delivery::from_bits(data >> 8);
        Some(Self {
            destination: destination_8_bit(destination, logical),
            // With the redirection hint, a logical message goes to one of its destinations only.
            delivery: if hint && logical && delivery == Delivery::Fixed {
                Delivery::LowestPriority
            } else {
                delivery
            },
            vector: data as u8,
            // A level-triggered message that takes the level back needs no action.
            level: data & 0x8000 != 0 && data & 0x4000 != 0,
        })
    }
}

/// The destination an 8-bit field names: 0xff is everyone in both modes.
pub fn destination_8_bit(destination: u32, logical: bool) -> Destination {
    match (destination, logical) {
        (0xff, _) => Destination::All,
        (destination, false) => Destination::Physical(destination),
        (destination, true) => Destination::Logical(destination),
    }
}

/// Destination shorthand of an inter-processor interrupt (SDM vol. 3A, 11.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// The destination field decides.
    None,
    /// The sender only.
    ToSelf,
    /// Every processor.
    AllIncludingSelf,
    /// Every processor but the sender.
    AllExcludingSelf,
}

/// An inter-processor interrupt: what a write to the interrupt command register sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// The message; its destination counts only without a shorthand.
    pub message: InterruptMessage,
    /// Destination shorthand.
    pub shorthand: Shorthand,
}

impl Ipi {
    /// Decodes the 64-bit interrupt command register; `x2apic` says how wide its destination is.
    /// `None` for INIT level de-assert, which processors have ignored since the Pentium 4, and for
    /// every other message that takes a level back.
    pub fn from_icr(icr: u64, x2apic: bool) -> Option<Self> {
        let (assert, level) = (icr & 0x4000 != 0, icr & 0x8000 != 0);
        if level && !assert {
            return None;
        }
        let logical = icr & 0x800 != 0;
        let destination = match (x2apic, (icr >> 32) as u32) {
            (false, high) => destination_8_bit(high >> 24, logical),
            (true, u32::MAX) => Destination::All,
            (true, id) if logical => Destination::Logical(id),
            (true, id) => Destination::Physical(id),
        };
        Some(Self {
            message: InterruptMessage {
                destination,
                delivery: Delivery::from_bits((icr >> 8) as u32),
                vector: icr as u8,
                // IPIs are edge triggered whatever the bit says (SDM vol. 3A, 11.6.1).
                level: false,
            },
            shorthand: match icr >> 18 & 3 {
                0 => Shorthand::None,
                1 => Shorthand::ToSelf,
                2 => Shorthand::AllIncludingSelf,
                _ => Shorthand::AllExcludingSelf,
            },
        })
    }
}
