//! Operand widths.

use trapgate_memory::HostAddress;

/// An unsigned integer of the width of an operand.
pub trait Width: Copy + Eq + Send + Sync + 'static {
    /// Bits.
    const BITS: u32;
    /// Bytes.
    const BYTES: u64 = Self::BITS as u64 / 8;
    /// The low bits of `value`.
    fn from_u64(value: u64) -> Self;
    /// Zero-extended.
    fn to_u64(self) -> u64;
    /// Sign-extended.
    fn sign_extend(self) -> u64;
    /// Loads from guest memory in one host instruction.
    fn load(address: HostAddress) -> Self;
    /// Stores to guest memory in one host instruction.
    fn store(self, address: HostAddress);
    /// What a general register holds after this value was written to its low part.
    fn merge(self, old: u64) -> u64;
}

macro_rules! width {
    ($type:ty, $signed:ty, $load:ident, $store:ident, $merge:expr) => {
        impl Width for $type {
            const BITS: u32 = <$type>::BITS;
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as Self
            }
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn sign_extend(self) -> u64 {
                self as $signed as i64 as u64
            }
            #[inline(always)]
            fn load(address: HostAddress) -> Self {
                address.$load()
            }
            #[inline(always)]
            fn store(self, address: HostAddress) {
                address.$store(self);
            }
            #[inline(always)]
            fn merge(self, old: u64) -> u64 {
                let merge: fn(u64, u64) -> u64 = $merge;
                merge(old, self as u64)
            }
        }
    };
}

width!(u8, i8, load_u8, store_u8, |old, new| old & !0xff | new);
width!(u16, i16, load_u16, store_u16, |old, new| old & !0xffff
    | new);
width!(u32, i32, load_u32, store_u32, |_, new| new);
width!(u64, i64, load_u64, store_u64, |_, new| new);
