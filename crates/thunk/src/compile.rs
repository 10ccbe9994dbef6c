//! From a guest instruction to host code: `rdi` is the register file, `rsi` the memory operand.
//!
//! Explicit general registers are renamed to `r8` and up, so that no guest register is in the way
//! of the stack, the two pointers, or callee-saved registers; implicit ones (RAX in CMPXCHG) keep
//! their names. Vector registers keep theirs, all being caller-saved. What the instruction reads is
//! loaded before it, what it writes is stored after it, and nothing else is touched.

use iced_x86::{
    Code, CodeSize, Encoder, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register, RflagsBits,
};

use crate::emit::{Condition, Emitter, host_register as host};
use crate::error::{ThunkError, Unsupported};
use crate::registers::offset;
use crate::select;
use crate::thunk::{
    Access, Class, ElementMask, MemoryOperand, STATUS_DONE, STATUS_SIMD, STATUS_X87_PENDING,
    X87Pointers,
};

/// The flags thunks carry, as iced names them.
const ARITHMETIC: u32 = RflagsBits::OF
    | RflagsBits::SF
    | RflagsBits::ZF
    | RflagsBits::AF
    | RflagsBits::CF
    | RflagsBits::PF;

/// The same in RFLAGS positions.
const ARITHMETIC_MASK: u32 = 0x8d5;

/// Where explicit general registers go, in order. No computing instruction has more than three, nor
/// uses one of these implicitly. x87 and MMX thunks keep the x87 pointers in all but the first.
const POOL: [u8; 4] = [host::R8, host::R9, host::R10, host::R11];

/// A compiled instruction's properties; its code is in the compiler's buffer.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    pub(crate) fallible: bool,
    pub(crate) class: Class,
    pub(crate) waiting: bool,
    pub(crate) uses_vector: bool,
    pub(crate) simd_float: bool,
    pub(crate) memory: Option<MemoryOperand>,
    pub(crate) x87_pointers: X87Pointers,
}

/// One view of a guest general register (all of it, or its second byte) and its host register.
#[derive(Clone, Copy, Default)]
struct View {
    number: u8,
    high: bool,
    host: u8,
    load: bool,
    store: bool,
}

/// What to load and store of the guest's registers.
#[derive(Default)]
struct Plan {
    views: [View; 5],
    view_count: usize,
    /// Implicit general registers, by number: stored too.
    implicit: [Option<bool>; 4],
    /// Bytes to load of each vector register.
    vector_load: [u8; 16],
    vector_store: [bool; 16],
}

impl Plan {
    fn views(&self) -> &[View] {
        &self.views[..self.view_count]
    }

    fn view(&mut self, number: u8, high: bool) -> Option<&mut View> {
        self.views[..self.view_count]
            .iter_mut()
            .find(|view| view.number == number && view.high == high)
    }
}

/// Compiles one instruction at a time.
pub(crate) struct Compiler {
    encoder: Encoder,
    info: InstructionInfoFactory,
    emit: Emitter,
}

impl core::fmt::Debug for Compiler {
    fn fmt(&self, formatter: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        formatter.debug_struct("Compiler").finish_non_exhaustive()
    }
}

impl Default for Compiler {
    fn default() -> Self {
        Self {
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
            emit: Emitter::default(),
        }
    }
}

impl Compiler {
    /// The code of the last [`Compiler::compile`].
    pub(crate) fn code(&self) -> &[u8] {
        self.emit.bytes()
    }

