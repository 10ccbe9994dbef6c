//! The kernel's interrupt controllers: PIC, I/O APIC and local APICs, which interrupt guests without
//! leaving them.
//!
//! They are the chipset's, lent to the kernel while the machine runs: whenever it is paused their
//! state comes back, so that whoever saves the machine finds everything in one place, and in one form,
//! whatever it ran on. The interval timer stays the chipset's, and interrupts through a line like any device.

mod ioapic;
mod lapic;
mod pic;
mod routing;

use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_CAP_X2APIC_API, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_enable_cap,
    kvm_irqchip,
};
use kvm_ioctls::{VcpuFd, VmFd};
use trapgate_chipset::ControllersState;
use trapgate_chipset::map::IO_APIC_PINS;
use trapgate_chipset::pic::PicState;
use trapgate_x86::msr::IA32_TSC_DEADLINE;

use crate::error::{call, named};
use crate::{InKernel, KvmError, calls};
pub(crate) use ioapic::KernelIoApic;
use lapic::KernelLapic;
pub(crate) use lapic::PAGE;
use lapic::Timer;
use pic::Which;
pub(crate) use routing::Routing;

/// One processor's local APIC.
#[derive(Debug)]
struct Slot {
    /// The processor's descriptor, to reach its local APIC from another thread while it stands
    /// still.
    vcpu: OwnedFd,
    /// A TSC deadline that is to be armed when the processor's TSC has been set.
    deadline: Option<u64>,
    /// An initial count that the kernel was not given, see [`lapic::to_kernel`].
    initial: u32,
    /// When the timer's count ends, in nanoseconds of VM time: as it was given, or when the processor
    /// last left the guest.
    expires: Option<u64>,
}

/// The kernel's interrupt controllers.
#[derive(Debug)]
pub(crate) struct Controllers {
    slots: Mutex<Vec<Slot>>,
    pub(crate) routing: Routing,
}

