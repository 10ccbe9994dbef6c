//! What AMD's processors do otherwise than Intel's, whose the profiles are. On a host of AMD this is not compared, and counted; an
//! Intel host is the judge of it.
//!
//! Source: AMD64 Architecture Programmer's Manual (APM), as named at each; where it says nothing, what an EPYC of family 26 does.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register};
use trapgate_x86::registers::{gpr, rflags};

use crate::cases::Piece;
use crate::encodings::is_prefix;
use crate::judge::{expanded, is_of_memory, operand_range};
use crate::layout::{record as at, vector};
use crate::record::{Start, XSAVE_BYTES, put, quad};

/// Something that AMD's processors do otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// FIP, FDP and FOP are saved as 0 while no unmasked exception is pending, and so lost when the host's kernel saves them
    /// (vol. 5, "FXSAVE"; vol. 4, "XSAVE").
    ErrorPointers,
    /// MXCSR has MM, bit 17, which no Intel processor has (vol. 1, 4.2.2).
    MisalignedMask,
    /// With RFLAGS.AC, operands of 16 bytes and more are checked for alignment, also where they need none (vol. 4, "Exceptions" of
    /// each instruction, "#AC").
    Alignment,
    /// In what order faults of one instruction are found: #AC comes last (vol. 2, "Exception and Interrupt Priorities"), and CMPS
    /// reads what rSI points at first.
    Order,
    /// A near branch with operand size prefix has 16 bits in 64-bit mode too (vol. 3, "JMP (Near)").
    ShortBranch,
    /// A far pointer in memory has 32 bits of offset at most (vol. 3, "LDS, LES, LFS, LGS, LSS", "CALL (Far)", "JMP (Far)").
    FarPointer,
    /// A far return of 64 bits to compatibility mode with upper bits in its RIP (vol. 3, "RET (Far)", "IRET").
    FarReturn,
    /// Which check of the selectors that IRET pops comes first (vol. 3, "IRET").
    ReturnOrder,
    /// A repeated string instruction with 32-bit addresses and a count of 0, or one that faults, leaves the upper halves of its
    /// registers alone.
    StringRegisters,
    /// A repeated comparison that faults later than in its first round has the flags of the last round.
    StringFlags,
    /// PAUSE with REX.B is XCHG (vol. 3, "PAUSE").
    PauseExchange,
    /// UD0 and UD1 have no operands (vol. 3, "UD0, UD1, UD2").
    Undefined,
    /// PREFETCH of a register is no instruction (vol. 3, "PREFETCHlevel").
    Prefetch,
    /// MOVSXD with a destination of 16 bits reads 32 (vol. 3, "MOVSXD").
    SignExtension,
    /// What pops a selector reads as many bytes as it pops (POP, RET and IRET), not two.
    PopSelector,
    /// A store that raises an exception of its own asks for its memory first.
    StoreOrder,
    /// A near CALL to where no code can be pushes nothing.
    CallPush,
    /// PUSH of a segment register writes all bytes that it pushes (vol. 3, "PUSH").
    PushSelector,
    /// BOUND reads both bounds before it compares.
    Bound,
    /// SYSRET is an instruction in compatibility mode (vol. 3, "SYSRET").
    SystemReturn,
    /// VPINSRD and VPEXTRD with VEX.W are no instructions outside of 64-bit mode (vol. 4, "PINSRD").
    Insert,
    /// XSAVE and XRSTOR ask for the whole area, whatever they save or restore.
    Area,
    /// With FS or GS, an offset that is not canonical faults, whatever the linear address is.
    Offset,
    /// A jump led to an instruction that is of these.
    Elsewhere,
    /// VPERMQ and VPERMPD need no VEX.W.
    Permutation,
    /// LOOPE and LOOPNE take F2 or F3 before them for what says which of the two they are.
    LoopPrefix,
    /// RIP of the #DB that INT1 raises, under a hypervisor that intercepts it.
    Breakpoint,
    /// Bytes that are no instruction are not looked at for being too long.
    Decoding,
    /// A gather that faults leaves upper halves alone, and in its mask what was there; an address that is not canonical comes
    /// before a page that is missing (vol. 4, "VGATHERDPD").
    Gather,
}

