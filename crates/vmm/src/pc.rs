//! What a PC is made of: where its RAM is, what is on its board and its bus, and what its firmware
//! says about that.

use std::collections::HashMap;
use std::sync::Arc;

use trapgate_boot::{Ecam, Entry, Hpet, IoApic, Module, Platform, Request, Serial, Window, load};
use trapgate_chipset::{Chipset, ChipsetConfig, map};
use trapgate_memory::{GuestMemory, pc_ram_ranges};
use trapgate_pci::{
    Bus, ECAM_BASE, ECAM_LAST_BUS, InterruptLine, MMIO_BASE, MMIO_SIZE, MessageSink, WiredOr,
    slot_gsi,
};
use trapgate_virtio::{
    Block, Console, ConsoleHandle, Device, Disk, Entropy, PortConfig, VirtioPci,
};
use trapgate_x86::profile::PHYSICAL_ADDRESS_BITS;

use crate::board::{Board, Line};
use crate::{Content, Hooks, MachineConfig, MachineError, ModuleConfig};

/// ISA interrupts that are PCI's, and the SCI's: level-triggered, as firmware sets the 8259A's
/// edge/level control registers (0x4d0, 0x4d1).
const LEVEL_TRIGGERED: u16 = 1 << map::SCI_GSI | 1 << slot_gsi(0) | 1 << slot_gsi(1);

/// Reserves the RAM.
pub(crate) fn memory(config: &MachineConfig) -> Result<GuestMemory, MachineError> {
    Ok(GuestMemory::new(&pc_ram_ranges(config.memory_bytes))?)
}

/// What the chipset is built from. `epoch` is in nanoseconds.
pub(crate) fn chipset_config(config: &MachineConfig, epoch: u64) -> ChipsetConfig {
    let ranges = pc_ram_ranges(config.memory_bytes);
    ChipsetConfig {
        cpus: config.cpus as usize,
        tsc_hz: config.tsc_hz,
        utc_base: epoch,
        physical_address_bits: PHYSICAL_ADDRESS_BITS as u8,
        memory_below_4g: ranges[0].length,
        memory_above_4g: ranges.get(1).map_or(0, |range| range.length),
        com2: false,
    }
}

/// The chipset as firmware leaves it. `epoch` is in nanoseconds.
pub(crate) fn chipset(config: &MachineConfig, epoch: u64) -> Result<Chipset, MachineError> {
    let mut chipset = Chipset::new(chipset_config(config, epoch))?;
    chipset.port_write(map::ELCR_PORT, 2, LEVEL_TRIGGERED.into(), 0);
    Ok(chipset)
}

/// What the firmware's tables say.
fn platform(config: &MachineConfig) -> Result<Platform, MachineError> {
    let mut hpet = [0; 4];
    chipset(config, 0)?.mmio_read(0, map::HPET_ADDRESS, &mut hpet, 0);
    Ok(Platform {
        apic_ids: (0..config.cpus).collect(),
        local_apic: map::LOCAL_APIC_ADDRESS as u32,
        io_apic: IoApic {
            id: 0,
            address: map::IO_APIC_ADDRESS as u32,
        },
        pm1a_event_port: map::PM1A_EVENT_PORT,
        pm1a_control_port: map::PM1A_CONTROL_PORT,
        pm_timer_port: map::PM_TIMER_PORT,
        pm_timer_is_32_bit: true,
        gpe0: Some((map::GPE0_PORT, map::GPE0_LENGTH)),
        sci: map::SCI_GSI as u8,
        soft_off: map::SLEEP_TYPE_S5,
        reset: (map::RESET_PORT, map::RESET_VALUE),
        hpet: Some(Hpet {
            address: map::HPET_ADDRESS,
            capabilities: u32::from_le_bytes(hpet),
        }),
        ecam: Some(Ecam {
            address: ECAM_BASE,
            last_bus: ECAM_LAST_BUS,
        }),
        pci_window: Window {
            start: MMIO_BASE,
            length: MMIO_SIZE,
        },
        pci_window_64: None,
        pci_interrupts: [0, 1, 2, 3].map(slot_gsi),
        serial: vec![Serial {
            port: map::SERIAL_PORTS[0],
            irq: map::SERIAL_IRQS[0] as u8,
        }],
        keyboard: true,
        mouse: true,
        century_register: map::RTC_CENTURY,
    })
}

