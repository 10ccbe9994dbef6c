//! What the host CPU's outcome says about an engine's.

use std::collections::BTreeSet;
use std::fmt::{self, Write};
use std::ops::Range;

use iced_x86::{CpuidFeature, Instruction, Mnemonic, OpKind, Register};
use trapgate_x86::registers::{gpr, rflags};

use crate::amd::{self, Way};
use crate::cases::{Piece, address_bits, operand_size};
use crate::host::Host;
use crate::layout::{record as at, vector};
use crate::profile::memory_operand;
use crate::record::{Start, Window, XSAVE_BYTES, quad};
use crate::undefined::{self, Left, Residue, processor_results};

/// First address that is not a program's under Linux with four levels of tables.
const PROGRAMS_END: u64 = (1 << 47) - 4096;

/// Why something is not compared. All of it is the processor's choice, or the host's kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Waiver {
    /// Flags that an instruction leaves undefined ([`undefined::TABLE`]).
    Flags,
    /// A result that is undefined: SHLD and SHRD by more bits than there are (SDM vol. 2, "SHLD").
    Result,
    /// A random number, and whether there was one (SDM vol. 2, "RDRAND", "RDSEED").
    Random,
    /// What only this processor knows: the time, its number, its features, XCR0.
    Processor,
    /// Which of the faults of an access in several parts comes, and of which part (SDM vol. 3A, 7.9: in what order
    /// faults of one instruction are found is not architectural; vol. 2, FXSAVE and XSAVE, "#AC").
    Parts,
    /// Whether an access faults that goes over the end of a segment of 4 GiB (SDM vol. 3A, 6.3: implementation-specific), and
    /// so how much of it is done when it does.
    SegmentEnd,
    /// Whether bytes that are no instruction are too long for one, too: both are faults of decoding, among which there is no
    /// order (SDM vol. 3A, 6.9, table 6-2).
    Decoding,
    /// What an instruction that faulted has done already ([`undefined::residue`]).
    Residue,
    /// Upper halves of general registers after a change of mode (SDM vol. 1, 3.4.1.1).
    UpperHalves,
    /// A null selector's RPL, which is lost when the host's kernel returns from an interrupt (SDM vol. 2A, "IRET",
    /// RETURN-TO-OUTER-PRIVILEGE-LEVEL).
    NullSelector,
    /// Whether a page of the upper half was present, which Linux does not tell programs.
    UpperHalfPresent,
    /// Whether XSAVE takes a component with initial values to be in use: the host's kernel may have restored it with these
    /// meanwhile (SDM vol. 1, 13.6).
    InUse,
    /// FDP and FOP of a host that writes them where the profile does not (SDM vol. 1, 8.1.8 and 8.1.9).
    LastOperand,
    /// A host of AMD, which does it otherwise.
    Amd(Way),
}

impl fmt::Display for Waiver {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Amd(way) => return write!(formatter, "the host is AMD's: {way}"),
            Self::Flags => "a flag that is undefined differed",
            Self::Result => "a result that is undefined differed",
            Self::Random => "a random number differed",
            Self::Processor => "what only this processor knows differed",
            Self::Parts => "an access in several parts faulted in another of them",
            Self::SegmentEnd => "an access over the end of a segment of 4 GiB faulted otherwise",
            Self::Decoding => "what is no instruction was found to be too long for one",
            Self::Residue => "what a fault leaves behind differed",
            Self::UpperHalves => "an upper half differed after a change of mode",
            Self::NullSelector => "a null selector's RPL differed",
            Self::UpperHalfPresent => "Linux did not tell whether a page was present",
            Self::InUse => "XSAVE took a component with initial values to be in use",
            Self::LastOperand => "the host wrote FDP or FOP where the profile does not",
        })
    }
}

/// Whether a vector is of a fault of memory: #SS, #GP, #PF, #AC.
pub(crate) fn is_of_memory(vector: u64) -> bool {
    matches!(vector, 12 | 13 | 14 | 17)
}