impl fmt::Display for Way {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::ErrorPointers => "FIP, FDP and FOP are saved as 0",
            Self::MisalignedMask => "MXCSR has MM",
            Self::Alignment => "large operands are checked for alignment",
            Self::Order => "faults of an access come in another order",
            Self::ShortBranch => "a near branch has 16 bits",
            Self::FarPointer => "a far pointer has no offset of 64 bits",
            Self::FarReturn => "a far return does not cut RIP for compatibility mode",
            Self::ReturnOrder => "IRET checks in another order",
            Self::StringRegisters => "a string instruction leaves upper halves alone",
            Self::StringFlags => "a comparison of strings that faults has flags of its last round",
            Self::PauseExchange => "PAUSE with REX.B is XCHG",
            Self::Undefined => "UD0 and UD1 have no operands",
            Self::Prefetch => "PREFETCH of a register is no instruction",
            Self::SignExtension => "MOVSXD to 16 bits reads 32",
            Self::PopSelector => "selectors are popped with all their bytes",
            Self::StoreOrder => {
                "a store that raises an exception of its own asks for its memory first"
            }
            Self::CallPush => "a near CALL that faults pushes nothing",
            Self::PushSelector => "selectors are pushed with all their bytes",
            Self::Bound => "BOUND reads both bounds before it compares",
            Self::SystemReturn => "SYSRET is known in compatibility mode",
            Self::Insert => "VPINSRD with VEX.W is no instruction in 32-bit code",
            Self::Area => "XSAVE and XRSTOR ask for more than they access",
            Self::Offset => "an offset that is not canonical faults, whatever the base",
            Self::Elsewhere => "a jump led to an access that faults in another order",
            Self::Permutation => "VPERMQ and VPERMPD need no VEX.W",
            Self::LoopPrefix => "LOOPE and LOOPNE take F2 and F3 for theirs",
            Self::Breakpoint => "INT1 has another RIP",
            Self::Decoding => "what is no instruction is not too long for one",
            Self::Gather => "a gather that faults leaves more as it was",
        })
    }
}

fn has_prefix(piece: &Piece, wanted: u8) -> bool {
    let rex = |byte: &u8| piece.bits == 64 && byte & 0xf0 == 0x40;
    piece
        .bytes
        .iter()
        .take_while(|byte| is_prefix(**byte) || rex(byte))
        .any(|byte| *byte == wanted)
}

/// Why nothing of a case is compared, if that is so.
pub fn other_case(piece: &Piece, start: &Start, native: &[u8], engine: &[u8]) -> Option<Way> {
    let ways = other_instruction(piece);
    ways.or_else(|| other_outcome(piece, start, native, engine))
}

fn first(ways: &[(Way, bool)]) -> Option<Way> {
    let (way, _) = ways.iter().find(|(_, does)| *does)?;
    Some(*way)
}

