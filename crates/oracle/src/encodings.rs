//! Encodings: each instruction of the decoder's tables in each form that it can be written in.

use iced_x86::{
    Code, CodeSize, Encoder, EncodingKind, Instruction, OpCodeInfo, OpCodeOperandKind as Kind,
    OpKind, Register,
};
use trapgate_x86::profile::Level;

use crate::profile::admits;
use crate::random::Random;

/// How an instruction is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Form {
    /// Without a memory operand of its own.
    Registers,
    /// `[base]`
    Base,
    /// `[base + disp8]`
    Disp8,
    /// `[base + disp32]`
    Disp32,
    /// `[base + index * scale + disp8]`
    Index,
    /// `[index * scale + disp32]`
    IndexOnly,
    /// `[rip + disp32]`
    Rip,
    /// `[disp32]`
    Absolute,
    /// `[eip + disp32]`
    RipAddresses,
    /// `fs:[disp32]`
    AbsoluteFs,
    /// `gs:[disp32]`
    AbsoluteGs,
    /// `[disp32]` with addresses of the other size; of 16 bits `[disp16]`.
    AbsoluteAddresses,
    /// A sum of 16 bits, without a displacement.
    Short,
    /// A sum of 16 bits and disp16.
    ShortDisp16,
    /// `fs:[base + disp8]`
    Fs,
    /// `gs:[base + index * scale + disp32]`
    Gs,
    /// `[base + disp8]` with a prefix for another segment, which 64-bit code ignores.
    OtherSegment,
    /// `[base + disp8]` with addresses of the other size.
    Addresses,
    /// `[base + index * scale + disp32]` with addresses of the other size.
    AddressesIndex,
    /// LOCK, and memory if there is a form with it.
    Lock,
    /// REP, and memory if there is a form with it.
    Rep,
    /// REPNE, and memory if there is a form with it.
    Repne,
    /// REP or REPNE of a string instruction with addresses of the other size.
    RepAddresses,
    /// The operand-size prefix once more, or where it means nothing.
    OperandSize,
    /// A REX prefix more.
    Rex,
    /// A REX prefix that does not count, as another prefix follows.
    EarlyRex,
    /// Prefixes until the instruction has 15 bytes.
    Longest,
    /// Prefixes until it has more.
    TooLong,
}

const MEMORY_FORMS: [Form; 18] = [
    Form::Base,
    Form::Disp8,
    Form::Disp32,
    Form::Index,
    Form::IndexOnly,
    Form::Rip,
    Form::Absolute,
    Form::RipAddresses,
    Form::AbsoluteFs,
    Form::AbsoluteGs,
    Form::AbsoluteAddresses,
    Form::Short,
    Form::ShortDisp16,
    Form::Fs,
    Form::Gs,
    Form::OtherSegment,
    Form::Addresses,
    Form::AddressesIndex,
];

/// Forms in which prefixes come before the instruction as it is.
const PREFIXED: [Form; 8] = [
    Form::Lock,
    Form::Rep,
    Form::Repne,
    Form::OperandSize,
    Form::Rex,
    Form::EarlyRex,
    Form::Longest,
    Form::TooLong,
];

/// An instruction in a form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Encoding {
    /// Which instruction.
    pub code: Code,
    /// How it is written.
    pub form: Form,
}

/// What a code's operands allow.
struct Shape {
    registers: bool,
    memory: bool,
    /// Operands in memory that registers name by themselves: strings, XLAT, MASKMOV.
    implied: bool,
    gather: bool,
    offset: bool,
}

fn shape(op_code: &OpCodeInfo) -> Shape {
    let mut shape = Shape {
        registers: true,
        memory: false,
        implied: false,
        gather: false,
        offset: false,
    };
    for index in 0..op_code.op_count() {
        match op_code.op_kind(index) {
            Kind::mem | Kind::mem_mib => (shape.registers, shape.memory) = (false, true),
            Kind::mem_vsib32x | Kind::mem_vsib64x | Kind::mem_vsib32y | Kind::mem_vsib64y => {
                (shape.registers, shape.memory, shape.gather) = (false, true, true);
            }
            Kind::mem_offs => (shape.registers, shape.offset) = (false, true),
            Kind::es_rDI | Kind::seg_rDI | Kind::seg_rSI | Kind::seg_rBX_al => {
                shape.implied = true;
            }
            kind if is_either(kind) => shape.memory = true,
            _ => {}
        }
    }
    shape
}