/// What came of a comparison.
#[derive(Clone, Debug, Default)]
pub struct Judgement {
    /// Differences, a line for each.
    pub differences: Vec<String>,
    /// Why other differences do not count.
    pub waived: BTreeSet<Waiver>,
    /// What it wrote to memory is the processor's choice, also where no window shows it.
    pub open: bool,
}

impl Judgement {
    /// Nothing of a case is compared.
    fn waive(waiver: Waiver) -> Self {
        Self {
            waived: BTreeSet::from([waiver]),
            open: true,
            ..Self::default()
        }
    }
}

/// What of an outcome counts.
struct Scope {
    /// Flags that are not compared.
    flags: (u64, Waiver),
    /// Bits of general registers whose value is not compared.
    registers: [u64; 16],
    result: Waiver,
    /// Memory that is not compared: where, and how many bytes.
    memory: Option<(u64, u64, Waiver)>,
    /// It may be an x87 instruction's address that the x87 pointers hold.
    x87: bool,
    /// It faults, and which of several faults it is is the processor's choice.
    parts: Option<Parts>,
    /// It faults over the end of a segment of 4 GiB: by which fault, and what of its operand or of the XSAVE image is
    /// changed by then, is the processor's choice.
    over_end: bool,
    /// What a fault leaves.
    residue: Residue,
}

/// An access of several parts, each of which may fault.
#[derive(Clone, Copy)]
struct Parts {
    /// So many lie from the first to the last.
    bytes: u64,
    /// Offsets have 16 bits: parts over their end lie at the segment's start.
    short: bool,
    waiver: Waiver,
}

impl Parts {
    /// Whether two addresses may be of one access.
    fn reach(self, addresses: [u64; 2]) -> bool {
        let distance = addresses[0].wrapping_sub(addresses[1]);
        let within = |distance: u64| distance < self.bytes;
        within((distance as i32).unsigned_abs().into())
            || self.short && within((distance as i16).unsigned_abs().into())
    }
}

impl Scope {
    /// Of one instruction, or of a program.
    fn of(piece: Option<&Piece>, start: &Start, native: &[u8], engine: &[u8]) -> Self {
        let mut scope = Self {
            flags: (0, Waiver::Flags),
            registers: [0; 16],
            result: Waiver::Result,
            memory: None,
            x87: true,
            parts: None,
            over_end: false,
            residue: Residue::default(),
        };
        let Some(piece) = piece else {
            return scope;
        };
        let instruction = &piece.instruction;
        let kind = quad(native, at::VECTOR);
        let fault = kind != vector::NONE;
        // A fault comes before any flag or register changes.
        let at_itself = fault && quad(native, at::RIP) == piece.ip;
        let operand = operand_range(instruction, start);
        let stack = start.gpr[gpr::RSP]
            & if start.compatibility {
                u64::from(u32::MAX)
            } else {
                u64::MAX
            };
        if !at_itself {
            let named = processor_results(instruction);
            if matches!(instruction.mnemonic(), Mnemonic::Rdrand | Mnemonic::Rdseed) {
                scope.flags = (rflags::CF, Waiver::Random);
                scope.result = Waiver::Random;
                scope.hide_destination(instruction);
            } else if named != [0; 16] {
                scope.registers = named;
                scope.result = Waiver::Processor;
            } else {
                scope.flags.0 = undefined::flags(instruction, &start.gpr);
                if undefined::result(instruction, &start.gpr) {
                    scope.hide_destination(instruction);
                    scope.memory = operand.map(|(at, bytes)| (at, bytes, Waiver::Result));
                }
            }
        }
        if fault {
            let mxcsr = [start.mxcsr, quad(native, at::XSAVE + 24) as u32];
            scope.residue = undefined::residue(instruction, mxcsr, kind);
            scope.memory = match scope.residue.memory {
                Left::Nothing => None,
                Left::Operand => operand,
                // CS and RIP of eight bytes each at most.
                Left::Stack => Some((stack.wrapping_sub(16), 16)),
            }
            .map(|(at, bytes)| (at, bytes, Waiver::Residue));
            scope.over_end = stops_at_end(piece, start, &[native]);
            if scope.over_end {
                scope.memory = operand.map(|(at, bytes)| (at, bytes, Waiver::SegmentEnd));
            }
        }
        if !fault
            && let Some((area, bytes)) = operand
            && took_more_to_be_in_use(instruction, start, area, [native, engine])
        {
            scope.memory = Some((area, bytes, Waiver::InUse));
        }
        scope.x87 = instruction.cpuid_features().iter().any(|feature| {
            matches!(
                feature,
                CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387
            )
        });
        let records = [native, engine];
        if records
            .iter()
            .all(|record| is_of_memory(quad(record, at::VECTOR)))
        {
            let bytes = operand.map_or(0, |(_, bytes)| bytes).max(PUSHED);
            let pushes_over_end = instruction.is_stack_instruction()
                && u64::from((stack as u32).wrapping_add(PUSHED as u32)) < 2 * PUSHED;
            let at_end = start.compatibility
                && (pushes_over_end
                    || records
                        .iter()
                        .any(|record| quad(record, at::ADDRESS) >> 4 == 0xfff_ffff));
            let waiver = if at_end {
                Some(Waiver::SegmentEnd)
            } else {
                undefined::order(instruction).then_some(Waiver::Parts)
            };
            scope.parts = waiver.map(|waiver| Parts {
                bytes,
                short: address_bits(instruction, piece.bits) == 16,
                waiver,
            });
        }
        scope
    }

