//! A processor's TSC, see [`crate::pace`].

use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use trapgate_x86::msr::IA32_TSC;

use crate::pace::ticks;
use crate::vcpu::{KvmVcpu, named};
use crate::{KvmError, calls, msrs};

fn kernel_offset(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    calls::tsc_offset(vcpu).map_err(named("KVM_VCPU_TSC_OFFSET"))
}

/// The host's TSC, scaled: the guest's without its offset.
fn host_tsc(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    let tsc = msrs::get(vcpu, &[IA32_TSC])?[0].1;
    Ok(tsc.wrapping_sub(kernel_offset(vcpu)?))
}

impl KvmVcpu {
    /// Brings the TSC back to VM time after a pause, or to the offset that was set.
    pub(crate) fn start_tsc(&mut self) -> Result<(), KvmError> {
        let machine = Arc::clone(&self.machine);
        let hz = machine.profile().tsc_hz;
        let Self { world, vcpu, .. } = self;
        let (stretch, lead) = machine.pace.enter(&mut || world.clock(), |clock| {
            // The TSC first: it must not fall behind what the guest has seen.
            let host = host_tsc(vcpu)?;
            Ok(ticks(clock(), hz).wrapping_sub(host))
        })?;
        if stretch == self.stretch {
            return Ok(());
        }
        self.tsc_offset = self.current_offset()?;
        let offset = lead.wrapping_add(self.tsc_offset);
        calls::set_tsc_offset(&self.vcpu, offset).map_err(named("KVM_VCPU_TSC_OFFSET"))?;
        self.stretch = stretch;
        self.world.set_tsc_offset(self.tsc_offset);
        Ok(())
    }

    /// Notes how VM time and the TSC stand now, for states that are taken out.
    pub(crate) fn note_tsc(&mut self) -> Result<(), KvmError> {
        // The clock first, for the same reason.
        let now = self.world.clock();
        let host = host_tsc(&self.vcpu)?;
        let hz = self.machine.profile().tsc_hz;
        self.machine.pace.leave(ticks(now, hz).wrapping_sub(host));
        Ok(())
    }

    /// The offset of the TSC as it belongs into a state: the guest may have moved it, and drift from
    /// VM time is added to it.
    pub(crate) fn current_offset(&self) -> Result<u64, KvmError> {
        match self.machine.pace.latest(self.stretch) {
            Some(lead) => Ok(kernel_offset(&self.vcpu)?.wrapping_sub(lead)),
            None => Ok(self.tsc_offset),
        }
    }

    /// Tells the local APIC's model where the TSC is now.
    pub(crate) fn tell_offset(&mut self) -> Result<(), KvmError> {
        self.note_tsc()?;
        let offset = self.current_offset()?;
        self.world.set_tsc_offset(offset);
        Ok(())
    }
}
