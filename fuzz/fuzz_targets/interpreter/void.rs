//! A world that answers the same to the same questions.

use trapgate_engine::{Refused, World};

/// Devices that are not there. What it answers depends on the questions only.
pub(crate) struct Void {
    /// An interrupt that waits to be taken.
    pub(crate) interrupt: Option<u8>,
    /// Nanoseconds: each question is a microsecond after the last.
    pub(crate) clock: u64,
}

impl World for Void {
    fn read_memory(&mut self, gpa: u64, data: &mut [u8]) {
        data.fill(gpa as u8);
    }

    fn write_memory(&mut self, _gpa: u64, _data: &[u8]) {}

    fn read_port(&mut self, port: u16, _size: u8) -> u32 {
        port.into()
    }

    fn write_port(&mut self, _port: u16, _size: u8, _value: u32) {}

    fn take_interrupt(&mut self) -> Option<u8> {
        self.interrupt.take()
    }

    fn read_apic_msr(&mut self, index: u32) -> Result<u64, Refused> {
        if index == 0x1b {
            Ok(0xfee0_0900)
        } else {
            Err(Refused)
        }
    }

    fn write_apic_msr(&mut self, _index: u32, _value: u64) -> Result<(), Refused> {
        Err(Refused)
    }

    fn task_priority(&mut self) -> u8 {
        0
    }

    fn set_task_priority(&mut self, _priority: u8) {}

    fn clock(&mut self) -> u64 {
        self.clock += 1_000;
        self.clock
    }

    fn epoch(&mut self) -> u64 {
        0
    }

    fn set_tsc_offset(&mut self, _offset: u64) {}
}
