//! Instructions that the guest's processor does not have: all raise #UD, and nothing of them is done.
//!
//! They lie in pieces of 16 bytes, one behind the other, in a page of ring 3. The handler of #UD goes on at the next piece;
//! everything else ends the run: the HLT that fills a piece, at which an instruction that was executed would come
//! (#GP in ring 3), any other exception, and the HLT after the last piece.

use std::sync::Arc;

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction};
use trapgate_engine::{Exit, NoDevices, Vcpu};
use trapgate_interp::Interpreter;
use trapgate_jit::{Lockstep, Translating};
use trapgate_memory::GuestMemory;
use trapgate_x86::descriptor::{access, system};
use trapgate_x86::profile::Level;
use trapgate_x86::registers::sreg;
use trapgate_x86::{CpuProfile, CpuState, Segment};

use crate::guest::{CODE, Random, TABLES, memory, state};

const IDT: u64 = 0x1_0000;
const GDT: u64 = 0x1_1000;
const TSS: u64 = 0x1_2000;
/// Where handlers begin, 16 bytes each.
const HANDLERS: u64 = 0x1_3000;
/// Top of ring 0's stack.
const STACK: u64 = 0x1_6000;
const PIECE: usize = 16;
const PIECES: usize = 4096 / PIECE - 1;
const HLT: u8 = 0xf4;

const CODE0: u16 = 0x08;
const CODE3_32: u16 = 0x1b;
const DATA3: u16 = 0x23;
const CODE3_64: u16 = 0x2b;

/// Features that a processor of level v3 lacks, by how their names begin. (Instructions of some of these are hints on
/// processors that lack them, and are no cases here.)
const ABSENT: &[&str] = &[
    "AVX512",
    "AVX_VNNI",
    "AVX_IFMA",
    "AVX_NE",
    "AMX",
    "XOP",
    "FMA4",
    "TBM",
    "D3NOW",
    "SSE4A",
    "SHA",
    "SM3",
    "SM4",
    "VAES",
    "VPCLMULQDQ",
    "GFNI",
    "MOVDIR",
    "ENQCMD",
    "SERIALIZE",
    "UINTR",
    "KL",
    "AESKLE",
    "WIDE_KL",
    "SVM",
    "SKINIT",
    "VMX",
    "SMX",
    "MSRLIST",
    "WRMSRNS",
    "CMPCCXADD",
    "RAO_INT",
    "PADLOCK",
    "CYRIX",
    "CL_INVMB",
    "LWP",
    "CLZERO",
    "MONITORX",
    "WAITPKG",
    "PCONFIG",
    "HRESET",
    "PTWRITE",
    "TSXLDTRK",
    "INVLPGB",
    "SNP",
    "SEV",
    "FRED",
    "LKGS",
    "MCOMMIT",
    "RDPRU",
];

fn is_absent(feature: CpuidFeature) -> bool {
    let name = format!("{feature:?}");
    ABSENT.iter().any(|begin| name.starts_with(begin))
}

/// Whether a processor of level v3 does not know what these bytes begin with, in code of so many bits.
fn is_undefined(bytes: &[u8], bits: u32, instruction: &mut Instruction) -> bool {
    let mut decoder = Decoder::new(bits, bytes, DecoderOptions::NONE);
    decoder.decode_out(instruction);
    if instruction.is_invalid() {
        return decoder.last_error() == iced_x86::DecoderError::InvalidInstruction;
    }
    instruction
        .code()
        .cpuid_features()
        .iter()
        .copied()
        .any(is_absent)
}

/// All encodings of interest: opcodes, prefixes that choose instructions, and ModRM's register field, with a
/// register and with memory as the other operand.
fn encodings() -> Vec<Vec<u8>> {
    let mut list = Vec::new();
    let modrm = || (0..8u8).flat_map(|reg| [reg << 3, 0xc0 | reg << 3 | 1]);
    for map in [&[][..], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]] {
        for prefix in [
            &[][..],
            &[0x66],
            &[0xf3],
            &[0xf2],
            &[0x48],
            &[0x66, 0x48],
            &[0xf0],
        ] {
            for opcode in 0..=255 {
                list.extend(modrm().map(|modrm| [prefix, map, &[opcode, modrm]].concat()));
            }
        }
    }
    for last in 0..=255 {
        list.extend(modrm().map(|modrm| vec![0x0f, 0x0f, modrm, last]));
    }
    for second in 0..=255u8 {
        // Two bytes of VEX: all that it may say but for the register.
        for opcode in (0..=255).filter(|_| second >> 3 & 7 == 7) {
            list.extend([0, 0xc1].map(|modrm| vec![0xc5, second, opcode, modrm]));
        }
    }
    for (escape, maps) in [(0xc4, 0..32u8), (0x8f, 8..32)] {
        for map in maps {
            for last in [0x78, 0x79, 0x7a, 0x7b, 0x7c, 0xf8, 0xf9, 0xfd, 0x00] {
                // Maps that nobody has are looked at here and there.
                let step = if map < 4 || (8..11).contains(&map) {
                    1
                } else {
                    37
                };
                for opcode in (0..=255).step_by(step) {
                    let bytes = |modrm| vec![escape, 0xe0 | map, last, opcode, modrm];
                    list.extend([0x00, 0x09, 0xc1, 0xf9].map(bytes));
                }
            }
        }
    }
    for map in 0..8u8 {
        for (second, third) in [
            (0x7c, 0x08),
            (0x7d, 0x28),
            (0xfe, 0x48),
            (0x7f, 0x18),
            (0xfd, 0xc9),
            (0x74, 0x00),
        ] {
            for opcode in 0..=255 {
                list.extend(
                    [0x00, 0xc1].map(|modrm| vec![0x62, 0xf0 | map, second, third, opcode, modrm]),
                );
            }
        }
    }
    list
}

