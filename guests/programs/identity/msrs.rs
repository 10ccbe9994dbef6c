//! Model-specific registers (SDM vol. 4 table 2-2; their bits: where each is described).

use core::arch::asm;

use runtime::cpu::{self, msr};
use runtime::{print, println};

use crate::register::{Register, bits, print_read, print_write, types};

const TSC: u32 = 0x10;
const PLATFORM_ID: u32 = 0x17;
const FEATURE_CONTROL: u32 = 0x3A;
const TSC_ADJUST: u32 = 0x3B;
const SPEC_CTRL: u32 = 0x48;
const PRED_CMD: u32 = 0x49;
const UPDATE_TRIGGER: u32 = 0x79;
const UPDATE_SIGNATURE: u32 = 0x8B;
const ARCH_CAPABILITIES: u32 = 0x10A;
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17A;
const MISC_ENABLE: u32 = 0x1A0;
const DEBUGCTL: u32 = 0x1D9;
const MTRR_BASE: u32 = 0x200;
const MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26A, 0x26B, 0x26C, 0x26D, 0x26E, 0x26F,
];
const MTRR_DEFAULT: u32 = 0x2FF;

const ALL: u64 = u64::MAX;
const LOWER_HALF: u64 = (1 << 47) - 1;

pub fn show() {
    after_reset();
    addresses_and_selectors();
    memory_types();
    features();
    one_way();
    not_there();
    apic_base();
    time();
    halves();
}

/// SDM vol. 3A table 10-1, 13.12.4 (PAT), 12.4.4 (APIC base: enabled, the boot processor's). Neither
/// firmware nor this program's runtime has written these.
fn after_reset() {
    print!("after reset:");
    for (name, index) in [
        ("apic base", msr::APIC_BASE),
        ("pat", msr::PAT),
        ("star", msr::STAR),
        ("lstar", msr::LSTAR),
        ("cstar", msr::CSTAR),
        ("fmask", msr::FMASK),
        ("fs", msr::FS_BASE),
        ("gs", msr::GS_BASE),
        ("kernel gs", msr::KERNEL_GS_BASE),
        ("tsc aux", msr::TSC_AUX),
        ("tsc adjust", TSC_ADJUST),
        ("sysenter", msr::SYSENTER_CS),
        ("esp", msr::SYSENTER_ESP),
        ("eip", msr::SYSENTER_EIP),
        ("spec ctrl", SPEC_CTRL),
        ("debugctl", DEBUGCTL),
        ("mcg status", MCG_STATUS),
    ] {
        print!(" {name}");
        print_read(Register::Msr(index));
    }
    println!();
}

/// SDM vol. 3A 6.8.7, 6.8.8; WRMSR wants canonical addresses (vol. 2D WRMSR): with a positive
/// address the bits below 47 can be changed one by one, and so with a negative one. Not asked: what
/// the manual calls "not used" (the upper bits of SYSENTER_CS; CSTAR's canonical form).
fn addresses_and_selectors() {
    println!("msr: the bits that can be changed");
    bits("star", Register::Msr(msr::STAR), 0, ALL);
    // Bits 47 to 55: see `wide_addresses`.
    const HIGHEST: u64 = 0xFF << 56;
    for (name, index, asked) in [
        ("lstar", msr::LSTAR, LOWER_HALF | HIGHEST),
        ("fs base", msr::FS_BASE, LOWER_HALF | HIGHEST),
        ("gs base", msr::GS_BASE, LOWER_HALF | HIGHEST),
        ("kernel gs base", msr::KERNEL_GS_BASE, LOWER_HALF | HIGHEST),
        ("cstar", msr::CSTAR, LOWER_HALF),
        ("sysenter esp", msr::SYSENTER_ESP, LOWER_HALF),
        ("sysenter eip", msr::SYSENTER_EIP, LOWER_HALF),
    ] {
        bits(name, Register::Msr(index), 0, asked);
        bits(name, Register::Msr(index), !LOWER_HALF, asked);
    }
    bits("fmask", Register::Msr(msr::FMASK), 0, 0xFFFF_FFFF);
    bits("sysenter cs", Register::Msr(msr::SYSENTER_CS), 0, 0xFFFF);
    bits("tsc aux", Register::Msr(msr::TSC_AUX), 0, ALL);
    wide_addresses();
}

