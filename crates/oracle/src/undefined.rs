//! What the manual leaves undefined, and so is not compared. Everything else is.
//!
//! Source: Intel SDM vol. 2, "Flags Affected" and "Operation" of each instruction.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use trapgate_x86::registers::gpr;
use trapgate_x86::registers::rflags::{AF, CF, OF, PF, SF, ZF};

const ALL: u64 = CF | PF | AF | ZF | SF | OF;

/// When flags are undefined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Always.
    Always,
    /// The masked count is not 0 (with 0 no flag changes).
    Count,
    /// The masked count is neither 0 nor 1.
    CountAbove1,
    /// The masked count is at least the operand's size in bits.
    CountReachesSize,
    /// The masked count is larger than the operand's size in bits: the result is undefined too.
    CountAboveSize,
}

/// A row of the table: instructions, flags, and when they are undefined.
pub struct Row {
    /// Which instructions.
    pub mnemonics: &'static [Mnemonic],
    /// Which flags.
    pub flags: u64,
    /// When.
    pub when: When,
    /// Where the manual says so: SDM vol. 2, under this heading.
    pub source: &'static str,
}

const fn row(mnemonics: &'static [Mnemonic], flags: u64, when: When, source: &'static str) -> Row {
    Row {
        mnemonics,
        flags,
        when,
        source,
    }
}

use Mnemonic as M;

/// Flags that the manual leaves undefined.
pub const TABLE: [Row; 23] = [
    row(&[M::And], AF, When::Always, "AND"),
    row(&[M::Or], AF, When::Always, "OR"),
    row(&[M::Xor], AF, When::Always, "XOR"),
    row(&[M::Test], AF, When::Always, "TEST"),
    row(&[M::Andn], AF | PF, When::Always, "ANDN"),
    row(
        &[M::Blsi, M::Blsmsk, M::Blsr],
        AF | PF,
        When::Always,
        "BLSI, BLSMSK, BLSR",
    ),
    row(&[M::Bextr], AF | SF | PF, When::Always, "BEXTR"),
    row(&[M::Bzhi], AF | PF, When::Always, "BZHI"),
    row(
        &[M::Mul, M::Imul],
        SF | ZF | AF | PF,
        When::Always,
        "MUL, IMUL",
    ),
    row(&[M::Div, M::Idiv], ALL, When::Always, "DIV, IDIV"),
    row(
        &[M::Shl, M::Sal, M::Shr, M::Sar],
        AF,
        When::Count,
        "SAL/SAR/SHL/SHR",
    ),
    row(
        &[M::Shl, M::Sal, M::Shr, M::Sar],
        OF,
        When::CountAbove1,
        "SAL/SAR/SHL/SHR",
    ),
    row(
        &[M::Shl, M::Sal, M::Shr],
        CF,
        When::CountReachesSize,
        "SAL/SAR/SHL/SHR",
    ),
    row(
        &[M::Rol, M::Ror, M::Rcl, M::Rcr],
        OF,
        When::CountAbove1,
        "RCL/RCR/ROL/ROR",
    ),
    row(&[M::Shld, M::Shrd], AF, When::Count, "SHLD, SHRD"),
    row(&[M::Shld, M::Shrd], OF, When::CountAbove1, "SHLD, SHRD"),
    row(&[M::Shld, M::Shrd], ALL, When::CountAboveSize, "SHLD, SHRD"),
    row(
        &[M::Bsf, M::Bsr],
        CF | OF | SF | AF | PF,
        When::Always,
        "BSF, BSR",
    ),
    row(
        &[M::Bt, M::Bts, M::Btr, M::Btc],
        OF | SF | AF | PF,
        When::Always,
        "BT, BTS, BTR, BTC",
    ),
    row(
        &[M::Lzcnt, M::Tzcnt],
        OF | SF | PF | AF,
        When::Always,
        "LZCNT, TZCNT",
    ),
    row(
        &[M::Aaa, M::Aas],
        OF | SF | ZF | PF,
        When::Always,
        "AAA, AAS",
    ),
    row(&[M::Aad, M::Aam], OF | AF | CF, When::Always, "AAD, AAM"),
    row(&[M::Daa, M::Das], OF, When::Always, "DAA, DAS"),
];

/// The operand's size in bits, and the count of a shift after masking.
fn shift(instruction: &Instruction, gpr: &[u64; 16]) -> (u64, u64) {
    let size = match instruction.op_kind(0) {
        OpKind::Register => instruction.op_register(0).size(),
        _ => instruction.memory_size().size(),
    } as u64
        * 8;
    let last = instruction.op_count().saturating_sub(1);
    let count = match instruction.op_kind(last) {
        OpKind::Immediate8 => u64::from(instruction.immediate8()),
        OpKind::Register if instruction.op_register(last) == Register::CL => gpr[1],
        _ => 1,
    };
    (size, count & if size == 64 { 63 } else { 31 })
}

