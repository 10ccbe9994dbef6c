//! The handlers that are written out against the host CPU, which runs the same instructions as
//! thunks: registers, memory and all flags that the manual defines must agree.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, RflagsBits};
use trapgate_thunk::{Class, MemoryOperand, RegisterFile, ThunkCache};
use trapgate_x86::registers::rflags;

use crate::cpu::Cpu;
use crate::decode::decode;
use crate::op::Op;
use crate::testing::long_cpu;
use crate::vector::op_thunk;

/// A small generator; its seed is in the failure message.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Often a corner value.
    fn operand(&mut self) -> u64 {
        const CORNERS: [u64; 12] = [
            0,
            1,
            2,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0x7fff_ffff,
            0x8000_0000,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000_0000_0000,
        ];
        let value = self.next();
        match value % 4 {
            0 => CORNERS[(value >> 8) as usize % CORNERS.len()],
            1 => CORNERS[(value >> 8) as usize % CORNERS.len()].wrapping_neg(),
            2 => (value >> 32) as i8 as u64,
            _ => value,
        }
    }
}

/// Where memory operands lie.
const DATA: u64 = 0x20_0000;

/// RFLAGS bits that an instruction leaves undefined.
fn undefined_flags(instruction: &Instruction) -> u64 {
    let names = [
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::OF, rflags::OF),
    ];
    let undefined = instruction.rflags_undefined();
    names
        .iter()
        .filter(|(name, _)| undefined & name != 0)
        .map(|(_, flag)| flag)
        .sum()
}