    fn hide_destination(&mut self, instruction: &Instruction) {
        if instruction.op_kind(0) == OpKind::Register {
            let register = instruction.op_register(0);
            let mask = match register.size() {
                2 => 0xffff,
                4 => 0xffff_ffff,
                _ => u64::MAX,
            };
            self.registers[register.full_register().number() & 15] = mask;
        }
    }
}

/// Whether XSAVE or XSAVEOPT wrote an XSTATE_BV with more components natively.
fn took_more_to_be_in_use(
    instruction: &Instruction,
    start: &Start,
    area: u64,
    records: [&[u8]; 2],
) -> bool {
    let saves = matches!(
        instruction.mnemonic(),
        Mnemonic::Xsave | Mnemonic::Xsave64 | Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64
    );
    let Some(header) = start.windows[0].position(area.wrapping_add(512)) else {
        return false;
    };
    let [native, engine] = records.map(|record| record[at::MEMORY + header]);
    saves && native != engine && native & engine == engine
}

/// Bytes that the largest instruction pops or pushes: IRET.
const PUSHED: u64 = 40;

/// Where an instruction's memory operand lies, and how many bytes it has.
pub(crate) fn operand_range(instruction: &Instruction, start: &Start) -> Option<(u64, u64)> {
    let operand = memory_operand(instruction)?;
    let address = instruction.virtual_address(operand, 0, |register, _, _| {
        Some(match register {
            Register::FS => start.bases[0],
            Register::GS => start.bases[1],
            register if register.is_segment_register() || register.is_vector_register() => 0,
            register => {
                let value = start.gpr[register.full_register().number() & 15];
                match register.size() {
                    1 => value & 0xff,
                    2 => value & 0xffff,
                    4 => value & 0xffff_ffff,
                    _ => value,
                }
            }
        })
    })?;
    let address = if start.compatibility {
        address & 0xffff_ffff
    } else {
        address
    };
    Some((address, operand_size(instruction)))
}

/// Two outcomes side by side.
struct Comparison<'a> {
    native: &'a [u8],
    engine: &'a [u8],
    found: Judgement,
}