    /// Compiles `instruction` as `code`, both from [`select::select`].
    pub(crate) fn compile(
        &mut self,
        instruction: &Instruction,
        code: Code,
    ) -> Result<Draft, ThunkError> {
        let mnemonic = code.mnemonic();
        let vex = code.encoding() == EncodingKind::VEX;
        self.emit.clear();
        if matches!(mnemonic, Mnemonic::Vzeroupper | Mnemonic::Vzeroall) {
            return Ok(self.zero_vectors(mnemonic, instruction.code_size()));
        }

        let (mut renamed, memory_index) = self::renamed(instruction, code);
        let plan = self.plan(&mut renamed, vex)?;
        let memory = memory_index
            .map(|index| self.memory_operand(&renamed, index))
            .transpose()?;

        let x87 = select::is_x87(mnemonic);
        let touches_x87 = x87 || uses_mmx(&renamed);
        // The host CPU does not look for a pending exception before CVTPI2PS of memory.
        let reads_memory = mnemonic == Mnemonic::Cvtpi2ps && memory.is_some();
        let waiting = touches_x87 && !select::is_x87_no_wait(mnemonic) && !reads_memory;
        let simd_float = select::is_simd_float(mnemonic);
        let uses_vector = plan.vector_load.iter().any(|&bytes| bytes != 0)
            || plan.vector_store.iter().any(|&stored| stored)
            || simd_float;
        let reads = renamed.rflags_read() & ARITHMETIC != 0;
        let modified = renamed.rflags_modified() & ARITHMETIC;
        let defined = renamed.rflags_written() | renamed.rflags_cleared() | renamed.rflags_set();
        let load_flags = reads || (modified != 0 && defined & ARITHMETIC != ARITHMETIC);
        let store_flags = modified != 0;

        let pending = waiting.then(|| self.check_pending_x87());
        if touches_x87 {
            self.load_x87();
        }
        let bit_offset = memory.and_then(|operand| operand.bit_offset.then_some(operand.size));
        if let Some(size) = bit_offset {
            for view in plan.views() {
                self.emit.load64(view.host, offset::gpr(view.number));
                // and r64, 8 × size - 1
                let rex = 0x48 | view.host >> 3;
                self.emit
                    .raw(&[rex, 0x83, 0xe0 | view.host & 7, (8 * size - 1) as u8]);
            }
        }
        if load_flags {
            self.load_flags();
        }
        if plan.implicit[usize::from(host::RBX)].is_some() {
            self.emit.raw(&[0x53]); // push rbx
        }
        self.load_registers(&plan, vex, bit_offset.is_some());

        let bytes = self.encode(&renamed)?;
        if simd_float {
            self.simd_float(
                &renamed,
                &bytes,
                &plan,
                memory,
                Shape {
                    vex,
                    touches_x87,
                    store_flags,
                },
            )?;
        } else {
            self.emit.raw(&bytes);
            if store_flags {
                self.emit.raw(&[0x9c]); // pushfq
            }
            self.commit(&plan, vex, touches_x87, store_flags, mnemonic);
            if waiting {
                self.emit.return_status(STATUS_DONE);
            } else {
                self.emit.raw(&[0xc3]); // ret
            }
        }
        if let Some(pending) = pending {
            self.emit.land(pending);
            self.emit.return_status(STATUS_X87_PENDING);
        }

        let data = if memory.is_some() {
            X87Pointers::InstructionAndData
        } else {
            X87Pointers::Instruction
        };
        Ok(Draft {
            fallible: waiting || simd_float,
            class: match () {
                () if x87 => Class::X87,
                () if touches_x87 => Class::Mmx,
                () if vex && uses_vector => Class::Avx,
                () if vex => Class::VexInteger,
                () if uses_vector => Class::Sse,
                () => Class::Integer,
            },
            waiting,
            uses_vector,
            simd_float,
            memory,
            x87_pointers: if x87 && !select::is_x87_control(mnemonic) {
                data
            } else {
                X87Pointers::Unchanged
            },
        })
    }

