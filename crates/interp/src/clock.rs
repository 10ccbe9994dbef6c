//! The paravirtual clock's structures in guest memory (Linux `Documentation/virt/kvm/x86/msr.rst`).

use trapgate_x86::pvclock;

use crate::cpu::Cpu;

/// KVM_SYSTEM_TIME: the clock is on.
const ENABLED: u64 = 1;

impl Cpu {
    /// Writes the clock that the guest asked for with KVM_SYSTEM_TIME, if it did: after the TSC was
    /// moved, and after a machine was restored.
    ///
    /// It starts at VM time zero and not now: the multiplier is rounded, so processors whose clocks
    /// start at different times would drift apart, and a thread that moves between them would see
    /// time go backwards.
    pub fn refresh_clock(&mut self) {
        let register = self.sys.paravirtual.system_time;
        if register & ENABLED == 0 {
            return;
        }
        let (at_zero, hz) = (self.sys.tsc_offset, self.profile.tsc_hz);
        let gpa = register & !ENABLED;
        self.write_versioned(gpa, |version| pvclock::time_info(at_zero, 0, hz, version));
    }

    /// Writes the time of day when VM time was zero where KVM_WALL_CLOCK says.
    pub(crate) fn write_wall_clock(&mut self) {
        const NANOSECONDS: u64 = 1_000_000_000;
        let epoch = self.world.epoch();
        let (seconds, rest) = (epoch / NANOSECONDS, epoch % NANOSECONDS);
        self.write_versioned(self.sys.paravirtual.wall_clock, |version| {
            pvclock::wall_clock(seconds as u32, rest as u32, version)
        });
    }

    /// Writes a structure whose first word is a version: odd while the rest may be inconsistent,
    /// then the next even one.
    fn write_versioned<const N: usize>(&mut self, gpa: u64, make: impl Fn(u32) -> [u8; N]) {
        let mut version = [0; 4];
        if self.memory.read(gpa, &mut version).is_err() {
            // There is no RAM: a write goes nowhere.
            return;
        }
        let writing = u32::from_le_bytes(version).wrapping_add(1) | 1;
        let complete = writing.wrapping_add(1);
        self.write_physical(gpa, &writing.to_le_bytes());
        self.write_physical(gpa + 4, &make(complete)[4..]);
        self.write_physical(gpa, &complete.to_le_bytes());
    }
}
