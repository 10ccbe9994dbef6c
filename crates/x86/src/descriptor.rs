//! Segment descriptors and the registers that cache them (SDM vol. 3A, chapter 3).

use serde::{Deserialize, Serialize};

use crate::hexadecimal;

/// A descriptor table register, GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableRegister {
    /// Linear address.
    #[serde(with = "hexadecimal")]
    pub base: u64,
    /// Offset of the last byte.
    #[serde(with = "hexadecimal")]
    pub limit: u16,
}

/// A segment register with its hidden part, as loaded.
///
/// The access rights are the descriptor's bits 40 to 55 with the limit's nibble (bits 8 to 11)
/// zero, which is the format that VMX and KVM use as well (SDM vol. 3C, table 25-2), bit 16 being
/// "unusable".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// The visible part.
    #[serde(with = "hexadecimal")]
    pub selector: u16,
    /// Linear address of the segment.
    #[serde(with = "hexadecimal")]
    pub base: u64,
    /// Offset of the last byte, in bytes (granularity applied).
    #[serde(with = "hexadecimal")]
    pub limit: u32,
    /// Access rights.
    #[serde(with = "hexadecimal")]
    pub access: u32,
}

/// Bits in [`Segment::access`].
pub mod access {
    /// Type, four bits.
    pub const TYPE: u32 = 0xf;
    /// Type bit: accessed.
    pub const ACCESSED: u32 = 1 << 0;
    /// Type bit of data: writable; of code: readable.
    pub const WRITABLE: u32 = 1 << 1;
    /// Type bit of code: readable.
    pub const READABLE: u32 = 1 << 1;
    /// Type bit of data: expand-down; of code: conforming.
    pub const EXPAND_DOWN: u32 = 1 << 2;
    /// Type bit of code: conforming.
    pub const CONFORMING: u32 = 1 << 2;
    /// Type bit: code.
    pub const CODE: u32 = 1 << 3;
    /// Descriptor type: code or data (not system).
    pub const S: u32 = 1 << 4;
    /// Descriptor privilege level, two bits.
    pub const DPL: u32 = 3 << 5;
    /// Position of [`DPL`].
    pub const DPL_SHIFT: u32 = 5;
    /// Present.
    pub const P: u32 = 1 << 7;
    /// Available to software.
    pub const AVL: u32 = 1 << 12;
    /// 64-bit code.
    pub const L: u32 = 1 << 13;
    /// Default operation size 32 bits, or big stack.
    pub const DB: u32 = 1 << 14;
    /// Granularity: the descriptor's limit counts pages.
    pub const G: u32 = 1 << 15;
    /// The register holds a null selector.
    pub const UNUSABLE: u32 = 1 << 16;
}

/// Types of system descriptors (SDM vol. 3A, table 3-2).
pub mod system {
    /// Available 16-bit TSS.
    pub const TSS16: u32 = 1;
    /// Local descriptor table.
    pub const LDT: u32 = 2;
    /// Busy 16-bit TSS.
    pub const TSS16_BUSY: u32 = 3;
    /// 16-bit call gate.
    pub const CALL_GATE16: u32 = 4;
    /// Task gate.
    pub const TASK_GATE: u32 = 5;
    /// 16-bit interrupt gate.
    pub const INTERRUPT_GATE16: u32 = 6;
    /// 16-bit trap gate.
    pub const TRAP_GATE16: u32 = 7;
    /// Available 32-bit (or 64-bit) TSS.
    pub const TSS: u32 = 9;
    /// Busy 32-bit (or 64-bit) TSS.
    pub const TSS_BUSY: u32 = 11;
    /// 32-bit (or 64-bit) call gate.
    pub const CALL_GATE: u32 = 12;
    /// 32-bit (or 64-bit) interrupt gate.
    pub const INTERRUPT_GATE: u32 = 14;
    /// 32-bit (or 64-bit) trap gate.
    pub const TRAP_GATE: u32 = 15;
}