    /// Renames the explicit general registers and finds what else the instruction uses.
    fn plan(&mut self, renamed: &mut Instruction, vex: bool) -> Result<Plan, ThunkError> {
        let code = renamed.code();
        let refuse = || ThunkError::Unsupported {
            code,
            reason: Unsupported::NotComputing,
        };
        let mut plan = Plan::default();
        let op_code = code.op_code();
        let mut guests = [None; 5];
        let mut pool = POOL.iter();
        for index in 0..renamed.op_count() {
            if renamed.op_kind(index) != OpKind::Register
                || select::is_fixed_register(op_code.op_kind(index))
            {
                continue;
            }
            let register = renamed.op_register(index);
            let Some((number, high)) = select::general_number(register) else {
                continue;
            };
            if plan.view(number, high).is_none() {
                let host = *pool.next().ok_or_else(refuse)?;
                plan.views[plan.view_count] = View {
                    number,
                    high,
                    host,
                    ..View::default()
                };
                plan.view_count += 1;
            }
            let view = plan.view(number, high).ok_or_else(refuse)?;
            guests[index as usize] = Some((number, high, register.size()));
            renamed.set_op_register(index, sized(view.host, register.size()));
        }

        let info = self.info.info(renamed);
        for used in info.used_registers() {
            let (read, written) = directions(used.access());
            let register = used.register();
            if let Some((number, _)) = select::general_number(register) {
                if POOL.contains(&number) || number == host::RSI {
                    continue;
                }
                let slot = plan
                    .implicit
                    .get_mut(usize::from(number))
                    .ok_or_else(refuse)?;
                *slot = Some(slot.unwrap_or(false) || written);
            } else if register.is_vector_register() {
                let number = register.number();
                if read || used.access() == OpAccess::CondWrite {
                    let bytes = if vex && !register.is_xmm() { 32 } else { 16 };
                    plan.vector_load[number] = plan.vector_load[number].max(bytes);
                }
                plan.vector_store[number] |= written;
            }
        }
        for (index, guest) in guests.iter().enumerate() {
            let Some((number, high, size)) = *guest else {
                continue;
            };
            let access = match index {
                0 => info.op0_access(),
                1 => info.op1_access(),
                2 => info.op2_access(),
                3 => info.op3_access(),
                _ => info.op4_access(),
            };
            let (read, written) = directions(access);
            let implicit = !high
                && usize::from(number) < plan.implicit.len()
                && plan.implicit[usize::from(number)].is_some();
            let view = plan.view(number, high).ok_or_else(refuse)?;
            // Parts that the instruction leaves alone must be there to be stored again.
            let partial = !high && size < 4 || access == OpAccess::CondWrite;
            view.load |= read || partial;
            view.store |= written;
            if implicit {
                view.host = number;
                let host = view.host;
                renamed.set_op_register(index as u32, sized(host, size));
            }
        }
        Ok(plan)
    }

    fn memory_operand(
        &mut self,
        renamed: &Instruction,
        index: u32,
    ) -> Result<MemoryOperand, ThunkError> {
        let code = renamed.code();
        let mnemonic = code.mnemonic();
        let vex = code.encoding() == EncodingKind::VEX;
        let size = renamed.memory_size().size();
        let access = match self.info.info(renamed).op_access(index) {
            OpAccess::Read | OpAccess::CondRead => Access::Read,
            OpAccess::Write | OpAccess::CondWrite => Access::Write,
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => Access::ReadWrite,
            OpAccess::None | OpAccess::NoMemAccess => {
                return Err(ThunkError::Unsupported {
                    code,
                    reason: Unsupported::Address,
                });
            }
        };
        let aligned = match mnemonic {
            Mnemonic::Cmpxchg16b => true,
            _ if vex => select::is_aligned_vex(mnemonic),
            _ if select::is_x87(mnemonic) => false,
            _ => size == 16 && !select::is_unaligned_sse(mnemonic),
        };
        Ok(MemoryOperand {
            size,
            access,
            alignment: if aligned { size } else { 1 },
            checked_alignment: match (size, mnemonic) {
                (_, Mnemonic::Vcvtph2ps | Mnemonic::Vcvtps2ph) => 1,
                _ if select::masked_element_size(mnemonic).is_some() => 1,
                (2 | 4 | 8, _) => size,
                (10, _) => 8,
                _ => 1,
            },
            locked: renamed.has_lock_prefix() || mnemonic == Mnemonic::Xchg,
            bit_offset: select::is_bit_test(mnemonic) && renamed.op1_kind() == OpKind::Register,
            mask: select::masked_element_size(mnemonic).map(|element_size| ElementMask {
                register: renamed.op1_register().number() as u8,
                element_size,
            }),
        })
    }