/// What Linux's KVM does not refuse on every host: addresses that would be canonical with 57 bits (it
/// checks for what the host's processor has, not the guest's CPUID), any address for SYSENTER (it
/// makes them canonical, because AMD's processors take them), and bits of FMASK that are reserved
/// (SDM vol. 3A 6.8.8).
fn wide_addresses() {
    print!("an address of 49 bits:");
    for index in [
        msr::LSTAR,
        msr::FS_BASE,
        msr::GS_BASE,
        msr::KERNEL_GS_BASE,
        msr::SYSENTER_ESP,
        msr::SYSENTER_EIP,
    ] {
        print_write(Register::Msr(index), 1 << 47);
        let _ = Register::Msr(index).write(0);
    }
    println!();
    print!("fmask, a bit of the upper half:");
    print_write(Register::Msr(msr::FMASK), 1 << 32);
    let _ = Register::Msr(msr::FMASK).write(0);
    println!();
}

/// SDM vol. 3A 13.11.2, 13.12.2 to 13.12.4. Physical addresses have 40 bits (CPUID leaf 0x8000_0008).
fn memory_types() {
    bits("pat, from 0", Register::Msr(msr::PAT), 0, ALL);
    types("pat, types of the first", Register::Msr(msr::PAT), 0);
    types("pat, types of the last", Register::Msr(msr::PAT), 56);
    print!("mtrr capabilities:");
    print_read(Register::Msr(msr::MTRR_CAPABILITIES));
    println!();
    bits("mtrr default, from 0", Register::Msr(MTRR_DEFAULT), 0, ALL);
    types("mtrr default, types", Register::Msr(MTRR_DEFAULT), 0);
    for (name, index) in [("first", 0), ("last", 7)] {
        print!("mtrr, {name} variable ");
        bits("base, from 0", Register::Msr(MTRR_BASE + 2 * index), 0, ALL);
        print!("mtrr, {name} variable ");
        bits(
            "mask, from 0",
            Register::Msr(MTRR_BASE + 2 * index + 1),
            0,
            ALL,
        );
    }
    types("mtrr, variable, types", Register::Msr(MTRR_BASE), 0);
    print!("mtrr, fixed:");
    for index in MTRR_FIXED {
        let register = Register::Msr(index);
        let old = register.read();
        let value = 0x0606_0504_0100_0605;
        let kept = register.write(value).is_ok() && register.read().ok() == Some(value);
        print!(" {}", if kept { "kept" } else { "lost" });
        let _ = register.write(old.unwrap_or(0));
    }
    println!();
    types("mtrr, fixed, types of the first", Register::Msr(0x250), 0);
    types("mtrr, fixed, types of the last", Register::Msr(0x26F), 56);
    print!("mtrr, a ninth variable:");
    print_read(Register::Msr(MTRR_BASE + 16));
    println!();
}

/// Registers whose bits features bring along.
fn features() {
    // LMA is read-only; LME cannot change while paging is on (SDM vol. 3A 2.2.1).
    const LMA: u64 = 1 << 10;
    let efer = cpu::read_msr(msr::EFER);
    bits("efer", Register::Msr(msr::EFER), efer & !1, !LMA);
    // IBRS. Of the next bits KVM takes those that the host's processor has; bit 1, STIBP, may be
    // written also where it is not enumerated (vol. 4 table 2-2).
    bits("spec ctrl", Register::Msr(SPEC_CTRL), 0, 1 | ALL << 16);
    // Its first two bits do nothing in a virtual machine without branch records.
    bits("debugctl", Register::Msr(DEBUGCTL), 0, 0x3C | ALL << 16);
    // SDM vol. 3B 17.3.1.2.
    bits("mcg status", Register::Msr(MCG_STATUS), 0, ALL);
    // Fast strings, and what is reserved in every model.
    const RESERVED: u64 = 0xE776 | 1 << 17 | 1 << 63;
    let misc = Register::Msr(MISC_ENABLE);
    bits("misc enable", misc, misc.read().unwrap_or(0), 1 | RESERVED);
}

