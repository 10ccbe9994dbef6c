//! The DSDT: what the operating system cannot enumerate by itself (ACPI 6.5, chapters 6 and 19).

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal,
    IO, If, Interrupt, Local, Memory32Fixed, Method, Name, NotEqual, Or, Package, PackageBuilder,
    Path, ResourceTemplate, Return, Scope, Store, Uuid, ZERO,
};

use crate::platform::Platform;

/// Devices on a PCI bus.
const PCI_DEVICES: u32 = 32;
/// Interrupt pins of a PCI device.
const PCI_PINS: u32 = 4;
/// `_OSC` UUID of PCI host bridges (PCI Firmware Specification 3.3, 4.5.1).
const PCI_OSC: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// `_OSC` control bit that is granted: the PCI Express capability structure.
const OSC_EXPRESS_CAPABILITY: u32 = 1 << 4;

/// The table with its header.
pub(super) fn table(platform: &Platform) -> Vec<u8> {
    let mut body = Vec::new();
    let soft_off = &platform.soft_off;
    Name::new(
        "_S5_".into(),
        &Package::new(vec![soft_off, soft_off, &ZERO, &ZERO]),
    )
    .to_aml_bytes(&mut body);
    let mut devices = Vec::new();
    host_bridge(platform, &mut devices);
    motherboard(platform, &mut devices);
    isa_devices(platform, &mut devices);
    hpet(platform, &mut devices);
    processors(platform, &mut devices);
    body.extend(Scope::raw("\\_SB_".into(), devices));
    super::table(*b"DSDT", 2, &body)
}

fn hid(id: &str) -> Name {
    Name::new("_HID".into(), &EISAName::new(id))
}

fn resources(resources: Vec<&dyn Aml>) -> Name {
    Name::new("_CRS".into(), &ResourceTemplate::new(resources))
}

/// An ISA interrupt: edge-triggered, active high, exclusive.
fn isa_interrupt(irq: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, u32::from(irq))
}

/// The PCI host bridge with its windows, interrupt routing and feature negotiation.
fn host_bridge(platform: &Platform, devices: &mut Vec<u8>) {
    let last_bus = platform.ecam.map_or(255, |ecam| ecam.last_bus);
    let window = platform.pci_window;
    let buses = AddressSpace::new_bus_number(0u16, u16::from(last_bus));
    // The configuration ports lie between the two I/O windows and belong to the bridge itself.
    let config = IO::new(0xcf8, 0xcf8, 1, 8);
    let ports_below = AddressSpace::new_io(0u16, 0xcf7, None);
    let ports_above = AddressSpace::new_io(0xd00u16, 0xffff, None);
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        window.start as u32,
        (window.start + window.length - 1) as u32,
        None,
    );
    let high_memory = platform.pci_window_64.map(|window| {
        AddressSpace::new_memory(
            AddressSpaceCacheable::NotCacheable,
            true,
            window.start,
            window.start + window.length - 1,
            None,
        )
    });
    let mut windows: Vec<&dyn Aml> = vec![&buses, &config, &ports_below, &ports_above, &memory];
    windows.extend(high_memory.iter().map(|window| window as &dyn Aml));
    Device::new(
        "PCI0".into(),
        vec![
            &hid("PNP0A08"),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &resources(windows),
            &Name::new("_PRT".into(), &interrupt_routing(platform)),
            &feature_negotiation(),
        ],
    )
    .to_aml_bytes(devices);
}

/// `_PRT` (6.2.13): each device's pins drive global system interrupts directly.
fn interrupt_routing(platform: &Platform) -> PackageBuilder {
    let mut routing = PackageBuilder::new();
    for device in 0..PCI_DEVICES {
        for pin in 0..PCI_PINS {
            let address = device << 16 | 0xffff;
            let gsi = platform.pci_interrupts[((device + pin) % PCI_PINS) as usize];
            routing.add_element(&Package::new(vec![&address, &(pin as u8), &ZERO, &gsi]));
        }
    }
    routing
}

