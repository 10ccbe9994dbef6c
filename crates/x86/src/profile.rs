//! CPU profiles: what CPUID answers and which MSRs go with it. Guests see a profile, not the host,
//! so that a saved machine can go on wherever the profile can be had.
//!
//! A profile lists only what every engine implements. Sources: SDM vol. 2A, CPUID; Linux
//! `Documentation/virt/kvm/x86/cpuid.rst` for leaves 0x4000_00xx.

use serde::{Deserialize, Serialize};

use crate::registers::{cr4, xcr0};

/// The four registers that CPUID writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidResult {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// What CPUID's answers depend on besides the profile.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuidContext {
    /// Index of the processor, which is its APIC ID.
    pub processor: u32,
    /// Processors in the machine.
    pub processors: u32,
    /// CR4 as it is (OSXSAVE shows in leaf 1).
    pub cr4: u64,
    /// XCR0 as it is (the size of the XSAVE area in leaf 0xD).
    pub xcr0: u64,
    /// The local APIC is enabled in IA32_APIC_BASE.
    pub apic_enabled: bool,
}

/// The microarchitecture levels of the x86-64 psABI that have a profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Level {
    /// x86-64-v2: up to SSE4.2, POPCNT, CMPXCHG16B.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// x86-64-v3: v2 with AVX2, BMI1, BMI2, FMA, F16C, LZCNT, MOVBE.
    #[serde(rename = "x86-64-v3")]
    V3,
}

impl Level {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
        }
    }
}

/// A named CPU profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuProfile {
    /// Which instructions it has.
    pub level: Level,
    /// Ticks of the TSC in a second of VM time.
    pub tsc_hz: u64,
}

/// Bits of a physical address.
pub const PHYSICAL_ADDRESS_BITS: u32 = 40;

/// IA32_ARCH_CAPABILITIES of the profiles: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO,
/// PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, GDS_NO, RFDS_NO, ITS_NO. The guest
/// cannot reach the host's caches in a way that its own mitigations would stop, and they cost much.
pub const ARCH_CAPABILITIES: u64 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 26
    | 1 << 27
    | 1 << 62;

mod leaf1 {
    pub(super) const ECX_V2: u32 = 1 << 0 // SSE3
        | 1 << 1 // PCLMULQDQ
        | 1 << 9 // SSSE3
        | 1 << 13 // CMPXCHG16B
        | 1 << 17 // PCID
        | 1 << 19 // SSE4.1
        | 1 << 20 // SSE4.2
        | 1 << 21 // x2APIC
        | 1 << 22 // MOVBE
        | 1 << 23 // POPCNT
        | 1 << 24 // TSC deadline
        | 1 << 25 // AES
        | 1 << 26 // XSAVE
        | 1 << 30 // RDRAND
        | 1 << 31; // hypervisor
    pub(super) const ECX_V3: u32 = 1 << 12 // FMA
        | 1 << 28 // AVX
        | 1 << 29; // F16C
    pub(super) const ECX_OSXSAVE: u32 = 1 << 27;
    pub(super) const EDX: u32 = 1 << 0 // FPU
        | 1 << 1 // VME
        | 1 << 2 // DE
        | 1 << 3 // PSE
        | 1 << 4 // TSC
        | 1 << 5 // MSR
        | 1 << 6 // PAE
        | 1 << 7 // MCE
        | 1 << 8 // CMPXCHG8B
        | 1 << 11 // SYSENTER
        | 1 << 12 // MTRR
        | 1 << 13 // PGE
        | 1 << 14 // MCA
        | 1 << 15 // CMOV
        | 1 << 16 // PAT
        | 1 << 17 // PSE-36
        | 1 << 19 // CLFLUSH
        | 1 << 23 // MMX
        | 1 << 24 // FXSAVE
        | 1 << 25 // SSE
        | 1 << 26; // SSE2
    pub(super) const EDX_APIC: u32 = 1 << 9;
    pub(super) const EDX_HTT: u32 = 1 << 28;
}

