//! The arithmetic flags, kept as the values they derive from: most are overwritten unread.

use trapgate_x86::registers::rflags;

use crate::width::Width;

/// CF, PF, AF, ZF, SF and OF, not yet worked out.
#[derive(Clone, Copy, Debug, Default)]
pub struct LazyFlags {
    /// ZF is whether this is zero.
    zero: u64,
    /// SF is its top bit; PF is the parity of its low byte.
    sign_parity: u64,
    /// CF is bit 63, OF is bit 63 ≠ bit 62, AF is bit 3: the carries out of the operation's bits,
    /// with the two highest moved to the top.
    carries: u64,
}

const CARRY: u64 = 1 << 63;
const BELOW_CARRY: u64 = 1 << 62;
const HALF_CARRY: u64 = 1 << 3;

impl LazyFlags {
    /// Flags of a result of width `T` with `carries` out of each bit.
    #[inline(always)]
    fn set<T: Width>(&mut self, result: T, carries: u64) {
        let result = result.sign_extend();
        self.zero = result;
        self.sign_parity = result;
        // At 64 bits the shift is zero and the low bits are in place already.
        self.carries = carries << (64 - T::BITS) | (carries & HALF_CARRY);
    }

    /// After `result = a + b + carry in`.
    #[inline(always)]
    pub fn add<T: Width>(&mut self, a: T, b: T, result: T) {
        let (a, b, r) = (a.to_u64(), b.to_u64(), result.to_u64());
        self.set(result, (a & b) | ((a | b) & !r));
    }

    /// After `result = a - b - borrow in`.
    #[inline(always)]
    pub fn sub<T: Width>(&mut self, a: T, b: T, result: T) {
        let (a, b, r) = (a.to_u64(), b.to_u64(), result.to_u64());
        self.set(result, (!a & b) | ((!a | b) & r));
    }

    /// After AND, OR, XOR, TEST: CF, OF and AF are zero.
    #[inline(always)]
    pub fn logic<T: Width>(&mut self, result: T) {
        self.set(result, 0);
    }

    /// After INC or DEC: as `add` or `sub` of one, but CF stays.
    #[inline(always)]
    pub fn keep_carry(&mut self, carry: bool) {
        let overflow = (self.carries ^ (self.carries << 1)) & CARRY;
        let carry = u64::from(carry) << 63;
        self.carries = (self.carries & HALF_CARRY) | carry | ((carry ^ overflow) >> 1);
    }

    /// SF, ZF and PF of a result, with CF and OF given and AF zero.
    #[inline(always)]
    pub fn set_result<T: Width>(&mut self, result: T, carry: bool, overflow: bool) {
        self.set(result, 0);
        self.set_carry_overflow(carry, overflow);
    }

    /// Replaces CF and OF; AF, SF, ZF and PF stay.
    #[inline(always)]
    pub fn set_carry_overflow(&mut self, carry: bool, overflow: bool) {
        let top = u64::from(carry) << 63 | u64::from(carry ^ overflow) << 62;
        self.carries = (self.carries & !(CARRY | BELOW_CARRY)) | top;
    }

    /// Replaces CF; the others stay.
    #[inline(always)]
    pub fn set_carry(&mut self, carry: bool) {
        let overflow = self.overflow();
        self.set_carry_overflow(carry, overflow);
    }

    /// Carry.
    #[inline(always)]
    pub fn carry(&self) -> bool {
        (self.carries as i64) < 0
    }

    /// Overflow.
    #[inline(always)]
    pub fn overflow(&self) -> bool {
        ((self.carries ^ (self.carries << 1)) as i64) < 0
    }

    /// Zero.
    #[inline(always)]
    pub fn zero(&self) -> bool {
        self.zero == 0
    }

    /// Sign.
    #[inline(always)]
    pub fn sign(&self) -> bool {
        (self.sign_parity as i64) < 0
    }

