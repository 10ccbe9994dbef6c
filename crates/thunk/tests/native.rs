//! Every instruction that has a thunk, against the very same bytes run natively.
#![allow(unsafe_code)]

mod oracle;

use std::collections::BTreeMap;

use iced_x86::{
    Code, CodeSize, Decoder, DecoderOptions, Instruction, Mnemonic, OpCodeInfo,
    OpCodeOperandKind as Kind, OpKind, Register,
};
use oracle::{MEMORY, Oracle, State};
use trapgate_thunk::{Outcome, RegisterFile, Thunk, ThunkCache, ThunkError, Vector, X87Pointers};

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn integer(&mut self) -> u64 {
        match self.below(4) {
            0 => self.pick(&[
                0,
                1,
                2,
                7,
                31,
                32,
                33,
                63,
                64,
                0x80,
                0xff,
                0x7fff_ffff,
                0x8000_0000,
            ]),
            1 => self.pick(&[u64::MAX, 1 << 63, i64::MAX as u64, 0xffff_ffff, 0xffff]),
            _ => self.next(),
        }
    }

    /// Eight bytes that are interesting as floats of both sizes.
    fn lane(&mut self) -> u64 {
        match self.below(5) {
            0 => self.next(),
            1 => self.pick(&DOUBLES).to_bits(),
            2 => f64::from_bits(self.pick(&[0x7ff0_0000_0000_0001, 1, 0x000f_ffff_ffff_ffff]))
                .to_bits(),
            3 => u64::from(self.single()) | u64::from(self.single()) << 32,
            _ => ((self.next() % 2000) as f64 / 7.0 - 100.0).to_bits(),
        }
    }

    fn single(&mut self) -> u32 {
        match self.below(3) {
            0 => self
                .pick(&[
                    0.0_f32,
                    -0.0,
                    1.0,
                    -1.5,
                    3.0,
                    f32::MAX,
                    f32::MIN_POSITIVE,
                    f32::INFINITY,
                    f32::NEG_INFINITY,
                    f32::NAN,
                    65504.0,
                    1e-20,
                ])
                .to_bits(),
            1 => self.pick(&[0x7f80_0001, 1, 0x807f_ffff, 0x0080_0001]),
            _ => self.next() as u32,
        }
    }

    /// An 80-bit float.
    fn extended(&mut self) -> [u8; 10] {
        let (high, mantissa): (u16, u64) = match self.below(6) {
            0 => (0, 0),
            1 => (0x3fff, 1 << 63),
            2 => self.pick(&[
                (0x7fff, 1 << 63),
                (0x7fff, 3 << 62),
                (0x7fff, 1 << 63 | 1),
                (0, 5),
            ]),
            3 => (0x3fff + self.below(64) as u16 - 8, self.next() | 1 << 63),
            4 => (0xbff0 + self.below(40) as u16, self.next() | 1 << 63),
            _ => (self.next() as u16, self.next()),
        };
        let mut value = [0; 10];
        value[..8].copy_from_slice(&mantissa.to_le_bytes());
        value[8..].copy_from_slice(&high.to_le_bytes());
        value
    }
}

const DOUBLES: [f64; 14] = [
    0.0,
    -0.0,
    1.0,
    -2.5,
    3.0,
    f64::MAX,
    f64::MIN_POSITIVE,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::NAN,
    1e300,
    1e-300,
    4294967296.5,
    -9.3e18,
];