/// Whether there is an operand that a prefix gives another segment.
fn has_segment(op_code: &OpCodeInfo) -> bool {
    (0..op_code.op_count()).any(|index| {
        matches!(
            op_code.op_kind(index),
            Kind::seg_rSI | Kind::seg_rDI | Kind::seg_rBX_al | Kind::mem | Kind::mem_offs
        )
    })
}

fn is_either(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::r8_or_mem
            | Kind::r16_or_mem
            | Kind::r32_or_mem
            | Kind::r64_or_mem
            | Kind::mm_or_mem
            | Kind::xmm_or_mem
            | Kind::ymm_or_mem
    )
}

/// All encodings that a profile admits in code of `bits` bits.
pub fn encodings(level: Level, bits: u32) -> Vec<Encoding> {
    let mut all = Vec::new();
    for code in Code::values() {
        if !admits(level, code, bits) {
            continue;
        }
        let shape = shape(code.op_code());
        let mut put = |form| all.push(Encoding { code, form });
        if shape.registers {
            put(Form::Registers);
        }
        if shape.memory {
            for form in MEMORY_FORMS {
                let relative = matches!(form, Form::Rip | Form::RipAddresses);
                let short = matches!(form, Form::Short | Form::ShortDisp16);
                let of_16_bits = short
                    || bits == 32 && matches!(form, Form::Addresses | Form::AbsoluteAddresses);
                let exists = match bits {
                    64 => !short,
                    // Addresses of 16 bits have no scale.
                    _ => !relative && form != Form::AddressesIndex,
                };
                // Gathers have an index, which addresses of 16 bits have no room for.
                let possible = !shape.gather || !relative && !of_16_bits;
                if exists && possible {
                    put(form);
                }
            }
        }
        if shape.implied || shape.offset {
            for form in [Form::Fs, Form::Gs, Form::OtherSegment, Form::Addresses] {
                put(form);
            }
        }
        if code.is_string_instruction() {
            put(Form::RepAddresses);
        }
        if shape.offset {
            put(Form::Absolute);
        }
        for form in PREFIXED {
            let rex = matches!(form, Form::Rex | Form::EarlyRex);
            if !rex || bits == 64 {
                put(form);
            }
        }
    }
    all
}

/// What a piece of code may refer to.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings {
    /// Where the instruction will lie.
    pub ip: u64,
    /// Where an address that the code itself names may point.
    pub target: u64,
    /// Where a jump may lead.
    pub landing: u64,
    /// Where a jump of 8 bits may lead.
    pub near: u64,
    /// 64 or 32.
    pub bits: u32,
}

