//! RDMSR and WRMSR (SDM vol. 4, table 2-2; what each register's bits mean, vol. 3A).
//!
//! An MSR that is not here raises #GP(0), as on a processor that lacks it. Kernels probe for the
//! ones they can live without.

use iced_x86::{Instruction, Mnemonic};
use trapgate_x86::msr::*;
use trapgate_x86::paging::is_canonical;
use trapgate_x86::registers::{cr0, cr4, efer, gpr, sreg};
use trapgate_x86::stored_msr::{self, Written};

use crate::cpu::{Cpu, Step, Stop};
use crate::op::{Handler, Op};

/// EFER bits that can be written.
const EFER_WRITABLE: u64 = efer::SCE | efer::LME | efer::NXE;

/// The handler of an instruction that this module owns.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    // The moves of FS and GS bases have 32-bit and 64-bit forms.
    op.code = match instruction.op0_register().size() {
        4 => 4,
        _ => 8,
    };
    let handler: Handler = match instruction.mnemonic() {
        Mnemonic::Rdmsr => op_rdmsr,
        Mnemonic::Wrmsr => op_wrmsr,
        Mnemonic::Swapgs => op_swapgs,
        Mnemonic::Rdfsbase => op_read_base::<{ sreg::FS }>,
        Mnemonic::Rdgsbase => op_read_base::<{ sreg::GS }>,
        Mnemonic::Wrfsbase => op_write_base::<{ sreg::FS }>,
        Mnemonic::Wrgsbase => op_write_base::<{ sreg::GS }>,
        _ => return None,
    };
    Some(handler)
}

fn op_rdmsr(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.check_cpl0()?;
    let value = cpu.read_msr(cpu.regs.gpr[gpr::RCX] as u32)?;
    cpu.regs.gpr[gpr::RAX] = value & 0xffff_ffff;
    cpu.regs.gpr[gpr::RDX] = value >> 32;
    Ok(())
}

fn op_wrmsr(cpu: &mut Cpu, _op: &Op) -> Step {
    cpu.check_cpl0()?;
    let low = cpu.regs.gpr[gpr::RAX] & 0xffff_ffff;
    let value = low | cpu.regs.gpr[gpr::RDX] << 32;
    cpu.write_msr(cpu.regs.gpr[gpr::RCX] as u32, value)
}

/// SWAPGS, which iced knows in 64-bit code only.
fn op_swapgs(cpu: &mut Cpu, _op: &Op) -> Step {
    if !cpu.is_64bit() {
        return cpu.ud();
    }
    cpu.check_cpl0()?;
    std::mem::swap(
        &mut cpu.sys.segments[sreg::GS].base,
        &mut cpu.sys.kernel_gs_base,
    );
    Ok(())
}

fn op_read_base<const SEGMENT: usize>(cpu: &mut Cpu, op: &Op) -> Step {
    if !cpu.is_64bit() || cpu.sys.cr4 & cr4::FSGSBASE == 0 {
        return cpu.ud();
    }
    let base = cpu.sys.segments[SEGMENT].base;
    if op.code == 4 {
        cpu.set_reg(op.dst, base as u32);
    } else {
        cpu.set_reg(op.dst, base);
    }
    Ok(())
}

fn op_write_base<const SEGMENT: usize>(cpu: &mut Cpu, op: &Op) -> Step {
    if !cpu.is_64bit() || cpu.sys.cr4 & cr4::FSGSBASE == 0 {
        return cpu.ud();
    }
    let base = if op.code == 4 {
        u64::from(cpu.reg::<u32>(op.dst))
    } else {
        cpu.reg(op.dst)
    };
    if !is_canonical(base) {
        return cpu.gp0();
    }
    cpu.sys.segments[SEGMENT].base = base;
    Ok(())
}

impl Cpu {
    /// What RDMSR gives, or #GP(0).
    pub(crate) fn read_msr(&mut self, index: u32) -> Result<u64, Stop> {
        let value = match index {
            IA32_TSC => Some(self.tsc()),
            IA32_TSC_ADJUST => Some(self.sys.tsc_adjust),
            IA32_APIC_BASE | IA32_TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => {
                self.world.read_apic_msr(index).ok()
            }
            EFER => Some(self.sys.efer),
            _ => stored_msr::read(&self.sys, &self.profile, index),
        };
        match value {
            Some(value) => Ok(value),
            None => self.gp0(),
        }
    }

