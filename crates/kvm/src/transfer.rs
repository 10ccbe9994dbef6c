//! A processor's state, taken out of the kernel and put in.

use std::sync::Arc;

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, kvm_mp_state, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use trapgate_x86::msr::IA32_APIC_BASE;
use trapgate_x86::registers::rflags;
use trapgate_x86::{Activity, CpuState};

use crate::error::{call, named};
use crate::events::Events;
use crate::registers::Special;
use crate::state::{ApicRegisters, KernelState, join, split};
use crate::vcpu::KvmVcpu;
use crate::{KvmError, calls, msrs};

impl KvmVcpu {
    /// The state between two instructions.
    pub(crate) fn export(&self) -> Result<CpuState, KvmError> {
        let vcpu = &self.vcpu;
        // First: an INIT or a start-up IPI that waits is accepted by it, which changes every register.
        let activity = self.current_activity()?;
        // Before the registers: a page fault's address may wait with it, and goes to CR2 by this.
        let waiting = vcpu
            .get_vcpu_events()
            .map_err(call("KVM_GET_VCPU_EVENTS"))?;
        let sregs = calls::sregs2(vcpu).map_err(named("KVM_GET_SREGS2"))?;
        let special = Special::from_sregs(&sregs);
        let xcrs = vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?;
        let kernel = KernelState {
            regs: vcpu.get_regs().map_err(call("KVM_GET_REGS"))?,
            debug: vcpu.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?,
            xcr0: xcrs.xcrs[0].value,
            xsave: vcpu.get_xsave().map_err(call("KVM_GET_XSAVE"))?,
            events: Events::from_kvm(&waiting, special.cr2),
            msrs: msrs::get(vcpu, &self.machine.kept)?,
            special,
        };
        Ok(join(
            &kernel,
            &self.ours,
            self.machine.profile(),
            self.current_offset()?,
            activity,
        ))
    }

    /// What the processor does: the kernel knows if it has the interrupt controllers.
    fn current_activity(&self) -> Result<Activity, KvmError> {
        if !self.has_kernel_controllers() || self.activity == Activity::Shutdown {
            return Ok(self.activity);
        }
        let state = self.vcpu.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
        Ok(match state.mp_state {
            KVM_MP_STATE_HALTED => Activity::Halted,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => Activity::WaitForSipi,
            _ => Activity::Running,
        })
    }

    fn set_activity(&mut self, activity: Activity) -> Result<(), KvmError> {
        self.activity = activity;
        if !self.has_kernel_controllers() {
            return Ok(());
        }
        let mp_state = match activity {
            Activity::Halted => KVM_MP_STATE_HALTED,
            // Either an INIT or a start-up IPI may be next.
            Activity::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
            Activity::Running | Activity::Shutdown => KVM_MP_STATE_RUNNABLE,
        };
        self.vcpu
            .set_mp_state(kvm_mp_state { mp_state })
            .map_err(call("KVM_SET_MP_STATE"))
    }

    /// The local APIC's registers that are the processor's too.
    fn apic_registers(&mut self) -> Result<ApicRegisters, KvmError> {
        if self.has_kernel_controllers() {
            let sregs = calls::sregs2(&self.vcpu).map_err(named("KVM_GET_SREGS2"))?;
            return Ok(ApicRegisters {
                task_priority: sregs.cr8 as u8,
                base: sregs.apic_base,
            });
        }
        Ok(ApicRegisters {
            task_priority: self.world.task_priority(),
            base: self.world.read_apic_msr(IA32_APIC_BASE).unwrap_or_default(),
        })
    }

    /// Replaces the state. After an error it is neither the old nor the new one.
    pub(crate) fn import(&mut self, state: &CpuState) -> Result<(), KvmError> {
        self.check_tsc(state.system.tsc_offset)?;
        let machine = Arc::clone(&self.machine);
        match &machine.controllers {
            // They have some of the registers that are set here. The world is not asked meanwhile: who
            // gives and takes the controllers may have locked it.
            Some(controllers) => controllers.alone(|| self.import_alone(state))?,
            None => self.import_alone(state)?,
        }
        self.world.set_tsc_offset(state.system.tsc_offset);
        Ok(())
    }

    fn import_alone(&mut self, state: &CpuState) -> Result<(), KvmError> {
        let apic = self.apic_registers()?;
        let (kernel, ours) = split(state, self.machine.profile(), &self.machine.kept, apic);
        let KernelState {
            regs,
            special,
            debug,
            xcr0,
            xsave,
            events,
            msrs: values,
        } = kernel;
        let vcpu = &self.vcpu;
        calls::set_sregs2(vcpu, &special.to_sregs()).map_err(named("KVM_SET_SREGS2"))?;
        vcpu.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..kvm_xcrs::default()
        };
        xcrs.xcrs[0].value = xcr0;
        vcpu.set_xcrs(&xcrs).map_err(call("KVM_SET_XCRS"))?;
        set_xsave(vcpu, &xsave)?;
        vcpu.set_debug_regs(&debug)
            .map_err(call("KVM_SET_DEBUGREGS"))?;
        msrs::set(vcpu, &values)?;
        // After the registers, which forget what waits.
        vcpu.set_vcpu_events(&events.to_kvm())
            .map_err(call("KVM_SET_VCPU_EVENTS"))?;

        self.ours = ours;
        self.set_activity(match state.system.activity {
            // It is on its way to the handler.
            Activity::Halted if state.interrupt.is_some() => Activity::Running,
            activity => activity,
        })?;
        self.tsc_offset = state.system.tsc_offset;
        self.stretch = 0;
        self.apic_base = apic.base;
        self.answer_waits = false;
        self.interrupts_on = state.rflags & rflags::IF != 0;
        // The next exit tells; until then a window is asked for.
        self.ready = false;
        self.interrupt_waits = true;
        Ok(())
    }
}

#[allow(unsafe_code)]
fn set_xsave(vcpu: &VcpuFd, xsave: &kvm_bindings::kvm_xsave) -> Result<(), KvmError> {
    // SAFETY: the kernel reads as many bytes as the structure has: `Facts` has seen to it that it
    // does not want more.
    unsafe { vcpu.set_xsave(xsave) }.map_err(call("KVM_SET_XSAVE"))
}