/// What the bytes are another instruction by.
fn other_instruction(piece: &Piece) -> Option<Way> {
    use Mnemonic as M;
    let instruction = &piece.instruction;
    let mnemonic = instruction.mnemonic();
    let code = instruction.code();
    let long = piece.bits == 64;
    let far_load = matches!(mnemonic, M::Lss | M::Lfs | M::Lgs);
    let far_branch = matches!(code, Code::Call_m1664 | Code::Jmp_m1664);
    let pushes_selector = mnemonic == M::Push && instruction.op_register(0).is_segment_register();
    let loops = matches!(mnemonic, M::Loope | M::Loopne);
    first(&[
        (
            Way::ShortBranch,
            long && has_prefix(piece, 0x66) && is_near_branch(instruction),
        ),
        (
            Way::FarPointer,
            far_load && instruction.op_register(0).size() == 8 || far_branch,
        ),
        (
            Way::PauseExchange,
            mnemonic == M::Pause && piece.bytes.iter().any(|byte| byte & 0xf1 == 0x41),
        ),
        (Way::Undefined, matches!(mnemonic, M::Ud0 | M::Ud1)),
        (Way::Prefetch, is_prefetch_of_register(code)),
        (Way::SignExtension, code == Code::Movsxd_r16_rm16),
        (Way::Breakpoint, mnemonic == M::Int1),
        (Way::Permutation, piece.undefined && is_permutation(piece)),
        (Way::PushSelector, pushes_selector),
        (
            Way::LoopPrefix,
            loops && (has_prefix(piece, 0xf2) || has_prefix(piece, 0xf3)),
        ),
    ])
}

/// What came of it.
fn other_outcome(piece: &Piece, start: &Start, native: &[u8], engine: &[u8]) -> Option<Way> {
    use Mnemonic as M;
    let instruction = &piece.instruction;
    let mnemonic = instruction.mnemonic();
    let long = piece.bits == 64;
    let [host, ours] = [native, engine].map(|record| quad(record, at::VECTOR));
    let both_of_memory = is_of_memory(host) && is_of_memory(ours);
    let far_return = matches!(mnemonic, M::Retf | M::Iret | M::Iretd | M::Iretq);
    let itself = |record: &[u8]| quad(record, at::RIP) == piece.ip;
    // ES, of what the store has raised.
    let noted = quad(engine, at::XSAVE) & 0x80_0000 != 0;
    let restores = matches!(mnemonic, M::Xrstor | M::Xrstor64);
    first(&[
        (Way::Decoding, piece.undefined && [host, ours] == [6, 13]),
        (
            Way::MisalignedMask,
            quad(native, at::XSAVE + 24) & 1 << 17 != 0 && ours == 13,
        ),
        (
            Way::FarReturn,
            far_return && long && host == 13 && itself(native) && ours != host,
        ),
        (
            Way::ReturnOrder,
            far_return && mnemonic != M::Retf && [host, ours] == [13, 13],
        ),
        (
            Way::PopSelector,
            far_return && matches!(host, 12 | 14)
                || mnemonic == M::Pop
                    && instruction.op_register(0).is_segment_register()
                    && is_of_memory(host),
        ),
        (
            Way::StoreOrder,
            is_of_memory(host)
                && (is_x87_store(instruction) && noted && !itself(engine)
                    || mnemonic == M::Vcvtps2ph && ours == 19),
        ),
        (
            Way::CallPush,
            mnemonic == M::Call && [host, ours] == [13, 13],
        ),
        (
            Way::Bound,
            mnemonic == M::Bound && is_of_memory(host) && ours == 5,
        ),
        (
            Way::SystemReturn,
            !long && mnemonic == M::Sysret && [host, ours] == [13, 6],
        ),
        (
            Way::Insert,
            !long && matches!(mnemonic, M::Vpinsrd | M::Vpextrd) && host == 6 && itself(native),
        ),
        (
            Way::Area,
            (is_save(instruction) || restores)
                && is_of_memory(host)
                && itself(native)
                && !itself(engine),
        ),
        (
            Way::Alignment,
            host == 17 && start.flags & rflags::AC != 0 && ours != 17,
        ),
        (
            Way::Offset,
            long && matches!(host, 12 | 13) && has_wild_offset(instruction, start),
        ),
        (
            Way::Elsewhere,
            both_of_memory && !itself(native) && instruction.flow_control() != FlowControl::Next,
        ),
        (
            Way::Gather,
            both_of_memory && host != ours && instruction.memory_index().is_vector_register(),
        ),
        (
            Way::Order,
            both_of_memory && (ours == 17 && host != 17 || compares_strings(instruction)),
        ),
    ])
}

