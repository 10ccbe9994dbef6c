//! Page tables and page faults (SDM vol. 3A, chapter 5).

/// Bits of a paging-structure entry.
pub mod pte {
    /// Present.
    pub const P: u64 = 1 << 0;
    /// Writable.
    pub const W: u64 = 1 << 1;
    /// User.
    pub const U: u64 = 1 << 2;
    /// Accessed.
    pub const A: u64 = 1 << 5;
    /// Dirty.
    pub const D: u64 = 1 << 6;
    /// Page size: the entry maps a large page.
    pub const PS: u64 = 1 << 7;
    /// Global.
    pub const G: u64 = 1 << 8;
    /// No execute.
    pub const NX: u64 = 1 << 63;
}

/// Bits of a page fault's error code (SDM vol. 3A, figure 5-12).
pub mod fault {
    /// The page was present: a protection violation.
    pub const P: u32 = 1 << 0;
    /// A write.
    pub const W: u32 = 1 << 1;
    /// A user-mode access.
    pub const U: u32 = 1 << 2;
    /// A reserved bit was set in an entry.
    pub const RSVD: u32 = 1 << 3;
    /// An instruction fetch.
    pub const I: u32 = 1 << 4;
}

/// Whether a linear address is canonical with 48 bits (SDM vol. 1, 3.3.7.1).
#[inline(always)]
pub const fn is_canonical(address: u64) -> bool {
    ((address as i64) << 16) >> 16 == address as i64
}
