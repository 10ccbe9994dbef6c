//! A virtual machine of the kernel's.

use std::sync::Arc;

use kvm_ioctls::{Kvm, VmFd};
use trapgate_chipset::ControllersState;
use trapgate_engine::World;
use trapgate_memory::GuestMemory;
use trapgate_x86::CpuProfile;
use trapgate_x86::profile::CpuidContext;

use vmm_sys_util::eventfd::EventFd;

use crate::controllers::{self, Controllers};
use crate::cpuid::{self, Lacks};
use crate::error::{call, named};
use crate::facts::{self, Facts};
use crate::memory::Slots;
use crate::msrs;
use crate::pace::Pace;
use crate::vcpu::KvmVcpu;
use crate::{InKernel, KvmError, calls};

/// Three pages that processors without "unrestricted guest" need in the guest's addresses, and one
/// for real mode (KVM_SET_TSS_ADDR, KVM_SET_IDENTITY_MAP_ADDR): above every device of a PC and
/// below the firmware's flash, where there is neither RAM nor device.
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;

/// A virtual machine of the kernel's: memory, and what its processors share.
#[derive(Debug)]
pub struct KvmMachine {
    machine: VmFd,
    facts: Facts,
    profile: CpuProfile,
    count: u32,
    lacks: Lacks,
    hidden: Vec<&'static str>,
    pub(crate) kept: Vec<u32>,
    pub(crate) pace: Pace,
    pub(crate) memory: Arc<GuestMemory>,
    // After `machine`, which uses it, is closed.
    slots: Slots,
    pub(crate) controllers: Option<Controllers>,
    in_kernel: InKernel,
}

impl KvmMachine {
    /// A machine for `count` processors of a profile, with all of `memory`. Of what is `wanted` of the kernel it does what it
    /// can, which is [`Self::in_kernel`].
    ///
    /// # Errors
    /// The device does not open, or this KVM lacks something, or cannot give what the profile promises
    /// ([`KvmError::Profile`], [`KvmError::TscRate`]).
    pub fn new(
        memory: Arc<GuestMemory>,
        profile: CpuProfile,
        count: u32,
        lacks: Lacks,
        wanted: InKernel,
    ) -> Result<Arc<Self>, KvmError> {
        let kvm: Kvm = facts::open()?;
        let facts = Facts::of(&kvm)?;
        if facts.nearest_tsc_hz(profile.tsc_hz) != profile.tsc_hz {
            return Err(KvmError::TscRate {
                hz: profile.tsc_hz,
                host_hz: facts.tsc_hz,
            });
        }
        let context = CpuidContext::default();
        let (_, hidden) = cpuid::table(&profile, &context, facts.cpuid.as_slice(), lacks)?;
        let machine = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        machine
            .set_identity_map_address(IDENTITY_MAP)
            .map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        machine
            .set_tss_address(TSS)
            .map_err(call("KVM_SET_TSS_ADDR"))?;
        let kept = msrs::kept_by_kernel(&facts.msrs);
        let in_kernel = wanted.and(facts.in_kernel());
        let controllers = match in_kernel.controllers {
            false => None,
            true => Some(Controllers::new(&machine, in_kernel)?),
        };
        let more: &[u32] = match &controllers {
            Some(_) => &controllers::MSRS,
            None => &[],
        };
        msrs::filter(&machine, &kept, more)?;
        let slots = Slots::new(&machine, Arc::clone(&memory))?;
        Ok(Arc::new(Self {
            machine,
            facts,
            profile,
            count,
            lacks,
            hidden,
            kept,
            pace: Pace::new(),
            memory,
            slots,
            controllers,
            in_kernel,
        }))
    }

    /// Processor `index`, after reset. It owns its view of the world.
    ///
    /// # Errors
    /// The kernel gives no more processors.
    pub fn vcpu(self: &Arc<Self>, world: Box<dyn World>, index: u32) -> Result<KvmVcpu, KvmError> {
        let vcpu = self
            .machine
            .create_vcpu(index.into())
            .map_err(call("KVM_CREATE_VCPU"))?;
        let context = CpuidContext {
            processor: index,
            processors: self.count,
            ..CpuidContext::default()
        };
        let supported = self.facts.cpuid.as_slice();
        let (table, _) = cpuid::table(&self.profile, &context, supported, self.lacks)?;
        vcpu.set_cpuid2(&table).map_err(call("KVM_SET_CPUID2"))?;
        if self.facts.tsc_scaling {
            vcpu.set_tsc_khz((self.profile.tsc_hz / 1000) as u32)
                .map_err(call("KVM_SET_TSC_KHZ"))?;
        }
        if let Some(controllers) = &self.controllers {
            controllers.add(&vcpu)?;
        }
        KvmVcpu::new(Arc::clone(self), vcpu, world, index as usize)
    }