impl Segment {
    /// The segment that real mode makes of a selector (SDM vol. 3A, 21.1.1).
    pub const fn real(selector: u16, code: bool) -> Self {
        Self {
            selector,
            base: (selector as u64) << 4,
            limit: 0xffff,
            access: access::P
                | access::S
                | access::WRITABLE
                | access::ACCESSED
                | if code { access::CODE } else { 0 },
        }
    }

    /// A null selector.
    pub const fn null(selector: u16) -> Self {
        Self {
            selector,
            base: 0,
            limit: 0,
            access: access::UNUSABLE,
        }
    }

    /// A flat segment of 4 GiB from address zero; `access` adds to present, S, accessed and G.
    pub const fn flat(selector: u16, access: u32) -> Self {
        Self {
            selector,
            base: 0,
            limit: 0xffff_ffff,
            access: access::P | access::S | access::ACCESSED | access::G | access,
        }
    }

    /// Whether `bits` of [`access`] are all set.
    #[inline(always)]
    pub const fn has(&self, bits: u32) -> bool {
        self.access & bits == bits
    }

    /// Descriptor privilege level.
    #[inline(always)]
    pub const fn dpl(&self) -> u8 {
        ((self.access & access::DPL) >> access::DPL_SHIFT) as u8
    }

    /// Whether the register can be used for memory accesses.
    #[inline(always)]
    pub const fn is_usable(&self) -> bool {
        self.access & access::UNUSABLE == 0
    }
}

/// An eight-byte descriptor as it lies in a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor(pub u64);

impl Descriptor {
    /// Base address, 32 bits.
    pub const fn base(self) -> u32 {
        ((self.0 >> 16) & 0xff_ffff) as u32 | ((self.0 >> 56) << 24) as u32
    }

    /// Limit in bytes, granularity applied.
    pub const fn limit(self) -> u32 {
        let limit = (self.0 & 0xffff) as u32 | ((self.0 >> 32) & 0xf_0000) as u32;
        if self.access() & access::G != 0 {
            limit << 12 | 0xfff
        } else {
            limit
        }
    }

    /// Access rights in the format of [`Segment::access`].
    pub const fn access(self) -> u32 {
        ((self.0 >> 40) & 0xf0ff) as u32
    }

    /// Type of a system descriptor, or type bits of a code or data segment.
    pub const fn kind(self) -> u32 {
        self.access() & access::TYPE
    }

    /// Descriptor privilege level.
    pub const fn dpl(self) -> u8 {
        ((self.access() & access::DPL) >> access::DPL_SHIFT) as u8
    }

    /// Whether `bits` of [`access`] are all set.
    pub const fn has(self, bits: u32) -> bool {
        self.access() & bits == bits
    }

    /// The segment register that loading this descriptor gives.
    pub const fn segment(self, selector: u16) -> Segment {
        Segment {
            selector,
            base: self.base() as u64,
            limit: self.limit(),
            access: self.access(),
        }
    }

    /// For a gate: its code selector.
    pub const fn gate_selector(self) -> u16 {
        (self.0 >> 16) as u16
    }

    /// For a gate: its offset, lower 32 bits.
    pub const fn gate_offset(self) -> u32 {
        (self.0 & 0xffff) as u32 | ((self.0 >> 32) & 0xffff_0000) as u32
    }

    /// For a 64-bit interrupt or trap gate: its interrupt stack table index.
    pub const fn gate_ist(self) -> u8 {
        ((self.0 >> 32) & 7) as u8
    }

    /// For a call gate: its parameter count.
    pub const fn gate_count(self) -> u8 {
        ((self.0 >> 32) & 0x1f) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_code_descriptor_decodes() {
        let descriptor = Descriptor(0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor.base(), 0);
        assert_eq!(descriptor.limit(), 0xffff_ffff);
        assert!(descriptor.has(access::P | access::S | access::CODE | access::DB | access::G));
        assert_eq!(descriptor.segment(8).access, 0xc09b);
    }

    #[test]
    fn scattered_fields_are_put_together() {
        let descriptor = Descriptor(0x1234_5678_9abc_def0);
        assert_eq!(descriptor.base(), 0x1278_9abc);
        assert_eq!(descriptor.gate_selector(), 0x9abc);
        assert_eq!(descriptor.gate_offset(), 0x1234_def0);
    }
}