/// Flags that are undefined after an instruction on these registers.
pub fn flags(instruction: &Instruction, gpr: &[u64; 16]) -> u64 {
    let mnemonic = instruction.mnemonic();
    let (size, count) = shift(instruction, gpr);
    TABLE
        .iter()
        .filter(|row| row.mnemonics.contains(&mnemonic))
        .filter(|row| match row.when {
            When::Always => true,
            When::Count => count != 0,
            When::CountAbove1 => count > 1,
            When::CountReachesSize => count >= size,
            When::CountAboveSize => count > size,
        })
        .map(|row| row.flags)
        .fold(0, |all, flags| all | flags)
}

/// Whether the destination is undefined: SHLD and SHRD by more bits than there are.
pub fn result(instruction: &Instruction, gpr: &[u64; 16]) -> bool {
    let (size, count) = shift(instruction, gpr);
    matches!(instruction.mnemonic(), M::Shld | M::Shrd) && count > size
}

/// Whether an instruction accesses memory in several parts whose order the manual does not say, so that the first to
/// fault is the CPU's choice: the address, and where the parts lie on several pages the error code.
pub fn order(instruction: &Instruction) -> bool {
    use iced_x86::Code;
    matches!(instruction.code(), Code::Fld_m80fp | Code::Fstp_m80fp)
        || instruction.is_call_far_indirect()
        || instruction.is_call_far()
        || matches!(
            instruction.mnemonic(),
            M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xsave
            | M::Xsave64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xrstor
            | M::Xrstor64
            | M::Fnsave
            | M::Frstor
            | M::Fnstenv
            | M::Fldenv
            | M::Retf
            | M::Iret
            | M::Iretd
            | M::Iretq
            // Ten bytes are eight and two.
            | M::Fbld
            | M::Fbstp
            // Of several elements.
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
        )
}

/// Bits of general registers in which an instruction gives what only this processor knows.
pub fn processor_results(instruction: &Instruction) -> [u64; 16] {
    let mut registers = [0; 16];
    let named: &[usize] = match instruction.mnemonic() {
        M::Rdtsc | M::Xgetbv => &[gpr::RAX, gpr::RDX],
        M::Rdtscp => &[gpr::RAX, gpr::RDX, gpr::RCX],
        M::Cpuid => &[gpr::RAX, gpr::RBX, gpr::RCX, gpr::RDX],
        M::Rdpid => {
            let register = instruction.op_register(0).full_register();
            registers[register.number() & 15] = u64::from(u32::MAX);
            return registers;
        }
        _ => &[],
    };
    for &register in named {
        // Upper halves are 0.
        registers[register] = u64::from(u32::MAX);
    }
    registers
}

/// What a fault leaves behind that the manual does not promise either way, and no program can rely on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Residue {
    /// A store of ten bytes has written eight, or a far CALL one word of two (SDM vol. 3A, 7.5: a program that goes on
    /// after a fault does the instruction again).
    pub memory: Left,
    /// An MMX store has made TOP 0 before it faults, which it does anyway when it is done again (SDM vol. 3A, "The MMX State
    /// and MMX Register Aliasing").
    pub top: bool,
    /// VCVTPS2PH has noted masked exceptions in MXCSR before its store faults (SDM vol. 2, "VCVTPS2PH"); and dot products
    /// those of their first stages before an unmasked one of a later stage (SDM vol. 2, "DPPS").
    pub noted: bool,
    /// Beside an unmasked overflow or underflow, whether the result would be exact: the host CPU rounds it as if the
    /// exponent had no limit, which only it can (SDM vol. 1, 4.9.1.4 to 4.9.1.6).
    pub precision: bool,
}

/// Memory that an instruction may have written before it faulted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Left {
    /// None.
    #[default]
    Nothing,
    /// Some of its operand.
    Operand,
    /// Some of what it pushes.
    Stack,
}

/// What of an outcome with a fault is not compared; `mxcsr` is before it and after it.
pub fn residue(instruction: &Instruction, mxcsr: [u32; 2], fault: u64) -> Residue {
    use iced_x86::Code;
    Residue {
        memory: match instruction.code() {
            Code::Fstp_m80fp | Code::Fbstp_m80bcd => Left::Operand,
            _ if instruction.is_call_far() || instruction.is_call_far_indirect() => Left::Stack,
            _ => Left::Nothing,
        },
        top: crate::profile::memory_operand(instruction) == Some(0)
            && instruction.op_register(1).is_mm(),
        noted: match instruction.mnemonic() {
            M::Vcvtps2ph => fault != 19,
            M::Dpps | M::Dppd | M::Vdpps | M::Vdppd => fault == 19,
            _ => false,
        },
        // OE and OM, UE and UM.
        precision: fault == 19 && mxcsr[1] & 0x18 & !(mxcsr[0] >> 7) != 0,
    }
}