    fn encode(&mut self, instruction: &Instruction) -> Result<Vec<u8>, ThunkError> {
        self.encoder.set_buffer(Vec::with_capacity(16));
        match self.encoder.encode(instruction, 0) {
            Ok(_) => Ok(self.encoder.take_buffer()),
            Err(cause) => Err(ThunkError::Encode {
                code: instruction.code(),
                cause,
            }),
        }
    }

    /// Leaves unless no unmasked x87 exception is pending, and makes FSW agree with that: ES and B
    /// in an image that a guest wrote may claim otherwise, and the host must not take #MF.
    fn check_pending_x87(&mut self) -> crate::emit::Jump {
        self.emit.load16(host::RAX, offset::X87);
        self.emit.raw(&[0xf7, 0xd0]); // not eax
        self.emit
            .with_file(false, &[0x23], host::RAX, offset::X87 + 2); // and eax, [fsw]
        self.emit.raw(&[0xa8, 0x3f]); // test al, 3f
        let pending = self.emit.jump_if(Condition::NotZero);
        // and word [fsw], 7f7f
        self.emit.raw(&[0x66]);
        self.emit.with_file(false, &[0x81], 4, offset::X87 + 2);
        self.emit.raw(&[0x7f, 0x7f]);
        pending
    }

    /// Guest x87 state into the host's. FXRSTOR loads MXCSR too, so it gets the host's own.
    fn load_x87(&mut self) {
        self.emit.load16(host::R9, offset::X87 + 6);
        self.emit.load64(host::R10, offset::X87 + 8);
        self.emit.load64(host::R11, offset::X87 + 16);
        self.emit.stmxcsr(offset::X87 + 24);
        self.emit
            .with_file(false, &[0xd9], 7, offset::HOST_CONTROL_WORD); // fnstcw
        self.emit.with_file(true, &[0x0f, 0xae], 1, offset::X87); // fxrstor64
    }

    /// Host x87 state back to the guest's, then the host's as Rust expects it. The pointers that
    /// the host recorded are host addresses; the guest's old ones stay, or zero after FNINIT.
    fn store_x87(&mut self, initialised: bool) {
        self.emit.with_file(true, &[0x0f, 0xae], 0, offset::X87); // fxsave64
        if initialised {
            self.emit.raw(&[0x45, 0x31, 0xc9]); // xor r9d, r9d
            self.emit.raw(&[0x45, 0x31, 0xd2]); // xor r10d, r10d
            self.emit.raw(&[0x45, 0x31, 0xdb]); // xor r11d, r11d
        }
        self.emit.store16(host::R9, offset::X87 + 6);
        self.emit.store64(host::R10, offset::X87 + 8);
        self.emit.store64(host::R11, offset::X87 + 16);
        self.reset_x87();
    }

    fn reset_x87(&mut self) {
        self.emit.raw(&[0xdb, 0xe3]); // fninit
        self.emit
            .with_file(false, &[0xd9], 5, offset::HOST_CONTROL_WORD); // fldcw
    }

    /// The arithmetic flags without POPF, which is slow and could set TF or AC.
    fn load_flags(&mut self) {
        self.emit.load32(host::RAX, offset::FLAGS);
        self.emit.raw(&[0x66, 0xc1, 0xc0, 0x08]); // rol ax, 8: low flags to ah, OF to bit 3 of al
        self.emit.raw(&[0x24, 0x08]); // and al, 8
        self.emit.raw(&[0x04, 0x78]); // add al, 78: overflows if bit 3 is set
        self.emit.raw(&[0x9e]); // sahf
    }

