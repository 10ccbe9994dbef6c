//! Runs of instructions that just compute, of all that a profile admits: what programs are filled with.

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, Register, RflagsBits};
use trapgate_x86::profile::Level;

use crate::encodings::{Encoding, Form, Surroundings, encodings, write};
use crate::profile::{is_of_the_machine, memory_operand};
use crate::programs::{Code, Computing, Place};
use crate::random::Random;

/// Encodings to choose from.
pub struct Straight {
    encodings: Vec<Encoding>,
}

/// Whether an instruction does the same wherever it stands, and leaves the program's frame alone.
fn is_harmless(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let name = instruction.mnemonic();
    !is_of_the_machine(instruction)
        && instruction.flow_control() == FlowControl::Next
        && !instruction.is_privileged()
        && !instruction.is_string_instruction()
        && !instruction.is_stack_instruction()
        && !crate::amd::is_prefetch_of_register(instruction.code())
        && !matches!(
            name,
            // Random, or of the kernel.
            M::Rdrand | M::Rdseed | M::Rdpmc | M::Hlt | M::In | M::Out | M::Cli | M::Sti | M::Clac | M::Stac
            // Selectors and bases.
            | M::Lar | M::Lsl | M::Verr | M::Verw | M::Lfs | M::Lgs | M::Lss
            | M::Wrfsbase | M::Wrgsbase
            // Flags of which some are not the program's.
            | M::Popf | M::Popfd | M::Popfq | M::Std
            // Images, in which x87 pointers depend on the CPU; and what they and control words make of a program: an
            // exception somewhere.
            | M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 | M::Xsave | M::Xsave64 | M::Xsaveopt
            | M::Xsaveopt64 | M::Xrstor | M::Xrstor64 | M::Fnsave | M::Frstor | M::Fnstenv | M::Fldenv
            | M::Fldcw | M::Ldmxcsr | M::Vldmxcsr
            // Faults more often than not; programs have a part for it.
            | M::Div | M::Idiv
            // An undefined result.
            | M::Shld | M::Shrd
            // Addresses in vectors.
            | M::Vgatherdps | M::Vgatherdpd | M::Vgatherqps | M::Vgatherqpd | M::Vpgatherdd | M::Vpgatherdq
            | M::Vpgatherqd | M::Vpgatherqq | M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu | M::Xlatb
        )
}

impl Straight {
    /// Of a profile.
    pub fn new(level: Level) -> Self {
        const FORMS: [Form; 7] = [
            Form::Registers,
            Form::Base,
            Form::Disp8,
            Form::Disp32,
            Form::Index,
            Form::Rip,
            Form::Absolute,
        ];
        let encodings = encodings(level, 64)
            .into_iter()
            .filter(|encoding| {
                let mut instruction = Instruction::default();
                instruction.set_code(encoding.code);
                let segments = (0..encoding.code.op_code().op_count()).any(|index| {
                    format!("{:?}", encoding.code.op_code().op_kind(index)).contains("seg")
                });
                FORMS.contains(&encoding.form)
                    && is_harmless(&instruction)
                    && !segments
                    && !encoding.code.op_code().is_input_output()
            })
            .collect();
        Self { encodings }
    }

    /// One instruction with what makes its operand lie in the data. `None` if this one won't do.
    fn one(&self, place: &Place, random: &mut Random, next: u64) -> Option<(Vec<u8>, Instruction)> {
        let encoding = random.pick(&self.encodings);
        let (start, length) = place.data;
        let target = (start + 0x200 + random.below(length - 0x400)) & !63;
        let mut around = Surroundings {
            ip: next,
            target,
            landing: next,
            near: next,
            bits: 64,
        };
        let seed = random.next();
        let probe = write(encoding, &around, &mut Random(seed))?;
        let decode = |bytes: &[u8], ip| {
            Decoder::with_ip(64, bytes, ip, DecoderOptions::NO_WBNOINVD).decode()
        };
        let instruction = decode(&probe, next);
        if !is_harmless(&instruction) || instruction.is_invalid() {
            return None;
        }
        let writes_stack_pointer = instruction.op_count() > 0
            && memory_operand(&instruction) != Some(0)
            && instruction.op_register(0).full_register() == Register::RSP;
        if writes_stack_pointer
            || instruction.mnemonic() == Mnemonic::Xchg && uses(&instruction, Register::RSP)
        {
            return None;
        }
        let mut code = Code::at(next);
        if memory_operand(&instruction).is_some()
            && encoding.form != Form::Rip
            && encoding.form != Form::Absolute
        {
            let (base, index) = (instruction.memory_base(), instruction.memory_index());
            if !base.is_gpr64() || base == Register::RSP || base == index {
                return None;
            }
            let mut address = target.wrapping_sub(instruction.memory_displacement64());
            if index != Register::None {
                if index.is_vector_register() {
                    return None;
                }
                // mov index, small
                let small = random.below(32) * 8;
                let number = index.number() as u8;
                if number >= 8 {
                    code.raw(&[0x41]);
                }
                code.raw(&[0xb8 | number & 7]).word(small as u32);
                address = address.wrapping_sub(small * u64::from(instruction.memory_index_scale()));
            }
            // mov base, address
            let number = base.number() as u8;
            code.raw(&[0x48 | number >> 3, 0xb8 | number & 7])
                .raw(&address.to_le_bytes());
            if instruction.op_kind(1) == iced_x86::OpKind::Register
                && matches!(
                    instruction.mnemonic(),
                    Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
                )
            {
                return None;
            }
        } else if matches!(
            instruction.mnemonic(),
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
        ) && memory_operand(&instruction).is_some()
        {
            return None;
        }
        // Again, where it will stand.
        around.ip = code.next();
        let bytes = write(encoding, &around, &mut Random(seed))?;
        let instruction = decode(&bytes, around.ip);
        code.raw(&bytes);
        (instruction.len() == bytes.len()).then_some((code.bytes, instruction))
    }
}

fn uses(instruction: &Instruction, register: Register) -> bool {
    (0..instruction.op_count())
        .any(|operand| instruction.op_register(operand).full_register() == register)
}

impl Computing for Straight {
    fn compute(&mut self, place: &Place, random: &mut Random, code: &mut Code) {
        let mut undefined = 0;
        for _ in 0..1 + random.below(8) {
            let Some((bytes, instruction)) = self.one(place, random, code.next()) else {
                continue;
            };
            // What the manual leaves undefined must not be looked at, nor seen in a fault.
            if instruction.rflags_read() & undefined != 0
                || matches!(instruction.mnemonic(), Mnemonic::Lahf)
            {
                code.raw(&[0x3c, bytes[0]]); // cmp al, …
                undefined = 0;
                continue;
            }
            // A shift by nothing changes no flag.
            let shifts = matches!(
                instruction.mnemonic(),
                Mnemonic::Rol
                    | Mnemonic::Ror
                    | Mnemonic::Rcl
                    | Mnemonic::Rcr
                    | Mnemonic::Shl
                    | Mnemonic::Sal
                    | Mnemonic::Shr
                    | Mnemonic::Sar
            );
            let defined = if shifts {
                0
            } else {
                instruction.rflags_written()
                    | instruction.rflags_cleared()
                    | instruction.rflags_set()
            };
            undefined = undefined & !defined | instruction.rflags_undefined();
            // The decoder takes a rotation by all bits to leave it alone; the manual does not say so.
            if matches!(instruction.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
                undefined |= RflagsBits::OF;
            }
            code.raw(&bytes);
        }
        if undefined != 0 {
            code.raw(&[0x3c, random.next() as u8]);
        }
    }
}