fn random_state(random: &mut Random) -> State {
    let mut state = State {
        gpr: core::array::from_fn(|_| random.integer()),
        // Bits that are not arithmetic flags must survive.
        flags: random.next() & 0x8d5 | 0x20_0202,
        mxcsr: 0x1f80 | random.next() as u32 & 0x3f,
        vector: [[0; 32]; 16],
        x87: [0; 160],
        memory: [0; MEMORY],
        simd_exception: false,
    };
    if random.below(2) == 0 {
        state.mxcsr |= random.next() as u32 & 0xe040;
    }
    for vector in &mut state.vector {
        for lane in vector.chunks_mut(8) {
            lane.copy_from_slice(&random.lane().to_le_bytes());
        }
    }
    for lane in state.memory.chunks_mut(8) {
        lane.copy_from_slice(&random.lane().to_le_bytes());
    }
    if random.below(4) == 0 {
        // BCD for FBLD.
        for byte in &mut state.memory[..10] {
            *byte = (random.below(10) << 4 | random.below(10)) as u8;
        }
    }
    let masks = random.next() as u16 & 0x3f;
    let control = 0x0040 | random.pick(&[0x3f, 0x3f, masks]);
    let control: u16 = control | random.next() as u16 & 0xc00 | random.pick(&[0x300, 0x200, 0]);
    // Sticky flags, but no pending exception.
    let flags = random.next() as u16 & 0x3f & control;
    let status = flags | random.next() as u16 & 0x7f00;
    state.x87[..2].copy_from_slice(&control.to_le_bytes());
    state.x87[2..4].copy_from_slice(&status.to_le_bytes());
    let tags = random.next() as u8;
    state.x87[4] = random.pick(&[0xff, 0xff, 0xfe, tags]);
    // Pointers within 32 bits: FNSTENV has no more. FOP isn't kept by CPUs in general.
    state.x87[8..12].copy_from_slice(&(random.next() as u32).to_le_bytes());
    state.x87[16..20].copy_from_slice(&(random.next() as u32).to_le_bytes());
    for register in 0..8 {
        state.x87[32 + 16 * register..][..10].copy_from_slice(&random.extended());
    }
    state
}

fn load(state: &State) -> RegisterFile {
    let mut registers = RegisterFile::new();
    registers.gpr = state.gpr;
    registers.flags = state.flags;
    registers.mxcsr = state.mxcsr;
    registers.vector = state.vector.map(Vector);
    registers.x87.0[..160].copy_from_slice(&state.x87);
    registers
}

/// Bytes of the x87 image that are compared: not the pointers, MXCSR, nor padding.
fn comparable(image: &[u8]) -> Vec<u8> {
    let mut bytes = image[..5].to_vec();
    for register in 0..8 {
        bytes.extend_from_slice(&image[32 + 16 * register..][..10]);
    }
    bytes
}

#[repr(C, align(64))]
struct Operand([u8; MEMORY]);

fn differences(
    registers: &RegisterFile,
    memory: &[u8; MEMORY],
    raised: bool,
    expected: &State,
) -> Vec<String> {
    let mut found = Vec::new();
    for (number, (ours, native)) in registers.gpr.iter().zip(&expected.gpr).enumerate() {
        if ours != native {
            found.push(format!("gpr {number}: {ours:#x}, natively {native:#x}"));
        }
    }
    if registers.flags != expected.flags {
        found.push(format!(
            "flags {:#x}, natively {:#x}",
            registers.flags, expected.flags
        ));
    }
    if registers.mxcsr != expected.mxcsr {
        found.push(format!(
            "mxcsr {:#x}, natively {:#x}",
            registers.mxcsr, expected.mxcsr
        ));
    }
    for (number, (ours, native)) in registers.vector.iter().zip(&expected.vector).enumerate() {
        if ours.0 != *native {
            found.push(format!(
                "ymm{number}: {:02x?}, natively {native:02x?}",
                ours.0
            ));
        }
    }
    let (ours, native) = (comparable(&registers.x87.0), comparable(&expected.x87));
    if ours != native {
        found.push(format!("x87: {ours:02x?}\nnatively {native:02x?}"));
    }
    if memory != &expected.memory {
        found.push(format!(
            "memory: {memory:02x?}\nnatively {:02x?}",
            expected.memory
        ));
    }
    if raised != expected.simd_exception {
        found.push(format!(
            "raised {raised}, natively {}",
            expected.simd_exception
        ));
    }
    found
}

thread_local! {
    /// Whether FXSAVE stores x87 pointers while no exception is pending; AMD's doesn't (APM vol. 2
    /// 11.4.4).
    static RECORDS_POINTERS: bool = {
        let vendor = core::arch::x86_64::__cpuid(0);
        vendor.ebx == u32::from_le_bytes(*b"Genu")
    };
}

/// The CPU records an instruction's address exactly when the thunk says so, and otherwise leaves or
/// loads what the thunk does.
fn pointer_differences(
    thunk: &Thunk,
    before: &State,
    registers: &RegisterFile,
    expected: &State,
) -> Option<String> {
    if !RECORDS_POINTERS.with(|records| *records) {
        return None;
    }
    let native = &expected.x87[8..24];
    let agrees = match thunk.x87_pointers {
        X87Pointers::Unchanged => registers.x87.0[8..24] == *native,
        _ => native[..8] != before.x87[8..16] && registers.x87.0[8..24] == before.x87[8..24],
    };
    (!agrees).then(|| {
        format!(
            "{:?}: pointers {:02x?}, natively {native:02x?}, before {:02x?}",
            thunk.x87_pointers,
            &registers.x87.0[8..24],
            &before.x87[8..24]
        )
    })
}