fn level(access: u32, level: u32) -> u32 {
    access | level << access::DPL_SHIFT
}

/// Memory with page tables, descriptor tables and handlers.
fn prepared() -> Arc<GuestMemory> {
    let memory = memory();
    let put = |gpa: u64, value: u64| memory.write(gpa, &value.to_le_bytes()).unwrap();
    put(TABLES, (TABLES + 0x1000) | 7);
    put(TABLES + 0x1000, (TABLES + 0x2000) | 7);
    put(TABLES + 0x2000, (TABLES + 0x3000) | 7);
    for page in 0..256 {
        put(TABLES + 0x3000 + page * 8, page << 12 | 7);
    }
    for vector in 0..32 {
        let handler = HANDLERS + vector * 16;
        let gate =
            handler & 0xffff | u64::from(CODE0) << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48;
        put(IDT + vector * 16, gate);
        memory.write(handler, &[HLT]).unwrap();
    }
    // #UD: add qword ptr [rsp], 16; iretq
    let next = [0x48, 0x83, 0x04, 0x24, 16, 0x48, 0xcf];
    memory.write(HANDLERS + 6 * 16, &next).unwrap();
    let code = |access: u32| u64::from(access) << 40 | 0xf_0000_0000_ffff;
    let plain = access::P | access::S | access::ACCESSED;
    put(
        GDT + 0x08,
        code(plain | access::CODE | access::READABLE | access::L | access::G),
    );
    put(
        GDT + 0x18,
        code(level(
            plain | access::CODE | access::READABLE | access::DB | access::G,
            3,
        )),
    );
    put(
        GDT + 0x20,
        code(level(plain | access::WRITABLE | access::DB | access::G, 3)),
    );
    put(
        GDT + 0x28,
        code(level(
            plain | access::CODE | access::READABLE | access::L | access::G,
            3,
        )),
    );
    put(TSS + 4, STACK);
    memory
}

/// A processor in ring 3, at the first piece.
fn in_ring_3(bits: u32) -> CpuState {
    let mut state = state(&mut Random(1));
    let system = &mut state.system;
    let data = level(access::WRITABLE | access::DB, 3);
    system.segments = [Segment::flat(DATA3, data); 6];
    let (selector, size) = if bits == 64 {
        (CODE3_64, access::L)
    } else {
        (CODE3_32, access::DB)
    };
    system.segments[sreg::CS] =
        Segment::flat(selector, level(access::CODE | access::READABLE | size, 3));
    (system.gdtr.base, system.gdtr.limit) = (GDT, 0x2f);
    (system.idtr.base, system.idtr.limit) = (IDT, 0x1ff);
    system.tr = Segment {
        selector: 0x30,
        base: TSS,
        limit: 0x67,
        access: access::P | system::TSS_BUSY,
    };
    // Memory operands lead somewhere, so that nothing but #UD stops what should not run.
    state.gpr = [0x2_0000; 16];
    state.rip = CODE;
    state
}

/// Runs pieces of code; gives the first that did something else than raise #UD, and what that was.
fn first_executed(
    vcpu: &mut dyn Vcpu,
    memory: &GuestMemory,
    start: &CpuState,
    pieces: &[Vec<u8>],
) -> Option<(usize, String)> {
    let mut page = [HLT; 4096];
    for (piece, bytes) in page.chunks_mut(PIECE).zip(pieces) {
        piece[..bytes.len()].copy_from_slice(bytes);
    }
    memory.write(CODE, &page).unwrap();
    vcpu.set_state(start).unwrap();
    let exit = vcpu.run();
    let state = vcpu.state();
    let mut frame = [0; 16];
    memory.read(STACK - 48, &mut frame).unwrap();
    let [error, rip] = [0, 8].map(|at| u64::from_le_bytes(frame[at..at + 8].try_into().unwrap()));
    let vector = state.rip.wrapping_sub(HANDLERS) / 16;
    let end = CODE + (pieces.len() * PIECE) as u64;
    if exit == Exit::Halted && vector == 13 && rip == end {
        return None;
    }
    // Where exceptions without an error code have RIP.
    memory.read(STACK - 40, &mut frame).unwrap();
    let piece = (rip.saturating_sub(CODE) as usize / PIECE).min(pieces.len() - 1);
    Some((
        piece,
        format!("{exit:?}, vector {vector}, error {error:#x}, rip {rip:#x}"),
    ))
}

