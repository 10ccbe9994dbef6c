//! What a processor sees outside of itself.

use std::sync::Arc;

use trapgate_chipset::map;
use trapgate_engine::{Refused, World};
use trapgate_pci::Bus;

use crate::board::Board;

/// The ports of PCI's configuration mechanism, among which is the chipset's reset register.
const PCI_PORTS: std::ops::Range<u16> = 0xcf8..0xd00;
/// Where the chipset's own registers are, unless a guest moves its local APIC.
pub(crate) const CHIPSET_MEMORY: std::ops::Range<u64> = map::IO_APIC_ADDRESS..0xfef0_0000;

/// The machine as one processor sees it.
pub(crate) struct PcWorld {
    pub(crate) board: Arc<Board>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) cpu: usize,
}

impl PcWorld {
    fn chipset_read(&self, gpa: u64, data: &mut [u8]) -> bool {
        self.board
            .operate(|chipset, now| chipset.mmio_read(self.cpu, gpa, data, now))
    }

    fn chipset_write(&self, gpa: u64, data: &[u8]) -> bool {
        self.board
            .operate(|chipset, now| chipset.mmio_write(self.cpu, gpa, data, now))
    }
}

impl World for PcWorld {
    fn read_memory(&mut self, gpa: u64, data: &mut [u8]) {
        // Whichever is the likelier is asked first; addresses that both claim are a guest's mistake.
        let chipset_first = CHIPSET_MEMORY.contains(&gpa);
        let answered = chipset_first && self.chipset_read(gpa, data)
            || self.bus.memory_read(gpa, data)
            || !chipset_first && self.chipset_read(gpa, data);
        if !answered {
            data.fill(0xff);
        }
    }

    fn write_memory(&mut self, gpa: u64, data: &[u8]) {
        let chipset_first = CHIPSET_MEMORY.contains(&gpa);
        // What nobody takes is lost, as on a PC.
        let _taken = chipset_first && self.chipset_write(gpa, data)
            || self.bus.memory_write(gpa, data)
            || !chipset_first && self.chipset_write(gpa, data);
    }

    fn read_port(&mut self, port: u16, size: u8) -> u32 {
        if PCI_PORTS.contains(&port) {
            let mut bytes = [0; 4];
            if self
                .bus
                .port_read(port, &mut bytes[..usize::from(size.min(4))])
            {
                return u32::from_le_bytes(bytes);
            }
        }
        self.board
            .operate(|chipset, now| chipset.port_read(port, size, now))
            .unwrap_or(u32::MAX >> (32 - 8 * u32::from(size.clamp(1, 4))))
    }

    fn write_port(&mut self, port: u16, size: u8, value: u32) {
        let bytes = value.to_le_bytes();
        if PCI_PORTS.contains(&port)
            && self
                .bus
                .port_write(port, &bytes[..usize::from(size.min(4))])
        {
            return;
        }
        self.board
            .operate_port(|chipset, now| chipset.port_write(port, size, value, now));
    }

    fn take_interrupt(&mut self) -> Option<u8> {
        self.board
            .operate(|chipset, _| chipset.take_interrupt(self.cpu))
    }

    fn read_apic_msr(&mut self, index: u32) -> Result<u64, Refused> {
        self.board
            .operate(|chipset, now| chipset.apic_msr_read(self.cpu, index, now))
            .map_err(|_| Refused)
    }

    fn write_apic_msr(&mut self, index: u32, value: u64) -> Result<(), Refused> {
        self.board
            .operate(|chipset, now| chipset.apic_msr_write(self.cpu, index, value, now))
            .map_err(|_| Refused)
    }

    fn task_priority(&mut self) -> u8 {
        self.board.operate(|chipset, _| chipset.cr8(self.cpu))
    }

    fn set_task_priority(&mut self, priority: u8) {
        self.board
            .operate(|chipset, _| chipset.set_cr8(self.cpu, priority));
    }

    fn clock(&mut self) -> u64 {
        self.board.clock.now()
    }

    fn epoch(&mut self) -> u64 {
        self.board.clock.epoch()
    }

    fn set_tsc_offset(&mut self, offset: u64) {
        self.board
            .operate(|chipset, now| chipset.set_tsc_offset(self.cpu, offset, now));
    }
}