/// An instruction of this code with random operands; `memory` chooses the memory form where there
/// are two. None if there's no such form.
fn random_instruction(code: Code, memory: bool, random: &mut Random) -> Option<Instruction> {
    let op_code: &OpCodeInfo = code.op_code();
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    instruction.set_code_size(CodeSize::Code64);
    let mut has_memory = false;
    for index in 0..op_code.op_count() {
        let kind = op_code.op_kind(index);
        let register = |first: Register, count: u64, random: &mut Random| {
            Some(first + random.below(count) as u32)
        };
        let either = matches!(
            kind,
            Kind::r8_or_mem
                | Kind::r16_or_mem
                | Kind::r32_or_mem
                | Kind::r64_or_mem
                | Kind::mm_or_mem
                | Kind::xmm_or_mem
                | Kind::ymm_or_mem
        );
        let chosen = match kind {
            _ if either && memory => None,
            Kind::mem | Kind::mem_mib => None,
            Kind::r8_or_mem | Kind::r8_reg | Kind::r8_opcode => register(Register::AL, 20, random),
            Kind::r16_or_mem
            | Kind::r16_reg
            | Kind::r16_reg_mem
            | Kind::r16_rm
            | Kind::r16_opcode => register(Register::AX, 16, random),
            Kind::r32_or_mem
            | Kind::r32_reg
            | Kind::r32_reg_mem
            | Kind::r32_rm
            | Kind::r32_opcode
            | Kind::r32_vvvv => register(Register::EAX, 16, random),
            Kind::r64_or_mem
            | Kind::r64_reg
            | Kind::r64_reg_mem
            | Kind::r64_rm
            | Kind::r64_opcode
            | Kind::r64_vvvv => register(Register::RAX, 16, random),
            Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => register(Register::MM0, 8, random),
            Kind::xmm_or_mem | Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_vvvv | Kind::xmm_is4 => {
                register(Register::XMM0, 16, random)
            }
            Kind::ymm_or_mem | Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_vvvv | Kind::ymm_is4 => {
                register(Register::YMM0, 16, random)
            }
            Kind::al => Some(Register::AL),
            Kind::cl => Some(Register::CL),
            Kind::ax => Some(Register::AX),
            Kind::dx => Some(Register::DX),
            Kind::eax => Some(Register::EAX),
            Kind::rax => Some(Register::RAX),
            Kind::st0 => Some(Register::ST0),
            Kind::sti_opcode => register(Register::ST0, 8, random),
            Kind::imm8
            | Kind::imm8_const_1
            | Kind::imm8sex16
            | Kind::imm8sex32
            | Kind::imm8sex64
            | Kind::imm16
            | Kind::imm32
            | Kind::imm32sex64
            | Kind::imm64 => {
                let byte = random.next() as u8;
                let (op_kind, second) = match kind {
                    Kind::imm8
                        if index > 0 && instruction.op_kind(index - 1) == OpKind::Immediate8 =>
                    {
                        (OpKind::Immediate8_2nd, true)
                    }
                    Kind::imm8 | Kind::imm8_const_1 => (OpKind::Immediate8, false),
                    Kind::imm8sex16 => (OpKind::Immediate8to16, false),
                    Kind::imm8sex32 => (OpKind::Immediate8to32, false),
                    Kind::imm8sex64 => (OpKind::Immediate8to64, false),
                    Kind::imm16 => (OpKind::Immediate16, false),
                    Kind::imm32 => (OpKind::Immediate32, false),
                    Kind::imm32sex64 => (OpKind::Immediate32to64, false),
                    _ => (OpKind::Immediate64, false),
                };
                instruction.set_op_kind(index, op_kind);
                match (kind, second) {
                    (_, true) => instruction.set_immediate8_2nd(byte),
                    (Kind::imm8_const_1, _) => instruction.set_immediate8(1),
                    (Kind::imm8, _) => instruction.set_immediate8(byte),
                    (Kind::imm8sex16, _) => instruction.set_immediate8to16(i16::from(byte as i8)),
                    (Kind::imm8sex32, _) => instruction.set_immediate8to32(i32::from(byte as i8)),
                    (Kind::imm8sex64, _) => instruction.set_immediate8to64(i64::from(byte as i8)),
                    (Kind::imm16, _) => instruction.set_immediate16(random.next() as u16),
                    (Kind::imm32, _) => instruction.set_immediate32(random.next() as u32),
                    (Kind::imm32sex64, _) => {
                        instruction.set_immediate32to64(i64::from(random.next() as i32));
                    }
                    _ => instruction.set_immediate64(random.next()),
                }
                continue;
            }
            _ => return None,
        };
        match chosen {
            Some(register) => {
                instruction.set_op_kind(index, OpKind::Register);
                instruction.set_op_register(index, register);
            }
            None => {
                has_memory = true;
                instruction.set_op_kind(index, OpKind::Memory);
                instruction.set_memory_base(Register::RIP);
                instruction.set_memory_displ_size(8);
            }
        }
    }
    (has_memory == memory).then_some(instruction)
}

