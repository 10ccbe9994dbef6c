//! Why an instruction has no thunk.

use iced_x86::{Code, CpuidFeature};

/// Why no thunk was made.
#[derive(Debug, thiserror::Error)]
pub enum ThunkError {
    /// The instruction isn't one to run on the host as it is; the interpreter does it itself.
    #[error("{code:?} can't run as a host instruction: {reason}")]
    Unsupported {
        /// The instruction.
        code: Code,
        /// What about it.
        reason: Unsupported,
    },
    /// The host CPU (or its kernel) doesn't offer what the instruction needs.
    #[error(
        "{code:?} needs {feature:?}, which this host's CPU lacks; choose a CPU profile without it"
    )]
    HostLacks {
        /// The instruction.
        code: Code,
        /// The first missing feature.
        feature: CpuidFeature,
    },
    /// All code memory is in use by thunks that are still held.
    #[error(
        "the {limit} bytes of code memory for host-instruction thunks are all in use; drop decoded blocks and try again"
    )]
    Full {
        /// Size limit in bytes.
        limit: usize,
    },
    /// The kernel gave no code memory.
    #[error("cannot map {size} bytes of code memory for host-instruction thunks: {cause}")]
    Map {
        /// Bytes asked for.
        size: usize,
        /// What the kernel said.
        cause: std::io::Error,
    },
    /// The instruction has no 64-bit encoding with the operands it came with.
    #[error("{code:?} can't be encoded for the host: {cause}")]
    Encode {
        /// The instruction.
        code: Code,
        /// What the encoder said.
        cause: iced_x86::IcedError,
    },
}

/// What keeps an instruction from being a thunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// Not a valid instruction.
    #[error("it is not a valid instruction")]
    Invalid,
    /// Jumps, calls, returns, interrupts, conditional or not.
    #[error("it transfers control")]
    ControlFlow,
    /// PUSH, POP, ENTER, …: the stack is guest memory at an implicit address.
    #[error("it uses the stack")]
    Stack,
    /// MOVS, STOS, INS, … with or without REP.
    #[error("it is a string instruction")]
    String,
    /// Privileged, or about the system's state (CPUID, RDTSC, XSAVE, segment registers, …), or not
    /// known to be harmless.
    #[error("it isn't on the list of computing instructions")]
    NotComputing,
    /// DIV and IDIV raise #DE from their operands.
    #[error("it may raise #DE")]
    Divide,
    /// No 64-bit mode form (DAA, AAM, BOUND, …).
    #[error("it doesn't exist in 64-bit mode")]
    Only32Bit,
    /// EVEX, XOP, 3DNow! and MVEX encodings.
    #[error("encodings other than legacy and VEX are not run")]
    Encoding,
    /// Gathers: many addresses in one instruction.
    #[error("it reads memory at several addresses")]
    Gather,
    /// MASKMOVQ, MASKMOVDQU: a byte-masked store at an implicit address, `[rDI]`.
    #[error("it stores under a byte mask at an implicit address")]
    MaskedStore,
    /// LDMXCSR, STMXCSR, FXSAVE, XSAVE and their kin: the interpreter owns that state.
    #[error("it moves state that the interpreter owns")]
    StateImage,
    /// Prefetches, fences, cache control: nothing to compute.
    #[error("it only concerns caches or memory order")]
    CacheControl,
    /// LEA, MOV with an absolute offset, and others whose address is the result.
    #[error("its address is part of its meaning")]
    Address,
}
