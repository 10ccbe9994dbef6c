//! Decimal arithmetic and other instructions of the 8086 that 64-bit code lacks, and XLAT
//! (SDM vol. 2, AAA, AAD, AAM, AAS, DAA, DAS, XLAT).
//!
//! Flags that the manual leaves undefined are those of the result, with CF and OF clear.

use iced_x86::{Instruction, Mnemonic};
use trapgate_x86::registers::{gpr, rflags};
use trapgate_x86::{Exception, Vector};

use crate::cpu::{Cpu, Step};
use crate::op::{AddressForm, Handler, Op};

const AL: u8 = 0;
const AX: u8 = gpr::RAX as u8;

/// The handler of an instruction that this module owns.
pub(crate) fn lower(instruction: &Instruction, _op: &mut Op) -> Option<Handler> {
    let handler: Handler = match instruction.mnemonic() {
        Mnemonic::Aaa => op_ascii_adjust::<false>,
        Mnemonic::Aas => op_ascii_adjust::<true>,
        Mnemonic::Aam => op_aam,
        Mnemonic::Aad => op_aad,
        Mnemonic::Daa => op_decimal_adjust::<false>,
        Mnemonic::Das => op_decimal_adjust::<true>,
        Mnemonic::Salc => op_salc,
        Mnemonic::Xlatb => op_xlat,
        _ => return None,
    };
    Some(handler)
}

impl Cpu {
    /// SF, ZF and PF of AL, with CF and AF given.
    fn set_decimal_flags(&mut self, al: u8, carry: bool, auxiliary: bool) {
        self.flags.set_result(al, carry, false);
        if auxiliary {
            let flags = self.flags.get();
            self.flags.put(flags | rflags::AF);
        }
    }
}

/// AAA and AAS: after adding or subtracting unpacked digits in AL.
fn op_ascii_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _op: &Op) -> Step {
    let ax: u16 = cpu.reg(AX);
    let adjust = ax & 0xf > 9 || cpu.flags.auxiliary();
    let adjusted = match (adjust, SUBTRACT) {
        (false, _) => ax,
        (true, false) => ax.wrapping_add(0x106),
        // AL first, whose borrow goes into AH.
        (true, true) => ax.wrapping_sub(0x106),
    };
    let result = adjusted & 0xff0f;
    cpu.set_reg(AX, result);
    cpu.set_decimal_flags(result as u8, adjust, adjust);
    Ok(())
}

/// DAA and DAS: after adding or subtracting packed digits in AL.
fn op_decimal_adjust<const SUBTRACT: bool>(cpu: &mut Cpu, _op: &Op) -> Step {
    let old: u8 = cpu.reg(AL);
    let old_carry = cpu.flags.carry();
    let low = old & 0xf > 9 || cpu.flags.auxiliary();
    let high = old > 0x99 || old_carry;
    let adjustment = if low { 6 } else { 0 } + if high { 0x60 } else { 0 };
    let (result, step_carry) = if SUBTRACT {
        (old.wrapping_sub(adjustment), low && old < 6)
    } else {
        (old.wrapping_add(adjustment), false)
    };
    cpu.set_reg(AL, result);
    cpu.set_decimal_flags(result, high || step_carry, low);
    Ok(())
}

/// AAM: AL into two digits of a base.
fn op_aam(cpu: &mut Cpu, op: &Op) -> Step {
    let base = op.immediate as u8;
    if base == 0 {
        return Err(cpu.raise(Exception::plain(Vector::DE)));
    }
    let al: u8 = cpu.reg(AL);
    let digit = al % base;
    cpu.set_reg(AX, u16::from(al / base) << 8 | u16::from(digit));
    cpu.set_decimal_flags(digit, false, false);
    Ok(())
}

/// AAD: two digits of a base into AL.
fn op_aad(cpu: &mut Cpu, op: &Op) -> Step {
    let ax: u16 = cpu.reg(AX);
    let [al, ah] = ax.to_le_bytes();
    let result = ah.wrapping_mul(op.immediate as u8).wrapping_add(al);
    cpu.set_reg(AX, u16::from(result));
    cpu.set_decimal_flags(result, false, false);
    Ok(())
}

/// SALC: AL becomes all ones if CF, else zero.
fn op_salc(cpu: &mut Cpu, _op: &Op) -> Step {
    let value: u8 = if cpu.flags.carry() { 0xff } else { 0 };
    cpu.set_reg(AL, value);
    Ok(())
}