impl Comparison<'_> {
    fn line(&mut self, line: String) {
        self.found.differences.push(line);
    }

    fn values(&mut self, name: &str, native: u64, engine: u64) {
        if native != engine {
            self.line(format!("{name} {engine:#x}, natively {native:#x}"));
        }
    }

    fn word(&mut self, name: &str, at: usize) {
        self.values(name, quad(self.native, at), quad(self.engine, at));
    }

    /// As [`Self::word`], but bits of which the difference does not count.
    fn masked(&mut self, name: &str, at: usize, ignored: u64, waiver: Waiver) {
        let (native, engine) = (quad(self.native, at), quad(self.engine, at));
        self.values(name, native & !ignored, engine & !ignored);
        if (native ^ engine) & ignored != 0 {
            self.found.waived.insert(waiver);
        }
    }

    fn memory(&mut self, window: Window, at: usize, ignored: Option<(u64, u64, Waiver)>) {
        let length = window.length() as usize;
        let native = &self.native[at..at + length];
        let mut engine = self.engine[at..at + length].to_vec();
        if let Some((from, bytes, waiver)) = ignored {
            for byte in 0..bytes {
                if let Some(position) = window.position(from.wrapping_add(byte))
                    && native[position] != engine[position]
                {
                    engine[position] = native[position];
                    self.found.waived.insert(waiver);
                }
            }
        }
        let mut text = String::new();
        let differing = native.chunks(8).zip(engine.chunks(8)).enumerate();
        for (index, (native, engine)) in differing.filter(|(_, (one, other))| one != other).take(6)
        {
            let address = window.address + index as u64 * 8;
            let _ = write!(
                text,
                " {address:#x}: {engine:02x?}, natively {native:02x?};"
            );
        }
        if !text.is_empty() {
            self.line(format!("memory at{text}"));
        }
    }

    /// Vector, error code and address.
    fn fault(&mut self, scope: &Scope) {
        if scope.over_end {
            self.found.waived.insert(Waiver::SegmentEnd);
            return;
        }
        let parts = scope.parts;
        let kinds = [self.native, self.engine].map(|record| quad(record, at::VECTOR));
        let addresses = [self.native, self.engine].map(|record| quad(record, at::ADDRESS));
        if let Some(parts) = parts
            && kinds[0] != kinds[1]
        {
            self.found.waived.insert(parts.waiver);
            return;
        }
        self.word("vector", at::VECTOR);
        let page_fault = kinds[0] == 14;
        if let Some(parts) = parts
            && page_fault
            && addresses[0] != addresses[1]
            && parts.reach(addresses)
        {
            // Parts on two pages, of which one may be there and not be writable.
            self.masked("error code", at::ERROR, 1, parts.waiver);
            self.found.waived.insert(parts.waiver);
            return;
        }
        self.word("address", at::ADDRESS);
        let hidden = page_fault && addresses[0] >= PROGRAMS_END;
        self.masked(
            "error code",
            at::ERROR,
            hidden.into(),
            Waiver::UpperHalfPresent,
        );
    }
}

/// Differences of an engine's outcome from the native one. `piece` is `None` for programs.
pub fn differences(
    host: Host,
    piece: Option<&Piece>,
    input: &[u8],
    native: &[u8],
    engine: &[u8],
) -> Judgement {
    let start = Start::read(input);
    let memory = at::MEMORY + (start.windows[0].length() + start.windows[1].length()) as usize;
    let same = |part: Range<usize>| native[part.clone()] == engine[part];
    if same(0..at::MEMORY) && same(at::MEMORY..memory) {
        return Judgement {
            open: piece.is_some_and(|piece| stops_at_end(piece, &start, &[native])),
            ..Judgement::default()
        };
    }
    if !host.is_amd() {
        return compare(host, piece, &start, native, engine);
    }
    let mut settled = native.to_vec();
    let ways = amd::settle(piece, &start, &mut settled, engine);
    let mut judgement = compare(host, piece, &start, &settled, engine);
    judgement.waived.extend(ways.into_iter().map(Waiver::Amd));
    if let Some(piece) = piece {
        let other = amd::other_case(piece, &start, native, engine);
        judgement.open |= other.is_some() || amd::saves_elsewhere(piece, &start);
        if let Some(way) = other
            && !judgement.differences.is_empty()
        {
            return Judgement::waive(Waiver::Amd(way));
        }
    }
    judgement
}

