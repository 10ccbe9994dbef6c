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