/// Writes an encoding with operands that come from `random`. `None` if it can't be written so.
pub fn write(encoding: Encoding, around: &Surroundings, random: &mut Random) -> Option<Vec<u8>> {
    let Encoding { code, form } = encoding;
    let shape = shape(code.op_code());
    let memory_form = match form {
        Form::Registers => None,
        _ if PREFIXED.contains(&form) => {
            (shape.memory && (!shape.registers || random.below(4) != 0)).then_some(Form::Disp8)
        }
        _ => Some(form),
    };
    let instruction = instruction(code, memory_form, around, random)?;
    let mut encoder = Encoder::new(around.bits);
    encoder.encode(&instruction, around.ip).ok()?;
    let mut bytes = encoder.take_buffer();
    // What has only ES:RDI has no segment to choose, and the prefix is there nevertheless.
    let ignored = shape.implied && !has_segment(code.op_code());
    match form {
        Form::OtherSegment if around.bits == 64 || ignored => {
            bytes.insert(0, random.pick(&[0x26, 0x2e, 0x36, 0x3e]));
        }
        Form::Fs if ignored => bytes.insert(0, 0x64),
        Form::Gs if ignored => bytes.insert(0, 0x65),
        _ => {}
    }
    let legacy = code.encoding() == EncodingKind::Legacy;
    match form {
        Form::Lock => bytes.insert(0, 0xf0),
        Form::Rep => bytes.insert(0, 0xf3),
        Form::Repne => bytes.insert(0, 0xf2),
        Form::RepAddresses => {
            bytes.insert(0, 0x67);
            bytes.insert(0, random.pick(&[0xf2, 0xf3]));
        }
        Form::OperandSize => bytes.insert(0, 0x66),
        Form::Rex => {
            let at = bytes.iter().position(|byte| !is_prefix(*byte))?;
            if bytes[at] & 0xf0 == 0x40 {
                bytes[at] |= random.next() as u8 & 0xf;
            } else {
                bytes.insert(
                    at,
                    0x40 | if legacy { random.next() as u8 & 0xf } else { 0 },
                );
            }
        }
        Form::EarlyRex => {
            bytes.insert(0, 0x40 | random.next() as u8 & 0xf);
            bytes.insert(1, 0x3e);
        }
        Form::Longest | Form::TooLong => {
            let length = if form == Form::Longest { 15 } else { 16 };
            while bytes.len() < length {
                bytes.insert(0, 0x3e);
            }
        }
        _ => {}
    }
    Some(bytes)
}

/// Whether a byte is a prefix, beside REX.
pub fn is_prefix(byte: u8) -> bool {
    matches!(
        byte,
        0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x66 | 0x67 | 0xf0 | 0xf2 | 0xf3
    )
}

