//! CPUID (SDM vol. 2A CPUID; leaves 0x4000_00xx: Linux Documentation/virt/kvm/x86/cpuid.rst).

use core::arch::asm;
use core::arch::x86_64::CpuidResult;

use runtime::{cpu, print, println};

use crate::register::Register;

const HIGHEST_BASIC: u32 = 0;
const HIGHEST_PARAVIRTUAL: u32 = 0x4000_0000;
const HIGHEST_EXTENDED: u32 = 0x8000_0000;
/// Leaves that speak of the TSC's frequency.
const CRYSTAL: u32 = 0x15;
const FREQUENCY: u32 = 0x16;
const PARAVIRTUAL_FREQUENCY: u32 = 0x4000_0010;

pub fn show() {
    println!("vendor: {}", cpu::vendor().as_str());
    println!(
        "brand: {}",
        cpu::brand().as_ref().map_or("", |brand| brand.as_str())
    );
    for class in [HIGHEST_BASIC, HIGHEST_PARAVIRTUAL, HIGHEST_EXTENDED] {
        every_leaf(class);
    }
    frequencies();
    beyond();
    levels();
    registers();
    follow_the_state();
}

/// What each leaf from `class` on answers. After leaf, a point, and the subleaf: EAX, EBX, ECX, EDX.
fn every_leaf(class: u32) {
    let mut zeros = [(0, 0); 64];
    let mut count = 0;
    let highest = cpu::cpuid(class, 0).eax;
    for leaf in class..=highest.min(class + 0x40) {
        let subleaves = match leaf {
            4 | 7 | 0xB | 0xD => 5,
            _ => 1,
        };
        if [CRYSTAL, FREQUENCY, PARAVIRTUAL_FREQUENCY].contains(&leaf) {
            continue;
        }
        for subleaf in 0..subleaves {
            let CpuidResult { eax, ebx, ecx, edx } = cpu::cpuid(leaf, subleaf);
            if [eax, ebx, ecx, edx] == [0; 4] {
                zeros[count] = (leaf, subleaf);
                count += 1;
                continue;
            }
            println!("cpuid {leaf:#x}.{subleaf}: {eax:#x} {ebx:#x} {ecx:#x} {edx:#x}");
        }
    }
    print!("all zeros:");
    for (leaf, subleaf) in &zeros[..count] {
        print!(" {leaf:#x}.{subleaf}");
    }
    println!();
}

/// The leaves that depend on the TSC's frequency must agree, and MSR_PLATFORM_INFO with them.
fn frequencies() {
    let crystal = cpu::cpuid(CRYSTAL, 0);
    let hz = u64::from(crystal.ecx) * u64::from(crystal.ebx) / u64::from(crystal.eax.max(1));
    let nominal = cpu::cpuid(FREQUENCY, 0);
    let paravirtual = cpu::cpuid(PARAVIRTUAL_FREQUENCY, 0);
    let says = |right: bool| if right { "right" } else { "wrong" };
    println!("tsc: {}, edx {:#x}", says(hz >= 100_000_000), crystal.edx);
    println!(
        "nominal frequency: {}, the highest {}, bus {} MHz, edx {:#x}",
        says(u64::from(nominal.eax) == hz / 1_000_000),
        says(nominal.ebx == nominal.eax),
        nominal.ecx,
        nominal.edx
    );
    println!(
        "paravirtual frequency: {}, apic timer {} kHz, {:#x} {:#x}",
        says(u64::from(paravirtual.eax) == hz / 1_000),
        paravirtual.ebx,
        paravirtual.ecx,
        paravirtual.edx
    );
    let ratio = Register::Msr(0xCE).read().unwrap_or(0) >> 8 & 0xFF;
    println!(
        "platform info: {}",
        says(ratio == (hz / 100_000_000).min(255))
    );
}

