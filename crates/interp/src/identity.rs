//! Who the processor is, and what time it is: CPUID, RDTSC, RDTSCP, RDPID.

use iced_x86::{Instruction, Mnemonic};
use trapgate_x86::msr;
use trapgate_x86::profile::CpuidContext;
use trapgate_x86::registers::{cr4, gpr};

use crate::cpu::{Cpu, Step};
use crate::op::{Handler, Op};

/// IA32_APIC_BASE: the local APIC is enabled.
const APIC_ENABLED: u64 = 1 << 11;

/// The handler of an instruction that this module owns.
pub(crate) fn lower(instruction: &Instruction, _op: &mut Op) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::Cpuid => Some(op_cpuid),
        Mnemonic::Rdtsc => Some(op_rdtsc),
        Mnemonic::Rdtscp => Some(op_rdtscp),
        Mnemonic::Rdpid => Some(op_rdpid),
        _ => None,
    }
}

/// CPUID, of the profile.
fn op_cpuid(cpu: &mut Cpu, _op: &Op) -> Step {
    let leaf = cpu.regs.gpr[gpr::RAX] as u32;
    let subleaf = cpu.regs.gpr[gpr::RCX] as u32;
    // Only leaf 1 shows the local APIC, which may take a lock to ask.
    let apic_enabled = leaf == 1
        && cpu
            .world
            .read_apic_msr(msr::IA32_APIC_BASE)
            .is_ok_and(|base| base & APIC_ENABLED != 0);
    let context = CpuidContext {
        processor: cpu.index,
        processors: cpu.count,
        cr4: cpu.sys.cr4,
        xcr0: cpu.sys.xcr0,
        apic_enabled,
    };
    let result = cpu.profile.cpuid(leaf, subleaf, &context);
    cpu.regs.gpr[gpr::RAX] = u64::from(result.eax);
    cpu.regs.gpr[gpr::RBX] = u64::from(result.ebx);
    cpu.regs.gpr[gpr::RCX] = u64::from(result.ecx);
    cpu.regs.gpr[gpr::RDX] = u64::from(result.edx);
    Ok(())
}

fn op_rdtsc(cpu: &mut Cpu, _op: &Op) -> Step {
    if cpu.cpl != 0 && cpu.sys.cr4 & cr4::TSD != 0 {
        return cpu.gp0();
    }
    let tsc = cpu.tsc();
    cpu.regs.gpr[gpr::RAX] = tsc & 0xffff_ffff;
    cpu.regs.gpr[gpr::RDX] = tsc >> 32;
    Ok(())
}

fn op_rdtscp(cpu: &mut Cpu, op: &Op) -> Step {
    op_rdtsc(cpu, op)?;
    cpu.regs.gpr[gpr::RCX] = cpu.sys.tsc_aux;
    Ok(())
}

/// RDPID: TSC_AUX, which CR4.TSD does not protect.
fn op_rdpid(cpu: &mut Cpu, op: &Op) -> Step {
    cpu.set_system_operand(op.dst, cpu.sys.tsc_aux);
    Ok(())
}