fn instruction(
    code: Code,
    form: Option<Form>,
    around: &Surroundings,
    random: &mut Random,
) -> Option<Instruction> {
    let op_code = code.op_code();
    let long = around.bits == 64;
    let mut instruction = Instruction::default();
    instruction.set_code(code);
    instruction.set_code_size(if long {
        CodeSize::Code64
    } else {
        CodeSize::Code32
    });
    let registers = if long { 16 } else { 8 };
    // A vector must not be named twice by a gather.
    let vectors = random.below(registers);
    let mut vector = 0;
    for index in 0..op_code.op_count() {
        let kind = op_code.op_kind(index);
        if form.is_some() && is_either(kind) || matches!(kind, Kind::mem | Kind::mem_mib) {
            memory(&mut instruction, index, form?, around, None, random)?;
            continue;
        }
        let any =
            |first: Register, count: u64, random: &mut Random| first + random.below(count) as u32;
        let chosen = match kind {
            Kind::mem_vsib32x | Kind::mem_vsib64x | Kind::mem_vsib32y | Kind::mem_vsib64y => {
                let first = match kind {
                    Kind::mem_vsib32x | Kind::mem_vsib64x => Register::XMM0,
                    _ => Register::YMM0,
                };
                vector += 1;
                let register = first + ((vectors + vector * 3) % registers) as u32;
                memory(
                    &mut instruction,
                    index,
                    form?,
                    around,
                    Some(register),
                    random,
                )?;
                continue;
            }
            Kind::mem_offs => {
                instruction.set_op_kind(index, OpKind::Memory);
                let short = form == Some(Form::Addresses);
                let size = match (long, short) {
                    (true, false) => 8,
                    (true, true) | (false, false) => 4,
                    (false, true) => 2,
                };
                instruction.set_memory_displ_size(size);
                if size == 2 {
                    instruction.set_memory_displacement64(random.next() & 0x7fff);
                    // Memory of cases is out of reach without a segment.
                    instruction.set_segment_prefix(random.pick(&[Register::FS, Register::GS]));
                    continue;
                }
                instruction.set_memory_displacement64(around.target);
                instruction.set_segment_prefix(segment(form, random));
                continue;
            }
            Kind::r8_or_mem | Kind::r8_reg | Kind::r8_opcode => {
                any(Register::AL, if long { 20 } else { 8 }, random)
            }
            Kind::r16_or_mem
            | Kind::r16_reg
            | Kind::r16_reg_mem
            | Kind::r16_rm
            | Kind::r16_opcode => any(Register::AX, registers, random),
            Kind::r32_or_mem
            | Kind::r32_reg
            | Kind::r32_reg_mem
            | Kind::r32_rm
            | Kind::r32_opcode
            | Kind::r32_vvvv => any(Register::EAX, registers, random),
            Kind::r64_or_mem
            | Kind::r64_reg
            | Kind::r64_reg_mem
            | Kind::r64_rm
            | Kind::r64_opcode
            | Kind::r64_vvvv => any(Register::RAX, registers, random),
            Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => any(Register::MM0, 8, random),
            Kind::xmm_or_mem | Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_vvvv | Kind::xmm_is4 => {
                vector += 1;
                if op_code.requires_unique_reg_nums() {
                    Register::XMM0 + ((vectors + vector * 3) % registers) as u32
                } else {
                    any(Register::XMM0, registers, random)
                }
            }
            Kind::ymm_or_mem | Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_vvvv | Kind::ymm_is4 => {
                vector += 1;
                if op_code.requires_unique_reg_nums() {
                    Register::YMM0 + ((vectors + vector * 3) % registers) as u32
                } else {
                    any(Register::YMM0, registers, random)
                }
            }
            Kind::seg_reg => {
                let loads = index == 0;
                random.pick(&[
                    Register::ES,
                    if loads { Register::FS } else { Register::CS },
                    Register::SS,
                    Register::DS,
                    Register::FS,
                    Register::GS,
                ])
            }
            Kind::cr_reg => random.pick(&[
                Register::CR0,
                Register::CR2,
                Register::CR3,
                Register::CR4,
                if long { Register::CR8 } else { Register::CR0 },
            ]),
            Kind::dr_reg => any(Register::DR0, 8, random),
            Kind::es => Register::ES,
            Kind::cs => Register::CS,
            Kind::ss => Register::SS,
            Kind::ds => Register::DS,
            Kind::fs => Register::FS,
            Kind::gs => Register::GS,
            Kind::al => Register::AL,
            Kind::cl => Register::CL,
            Kind::ax => Register::AX,
            Kind::dx => Register::DX,
            Kind::eax => Register::EAX,
            Kind::rax => Register::RAX,
            Kind::st0 => Register::ST0,
            Kind::sti_opcode => any(Register::ST0, 8, random),
            Kind::imm8
            | Kind::imm8_const_1
            | Kind::imm8sex16
            | Kind::imm8sex32
            | Kind::imm8sex64
            | Kind::imm16
            | Kind::imm32
            | Kind::imm32sex64
            | Kind::imm64 => {
                immediate(&mut instruction, index, kind, random);
                continue;
            }
            Kind::br64_1 | Kind::br32_1 => {
                branch(&mut instruction, index, around.near, long);
                continue;
            }
            Kind::br64_4 | Kind::br32_4 => {
                branch(&mut instruction, index, around.landing, long);
                continue;
            }
            Kind::br16_1 | Kind::br16_2 => {
                instruction.set_op_kind(index, OpKind::NearBranch16);
                instruction.set_near_branch16(around.near as u16);
                continue;
            }
            Kind::farbr2_2 => {
                instruction.set_op_kind(index, OpKind::FarBranch16);
                instruction.set_far_branch16(around.landing as u16);
                instruction.set_far_branch_selector(random.pick(&SELECTORS));
                continue;
            }
            Kind::farbr4_2 => {
                instruction.set_op_kind(index, OpKind::FarBranch32);
                instruction.set_far_branch32(around.landing as u32);
                instruction.set_far_branch_selector(random.pick(&SELECTORS));
                continue;
            }
            Kind::seg_rSI | Kind::es_rDI | Kind::seg_rDI => {
                let short = form == Some(Form::Addresses);
                let [si, es_di, di] = match (long, short) {
                    (true, false) => [
                        OpKind::MemorySegRSI,
                        OpKind::MemoryESRDI,
                        OpKind::MemorySegRDI,
                    ],
                    (true, true) | (false, false) => [
                        OpKind::MemorySegESI,
                        OpKind::MemoryESEDI,
                        OpKind::MemorySegEDI,
                    ],
                    (false, true) => [OpKind::MemorySegSI, OpKind::MemoryESDI, OpKind::MemorySegDI],
                };
                instruction.set_op_kind(
                    index,
                    match kind {
                        Kind::seg_rSI => si,
                        Kind::es_rDI => es_di,
                        _ => di,
                    },
                );
                if kind != Kind::es_rDI {
                    instruction.set_segment_prefix(segment(form, random));
                }
                continue;
            }
            Kind::seg_rBX_al => {
                let short = form == Some(Form::Addresses);
                instruction.set_op_kind(index, OpKind::Memory);
                instruction.set_memory_base(match (long, short) {
                    (true, false) => Register::RBX,
                    (true, true) | (false, false) => Register::EBX,
                    (false, true) => Register::BX,
                });
                instruction.set_memory_index(Register::AL);
                instruction.set_segment_prefix(segment(form, random));
                continue;
            }
            _ => return None,
        };
        instruction.set_op_kind(index, OpKind::Register);
        instruction.set_op_register(index, chosen);
    }
    Some(instruction)
}

