//! What the host CPU's outcome says about an engine's.

use std::fmt::Write;
use std::ops::Range;

use iced_x86::{CpuidFeature, Mnemonic, OpKind};
use trapgate_x86::registers::rflags;

use crate::cases::Piece;
use crate::layout::{record as at, vector};
use crate::profile::memory_operand;
use crate::record::{Start, Window, XSAVE_BYTES, quad};
use crate::undefined::{self, Residue};

/// In what hosts are not alike.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// FDP and FOP are written when an unmasked exception is raised only, as in the profiles (CPUID.7.0:EBX bit 6).
    pub fdp_on_exceptions: bool,
}

impl Host {
    /// This host.
    pub fn new() -> Self {
        let features = std::arch::x86_64::__cpuid_count(7, 0);
        Self {
            fdp_on_exceptions: features.ebx >> 6 & 1 != 0,
        }
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

/// First address that is not a program's under Linux with four levels of tables.
const PROGRAMS_END: u64 = (1 << 47) - 4096;

/// What of an outcome counts.
struct Scope {
    /// Flags that are not compared.
    undefined: u64,
    /// The register whose value is undefined or random; no register's number if it is memory.
    result: Option<usize>,
    /// It may be an x87 instruction's address that the x87 pointers hold.
    x87: bool,
    /// Its accesses have no defined order.
    order: bool,
    /// What a fault leaves.
    residue: Residue,
}

impl Scope {
    /// Of one instruction, or of a program.
    fn of(piece: Option<&Piece>, start: &Start, native: &[u8]) -> Self {
        let Some(piece) = piece else {
            return Self {
                undefined: 0,
                result: None,
                x87: true,
                order: false,
                residue: Residue::default(),
            };
        };
        let instruction = &piece.instruction;
        let kind = quad(native, at::VECTOR);
        let fault = kind != vector::NONE;
        // A fault comes before any flag or register changes.
        let at_itself = fault && quad(native, at::RIP) == piece.ip;
        let random = matches!(instruction.mnemonic(), Mnemonic::Rdrand | Mnemonic::Rdseed);
        let undefined = match (at_itself, random) {
            (true, _) => 0,
            (false, true) => rflags::ARITHMETIC,
            (false, false) => undefined::flags(instruction, &start.gpr),
        };
        let result = random || !at_itself && undefined::result(instruction, &start.gpr);
        let residue = if fault {
            undefined::residue(instruction, start.mxcsr, kind)
        } else {
            Residue::default()
        };
        Self {
            undefined,
            result: result.then(|| match instruction.op_kind(0) {
                OpKind::Register => instruction.op_register(0).full_register().number(),
                // Memory.
                _ => usize::MAX,
            }),
            x87: instruction.cpuid_features().iter().any(|feature| {
                matches!(
                    feature,
                    CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387
                )
            }),
            order: undefined::order(instruction),
            residue,
        }
    }
}

/// Two outcomes side by side.
struct Comparison<'a> {
    native: &'a [u8],
    engine: &'a [u8],
    found: Vec<String>,
}

impl Comparison<'_> {
    fn values(&mut self, name: &str, native: u64, engine: u64) {
        if native != engine {
            self.found
                .push(format!("{name} {engine:#x}, natively {native:#x}"));
        }
    }

    fn word(&mut self, name: &str, at: usize, ignored: u64) {
        let (native, engine) = (quad(self.native, at), quad(self.engine, at));
        self.values(name, native & !ignored, engine & !ignored);
    }

    fn memory(&mut self, window: Window, at: usize) {
        let length = window.length() as usize;
        let (native, engine) = (&self.native[at..at + length], &self.engine[at..at + length]);
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
            self.found.push(format!("memory at{text}"));
        }
    }
}