    /// Parity.
    #[inline(always)]
    pub fn parity(&self) -> bool {
        (self.sign_parity as u8).count_ones() & 1 == 0
    }

    /// Auxiliary carry.
    #[inline(always)]
    pub fn auxiliary(&self) -> bool {
        self.carries & HALF_CARRY != 0
    }

    /// The flags at their places in RFLAGS.
    pub fn get(&self) -> u64 {
        let bit = |set: bool, flag: u64| if set { flag } else { 0 };
        bit(self.carry(), rflags::CF)
            | bit(self.parity(), rflags::PF)
            | bit(self.auxiliary(), rflags::AF)
            | bit(self.zero(), rflags::ZF)
            | bit(self.sign(), rflags::SF)
            | bit(self.overflow(), rflags::OF)
    }

    /// Replaces all six by those in `value`, an RFLAGS image.
    pub fn put(&mut self, value: u64) {
        self.zero = u64::from(value & rflags::ZF == 0);
        // A low byte of 1 has odd parity, of 0 even.
        self.sign_parity = (value & rflags::SF) << 56 | u64::from(value & rflags::PF == 0);
        self.carries = if value & rflags::AF != 0 {
            HALF_CARRY
        } else {
            0
        };
        self.set_carry_overflow(value & rflags::CF != 0, value & rflags::OF != 0);
    }

    /// Whether a condition of Jcc, SETcc or CMOVcc holds; `code` is the low four bits of its
    /// opcode (SDM vol. 1, appendix B).
    #[inline(always)]
    pub fn condition(&self, code: u8) -> bool {
        let holds = match code >> 1 & 7 {
            0 => self.overflow(),
            1 => self.carry(),
            2 => self.zero(),
            3 => self.carry() || self.zero(),
            4 => self.sign(),
            5 => self.parity(),
            6 => self.sign() != self.overflow(),
            _ => self.zero() || self.sign() != self.overflow(),
        };
        holds != (code & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The host's flags after an 8-bit ADD or SUB are ours, for every pair of operands.
    #[test]
    #[allow(unsafe_code)]
    fn add_and_sub_flags_are_the_host_cpus() {
        use std::arch::asm;
        let mut lazy = LazyFlags::default();
        for a in 0..=255u8 {
            for b in 0..=255u8 {
                let (mut sum, mut difference) = (a, a);
                let (sum_flags, difference_flags): (u64, u64);
                // SAFETY: the block only pushes and pops below the stack pointer it declared.
                unsafe {
                    asm!("add {r}, {b}", "pushfq", "pop {f}", r = inout(reg_byte) sum,
                         b = in(reg_byte) b, f = out(reg) sum_flags);
                    asm!("sub {r}, {b}", "pushfq", "pop {f}", r = inout(reg_byte) difference,
                         b = in(reg_byte) b, f = out(reg) difference_flags);
                }
                lazy.add(a, b, sum);
                assert_eq!(lazy.get(), sum_flags & rflags::ARITHMETIC, "{a} + {b}");
                lazy.sub(a, b, difference);
                assert_eq!(
                    lazy.get(),
                    difference_flags & rflags::ARITHMETIC,
                    "{a} - {b}"
                );
            }
        }
    }

    #[test]
    fn every_combination_is_put_and_got_back() {
        let bits = [
            rflags::CF,
            rflags::PF,
            rflags::AF,
            rflags::ZF,
            rflags::SF,
            rflags::OF,
        ];
        for set in 0..64u32 {
            let value: u64 = (0..6).filter(|i| set >> i & 1 != 0).map(|i| bits[i]).sum();
            let mut lazy = LazyFlags::default();
            lazy.put(value);
            assert_eq!(lazy.get(), value);
            for carry in [false, true] {
                let mut kept = lazy;
                kept.keep_carry(carry);
                let expected = value & !rflags::CF | u64::from(carry);
                assert_eq!(kept.get(), expected);
            }
        }
    }
}
