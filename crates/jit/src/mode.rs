//! What code was translated for: the parts of the processor's state that decide what an instruction means.

use trapgate_interp::View;
use trapgate_interp::cpu::{CodeSize, Cpu};
use trapgate_x86::descriptor::access;
use trapgate_x86::registers::{cr0, cr4, sreg, xcr0};

/// Whether a processor runs 32-bit code of user level in long mode, with segments that check nothing.
fn is_flat(cpu: &Cpu) -> bool {
    let segments = &cpu.sys.segments;
    let data = access::P | access::S | access::WRITABLE;
    let flat = |segment: usize| segments[segment].base == 0 && segments[segment].limit == u32::MAX;
    cpu.is_long()
        && cpu.cpl == 3
        && cpu.code_size == CodeSize::Bits32
        && segments[sreg::SS].has(access::DB)
        && [sreg::CS, sreg::DS, sreg::ES, sreg::SS]
            .into_iter()
            .all(flat)
        && [sreg::DS, sreg::ES, sreg::SS]
            .into_iter()
            .all(|segment| segments[segment].has(data) && !segments[segment].has(access::CODE))
}

/// A set of facts; code runs only while they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Mode(pub(crate) u8);

impl Mode {
    /// CPL 3, else 0.
    const USER: u8 = 1 << 0;
    /// User pages are accessible: CPL 3, EFLAGS.AC, or no SMAP.
    const USER_PAGES: u8 = 1 << 1;
    /// SSE instructions run: CR0.EM and TS clear, CR4.OSFXSR set.
    const SSE: u8 = 1 << 2;
    /// AVX instructions run.
    const AVX: u8 = 1 << 3;
    /// All SIMD floating-point exceptions are masked.
    const MASKED: u8 = 1 << 4;
    /// CR4.SMAP: at CPL 0 EFLAGS.AC decides about user pages.
    const SMAP: u8 = 1 << 5;
    /// CR4.FSGSBASE.
    const BASES: u8 = 1 << 6;
    /// Compatibility mode at CPL 3 with flat segments; else 64-bit mode.
    const COMPATIBILITY: u8 = 1 << 7;
    /// Bits used.
    pub(crate) const BITS: u32 = 8;

    /// 64-bit code of ring 3 with all that a processor may have switched on.
    #[cfg(test)]
    pub(crate) fn for_test_of_everything() -> Self {
        Self(Self::USER | Self::USER_PAGES | Self::SSE | Self::AVX | Self::MASKED | Self::BASES)
    }

    /// An address of code: in compatibility mode it wraps at 4 GiB.
    pub(crate) fn wrap(self, rip: u64) -> u64 {
        if self.is_compatibility() {
            rip & 0xffff_ffff
        } else {
            rip
        }
    }

    /// The page after that of an address of code.
    pub(crate) fn next_page(self, rip: u64) -> u64 {
        self.wrap((rip & !0xfff).wrapping_add(0x1000))
    }

    /// The processor's; `None` if code can't be translated in it.
    pub(crate) fn of(cpu: &Cpu) -> Option<Self> {
        let compatibility = !cpu.is_64bit();
        if (compatibility && !is_flat(cpu))
            || cpu.view() == View::Checked
            || !matches!(cpu.cpl, 0 | 3)
        {
            return None;
        }
        let mut mode = match cpu.view() {
            View::User => Self::USER | Self::USER_PAGES,
            View::SupervisorUser => Self::USER_PAGES,
            _ => 0,
        };
        if compatibility {
            mode |= Self::COMPATIBILITY;
        }
        let sys = &cpu.sys;
        if sys.cr4 & cr4::SMAP != 0 {
            mode |= Self::SMAP;
        }
        if sys.cr4 & cr4::FSGSBASE != 0 {
            mode |= Self::BASES;
        }
        if sys.cr0 & (cr0::EM | cr0::TS) == 0 && sys.cr4 & cr4::OSFXSR != 0 {
            mode |= Self::SSE;
        }
        let enabled = xcr0::SSE | xcr0::AVX;
        if sys.cr0 & cr0::TS == 0 && sys.cr4 & cr4::OSXSAVE != 0 && sys.xcr0 & enabled == enabled {
            mode |= Self::AVX;
        }
        if cpu.regs.mxcsr & 0x1f80 == 0x1f80 {
            mode |= Self::MASKED;
        }
        Some(Self(mode))
    }

    pub(crate) fn is_compatibility(self) -> bool {
        self.0 & Self::COMPATIBILITY != 0
    }

    /// Bits of addresses: what the decoder calls the mode by.
    pub(crate) fn bits(self) -> u32 {
        if self.is_compatibility() { 32 } else { 64 }
    }

    /// Bytes of a word on the stack.
    pub(crate) fn word(self) -> usize {
        if self.is_compatibility() { 4 } else { 8 }
    }

    pub(crate) fn is_user(self) -> bool {
        self.0 & Self::USER != 0
    }

    pub(crate) fn has_bases(self) -> bool {
        self.0 & Self::BASES != 0
    }

    pub(crate) fn has_smap(self) -> bool {
        self.0 & Self::SMAP != 0
    }

    pub(crate) fn has_sse(self) -> bool {
        self.0 & Self::SSE != 0
    }

    pub(crate) fn has_avx(self) -> bool {
        self.0 & Self::AVX != 0
    }

    pub(crate) fn masks_float(self) -> bool {
        self.0 & Self::MASKED != 0
    }

    /// The mode after STAC (`set`) or CLAC.
    pub(crate) fn with_access(self, set: bool) -> Self {
        if set || self.0 & Self::SMAP == 0 {
            Self(self.0 | Self::USER_PAGES)
        } else {
            Self(self.0 & !Self::USER_PAGES)
        }
    }

    /// The mode after SYSCALL with EFLAGS.AC masked.
    pub(crate) fn entered(self) -> Self {
        Self(self.0 & !Self::USER).with_access(false)
    }

    /// The mode after SYSRET.
    pub(crate) fn returned(self) -> Self {
        Self(self.0 | Self::USER | Self::USER_PAGES)
    }

    /// The view of its data accesses, as the number of a table of translations.
    pub(crate) fn view(self) -> usize {
        match self.0 & (Self::USER | Self::USER_PAGES) {
            0 => View::Supervisor as usize,
            Self::USER_PAGES => View::SupervisorUser as usize,
            _ => View::User as usize,
        }
    }
}