/// Above the highest leaf: the highest basic leaf's answer, on Intel's processors.
fn beyond() {
    print!("beyond the highest:");
    let expected = cpu::cpuid(cpu::cpuid(HIGHEST_BASIC, 0).eax, 0);
    for leaf in [
        0x17,
        0x1234,
        0x3FFF_FFFF,
        0x4000_0011,
        0x4000_0100,
        0x5000_0000,
        0x7FFF_FFFF,
        0x8000_0009,
        0x8FFF_FFFF,
        0xC000_0000,
        0xFFFF_FFFF,
    ] {
        let right = cpu::cpuid(leaf, 0) == expected;
        print!(" {leaf:#x} {}", if right { "as 0x16" } else { "other" });
    }
    println!();
}

/// Leaf, subleaf 0, EBX 1, ECX 2 or EDX 3, bit, name.
type Feature = (u32, usize, u32, &'static str);

/// x86-64 psABI, table 3.1.
const LEVELS: &[(&str, &[Feature])] = &[
    (
        "x86-64",
        &[
            (1, 3, 15, "cmov"),
            (1, 3, 8, "cx8"),
            (1, 3, 0, "fpu"),
            (1, 3, 24, "fxsr"),
            (1, 3, 23, "mmx"),
            (0x8000_0001, 3, 11, "syscall"),
            (1, 3, 25, "sse"),
            (1, 3, 26, "sse2"),
        ],
    ),
    (
        "x86-64-v2",
        &[
            (1, 2, 13, "cmpxchg16b"),
            (0x8000_0001, 2, 0, "lahf"),
            (1, 2, 23, "popcnt"),
            (1, 2, 0, "sse3"),
            (1, 2, 19, "sse4.1"),
            (1, 2, 20, "sse4.2"),
            (1, 2, 9, "ssse3"),
        ],
    ),
    (
        "x86-64-v3",
        &[
            (1, 2, 28, "avx"),
            (7, 1, 5, "avx2"),
            (7, 1, 3, "bmi1"),
            (7, 1, 8, "bmi2"),
            (1, 2, 29, "f16c"),
            (1, 2, 12, "fma"),
            (0x8000_0001, 2, 5, "lzcnt"),
            (1, 2, 22, "movbe"),
        ],
    ),
];

fn levels() {
    for (level, features) in LEVELS {
        print!("{level}, has:");
        for &(leaf, register, bit, name) in *features {
            let CpuidResult { eax, ebx, ecx, edx } = cpu::cpuid(leaf, 0);
            if [eax, ebx, ecx, edx][register] >> bit & 1 != 0 {
                print!(" {name}");
            }
        }
        println!();
    }
}

/// Of RAX and RCX only the lower halves are asked, and all four come back with clear upper halves.
fn registers() {
    const ABOVE: u64 = 0xABCD_EF01 << 32;
    let (mut rax, mut rcx, mut rdx) = (ABOVE, ABOVE | 7, u64::MAX);
    let rbx: u64;
    // SAFETY: RBX is kept.
    unsafe {
        asm!(
            "xchg r8, rbx", "cpuid", "xchg r8, rbx",
            inout("rax") rax, inout("r8") u64::MAX => rbx, inout("rcx") rcx, inout("rdx") rdx,
            options(nostack, preserves_flags)
        );
    }
    let right = rax == u64::from(cpu::cpuid(0, 0).eax);
    println!(
        "upper halves: asked {}, answered {:#x}",
        if right { "lower only" } else { "all" },
        (rax | rbx | rcx | rdx) >> 32
    );
}

/// What follows CR4 and XCR0 (SDM vol. 1 13.2).
fn follow_the_state() {
    const OSXSAVE: u64 = 1 << 18;
    let osxsave = || cpu::cpuid(1, 0).ecx >> 27 & 1;
    print!("osxsave: {}", osxsave());
    let old = cpu::read_cr4();
    if Register::Cr4.write(old | OSXSAVE).is_err() {
        println!(", no xsave");
        return;
    }
    print!(", with cr4.osxsave {}", osxsave());
    print!("; bytes of the xsave area:");
    for xcr0 in [1, 3] {
        let written = Register::Xcr(0).write(xcr0).is_ok();
        let leaf = cpu::cpuid(0xD, 0);
        if written {
            print!(" xcr0 {xcr0} {} of {}", leaf.ebx, leaf.ecx);
        }
    }
    let _ = Register::Xcr(0).write(1);
    cpu::write_cr4(old);
    println!();
}
