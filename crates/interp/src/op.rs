//! A decoded instruction, as the run loop executes it.

use crate::cpu::{Cpu, Step};

/// Executes one instruction. RIP is that of the next instruction already. A handler that returns
/// [`crate::cpu::Stop::Fault`] has changed nothing that re-execution would notice.
pub type Handler = fn(&mut Cpu, &Op) -> Step;

/// How [`Op`] forms its memory operand's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AddressForm {
    /// No memory operand.
    None,
    /// `base + displacement`; 64-bit addresses in a flat segment.
    Base,
    /// `base + index << scale + displacement`; 64-bit addresses in a flat segment.
    BaseIndex,
    /// `RIP + displacement`; 64-bit addresses in a flat segment.
    Rip,
    /// Anything else: any segment, address size, missing registers.
    General,
}

/// An index in [`Op::base`] and [`Op::index`] for "no register".
pub const NO_REGISTER: u8 = 0xff;
/// An index in [`Op::base`] for RIP.
pub const RIP_REGISTER: u8 = 0xfe;

/// Prefixes and sizes of an [`Op`], packed in [`Op::attributes`].
pub mod attribute {
    /// REP or REPE.
    pub const REP: u8 = 1 << 0;
    /// REPNE.
    pub const REPNE: u8 = 1 << 1;
    /// LOCK.
    pub const LOCK: u8 = 1 << 2;
    /// Position of log2 of the address size in bytes, two bits.
    pub const ADDRESS_SHIFT: u32 = 4;
    /// Position of log2 of the operand size in bytes, two bits.
    pub const OPERAND_SHIFT: u32 = 6;
}

/// A decoded instruction.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Op {
    /// Executes it.
    pub handler: Handler,
    /// First operand's register: a number, or for 8-bit registers see [`Cpu::reg`].
    pub dst: u8,
    /// Second operand's register; for memory forms the one that is not memory.
    pub src: u8,
    /// Base register of the memory operand, or [`NO_REGISTER`], or [`RIP_REGISTER`].
    pub base: u8,
    /// Index register, with log2 of its scale in bits 4 and 5; or [`NO_REGISTER`].
    pub index: u8,
    /// How many ops from here on touch nothing but registers and can't fault; set on the first of
    /// them, whose `extra` is their length in bytes.
    pub quiet: u8,
    /// Segment register of the memory operand.
    pub segment: u8,
    /// Bytes of the instruction.
    pub length: u8,
    /// How the address is formed.
    pub form: AddressForm,
    /// Displacement, to be sign-extended; relative to the next instruction for RIP forms.
    pub displacement: i32,
    /// Prefixes and sizes: see [`attribute`].
    pub attributes: u8,
    /// Condition code, or what else the handler needs in a byte.
    pub code: u8,
    /// What else the handler needs, such as the thunk's number.
    pub extra: u16,
    /// Immediate, sign-extended to 64 bits; or absolute address, or relative branch target.
    pub immediate: u64,
}

impl Op {
    /// Operand size in bytes.
    #[inline(always)]
    pub fn operand_size(&self) -> u64 {
        1 << (self.attributes >> attribute::OPERAND_SHIFT & 3)
    }

    /// Sets the operand size in bytes: 1, 2, 4 or 8.
    pub fn set_operand_size(&mut self, bytes: u64) {
        self.attributes &= !(3 << attribute::OPERAND_SHIFT);
        self.attributes |= (bytes.trailing_zeros() as u8 & 3) << attribute::OPERAND_SHIFT;
    }

    /// Sets the address size in bytes: 2, 4 or 8.
    pub fn set_address_size(&mut self, bytes: u64) {
        self.attributes &= !(3 << attribute::ADDRESS_SHIFT);
        self.attributes |= (bytes.trailing_zeros() as u8 & 3) << attribute::ADDRESS_SHIFT;
    }

    /// Address size in bytes.
    #[inline(always)]
    pub fn address_size(&self) -> u64 {
        1 << (self.attributes >> attribute::ADDRESS_SHIFT & 3)
    }

    /// Whether the instruction has a memory operand.
    #[inline(always)]
    pub fn has_memory(&self) -> bool {
        self.form != AddressForm::None
    }

    /// Whether a prefix or size attribute is set.
    #[inline(always)]
    pub fn has(&self, attribute: u8) -> bool {
        self.attributes & attribute != 0
    }
}