/// ANDN, MULX, ADCX, ADOX, and what needs registers that such a processor does not have: VADDPS, VFMADD231PS, VCVTPH2PS.
#[test]
fn instructions_of_level_v3_are_undefined_at_level_v2() {
    let pieces: Vec<Vec<u8>> = [
        &[0xc4, 0xe2, 0x70, 0xf2, 0xc2][..],
        &[0xc4, 0xe2, 0x73, 0xf6, 0xc2],
        &[0x66, 0x0f, 0x38, 0xf6, 0xc1],
        &[0xf3, 0x0f, 0x38, 0xf6, 0xc1],
        &[0xc5, 0xf0, 0x58, 0xc2],
        &[0xc4, 0xe2, 0x71, 0xb8, 0xc2],
        &[0xc4, 0xe2, 0x79, 0x13, 0xc1],
    ]
    .map(<[u8]>::to_vec)
    .to_vec();
    let profile = CpuProfile::new(Level::V2, 1_000_000_000);
    let [left, right] = [(); 2].map(|()| prepared());
    let mut interp = Interpreter::new(
        Arc::clone(&left),
        Box::new(NoDevices),
        profile.clone(),
        0,
        1,
    );
    let mut jit = Translating::new(Arc::clone(&right), Box::new(NoDevices), profile, 0, 1).unwrap();
    for bits in [64, 32] {
        let mut start = in_ring_3(bits);
        start.system.xcr0 = 3;
        start.xsave.0[512] = 3;
        assert_eq!(first_executed(&mut interp, &left, &start, &pieces), None);
        assert_eq!(first_executed(&mut jit, &right, &start, &pieces), None);
    }
}

#[test]
fn every_undefined_instruction_raises_ud() {
    // One of so many, unless all are asked for.
    let step = if std::env::var_os("TRAPGATE_LONG").is_some() {
        1
    } else {
        5
    };
    let profile = CpuProfile::new(Level::V3, 1_000_000_000);
    let all = encodings();
    for bits in [64, 32] {
        let mut instruction = Instruction::default();
        let cases: Vec<Vec<u8>> = all
            .iter()
            .step_by(step)
            .filter(|bytes| {
                let mut padded = [HLT; 15];
                padded[..bytes.len()].copy_from_slice(bytes);
                is_undefined(&padded, bits, &mut instruction)
            })
            .cloned()
            .collect();
        assert!(
            cases.len() > 50_000 / step,
            "{} cases of {bits} bits",
            cases.len()
        );
        println!(
            "{} undefined encodings of {} in {bits}-bit code",
            cases.len(),
            all.len() / step
        );
        let memories = [(); 3].map(|()| prepared());
        let [a, b, c] = memories.each_ref().map(Arc::clone);
        let mut interp = Interpreter::new(a, Box::new(NoDevices), profile.clone(), 0, 1);
        let mut jit = Translating::new(b, Box::new(NoDevices), profile.clone(), 0, 1).unwrap();
        let mut lockstep = Lockstep::new(c, Box::new(NoDevices), profile.clone(), 0, 1).unwrap();
        let vcpus: [(&str, &mut dyn Vcpu); 3] = [
            ("interpreter", &mut interp),
            ("translator", &mut jit),
            ("lockstep", &mut lockstep),
        ];
        let mut wrong = Vec::new();
        for ((name, vcpu), memory) in vcpus.into_iter().zip(&memories) {
            // Lockstep runs both, and is slow.
            let part = if name == "lockstep" {
                cases.len() / 8
            } else {
                cases.len()
            };
            let mut left = &cases[..part];
            while !left.is_empty() && wrong.len() < 20 {
                let pieces = &left[..left.len().min(PIECES)];
                match first_executed(vcpu, memory, &in_ring_3(bits), pieces) {
                    None => left = &left[pieces.len()..],
                    Some((piece, what)) => {
                        wrong.push(format!(
                            "{name}, {bits} bits: {:02x?}: {what}",
                            pieces[piece]
                        ));
                        left = &left[piece + 1..];
                    }
                }
            }
        }
        assert!(
            wrong.is_empty(),
            "executed, or not #UD:\n{}",
            wrong.join("\n")
        );
    }
}
