//! Which instructions the built images consist of.
//!
//! A guest that uses x87, MMX or SSE in ring 0 cannot run where supervisor code is emulated (a KVM
//! without virtualization hardware), and compiled code could use them anywhere. So each image is
//! disassembled: compiled functions from their first byte to their last, assembly along its flow.

use std::collections::BTreeSet;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

use crate::{Program, TARGET, all};

const SYMBOL_TABLE: u32 = 2;
const FUNCTION: u8 = 2;
const NO_TYPE: u8 = 0;
const EXECUTABLE: u64 = 4;

/// Names of data, and of places.
const NOT_CODE: &[&str] = &[
    "bss_end",
    "bss_start",
    "entry_gdt",
    "entry_gdt_pointer",
    "image_end",
];

/// The functions that are allowed to use the coprocessor's registers.
const MARKED: &[(&str, &[&str])] = &[
    ("bench", &["vector"]),
    // In ring 3.
    ("chain", &["ring3_visit"]),
    ("hostile", &["save_and_restore", "vectors", "wide5xsave"]),
];

/// The program that is about them: all of its functions may.
const SUBJECT: &str = "coprocessor";

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn half(bytes: &[u8], at: usize) -> usize {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()).into()
}

#[derive(Debug)]
struct Section {
    kind: u32,
    flags: u64,
    address: u64,
    offset: usize,
    size: usize,
    link: usize,
}

#[derive(Debug)]
struct Symbol<'a> {
    name: &'a str,
    kind: u8,
    section: usize,
    address: u64,
    size: u64,
}

struct Image<'a> {
    bytes: &'a [u8],
    sections: Vec<Section>,
    symbols: Vec<Symbol<'a>>,
}

impl<'a> Image<'a> {
    fn new(bytes: &'a [u8]) -> Image<'a> {
        let table = long(bytes, 40) as usize;
        let sections: Vec<Section> = (0..half(bytes, 60))
            .map(|index| {
                let at = table + index * 64;
                Section {
                    kind: word(bytes, at + 4),
                    flags: long(bytes, at + 8),
                    address: long(bytes, at + 16),
                    offset: long(bytes, at + 24) as usize,
                    size: long(bytes, at + 32) as usize,
                    link: word(bytes, at + 40) as usize,
                }
            })
            .collect();
        let table = sections
            .iter()
            .find(|section| section.kind == SYMBOL_TABLE)
            .expect("the images keep their symbols");
        let names = &bytes[sections[table.link].offset..];
        let symbols = (table.offset..table.offset + table.size)
            .step_by(24)
            .map(|at| {
                let name = &names[word(bytes, at) as usize..];
                let end = name.iter().position(|&byte| byte == 0).unwrap();
                Symbol {
                    name: std::str::from_utf8(&name[..end]).unwrap(),
                    kind: bytes[at + 4] & 0xF,
                    section: half(bytes, at + 6),
                    address: long(bytes, at + 8),
                    size: long(bytes, at + 16),
                }
            })
            .collect();
        Image {
            bytes,
            sections,
            symbols,
        }
    }

    fn address_of(&self, name: &str) -> Option<u64> {
        let symbol = self.symbols.iter().find(|symbol| symbol.name == name)?;
        Some(symbol.address)
    }

    /// The symbols that name 64-bit code.
    fn code(&self) -> impl Iterator<Item = &Symbol<'a>> {
        // The tour through the modes is code of all sizes, written by hand.
        let tour =
            self.address_of("tour_begin").unwrap_or(0)..=self.address_of("tour_end").unwrap_or(0);
        // The way into long mode is 32-bit code, see `code_before_long_mode`.
        let entry = 0..self.address_of("entered_long").unwrap();
        self.symbols.iter().filter(move |symbol| {
            let executable = self
                .sections
                .get(symbol.section)
                .is_some_and(|section| section.flags & EXECUTABLE != 0);
            executable
                && [FUNCTION, NO_TYPE].contains(&symbol.kind)
                && !symbol.name.is_empty()
                && !NOT_CODE.contains(&symbol.name)
                && !tour.contains(&symbol.address)
                && !entry.contains(&symbol.address)
        })
    }

    /// `None` outside of the code that is in the file: guests write some.
    fn bytes_from(&self, address: u64) -> Option<&'a [u8]> {
        let section = self.sections.iter().find(|section| {
            section.flags & EXECUTABLE != 0
                && (section.address..section.address + section.size as u64).contains(&address)
        })?;
        let skipped = (address - section.address) as usize;
        Some(&self.bytes[section.offset + skipped..section.offset + section.size])
    }

    fn straight(&self, from: u64, to: u64, bits: u32, visit: &mut impl FnMut(&Instruction)) {
        let bytes = &self.bytes_from(from).unwrap()[..(to - from) as usize];
        for instruction in Decoder::with_ip(bits, bytes, from, DecoderOptions::NONE) {
            visit(&instruction);
        }
    }

    /// Visits what can be reached from `start` without leaving through a register.
    fn along_its_flow(
        &self,
        start: u64,
        bits: u32,
        seen: &mut BTreeSet<u64>,
        visit: &mut impl FnMut(&Instruction),
    ) {
        let mut starts = vec![start];
        while let Some(start) = starts.pop() {
            let Some(bytes) = self.bytes_from(start) else {
                continue;
            };
            for instruction in Decoder::with_ip(bits, bytes, start, DecoderOptions::NONE) {
                if instruction.is_invalid() || !seen.insert(instruction.ip()) {
                    break;
                }
                visit(&instruction);
                if instruction.near_branch_target() != 0 {
                    starts.push(instruction.near_branch_target());
                }
                if matches!(
                    instruction.flow_control(),
                    FlowControl::UnconditionalBranch
                        | FlowControl::IndirectBranch
                        | FlowControl::Return
                        | FlowControl::Exception
                ) {
                    break;
                }
            }
        }
    }
}

