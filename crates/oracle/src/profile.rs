//! Which instructions a CPU profile admits, by the decoder's tables, and what cannot be judged.

use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};
use trapgate_x86::profile::Level;

/// What every profile has (`trapgate_x86::profile`, leaves 1, 7, 0xD and 0x8000_0001).
const V2: [CpuidFeature; 43] = [
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CMOV,
    CpuidFeature::CX8,
    CpuidFeature::CPUID,
    CpuidFeature::TSC,
    CpuidFeature::MSR,
    CpuidFeature::SEP,
    CpuidFeature::SYSCALL,
    CpuidFeature::SMM,
    CpuidFeature::RDPMC,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::MMX,
    CpuidFeature::FXSR,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::POPCNT,
    CpuidFeature::CMPXCHG16B,
    CpuidFeature::PCLMULQDQ,
    CpuidFeature::AES,
    CpuidFeature::XSAVE,
    CpuidFeature::XSAVEOPT,
    CpuidFeature::MOVBE,
    CpuidFeature::RDRAND,
    CpuidFeature::RDSEED,
    CpuidFeature::FSGSBASE,
    CpuidFeature::INVPCID,
    CpuidFeature::SMAP,
    CpuidFeature::RDTSCP,
    CpuidFeature::RDPID,
    CpuidFeature::CLFSH,
    CpuidFeature::PREFETCHW,
    CpuidFeature::PAUSE,
];

/// NOPs of any length, and what is a NOP on a processor that does not know it.
const NOPS: [CpuidFeature; 5] = [
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PREFETCHWT1,
    CpuidFeature::CET_IBT,
    CpuidFeature::CLDEMOTE,
    CpuidFeature::PREFETCHITI,
];

const V3: [CpuidFeature; 8] = [
    CpuidFeature::AVX,
    CpuidFeature::AVX2,
    CpuidFeature::BMI1,
    CpuidFeature::BMI2,
    CpuidFeature::FMA,
    CpuidFeature::F16C,
    CpuidFeature::LZCNT,
    CpuidFeature::ADX,
];

/// Whether a processor of this profile knows an instruction in code of `bits` bits.
pub fn admits(level: Level, code: Code, bits: u32) -> bool {
    let op_code = code.op_code();
    // In 64-bit mode only AMD's processors know near branches with 16-bit operands.
    let mode = if bits == 64 {
        op_code.mode64() && op_code.intel_decoder64()
    } else {
        op_code.mode32() && op_code.intel_decoder32()
    };
    // FINIT and its like are two instructions, FWAIT and FNINIT.
    mode && op_code.is_instruction()
        && !op_code.fwait()
        && matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        && code.cpuid_features().iter().all(|feature| {
            V2.contains(feature)
                || NOPS.contains(feature)
                || matches!(code.mnemonic(), Mnemonic::Rdsspd | Mnemonic::Rdsspq)
                || (level == Level::V3 && V3.contains(feature))
        })
}

/// Whether the host knows all of a profile: its CPU may be older.
pub fn host_has(level: Level) -> bool {
    macro_rules! all {
        ($($name:tt),*) => { $(std::is_x86_feature_detected!($name))&&* };
    }
    let v2 = all!(
        "sse4.2",
        "popcnt",
        "cmpxchg16b",
        "pclmulqdq",
        "aes",
        "xsave",
        "xsaveopt",
        "movbe",
        "rdrand",
        "rdseed"
    );
    v2 && (level == Level::V2 || all!("avx", "avx2", "bmi1", "bmi2", "fma", "f16c", "lzcnt", "adx"))
}

/// Who says what an instruction does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judge {
    /// The host CPU.
    Host,
    /// The host CPU too, but it executes another instruction in its place, as the manual says that the two do the same.
    StandIn([u8; 2]),
    /// Nobody, and why.
    Nobody(&'static str),
}

/// UD2: #UD.
const UNDEFINED: [u8; 2] = [0x0f, 0x0b];
/// HLT, which programs may not execute: #GP(0).
const PROTECTED: [u8; 2] = [0xf4, 0x90];

/// What a processor executes otherwise that does not know it: without the prefix, or as a NOP.
const OTHERWISE: [CpuidFeature; 5] = [
    CpuidFeature::LZCNT,
    CpuidFeature::BMI1,
    CpuidFeature::MPX,
    CpuidFeature::WBNOINVD,
    CpuidFeature::MONITORX,
];

/// Who judges an instruction, if anybody.
pub fn judge(level: Level, instruction: &Instruction, bits: u32) -> Judge {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Syscall | M::Sysenter => Judge::Nobody(SYSTEM_CALL),
        M::Int if instruction.immediate8() == 0x80 => Judge::Nobody(SYSTEM_CALL),
        M::Vmcall | M::Vmmcall | M::Vmfunc => Judge::Nobody("reach the hypervisor below the host"),
        // With CR4.UMIP, as the guest has it (SDM vol. 2, "SGDT", "Protected Mode Exceptions"); the host's kernel
        // emulates them.
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => Judge::StandIn(PROTECTED),
        _ if admits(level, instruction.code(), bits) || instruction.op_code().fwait() => {
            Judge::Host
        }
        // What has no CPUID bit set is reserved (SDM vol. 2, 3.1.1.2); the host may know it.
        _ if instruction
            .cpuid_features()
            .iter()
            .all(|feature| !OTHERWISE.contains(feature)) =>
        {
            Judge::StandIn(UNDEFINED)
        }
        _ => Judge::Nobody("are another instruction on the host"),
    }
}

const SYSTEM_CALL: &str = "enter the host's kernel";

/// Whether what an instruction does depends on the processor or its kernel beside the state that cases have.
pub fn is_of_the_machine(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Rdtsc
            | M::Rdtscp
            | M::Cpuid
            | M::Xgetbv
            | M::Rdpid
            | M::Syscall
            | M::Sysenter
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Int
            | M::Vmcall
            | M::Vmmcall
            | M::Vmfunc
    )
}

/// Whether an operand is memory.
pub fn memory_operand(instruction: &Instruction) -> Option<u32> {
    (0..instruction.op_count()).find(|&operand| instruction.op_kind(operand) == OpKind::Memory)
}
