//! A processor's state, taken out of the kernel and put in.

use kvm_bindings::kvm_xcrs;
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
        let sregs = calls::sregs2(vcpu).map_err(named("KVM_GET_SREGS2"))?;
        let special = Special::from_sregs(&sregs);
        let xcrs = vcpu.get_xcrs().map_err(call("KVM_GET_XCRS"))?;
        let waiting = vcpu
            .get_vcpu_events()
            .map_err(call("KVM_GET_VCPU_EVENTS"))?;
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
            self.activity,
        ))
    }

    /// Replaces the state. After an error it is neither the old nor the new one.
    pub(crate) fn import(&mut self, state: &CpuState) -> Result<(), KvmError> {
        self.check_tsc(state.system.tsc_offset)?;
        let apic = ApicRegisters {
            task_priority: self.world.task_priority(),
            base: self.world.read_apic_msr(IA32_APIC_BASE).unwrap_or_default(),
        };
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
        self.activity = match state.system.activity {
            // It is on its way to the handler.
            Activity::Halted if state.interrupt.is_some() => Activity::Running,
            activity => activity,
        };
        self.world.set_tsc_offset(state.system.tsc_offset);
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
