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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{GP0, execute, fault, long_cpu, set_cpl};

    const CPUID: &[u8] = &[0x0f, 0xa2];
    const RDTSC: &[u8] = &[0x0f, 0x31];
    const RDTSCP: &[u8] = &[0x0f, 0x01, 0xf9];
    const RDPID_RBX: &[u8] = &[0xf3, 0x0f, 0xc7, 0xfb];

    #[test]
    fn cpuid_answers_for_this_processor_as_it_is() {
        let (mut cpu, world) = long_cpu();
        cpu.index = 3;
        cpu.count = 4;
        let leaf1 = |cpu: &mut Cpu| {
            cpu.regs.gpr = [u64::MAX; 16];
            cpu.regs.gpr[gpr::RAX] = 0xffff_ffff_0000_0001;
            execute(cpu, CPUID).unwrap();
            [gpr::RBX, gpr::RCX, gpr::RDX].map(|index| cpu.regs.gpr[index])
        };
        let [rbx, rcx, rdx] = leaf1(&mut cpu);
        assert_eq!(rbx >> 24, 3, "the APIC ID, and a clear upper half");
        assert_eq!((rcx >> 27 & 1, rdx >> 9 & 1), (0, 1), "OSXSAVE, APIC");
        cpu.sys.cr4 |= cr4::OSXSAVE;
        world.with(|told| told.apic_msrs.insert(0x1b, 0xfee0_0000));
        let [_, rcx, rdx] = leaf1(&mut cpu);
        assert_eq!((rcx >> 27 & 1, rdx >> 9 & 1), (1, 0), "OSXSAVE, APIC");
    }

    #[test]
    fn time_stamp_is_split_in_two() {
        let (mut cpu, world) = long_cpu();
        world.with(|told| told.clock = 0x9_8765_4321);
        cpu.sys.tsc_aux = 7;
        let tsc = 2 * 0x9_8765_4321u64;
        cpu.regs.gpr = [u64::MAX; 16];
        execute(&mut cpu, RDTSCP).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RAX], tsc & 0xffff_ffff);
        assert_eq!(cpu.regs.gpr[gpr::RDX], tsc >> 32);
        assert_eq!(cpu.regs.gpr[gpr::RCX], 7);
        execute(&mut cpu, RDPID_RBX).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RBX], 7);
    }

    #[test]
    fn time_stamp_can_be_kept_from_user_mode() {
        let (mut cpu, _) = long_cpu();
        cpu.sys.cr4 |= cr4::TSD;
        execute(&mut cpu, RDTSC).unwrap();
        set_cpl(&mut cpu, 3);
        assert_eq!(fault(&mut cpu, RDTSC), GP0);
        assert_eq!(fault(&mut cpu, RDTSCP), GP0);
        execute(&mut cpu, RDPID_RBX).unwrap();
        cpu.sys.cr4 &= !cr4::TSD;
        execute(&mut cpu, RDTSC).unwrap();
    }
}
