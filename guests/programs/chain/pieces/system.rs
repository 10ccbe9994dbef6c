//! Control registers, debug registers, MSRs, page tables.

use core::arch::asm;

use runtime::cpu::{self, msr};
use runtime::window::{self, DIRTY, PRESENT, WRITABLE};

use super::{Piece, canonical};

const MP_AND_AM: u64 = 1 << 1 | 1 << 18;
const DE_AND_PCE: u64 = 1 << 3 | 1 << 8;

pub(super) static PIECES: [Piece; 21] = [
    Piece::new(
        "dr6",
        |random| random & 0xE00F | 0xFFFF_0FF0,
        cpu::write_dr6,
        cpu::read_dr6,
    ),
    Piece::new("dr0", far_away, cpu::write_dr0, cpu::read_dr0),
    Piece::new("dr1", far_away, cpu::write_dr1, cpu::read_dr1),
    Piece::new("dr2", far_away, cpu::write_dr2, cpu::read_dr2),
    Piece::new("dr7", breakpoints, cpu::write_dr7, cpu::read_dr7),
    Piece::new("cr2", canonical, cpu::write_cr2, cpu::read_cr2),
    Piece::new("cr8", |random| random % 3, cpu::write_cr8, cpu::read_cr8),
    Piece::new(
        "cr0",
        |random| random & MP_AND_AM,
        |value| cpu::write_cr0(cpu::read_cr0() & !MP_AND_AM | value),
        || cpu::read_cr0() & MP_AND_AM,
    ),
    Piece::new(
        "cr4",
        |random| random & DE_AND_PCE,
        |value| cpu::write_cr4(cpu::read_cr4() & !DE_AND_PCE | value),
        || cpu::read_cr4() & DE_AND_PCE,
    ),
    Piece::new("cr3", |random| random & 1, choose_root, chosen_root),
    Piece::new("dirty", |random| random & 0xFF, make_dirty, dirty),
    Piece::new("xcr0", |random| random & 2 | 1, set_xcr0, xcr0).if_it(has_xsave),
    Piece::new(
        "star",
        |random| random & 0xFFFF_FFFF,
        |value| {
            let selectors = cpu::read_msr(msr::STAR) >> 32 << 32;
            cpu::write_msr(msr::STAR, selectors | value);
        },
        || cpu::read_msr(msr::STAR) & 0xFFFF_FFFF,
    ),
    Piece::new(
        "cstar",
        canonical,
        |value| cpu::write_msr(msr::CSTAR, value),
        || cpu::read_msr(msr::CSTAR),
    ),
    Piece::new(
        "fmask",
        |random| random & 0x8D5 | 0x4_4700,
        |value| cpu::write_msr(msr::FMASK, value),
        || cpu::read_msr(msr::FMASK),
    ),
    Piece::new(
        "sysenter_cs",
        |random| random & 0xFFFF,
        |value| cpu::write_msr(msr::SYSENTER_CS, value),
        || cpu::read_msr(msr::SYSENTER_CS),
    ),
    Piece::new(
        "sysenter_esp",
        canonical,
        |value| cpu::write_msr(msr::SYSENTER_ESP, value),
        || cpu::read_msr(msr::SYSENTER_ESP),
    ),
    Piece::new(
        "sysenter_eip",
        canonical,
        |value| cpu::write_msr(msr::SYSENTER_EIP, value),
        || cpu::read_msr(msr::SYSENTER_EIP),
    ),
    Piece::new(
        "tsc_aux",
        |random| random & 0xFFFF_FFFF,
        |value| cpu::write_msr(msr::TSC_AUX, value),
        || cpu::read_msr(msr::TSC_AUX),
    )
    .if_it(|| cpu::cpuid(0x8000_0001, 0).edx & 1 << 27 != 0),
    // Entries 4 to 7, which no page uses.
    Piece::new(
        "pat",
        |random| random & 0x0505_0505_0000_0000 | 0x0007_0406,
        |value| cpu::write_msr(msr::PAT, value),
        || cpu::read_msr(msr::PAT),
    )
    .if_it(|| cpu::cpuid(1, 0).edx & 1 << 16 != 0),
    Piece::new(
        "mtrr",
        |random| random & 0xF_FFFF << 12 | 6,
        |value| cpu::write_msr(msr::MTRR_LAST_BASE, value),
        || cpu::read_msr(msr::MTRR_LAST_BASE),
    )
    .if_it(|| {
        cpu::cpuid(1, 0).edx & 1 << 12 != 0 && cpu::read_msr(msr::MTRR_CAPABILITIES) & 0xFF == 8
    }),
];

/// An address that nobody uses.
fn far_away(random: u64) -> u64 {
    0x7000_0000_0000 | random & 0xFFFF_FFF8
}

/// Now and then breakpoints 0 to 2 are on, for writes of 8 bytes.
fn breakpoints(random: u64) -> u64 {
    if random & 7 == 0 {
        0x400 | random & 0x3F | 0x999 << 16
    } else {
        0x400
    }
}

#[repr(C, align(4096))]
struct Table([u64; 512]);

static mut OTHER_ROOT: Table = Table([0; 512]);
static mut FIRST_ROOT: u64 = 0;
static mut PAGES: [Table; 8] = [const { Table([0; 512]) }; 8];

pub(super) fn prepare() {
    window::open();
    // SAFETY: one CPU; both roots map the same, and nothing else changes them.
    unsafe {
        (&raw mut FIRST_ROOT).write(cpu::read_cr3());
        let first = cpu::read_cr3() as *const Table;
        core::ptr::copy_nonoverlapping(first, &raw mut OTHER_ROOT, 1);
    }
}

fn choose_root(other: u64) {
    // SAFETY: written by `prepare`.
    let first = unsafe { (&raw const FIRST_ROOT).read() };
    cpu::write_cr3(if other == 1 {
        (&raw const OTHER_ROOT) as u64
    } else {
        first
    });
}

fn chosen_root() -> u64 {
    match cpu::read_cr3() {
        root if root == (&raw const OTHER_ROOT) as u64 => 1,
        // SAFETY: written by `prepare`.
        root if root == unsafe { (&raw const FIRST_ROOT).read() } => 0,
        root => root,
    }
}

/// Maps eight pages anew, reads them all, and writes to those whose bit is set.
fn make_dirty(which: u64) {
    for page in 0..8 {
        let memory = (&raw mut PAGES).cast::<Table>().wrapping_add(page);
        let address = window::map(page, memory as u64, PRESENT | WRITABLE) as *mut u64;
        // SAFETY: mapped just now; the page is this program's own.
        unsafe {
            address.read_volatile();
            if which >> page & 1 != 0 {
                address.write_volatile(page as u64);
            }
        }
    }
}

fn dirty() -> u64 {
    (0..8).fold(0, |bits, page| {
        bits | u64::from(window::entry(page) & DIRTY != 0) << page
    })
}

fn has_xsave() -> bool {
    const OSXSAVE: u64 = 1 << 18;
    let has = cpu::cpuid(1, 0).ecx & 1 << 26 != 0;
    if has {
        cpu::write_cr4(cpu::read_cr4() | OSXSAVE);
    }
    has
}

fn set_xcr0(value: u64) {
    // SAFETY: 1 and 3 are allowed, and change nothing for who does not use XSAVE.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") value as u32, in("edx") 0, options(nostack, preserves_flags))
    }
}

fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reads a register; CR4.OSXSAVE is set.
    unsafe {
        asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nostack, preserves_flags))
    }
    u64::from(high) << 32 | u64::from(low)
}