/// Values that the thunk's contract leaves to the interpreter, or that have no fixed answer.
fn restrain(instruction: &Instruction, state: &mut State, random: &mut Random) {
    let bit_test = matches!(
        instruction.mnemonic(),
        Mnemonic::Bt | Mnemonic::Btc | Mnemonic::Btr | Mnemonic::Bts
    );
    if bit_test
        && instruction.op0_kind() == OpKind::Memory
        && instruction.op1_kind() == OpKind::Register
    {
        // Beyond the operand the address moves too.
        let bits = 8 * instruction.memory_size().size() as u64;
        state.gpr[instruction.op1_register().full_register().number()] = random.below(bits);
    }
}

struct Case {
    bytes: Vec<u8>,
    instruction: Instruction,
    thunk: Thunk,
}

fn case(
    oracle: &Oracle,
    cache: &mut ThunkCache,
    code: Code,
    memory: bool,
    random: &mut Random,
) -> Option<Result<Case, ThunkError>> {
    let (instruction, bytes) = (0..200).find_map(|_| {
        let mut instruction = random_instruction(code, memory, random)?;
        if memory && code.op_code().can_use_lock_prefix() && random.below(2) == 0 {
            instruction.set_has_lock_prefix(true);
        }
        let bytes = oracle.place(&instruction).ok()?;
        let decoded = Decoder::with_ip(64, &bytes, oracle.address(), DecoderOptions::NONE).decode();
        (decoded.code() == code).then_some((decoded, bytes))
    })?;
    Some(cache.thunk(&instruction).map(|thunk| Case {
        bytes,
        instruction,
        thunk,
    }))
}

fn run(thunk: &Thunk, registers: &mut RegisterFile, memory: &mut Operand) -> Outcome {
    // SAFETY: the buffer is longer than any operand, and aligned.
    unsafe { thunk.run(registers, memory.0.as_mut_ptr()) }
}

