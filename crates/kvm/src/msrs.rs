//! Which MSRs the kernel keeps, and which are ours.

use kvm_bindings::{Msrs, kvm_enable_cap, kvm_msr_entry};
use kvm_ioctls::{
    MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd,
};
use trapgate_x86::msr::*;
use trapgate_x86::{CpuProfile, SystemState, stored_msr};

use crate::KvmError;
use crate::error::call;

/// MSRs that the kernel keeps: the hardware switches them, or must see them. Of the last two, only
/// where it knows them.
pub(crate) const KERNELS: [u32; 12] = [
    STAR,
    LSTAR,
    CSTAR,
    SFMASK,
    KERNEL_GS_BASE,
    IA32_SYSENTER_CS,
    IA32_SYSENTER_ESP,
    IA32_SYSENTER_EIP,
    IA32_PAT,
    IA32_TSC_ADJUST,
    IA32_SPEC_CTRL,
    TSC_AUX,
];

/// Further MSRs that the guest reaches without us, because the kernel does what they do: some of them
/// are special registers to it.
const PASSED: [u32; 5] = [IA32_TSC, IA32_PRED_CMD, EFER, FS_BASE, GS_BASE];

/// Those of [`KERNELS`] that this kernel has.
pub(crate) fn kept_by_kernel(known: &[u32]) -> Vec<u32> {
    let optional = [IA32_SPEC_CTRL, TSC_AUX];
    KERNELS
        .into_iter()
        .filter(|index| known.contains(index) || !optional.contains(index))
        .collect()
}

/// Whether an access to this MSR that the kernel did not carry out is none of ours either.
pub(crate) fn is_kernels(kept: &[u32], index: u32) -> bool {
    kept.contains(&index) || PASSED.contains(&index)
}

/// Lets every MSR that the kernel does not keep exit to us.
pub(crate) fn filter(machine: &VmFd, kept: &[u32], more: &[u32]) -> Result<(), KvmError> {
    let reasons = MsrExitReason::Inval | MsrExitReason::Unknown | MsrExitReason::Filter;
    let capability = kvm_enable_cap {
        cap: kvm_bindings::KVM_CAP_X86_USER_SPACE_MSR,
        args: [reasons.bits().into(), 0, 0, 0],
        ..kvm_enable_cap::default()
    };
    machine
        .enable_cap(&capability)
        .map_err(call("KVM_CAP_X86_USER_SPACE_MSR"))?;
    // Three stretches in which all of them lie, with a bit for each MSR that is allowed.
    let starts = [0, 0x400, 0xc000_0000];
    let mut bitmaps = [[0u8; 128]; 3];
    for &index in kept.iter().chain(&PASSED).chain(more) {
        for (start, bitmap) in starts.into_iter().zip(&mut bitmaps) {
            let bit = index.wrapping_sub(start) as usize;
            if let Some(byte) = bitmap.get_mut(bit / 8) {
                *byte |= 1 << (bit % 8);
            }
        }
    }
    let ranges: Vec<MsrFilterRange<'_>> = starts
        .into_iter()
        .zip(&bitmaps)
        .map(|(base, bitmap)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count: bitmap.len() as u32 * 8,
            bitmap,
        })
        .collect();
    machine
        .set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
        .map_err(call("KVM_X86_SET_MSR_FILTER"))
}

/// The values of the MSRs `kept`, from our state.
pub(crate) fn values(system: &SystemState, profile: &CpuProfile, kept: &[u32]) -> Vec<(u32, u64)> {
    let value = |index| match index {
        IA32_TSC_ADJUST => system.tsc_adjust,
        _ => stored_msr::read(system, profile, index).unwrap_or_default(),
    };
    kept.iter().map(|&index| (index, value(index))).collect()
}

/// The inverse of [`values`]. The values are taken as they are: the kernel may admit more than the
/// profile does, and whoever restores them must see that.
pub(crate) fn store(system: &mut SystemState, values: &[(u32, u64)]) {
    for &(index, value) in values {
        let register = match index {
            STAR => &mut system.star,
            LSTAR => &mut system.lstar,
            CSTAR => &mut system.cstar,
            SFMASK => &mut system.sfmask,
            KERNEL_GS_BASE => &mut system.kernel_gs_base,
            IA32_SYSENTER_CS => &mut system.sysenter_cs,
            IA32_SYSENTER_ESP => &mut system.sysenter_esp,
            IA32_SYSENTER_EIP => &mut system.sysenter_eip,
            IA32_PAT => &mut system.pat,
            IA32_TSC_ADJUST => &mut system.tsc_adjust,
            IA32_SPEC_CTRL => &mut system.spec_ctrl,
            TSC_AUX => &mut system.tsc_aux,
            _ => continue,
        };
        *register = value;
    }
}

/// Reads MSRs from the kernel.
pub(crate) fn get(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut msrs = entries(indices.iter().map(|&index| (index, 0)))?;
    let read = vcpu.get_msrs(&mut msrs).map_err(call("KVM_GET_MSRS"))?;
    let values = msrs.as_slice()[..read]
        .iter()
        .map(|entry| (entry.index, entry.data))
        .collect();
    complete("KVM_GET_MSRS", read, indices.len())?;
    Ok(values)
}

/// Writes MSRs to the kernel.
pub(crate) fn set(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), KvmError> {
    let msrs = entries(values.iter().copied())?;
    let written = vcpu.set_msrs(&msrs).map_err(call("KVM_SET_MSRS"))?;
    complete("KVM_SET_MSRS", written, values.len())
}

fn entries(values: impl Iterator<Item = (u32, u64)>) -> Result<Msrs, KvmError> {
    let entries: Vec<kvm_msr_entry> = values
        .map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..kvm_msr_entry::default()
        })
        .collect();
    Msrs::from_entries(&entries).map_err(|_| KvmError::Lacks {
        what: "room for so many MSRs",
    })
}

/// The kernel stops at the first MSR that it refuses.
fn complete(call: &'static str, done: usize, wanted: usize) -> Result<(), KvmError> {
    if done == wanted {
        return Ok(());
    }
    Err(KvmError::Call {
        call,
        source: std::io::Error::other(format!("it took {done} of {wanted} MSRs")),
    })
}

#[cfg(test)]
mod tests {
    use trapgate_x86::profile::Level;

    use super::*;

    #[test]
    fn values_come_back() {
        let profile = CpuProfile::new(Level::V2, 1_000_000_000);
        let system = SystemState {
            star: 1,
            lstar: 2,
            cstar: 3,
            sfmask: 4,
            kernel_gs_base: 5,
            sysenter_cs: 6,
            sysenter_esp: 7,
            sysenter_eip: 8,
            pat: 0x0001_0406_0007_0406,
            tsc_adjust: 9,
            spec_ctrl: 7,
            tsc_aux: 10,
            ..SystemState::default()
        };
        let values = values(&system, &profile, &KERNELS);
        let mut back = SystemState::default();
        store(&mut back, &values);
        assert_eq!(back, system);
    }

    #[test]
    fn msrs_that_a_kernel_does_not_know_are_ours() {
        let kept = kept_by_kernel(&[IA32_SPEC_CTRL]);
        assert!(kept.contains(&IA32_SPEC_CTRL) && kept.contains(&LSTAR));
        assert!(!is_kernels(&kept, TSC_AUX) && is_kernels(&kept, EFER));
        assert!(!is_kernels(&kept, IA32_MTRR_DEF_TYPE));
    }
}
