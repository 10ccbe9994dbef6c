//! What the host CPU's outcome says about an engine's.

use std::fmt::Write;

use iced_x86::{Mnemonic, OpKind};
use trapgate_x86::registers::rflags;

use crate::cases::Piece;
use crate::layout::{record as at, vector};
use crate::record::{Start, XSAVE_BYTES, quad};
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
    /// The destination is undefined.
    result: bool,
    /// It gives a random number.
    random: bool,
    /// The x87 pointers are those of this instruction.
    x87: bool,
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
    if native[..at::MEMORY] == engine[..at::MEMORY]
        && native[at::MEMORY..memory] == engine[at::MEMORY..memory]
    {
        return Vec::new();
    }
    let mut found = Vec::new();
    let kind = quad(native, at::VECTOR);
    let fault = kind != vector::NONE;
    let scope = match piece {
        Some(piece) => {
            let instruction = &piece.instruction;
            // A fault comes before any flag changes.
            let at_itself = fault && quad(native, at::RIP) == piece.ip;
            Scope {
                undefined: if at_itself {
                    0
                } else {
                    undefined::flags(instruction, &start.gpr)
                },
                result: !at_itself && undefined::result(instruction, &start.gpr),
                random: matches!(instruction.mnemonic(), Mnemonic::Rdrand | Mnemonic::Rdseed),
                x87: instruction.mnemonic() as u32 != 0
                    && (format!("{:?}", instruction.mnemonic()).starts_with('F')),
            }
        }
        None => Scope {
            undefined: 0,
            result: false,
            random: false,
            x87: true,
        },
    };
    let address = quad(native, at::ADDRESS);
    let order = piece.is_some_and(|piece| undefined::order(&piece.instruction));
    let others = quad(engine, at::VECTOR);
    // So is what an access does that goes over the end of a segment of 4 GiB (SDM vol. 3A, 6.3).
    let wraps = start.compatibility && address.max(quad(engine, at::ADDRESS)) >> 4 == 0xfff_ffff;
    if (order || wraps) && undefined::either([kind, others]) {
        // Which of several faults comes first is the CPU's choice.
        return found;
    }
    let mut word = |name: &str, at: usize, ignored: u64| {
        let (native, engine) = (quad(native, at) & !ignored, quad(engine, at) & !ignored);
        if native != engine {
            found.push(format!("{name} {engine:#x}, natively {native:#x}"));
        }
    };
    word("vector", at::VECTOR, 0);
    word("RIP", at::RIP, 0);
    // Linux tells programs that all pages of the upper half are present.
    let hidden = u64::from(kind == 14 && address >= PROGRAMS_END);
    // Several parts, on several pages.
    let distance = address.wrapping_sub(quad(engine, at::ADDRESS)) as i32;
    let by_parts = order && kind == 14 && distance.unsigned_abs() < 1024;
    word("address", at::ADDRESS, if by_parts { u64::MAX } else { 0 });
    word("error code", at::ERROR, hidden | u64::from(by_parts));
    word(
        "RFLAGS",
        at::FLAGS,
        scope.undefined | if scope.random { rflags::ARITHMETIC } else { 0 },
    );
    word("FS base", at::BASES, 0);
    word("GS base", at::BASES + 8, 0);
    for (index, name) in ["DS", "ES", "FS", "GS"].into_iter().enumerate() {
        // A null selector with an RPL becomes 0 whenever the host's kernel returns from an interrupt
        // (SDM vol. 2A, IRET, RETURN-TO-OUTER-PRIVILEGE-LEVEL).
        let selector = |record: &[u8]| match quad(record, at::SELECTORS) >> (index * 16) & 0xffff {
            0..=3 => 0,
            other => other,
        };
        let (native, engine) = (selector(native), selector(engine));
        if native != engine {
            found.push(format!("{name} {engine:#x}, natively {native:#x}"));
        }
    }
    let mut word = |name: &str, at: usize, ignored: u64| {
        let (native, engine) = (quad(native, at) & !ignored, quad(engine, at) & !ignored);
        if native != engine {
            found.push(format!("{name} {engine:#x}, natively {native:#x}"));
        }
    };
    if fault {
        word("CS", at::CODE_SEGMENT, 0);
    }
    let compatibility = fault && quad(native, at::CODE_SEGMENT) == 0x23;
    for (register, name) in REGISTERS.into_iter().enumerate() {
        let destination = piece.is_some_and(|piece| {
            let instruction = &piece.instruction;
            instruction.op_kind(0) == OpKind::Register
                && instruction.op_register(0).full_register().number() == register
        });
        let ignored = if destination && (scope.result || scope.random) {
            u64::MAX
        } else if compatibility {
            // What upper halves are after a change of mode is undefined (SDM vol. 1, 3.4.1.1).
            !0xffff_ffff
        } else {
            0
        };
        word(name, at::GPR + register * 8, ignored);
    }
    let mxcsr = quad(input, at::XSAVE + 24) as u32;
    let residue = match piece {
        Some(piece) if fault => undefined::residue(&piece.instruction, mxcsr, kind),
        _ => Residue::default(),
    };
    vectors(host, scope.x87, residue, native, engine, &mut found);
    let mut at = at::MEMORY;
    for window in start.windows {
        let length = window.length() as usize;
        if !residue.memory {
            memory_differences(
                window.address,
                &native[at..at + length],
                &engine[at..at + length],
                &scope,
                &mut found,
            );
        }
        at += length;
    }
    found
}

/// Names of the general registers.
pub const REGISTERS: [&str; 16] = [
    "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
    "R14", "R15",
];

fn memory_differences(
    address: u64,
    native: &[u8],
    engine: &[u8],
    scope: &Scope,
    found: &mut Vec<String>,
) {
    if native == engine || scope.result {
        return;
    }
    let mut text = String::new();
    let mut some = 0;
    for (index, (native, engine)) in native.chunks(8).zip(engine.chunks(8)).enumerate() {
        if native != engine {
            some += 1;
            if some <= 6 {
                let _ = write!(
                    text,
                    " {:#x}: {engine:02x?}, natively {native:02x?};",
                    address + index as u64 * 8
                );
            }
        }
    }
    found.push(format!("memory at{text}"));
}

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

fn vectors(
    host: Host,
    x87: bool,
    residue: Residue,
    native: &[u8],
    engine: &[u8],
    found: &mut Vec<String>,
) {
    if native[at::XSAVE..at::MEMORY] == engine[at::XSAVE..at::MEMORY] {
        return;
    }
    let (mut native, mut engine) = (expanded(native), expanded(engine));
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
            found.push(format!(
                "{name} {}, natively {}",
                hexadecimal(engine),
                hexadecimal(native)
            ));
        }
    };
    part("FCW", 0, 2);
    part("FSW", 2, 2);
    part("FTW", 4, 2);
    if !x87 || host.fdp_on_exceptions {
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
    }
    for register in 0..16 {
        part(
            &format!("YMM{register}, upper half"),
            576 + register * 16,
            16,
        );
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