    /// What WRMSR does, or #GP(0).
    pub(crate) fn write_msr(&mut self, index: u32, value: u64) -> Step {
        match index {
            IA32_TSC => {
                // The adjustment follows (SDM vol. 3B, 19.17.3).
                let moved = value.wrapping_sub(self.tsc());
                self.move_tsc(moved);
            }
            IA32_TSC_ADJUST => {
                let moved = value.wrapping_sub(self.sys.tsc_adjust);
                self.move_tsc(moved);
            }
            IA32_APIC_BASE | IA32_TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => {
                if self.world.write_apic_msr(index, value).is_err() {
                    return self.gp0();
                }
                // The deadline timer signals by itself; this write is the most frequent of all.
                if index != IA32_TSC_DEADLINE {
                    self.look_for_interrupts();
                }
            }
            EFER => return self.write_efer(value),
            _ => match stored_msr::write(&mut self.sys, index, value) {
                Some(Written::Stored) => {}
                Some(Written::SystemTime) => self.refresh_clock(),
                Some(Written::WallClock) => self.write_wall_clock(),
                None => return self.gp0(),
            },
        }
        Ok(())
    }

    /// WRMSR to IA32_EFER (SDM vol. 3A, 2.2.1 and 12.8.5). LMA is not written.
    fn write_efer(&mut self, value: u64) -> Step {
        let old = self.sys.efer;
        if value & !(EFER_WRITABLE | efer::LMA) != 0 {
            return self.gp0();
        }
        let paging = self.sys.cr0 & cr0::PG != 0;
        if paging && (old ^ value) & efer::LME != 0 {
            return self.gp0();
        }
        self.sys.efer = value & EFER_WRITABLE | old & efer::LMA;
        if (old ^ value) & efer::NXE != 0 {
            // Bit 63 of the tables' entries changes its meaning.
            self.tlb.flush_all();
        }
        self.update_mode();
        self.end_block = true;
        Ok(())
    }

    /// Moves the TSC on by a number of ticks.
    fn move_tsc(&mut self, ticks: u64) {
        self.sys.tsc_offset = self.sys.tsc_offset.wrapping_add(ticks);
        self.sys.tsc_adjust = self.sys.tsc_adjust.wrapping_add(ticks);
        self.world.set_tsc_offset(self.sys.tsc_offset);
        self.refresh_clock();
    }
}

#[cfg(test)]
mod tests {
    use trapgate_x86::profile::ARCH_CAPABILITIES;
    use trapgate_x86::stored_msr::MTRR_CAPABILITIES;

    use super::*;
    use crate::testing::{GP0, TSC_HZ, TestWorld, UD, execute, fault, long_cpu, set_cpl};

    const RDMSR: &[u8] = &[0x0f, 0x32];
    const WRMSR: &[u8] = &[0x0f, 0x30];
    const SWAPGS: &[u8] = &[0x0f, 0x01, 0xf8];

    fn write(cpu: &mut Cpu, index: u32, value: u64) -> Step {
        cpu.regs.gpr[gpr::RCX] = u64::from(index) | 7 << 32;
        cpu.regs.gpr[gpr::RAX] = value & 0xffff_ffff | 5 << 32;
        cpu.regs.gpr[gpr::RDX] = value >> 32 | 6 << 32;
        execute(cpu, WRMSR)
    }

    fn read(cpu: &mut Cpu, index: u32) -> Result<u64, Stop> {
        cpu.regs.gpr[gpr::RCX] = u64::from(index);
        execute(cpu, RDMSR)?;
        Ok(cpu.regs.gpr[gpr::RDX] << 32 | cpu.regs.gpr[gpr::RAX])
    }

