//! What the host CPU offers.

use std::sync::LazyLock;

use iced_x86::{Code, CpuidFeature};

/// Every feature that a thunk may need, and whether the host has it (kernel support included). What no profile of a guest's
/// processor has is not here: a guest must not execute it because the host happens to have it.
static FEATURES: LazyLock<Vec<(CpuidFeature, bool)>> = LazyLock::new(|| {
    macro_rules! detect {
        ($($feature:ident => $name:tt),* $(,)?) => {
            vec![$((CpuidFeature::$feature, std::is_x86_feature_detected!($name))),*]
        };
    }
    detect![
        SSE3 => "sse3", SSSE3 => "ssse3", SSE4_1 => "sse4.1", SSE4_2 => "sse4.2",
        POPCNT => "popcnt", CMPXCHG16B => "cmpxchg16b", MOVBE => "movbe", LZCNT => "lzcnt",
        BMI1 => "bmi1", BMI2 => "bmi2", ADX => "adx", RDRAND => "rdrand", RDSEED => "rdseed",
        AES => "aes", PCLMULQDQ => "pclmulqdq", AVX => "avx", AVX2 => "avx2", FMA => "fma",
        F16C => "f16c",
    ]
});

/// The baseline of every x86-64 CPU (AMD64 vol. 1; CMPXCHG8B, CMOV, x87, MMX, SSE2).
const BASELINE: [CpuidFeature; 14] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CMOV,
    CpuidFeature::CX8,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::MMX,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
];

/// What is known about an instruction's features.
pub(crate) enum Support {
    /// All there.
    Available,
    /// The host lacks this one.
    Lacks(CpuidFeature),
    /// Needs a feature that thunks don't know to be harmless.
    Unlisted,
}

/// Whether thunks may use the instruction's features, and whether the host has them.
pub(crate) fn support(code: Code) -> Support {
    let features = code.cpuid_features();
    let mut lacks = None;
    for feature in features {
        if BASELINE.contains(feature) {
            continue;
        }
        match FEATURES.iter().find(|(listed, _)| listed == feature) {
            Some((_, true)) => {}
            Some((_, false)) => lacks = lacks.or(Some(*feature)),
            None => return Support::Unlisted,
        }
    }
    match lacks {
        Some(feature) => Support::Lacks(feature),
        None if features.is_empty() => Support::Unlisted,
        None => Support::Available,
    }
}