mod leaf7 {
    pub(super) const EBX_V2: u32 = 1 << 0 // FSGSBASE
        | 1 << 1 // TSC_ADJUST
        | 1 << 6 // FDP only after unmasked x87 exceptions
        | 1 << 7 // SMEP
        | 1 << 9 // ERMS
        | 1 << 10 // INVPCID
        | 1 << 13 // FCS and FDS deprecated
        | 1 << 18 // RDSEED
        | 1 << 20; // SMAP
    pub(super) const EBX_V3: u32 = 1 << 3 // BMI1
        | 1 << 5 // AVX2
        | 1 << 8 // BMI2
        | 1 << 19; // ADX
    pub(super) const ECX: u32 = 1 << 2 // UMIP
        | 1 << 22; // RDPID
    pub(super) const EDX: u32 = 1 << 4 // FSRM
        | 1 << 26 // SPEC_CTRL and PRED_CMD
        | 1 << 29; // ARCH_CAPABILITIES
}

/// Signature of leaf 0x4000_0000 by which stock kernels know the paravirtual interfaces.
const PARAVIRTUAL_SIGNATURE: &[u8; 12] = b"KVMKVMKVM\0\0\0";

impl CpuProfile {
    /// A profile of a level with the TSC's frequency.
    pub const fn new(level: Level, tsc_hz: u64) -> Self {
        Self { level, tsc_hz }
    }

