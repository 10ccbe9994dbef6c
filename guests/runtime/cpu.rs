//! Control registers, MSRs, CPUID, flags.
//!
//! These functions are safe to call in the sense the guests need: a bad value raises an exception
//! that the runtime reports. What a program does to its own machine is its own affair.

use core::arch::asm;
use core::arch::x86_64::{__cpuid_count, CpuidResult};

pub mod cr0 {
    pub const TS: u64 = 1 << 3;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const PG: u64 = 1 << 31;
}

pub mod cr4 {
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PGE: u64 = 1 << 7;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

pub mod msr {
    pub const APIC_BASE: u32 = 0x1B;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MTRR_CAPABILITIES: u32 = 0xFE;
    /// The base of the last of eight variable ranges.
    pub const MTRR_LAST_BASE: u32 = 0x20E;
    pub const PAT: u32 = 0x277;
    pub const TSC_DEADLINE: u32 = 0x6E0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const EFER: u32 = 0xC000_0080;
    pub const STAR: u32 = 0xC000_0081;
    pub const LSTAR: u32 = 0xC000_0082;
    pub const CSTAR: u32 = 0xC000_0083;
    pub const FMASK: u32 = 0xC000_0084;
    pub const FS_BASE: u32 = 0xC000_0100;
    pub const GS_BASE: u32 = 0xC000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xC000_0102;
    pub const TSC_AUX: u32 = 0xC000_0103;
}

macro_rules! control_register {
    ($read:ident, $write:ident, $name:literal) => {
        pub fn $read() -> u64 {
            let value;
            // SAFETY: reads a register in ring 0.
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) value, options(nostack, preserves_flags)) }
            value
        }

        pub fn $write(value: u64) {
            // SAFETY: the caller keeps code, stack and data mapped (see the module's text).
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) value, options(nostack, preserves_flags)) }
        }
    };
}

control_register!(read_cr0, write_cr0, "cr0");
control_register!(read_cr2, write_cr2, "cr2");
control_register!(read_cr3, write_cr3, "cr3");
control_register!(read_cr4, write_cr4, "cr4");
control_register!(read_cr8, write_cr8, "cr8");
control_register!(read_dr0, write_dr0, "dr0");
control_register!(read_dr1, write_dr1, "dr1");
control_register!(read_dr2, write_dr2, "dr2");
control_register!(read_dr3, write_dr3, "dr3");
control_register!(read_dr6, write_dr6, "dr6");
control_register!(read_dr7, write_dr7, "dr7");

pub fn read_msr(index: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register in ring 0.
    unsafe {
        asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nostack, preserves_flags))
    }
    u64::from(high) << 32 | u64::from(low)
}

pub fn write_msr(index: u32, value: u64) {
    // SAFETY: see the module's text.
    unsafe {
        asm!("wrmsr", in("ecx") index, in("eax") value as u32, in("edx") (value >> 32) as u32, options(nostack, preserves_flags));
    }
}

pub fn cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    __cpuid_count(leaf, subleaf)
}

pub fn read_tsc() -> u64 {
    // SAFETY: has no effect but its result.
    unsafe { core::arch::x86_64::_rdtsc() }
}

pub fn read_rflags() -> u64 {
    let value;
    // SAFETY: pushes and pops one word.
    unsafe { asm!("pushfq", "pop {}", out(reg) value) }
    value
}

pub fn invalidate_page(address: u64) {
    // SAFETY: forgets a cached translation, no more.
    unsafe { asm!("invlpg [{}]", in(reg) address, options(nostack, preserves_flags)) }
}

/// INVPCID of the given kind (SDM vol. 2A, INVPCID).
pub fn invalidate_pcid(kind: u64, pcid: u64, address: u64) {
    let descriptor = [pcid, address];
    // SAFETY: forgets cached translations, no more.
    unsafe { asm!("invpcid {}, [{}]", in(reg) kind, in(reg) &descriptor, options(nostack)) }
}

pub fn enable_interrupts() {
    // SAFETY: the runtime has a handler for every vector.
    unsafe { asm!("sti", options(nostack)) }
}

pub fn disable_interrupts() {
    // SAFETY: has no other effect.
    unsafe { asm!("cli", options(nostack)) }
}

/// The vendor's twelve letters (CPUID leaf 0).
pub fn vendor() -> Text<12> {
    let leaf = cpuid(0, 0);
    let mut text = Text([0; 12]);
    for (chunk, register) in text
        .0
        .chunks_exact_mut(4)
        .zip([leaf.ebx, leaf.edx, leaf.ecx])
    {
        chunk.copy_from_slice(&register.to_le_bytes());
    }
    text
}

/// The brand string (CPUID leaves 0x8000_0002 to 0x8000_0004), if the CPU has one.
pub fn brand() -> Option<Text<48>> {
    if cpuid(0x8000_0000, 0).eax < 0x8000_0004 {
        return None;
    }
    let mut text = Text([0; 48]);
    for (chunk, leaf) in text.0.chunks_exact_mut(16).zip(0x8000_0002..) {
        let part = cpuid(leaf, 0);
        for (bytes, register) in chunk
            .chunks_exact_mut(4)
            .zip([part.eax, part.ebx, part.ecx, part.edx])
        {
            bytes.copy_from_slice(&register.to_le_bytes());
        }
    }
    Some(text)
}

/// Text that CPUID returned: NUL-padded ASCII.
pub struct Text<const N: usize>([u8; N]);

impl<const N: usize> Text<N> {
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|&byte| byte == 0).unwrap_or(N);
        core::str::from_utf8(&self.0[..end])
            .unwrap_or("(not text)")
            .trim()
    }
}