    #[test]
    fn values_are_read_back_or_refused() {
        let canonical = 0xffff_8000_0000_1000;
        let cases: &[(u32, u64, bool)] = &[
            (STAR, 0x0023_0010_1234_5678, true),
            (LSTAR, canonical, true),
            (LSTAR, 1 << 47, false),
            (CSTAR, canonical, true),
            (CSTAR, 1 << 63, false),
            (SFMASK, 0x4_7700, true),
            (SFMASK, 1 << 32, false),
            (FS_BASE, canonical, true),
            (FS_BASE, 1 << 47, false),
            (GS_BASE, canonical, true),
            (GS_BASE, 1 << 47, false),
            (KERNEL_GS_BASE, canonical, true),
            (KERNEL_GS_BASE, 1 << 47, false),
            (TSC_AUX, 0xffff_ffff, true),
            (TSC_AUX, 1 << 32, false),
            (IA32_SYSENTER_CS, 0x10, true),
            (IA32_SYSENTER_ESP, canonical, true),
            (IA32_SYSENTER_ESP, 1 << 47, false),
            (IA32_SYSENTER_EIP, canonical, true),
            (IA32_SYSENTER_EIP, 1 << 47, false),
            (IA32_PAT, 0x0407_0506_0007_0106, true),
            (IA32_PAT, 2, false),
            (IA32_PAT, 8 << 56, false),
            (IA32_MTRR_DEF_TYPE, 0xc06, true),
            (IA32_MTRR_DEF_TYPE, 0xc02, false),
            (IA32_MTRR_DEF_TYPE, 0x1000, false),
            (IA32_MTRR_PHYSBASE0, 0xc000_0006, true),
            (IA32_MTRR_PHYSBASE0 + 14, 1 << 39, true),
            (IA32_MTRR_PHYSBASE0, 1 << 40, false),
            (IA32_MTRR_PHYSBASE0, 7, false),
            (IA32_MTRR_PHYSBASE0 + 1, 0xff_c000_0800, true),
            (IA32_MTRR_PHYSBASE0 + 1, 1 << 40, false),
            (IA32_MTRR_PHYSBASE0 + 1, 1, false),
            (IA32_MTRR_PHYSBASE0 + 16, 0, false),
            (IA32_MTRR_FIX64K_00000, 0x0606_0606_0606_0606, true),
            (IA32_MTRR_FIX64K_00000, 7, false),
            (IA32_MTRR_FIX16K_80000, 6, true),
            (IA32_MTRR_FIX16K_A0000, 1, true),
            (IA32_MTRR_FIX16K_A0000 + 1, 0, false),
            (IA32_MTRR_FIX4K_C0000, 5, true),
            (IA32_MTRR_FIX4K_C0000 + 7, 5 << 56, true),
            (IA32_MTRR_FIX4K_C0000 + 8, 0, false),
            (IA32_SPEC_CTRL, 1, true),
            (IA32_SPEC_CTRL, 4, false),
            (IA32_MCG_STATUS, 7, true),
            (IA32_MCG_STATUS, 8, false),
            (IA32_MISC_ENABLE, 1 << 11 | 1 << 12 | 1, true),
            (IA32_MISC_ENABLE, 1 << 22, false),
            (KVM_WALL_CLOCK, 0x8000, true),
            (KVM_SYSTEM_TIME, 0x8000, true),
        ];
        let (mut cpu, _) = long_cpu();
        for &(index, value, accepted) in cases {
            let before = cpu.sys.clone();
            assert_eq!(
                write(&mut cpu, index, value).is_ok(),
                accepted,
                "{index:#x} {value:#x}"
            );
            if accepted {
                assert_eq!(read(&mut cpu, index), Ok(value), "{index:#x}");
            } else {
                assert_eq!(cpu.sys, before, "{index:#x}");
            }
        }
    }

    #[test]
    fn constants_are_read_only() {
        let (mut cpu, _) = long_cpu();
        let cases = [
            (IA32_MTRRCAP, MTRR_CAPABILITIES),
            (IA32_ARCH_CAPABILITIES, ARCH_CAPABILITIES),
            (IA32_FEATURE_CONTROL, 1),
            (IA32_PLATFORM_ID, 0),
            (IA32_MCG_CAP, 0),
            (MSR_PLATFORM_INFO, (TSC_HZ / 100_000_000) << 8),
        ];
        for (index, value) in cases {
            assert_eq!(read(&mut cpu, index), Ok(value), "{index:#x}");
            assert_eq!(
                write(&mut cpu, index, value),
                Err(Stop::Fault),
                "{index:#x}"
            );
        }
    }

    #[test]
    fn microcode_has_a_revision_that_is_asked_for_by_writing_zero() {
        let (mut cpu, _) = long_cpu();
        write(&mut cpu, IA32_BIOS_SIGN_ID, 0).unwrap();
        assert_ne!(read(&mut cpu, IA32_BIOS_SIGN_ID).unwrap() >> 32, 0);
    }