    /// The profile's name.
    pub const fn name(&self) -> &'static str {
        match self.level {
            Level::V2 => "x86-64-v2",
            Level::V3 => "x86-64-v3",
        }
    }

    /// State components that XCR0 may enable.
    pub const fn xcr0_mask(&self) -> u64 {
        match self.level {
            Level::V2 => xcr0::X87 | xcr0::SSE,
            Level::V3 => xcr0::X87 | xcr0::SSE | xcr0::AVX,
        }
    }

    /// CR4 bits that can be set.
    pub const fn cr4_mask(&self) -> u64 {
        cr4::VME
            | cr4::PVI
            | cr4::TSD
            | cr4::DE
            | cr4::PSE
            | cr4::PAE
            | cr4::MCE
            | cr4::PGE
            | cr4::PCE
            | cr4::OSFXSR
            | cr4::OSXMMEXCPT
            | cr4::UMIP
            | cr4::FSGSBASE
            | cr4::PCIDE
            | cr4::OSXSAVE
            | cr4::SMEP
            | cr4::SMAP
    }

    /// Bytes of the standard-format XSAVE area for the components in `mask`.
    pub const fn xsave_bytes(mask: u64) -> u32 {
        if mask & xcr0::AVX != 0 { 832 } else { 576 }
    }

    const fn has(&self, v3: u32) -> u32 {
        match self.level {
            Level::V2 => 0,
            Level::V3 => v3,
        }
    }

    /// What CPUID answers (SDM vol. 2A, CPUID). Leaves above the highest give the highest basic
    /// leaf's answer, as on Intel's processors.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, context: &CpuidContext) -> CpuidResult {
        let leaf = match leaf {
            0..=MAX_BASIC | 0x4000_0000..=MAX_PARAVIRTUAL | 0x8000_0000..=MAX_EXTENDED => leaf,
            _ => MAX_BASIC,
        };
        match leaf {
            0 => text(MAX_BASIC, b"GenuineIntel", [0, 2, 1]),
            1 => self.leaf_1(context),
            // One descriptor byte: "no leaf 2 data, see leaf 4".
            2 => CpuidResult {
                eax: 0x00ff_ff01,
                ..CpuidResult::default()
            },
            4 => caches(subleaf),
            // ARAT: the APIC timer runs in every power state.
            6 => CpuidResult {
                eax: 1 << 2,
                ..CpuidResult::default()
            },
            7 if subleaf == 0 => CpuidResult {
                eax: 0,
                ebx: leaf7::EBX_V2 | self.has(leaf7::EBX_V3),
                ecx: leaf7::ECX,
                edx: leaf7::EDX,
            },
            0xb => topology(subleaf, context),
            0xd => self.leaf_d(subleaf, context),
            // The TSC runs at `tsc_hz`: crystal of 1 MHz steps, ratio over one.
            0x15 => CpuidResult {
                eax: 1_000_000,
                ebx: (self.tsc_hz / 1_000) as u32,
                ecx: 1_000_000_000,
                edx: 0,
            },
            0x16 => CpuidResult {
                eax: (self.tsc_hz / 1_000_000) as u32,
                ebx: (self.tsc_hz / 1_000_000) as u32,
                ecx: 100,
                edx: 0,
            },
            0x4000_0000 => text(MAX_PARAVIRTUAL, PARAVIRTUAL_SIGNATURE, [0, 1, 2]),
            // CLOCKSOURCE, NOP_IO_DELAY, CLOCKSOURCE2, and CLOCKSOURCE_STABLE.
            0x4000_0001 => CpuidResult {
                eax: 1 << 0 | 1 << 1 | 1 << 3 | 1 << 24,
                ..CpuidResult::default()
            },
            // TSC and APIC timer frequencies in kHz.
            0x4000_0010 => CpuidResult {
                eax: (self.tsc_hz / 1_000) as u32,
                ebx: 1_000_000,
                ..CpuidResult::default()
            },
            0x8000_0000 => CpuidResult {
                eax: MAX_EXTENDED,
                ..CpuidResult::default()
            },
            0x8000_0001 => CpuidResult {
                eax: 0,
                ebx: 0,
                // LAHF in 64-bit mode, LZCNT, PREFETCHW.
                ecx: 1 << 0 | self.has(1 << 5) | 1 << 8,
                // SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
                edx: 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29,
            },
            0x8000_0002..=0x8000_0004 => self.brand((leaf - 0x8000_0002) as usize),
            // L2 cache as leaf 4 says: 64-byte lines, 8-way, 1 MiB.
            0x8000_0006 => CpuidResult {
                ecx: 1024 << 16 | 6 << 12 | 64,
                ..CpuidResult::default()
            },
            // Invariant TSC.
            0x8000_0007 => CpuidResult {
                edx: 1 << 8,
                ..CpuidResult::default()
            },
            0x8000_0008 => CpuidResult {
                eax: 48 << 8 | PHYSICAL_ADDRESS_BITS,
                ..CpuidResult::default()
            },
            _ => CpuidResult::default(),
        }
    }

    fn leaf_1(&self, context: &CpuidContext) -> CpuidResult {
        let mut ecx = leaf1::ECX_V2 | self.has(leaf1::ECX_V3);
        if context.cr4 & cr4::OSXSAVE != 0 {
            ecx |= leaf1::ECX_OSXSAVE;
        }
        let mut edx = leaf1::EDX;
        if context.apic_enabled {
            edx |= leaf1::EDX_APIC;
        }
        if context.processors > 1 {
            edx |= leaf1::EDX_HTT;
        }
        let count = context.processors.clamp(1, 255);
        CpuidResult {
            eax: self.signature(),
            ebx: (context.processor & 0xff) << 24 | count << 16 | 8 << 8,
            ecx,
            edx,
        }
    }

    /// Family, model, stepping: Westmere for v2, Haswell for v3, the first of their kinds.
    const fn signature(&self) -> u32 {
        match self.level {
            Level::V2 => 0x0002_06c1,
            Level::V3 => 0x0003_06c3,
        }
    }

    fn leaf_d(&self, subleaf: u32, context: &CpuidContext) -> CpuidResult {
        let mask = self.xcr0_mask();
        match subleaf {
            0 => CpuidResult {
                eax: mask as u32,
                ebx: Self::xsave_bytes(context.xcr0),
                ecx: Self::xsave_bytes(mask),
                edx: (mask >> 32) as u32,
            },
            // XSAVEOPT.
            1 => CpuidResult {
                eax: 1,
                ..CpuidResult::default()
            },
            2 if mask & xcr0::AVX != 0 => CpuidResult {
                eax: 256,
                ebx: 576,
                ecx: 0,
                edx: 0,
            },
            _ => CpuidResult::default(),
        }
    }

    fn brand(&self, part: usize) -> CpuidResult {
        let mut brand = [0u8; 48];
        let text = format!("trapgate virtual CPU ({})", self.name());
        brand[..text.len()].copy_from_slice(text.as_bytes());
        let word = |index: usize| {
            let at = part * 16 + index * 4;
            u32::from_le_bytes([brand[at], brand[at + 1], brand[at + 2], brand[at + 3]])
        };
        CpuidResult {
            eax: word(0),
            ebx: word(1),
            ecx: word(2),
            edx: word(3),
        }
    }
}