    /// Merges the flags that PUSHFQ left on the stack into the guest's.
    fn store_flags(&mut self) {
        self.emit.raw(&[0x58, 0x25]); // pop rax; and eax, …
        self.emit.raw(&ARITHMETIC_MASK.to_le_bytes());
        self.emit.load64(host::RCX, offset::FLAGS);
        self.emit.raw(&[0x48, 0x81, 0xe1]); // and rcx, …
        self.emit.raw(&(!ARITHMETIC_MASK).to_le_bytes());
        self.emit.raw(&[0x48, 0x09, 0xc8]); // or rax, rcx
        self.emit.store64(host::RAX, offset::FLAGS);
    }

    fn load_registers(&mut self, plan: &Plan, vex: bool, views_loaded: bool) {
        for (number, implicit) in (0..).zip(&plan.implicit) {
            if implicit.is_some() {
                self.emit.load64(number, offset::gpr(number));
            }
        }
        for view in plan
            .views()
            .iter()
            .filter(|view| view.load && !views_loaded)
        {
            if view.high {
                self.emit.load8(view.host, offset::gpr(view.number) + 1);
            } else if view.host >= POOL[0] {
                self.emit.load64(view.host, offset::gpr(view.number));
            }
        }
        for (number, &bytes) in (0..).zip(&plan.vector_load) {
            match bytes {
                0 => {}
                _ if vex => self
                    .emit
                    .load_vex(bytes == 32, number, offset::vector(number)),
                _ => self.emit.load_xmm(number, offset::vector(number)),
            }
        }
    }

    /// Stores what the instruction wrote. The stack holds its flags if they are stored.
    fn commit(
        &mut self,
        plan: &Plan,
        vex: bool,
        touches_x87: bool,
        store_flags: bool,
        mnemonic: Mnemonic,
    ) {
        if touches_x87 {
            self.store_x87(mnemonic == Mnemonic::Fninit);
        }
        for (number, implicit) in (0..).zip(&plan.implicit) {
            if *implicit == Some(true) {
                self.emit.store64(number, offset::gpr(number));
            }
        }
        // A second byte after the whole register that it is part of.
        for view in plan.views().iter().filter(|view| view.store && !view.high) {
            self.emit.store64(view.host, offset::gpr(view.number));
        }
        for view in plan.views().iter().filter(|view| view.store && view.high) {
            self.emit.store8(view.host, offset::gpr(view.number) + 1);
        }
        for (number, &stored) in (0..).zip(&plan.vector_store) {
            match (stored, vex) {
                (false, _) => {}
                (true, true) => self.emit.store_ymm(number, offset::vector(number)),
                (true, false) => self.emit.store_xmm(number, offset::vector(number)),
            }
        }
        if store_flags {
            self.store_flags();
        }
        if plan.implicit[usize::from(host::RBX)].is_some() {
            self.emit.raw(&[0x5b]); // pop rbx
        }
        let used = plan.vector_load.iter().any(|&bytes| bytes != 0)
            || plan.vector_store.iter().any(|&stored| stored);
        if vex && used {
            self.emit.raw(&[0xc5, 0xf8, 0x77]); // vzeroupper
        }
    }

