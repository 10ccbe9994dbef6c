//! Loads and stores of guest memory at host addresses.
//!
//! The guest's other processors, and devices, may touch the same bytes at any time, so ordinary
//! Rust loads and stores would be data races. Each access here is one host instruction, which is
//! what the guest's own access would have been: as atomic and as ordered as on the machine.
#![allow(unsafe_code)]

use std::arch::asm;

/// The address, in this process, of a byte of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct HostAddress(*mut u8);

// SAFETY: the address is only a number until one of the accessors below is used; these are single
// host instructions on memory that is shared by design.
unsafe impl Send for HostAddress {}
// SAFETY: as above.
unsafe impl Sync for HostAddress {}

macro_rules! accessors {
    ($($load:ident $store:ident $type:ty, $class:ident, $load_form:literal, $store_form:literal;)*) => {$(
        /// Loads a little-endian value, in one host instruction; any alignment.
        ///
        /// The whole value must lie in guest RAM: whoever made this address has checked it.
        #[inline(always)]
        pub fn $load(self) -> $type {
            let value: $type;
            // SAFETY: `HostAddress` values are made from mappings of guest RAM that outlive their
            // users (`GuestMemory::host`); users stay within the page they asked for.
            unsafe {
                asm!($load_form, in(reg) self.0, out = out($class) value,
                     options(nostack, readonly, preserves_flags));
            }
            value
        }

        /// Stores a little-endian value, in one host instruction; any alignment.
        ///
        /// The whole value must lie in guest RAM: whoever made this address has checked it.
        #[inline(always)]
        pub fn $store(self, value: $type) {
            // SAFETY: as for the load.
            unsafe {
                asm!($store_form, in(reg) self.0, value = in($class) value,
                     options(nostack, preserves_flags));
            }
        }
    )*};
}

impl HostAddress {
    /// An address to be used for guest memory.
    ///
    /// # Safety
    /// `pointer` lies in a mapping that outlives every use of the address, and of what
    /// [`Self::offset`] makes of it within that mapping; nothing else in the process makes Rust
    /// references to those bytes.
    pub unsafe fn new(pointer: *mut u8) -> Self {
        Self(pointer)
    }

    /// The address `bytes` further on.
    #[inline(always)]
    pub fn offset(self, bytes: u64) -> Self {
        Self(self.0.wrapping_add(bytes as usize))
    }

    /// The address of the page that holds this one; guest pages lie at host page boundaries.
    #[inline(always)]
    pub fn page_start(self) -> Self {
        Self(
            self.0
                .map_addr(|address| address & !(crate::PAGE_SIZE as usize - 1)),
        )
    }

    /// The address as a pointer.
    #[inline(always)]
    pub fn as_ptr(self) -> *mut u8 {
        self.0
    }

    accessors! {
        load_u8 store_u8 u8, reg_byte, "mov {out}, byte ptr [{}]", "mov byte ptr [{}], {value}";
        load_u16 store_u16 u16, reg, "mov {out:x}, word ptr [{}]", "mov word ptr [{}], {value:x}";
        load_u32 store_u32 u32, reg, "mov {out:e}, dword ptr [{}]", "mov dword ptr [{}], {value:e}";
        load_u64 store_u64 u64, reg, "mov {out}, qword ptr [{}]", "mov qword ptr [{}], {value}";
    }

    /// Copies `data.len()` bytes of guest memory out, ascending.
    ///
    /// All of them must lie in guest RAM: whoever made this address has checked it.
    #[inline]
    pub fn read(self, data: &mut [u8]) {
        // SAFETY: the destination is an exclusive slice; for the source see `load_u8`.
        unsafe {
            asm!("rep movsb", inout("rcx") data.len() => _, inout("rsi") self.0 => _,
                 inout("rdi") data.as_mut_ptr() => _, options(nostack, preserves_flags));
        }
    }

    /// Copies `data` into guest memory, ascending.
    ///
    /// All of it must lie in guest RAM: whoever made this address has checked it.
    #[inline]
    pub fn write(self, data: &[u8]) {
        // SAFETY: the source is a slice; for the destination see `store_u8`.
        unsafe {
            asm!("rep movsb", inout("rcx") data.len() => _, inout("rsi") data.as_ptr() => _,
                 inout("rdi") self.0 => _, options(nostack, preserves_flags));
        }
    }

    /// Atomically replaces a naturally aligned 64-bit value if it equals `current`; `Err` gives
    /// the value found.
    #[inline]
    pub fn compare_exchange_u64(self, current: u64, new: u64) -> Result<(), u64> {
        let found: u64;
        // SAFETY: as for the load.
        unsafe {
            asm!("lock cmpxchg qword ptr [{}], {new}", in(reg) self.0, new = in(reg) new,
                 inout("rax") current => found, options(nostack));
        }
        if found == current { Ok(()) } else { Err(found) }
    }

    /// Atomically replaces a naturally aligned 32-bit value if it equals `current`; `Err` gives
    /// the value found.
    #[inline]
    pub fn compare_exchange_u32(self, current: u32, new: u32) -> Result<(), u32> {
        let found: u32;
        // SAFETY: as for the load.
        unsafe {
            asm!("lock cmpxchg dword ptr [{}], {new:e}", in(reg) self.0, new = in(reg) new,
                 inout("eax") current => found, options(nostack));
        }
        if found == current { Ok(()) } else { Err(found) }
    }
}