/// Whether a segment base leads an offset that is not canonical to an address that may be.
fn has_wild_offset(instruction: &Instruction, start: &Start) -> bool {
    let based = matches!(instruction.memory_segment(), Register::FS | Register::GS);
    let flat = Start {
        bases: [0; 2],
        ..start.clone()
    };
    let operand = if instruction.is_string_instruction() {
        Some((start.gpr[gpr::RSI], 8))
    } else {
        operand_range(instruction, &flat)
    };
    let is_canonical = |address: u64| (address as i64) << 16 >> 16 == address as i64;
    based
        && operand.is_some_and(|(offset, bytes)| {
            let last = offset.wrapping_add(bytes.saturating_sub(1));
            !is_canonical(offset) || !is_canonical(last)
        })
}

/// Whether bytes are VPERMQ or VPERMPD with VEX.W or without.
fn is_permutation(piece: &Piece) -> bool {
    let mut bytes = piece.bytes.iter().skip_while(|byte| is_prefix(**byte));
    let vex: [u8; 4] = std::array::from_fn(|_| bytes.next().copied().unwrap_or(0));
    // VEX.256.66.0F3A 00 and 01.
    vex[0] == 0xc4 && vex[1] & 0x1f == 3 && vex[2] & 7 == 5 && vex[3] <= 1
}

fn is_near_branch(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| {
        matches!(
            instruction.op_kind(operand),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
        )
    }) || instruction.is_jmp_near_indirect()
        || instruction.is_call_near_indirect()
        || instruction.mnemonic() == Mnemonic::Ret
}

fn is_x87_store(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp
    )
}

/// Whether an instruction is [`Way::Prefetch`]. No program has it.
pub fn is_prefetch_of_register(code: Code) -> bool {
    matches!(
        code,
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    )
}

/// Whether an instruction is CMPS or SCAS.
pub fn compares_strings(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    instruction.is_string_instruction()
        && matches!(
            instruction.mnemonic(),
            M::Scasb | M::Scasw | M::Scasd | M::Scasq | M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq
        )
}

fn is_save(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Fxsave | M::Fxsave64 | M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64
    )
}

/// Which bytes of what an instruction writes are FIP, FDP and FOP. The host's kernel may have saved them meanwhile.
fn pointers(instruction: &Instruction, size: u64) -> Range<u64> {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Fnstenv | M::Fnsave if matches!(size, 14 | 94) => 6..14,
        M::Fnstenv | M::Fnsave => 12..28,
        _ if is_save(instruction) => 6..24,
        _ => 0..0,
    }
}

/// Whether an instruction writes such bytes where no window shows them: registers may play two parts.
pub fn saves_elsewhere(piece: &Piece, start: &Start) -> bool {
    is_save(&piece.instruction)
        && operand_range(&piece.instruction, start)
            .is_some_and(|(area, _)| place(start, area.wrapping_add(6)).is_none())
}

/// Where in a record a byte of memory is, if it has it.
fn place(start: &Start, address: u64) -> Option<usize> {
    let mut at = at::MEMORY;
    for window in start.windows {
        if let Some(position) = window.position(address) {
            return Some(at + position);
        }
        at += window.length() as usize;
    }
    None
}

