//! RDMSR and WRMSR (SDM vol. 4, table 2-2; what each register's bits mean, vol. 3A).
//!
//! An MSR that is not here raises #GP(0), as on a processor that lacks it. Kernels probe for the
//! ones they can live without.

use iced_x86::{Instruction, Mnemonic};
use trapgate_x86::msr::*;
use trapgate_x86::paging::is_canonical;
use trapgate_x86::profile::{ARCH_CAPABILITIES, PHYSICAL_ADDRESS_BITS};
use trapgate_x86::registers::{cr0, cr4, efer, gpr, sreg};

use crate::cpu::{Cpu, Step, Stop};
use crate::op::{Handler, Op};

/// IA32_P5_MC_ADDR and IA32_P5_MC_TYPE: machine checks as the Pentium told them.
const IA32_P5_MC_ADDR: u32 = 0x0;
const IA32_P5_MC_TYPE: u32 = 0x1;
/// Base and mask of the last of eight variable ranges.
const IA32_MTRR_PHYSMASK7: u32 = IA32_MTRR_PHYSBASE0 + 15;
const IA32_MTRR_FIX4K_F8000: u32 = IA32_MTRR_FIX4K_C0000 + 7;

/// MTRRCAP: eight variable ranges, fixed ranges, write combining.
const MTRR_CAPABILITIES: u64 = 8 | 1 << 8 | 1 << 10;
/// MTRR_DEF_TYPE: fixed ranges enabled, MTRRs enabled.
const MTRR_ENABLES: u64 = 1 << 10 | 1 << 11;
/// MTRR_PHYSMASK: the range is valid.
const MTRR_VALID: u64 = 1 << 11;
/// Physical address bits of pages.
const MTRR_FRAME: u64 = ((1 << PHYSICAL_ADDRESS_BITS) - 1) & !0xfff;

