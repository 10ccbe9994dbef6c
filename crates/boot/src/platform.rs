//! What the firmware tables have to say about the machine, as plain numbers.

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

/// The I/O APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoApic {
    /// Its APIC ID.
    pub id: u8,
    /// Guest-physical address of its registers.
    pub address: u32,
}

/// PCI Express memory-mapped configuration space (PCI Firmware Specification 3.3, 4.1.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ecam {
    /// Guest-physical address of bus 0; 1 MiB for each bus.
    pub address: u64,
    /// The last bus that is covered, bus 0 being the first.
    pub last_bus: u8,
}

impl Ecam {
    /// Bytes that it takes.
    pub(crate) fn length(self) -> u64 {
        (u64::from(self.last_bus) + 1) << 20
    }
}

/// The high precision event timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hpet {
    /// Guest-physical address of its registers.
    pub address: u64,
    /// Lower half of its capabilities register (IA-PC HPET 1.0a, 3.2.4).
    pub capabilities: u32,
}

/// A 16550 serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Serial {
    /// First of eight ports.
    pub port: u16,
    /// ISA interrupt.
    pub irq: u8,
}

/// The machine, as far as firmware tables describe it. The defaults are those of a PC with one
/// processor, an ICH-like power management block at port 0x600, and PCI Express with one bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// Local APIC IDs of the processors, the boot processor first.
    pub apic_ids: Vec<u32>,
    /// Guest-physical address of the local APICs.
    pub local_apic: u32,
    /// The I/O APIC, whose first input is global system interrupt 0. ISA interrupt 0 is its input 2.
    pub io_apic: IoApic,
    /// First port of PM1a_EVT, status and enable (4 bytes; ACPI 6.5, 4.8.3.1).
    pub pm1a_event_port: u16,
    /// Port of PM1a_CNT (2 bytes; ACPI 6.5, 4.8.3.2). SCI_EN always reads as one.
    pub pm1a_control_port: u16,
    /// Port of PM_TMR (4 bytes; ACPI 6.5, 4.8.3.3).
    pub pm_timer_port: u16,
    /// Whether PM_TMR counts 32 bits, not 24.
    pub pm_timer_is_32_bit: bool,
    /// First port of the general-purpose event block GPE0, and its length in bytes, if there is one.
    pub gpe0: Option<(u16, u8)>,
    /// Global system interrupt of the SCI, level-triggered and active high.
    pub sci: u8,
    /// SLP_TYP that means soft off.
    pub soft_off: u8,
    /// Port that resets the machine, and what to write there.
    pub reset: (u16, u8),
    /// The HPET, if there is one.
    pub hpet: Option<Hpet>,
    /// PCI Express configuration space, if there is one.
    pub ecam: Option<Ecam>,
    /// Where PCI devices' memory may lie, below 4 GiB.
    pub pci_window: Window,
    /// Where it may lie above 4 GiB, if it may.
    pub pci_window_64: Option<Window>,
    /// Global system interrupts of the PCI interrupt pins: pin `p` (INTA is 0) of device `d` on the
    /// root bus drives number `(d + p) % 4`.
    pub pci_interrupts: [u32; 4],
    /// The serial ports, COM1 first.
    pub serial: Vec<Serial>,
    /// Whether there is an 8042 keyboard controller at ports 0x60 and 0x64, interrupt 1.
    pub keyboard: bool,
    /// Whether it has a mouse on its second port, interrupt 12.
    pub mouse: bool,
    /// RTC register that holds the century; 0 for none.
    pub century_register: u8,
}

impl Default for Platform {
    fn default() -> Self {
        Self {
            apic_ids: vec![0],
            local_apic: 0xfee0_0000,
            io_apic: IoApic {
                id: 0,
                address: 0xfec0_0000,
            },
            pm1a_event_port: 0x600,
            pm1a_control_port: 0x604,
            pm_timer_port: 0x608,
            pm_timer_is_32_bit: true,
            gpe0: Some((0x620, 4)),
            sci: 9,
            soft_off: 5,
            reset: (0xcf9, 6),
            hpet: Some(Hpet {
                address: 0xfed0_0000,
                capabilities: 0x8086_a201,
            }),
            ecam: Some(Ecam {
                address: 0xe000_0000,
                last_bus: 0,
            }),
            pci_window: Window {
                start: 0xc000_0000,
                length: 0x2000_0000,
            },
            pci_window_64: None,
            pci_interrupts: [10, 11, 10, 11],
            serial: vec![
                Serial {
                    port: 0x3f8,
                    irq: 4,
                },
                Serial {
                    port: 0x2f8,
                    irq: 3,
                },
            ],
            keyboard: true,
            mouse: true,
            century_register: 0x32,
        }
    }
}