/// Selectors that programs may load, and some that they may not. Linux's table has them.
pub const SELECTORS: [u16; 16] = [
    0, 3, 0x2b, 0x2b, 0x2b, 0x33, 0x33, 0x23, 0x2a, 0x10, 0x18, 0x40, 0x50, 0x07, 0x1f, 0x8f,
];

fn segment(form: Option<Form>, random: &mut Random) -> Register {
    match form {
        Some(Form::Fs | Form::AbsoluteFs) => Register::FS,
        Some(Form::Gs | Form::AbsoluteGs) => Register::GS,
        Some(Form::OtherSegment) => {
            random.pick(&[Register::ES, Register::CS, Register::SS, Register::DS])
        }
        _ => Register::None,
    }
}

fn branch(instruction: &mut Instruction, index: u32, target: u64, long: bool) {
    if long {
        instruction.set_op_kind(index, OpKind::NearBranch64);
        instruction.set_near_branch64(target);
    } else {
        instruction.set_op_kind(index, OpKind::NearBranch32);
        instruction.set_near_branch32(target as u32);
    }
}

fn immediate(instruction: &mut Instruction, index: u32, kind: Kind, random: &mut Random) {
    let value = random.integer();
    let byte = value as u8;
    // ENTER and EXTRQ have two.
    let second = kind == Kind::imm8
        && index > 0
        && matches!(
            instruction.op_kind(index - 1),
            OpKind::Immediate8 | OpKind::Immediate16
        );
    let (op_kind, value) = match kind {
        Kind::imm8 if second => {
            instruction.set_op_kind(index, OpKind::Immediate8_2nd);
            instruction.set_immediate8_2nd(byte);
            return;
        }
        Kind::imm8 => (OpKind::Immediate8, u64::from(byte)),
        Kind::imm8_const_1 => (OpKind::Immediate8, 1),
        Kind::imm8sex16 => (OpKind::Immediate8to16, byte as i8 as u64),
        Kind::imm8sex32 => (OpKind::Immediate8to32, byte as i8 as u64),
        Kind::imm8sex64 => (OpKind::Immediate8to64, byte as i8 as u64),
        Kind::imm16 => (OpKind::Immediate16, value & 0xffff),
        Kind::imm32 => (OpKind::Immediate32, value & 0xffff_ffff),
        Kind::imm32sex64 => (OpKind::Immediate32to64, value as i32 as u64),
        _ => (OpKind::Immediate64, value),
    };
    instruction.set_op_kind(index, op_kind);
    match op_kind {
        OpKind::Immediate8 => instruction.set_immediate8(value as u8),
        OpKind::Immediate8to16 => instruction.set_immediate8to16(value as i16),
        OpKind::Immediate8to32 => instruction.set_immediate8to32(value as i32),
        OpKind::Immediate8to64 => instruction.set_immediate8to64(value as i64),
        OpKind::Immediate16 => instruction.set_immediate16(value as u16),
        OpKind::Immediate32 => instruction.set_immediate32(value as u32),
        OpKind::Immediate32to64 => instruction.set_immediate32to64(value as i64),
        _ => instruction.set_immediate64(value),
    }
}