/// FEATURE_CONTROL: locked, with nothing enabled.
const FEATURE_CONTROL_LOCKED: u64 = 1;
/// The microcode revision is the upper half; zero would mean that no update was loaded.
const MICROCODE_REVISION: u64 = 1 << 32;
/// MISC_ENABLE: no branch trace store, no precise event sampling. They can't be changed.
const MISC_UNAVAILABLE: u64 = 1 << 11 | 1 << 12;
/// MISC_ENABLE, read-only: performance monitoring is available.
const MISC_MONITORING: u64 = 1 << 7;
/// MISC_ENABLE: fast strings, thermal control circuit, xTPR messages disabled.
const MISC_WRITABLE: u64 = 1 << 0 | 1 << 3 | 1 << 23;
/// SPEC_CTRL: IBRS; and STIBP, which a processor without it accepts and ignores.
const SPEC_CTRL_ACCEPTED: u64 = 3;
/// PRED_CMD: IBPB.
const PRED_CMD_IBPB: u64 = 1;
/// DEBUGCTL: LBR and BTF, which do nothing here, as in virtual machines without them.
const DEBUGCTL_IGNORED: u64 = 3;
/// MCG_STATUS: RIPV, EIPV, MCIP.
const MCG_STATUS_BITS: u64 = 7;
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
        let sys = &self.sys;
        Ok(match index {
            IA32_TSC => self.tsc(),
            IA32_TSC_ADJUST => sys.tsc_adjust,
            IA32_APIC_BASE | IA32_TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => {
                match self.world.read_apic_msr(index) {
                    Ok(value) => value,
                    Err(_refused) => return self.gp0(),
                }
            }
            EFER => sys.efer,
            STAR => sys.star,
            LSTAR => sys.lstar,
            CSTAR => sys.cstar,
            SFMASK => sys.sfmask,
            FS_BASE => sys.segments[sreg::FS].base,
            GS_BASE => sys.segments[sreg::GS].base,
            KERNEL_GS_BASE => sys.kernel_gs_base,
            TSC_AUX => sys.tsc_aux,
            IA32_SYSENTER_CS => sys.sysenter_cs,
            IA32_SYSENTER_ESP => sys.sysenter_esp,
            IA32_SYSENTER_EIP => sys.sysenter_eip,
            IA32_SPEC_CTRL => sys.spec_ctrl,
            IA32_PAT => sys.pat,
            IA32_MISC_ENABLE => sys.misc_enable | MISC_UNAVAILABLE,
            IA32_MTRRCAP => MTRR_CAPABILITIES,
            IA32_MTRR_DEF_TYPE => sys.mtrrs.default_type,
            IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK7 => {
                let (base, mask) = sys.mtrrs.variable[variable_range(index)];
                if index & 1 == 0 { base } else { mask }
            }
            IA32_MTRR_FIX64K_00000..=IA32_MTRR_FIX4K_F8000 => match fixed_range(index) {
                Some(range) => sys.mtrrs.fixed[range],
                None => return self.gp0(),
            },
            IA32_MCG_STATUS => sys.mcg_status,
            KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_NEW => sys.paravirtual.system_time,
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_NEW => sys.paravirtual.wall_clock,
            IA32_BIOS_SIGN_ID => MICROCODE_REVISION,
            IA32_FEATURE_CONTROL => FEATURE_CONTROL_LOCKED,
            IA32_ARCH_CAPABILITIES => ARCH_CAPABILITIES,
            // The maximum ratio without turbo, in steps of 100 MHz.
            MSR_PLATFORM_INFO => (self.profile.tsc_hz / 100_000_000 & 0xff) << 8,
            // No machine check banks; no branch records.
            IA32_P5_MC_ADDR | IA32_P5_MC_TYPE | IA32_PLATFORM_ID | IA32_MCG_CAP | IA32_DEBUGCTL => {
                0
            }
            _ => return self.gp0(),
        })
    }

    /// What WRMSR does, or #GP(0).
    pub(crate) fn write_msr(&mut self, index: u32, value: u64) -> Step {
        if !self.is_valid_msr_value(index, value) {
            return self.gp0();
        }
        let sys = &mut self.sys;
        match index {
            IA32_TSC => {
                // The adjustment follows (SDM vol. 3B, 19.17.3).
                let moved = value.wrapping_sub(self.tsc());
                self.move_tsc(moved);
            }
            IA32_TSC_ADJUST => {
                let moved = value.wrapping_sub(sys.tsc_adjust);
                self.move_tsc(moved);
            }
            IA32_APIC_BASE | IA32_TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => {
                if self.world.write_apic_msr(index, value).is_err() {
                    return self.gp0();
                }
                self.look_for_interrupts();
            }
            EFER => return self.write_efer(value),
            STAR => sys.star = value,
            LSTAR => sys.lstar = value,
            CSTAR => sys.cstar = value,
            SFMASK => sys.sfmask = value,
            FS_BASE => sys.segments[sreg::FS].base = value,
            GS_BASE => sys.segments[sreg::GS].base = value,
            KERNEL_GS_BASE => sys.kernel_gs_base = value,
            TSC_AUX => sys.tsc_aux = value,
            IA32_SYSENTER_CS => sys.sysenter_cs = value,
            IA32_SYSENTER_ESP => sys.sysenter_esp = value,
            IA32_SYSENTER_EIP => sys.sysenter_eip = value,
            IA32_SPEC_CTRL => sys.spec_ctrl = value,
            IA32_PAT => sys.pat = value,
            IA32_MISC_ENABLE => sys.misc_enable = value & MISC_WRITABLE,
            IA32_MTRR_DEF_TYPE => sys.mtrrs.default_type = value,
            IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK7 => {
                let (base, mask) = &mut sys.mtrrs.variable[variable_range(index)];
                *(if index & 1 == 0 { base } else { mask }) = value;
            }
            IA32_MTRR_FIX64K_00000..=IA32_MTRR_FIX4K_F8000 => match fixed_range(index) {
                Some(range) => sys.mtrrs.fixed[range] = value,
                None => return self.gp0(),
            },
            IA32_MCG_STATUS => sys.mcg_status = value,
            KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_NEW => {
                sys.paravirtual.system_time = value;
                self.refresh_clock();
            }
            KVM_WALL_CLOCK | KVM_WALL_CLOCK_NEW => {
                sys.paravirtual.wall_clock = value;
                self.write_wall_clock();
            }
            // There is no predictor state of the guest's own, no microcode to load, no machine
            // check to clear.
            IA32_PRED_CMD | IA32_BIOS_UPDT_TRIG | IA32_BIOS_SIGN_ID | IA32_P5_MC_ADDR
            | IA32_P5_MC_TYPE | IA32_DEBUGCTL => {}
            _ => return self.gp0(),
        }
        Ok(())
    }

    /// Whether an MSR's reserved bits and types admit a value. MSRs that take any, and those that
    /// don't exist, are not looked at here.
    fn is_valid_msr_value(&self, index: u32, value: u64) -> bool {
        match index {
            LSTAR | CSTAR | FS_BASE | GS_BASE | KERNEL_GS_BASE | IA32_SYSENTER_ESP
            | IA32_SYSENTER_EIP => is_canonical(value),
            TSC_AUX | SFMASK | IA32_SYSENTER_CS => value >> 32 == 0,
            IA32_SPEC_CTRL => value & !SPEC_CTRL_ACCEPTED == 0,
            IA32_PRED_CMD => value & !PRED_CMD_IBPB == 0,
            IA32_DEBUGCTL => value & !DEBUGCTL_IGNORED == 0,
            IA32_MCG_STATUS => value & !MCG_STATUS_BITS == 0,
            IA32_MISC_ENABLE => value & !(MISC_WRITABLE | MISC_UNAVAILABLE | MISC_MONITORING) == 0,
            IA32_PAT => is_valid_pat(value),
            IA32_MTRR_DEF_TYPE => {
                value & !(MTRR_ENABLES | 0xff) == 0 && is_memory_type(value as u8)
            }
            IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK7 if index & 1 == 0 => {
                value & !(MTRR_FRAME | 0xff) == 0 && is_memory_type(value as u8)
            }
            IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK7 => value & !(MTRR_FRAME | MTRR_VALID) == 0,
            IA32_MTRR_FIX64K_00000..=IA32_MTRR_FIX4K_F8000 => {
                value.to_le_bytes().into_iter().all(is_memory_type)
            }
            _ => true,
        }
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

/// Which of the eight variable ranges an MTRR_PHYSBASE or MTRR_PHYSMASK belongs to.
fn variable_range(index: u32) -> usize {
    (index - IA32_MTRR_PHYSBASE0) as usize / 2
}

/// Which of the eleven fixed ranges an MSR holds.
fn fixed_range(index: u32) -> Option<usize> {
    match index {
        IA32_MTRR_FIX64K_00000 => Some(0),
        IA32_MTRR_FIX16K_80000 => Some(1),
        IA32_MTRR_FIX16K_A0000 => Some(2),
        IA32_MTRR_FIX4K_C0000..=IA32_MTRR_FIX4K_F8000 => {
            Some(3 + (index - IA32_MTRR_FIX4K_C0000) as usize)
        }
        _ => None,
    }
}

/// UC, WC, WT, WP, WB.
fn is_memory_type(kind: u8) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6)
}

/// Whether each byte is a memory type that the PAT admits: the MTRRs' and UC-.
pub(crate) fn is_valid_pat(value: u64) -> bool {
    value
        .to_le_bytes()
        .into_iter()
        .all(|kind| is_memory_type(kind) || kind == 7)
}