/// `_OSC` (6.2.11): of all PCI Express features, the operating system gets the capability structure;
/// there is no hot plug, power event or error reporting to be had.
fn feature_negotiation() -> impl Aml {
    const UNRECOGNIZED_UUID: u32 = 1 << 2;
    const CAPABILITIES_MASKED: u32 = 1 << 4;
    let field =
        |name: &str, offset: u32| aml(&CreateDWordField::new(&Path::new(name), &Arg(3), &offset));
    let (status, control) = (Path::new("CDW1"), Path::new("CDW3"));
    let recognised = [
        field("CDW3", 8),
        aml(&Store::new(&Local(0), &control)),
        aml(&And::new(&Local(0), &Local(0), &OSC_EXPRESS_CAPABILITY)),
        aml(&If::new(
            &NotEqual::new(&Local(0), &control),
            vec![&Or::new(&status, &status, &CAPABILITIES_MASKED)],
        )),
        aml(&Store::new(&control, &Local(0))),
    ]
    .concat();
    let body = [
        field("CDW1", 0),
        aml(&If::new(
            &Equal::new(&Arg(0), &Uuid::new(PCI_OSC)),
            vec![&Raw(recognised)],
        )),
        aml(&Else::new(vec![&Or::new(
            &status,
            &status,
            &UNRECOGNIZED_UUID,
        )])),
        aml(&Return::new(&Arg(3))),
    ]
    .concat();
    Raw(aml(&Method::new("_OSC".into(), 4, false, vec![&Raw(body)])))
}

/// AML that is already encoded.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn aml(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

/// Addresses and ports that belong to no device of their own. Linux trusts the memory-mapped
/// configuration space only where it is listed here.
fn motherboard(platform: &Platform, devices: &mut Vec<u8>) {
    let (reset_port, _) = platform.reset;
    let mut ports = vec![
        (platform.pm1a_event_port, 4),
        (platform.pm1a_control_port, 2),
        (platform.pm_timer_port, 4),
    ];
    ports.extend(platform.gpe0);
    // The usual reset port lies among the bridge's configuration ports.
    if !(0xcf8..0xd00).contains(&reset_port) {
        ports.push((reset_port, 1));
    }
    let ports: Vec<IO> = ports
        .into_iter()
        .map(|(port, length)| IO::new(port, port, 1, length))
        .collect();
    let ecam = platform
        .ecam
        .map(|ecam| Memory32Fixed::new(true, ecam.address as u32, ecam.length() as u32));
    let mut listed: Vec<&dyn Aml> = ports.iter().map(|port| port as &dyn Aml).collect();
    listed.extend(ecam.iter().map(|range| range as &dyn Aml));
    Device::new(
        "MBRD".into(),
        vec![
            &hid("PNP0C02"),
            &Name::new("_UID".into(), &ZERO),
            &resources(listed),
        ],
    )
    .to_aml_bytes(devices);
}

/// Serial ports, clock, keyboard.
fn isa_devices(platform: &Platform, devices: &mut Vec<u8>) {
    for (number, serial) in (1u8..).zip(&platform.serial).take(9) {
        Device::new(
            format!("COM{number}").as_str().into(),
            vec![
                &hid("PNP0501"),
                &Name::new("_UID".into(), &number),
                &resources(vec![
                    &IO::new(serial.port, serial.port, 1, 8),
                    &isa_interrupt(serial.irq),
                ]),
            ],
        )
        .to_aml_bytes(devices);
    }
    Device::new(
        "RTC0".into(),
        vec![
            &hid("PNP0B00"),
            &resources(vec![&IO::new(0x70, 0x70, 1, 2), &isa_interrupt(8)]),
        ],
    )
    .to_aml_bytes(devices);
    if platform.keyboard {
        Device::new(
            "PS2K".into(),
            vec![
                &hid("PNP0303"),
                &resources(vec![
                    &IO::new(0x60, 0x60, 1, 1),
                    &IO::new(0x64, 0x64, 1, 1),
                    &isa_interrupt(1),
                ]),
            ],
        )
        .to_aml_bytes(devices);
    }
    if platform.mouse {
        Device::new(
            "PS2M".into(),
            vec![&hid("PNP0F13"), &resources(vec![&isa_interrupt(12)])],
        )
        .to_aml_bytes(devices);
    }
}

fn hpet(platform: &Platform, devices: &mut Vec<u8>) {
    let Some(hpet) = platform.hpet else {
        return;
    };
    Device::new(
        "HPET".into(),
        vec![
            &hid("PNP0103"),
            &Name::new("_UID".into(), &ZERO),
            &resources(vec![&Memory32Fixed::new(false, hpet.address as u32, 0x400)]),
        ],
    )
    .to_aml_bytes(devices);
}

/// Processor devices, which the MADT's entries belong to by `_UID` (8.4).
fn processors(platform: &Platform, devices: &mut Vec<u8>) {
    for uid in 0..platform.apic_ids.len() as u32 {
        Device::new(
            format!("C{uid:03X}").as_str().into(),
            vec![
                &Name::new("_HID".into(), &"ACPI0007"),
                &Name::new("_UID".into(), &uid),
                &Name::new("_STA".into(), &0xfu8),
            ],
        )
        .to_aml_bytes(devices);
    }
}
