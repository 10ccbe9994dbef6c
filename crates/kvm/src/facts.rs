//! What the KVM of this host can do.

use std::io;

use kvm_bindings::{
    CpuId, KVM_CAP_DEBUGREGS, KVM_CAP_EXT_CPUID, KVM_CAP_GET_TSC_KHZ, KVM_CAP_IMMEDIATE_EXIT,
    KVM_CAP_MP_STATE, KVM_CAP_SREGS2, KVM_CAP_USER_MEMORY, KVM_CAP_USER_NMI,
    KVM_CAP_VCPU_ATTRIBUTES, KVM_CAP_VCPU_EVENTS, KVM_CAP_X86_MSR_FILTER,
    KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_XCRS, KVM_CAP_XSAVE, KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use trapgate_x86::CpuProfile;
use trapgate_x86::profile::CpuidContext;

use crate::KvmError;
use crate::calls;
use crate::cpuid::{self, Lacks};
use crate::error::{call, named};

/// The interface's version since Linux 2.6.22.
const API_VERSION: i32 = 12;
/// Bytes of a `kvm_xsave`, beyond which another call is needed.
const XSAVE_BYTES: i32 = 4096;

/// What the KVM of this host can do, as far as it is not required.
#[derive(Clone, Debug)]
pub struct Facts {
    /// PIC, I/O APIC and local APICs in the kernel.
    pub irqchip: bool,
    /// Interrupts from event file descriptors.
    pub irqfd: bool,
    /// Writes of the guest that become events of a file descriptor.
    pub ioeventfd: bool,
    /// Single steps.
    pub guest_debug: bool,
    /// The guest's TSC may run at another speed than the host's.
    pub tsc_scaling: bool,
    /// The guest's TSC may be ahead of the host's, or behind. Where it may not, a guest's TSC is the host's, goes on
    /// while the guest is paused, and cannot be set.
    pub tsc_offset: bool,
    /// Speed of a guest's TSC that is not scaled, in Hz.
    pub tsc_hz: u64,
    /// The most processors of a machine.
    pub vcpus: usize,
    pub(crate) cpuid: CpuId,
    pub(crate) msrs: Vec<u32>,
}

/// What the host's kernel does for a machine, beside running its processors. Whatever it does not do is the
/// chipset's, or the bus's, as on every other engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InKernel {
    /// It has PIC, I/O APIC and local APICs: see [`crate::KvmMachine::give_controllers`].
    pub controllers: bool,
    /// Messages to the controllers go by event file descriptors; not without the controllers.
    pub irqfd: bool,
    /// Doorbells ring without leaving the guest: see [`crate::KvmMachine::ring_by_event`].
    pub ioeventfd: bool,
}

impl InKernel {
    /// It does nothing.
    pub const NOTHING: Self = Self {
        controllers: false,
        irqfd: false,
        ioeventfd: false,
    };
    /// It does all that it can.
    pub const ALL: Self = Self {
        controllers: true,
        irqfd: true,
        ioeventfd: true,
    };

    /// What both have.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let controllers = self.controllers && other.controllers;
        Self {
            controllers,
            irqfd: controllers && self.irqfd && other.irqfd,
            ioeventfd: self.ioeventfd && other.ioeventfd,
        }
    }

    /// The names of what it does, for people.
    pub fn names(self) -> Vec<&'static str> {
        let Self {
            controllers,
            irqfd,
            ioeventfd,
        } = self;
        [
            (controllers, "interrupt controllers"),
            (irqfd, "irqfd"),
            (ioeventfd, "ioeventfd"),
        ]
        .into_iter()
        .filter_map(|(is_there, name)| is_there.then_some(name))
        .collect()
    }
}