const MAX_BASIC: u32 = 0x16;
const MAX_PARAVIRTUAL: u32 = 0x4000_0010;
const MAX_EXTENDED: u32 = 0x8000_0008;

/// A leaf with twelve characters in EBX, ECX, EDX; `order` says which word each of them takes.
fn text(eax: u32, text: &[u8; 12], order: [usize; 3]) -> CpuidResult {
    let word = |index: usize| {
        let at = index * 4;
        u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]])
    };
    CpuidResult {
        eax,
        ebx: word(order[0]),
        ecx: word(order[1]),
        edx: word(order[2]),
    }
}

/// Deterministic cache parameters: 32 KiB data, 32 KiB instructions, 1 MiB unified.
fn caches(subleaf: u32) -> CpuidResult {
    let (kind, level, ways, sets) = match subleaf {
        0 => (1, 1, 8, 64),
        1 => (2, 1, 8, 64),
        2 => (3, 2, 8, 2048),
        _ => return CpuidResult::default(),
    };
    CpuidResult {
        eax: kind | level << 5 | 1 << 8,
        ebx: (ways - 1) << 22 | 63,
        ecx: sets - 1,
        edx: 0,
    }
}

/// Extended topology: every processor is a core of its own in one package.
fn topology(subleaf: u32, context: &CpuidContext) -> CpuidResult {
    let processors = context.processors.max(1);
    let (shift, count, kind) = match subleaf {
        0 => (0, 1, 1),
        1 => (
            processors.next_power_of_two().trailing_zeros(),
            processors,
            2,
        ),
        _ => (0, 0, 0),
    };
    CpuidResult {
        eax: shift,
        ebx: count,
        ecx: subleaf | kind << 8,
        edx: context.processor,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vendor_string_is_spelled_in_ebx_edx_ecx() {
        let profile = CpuProfile::new(Level::V2, 1_000_000_000);
        let leaf = profile.cpuid(0, 0, &CpuidContext::default());
        let mut vendor = Vec::new();
        for word in [leaf.ebx, leaf.edx, leaf.ecx] {
            vendor.extend(word.to_le_bytes());
        }
        assert_eq!(vendor, b"GenuineIntel");
    }

    #[test]
    fn v2_shows_no_avx_and_v3_does() {
        let context = CpuidContext::default();
        let avx = |level| CpuProfile::new(level, 1).cpuid(1, 0, &context).ecx >> 28 & 1;
        assert_eq!((avx(Level::V2), avx(Level::V3)), (0, 1));
    }

    #[test]
    fn osxsave_follows_cr4() {
        let profile = CpuProfile::new(Level::V2, 1);
        let osxsave = |cr4| {
            let context = CpuidContext {
                cr4,
                ..CpuidContext::default()
            };
            profile.cpuid(1, 0, &context).ecx >> 27 & 1
        };
        assert_eq!((osxsave(0), osxsave(cr4::OSXSAVE)), (0, 1));
    }

    #[test]
    fn tsc_leaf_gives_the_profile_frequency() {
        let profile = CpuProfile::new(Level::V2, 2_900_000_000);
        let leaf = profile.cpuid(0x15, 0, &CpuidContext::default());
        let hz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax);
        assert_eq!(hz, 2_900_000_000);
    }
}