/// Random bytes that decode to an integer instruction on registers, or on memory at [RBX].
fn integer_instruction(random: &mut Random) -> Option<(Vec<u8>, Instruction)> {
    let mut bytes = Vec::new();
    let choice = random.next();
    if choice & 7 == 0 {
        bytes.push(0x66);
    }
    if choice & 0x18 != 0 {
        bytes.push(0x40 | (choice >> 8 & 0xf) as u8);
    }
    if choice & 0x20 != 0 {
        bytes.push(0x0f);
    }
    bytes.push((choice >> 16) as u8);
    // A register form, or [RBX] without displacement.
    let modrm = (choice >> 24) as u8;
    bytes.push(if choice & 0x40 != 0 {
        modrm | 0xc0
    } else {
        modrm & 0x38 | 3
    });
    for _ in 0..8 {
        bytes.push(random.next() as u8);
    }
    let mut decoder = Decoder::with_ip(64, &bytes, 0x1000, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let random_number = matches!(instruction.mnemonic(), Mnemonic::Rdrand | Mnemonic::Rdseed);
    if instruction.is_invalid() || random_number {
        return None;
    }
    bytes.truncate(instruction.len());
    let memory =
        (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory);
    let plain = !memory
        || (instruction.memory_base() == iced_x86::Register::RBX
            && instruction.memory_index() == iced_x86::Register::None
            && instruction.memory_displacement64() == 0);
    plain.then_some((bytes, instruction))
}

/// What can be compared after an instruction.
#[derive(Debug, PartialEq, Eq)]
struct Result {
    gpr: [u64; 16],
    flags: u64,
    memory: [u8; 16],
}

fn by_handler(cpu: &mut Cpu, op: &Op, start: &RegisterFile, memory: [u8; 16]) -> Option<Result> {
    cpu.regs.gpr = start.gpr;
    cpu.flags.put(start.flags);
    cpu.memory.write(DATA, &memory).expect("RAM");
    (op.handler)(cpu, op).ok()?;
    let mut after = [0; 16];
    cpu.memory.read(DATA, &mut after).expect("RAM");
    Some(Result {
        gpr: cpu.regs.gpr,
        flags: cpu.flags.get(),
        memory: after,
    })
}

#[test]
fn integer_handlers_compute_what_the_host_cpu_computes() {
    let seed = 0x7261_6e64_6f6d_2121;
    let mut random = Random(seed);
    let (mut cpu, _) = long_cpu();
    let mut thunks = ThunkCache::new();
    let mut compared = 0;
    let mut mnemonics = std::collections::BTreeSet::new();
    while compared < 300_000 {
        let Some((bytes, instruction)) = integer_instruction(&mut random) else {
            continue;
        };
        let Ok(thunk) = thunks.thunk(&instruction) else {
            continue;
        };
        let Ok(decoded) = decode(&mut cpu, &bytes, 1) else {
            // It decoded before, so what is missing is room for another thunk.
            cpu.thunks.clear();
            continue;
        };
        let op = decoded.ops[0];
        if thunk.class != Class::Integer
            || op.handler as usize == op_thunk as crate::op::Handler as usize
            || thunk
                .memory
                .is_some_and(|memory: MemoryOperand| memory.bit_offset)
        {
            continue;
        }
        let mut start = RegisterFile::new();
        for register in &mut start.gpr {
            *register = random.operand();
        }
        start.gpr[3] = DATA;
        start.flags = random.next() & rflags::ARITHMETIC;
        let mut memory = [0; 16];
        memory[..8].copy_from_slice(&random.operand().to_le_bytes());
        let before = memory;

        cpu.rip = 0x1000;
        let Some(ours) = by_handler(&mut cpu, &op, &start, before) else {
            panic!("{:?} faulted; seed {seed:#x}", instruction.code());
        };
        let mut host = start.clone();
        let outcome = thunk.run_buffered(&mut host, &mut memory);
        assert_eq!(outcome, trapgate_thunk::Outcome::Done);
        let undefined = undefined_flags(&instruction);
        let defined = rflags::ARITHMETIC & !undefined;
        let theirs = Result {
            gpr: host.gpr,
            flags: host.flags & defined,
            memory,
        };
        let ours = Result {
            flags: ours.flags & defined,
            ..ours
        };
        assert_eq!(
            ours,
            theirs,
            "{:?} ({bytes:02x?}) on {:x?}, flags {:#x}, memory {before:x?}; seed {seed:#x}",
            instruction.code(),
            start.gpr,
            start.flags
        );
        compared += 1;
        mnemonics.insert(format!("{:?}", instruction.mnemonic()));
    }
    for expected in [
        Mnemonic::Add,
        Mnemonic::Imul,
        Mnemonic::Cmovle,
        Mnemonic::Sar,
        Mnemonic::Rol,
    ] {
        assert!(
            mnemonics.contains(&format!("{expected:?}")),
            "{expected:?} was never compared, only {mnemonics:?}"
        );
    }
}

/// What a run of quiet instructions leaves behind is what they leave one after the other, though
/// flags that nobody reads are not worked out.
#[test]
fn runs_of_quiet_instructions_compute_what_the_host_cpu_computes() {
    let seed = 0x7175_6965_7421_2121;
    let mut random = Random(seed);
    let (mut cpu, _) = long_cpu();
    let mut thunks = ThunkCache::new();
    let (mut compared, mut joined) = (0, 0);
    while compared < 30_000 {
        let mut bytes = Vec::new();
        let mut run = Vec::new();
        let mut undefined = 0;
        while run.len() < 6 {
            let Some((encoding, instruction)) = integer_instruction(&mut random) else {
                continue;
            };
            let Ok(thunk) = thunks.thunk(&instruction) else {
                continue;
            };
            let reads = u64::from(instruction.rflags_read() != 0) * undefined;
            if thunk.class != Class::Integer || thunk.memory.is_some() || reads != 0 {
                continue;
            }
            let decoded = decode(&mut cpu, &encoding, 1).expect("it decoded before");
            if decoded.ops[0].quiet == 0 {
                continue;
            }
            undefined |= undefined_flags(&instruction);
            bytes.extend(encoding);
            run.push(thunk);
        }
        let decoded = decode(&mut cpu, &bytes, run.len()).expect("it decoded before");
        assert_eq!(usize::from(decoded.ops[0].quiet), run.len());
        assert_eq!(usize::from(decoded.ops[0].extra), bytes.len());

        let mut host = RegisterFile::new();
        for register in &mut host.gpr {
            *register = random.operand();
        }
        host.flags = random.next() & rflags::ARITHMETIC;
        cpu.regs.gpr = host.gpr;
        cpu.flags.put(host.flags);
        for op in &decoded.ops {
            (op.handler)(&mut cpu, op).expect("quiet instructions don't stop");
        }
        for thunk in &run {
            assert_eq!(
                thunk.run_registers(&mut host),
                trapgate_thunk::Outcome::Done
            );
        }
        let defined = rflags::ARITHMETIC & !undefined;
        assert_eq!(
            (cpu.regs.gpr, cpu.flags.get() & defined),
            (host.gpr, host.flags & defined),
            "{bytes:02x?}; seed {seed:#x}"
        );
        compared += 1;
        joined += usize::from(undefined == 0);
    }
    assert!(joined > 1000, "only {joined} runs had all flags compared");
}
