//! MSRs that only store a value, or always read the same (SDM vol. 4, table 2-2; what each register's
//! bits mean, vol. 3A). What reading and writing them does is the same on every engine, so it is
//! said once, here.
//!
//! Not here: the TSC, the local APIC's registers, and IA32_EFER, which depend on the processor's mode or
//! on the world.

use crate::SystemState;
use crate::msr::*;
use crate::paging::is_canonical;
use crate::profile::{ARCH_CAPABILITIES, CpuProfile, PHYSICAL_ADDRESS_BITS};
use crate::registers::sreg;

/// IA32_P5_MC_ADDR and IA32_P5_MC_TYPE: machine checks as the Pentium told them.
const IA32_P5_MC_ADDR: u32 = 0x0;
const IA32_P5_MC_TYPE: u32 = 0x1;
/// Base and mask of the last of eight variable ranges.
const IA32_MTRR_PHYSMASK7: u32 = IA32_MTRR_PHYSBASE0 + 15;
const IA32_MTRR_FIX4K_F8000: u32 = IA32_MTRR_FIX4K_C0000 + 7;

/// IA32_MTRRCAP: eight variable ranges, fixed ranges, write combining.
pub const MTRR_CAPABILITIES: u64 = 8 | 1 << 8 | 1 << 10;
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

/// What a write has changed besides the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// Nothing.
    Stored,
    /// The paravirtual clock is to be written where KVM_SYSTEM_TIME says.
    SystemTime,
    /// The time of day is to be written where KVM_WALL_CLOCK says.
    WallClock,
}

/// What RDMSR gives, or `None` for #GP(0), as on a processor that lacks the register.
pub fn read(system: &SystemState, profile: &CpuProfile, index: u32) -> Option<u64> {
    Some(match index {
        STAR => system.star,
        LSTAR => system.lstar,
        CSTAR => system.cstar,
        SFMASK => system.sfmask,
        FS_BASE => system.segments[sreg::FS].base,
        GS_BASE => system.segments[sreg::GS].base,
        KERNEL_GS_BASE => system.kernel_gs_base,
        TSC_AUX => system.tsc_aux,
        IA32_SYSENTER_CS => system.sysenter_cs,
        IA32_SYSENTER_ESP => system.sysenter_esp,
        IA32_SYSENTER_EIP => system.sysenter_eip,
        IA32_SPEC_CTRL => system.spec_ctrl,
        IA32_PAT => system.pat,
        IA32_MISC_ENABLE => system.misc_enable | MISC_UNAVAILABLE,
        IA32_MTRRCAP => MTRR_CAPABILITIES,
        IA32_MTRR_DEF_TYPE => system.mtrrs.default_type,
        IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK7 => {
            let (base, mask) = system.mtrrs.variable[variable_range(index)];
            if index & 1 == 0 { base } else { mask }
        }
        IA32_MTRR_FIX64K_00000..=IA32_MTRR_FIX4K_F8000 => system.mtrrs.fixed[fixed_range(index)?],
        IA32_MCG_STATUS => system.mcg_status,
        KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_NEW => system.paravirtual.system_time,
        KVM_WALL_CLOCK | KVM_WALL_CLOCK_NEW => system.paravirtual.wall_clock,
        IA32_BIOS_SIGN_ID => MICROCODE_REVISION,
        IA32_FEATURE_CONTROL => FEATURE_CONTROL_LOCKED,
        IA32_ARCH_CAPABILITIES => ARCH_CAPABILITIES,
        // The maximum ratio without turbo, in steps of 100 MHz.
        MSR_PLATFORM_INFO => (profile.tsc_hz / 100_000_000).min(0xff) << 8,
        // No machine check banks; no branch records.
        IA32_P5_MC_ADDR | IA32_P5_MC_TYPE | IA32_PLATFORM_ID | IA32_MCG_CAP | IA32_DEBUGCTL => 0,
        _ => return None,
    })
}

/// What WRMSR does, or `None` for #GP(0), which changes nothing.
pub fn write(system: &mut SystemState, index: u32, value: u64) -> Option<Written> {
    if !is_valid(index, value) {
        return None;
    }
    match index {
        STAR => system.star = value,
        LSTAR => system.lstar = value,
        CSTAR => system.cstar = value,
        SFMASK => system.sfmask = value,
        FS_BASE => system.segments[sreg::FS].base = value,
        GS_BASE => system.segments[sreg::GS].base = value,
        KERNEL_GS_BASE => system.kernel_gs_base = value,
        TSC_AUX => system.tsc_aux = value,
        IA32_SYSENTER_CS => system.sysenter_cs = value,
        IA32_SYSENTER_ESP => system.sysenter_esp = value,
        IA32_SYSENTER_EIP => system.sysenter_eip = value,
        IA32_SPEC_CTRL => system.spec_ctrl = value,
        IA32_PAT => system.pat = value,
        IA32_MISC_ENABLE => system.misc_enable = value & MISC_WRITABLE,
        IA32_MTRR_DEF_TYPE => system.mtrrs.default_type = value,
        IA32_MTRR_PHYSBASE0..=IA32_MTRR_PHYSMASK7 => {
            let (base, mask) = &mut system.mtrrs.variable[variable_range(index)];
            *(if index & 1 == 0 { base } else { mask }) = value;
        }
        IA32_MTRR_FIX64K_00000..=IA32_MTRR_FIX4K_F8000 => {
            system.mtrrs.fixed[fixed_range(index)?] = value;
        }
        IA32_MCG_STATUS => system.mcg_status = value,
        KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_NEW => {
            system.paravirtual.system_time = value;
            return Some(Written::SystemTime);
        }
        KVM_WALL_CLOCK | KVM_WALL_CLOCK_NEW => {
            system.paravirtual.wall_clock = value;
            return Some(Written::WallClock);
        }
        // There is no predictor state of the guest's own, no microcode to load, no machine check to
        // clear.
        IA32_PRED_CMD | IA32_BIOS_UPDT_TRIG | IA32_BIOS_SIGN_ID | IA32_P5_MC_ADDR
        | IA32_P5_MC_TYPE | IA32_DEBUGCTL => {}
        _ => return None,
    }
    Some(Written::Stored)
}

/// Whether an MSR's reserved bits and types admit a value. MSRs that take any, and those that
/// don't exist, are not looked at here.
fn is_valid(index: u32, value: u64) -> bool {
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
        IA32_MTRR_DEF_TYPE => value & !(MTRR_ENABLES | 0xff) == 0 && is_memory_type(value as u8),
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
pub fn is_valid_pat(value: u64) -> bool {
    value
        .to_le_bytes()
        .into_iter()
        .all(|kind| is_memory_type(kind) || kind == 7)
}