/// Registers that can be read only, and some that can be written only.
fn one_way() {
    for (name, index) in [
        ("mtrr capabilities", msr::MTRR_CAPABILITIES),
        ("architectural capabilities", ARCH_CAPABILITIES),
        ("platform id", PLATFORM_ID),
        ("machine check capabilities", MCG_CAP),
        ("feature control, which is locked", FEATURE_CONTROL),
    ] {
        print!("{name}:");
        print_read(Register::Msr(index));
        print!(", written");
        print_write(
            Register::Msr(index),
            Register::Msr(index).read().unwrap_or(0),
        );
        println!();
    }
    print!("pred cmd:");
    print_read(Register::Msr(PRED_CMD));
    for value in [0, 1, 2, 1 << 63] {
        print!(", {value:#x}");
        print_write(Register::Msr(PRED_CMD), value);
    }
    println!();
    // SDM vol. 3A 11.11.7.1: the signature is loaded by CPUID.
    print!("microcode: trigger");
    print_read(Register::Msr(UPDATE_TRIGGER));
    print!(", signature written");
    print_write(Register::Msr(UPDATE_SIGNATURE), 0);
    cpu::cpuid(1, 0);
    print!(", then");
    print_read(Register::Msr(UPDATE_SIGNATURE));
    println!();
}

/// Nothing enumerates these.
fn not_there() {
    print!("not there, but read or written without #GP(0):");
    for index in [
        0x2,         // between the Pentium's
        0x40,        // last branch records
        0x9B,        // SMM monitor
        0xC1,        // performance counter 0
        0xE1,        // UMWAIT_CONTROL
        0xE7,        // MPERF
        0xE8,        // APERF
        0x10B,       // FLUSH_CMD: leaf 7 EDX bit 28
        0x122,       // TSX_CTRL
        0x123,       // MCU_OPT_CTRL
        0x140,       // MISC_FEATURES_ENABLES
        0x186,       // event select 0
        0x19A,       // clock modulation
        0x1B0,       // energy performance bias
        0x1FC,       // POWER_CTL
        0x210,       // ninth variable MTRR
        0x25A,       // between the fixed MTRRs
        0x270,       // behind them
        0x300,       // behind the default type
        0x309,       // fixed counter 0
        0x345,       // performance capabilities
        0x38F,       // performance global control
        0x400,       // machine check bank 0
        0x480,       // VMX_BASIC
        0x570,       // processor trace
        0x600,       // DS_AREA
        0x6A0,       // U_CET
        0x770,       // PM_ENABLE (HWP)
        0x802,       // x2APIC registers, while in xAPIC mode (SDM vol. 3A 12.12.2)
        0x80B,       //
        0x8FF,       //
        0xC80,       // DEBUG_INTERFACE
        0xC8F,       // PQR_ASSOC
        0xDA0,       // XSS: no XSAVES
        0x4000_0000, // never in any processor
        0x4B56_4D02, // paravirtual page faults
        0x4B56_4D03, // steal time
        0xC000_0085, // behind FMASK
        0xC000_0104, // AMD's TSC ratio
        0xC001_0015, // AMD's HWCR
        0xC001_0117, // AMD's VM_HSAVE_PA
        0xFFFF_FFFF,
    ] {
        let register = Register::Msr(index);
        for ended in [register.read().map(drop), register.write(0)] {
            match ended {
                Err(fault) if (fault.frame.vector, fault.frame.error) == (13, 0) => {}
                _ => print!(" {index:#x}"),
            }
        }
    }
    println!();
}

/// SDM vol. 3A 12.4.4, 12.12.5. Its place, the enabling and x2APIC mode are left alone.
fn apic_base() {
    const EXTENDED: u64 = 1 << 10;
    const ENABLED: u64 = 1 << 11;
    let register = Register::Msr(msr::APIC_BASE);
    let old = cpu::read_msr(msr::APIC_BASE);
    let reserved = 0xFF | 1 << 9 | ALL << 40;
    bits("apic base, of its reserved bits", register, old, reserved);
    print!("apic base, extended without enabled:");
    print_write(register, old & !ENABLED | EXTENDED);
    println!();
    // 12.5.4.1: in the timer's other modes the deadline reads as zero and is not written.
    print!("deadline in another mode:");
    print_write(Register::Msr(msr::TSC_DEADLINE), 1 << 62);
    print_read(Register::Msr(msr::TSC_DEADLINE));
    println!();
}

