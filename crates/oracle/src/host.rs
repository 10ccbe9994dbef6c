//! In what hosts are not alike, where an architecture has it either way.
//!
//! The profiles are those of an Intel processor, so what an AMD host does otherwise is left out of comparisons with it; an Intel host
//! is the judge of it. What the manuals leave undefined on any processor is in [`crate::undefined`].

use std::arch::x86_64::{__cpuid, __cpuid_count};

/// Who made the host's processor, as far as it matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Intel, or one that does as Intel's.
    Intel,
    /// AMD, or Hygon.
    Amd,
}

/// A host's processor.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// Who made it.
    pub vendor: Vendor,
    /// FDP and FOP are written when an unmasked exception is raised only, as in the profiles (CPUID.7.0:EBX bit 6).
    pub fdp_on_exceptions: bool,
}

impl Host {
    /// This host.
    pub fn new() -> Self {
        let leaf = __cpuid(0);
        let name = [leaf.ebx, leaf.edx, leaf.ecx]
            .map(u32::to_le_bytes)
            .concat();
        let vendor = match name.as_slice() {
            b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
            _ => Vendor::Intel,
        };
        let features = __cpuid_count(7, 0);
        Self {
            vendor,
            fdp_on_exceptions: features.ebx >> 6 & 1 != 0,
        }
    }

    /// It is AMD's.
    pub fn is_amd(self) -> bool {
        self.vendor == Vendor::Amd
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}
