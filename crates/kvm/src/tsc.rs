//! A processor's TSC, see [`crate::pace`].

use std::sync::Arc;

use kvm_ioctls::VcpuFd;
use trapgate_x86::msr::IA32_TSC;

use crate::error::named;
use crate::pace::ticks;
use crate::vcpu::KvmVcpu;
use crate::{KvmError, calls, msrs};

fn kernel_offset(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    calls::tsc_offset(vcpu).map_err(named("KVM_VCPU_TSC_OFFSET"))
}

/// The host's TSC, scaled: the guest's without its offset.
fn host_tsc(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    let tsc = msrs::get(vcpu, &[IA32_TSC])?[0].1;
    Ok(tsc.wrapping_sub(kernel_offset(vcpu)?))
}

/// The host's TSC, and VM time just before and just after.
struct Reading {
    before: u64,
    host: u64,
    after: u64,
}

/// How close the two should be, in nanoseconds: what the calls take on a slow host.
const CLOSE: u64 = 20_000;
/// How often it is tried: another thread may come between.
const TRIES: usize = 8;

impl Reading {
    fn take(vcpu: &VcpuFd, clock: &mut dyn FnMut() -> u64) -> Result<Self, KvmError> {
        let mut once = || -> Result<Self, KvmError> {
            Ok(Self {
                before: clock(),
                host: host_tsc(vcpu)?,
                after: clock(),
            })
        };
        let mut best = once()?;
        for _ in 1..TRIES {
            if best.width() <= CLOSE {
                break;
            }
            let next = once()?;
            if next.width() < best.width() {
                best = next;
            }
        }
        Ok(best)
    }

    fn width(&self) -> u64 {
        self.after.saturating_sub(self.before)
    }
}

impl KvmVcpu {
    /// Brings the TSC back to VM time after a pause, or to the offset that was set.
    pub(crate) fn start_tsc(&mut self) -> Result<(), KvmError> {
        let machine = Arc::clone(&self.machine);
        let hz = machine.profile().tsc_hz;
        let Self { world, vcpu, .. } = self;
        let (stretch, lead) = machine.pace.enter(&mut || world.clock(), |clock| {
            let Reading { host, after, .. } = Reading::take(vcpu, clock)?;
            // Rather ahead: it must not fall behind what the guest has seen.
            Ok::<_, KvmError>(ticks(after, hz).wrapping_sub(host))
        })?;
        if stretch == self.stretch {
            return Ok(());
        }
        let wanted = self.current_offset()?;
        let offset = lead.wrapping_add(wanted);
        calls::set_tsc_offset(&self.vcpu, offset).map_err(named("KVM_VCPU_TSC_OFFSET"))?;
        self.tsc_offset = kernel_offset(&self.vcpu)?.wrapping_sub(lead);
        self.stretch = stretch;
        self.world.set_tsc_offset(self.tsc_offset);
        if self.tsc_offset != wanted {
            // The guest's clock goes by its TSC.
            self.write_system_time(self.tsc_offset);
        }
        Ok(())
    }

    /// Whether the TSC of a state would go back here: a KVM without hardware gives its guests the
    /// host's.
    pub(crate) fn check_tsc(&mut self, state_offset: u64) -> Result<(), KvmError> {
        if self.machine.facts().tsc_offset {
            return Ok(());
        }
        let hz = self.machine.profile().tsc_hz;
        let now = ticks(self.world.clock(), hz).wrapping_add(state_offset);
        let behind = now.saturating_sub(host_tsc(&self.vcpu)?);
        // As much as two readings of different clocks, and their drift, may differ; the move itself takes
        // that long.
        if behind < hz / 100 {
            return Ok(());
        }
        Err(KvmError::TscAhead {
            seconds: behind / hz.max(1) + 1,
        })
    }

    /// Notes how VM time and the TSC stand now, for states that are taken out.
    pub(crate) fn note_tsc(&mut self) -> Result<(), KvmError> {
        let hz = self.machine.profile().tsc_hz;
        let Self { world, vcpu, .. } = self;
        let Reading { before, host, .. } = Reading::take(vcpu, &mut || world.clock())?;
        // The smaller this is the further ahead is the TSC of a state that is taken, for the same reason.
        self.machine
            .pace
            .leave(ticks(before, hz).wrapping_sub(host));
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