/// Differences of an engine's outcome from the native one, a line for each. `piece` is `None` for programs.
pub fn differences(
    host: Host,
    piece: Option<&Piece>,
    input: &[u8],
    native: &[u8],
    engine: &[u8],
) -> Vec<String> {
    let start = Start::read(input);
    let memory = at::MEMORY + (start.windows[0].length() + start.windows[1].length()) as usize;
    let same = |part: Range<usize>| native[part.clone()] == engine[part];
    if same(0..at::MEMORY) && same(at::MEMORY..memory) {
        return Vec::new();
    }
    let scope = Scope::of(piece, &start, native);
    let kinds = [quad(native, at::VECTOR), quad(engine, at::VECTOR)];
    let addresses = [quad(native, at::ADDRESS), quad(engine, at::ADDRESS)];
    // Which of several faults comes first is the CPU's choice, and what an access does that goes over the end of a
    // segment of 4 GiB (SDM vol. 3A, 6.3).
    if piece.is_some_and(|piece| wraps(piece, &start)) {
        return Vec::new();
    }
    let ends = start.compatibility && addresses.iter().any(|address| address >> 4 == 0xfff_ffff);
    if (scope.order || ends) && undefined::either(kinds) {
        return Vec::new();
    }
    let mut comparison = Comparison {
        native,
        engine,
        found: Vec::new(),
    };
    comparison.word("vector", at::VECTOR, 0);
    comparison.word("RIP", at::RIP, 0);
    let page_fault = kinds[0] == 14;
    // Linux tells programs that all pages of the upper half are present.
    let hidden = page_fault && addresses[0] >= PROGRAMS_END;
    let distance = addresses[0].wrapping_sub(addresses[1]) as i32;
    let by_parts = scope.order && page_fault && distance.unsigned_abs() < 1024;
    let ignored = if by_parts { u64::MAX } else { 0 };
    comparison.word("address", at::ADDRESS, ignored);
    comparison.word("error code", at::ERROR, u64::from(hidden || by_parts));
    comparison.word("RFLAGS", at::FLAGS, scope.undefined);
    comparison.word("FS base", at::BASES, 0);
    comparison.word("GS base", at::BASES + 8, 0);
    for (index, name) in ["DS", "ES", "FS", "GS"].into_iter().enumerate() {
        // A null selector with an RPL becomes 0 whenever the host's kernel returns from an interrupt
        // (SDM vol. 2A, IRET, RETURN-TO-OUTER-PRIVILEGE-LEVEL).
        let selector = |record: &[u8]| match quad(record, at::SELECTORS) >> (index * 16) & 0xffff {
            0..=3 => 0,
            other => other,
        };
        comparison.values(name, selector(native), selector(engine));
    }
    let fault = kinds[0] != vector::NONE;
    if fault {
        comparison.word("CS", at::CODE_SEGMENT, 0);
    }
    let compatibility = fault && quad(native, at::CODE_SEGMENT) == 0x23;
    for (register, name) in REGISTERS.into_iter().enumerate() {
        let ignored = if scope.result == Some(register) {
            u64::MAX
        } else if compatibility {
            // What upper halves are after a change of mode is undefined (SDM vol. 1, 3.4.1.1).
            !0xffff_ffff
        } else {
            0
        };
        comparison.word(name, at::GPR + register * 8, ignored);
    }
    comparison.vectors(host, &scope);
    let mut at = at::MEMORY;
    for window in start.windows {
        if !scope.residue.memory && scope.result.is_none() {
            comparison.memory(window, at);
        }
        at += window.length() as usize;
    }
    comparison.found
}

/// Whether a memory operand of 32-bit code goes over the end of its segment.
fn wraps(piece: &Piece, start: &Start) -> bool {
    let instruction = &piece.instruction;
    let Some(operand) = memory_operand(instruction).filter(|_| start.compatibility) else {
        return false;
    };
    let offset = instruction.virtual_address(operand, 0, |register, _, _| {
        if register.is_segment_register() {
            return Some(0);
        }
        let value = start.gpr[register.full_register().number() & 15];
        Some(match register.size() {
            1 => value & 0xff,
            2 => value & 0xffff,
            _ => value & 0xffff_ffff,
        })
    });
    offset.is_some_and(|offset| offset as u32 > u32::MAX - 1024)
}

/// Names of the general registers.
pub const REGISTERS: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
    "R14", "R15",
];

/// x87, SSE and AVX state with initial values where a component is not in use.
fn expanded(record: &[u8]) -> [u8; XSAVE_BYTES] {
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

impl Comparison<'_> {
    fn vectors(&mut self, host: Host, scope: &Scope) {
        let images = at::XSAVE..at::MEMORY;
        if self.native[images.clone()] == self.engine[images] {
            return;
        }
        let residue = scope.residue;
        let (mut native, mut engine) = (expanded(self.native), expanded(self.engine));
        for image in [&mut native, &mut engine] {
            if residue.precision {
                image[24] &= !0x20;
            }
            if residue.top {
                image[3] &= !0x38;
                image[32..160].fill(0);
            }
            if residue.noted {
                image[24] &= !0x3f;
            }
        }
        let mut part = |name: &str, from: usize, length: usize| {
            let (native, engine) = (&native[from..from + length], &engine[from..from + length]);
            if native != engine {
                let (ours, natively) = (hexadecimal(engine), hexadecimal(native));
                self.found
                    .push(format!("{name} {ours}, natively {natively}"));
            }
        };
        part("FCW", 0, 2);
        part("FSW", 2, 2);
        part("FTW", 4, 2);
        if !scope.x87 || host.fdp_on_exceptions {
            part("FOP", 6, 2);
            part("FDP", 16, 8);
        }
        part("FIP", 8, 8);
        part("MXCSR", 24, 4);
        for register in 0..8 {
            part(&format!("ST({register})"), 32 + register * 16, 10);
        }
        for register in 0..16 {
            part(&format!("XMM{register}"), 160 + register * 16, 16);
            part(
                &format!("YMM{register}, upper half"),
                576 + register * 16,
                16,
            );
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