/// CPUID shows the local APIC while it is enabled (SDM vol. 3A 12.4.3).
pub fn apic_off_and_on() {
    const ENABLED: u64 = 1 << 11;
    let old = cpu::read_msr(msr::APIC_BASE);
    let shown = || cpu::cpuid(1, 0).edx >> 9 & 1;
    print!("apic in cpuid: {}", shown());
    print!("; off");
    print_write(Register::Msr(msr::APIC_BASE), old & !ENABLED);
    print!(" {}", shown());
    print!("; on");
    print_write(Register::Msr(msr::APIC_BASE), old);
    println!(" {}", shown());
}

/// SDM vol. 3B 19.17.3: TSC and TSC_ADJUST move by the same.
fn time() {
    const FAR: u64 = 1 << 56;
    let tsc = Register::Msr(TSC);
    let adjust = Register::Msr(TSC_ADJUST);
    let near = |value: u64, from: u64| {
        if value.wrapping_sub(from) < FAR / 2 {
            "right"
        } else {
            "wrong"
        }
    };
    let before = cpu::read_tsc();
    print!("tsc: msr {}", near(tsc.read().unwrap_or(0), before));
    print!(", adjusted");
    print_write(adjust, FAR);
    print!(" {}", near(cpu::read_tsc(), before + FAR));
    print_read(adjust);
    print!(", set");
    print_write(tsc, 2 * FAR);
    print!(" {}", near(cpu::read_tsc(), 2 * FAR));
    let moved = adjust.read().unwrap_or(0);
    print!(", adjustment {}", near(2 * FAR - before, moved));
    print!(", back");
    print_write(adjust, 0);
    println!(" {}", near(cpu::read_tsc(), before));
}

/// RDMSR clears the upper halves of RAX and RDX; both instructions look at the lower half of RCX,
/// and WRMSR at those of RAX and RDX (SDM vol. 2B RDMSR, 2D WRMSR).
fn halves() {
    const ABOVE: u64 = 0x1234_5678 << 32;
    let (mut rax, mut rdx) = (u64::MAX, u64::MAX);
    // SAFETY: KERNEL_GS_BASE is not in use.
    unsafe {
        asm!(
            "wrmsr", in("rcx") ABOVE | u64::from(msr::KERNEL_GS_BASE), in("rax") ABOVE | 0x9ABC_DEF0, in("rdx") ABOVE | 0x7654,
            options(nostack, preserves_flags)
        );
        asm!(
            "rdmsr", in("rcx") ABOVE | u64::from(msr::KERNEL_GS_BASE), inout("rax") rax, inout("rdx") rdx,
            options(nostack, preserves_flags)
        );
    }
    println!("through registers of 64 bits: rax {rax:#x} rdx {rdx:#x}");
    cpu::write_msr(msr::KERNEL_GS_BASE, 0);
}

/// RDTSCP and RDPID show TSC_AUX.
pub fn tsc_aux() {
    cpu::write_msr(msr::TSC_AUX, 0x1357_9BDF);
    let (rdtscp, rdpid): (u64, u64);
    // SAFETY: reads.
    unsafe {
        asm!("rdtscp", out("rcx") rdtscp, out("rax") _, out("rdx") _, options(nostack, preserves_flags));
        asm!(".byte 0xF3, 0x0F, 0xC7, 0xF8", out("rax") rdpid, options(nostack, preserves_flags));
    }
    println!("tsc aux: rdtscp {rdtscp:#x}, rdpid {rdpid:#x}");
    cpu::write_msr(msr::TSC_AUX, 0);
}

pub fn swapgs() {
    cpu::write_msr(msr::GS_BASE, 0x1111);
    cpu::write_msr(msr::KERNEL_GS_BASE, 0xFFFF_8000_0000_2222);
    // SAFETY: nothing uses GS.
    unsafe { asm!("swapgs", options(nostack, preserves_flags)) }
    println!(
        "swapgs: gs {:#x}, kernel gs {:#x}",
        cpu::read_msr(msr::GS_BASE),
        cpu::read_msr(msr::KERNEL_GS_BASE)
    );
    cpu::write_msr(msr::GS_BASE, 0);
    cpu::write_msr(msr::KERNEL_GS_BASE, 0);
}