/// Without which nothing works. The youngest of them came with Linux 5.16.
const REQUIRED: [(u32, &str); 14] = [
    (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY"),
    (KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID"),
    (KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE"),
    (KVM_CAP_USER_NMI, "KVM_CAP_USER_NMI"),
    (KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS"),
    (KVM_CAP_DEBUGREGS, "KVM_CAP_DEBUGREGS"),
    (KVM_CAP_XSAVE, "KVM_CAP_XSAVE"),
    (KVM_CAP_XCRS, "KVM_CAP_XCRS"),
    (KVM_CAP_GET_TSC_KHZ, "KVM_CAP_GET_TSC_KHZ"),
    (
        KVM_CAP_IMMEDIATE_EXIT,
        "KVM_CAP_IMMEDIATE_EXIT, which Linux has since 4.13",
    ),
    (
        KVM_CAP_X86_USER_SPACE_MSR,
        "KVM_CAP_X86_USER_SPACE_MSR, which Linux has since 5.10",
    ),
    (
        KVM_CAP_X86_MSR_FILTER,
        "KVM_CAP_X86_MSR_FILTER, which Linux has since 5.10",
    ),
    (KVM_CAP_SREGS2, "KVM_CAP_SREGS2, which Linux has since 5.14"),
    (
        KVM_CAP_VCPU_ATTRIBUTES,
        "KVM_CAP_VCPU_ATTRIBUTES, which Linux has since 5.16",
    ),
];

impl Facts {
    /// Opens the device and asks.
    ///
    /// # Errors
    /// The device does not open, or lacks what cannot be done without.
    pub fn probe() -> Result<Self, KvmError> {
        Self::of(&open()?)
    }

    pub(crate) fn of(kvm: &Kvm) -> Result<Self, KvmError> {
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::Version { version });
        }
        for (capability, what) in REQUIRED {
            if kvm.check_extension_raw(capability.into()) <= 0 {
                return Err(KvmError::Lacks { what });
            }
        }
        if kvm.check_extension_int(Cap::Xsave2) > XSAVE_BYTES {
            return Err(KvmError::Lacks {
                what: "XSAVE images of 4096 bytes: this process was allowed larger ones",
            });
        }
        // The frequency is a vCPU's, which belongs to a machine.
        let machine = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        let vcpu = machine.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
        let khz = vcpu.get_tsc_khz().map_err(call("KVM_GET_TSC_KHZ"))?;
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
        Ok(Self {
            irqchip: kvm.check_extension(Cap::Irqchip),
            irqfd: kvm.check_extension(Cap::Irqfd) && kvm.check_extension(Cap::IrqRouting),
            ioeventfd: kvm.check_extension(Cap::Ioeventfd),
            guest_debug: kvm.check_extension(Cap::SetGuestDebug),
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            tsc_offset: offsets_tsc(&vcpu)?,
            tsc_hz: u64::from(khz) * 1000,
            vcpus: kvm.get_max_vcpus(),
            cpuid: supported,
            msrs: msrs.as_slice().to_vec(),
        })
    }

    /// What this kernel could do for a machine.
    pub fn in_kernel(&self) -> InKernel {
        InKernel {
            controllers: self.irqchip,
            irqfd: self.irqchip && self.irqfd,
            ioeventfd: self.ioeventfd,
        }
    }

    /// Whether guests can have what a profile promises, its TSC's frequency aside.
    ///
    /// # Errors
    /// [`KvmError::Profile`], with the features that are missing.
    pub fn check_profile(&self, profile: &CpuProfile) -> Result<(), KvmError> {
        let context = CpuidContext::default();
        cpuid::table(profile, &context, self.cpuid.as_slice(), Lacks::Refuse)?;
        Ok(())
    }

    /// The frequency of a TSC that a guest can have: what was wanted if it can be had, else the
    /// host's.
    pub fn nearest_tsc_hz(&self, wanted: u64) -> u64 {
        if self.tsc_scaling || wanted / 1000 == self.tsc_hz / 1000 {
            wanted
        } else {
            self.tsc_hz
        }
    }
}

pub(crate) fn open() -> Result<Kvm, KvmError> {
    Kvm::new().map_err(|error| KvmError::Open(io::Error::from_raw_os_error(error.errno())))
}

/// Whether an offset of the TSC is kept: a KVM without hardware takes it and forgets it.
fn offsets_tsc(vcpu: &VcpuFd) -> Result<bool, KvmError> {
    const SOME: u64 = 1 << 40;
    calls::set_tsc_offset(vcpu, SOME).map_err(named("KVM_VCPU_TSC_OFFSET"))?;
    let kept = calls::tsc_offset(vcpu).map_err(named("KVM_VCPU_TSC_OFFSET"))?;
    Ok(kept == SOME)
}