fn uses_coprocessor(instruction: &Instruction) -> bool {
    use CpuidFeature as Feature;
    // They move a system register and touch no state of the coprocessor.
    if matches!(instruction.mnemonic(), Mnemonic::Xgetbv | Mnemonic::Xsetbv) {
        return false;
    }
    // WAIT came with the 8086, before there was a coprocessor to ask for.
    instruction.mnemonic() == Mnemonic::Wait
        || instruction.cpuid_features().iter().any(|feature| {
            matches!(
                feature,
                Feature::FPU
                    | Feature::FPU287
                    | Feature::FPU387
                    | Feature::MMX
                    | Feature::FXSR
                    | Feature::XSAVE
                    | Feature::SSE
                    | Feature::SSE2
                    | Feature::SSE3
                    | Feature::SSSE3
                    | Feature::SSE4_1
                    | Feature::SSE4_2
                    | Feature::AVX
            )
        })
}

/// The names of the functions that use x87, MMX or SSE, and how many instructions were looked at.
fn users(program: &Program) -> (BTreeSet<String>, usize) {
    let image = Image::new(program.image);
    let mut users = BTreeSet::new();
    let mut looked_at = 0;
    let mut seen = BTreeSet::new();
    for symbol in image.code() {
        let mut visit = |instruction: &Instruction| {
            looked_at += 1;
            if uses_coprocessor(instruction) {
                users.insert(symbol.name.to_owned());
            }
        };
        if symbol.kind == FUNCTION {
            let end = symbol.address + symbol.size;
            image.straight(symbol.address, end, 64, &mut visit);
        } else if symbol.name.ends_with("_user_page") {
            image.straight(symbol.address, symbol.address + 4096, 64, &mut visit);
        } else {
            // Pieces of virtual-8086 code are named so.
            let bits = if symbol.name.starts_with("v_") {
                16
            } else {
                64
            };
            image.along_its_flow(symbol.address, bits, &mut seen, &mut visit);
        }
    }
    let [entry, long_mode] =
        ["pvh_entry", "entered_long"].map(|name| image.address_of(name).unwrap());
    image.straight(entry, long_mode, 32, &mut |instruction| {
        looked_at += 1;
        assert!(!uses_coprocessor(instruction));
    });
    (users, looked_at)
}

#[test]
fn guests_use_x87_and_sse_only_where_they_say_so() {
    if TARGET != "x86_64-unknown-none" {
        eprintln!(
            "skipped: the guests are built for {TARGET}, whose core library uses SSE; \
             fix: `rustup target add x86_64-unknown-none`, then `touch guests/build.rs`"
        );
        return;
    }
    for program in all() {
        let (users, looked_at) = users(program);
        assert!(looked_at > 2000, "{}: {looked_at}", program.name);
        if program.name == SUBJECT {
            assert!(program.uses_coprocessor());
            assert!(users.len() > 40, "{users:?}");
            continue;
        }
        let marked = MARKED
            .iter()
            .find(|(name, _)| *name == program.name)
            .map_or(&[][..], |(_, functions)| functions);
        let in_ring_0 = marked
            .iter()
            .any(|function| !function.starts_with("ring3_"));
        assert_eq!(program.uses_coprocessor(), in_ring_0, "{}", program.name);
        assert_eq!(users.len(), marked.len(), "{}: {users:?}", program.name);
        for user in &users {
            assert!(
                marked.iter().any(|function| user.contains(function)),
                "{}: {user} is not marked",
                program.name
            );
        }
    }
}

/// The test above would find them.
#[test]
fn coprocessor_instructions_are_recognised() {
    for (bytes, expected) in [
        (&[0x0F, 0x58, 0xC0][..], true), // addps xmm0, xmm0
        (&[0x0F, 0x11, 0x07], true),     // movups [rdi], xmm0
        (&[0xD9, 0xE8], true),           // fld1
        (&[0x9B], true),                 // wait
        (&[0x0F, 0xAE, 0x07], true),     // fxsave [rdi]
        (&[0x0F, 0xEF, 0xC0], true),     // pxor mm0, mm0
        (&[0x48, 0x01, 0xC0], false),    // add rax, rax
        (&[0xF3, 0xA4], false),          // rep movsb
    ] {
        let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        assert_eq!(uses_coprocessor(&instruction), expected, "{instruction:?}");
    }
}