/// Puts the kernel, and the firmware's tables, into memory that is all zeros.
pub(crate) fn load_kernel<'a>(
    config: &'a MachineConfig,
    memory: &GuestMemory,
) -> Result<Entry, MachineError> {
    let initrds = config.initrds.iter().map(Content::bytes);
    let initrds = initrds.collect::<Result<Vec<_>, _>>()?;
    let module = |module: &'a ModuleConfig| {
        Ok::<_, MachineError>(Module {
            data: module.content.bytes()?,
            command_line: &module.command_line,
        })
    };
    let modules = config.modules.iter().map(module);
    let modules = modules.collect::<Result<Vec<_>, _>>()?;
    let request = Request {
        kernel: config.kernel.bytes()?,
        initrds: &initrds,
        command_line: &config.command_line,
        modules: &modules,
    };
    Ok(load(&request, memory, &platform(config)?)?)
}

/// The console devices that the hooks ask for.
#[derive(Default)]
pub(crate) struct Consoles {
    /// The terminal's device.
    pub(crate) terminal: Option<ConsoleHandle>,
    /// The device of the named ports.
    pub(crate) ports: Option<ConsoleHandle>,
    /// Their names.
    pub(crate) names: Vec<String>,
}

/// Puts devices on the bus, one after the other.
struct Slots<'a> {
    bus: &'a Bus,
    board: &'a Arc<Board>,
    memory: &'a Arc<GuestMemory>,
    /// Lines that several slots share, by interrupt.
    lines: HashMap<u32, Arc<WiredOr>>,
}

impl Slots<'_> {
    fn add(&mut self, device: impl Device + 'static) -> Result<(), MachineError> {
        let gsi = slot_gsi(self.bus.next_slot());
        let line = self.lines.entry(gsi).or_insert_with(|| {
            let board = Arc::clone(self.board);
            WiredOr::new(Arc::new(Line { board, gsi }) as Arc<dyn InterruptLine>)
        });
        let sink = Arc::clone(self.board) as Arc<dyn MessageSink>;
        let function = VirtioPci::new(device, Arc::clone(self.memory), sink, line.input());
        self.bus.add(function)?;
        Ok(())
    }
}

/// Opens the disks, which is where a person's mistakes show, before anything is built.
pub(crate) fn open_disks(config: &MachineConfig) -> Result<Vec<Disk>, MachineError> {
    config
        .disks
        .iter()
        .map(|disk| Ok(Disk::open(&disk.path, disk.read_only)?))
        .collect()
}

/// Puts the devices on the bus: terminal, named ports, entropy, and then disks in their order.
pub(crate) fn add_devices(
    config: &MachineConfig,
    disks: Vec<Disk>,
    hooks: &mut Hooks,
    bus: &Bus,
    board: &Arc<Board>,
    memory: &Arc<GuestMemory>,
) -> Result<Consoles, MachineError> {
    let mut slots = Slots {
        bus,
        board,
        memory,
        lines: HashMap::new(),
    };
    let mut consoles = Consoles::default();
    // Two devices, for what the console's documentation says of multiport and sizes.
    if let Some(output) = hooks.terminal.take() {
        let terminal = Console::new(vec![PortConfig {
            name: String::new(),
            is_console: true,
            output,
        }])
        .map_err(thread("the terminal"))?;
        consoles.terminal = Some(terminal.handle());
        slots.add(terminal)?;
    }
    if !hooks.ports.is_empty() {
        let ports = std::mem::take(&mut hooks.ports);
        consoles.names = ports.iter().map(|port| port.name.clone()).collect();
        let ports = ports.into_iter().map(|port| PortConfig {
            name: port.name,
            is_console: false,
            output: port.output,
        });
        let ports = Console::new(ports.collect()).map_err(thread("the console's ports"))?;
        consoles.ports = Some(ports.handle());
        slots.add(ports)?;
    }
    if config.entropy {
        slots.add(Entropy::new().map_err(thread("the entropy device"))?)?;
    }
    for (index, disk) in disks.into_iter().enumerate() {
        let block = Block::new(disk, &format!("trapgate-{index}")).map_err(thread("a disk"))?;
        slots.add(block)?;
    }
    Ok(consoles)
}

/// Says what a thread would have been for.
pub(crate) fn thread(what: &'static str) -> impl FnOnce(std::io::Error) -> MachineError {
    move |source| MachineError::Thread { what, source }
}
