//! What a processor of a profile takes code for, where hosts and the other profile take it for something else.

use iced_x86::{CpuidFeature, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic};
use trapgate_x86::profile::Level;

/// Decodes code as a processor of a level does.
///
/// A processor that lacks TZCNT and LZCNT executes them as BSF and BSR, and does not look at their prefix (SDM vol. 2, TZCNT).
pub struct Reader<'a> {
    decoder: Decoder<'a>,
}

impl<'a> Reader<'a> {
    /// Of `bytes`, code of `bits` bits at `ip`.
    pub fn new(level: Level, bits: u32, bytes: &'a [u8], ip: u64) -> Self {
        let mut options = DecoderOptions::NO_WBNOINVD;
        if level == Level::V2 {
            options |= DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD;
        }
        Self {
            decoder: Decoder::with_ip(bits, bytes, ip, options),
        }
    }

    /// Whether there are bytes left.
    pub fn can_read(&self) -> bool {
        self.decoder.can_decode()
    }

    /// Bytes read.
    pub fn position(&self) -> usize {
        self.decoder.position()
    }

    /// Whether the bytes ended inside the last instruction.
    pub fn is_cut(&self) -> bool {
        self.decoder.last_error() == DecoderError::NoMoreBytes
    }

    /// Reads an instruction, which is invalid if it is none.
    pub fn read(&mut self, instruction: &mut Instruction) {
        self.decoder.decode_out(instruction);
        if matches!(instruction.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr) {
            // The host may know what they are with it.
            instruction.set_has_rep_prefix(false);
        }
    }
}

/// Whether an instruction is undefined at a level, and would be executed at the other. (AVX, FMA and F16C need no word here:
/// their state component can't be enabled.)
pub fn is_lacking(level: Level, instruction: &Instruction) -> bool {
    level == Level::V2
        && instruction.cpuid_features().iter().any(|feature| {
            matches!(
                feature,
                CpuidFeature::BMI1 | CpuidFeature::BMI2 | CpuidFeature::ADX
            )
        })
}

#[cfg(test)]
mod tests {
    use iced_x86::Code;

    use super::*;

    #[test]
    fn bit_manipulation_and_adx_are_of_level_v3() {
        // andn eax, ecx, edx; mulx; adcx; adox
        for bytes in [
            &[0xc4, 0xe2, 0x70, 0xf2, 0xc2][..],
            &[0xc4, 0xe2, 0x73, 0xf6, 0xc2],
            &[0x66, 0x0f, 0x38, 0xf6, 0xc1],
            &[0xf3, 0x0f, 0x38, 0xf6, 0xc1],
        ] {
            let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
            assert!(is_lacking(Level::V2, &instruction), "{bytes:02x?}");
            assert!(!is_lacking(Level::V3, &instruction), "{bytes:02x?}");
        }
        let add = Decoder::new(64, &[0x01, 0xc8], DecoderOptions::NONE).decode();
        assert!(!is_lacking(Level::V2, &add));
    }

    #[test]
    fn bit_scans_of_level_v3_are_those_of_the_8086_line_at_level_v2() {
        for (opcode, [scan, count]) in [
            (0xbc, [Code::Bsf_r32_rm32, Code::Tzcnt_r32_rm32]),
            (0xbd, [Code::Bsr_r32_rm32, Code::Lzcnt_r32_rm32]),
        ] {
            let bytes = [0xf3, 0x0f, opcode, 0xc1];
            for (level, code) in [(Level::V2, scan), (Level::V3, count)] {
                let mut instruction = Instruction::default();
                let mut reader = Reader::new(level, 64, &bytes, 0x1000);
                reader.read(&mut instruction);
                assert_eq!((instruction.code(), instruction.len()), (code, 4));
                assert!(!instruction.has_rep_prefix());
                assert!(!is_lacking(level, &instruction));
            }
        }
    }
}