/// XLAT: AL becomes the byte at `[rBX + AL]`.
fn op_xlat(cpu: &mut Cpu, op: &Op) -> Step {
    let al: u8 = cpu.reg(AL);
    let offset = cpu.regs.gpr[gpr::RBX].wrapping_add(u64::from(al)) & Cpu::address_mask(op);
    let linear = match op.form {
        AddressForm::General => cpu.segment_address(usize::from(op.segment), offset, 1, false)?,
        _ => offset,
    };
    let value: u8 = cpu.read(linear, op.segment)?;
    cpu.set_reg(AL, value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{execute, fault, protected_cpu};

    const AAA: u8 = 0x37;
    const AAS: u8 = 0x3f;
    const DAA: u8 = 0x27;
    const DAS: u8 = 0x2f;
    /// ADD AL, BL and SUB AL, BL.
    const ADD: &[u8] = &[0x00, 0xd8];
    const SUB: &[u8] = &[0x28, 0xd8];

    fn packed(number: u64) -> u64 {
        number / 10 * 16 + number % 10
    }

    /// Runs `first` on AX = `ax` and BL = `bl`, then the one-byte instruction; gives AX and CF.
    fn adjusted(first: &[u8], ax: u64, bl: u64, adjust: u8) -> (u64, bool) {
        let (mut cpu, _) = protected_cpu();
        cpu.regs.gpr[gpr::RAX] = ax;
        cpu.regs.gpr[gpr::RBX] = bl;
        execute(&mut cpu, first).unwrap();
        execute(&mut cpu, &[adjust]).unwrap();
        (cpu.regs.gpr[gpr::RAX], cpu.flags.carry())
    }

    #[test]
    fn packed_digits_add_and_subtract_as_decimals() {
        for a in (0..100).step_by(7) {
            for b in 0..100 {
                let (sum, carry) = adjusted(ADD, packed(a), packed(b), DAA);
                assert_eq!(
                    (sum, carry),
                    (packed((a + b) % 100), a + b > 99),
                    "{a} + {b}"
                );
                let (difference, borrow) = adjusted(SUB, packed(a), packed(b), DAS);
                let expected = packed((100 + a - b) % 100);
                assert_eq!((difference, borrow), (expected, a < b), "{a} - {b}");
            }
        }
    }

    #[test]
    fn unpacked_digits_add_and_subtract_as_decimals() {
        for a in 0..10 {
            for b in 0..10 {
                let (sum, carry) = adjusted(ADD, 0x0200 | a, b, AAA);
                let expected = (2 + (a + b) / 10) * 256 + (a + b) % 10;
                assert_eq!((sum, carry), (expected, a + b > 9), "{a} + {b}");
                let (difference, borrow) = adjusted(SUB, 0x0200 | a, b, AAS);
                let ah = if a < b { 1 } else { 2 };
                let expected = ah * 256 + (10 + a - b) % 10;
                assert_eq!((difference, borrow), (expected, a < b), "{a} - {b}");
            }
        }
    }

    #[test]
    fn adjustments_of_no_digits_follow_the_pseudo_code() {
        // Instruction, AL, CF, AF, then AL, CF, AF (SDM vol. 2A, DAA and DAS).
        let cases = [
            (DAA, 0x9a, false, false, 0x00, true, true),
            (DAA, 0xff, false, false, 0x65, true, true),
            (DAA, 0x00, true, false, 0x60, true, false),
            (DAA, 0x00, false, true, 0x06, false, true),
            (DAS, 0x00, false, true, 0xfa, true, true),
            (DAS, 0x0a, false, false, 0x04, false, true),
            (DAS, 0xff, false, false, 0x99, true, true),
        ];
        for (opcode, al, cf, af, result, carry, auxiliary) in cases {
            let (mut cpu, _) = protected_cpu();
            cpu.regs.gpr[gpr::RAX] = al;
            let bit = |set, flag| if set { flag } else { 0 };
            cpu.set_rflags(bit(cf, rflags::CF) | bit(af, rflags::AF));
            execute(&mut cpu, &[opcode]).unwrap();
            let flags = (cpu.flags.carry(), cpu.flags.auxiliary());
            let got = (cpu.regs.gpr[gpr::RAX], flags);
            assert_eq!(got, (result, (carry, auxiliary)), "{opcode:#x} {al:#x}");
            assert_eq!(cpu.flags.zero(), result == 0);
            assert_eq!(cpu.flags.sign(), result >= 0x80);
        }
    }

    #[test]
    fn aam_and_aad_split_and_join_digits_of_any_base() {
        let (mut cpu, _) = protected_cpu();
        cpu.regs.gpr[gpr::RAX] = 0xff63;
        execute(&mut cpu, &[0xd4, 10]).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RAX], 0x0909);
        execute(&mut cpu, &[0xd5, 16]).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RAX], 0x0099);
        assert_eq!(fault(&mut cpu, &[0xd4, 0]), (Vector::DE, None));
        assert_eq!(cpu.regs.gpr[gpr::RAX], 0x0099);
    }

    #[test]
    fn salc_spreads_the_carry() {
        let (mut cpu, _) = protected_cpu();
        cpu.set_rflags(rflags::CF);
        execute(&mut cpu, &[0xd6]).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RAX], 0xff);
    }

    #[test]
    fn xlat_wraps_at_the_address_size_and_heeds_the_segment() {
        let (mut cpu, _) = protected_cpu();
        cpu.memory.write(0x0102, &[0xab]).unwrap();
        cpu.memory.write(0x5102, &[0xcd]).unwrap();
        cpu.regs.gpr[gpr::RBX] = 0x1_ff05;
        cpu.regs.gpr[gpr::RAX] = 0xfd;
        // 16-bit: 0xff05 + 0xfd = 0x0002.
        cpu.memory.write(0x0002, &[0x77]).unwrap();
        execute(&mut cpu, &[0x67, 0xd7]).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RAX], 0x77);
        cpu.regs.gpr[gpr::RBX] = 0x100 - 0x75;
        execute(&mut cpu, &[0xd7]).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RAX], 0xab);
        cpu.sys.segments[trapgate_x86::registers::sreg::FS].base = 0x5000;
        cpu.regs.gpr[gpr::RBX] = 0x102 - 0xab;
        execute(&mut cpu, &[0x64, 0xd7]).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RAX], 0xcd);
    }

    #[test]
    fn xlat_works_in_64bit_mode() {
        let (mut cpu, _) = crate::testing::long_cpu();
        cpu.memory.write(0x8010, &[0x42]).unwrap();
        cpu.regs.gpr[gpr::RBX] = 0x8000;
        cpu.regs.gpr[gpr::RAX] = 0x10;
        execute(&mut cpu, &[0xd7]).unwrap();
        assert_eq!(cpu.regs.gpr[gpr::RAX], 0x42);
    }
}