    #[test]
    fn unknown_registers_fault() {
        let (mut cpu, _) = long_cpu();
        for index in [
            0x2,
            0x140,
            0x400,
            IA32_XSS,
            0xc001_0015,
            0x4b56_4d02,
            u32::MAX,
        ] {
            cpu.regs.gpr[gpr::RCX] = u64::from(index);
            assert_eq!(fault(&mut cpu, RDMSR), GP0, "{index:#x}");
            assert_eq!(fault(&mut cpu, WRMSR), GP0, "{index:#x}");
        }
        assert!(read(&mut cpu, IA32_PRED_CMD).is_err());
        write(&mut cpu, IA32_PRED_CMD, 1).unwrap();
        assert!(write(&mut cpu, IA32_PRED_CMD, 2).is_err());
    }

    #[test]
    fn efer_keeps_lma_and_guards_lme_while_paging() {
        let (mut cpu, _) = long_cpu();
        let old = cpu.sys.efer;
        write(&mut cpu, EFER, old & !efer::LMA & !efer::SCE).unwrap();
        assert_eq!(cpu.sys.efer, old & !efer::SCE);
        assert!(write(&mut cpu, EFER, old & !efer::LME).is_err());
        assert!(write(&mut cpu, EFER, old | 1 << 12).is_err());
        assert_eq!(cpu.sys.efer, old & !efer::SCE);
    }

    #[test]
    fn apic_registers_are_the_worlds() {
        let (mut cpu, world) = long_cpu();
        world.with(|told| told.apic_msrs.insert(0x80b, 0));
        write(&mut cpu, 0x80b, 7).unwrap();
        assert_eq!(read(&mut cpu, 0x80b), Ok(7));
        assert!(cpu.interrupt_waits && cpu.sys.cr0 != 0);
        assert!(read(&mut cpu, 0x80c).is_err());
        assert!(write(&mut cpu, 0x80c, 0).is_err());
        assert_eq!(read(&mut cpu, IA32_APIC_BASE), Ok(0xfee0_0900));
    }

    fn at(world: &TestWorld, clock: u64) {
        world.with(|told| told.clock = clock);
    }

    #[test]
    fn tsc_and_its_adjustment_move_together() {
        let (mut cpu, world) = long_cpu();
        at(&world, 1_000);
        assert_eq!(read(&mut cpu, IA32_TSC), Ok(2_000));
        write(&mut cpu, IA32_TSC, 500).unwrap();
        assert_eq!(read(&mut cpu, IA32_TSC), Ok(500));
        let adjusted = 1_500u64.wrapping_neg();
        assert_eq!(read(&mut cpu, IA32_TSC_ADJUST), Ok(adjusted));
        assert_eq!(world.with(|told| told.tsc_offset), adjusted);
        write(&mut cpu, IA32_TSC_ADJUST, 0).unwrap();
        assert_eq!(read(&mut cpu, IA32_TSC), Ok(2_000));
        at(&world, 2_000);
        assert_eq!(read(&mut cpu, IA32_TSC), Ok(4_000));
    }

    /// What a guest makes of `pvclock_vcpu_time_info` (msr.rst), in nanoseconds; and its version.
    fn guest_clock(cpu: &mut Cpu, gpa: u64) -> (u64, u32) {
        let mut info = [0; 32];
        cpu.memory.read(gpa, &mut info).unwrap();
        let word = |at: usize| u32::from_le_bytes(info[at..at + 4].try_into().unwrap());
        let quad = |at: usize| u64::from_le_bytes(info[at..at + 8].try_into().unwrap());
        let delta = cpu.tsc().wrapping_sub(quad(8));
        let shift = info[28] as i8;
        let delta = if shift < 0 {
            delta >> -shift
        } else {
            delta << shift
        };
        let scaled = ((u128::from(delta) * u128::from(word(24))) >> 32) as u64;
        (quad(16) + scaled, word(0))
    }

