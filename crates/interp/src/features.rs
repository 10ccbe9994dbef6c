//! Which instructions a profile does not have although hosts and the other profile do.

use iced_x86::{CpuidFeature, Instruction, Mnemonic};
use trapgate_x86::profile::Level;

/// Whether an instruction is undefined at a level, and would be executed at the other. (AVX, FMA and F16C need no word here:
/// their state component can't be enabled.) TZCNT and LZCNT, which a processor that lacks them executes as BSF and BSR, are
/// left alone: they differ for an operand of 0 only.
pub fn is_lacking(level: Level, instruction: &Instruction) -> bool {
    level == Level::V2
        && instruction.mnemonic() != Mnemonic::Tzcnt
        && instruction.cpuid_features().iter().any(|feature| {
            matches!(
                feature,
                CpuidFeature::BMI1 | CpuidFeature::BMI2 | CpuidFeature::ADX
            )
        })
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

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
        // tzcnt eax, ecx; add eax, ecx
        for bytes in [&[0xf3, 0x0f, 0xbc, 0xc1][..], &[0x01, 0xc8]] {
            let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
            assert!(!is_lacking(Level::V2, &instruction), "{bytes:02x?}");
        }
    }
}