    /// What the kernel does for this machine.
    pub fn in_kernel(&self) -> InKernel {
        self.in_kernel
    }

    /// From now on a write of two bytes at `gpa`, where there is no RAM, signals `event`, and the processor does not leave
    /// the guest for it.
    ///
    /// # Errors
    /// The kernel has no room for more, or something of its own there.
    pub fn ring_by_event(&self, gpa: u64, event: &EventFd) -> Result<(), KvmError> {
        calls::ioeventfd(&self.machine, event, gpa, true).map_err(named("KVM_IOEVENTFD"))
    }

    /// Undoes [`Self::ring_by_event`]. When it returns, whatever was written has been signalled.
    ///
    /// # Errors
    /// It was not done.
    pub fn ring_by_exit(&self, gpa: u64, event: &EventFd) -> Result<(), KvmError> {
        calls::ioeventfd(&self.machine, event, gpa, false).map_err(named("KVM_IOEVENTFD"))
    }

    /// Whether the kernel has the interrupt controllers.
    pub fn has_controllers(&self) -> bool {
        self.controllers.is_some()
    }

    /// Lends the kernel the interrupt controllers, at `now`, nanoseconds of VM time. `levels` are the GSIs that
    /// are high, a bit each. All processors have been made, and stand still.
    ///
    /// # Errors
    /// The kernel does not take the state.
    pub fn give_controllers(
        &self,
        state: &ControllersState,
        levels: u32,
        now: u64,
    ) -> Result<(), KvmError> {
        match &self.controllers {
            Some(controllers) => controllers.give(&self.machine, state, levels, now),
            None => Ok(()),
        }
    }

    /// Takes the interrupt controllers back. All processors stand still.
    ///
    /// # Errors
    /// The kernel has none.
    pub fn take_controllers(&self) -> Result<ControllersState, KvmError> {
        self.controllers()?.take(&self.machine)
    }

    /// Sets the level of a GSI, while the kernel has the interrupt controllers.
    ///
    /// # Errors
    /// There is no such GSI.
    pub fn set_line(&self, gsi: u32, level: bool) -> Result<(), KvmError> {
        controllers::set_line(&self.machine, gsi, level)
    }

    /// Sends a message-signalled interrupt, while the kernel has the interrupt controllers.
    ///
    /// # Errors
    /// The kernel has no controllers, or refuses it.
    pub fn send_message(&self, address: u64, data: u32) -> Result<(), KvmError> {
        self.controllers()?
            .routing
            .send(&self.machine, (address, data))
    }

    /// How many messages of devices have reached the controllers by events, and not by a call each.
    pub fn messages_by_event(&self) -> u64 {
        let controllers = self.controllers.as_ref();
        controllers.map_or(0, |controllers| controllers.routing.sent_by_event())
    }

    fn controllers(&self) -> Result<&Controllers, KvmError> {
        self.controllers.as_ref().ok_or(KvmError::Lacks {
            what: "interrupt controllers: it was made without",
        })
    }

    /// Whether the kernel may not see that the guest lets interrupts in.
    pub(crate) fn overlooks_windows(&self) -> bool {
        self.lacks == Lacks::Hide && self.facts.guest_debug
    }

    /// What this KVM can do.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// The profile that its guests see.
    pub fn profile(&self) -> &CpuProfile {
        &self.profile
    }

    /// Features of the profile that guests are told they do not have.
    pub fn hidden_features(&self) -> &[&'static str] {
        &self.hidden
    }

    /// Begins to log the guest's writes; [`Self::collect_writes`] tells of them. While they are
    /// logged the guest's first write to each page is slow.
    ///
    /// # Errors
    /// The kernel has no memory for the log.
    pub fn log_writes(&self, on: bool) -> Result<(), KvmError> {
        self.slots.log(&self.machine, on)
    }

    /// Reports pages that the guest wrote since the last call, or since logging began, to the memory's traces:
    /// a page that is `CLEAN` loses the flag and its listeners hear of it, as when any
    /// other engine or a device writes.
    ///
    /// # Errors
    /// Writes are not logged.
    pub fn collect_writes(&self) -> Result<(), KvmError> {
        self.slots.collect(&self.machine)
    }
}