    #[test]
    fn paravirtual_clock_tells_vm_time_even_after_the_tsc_was_moved() {
        let (mut cpu, world) = long_cpu();
        at(&world, 3_000_000_000);
        write(&mut cpu, KVM_SYSTEM_TIME_NEW, 0x8000 | 1).unwrap();
        let (time, version) = guest_clock(&mut cpu, 0x8000);
        assert!(time.abs_diff(3_000_000_000) < 10, "{time}");
        assert_eq!(version, 2);

        write(&mut cpu, IA32_TSC, 12).unwrap();
        at(&world, 5_000_000_000);
        let (time, version) = guest_clock(&mut cpu, 0x8000);
        assert!(time.abs_diff(5_000_000_000) < 10, "{time}");
        assert_eq!(version, 4);

        // A version left odd becomes even; a disabled clock is left alone.
        cpu.memory.write(0x8000, &[5, 0, 0, 0]).unwrap();
        cpu.refresh_clock();
        assert_eq!(guest_clock(&mut cpu, 0x8000).1, 8);
        write(&mut cpu, KVM_SYSTEM_TIME_NEW, 0x8000).unwrap();
        assert_eq!(guest_clock(&mut cpu, 0x8000).1, 8);
    }

    #[test]
    fn paravirtual_clock_outside_memory_goes_nowhere() {
        let (mut cpu, _) = long_cpu();
        write(&mut cpu, KVM_SYSTEM_TIME, u64::MAX).unwrap();
        write(&mut cpu, KVM_WALL_CLOCK, u64::MAX - 3).unwrap();
    }

    #[test]
    fn wall_clock_is_the_time_of_day_at_vm_time_zero() {
        let (mut cpu, world) = long_cpu();
        world.with(|told| told.epoch = 1_700_000_000_000_000_123);
        write(&mut cpu, KVM_WALL_CLOCK_NEW, 0x8004).unwrap();
        let mut clock = [0; 12];
        cpu.memory.read(0x8004, &mut clock).unwrap();
        let words: Vec<u32> = clock
            .chunks(4)
            .map(|word| u32::from_le_bytes(word.try_into().unwrap()))
            .collect();
        assert_eq!(words, [2, 1_700_000_000, 123]);
    }

    #[test]
    fn swapgs_exchanges_the_bases() {
        let (mut cpu, _) = long_cpu();
        cpu.sys.segments[sreg::GS].base = 1;
        cpu.sys.kernel_gs_base = 2;
        execute(&mut cpu, SWAPGS).unwrap();
        assert_eq!(
            (cpu.sys.segments[sreg::GS].base, cpu.sys.kernel_gs_base),
            (2, 1)
        );
    }

    #[test]
    fn base_moves_need_fsgsbase_and_work_at_any_privilege() {
        // RDFSBASE, WRFSBASE, RDGSBASE, WRGSBASE, of RAX and of EAX.
        let (mut cpu, _) = long_cpu();
        set_cpl(&mut cpu, 3);
        for (read, write, segment) in [(0xc0, 0xd0, sreg::FS), (0xc8, 0xd8, sreg::GS)] {
            cpu.sys.cr4 &= !cr4::FSGSBASE;
            assert_eq!(fault(&mut cpu, &[0xf3, 0x48, 0x0f, 0xae, write]), UD);
            cpu.sys.cr4 |= cr4::FSGSBASE;
            let base = 0xffff_8123_4567_89ab;
            cpu.regs.gpr[gpr::RAX] = base;
            execute(&mut cpu, &[0xf3, 0x48, 0x0f, 0xae, write]).unwrap();
            assert_eq!(cpu.sys.segments[segment].base, base);
            execute(&mut cpu, &[0xf3, 0x0f, 0xae, read]).unwrap();
            assert_eq!(cpu.regs.gpr[gpr::RAX], base & 0xffff_ffff);
            cpu.regs.gpr[gpr::RAX] = 0;
            execute(&mut cpu, &[0xf3, 0x48, 0x0f, 0xae, read]).unwrap();
            assert_eq!(cpu.regs.gpr[gpr::RAX], base);
            execute(&mut cpu, &[0xf3, 0x0f, 0xae, write]).unwrap();
            assert_eq!(cpu.sys.segments[segment].base, base & 0xffff_ffff);
            cpu.regs.gpr[gpr::RAX] = 1 << 47;
            assert_eq!(fault(&mut cpu, &[0xf3, 0x48, 0x0f, 0xae, write]), GP0);
        }
    }
}