    /// The instruction under the guest's MXCSR with all exceptions masked, and the end of the
    /// thunk. With the usual control bits the sticky flags gather in the guest's MXCSR by
    /// themselves. Otherwise they are looked at first, and an unmasked one keeps the results from
    /// being committed.
    fn simd_float(
        &mut self,
        renamed: &Instruction,
        bytes: &[u8],
        plan: &Plan,
        memory: Option<MemoryOperand>,
        shape: Shape,
    ) -> Result<(), ThunkError> {
        let Shape {
            vex,
            touches_x87,
            store_flags,
        } = shape;
        let mnemonic = renamed.mnemonic();
        let e = &mut self.emit;
        e.load32(host::RAX, offset::MXCSR);
        e.raw(&[0x89, 0xc1]); // mov ecx, eax
        e.raw(&[0x83, 0xe1, 0xc0]); // and ecx, ~3f
        e.raw(&[0x81, 0xf9]); // cmp ecx, 1f80
        e.raw(&crate::MXCSR_DEFAULT.to_le_bytes());
        let unusual = e.jump_if(Condition::NotZero);
        e.ldmxcsr(offset::MXCSR);
        e.raw(bytes);
        if store_flags {
            e.raw(&[0x9c]); // pushfq
        }
        e.stmxcsr(offset::MXCSR);
        let commit = e.here();
        self.commit(plan, vex, touches_x87, store_flags, mnemonic);
        self.emit.return_status(STATUS_DONE);

        // A result in memory waits in the scratch area until it is known to be wanted.
        let stores = memory.filter(|operand| operand.access != Access::Read);
        let deferred = match stores {
            None => bytes.to_vec(),
            Some(_) => {
                let mut deferred = *renamed;
                deferred.set_memory_base(Register::RDI);
                deferred.set_memory_displacement64(offset::SCRATCH as u64);
                deferred.set_memory_displ_size(8);
                self.encode(&deferred)?
            }
        };
        let e = &mut self.emit;
        e.land(unusual);
        e.stmxcsr(offset::HOST_MXCSR);
        e.raw(&[0x89, 0xc1]); // mov ecx, eax
        e.raw(&[0x81, 0xe1, 0x40, 0xe0, 0, 0]); // and ecx, FTZ | RC | DAZ
        e.raw(&[0x81, 0xc9]); // or ecx, all masked
        e.raw(&crate::MXCSR_DEFAULT.to_le_bytes());
        // An unmasked underflow is raised for exact results too, a masked one isn't, unless results
        // are flushed to zero (SDM vol. 1 11.5.2.5). The flushed result is never committed.
        e.raw(&[0xa9, 0, 0x08, 0, 0]); // test eax, UM
        let masked = e.jump_if(Condition::NotZero);
        e.raw(&[0x81, 0xc9, 0, 0x80, 0, 0]); // or ecx, FTZ
        e.land(masked);
        e.store32(host::RCX, offset::RUN_MXCSR);
        e.ldmxcsr(offset::RUN_MXCSR);
        e.raw(&deferred);
        if store_flags {
            e.raw(&[0x9c]); // pushfq
        }
        e.stmxcsr(offset::RUN_MXCSR);
        e.ldmxcsr(offset::HOST_MXCSR);
        e.load32(host::RCX, offset::RUN_MXCSR);
        e.raw(&[0x83, 0xe1, 0x3f]); // and ecx, 3f: raised
        e.raw(&[0xc1, 0xe8, 0x07]); // shr eax, 7
        e.raw(&[0xf7, 0xd0]); // not eax
        e.raw(&[0x21, 0xc8]); // and eax, ecx: raised and unmasked
        // An unmasked exception before the computation (IE, DE, ZE) keeps the others from being
        // found (SDM vol. 1 11.5.3).
        e.raw(&[0xa8, 0x07]); // test al, 7
        let computed = e.jump_if(Condition::Zero);
        e.raw(&[0x83, 0xe1, 0x07]); // and ecx, 7
        e.land(computed);
        e.with_file(false, &[0x09], host::RCX, offset::MXCSR); // or [mxcsr], ecx
        e.raw(&[0xa8, 0x3f]); // test al, 3f
        if let Some(operand) = stores {
            let raised = e.jump_if(Condition::NotZero);
            for part in (0..operand.size).step_by(8) {
                e.load64(host::RAX, offset::SCRATCH + part as i32);
                e.raw(&[0x48, 0x89, 0x46, part as u8]); // mov [rsi + part], rax
            }
            e.raw(&[0x31, 0xc0]); // xor eax, eax
            e.jump_back_if(Condition::Zero, commit);
            e.land(raised);
        } else {
            e.jump_back_if(Condition::Zero, commit);
        }
        if store_flags {
            e.raw(&[0x58]); // pop rax
        }
        if touches_x87 && mnemonic == Mnemonic::Cvtpi2ps && memory.is_some() {
            // The CPU stays out of MMX mode then.
            self.reset_x87();
        } else if touches_x87 {
            // The CPU enters MMX mode before it finds the exception, but writes no MMX register.
            self.emit.with_file(true, &[0x0f, 0xae], 1, offset::X87); // fxrstor64
            self.emit.raw(&[0x0f, 0x7e, 0xc1]); // movd ecx, mm0
            self.store_x87(false);
        }
        if vex {
            self.emit.raw(&[0xc5, 0xf8, 0x77]); // vzeroupper
        }
        self.emit.return_status(STATUS_SIMD);
        Ok(())
    }

