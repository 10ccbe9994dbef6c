//! A machine of processor and memory alone.

use crate::{Refused, World};

/// A world without devices: reads give all ones, writes go nowhere, nothing interrupts, and time stands still.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDevices;

impl World for NoDevices {
    fn read_memory(&mut self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write_memory(&mut self, _gpa: u64, _data: &[u8]) {}

    fn read_port(&mut self, _port: u16, _size: u8) -> u32 {
        u32::MAX
    }

    fn write_port(&mut self, _port: u16, _size: u8, _value: u32) {}

    fn take_interrupt(&mut self) -> Option<u8> {
        None
    }

    fn read_apic_msr(&mut self, _index: u32) -> Result<u64, Refused> {
        Err(Refused)
    }

    fn write_apic_msr(&mut self, _index: u32, _value: u64) -> Result<(), Refused> {
        Err(Refused)
    }

    fn task_priority(&mut self) -> u8 {
        0
    }

    fn set_task_priority(&mut self, _priority: u8) {}

    fn clock(&mut self) -> u64 {
        0
    }

    fn epoch(&mut self) -> u64 {
        0
    }

    fn set_tsc_offset(&mut self, _offset: u64) {}
}
