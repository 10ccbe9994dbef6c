//! RDMSR and WRMSR that leave the guest: those of the local APIC's model, those that only
//! store a value, and those that the kernel found wrong.

use trapgate_memory::GuestMemory;
use trapgate_x86::msr::{IA32_APIC_BASE, IA32_TSC_DEADLINE, X2APIC_FIRST, X2APIC_LAST};
use trapgate_x86::pvclock;
use trapgate_x86::stored_msr::{self, Written};

use crate::error::named;
use crate::vcpu::KvmVcpu;
use crate::{KvmError, calls, msrs};

/// KVM_SYSTEM_TIME: the clock is on.
const CLOCK_ENABLED: u64 = 1;
const NANOSECONDS: u64 = 1_000_000_000;

fn is_apics(index: u32) -> bool {
    matches!(
        index,
        IA32_APIC_BASE | IA32_TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST
    )
}

impl KvmVcpu {
    /// What RDMSR gives, or `None` for #GP(0).
    pub(crate) fn read_msr(&mut self, index: u32) -> Option<u64> {
        if is_apics(index) && self.has_kernel_controllers() {
            return None;
        }
        if is_apics(index) {
            return self.world.read_apic_msr(index).ok();
        }
        if msrs::is_kernels(&self.machine.kept, index) {
            return None;
        }
        stored_msr::read(&self.ours.system, self.machine.profile(), index)
    }

    /// What WRMSR does; `None` for #GP(0).
    pub(crate) fn write_msr(&mut self, index: u32, value: u64) -> Result<Option<()>, KvmError> {
        if is_apics(index) && self.has_kernel_controllers() {
            return Ok(None);
        }
        if is_apics(index) {
            if index == IA32_TSC_DEADLINE {
                self.tell_offset()?;
            }
            let written = self.world.write_apic_msr(index, value).ok();
            self.interrupt_waits = true;
            if index == IA32_APIC_BASE {
                self.show_apic_base()?;
            }
            return Ok(written);
        }
        if msrs::is_kernels(&self.machine.kept, index) {
            return Ok(None);
        }
        let written = stored_msr::write(&mut self.ours.system, index, value);
        match written {
            Some(Written::SystemTime) => {
                self.note_tsc()?;
                self.write_system_time(self.current_offset()?);
            }
            Some(Written::WallClock) => self.write_wall_clock(),
            Some(Written::Stored) | None => {}
        }
        Ok(written.map(|_| ()))
    }

    /// CPUID shows whether the local APIC is enabled.
    fn show_apic_base(&mut self) -> Result<(), KvmError> {
        let base = self.world.read_apic_msr(IA32_APIC_BASE).unwrap_or_default();
        if base != self.apic_base {
            self.apic_base = base;
            let mut sregs = calls::sregs2(&self.vcpu).map_err(named("KVM_GET_SREGS2"))?;
            sregs.apic_base = base;
            calls::set_sregs2(&self.vcpu, &sregs).map_err(named("KVM_SET_SREGS2"))?;
        }
        Ok(())
    }

    /// The paravirtual clock where the guest asked for it, as the interpreter writes it: it starts at
    /// VM time zero, so that it need not be written again unless the TSC is moved.
    pub(crate) fn write_system_time(&self, tsc_offset: u64) {
        let register = self.ours.system.paravirtual.system_time;
        if register & CLOCK_ENABLED == 0 {
            return;
        }
        let hz = self.machine.profile().tsc_hz;
        write_versioned(&self.machine.memory, register & !CLOCK_ENABLED, |version| {
            pvclock::time_info(tsc_offset, 0, hz, version)
        });
    }

    fn write_wall_clock(&mut self) {
        let epoch = self.world.epoch();
        let (seconds, rest) = (epoch / NANOSECONDS, epoch % NANOSECONDS);
        let gpa = self.ours.system.paravirtual.wall_clock;
        write_versioned(&self.machine.memory, gpa, |version| {
            pvclock::wall_clock(seconds as u32, rest as u32, version)
        });
    }
}

/// Writes a structure whose first word is a version: odd while the rest may be inconsistent, then
/// the next even one. Where there is no RAM it goes nowhere.
fn write_versioned<const N: usize>(memory: &GuestMemory, gpa: u64, make: impl Fn(u32) -> [u8; N]) {
    let mut version = [0; 4];
    if memory.read(gpa, &mut version).is_err() {
        return;
    }
    let writing = u32::from_le_bytes(version).wrapping_add(1) | 1;
    let complete = writing.wrapping_add(1);
    let parts: [(u64, &[u8]); 3] = [
        (0, &writing.to_le_bytes()),
        (4, &make(complete)[4..]),
        (0, &complete.to_le_bytes()),
    ];
    for (offset, bytes) in parts {
        // The rest of it may reach beyond RAM, where it is lost.
        let _ = memory.write(gpa.wrapping_add(offset), bytes);
    }
}

#[cfg(test)]
mod tests {
    use trapgate_memory::RamRange;

    use super::*;

    #[test]
    fn version_is_even_and_grows_whatever_it_was() {
        let memory = GuestMemory::new(&[RamRange {
            start: 0,
            length: 0x1000,
        }])
        .unwrap();
        for (before, after) in [(0u32, 2u32), (2, 4), (5, 8), (u32::MAX, 2)] {
            memory.write(0x100, &before.to_le_bytes()).unwrap();
            write_versioned(&memory, 0x100, |_| [7; 12]);
            let mut bytes = [0; 12];
            memory.read(0x100, &mut bytes).unwrap();
            assert_eq!(bytes[..4], after.to_le_bytes());
            assert_eq!(bytes[4..], [7; 8]);
        }
        write_versioned(&memory, u64::MAX - 1, |_| [7; 12]);
    }
}