    /// VZEROUPPER and VZEROALL: outside 64-bit mode only YMM0 … YMM7 exist.
    fn zero_vectors(&mut self, mnemonic: Mnemonic, code_size: CodeSize) -> Draft {
        let count = if code_size == CodeSize::Code64 { 16 } else { 8 };
        self.emit.raw(&[0x0f, 0x57, 0xc0]); // xorps xmm0, xmm0
        for number in 0..count {
            if mnemonic == Mnemonic::Vzeroall {
                self.emit.store_xmm(0, offset::vector(number));
            }
            self.emit.store_xmm(0, offset::vector(number) + 16);
        }
        self.emit.raw(&[0xc3]); // ret
        Draft {
            fallible: false,
            class: Class::Avx,
            waiting: false,
            uses_vector: true,
            simd_float: false,
            memory: None,
            x87_pointers: X87Pointers::Unchanged,
        }
    }
}

/// What differs between thunks around a floating-point instruction.
#[derive(Clone, Copy)]
struct Shape {
    vex: bool,
    touches_x87: bool,
    store_flags: bool,
}

/// The instruction with `[rsi]` as its memory operand and without prefixes that mean nothing here;
/// and which operand that is.
fn renamed(instruction: &Instruction, code: Code) -> (Instruction, Option<u32>) {
    let mut renamed = *instruction;
    renamed.set_code(code);
    renamed.set_code_size(CodeSize::Code64);
    renamed.set_segment_prefix(Register::None);
    renamed.set_has_rep_prefix(false);
    renamed.set_has_repne_prefix(false);
    let index = (0..renamed.op_count()).find(|&index| renamed.op_kind(index) == OpKind::Memory);
    if index.is_some() {
        renamed.set_memory_base(Register::RSI);
        renamed.set_memory_index(Register::None);
        renamed.set_memory_index_scale(1);
        renamed.set_memory_displacement64(0);
        renamed.set_memory_displ_size(0);
    }
    (renamed, index)
}

/// MMX registers are x87 registers. CVTPI2PS enters MMX mode even with a memory operand.
fn uses_mmx(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Emms | Mnemonic::Cvtpi2ps)
        || (0..instruction.op_count()).any(|index| {
            instruction.op_kind(index) == OpKind::Register && instruction.op_register(index).is_mm()
        })
}

/// Whether an access reads and whether it writes.
fn directions(access: OpAccess) -> (bool, bool) {
    match access {
        OpAccess::None | OpAccess::NoMemAccess => (false, false),
        OpAccess::Read | OpAccess::CondRead => (true, false),
        OpAccess::Write | OpAccess::CondWrite => (false, true),
        OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
    }
}

/// A host general register by number and size in bytes. Numbers 4 … 7 have no byte register here.
fn sized(number: u8, size: usize) -> Register {
    let number = u32::from(number);
    match size {
        1 if number >= 8 => Register::R8L + (number - 8),
        1 => Register::AL + number,
        2 => Register::AX + number,
        4 => Register::EAX + number,
        _ => Register::RAX + number,
    }
}