/// Whether a case goes over the end of a segment of 4 GiB and faults by one of these outcomes, before or after some of its
/// parts; or goes on at the segment's start and finds a selector there that is refused.
fn stops_at_end(piece: &Piece, start: &Start, outcomes: &[&[u8]]) -> bool {
    let faults = |record: &&[u8]| is_of_memory(quad(record, at::VECTOR));
    outcomes.iter().any(faults) && wraps(&piece.instruction, start)
}

fn compare(
    host: Host,
    piece: Option<&Piece>,
    start: &Start,
    native: &[u8],
    engine: &[u8],
) -> Judgement {
    // Some fault at it, and some go on at the segment's start.
    let stays = |piece: &Piece, record| {
        is_of_memory(quad(record, at::VECTOR)) && quad(record, at::RIP) == piece.ip
    };
    if let Some(piece) = piece
        && stops_at_end(piece, start, &[native, engine])
        && !(stays(piece, native) && stays(piece, engine))
    {
        return Judgement::waive(Waiver::SegmentEnd);
    }
    let scope = Scope::of(piece, start, native, engine);
    let mut comparison = Comparison {
        native,
        engine,
        found: Judgement {
            open: scope.over_end,
            ..Judgement::default()
        },
    };
    let length_first = quad(native, at::VECTOR) == 13
        && quad(native, at::ERROR) == 0
        && quad(engine, at::VECTOR) == 6;
    if length_first && piece.is_some_and(|piece| piece.undefined) {
        comparison.found.waived.insert(Waiver::Decoding);
    } else {
        comparison.fault(&scope);
    }
    comparison.word("RIP", at::RIP);
    comparison.masked("RFLAGS", at::FLAGS, scope.flags.0, scope.flags.1);
    comparison.word("FS base", at::BASES);
    comparison.word("GS base", at::BASES + 8);
    for (index, name) in ["DS", "ES", "FS", "GS"].into_iter().enumerate() {
        let selector = |record: &[u8]| quad(record, at::SELECTORS) >> (index * 16) & 0xffff;
        let both = [selector(native), selector(engine)];
        if both[0] != both[1] && both.iter().all(|selector| *selector < 4) {
            comparison.found.waived.insert(Waiver::NullSelector);
        } else {
            comparison.values(name, both[0], both[1]);
        }
    }
    comparison.word("SS", at::STACK_SEGMENT);
    let fault = quad(native, at::VECTOR) != vector::NONE;
    if fault {
        comparison.word("CS", at::CODE_SEGMENT);
    }
    let compatibility = fault && quad(native, at::CODE_SEGMENT) == 0x23;
    for (register, name) in REGISTERS.into_iter().enumerate() {
        let (mut ignored, mut waiver) = (scope.registers[register], scope.result);
        if compatibility {
            ignored |= !0xffff_ffff;
            waiver = Waiver::UpperHalves;
        }
        comparison.masked(name, at::GPR + register * 8, ignored, waiver);
    }
    comparison.vectors(host, &scope);
    let mut at = at::MEMORY;
    for window in start.windows {
        comparison.memory(window, at, scope.memory);
        at += window.length() as usize;
    }
    comparison.found
}

/// Whether a memory operand of 32-bit code goes over the end of its segment.
fn wraps(instruction: &Instruction, start: &Start) -> bool {
    let flat = Start {
        bases: [0; 2],
        ..start.clone()
    };
    start.compatibility
        && operand_range(instruction, &flat).is_some_and(|(offset, bytes)| offset + bytes > 1 << 32)
}

/// Names of the general registers.
pub const REGISTERS: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
    "R14", "R15",
];