/// Gives the native outcome what the engine has where AMD's processors do otherwise, and says where that was.
///
/// MXCSR.MM of the engine's would be a mistake, so that is not given.
pub fn settle(
    piece: Option<&Piece>,
    start: &Start,
    native: &mut [u8],
    engine: &[u8],
) -> BTreeSet<Way> {
    let mut ways = BTreeSet::new();
    let mut take = |native: &mut [u8], from: usize, bytes: usize, way: Way| {
        let range = from..from + bytes;
        if native[range.clone()] != engine[range.clone()] {
            native[range.clone()].copy_from_slice(&engine[range]);
            ways.insert(way);
        }
    };
    // What is not in use has initial values, whatever the image holds.
    let image = expanded(native);
    native[at::XSAVE..][..XSAVE_BYTES].copy_from_slice(&image);
    native[at::XSAVE + 512] |= 7;
    let pending = image[2] & 0x80 != 0;
    let lost = image[6..24].iter().all(|byte| *byte == 0);
    if !pending || lost {
        take(native, at::XSAVE + 6, 18, Way::ErrorPointers);
    }
    let mut masks = vec![at::XSAVE + MM_AT];
    if let Some(piece) = piece {
        settle_instruction(piece, start, native, &mut take);
        if is_save(&piece.instruction)
            && let Some((area, _)) = operand_range(&piece.instruction, start)
        {
            masks.extend(place(start, area.wrapping_add(MM_AT as u64)));
        }
    }
    for mask in masks {
        if native[mask] == engine[mask] | MM && engine[mask] & MM == 0 {
            native[mask] &= !MM;
            ways.insert(Way::MisalignedMask);
        }
    }
    // No processor of a profile would have taken it.
    native[at::XSAVE + MM_AT - 4] &= !MM;
    ways
}

/// Gives the outcome of a program that ended by a fault of a comparison of strings what is otherwise on AMD's processors.
pub fn settle_comparison(native: &[u8], engine: &mut [u8]) -> Vec<Way> {
    let both_of_memory =
        is_of_memory(quad(native, at::VECTOR)) && is_of_memory(quad(engine, at::VECTOR));
    let mut ways = Vec::new();
    let mut take = |at: usize, bits: u64, way: Way| {
        let (host, ours) = (quad(native, at), quad(engine, at));
        if (host ^ ours) & bits != 0 {
            put(engine, at, ours & !bits | host & bits);
            ways.push(way);
        }
    };
    take(at::FLAGS, rflags::ARITHMETIC, Way::StringFlags);
    if both_of_memory {
        for part in [at::VECTOR, at::ADDRESS, at::ERROR] {
            take(part, u64::MAX, Way::Order);
        }
    }
    ways
}

/// Where in an image MXCSR_MASK has its bit 17; four bytes before, MXCSR.
const MM_AT: usize = 30;
const MM: u8 = 2;

/// As [`settle`], for what one instruction leaves beside the state that it saves.
fn settle_instruction(
    piece: &Piece,
    start: &Start,
    native: &mut [u8],
    take: &mut impl FnMut(&mut [u8], usize, usize, Way),
) {
    let instruction = &piece.instruction;
    let fault = quad(native, at::VECTOR) != vector::NONE;
    let pending = native[at::XSAVE + 2] & 0x80 != 0;
    if !pending && let Some((area, size)) = operand_range(instruction, start) {
        for byte in pointers(instruction, size) {
            if let Some(at) = place(start, area.wrapping_add(byte)) {
                take(native, at, 1, Way::ErrorPointers);
            }
        }
    }
    // With two operands they are of AVX-512, and no instructions here.
    let gathers = instruction.memory_index().is_vector_register() && instruction.op_count() == 3;
    if gathers && fault {
        let mask = instruction.op_register(2).number();
        for part in [160, 576] {
            take(native, at::XSAVE + part + mask * 16, 16, Way::Gather);
        }
        let destination = instruction.op_register(0);
        if destination.is_xmm() {
            let upper = at::XSAVE + 576 + destination.number() * 16;
            take(native, upper, 16, Way::Gather);
        }
    }
    if instruction.is_string_instruction() {
        if has_prefix(piece, 0x67) && piece.bits == 64 {
            for register in [gpr::RCX, gpr::RSI, gpr::RDI] {
                take(native, at::GPR + register * 8 + 4, 4, Way::StringRegisters);
            }
        }
        if compares_strings(instruction) && fault {
            // The arithmetic flags are in the lower half.
            take(native, at::FLAGS, 2, Way::StringFlags);
        }
    }
}
