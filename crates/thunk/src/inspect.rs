//! What an engine that runs the guest's instruction itself, in place, must know of it.

use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind};

use crate::select;
use crate::thunk::Class;

/// An instruction that is harmless on the host: it computes on registers and at most one memory
/// operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Harmless {
    /// The form to encode it in for 64-bit mode.
    pub code: Code,
    /// Which architectural checks come before it.
    pub class: Class,
    /// Required alignment of the memory operand's linear address in bytes; 1 is none.
    pub alignment: usize,
    /// A host atomic on the memory operand: LOCK prefix, or XCHG.
    pub locked: bool,
    /// BT, BTS, BTR, BTC of memory with a register bit offset, which also moves the address.
    pub bit_offset: bool,
    /// Masked loads and stores: elements that the mask leaves out must not fault.
    pub masked: bool,
    /// Can raise SIMD floating-point exceptions, so depends on MXCSR.
    pub simd_float: bool,
}

/// Says what must be known of `instruction` to run it in place on the host; `None` if it may not be.
pub fn inspect(instruction: &Instruction) -> Option<Harmless> {
    let code = select::select(instruction).ok()?;
    let mnemonic = code.mnemonic();
    let vex = code.encoding() == EncodingKind::VEX;
    let registers =
        (0..instruction.op_count()).filter(|&index| instruction.op_kind(index) == OpKind::Register);
    let (mut mmx, mut vector) = (false, false);
    for index in registers {
        let register = instruction.op_register(index);
        mmx |= register.is_mm();
        vector |= register.is_vector_register();
    }
    vector |= matches!(mnemonic, Mnemonic::Vzeroupper | Mnemonic::Vzeroall);
    // CVTTSS2SI of memory names no vector register.
    vector |= select::is_simd_float(mnemonic);
    let memory =
        (0..instruction.op_count()).any(|index| instruction.op_kind(index) == OpKind::Memory);
    let size = if memory {
        instruction.memory_size().size()
    } else {
        0
    };
    let aligned = match mnemonic {
        Mnemonic::Cmpxchg16b => true,
        _ if vex => select::is_aligned_vex(mnemonic),
        _ if select::is_x87(mnemonic) => false,
        _ => size == 16 && !select::is_unaligned_sse(mnemonic),
    };
    Some(Harmless {
        code,
        class: match () {
            () if select::is_x87(mnemonic) => Class::X87,
            // CVTPI2PS enters MMX mode even with a memory operand.
            () if mmx || matches!(mnemonic, Mnemonic::Emms | Mnemonic::Cvtpi2ps) => Class::Mmx,
            () if vex && vector => Class::Avx,
            () if vex => Class::VexInteger,
            () if vector => Class::Sse,
            () => Class::Integer,
        },
        alignment: if aligned && memory { size } else { 1 },
        locked: instruction.has_lock_prefix() || (memory && mnemonic == Mnemonic::Xchg),
        bit_offset: memory
            && select::is_bit_test(mnemonic)
            && instruction.op1_kind() == OpKind::Register,
        masked: select::masked_element_size(mnemonic).is_some(),
        simd_float: select::is_simd_float(mnemonic),
    })
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn of(bytes: &[u8]) -> Option<Harmless> {
        inspect(&Decoder::new(64, bytes, DecoderOptions::NONE).decode())
    }

    #[test]
    fn privileged_and_transferring_instructions_are_not_harmless() {
        for bytes in [
            &[0xf4][..],
            &[0x0f, 0x05],
            &[0xc3],
            &[0xfa],
            &[0x50],
            &[0xa4],
        ] {
            assert_eq!(of(bytes), None, "{bytes:x?}");
        }
    }

    #[test]
    fn legacy_sse_operands_must_be_aligned_and_unaligned_moves_need_not() {
        // paddd xmm0, [rax]; movdqu xmm0, [rax]; vpaddd xmm0, xmm0, [rax]
        assert_eq!(of(&[0x66, 0x0f, 0xfe, 0x00]).unwrap().alignment, 16);
        assert_eq!(of(&[0xf3, 0x0f, 0x6f, 0x00]).unwrap().alignment, 1);
        let vex = of(&[0xc5, 0xf9, 0xfe, 0x00]).unwrap();
        assert_eq!((vex.alignment, vex.class), (1, Class::Avx));
    }

    #[test]
    fn conversions_of_memory_to_integers_are_sse_without_naming_its_registers() {
        // cvttss2si r8d, [rbp]; cvtsd2si rax, [rax]; vcvttss2si eax, [rax]
        for (bytes, class) in [
            (&[0xf3, 0x44, 0x0f, 0x2c, 0x45, 0x00][..], Class::Sse),
            (&[0xf2, 0x48, 0x0f, 0x2d, 0x00], Class::Sse),
            (&[0xc5, 0xfa, 0x2c, 0x00], Class::Avx),
        ] {
            let found = of(bytes).unwrap();
            assert_eq!((found.class, found.simd_float), (class, true), "{bytes:x?}");
        }
    }

    #[test]
    fn conversion_of_mmx_operands_enters_mmx_mode_wherever_they_lie() {
        // cvtpi2ps xmm0, mm0; cvtpi2ps xmm0, [rax]; cvtpi2pd xmm0, [rax]
        assert_eq!(of(&[0x0f, 0x2a, 0xc0]).unwrap().class, Class::Mmx);
        assert_eq!(of(&[0x0f, 0x2a, 0x00]).unwrap().class, Class::Mmx);
        assert_eq!(of(&[0x66, 0x0f, 0x2a, 0x00]).unwrap().class, Class::Sse);
    }

    #[test]
    fn exchange_with_memory_is_locked_without_a_prefix() {
        assert!(of(&[0x48, 0x87, 0x03]).unwrap().locked);
        assert!(!of(&[0x48, 0x87, 0xc3]).unwrap().locked);
    }
}