impl Controllers {
    /// Makes them, for processors that are yet to be made.
    pub(crate) fn new(machine: &VmFd, in_kernel: InKernel) -> Result<Self, KvmError> {
        let capability = kvm_enable_cap {
            cap: KVM_CAP_X2APIC_API,
            args: [
                (KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK).into(),
                0,
                0,
                0,
            ],
            ..kvm_enable_cap::default()
        };
        machine
            .enable_cap(&capability)
            .map_err(call("KVM_CAP_X2APIC_API"))?;
        machine
            .create_irq_chip()
            .map_err(call("KVM_CREATE_IRQCHIP"))?;
        Ok(Self {
            slots: Mutex::default(),
            routing: Routing::new(machine, in_kernel.irqfd)?,
        })
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the local APIC of a processor within reach; they are added in their order.
    pub(crate) fn add(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let vcpu = calls::duplicate(vcpu).map_err(named("the descriptor of a processor"))?;
        self.slots().push(Slot {
            vcpu,
            deadline: None,
            initial: 0,
            expires: None,
        });
        Ok(())
    }

    /// Does something to a processor's state while nobody gives or takes the controllers'.
    pub(crate) fn alone<R>(&self, work: impl FnOnce() -> R) -> R {
        let _slots = self.slots();
        work()
    }

    /// A processor's TSC is what it is to be from now on: its deadline can be armed.
    pub(crate) fn arm(&self, index: usize) -> Result<(), KvmError> {
        let mut slots = self.slots();
        let Some(slot) = slots.get_mut(index) else {
            return Ok(());
        };
        match slot.deadline.take() {
            Some(deadline) => calls::set_msr(&slot.vcpu, IA32_TSC_DEADLINE, deadline)
                .map_err(named("KVM_SET_MSRS")),
            None => Ok(()),
        }
    }

    /// A processor has left the guest, with these registers of its local APIC at `now`, nanoseconds of
    /// VM time: notes when the timer's count ends, since in the kernel it goes on. Whether an interrupt
    /// of the timer may wait in the kernel.
    pub(crate) fn left(&self, index: usize, page: &[u8; PAGE], now: u64) -> bool {
        let timer = lapic::timer(page);
        if let Some(slot) = self.slots().get_mut(index) {
            slot.expires = match timer {
                Timer::Counts(left) => Some(now.saturating_add(left)),
                Timer::Idle | Timer::Ended => None,
            };
        }
        timer == Timer::Ended
    }

    /// Gives the kernel the state; `levels` are the GSIs that are high, a bit each. All processors
    /// stand still.
    pub(crate) fn give(
        &self,
        machine: &VmFd,
        state: &ControllersState,
        levels: u32,
        now: u64,
    ) -> Result<(), KvmError> {
        let ControllersState {
            local_apics,
            io_apic,
            pic: PicState { master, slave },
        } = state;
        let mut slots = self.slots();
        // The wires first: what they do to the old state is overwritten by what follows.
        for gsi in 0..IO_APIC_PINS {
            set_line(machine, gsi, levels >> gsi & 1 != 0)?;
        }
        for (which, chip) in [(Which::Master, master), (Which::Slave, slave)] {
            let mut irqchip = kvm_irqchip {
                chip_id: chip_id(which),
                ..kvm_irqchip::default()
            };
            irqchip.chip.pic = pic::to_kernel(which, chip);
            machine
                .set_irqchip(&irqchip)
                .map_err(call("KVM_SET_IRQCHIP"))?;
        }
        // The local APICs before the I/O APIC, which sends them what is still asserted.
        for (id, (slot, state)) in (0..).zip(slots.iter_mut().zip(local_apics)) {
            let kernel = lapic::to_kernel(id, state, now);
            calls::set_apic_base(&slot.vcpu, kernel.apic_base).map_err(named("KVM_SET_SREGS2"))?;
            // Whatever was armed must not fire between here and `arm`.
            calls::set_msr(&slot.vcpu, IA32_TSC_DEADLINE, 0).map_err(named("KVM_SET_MSRS"))?;
            calls::set_lapic(&slot.vcpu, &kernel.page).map_err(named("KVM_SET_LAPIC"))?;
            slot.deadline = (kernel.deadline != 0).then_some(kernel.deadline);
            slot.initial = state.timer.initial;
            slot.expires = state.timer.expires;
        }
        let kernel = ioapic::to_kernel(io_apic);
        machine
            .set_irqchip(&calls::io_apic_irqchip(&kernel))
            .map_err(call("KVM_SET_IRQCHIP"))
    }

    /// Takes the state from the kernel. All processors stand still.
    pub(crate) fn take(&self, machine: &VmFd) -> Result<ControllersState, KvmError> {
        let slots = self.slots();
        self.routing.settle(machine)?;
        // Before any register is read: an INIT that waits resets the local APIC too.
        for slot in slots.iter() {
            calls::accept_startup(&slot.vcpu).map_err(named("KVM_GET_MP_STATE"))?;
        }
        let mut local_apics = Vec::new();
        for slot in slots.iter() {
            let kernel = KernelLapic {
                apic_base: calls::apic_base(&slot.vcpu).map_err(named("KVM_GET_SREGS2"))?,
                page: calls::lapic(&slot.vcpu).map_err(named("KVM_GET_LAPIC"))?,
                deadline: match slot.deadline {
                    Some(deadline) => deadline,
                    None => {
                        calls::msr(&slot.vcpu, IA32_TSC_DEADLINE).map_err(named("KVM_GET_MSRS"))?
                    }
                },
            };
            local_apics.push(lapic::from_kernel(&kernel, slot.initial, slot.expires));
        }
        let get = |chip_id| {
            let mut irqchip = kvm_irqchip {
                chip_id,
                ..kvm_irqchip::default()
            };
            machine
                .get_irqchip(&mut irqchip)
                .map_err(call("KVM_GET_IRQCHIP"))?;
            Ok(irqchip)
        };
        let chip = |which| {
            let irqchip = get(chip_id(which))?;
            Ok(pic::from_kernel(which, &calls::pic_of(&irqchip)))
        };
        let io_apic = calls::io_apic_of(&get(KVM_IRQCHIP_IOAPIC)?);
        Ok(ControllersState {
            local_apics,
            io_apic: ioapic::from_kernel(&io_apic),
            pic: PicState {
                master: chip(Which::Master)?,
                slave: chip(Which::Slave)?,
            },
        })
    }
}

/// Sets the level of a GSI.
pub(crate) fn set_line(machine: &VmFd, gsi: u32, level: bool) -> Result<(), KvmError> {
    // It leads nowhere, and the kernel would say so.
    if gsi == 0 {
        return Ok(());
    }
    machine
        .set_irq_line(gsi, level)
        .map_err(call("KVM_IRQ_LINE"))
}

fn chip_id(which: Which) -> u32 {
    match which {
        Which::Master => KVM_IRQCHIP_PIC_MASTER,
        Which::Slave => KVM_IRQCHIP_PIC_SLAVE,
    }
}

/// MSRs that the kernel answers when it has the local APICs.
pub(crate) const MSRS: [u32; 2] = [trapgate_x86::msr::IA32_APIC_BASE, IA32_TSC_DEADLINE];