/// Given every instruction that a 64-bit decoder knows, with random operands,
/// when it has a thunk, then the thunk leaves all registers and memory as the CPU does; and what has one
/// for registers has one for memory.
#[test]
fn thunks_do_what_the_cpu_does() {
    if !std::is_x86_feature_detected!("avx") {
        println!("skipped: the judge saves YMM registers, and this host has none");
        return;
    }
    let mut oracle = Oracle::new();
    let mut random = Random(1);
    let mut cache = ThunkCache::new();
    let mut tested = 0;
    let mut failures = Vec::new();
    let mut refused: BTreeMap<String, Vec<Code>> = BTreeMap::new();
    for code in Code::values().filter(|code| code.op_code().mode64()) {
        let mut with_registers = false;
        for memory in [false, true] {
            let mut failed = false;
            for _ in 0..60 {
                let Some(case) = case(&oracle, &mut cache, code, memory, &mut random) else {
                    break;
                };
                let case = match case {
                    Ok(case) => case,
                    Err(error) => {
                        let reason = match error {
                            ThunkError::Unsupported { reason, .. } => format!("{reason}"),
                            ThunkError::HostLacks { feature, .. } => {
                                format!("host lacks {feature:?}")
                            }
                            other => panic!("{other}"),
                        };
                        if memory && with_registers {
                            failures.push(format!("{code:?} refused with memory: {reason}"));
                        }
                        let codes = refused.entry(reason).or_default();
                        if !codes.contains(&code) {
                            codes.push(code);
                        }
                        break;
                    }
                };
                let mut state = random_state(&mut random);
                restrain(&case.instruction, &mut state, &mut random);
                let mut registers = load(&state);
                let mut operand = Operand(state.memory);
                let outcome = run(&case.thunk, &mut registers, &mut operand);
                if matches!(code.mnemonic(), Mnemonic::Rdrand | Mnemonic::Rdseed) {
                    continue;
                }
                assert_eq!(outcome, Outcome::Done, "{code:?}");
                with_registers |= !memory;
                let expected = oracle.run(&case.bytes, &state);
                let mut found = differences(&registers, &operand.0, false, &expected);
                found.extend(pointer_differences(
                    &case.thunk,
                    &state,
                    &registers,
                    &expected,
                ));
                tested += 1;
                if !found.is_empty() && !failed {
                    failed = true;
                    failures.push(format!(
                        "{code:?} {:02x?} (mxcsr {:#x}, fcw {:02x?}): {}",
                        case.bytes,
                        state.mxcsr,
                        &state.x87[..5],
                        found.join("\n  ")
                    ));
                }
            }
        }
    }
    for (reason, codes) in &refused {
        println!("{} refused, {reason}: {codes:?}", codes.len());
    }
    println!("{tested} runs compared, {} thunks", cache.len());
    assert!(
        failures.is_empty(),
        "{} codes differ:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert!(tested > 50_000, "only {tested} runs");
}

/// The two inexact flags that `Outcome::SimdException` documents.
fn excuse(
    instruction: &Instruction,
    before: &State,
    registers: &RegisterFile,
    expected: &mut State,
) {
    const RANGE: u32 = 0x18; // UE and OE
    const PE: u32 = 0x20;
    let dot_product = matches!(
        instruction.mnemonic(),
        Mnemonic::Dpps | Mnemonic::Dppd | Mnemonic::Vdpps | Mnemonic::Vdppd
    );
    let out_of_range = !(before.mxcsr >> 7) & registers.mxcsr & RANGE != 0;
    let excused = match () {
        () if dot_product => 0x3f,
        () if out_of_range => PE,
        () => 0,
    };
    if expected.simd_exception {
        expected.mxcsr = expected.mxcsr & !excused | registers.mxcsr & excused;
    }
}

/// Given SIMD floating-point instructions and a random set of unmasked exceptions,
/// when one is raised, then its flags are set, nothing else changes, and the outcome says so;
/// otherwise the result is committed.
#[test]
fn unmasked_simd_exceptions_leave_the_destination_alone() {
    if !std::is_x86_feature_detected!("avx") {
        println!("skipped: the judge saves YMM registers, and this host has none");
        return;
    }
    let mut oracle = Oracle::new();
    let mut random = Random(2);
    let mut cache = ThunkCache::new();
    let (mut raised_count, mut done_count) = (0, 0);
    let mut failures = Vec::new();
    for code in Code::values().filter(|code| code.op_code().mode64()) {
        for memory in [false, true] {
            let mut failed = false;
            for _ in 0..120 {
                let Some(Ok(case)) = case(&oracle, &mut cache, code, memory, &mut random) else {
                    break;
                };
                if !case.thunk.simd_float {
                    break;
                }
                let mut state = random_state(&mut random);
                state.mxcsr = random.next() as u32 & 0xffff;
                if random.below(2) == 0 {
                    // One unmasked exception at a time is raised less often by others.
                    state.mxcsr |= 0x1f80;
                    state.mxcsr &= !(0x80 << random.below(6));
                }
                let mut registers = load(&state);
                let mut operand = Operand(state.memory);
                let outcome = run(&case.thunk, &mut registers, &mut operand);
                let mut expected = oracle.run(&case.bytes, &state);
                excuse(&case.instruction, &state, &registers, &mut expected);
                let raised = outcome == Outcome::SimdException;
                raised_count += usize::from(raised);
                done_count += usize::from(!raised);
                let found = differences(&registers, &operand.0, raised, &expected);
                if !found.is_empty() && !failed {
                    failed = true;
                    failures.push(format!(
                        "{code:?} {:02x?} (mxcsr {:#x}): {}",
                        case.bytes,
                        state.mxcsr,
                        found.join("\n  ")
                    ));
                }
            }
        }
    }
    println!("{raised_count} raised, {done_count} done");
    assert!(
        failures.is_empty(),
        "{} codes differ:\n{}",
        failures.len(),
        failures.join("\n")
    );
    assert!(
        raised_count > 3000 && done_count > 3000,
        "{raised_count} raised, {done_count} done"
    );
}