/// x87, SSE and AVX state with initial values where a component is not in use.
pub(crate) fn expanded(record: &[u8]) -> [u8; XSAVE_BYTES] {
    let mut image = [0; XSAVE_BYTES];
    image.copy_from_slice(&record[at::XSAVE..][..XSAVE_BYTES]);
    let components = image[512];
    if components & 1 == 0 {
        image[..24].fill(0);
        image[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        image[32..160].fill(0);
    }
    if components & 2 == 0 {
        image[160..416].fill(0);
    }
    if components & 4 == 0 {
        image[576..].fill(0);
    }
    image
}

/// x87 registers by their numbers, which do not depend on TOP.
fn by_number(image: &mut [u8; XSAVE_BYTES]) {
    let top = usize::from(image[3] >> 3 & 7);
    image[3] &= !0x38;
    image[32..160].rotate_right(top * 16);
}

impl Comparison<'_> {
    fn vectors(&mut self, host: Host, scope: &Scope) {
        let images = at::XSAVE..at::MEMORY;
        if scope.over_end || self.native[images.clone()] == self.engine[images] {
            return;
        }
        let residue = scope.residue;
        let both = [expanded(self.native), expanded(self.engine)];
        let [native, engine] = both.map(|mut image| {
            if residue.precision {
                image[24] &= !0x20;
            }
            if residue.top {
                by_number(&mut image);
            }
            if residue.noted {
                image[24] &= !0x3f;
            }
            image
        });
        if both[0][24] != both[1][24] && native[24] == engine[24]
            || both[0][3] != both[1][3] && native[3] == engine[3]
        {
            self.found.waived.insert(Waiver::Residue);
        }
        let mut differing = |name: &str, from: usize, length: usize| {
            let (native, engine) = (&native[from..from + length], &engine[from..from + length]);
            if native != engine {
                let (ours, natively) = (hexadecimal(engine), hexadecimal(native));
                self.found
                    .differences
                    .push(format!("{name} {ours}, natively {natively}"));
            }
        };
        differing("FCW", 0, 2);
        differing("FSW", 2, 2);
        differing("FTW", 4, 2);
        let last_operand = !scope.x87 || host.fdp_on_exceptions;
        if last_operand {
            differing("FOP", 6, 2);
            differing("FDP", 16, 8);
        }
        differing("FIP", 8, 8);
        differing("MXCSR", 24, 4);
        differing("MXCSR_MASK", 28, 4);
        for register in 0..8 {
            // The rest is reserved.
            differing(&format!("ST({register})"), 32 + register * 16, 16);
        }
        for register in 0..16 {
            differing(&format!("XMM{register}"), 160 + register * 16, 16);
            differing(
                &format!("YMM{register}, upper half"),
                576 + register * 16,
                16,
            );
        }
        // What XSTATE_BV says was seen to in `expanded`: whether a component with initial values is in use is the
        // processor's choice (SDM vol. 1, 13.6).
        differing("the image's reserved bytes", 416, 96);
        differing("the image's header behind XSTATE_BV", 520, 56);
        if !last_operand && (native[6..8] != engine[6..8] || native[16..24] != engine[16..24]) {
            self.found.waived.insert(Waiver::LastOperand);
        }
    }
}

/// Bytes as a number, the highest first.
pub fn hexadecimal(bytes: &[u8]) -> String {
    let mut text = String::from("0x");
    for byte in bytes.iter().rev() {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// A case for a person: what it started from.
pub fn describe(input: &[u8]) -> String {
    let start = Start::read(input);
    let mut text = String::new();
    for (name, value) in REGISTERS.iter().zip(start.gpr) {
        let _ = write!(text, "{name}={value:#x} ");
    }
    let _ = write!(
        text,
        "RFLAGS={:#x} FS={:#x} GS={:#x}\n    FCW={} FSW={} FTW={} MXCSR={} components={}",
        start.flags & rflags::DEFINED,
        start.bases[0],
        start.bases[1],
        hexadecimal(&input[at::XSAVE..][..2]),
        hexadecimal(&input[at::XSAVE + 2..][..2]),
        hexadecimal(&input[at::XSAVE + 4..][..1]),
        hexadecimal(&input[at::XSAVE + 24..][..4]),
        input[at::XSAVE + 512],
    );
    let mut at = at::MEMORY;
    for window in start.windows {
        let length = window.length() as usize;
        if length != 0 {
            let bytes: String = input[at..at + length]
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            let _ = write!(text, "\n    {:#x}: {bytes}", window.address);
        }
        at += length;
    }
    text
}

#[cfg(test)]
mod tests;