/// A memory operand; `vector` is the index of a gather.
fn memory(
    instruction: &mut Instruction,
    index: u32,
    form: Form,
    around: &Surroundings,
    vector: Option<Register>,
    random: &mut Random,
) -> Option<()> {
    instruction.set_op_kind(index, OpKind::Memory);
    let long = around.bits == 64;
    let other = matches!(
        form,
        Form::Addresses
            | Form::AddressesIndex
            | Form::AbsoluteAddresses
            | Form::Short
            | Form::ShortDisp16
    );
    let registers = if long { 16 } else { 8 };
    let first = match (long, other) {
        (true, false) => Register::RAX,
        (true, true) | (false, false) => Register::EAX,
        (false, true) => Register::None,
    };
    let wide = if first == Register::RAX { 8 } else { 4 };
    let small = i64::from(random.next() as i8);
    let large = random.next() as i16 as i64 * 16 + 0x200;
    instruction.set_segment_prefix(match form {
        Form::OtherSegment if long => Register::None,
        _ => segment(Some(form), random),
    });
    if first == Register::None {
        // Addresses of 16 bits: one of eight sums. Memory of cases is out of their reach without a segment.
        let bare = form == Form::Short;
        let (base, index) = random.pick(&[
            (Register::BX, Register::SI),
            (Register::BX, Register::DI),
            (Register::BP, Register::SI),
            (Register::BP, Register::DI),
            (Register::SI, Register::None),
            (Register::DI, Register::None),
            (Register::BX, Register::None),
            // BP alone has a displacement.
            (
                if bare { Register::BX } else { Register::BP },
                Register::None,
            ),
        ]);
        if random.below(4) != 0 {
            instruction.set_segment_prefix(random.pick(&[Register::FS, Register::GS]));
        }
        let (displacement, size) = match form {
            Form::Short => (0, 0),
            Form::AbsoluteAddresses => (random.next() & 0x7fff, 2),
            Form::ShortDisp16 => (random.next() & 0xffff, 2),
            // Displacements of 16 bits that fit in eight are written so.
            _ => (small as u64 & 0xffff, 1),
        };
        if form != Form::AbsoluteAddresses {
            instruction.set_memory_base(base);
            instruction.set_memory_index(index);
        }
        instruction.set_memory_displ_size(size);
        instruction.set_memory_displacement64(displacement);
        return Some(());
    }
    if long && other && random.one_in(3) {
        // Without a segment no operand that a case can reach lies near the end of what such addresses name.
        instruction.set_segment_prefix(random.pick(&[Register::FS, Register::GS]));
    }
    let base = first + random.below(registers) as u32;
    let mut any_index = first + random.below(registers) as u32;
    if any_index.number() == 4 {
        // RSP can't be an index.
        any_index = first + 1u32;
    }
    let scale = 1 << random.below(4);
    let (use_base, use_index, displacement, size) = match form {
        Form::Base => (true, vector.is_some(), 0, 0),
        Form::Disp8 | Form::Fs | Form::OtherSegment | Form::Addresses => {
            (true, vector.is_some(), small, 1)
        }
        Form::Disp32 => (true, vector.is_some(), large, wide),
        Form::Index => (true, true, small, 1),
        Form::Gs | Form::AddressesIndex => (true, true, large, wide),
        Form::IndexOnly => {
            let near = around.target as i64 - small * scale;
            (false, true, near, wide)
        }
        Form::Rip => {
            instruction.set_memory_base(Register::RIP);
            instruction.set_memory_displacement64(around.target);
            instruction.set_memory_displ_size(8);
            return Some(());
        }
        Form::RipAddresses => {
            instruction.set_memory_base(Register::EIP);
            instruction.set_memory_displacement64(around.target & 0xffff_ffff);
            instruction.set_memory_displ_size(4);
            return Some(());
        }
        Form::Absolute | Form::AbsoluteFs | Form::AbsoluteGs | Form::AbsoluteAddresses => {
            (false, vector.is_some(), around.target as i64, wide)
        }
        _ => return None,
    };
    if use_base {
        instruction.set_memory_base(base);
    }
    if use_index {
        instruction.set_memory_index(vector.unwrap_or(any_index));
        instruction.set_memory_index_scale(scale as u32);
    }
    instruction.set_memory_displ_size(size);
    let mask = if wide == 8 { u64::MAX } else { 0xffff_ffff };
    instruction.set_memory_displacement64(displacement as u64 & mask);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn around(bits: u32) -> Surroundings {
        Surroundings {
            ip: 0x1010_0000,
            target: 0x1040_1000,
            landing: 0x1010_0100,
            near: 0x1010_0040,
            bits,
        }
    }

    fn written(code: Code, form: Form, bits: u32) -> (Vec<u8>, Instruction) {
        let around = around(bits);
        let bytes = write(Encoding { code, form }, &around, &mut Random(7)).expect("it exists");
        let instruction = Decoder::with_ip(bits, &bytes, around.ip, DecoderOptions::NONE).decode();
        (bytes, instruction)
    }

    #[test]
    fn addresses_are_written_in_the_form_that_was_asked_for() {
        let (_, eip) = written(Code::Add_r32_rm32, Form::RipAddresses, 64);
        assert_eq!(eip.memory_base(), Register::EIP);
        assert_eq!(eip.memory_displacement64(), 0x1040_1000);
        for (form, segment, prefix) in [
            (Form::AbsoluteFs, Register::FS, 0x64),
            (Form::AbsoluteGs, Register::GS, 0x65),
            (Form::AbsoluteAddresses, Register::DS, 0x67),
        ] {
            let (bytes, absolute) = written(Code::Add_r32_rm32, form, 64);
            assert_eq!(absolute.memory_base(), Register::None);
            assert_eq!((absolute.memory_segment(), bytes[0]), (segment, prefix));
        }
        for (form, size) in [
            (Form::Short, 0),
            (Form::Addresses, 1),
            (Form::ShortDisp16, 2),
        ] {
            let (_, sum) = written(Code::Add_r32_rm32, form, 32);
            assert!(sum.memory_base().is_gpr16(), "{form:?}");
            assert_eq!(sum.memory_displ_size(), size, "{form:?}");
        }
        let (_, absolute) = written(Code::Add_r32_rm32, Form::AbsoluteAddresses, 32);
        assert_eq!(absolute.memory_base(), Register::None);
        assert_eq!(absolute.memory_displ_size(), 2);
    }

    #[test]
    fn strings_without_a_segment_to_choose_have_its_prefix_nevertheless() {
        for (form, prefix) in [(Form::Fs, 0x64), (Form::Gs, 0x65)] {
            let (bytes, _) = written(Code::Stosb_m8_AL, form, 64);
            assert_eq!(bytes, [prefix, 0xaa]);
        }
    }

    /// An encoding that is never written would count as covered by none, or be left out unseen.
    #[test]
    fn every_encoding_can_be_written() {
        for (level, bits) in [(Level::V3, 64), (Level::V3, 32), (Level::V2, 64)] {
            for encoding in encodings(level, bits) {
                let around = around(bits);
                let found =
                    (0..16).any(|seed| write(encoding, &around, &mut Random(seed)).is_some());
                assert!(found, "{encoding:?}, {bits} bits");
            }
        }
    }
}
