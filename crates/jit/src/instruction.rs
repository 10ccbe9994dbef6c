//! What is done with a guest instruction, decided before any host code is written.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register, RflagsBits};
use trapgate_thunk::{Class, Harmless, inspect};
use trapgate_x86::registers::{rflags, sreg};

use crate::emit::{RCX, Reg};
use crate::memory::is_instruction_pointer;
use crate::mode::Mode;
use crate::registers::{ADDRESS, GUEST_RCX, HOME, SPARE, is_high_byte, number};
use crate::x87;

/// The arithmetic flags, as the decoder names them.
pub(crate) const FLAGS: u32 = RflagsBits::CF
    | RflagsBits::PF
    | RflagsBits::AF
    | RflagsBits::ZF
    | RflagsBits::SF
    | RflagsBits::OF;

/// How an instruction is translated.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// The same instruction with its registers renamed and its memory operand checked.
    Same(Plan),
    Lea,
    Nothing,
    /// As it is: fences and hints.
    Verbatim,
    PushRegister(usize),
    PushImmediate(i32),
    PushMemory,
    Pop(usize),
    Leave,
    Divide {
        signed: bool,
        wide: bool,
    },
    Jump(u64),
    JumpIf(u8, u64),
    /// JRCXZ, LOOP.
    Count(Count, u64),
    Call(u64),
    JumpIndirect,
    CallIndirect,
    Return(u16),
    PushFlags,
    PopFlags,
    /// STD, else CLD.
    Direction(bool),
    /// STI, else CLI.
    Interrupts(bool),
    /// STAC, else CLAC.
    Access(bool),
    SwapGs,
    /// SYSCALL.
    SystemCall,
    /// SYSRET to 64-bit mode.
    SystemReturn,
    /// RDTSCP, else RDTSC.
    ReadTime {
        processor: bool,
    },
    /// MOV of a segment's selector to a register of 32 or 64 bits.
    Selector(usize),
    /// The same to one of 16 bits.
    SelectorWord(usize),
    /// RDFSBASE, RDGSBASE.
    ReadBase(usize),
    /// WRFSBASE, WRGSBASE of 64 bits.
    WriteBase(usize),
    /// FNSTCW.
    ControlWord,
    /// FLDCW.
    LoadControlWord,
    /// FWAIT.
    Wait,
    /// STMXCSR.
    StoreMxcsr,
    /// LDMXCSR.
    LoadMxcsr,
    String(Text),
    /// BT and its like of memory with an offset in a register.
    BitOfMemory(Plan),
    /// The interpreter runs it; then on with the next.
    Operate,
    /// The interpreter runs it, and what comes then is looked up.
    OperateLast,
}

impl Kind {
    /// Whether it relies on the x87's registers being the guest's: see [`crate::x87`].
    pub(crate) fn uses_x87(self) -> bool {
        match self {
            Self::Same(plan) => matches!(plan.harmless.class, Class::X87 | Class::Mmx),
            Self::LoadControlWord | Self::Wait => true,
            _ => false,
        }
    }

    /// Whether what comes next is not simply the next instruction.
    pub(crate) fn ends(self) -> bool {
        matches!(
            self,
            Self::Jump(_)
                | Self::Count(..)
                | Self::Call(_)
                | Self::JumpIndirect
                | Self::CallIndirect
                | Self::Return(_)
                | Self::SystemCall
                | Self::SystemReturn
                | Self::OperateLast
        )
    }

    /// Whether a RET comes back to the next instruction.
    pub(crate) fn is_call(self) -> bool {
        matches!(self, Self::Call(_) | Self::CallIndirect)
    }

    /// Whether the next instruction need not be run right after it, though it is of the same unit.
    pub(crate) fn leaves(self) -> bool {
        self.is_call() || matches!(self, Self::JumpIf(..))
    }
}

/// A string instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Text {
    /// Bytes of an element.
    pub(crate) size: i32,
    pub(crate) repeated: bool,
    /// MOVS, else STOS.
    pub(crate) moves: bool,
}

/// Which branch on RCX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Count {
    /// JRCXZ
    Zero,
    /// LOOP
    Loop,
}

/// How registers of [`Kind::Same`] are renamed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) harmless: Harmless,
    /// Guest registers that live in memory, and where they are meanwhile.
    pub(crate) visitors: [Option<(usize, Reg)>; 2],
    /// The guest's RCX must be in RCX.
    pub(crate) counts: bool,
    /// RCX then holds the guest's: PCMPESTRI and PCMPISTRI put their result there.
    pub(crate) indexes: bool,
    /// An operand is AH, DH or BH: no REX prefix.
    pub(crate) high: bool,
    /// It names CH: the guest's RCX is in the host's meanwhile, all of it.
    pub(crate) visits_rcx: bool,
    /// MOVZX from AH and its like to a register that needs a REX prefix: by way of [`SPARE`].
    pub(crate) detour: bool,
    pub(crate) writes_memory: bool,
}

/// An instruction of a unit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Guest {
    pub(crate) instruction: Instruction,
    pub(crate) kind: Kind,
    /// Flags that it reads.
    pub(crate) reads: u32,
    /// Flags that it certainly overwrites.
    pub(crate) kills: u32,
    /// Flags that it may change.
    pub(crate) modifies: u32,
    /// Flags that are needed before it.
    pub(crate) live_in: u32,
    /// Flags that are needed after it.
    pub(crate) live_out: u32,
}

/// Flags that an instruction reads, certainly overwrites, and may change.
pub(crate) fn flag_use(instruction: &Instruction) -> (u32, u32, u32) {
    use Mnemonic as M;
    let reads = instruction.rflags_read() & FLAGS;
    let modifies = instruction.rflags_modified() & FLAGS;
    let last = instruction.op_count().saturating_sub(1);
    let kills = match instruction.mnemonic() {
        M::Shl
        | M::Sal
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror
        | M::Rcl
        | M::Rcr
        | M::Shld
        | M::Shrd => match instruction.op_kind(last) {
            // By CL, which may be zero: nothing is certain. A count of 1 defines all that it changes; others
            // leave OF undefined, and AF.
            OpKind::Immediate8 if instruction.immediate8() & 31 != 0 => modifies,
            _ => 0,
        },
        M::Bsf | M::Bsr => modifies & !instruction.rflags_undefined(),
        // Repeated no time they compare nothing.
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq
            if instruction.has_rep_prefix() || instruction.has_repne_prefix() =>
        {
            0
        }
        // Of control registers: the manual leaves all undefined, and processors leave all alone.
        M::Mov => 0,
        _ => modifies,
    };
    (reads, kills, modifies)
}

/// Arithmetic flags whose values the manual leaves undefined.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Undefined(u32);

impl Undefined {
    /// Whether an instruction shows them.
    pub(crate) fn is_read_by(self, instruction: &Instruction) -> bool {
        let all = matches!(
            instruction.mnemonic(),
            Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq
        );
        let reads = if all { FLAGS } else { flag_use(instruction).0 };
        reads & self.0 != 0
    }

    /// What is undefined after an instruction.
    pub(crate) fn after(&mut self, instruction: &Instruction) {
        let (_, kills, _) = flag_use(instruction);
        self.0 = self.0 & !kills | instruction.rflags_undefined() & FLAGS;
    }

    /// As bits of RFLAGS.
    pub(crate) fn bits(self) -> u64 {
        [
            (RflagsBits::CF, rflags::CF),
            (RflagsBits::PF, rflags::PF),
            (RflagsBits::AF, rflags::AF),
            (RflagsBits::ZF, rflags::ZF),
            (RflagsBits::SF, rflags::SF),
            (RflagsBits::OF, rflags::OF),
        ]
        .iter()
        .filter(|(bit, _)| self.0 & bit != 0)
        .fold(0, |bits, (_, flag)| bits | flag)
    }
}

/// Decides what is done with an instruction.
pub(crate) fn classify(instruction: &Instruction, mode: Mode) -> Kind {
    if let Some(kind) = transfer(instruction) {
        return kind;
    }
    if writes_code(instruction, mode) {
        return Kind::Operate;
    }
    match instruction.mnemonic() {
        Mnemonic::Nop
        | Mnemonic::Endbr64
        | Mnemonic::Endbr32
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetchw => return Kind::Nothing,
        Mnemonic::Pause if !instruction.has_lock_prefix() => return Kind::Verbatim,
        Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence => return Kind::Verbatim,
        Mnemonic::Lea => {
            let size = instruction.op0_register().size();
            return if (size == 4 || size == 8) && can_address(instruction) {
                Kind::Lea
            } else {
                Kind::Operate
            };
        }
        _ => {}
    }
    match instruction.code() {
        Code::Push_r32 => return Kind::PushRegister(number(instruction.op0_register())),
        Code::Pushd_imm8 | Code::Pushd_imm32 => {
            return Kind::PushImmediate(instruction.immediate(0) as i32);
        }
        Code::Push_rm32 if instruction.op0_kind() == OpKind::Memory => {
            return if can_address(instruction) {
                Kind::PushMemory
            } else {
                Kind::Operate
            };
        }
        Code::Push_rm32 => return Kind::PushRegister(number(instruction.op0_register())),
        Code::Pop_r32 => return Kind::Pop(number(instruction.op0_register())),
        Code::Leaved => return Kind::Leave,
        Code::Push_r64 => return Kind::PushRegister(number(instruction.op0_register())),
        Code::Pushq_imm8 | Code::Pushq_imm32 => {
            return Kind::PushImmediate(instruction.immediate(0) as i32);
        }
        Code::Push_rm64 if instruction.op0_kind() == OpKind::Memory => return Kind::PushMemory,
        Code::Push_rm64 => return Kind::PushRegister(number(instruction.op0_register())),
        Code::Pop_r64 => return Kind::Pop(number(instruction.op0_register())),
        Code::Leaveq => return Kind::Leave,
        Code::Div_rm32 | Code::Div_rm64 | Code::Idiv_rm32 | Code::Idiv_rm64 => {
            let memory = instruction.op0_kind() == OpKind::Memory;
            return if memory && !can_address(instruction) {
                Kind::Operate
            } else {
                divide(instruction)
            };
        }
        Code::Pushfq => return Kind::PushFlags,
        Code::Popfq => return Kind::PopFlags,
        Code::Cld => return Kind::Direction(false),
        Code::Std => return Kind::Direction(true),
        Code::Cli if !mode.is_user() => return Kind::Interrupts(false),
        Code::Sti if !mode.is_user() => return Kind::Interrupts(true),
        Code::Syscall if mode.is_user() && !mode.is_compatibility() => return Kind::SystemCall,
        Code::Sysretq if !mode.is_user() => return Kind::SystemReturn,
        Code::Rdtsc => return Kind::ReadTime { processor: false },
        Code::Rdtscp => return Kind::ReadTime { processor: true },
        Code::Stac if !mode.is_user() && mode.has_smap() => return Kind::Access(true),
        Code::Clac if !mode.is_user() && mode.has_smap() => return Kind::Access(false),
        Code::Swapgs if !mode.is_user() => return Kind::SwapGs,
        Code::Rdfsbase_r32 | Code::Rdfsbase_r64 if mode.has_bases() => {
            return Kind::ReadBase(sreg::FS);
        }
        Code::Rdgsbase_r32 | Code::Rdgsbase_r64 if mode.has_bases() => {
            return Kind::ReadBase(sreg::GS);
        }
        Code::Wrfsbase_r64 if mode.has_bases() => return Kind::WriteBase(sreg::FS),
        Code::Wrgsbase_r64 if mode.has_bases() => return Kind::WriteBase(sreg::GS),
        Code::Fnstcw_m2byte if mode.has_sse() && can_address(instruction) => {
            return Kind::ControlWord;
        }
        Code::Fldcw_m2byte if mode.has_sse() && can_address(instruction) => {
            return Kind::LoadControlWord;
        }
        Code::Wait if mode.has_sse() => return Kind::Wait,
        Code::Stmxcsr_m32 if mode.has_sse() && can_address(instruction) => {
            return Kind::StoreMxcsr;
        }
        Code::VEX_Vstmxcsr_m32 if mode.has_avx() && can_address(instruction) => {
            return Kind::StoreMxcsr;
        }
        Code::Ldmxcsr_m32 if mode.has_sse() && mode.masks_float() && can_address(instruction) => {
            return Kind::LoadMxcsr;
        }
        Code::Mov_rm16_Sreg if instruction.op0_kind() == OpKind::Register => {
            return Kind::SelectorWord(instruction.op1_register().number());
        }
        Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg
            if instruction.op0_kind() == OpKind::Register =>
        {
            return Kind::Selector(instruction.op1_register().number());
        }
        _ => {}
    }
    if let Some(string) = string(instruction, mode) {
        return Kind::String(string);
    }
    if let Some(plan) = plan(instruction, mode) {
        let short = mode.is_compatibility() || has_short_address(instruction);
        // Of ten bytes the last two have an offset of their own.
        let apart = instruction.memory_size().size() == 10 && !mode.is_compatibility();
        return if (plan.harmless.bit_offset || apart) && short {
            // The address wraps after the offset's upper bits were added, or those of the last two bytes.
            Kind::Operate
        } else if plan.harmless.bit_offset {
            Kind::BitOfMemory(plan)
        } else {
            Kind::Same(plan)
        };
    }
    if ends_unit(instruction) {
        Kind::OperateLast
    } else {
        Kind::Operate
    }
}

/// MOVS and STOS with addresses as wide as the mode's and no segment of its own.
fn string(instruction: &Instruction, mode: Mode) -> Option<Text> {
    let (size, moves) = match instruction.code() {
        Code::Movsb_m8_m8 => (1, true),
        Code::Movsw_m16_m16 => (2, true),
        Code::Movsd_m32_m32 => (4, true),
        Code::Movsq_m64_m64 => (8, true),
        Code::Stosb_m8_AL => (1, false),
        Code::Stosw_m16_AX => (2, false),
        Code::Stosd_m32_EAX => (4, false),
        Code::Stosq_m64_RAX => (8, false),
        _ => return None,
    };
    let wide = |index| match instruction.op_kind(index) {
        OpKind::MemoryESRDI | OpKind::MemorySegRSI => true,
        OpKind::MemoryESEDI | OpKind::MemorySegESI => mode.is_compatibility(),
        kind => kind == OpKind::Register,
    };
    let plain = instruction.segment_prefix() == Register::None;
    (wide(0) && wide(1) && plain && !instruction.has_repne_prefix()).then_some(Text {
        size,
        repeated: instruction.has_rep_prefix(),
        moves,
    })
}

fn divide(instruction: &Instruction) -> Kind {
    Kind::Divide {
        signed: instruction.mnemonic() == Mnemonic::Idiv,
        wide: matches!(instruction.code(), Code::Div_rm64 | Code::Idiv_rm64),
    }
}

fn transfer(instruction: &Instruction) -> Option<Kind> {
    let target = || instruction.near_branch_target();
    Some(match instruction.code() {
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 | Code::Jmp_rel8_32 | Code::Jmp_rel32_32 => {
            Kind::Jump(target())
        }
        Code::Call_rel32_64 | Code::Call_rel32_32 => Kind::Call(target()),
        Code::Jmp_rm32 | Code::Call_rm32
            if instruction.op0_kind() == OpKind::Memory && !can_address(instruction) =>
        {
            Kind::OperateLast
        }
        Code::Jmp_rm64 | Code::Jmp_rm32 => Kind::JumpIndirect,
        Code::Call_rm64 | Code::Call_rm32 => Kind::CallIndirect,
        Code::Retnq | Code::Retnd => Kind::Return(0),
        Code::Retnq_imm16 | Code::Retnd_imm16 => Kind::Return(instruction.immediate16()),
        Code::Jrcxz_rel8_64 => Kind::Count(Count::Zero, target()),
        Code::Loop_rel8_64_RCX => Kind::Count(Count::Loop, target()),
        code if code.is_jcc_short_or_near() => {
            if instruction.op0_kind() == OpKind::NearBranch16 {
                return Some(Kind::OperateLast);
            }
            if target() == instruction.next_ip() {
                return Some(Kind::Nothing);
            }
            // The decoder numbers conditions in its own order.
            use iced_x86::ConditionCode as C;
            let condition = match instruction.condition_code() {
                C::o => 0,
                C::no => 1,
                C::b => 2,
                C::ae => 3,
                C::e => 4,
                C::ne => 5,
                C::be => 6,
                C::a => 7,
                C::s => 8,
                C::ns => 9,
                C::p => 10,
                C::np => 11,
                C::l => 12,
                C::ge => 13,
                C::le => 14,
                _ => 15,
            };
            Kind::JumpIf(condition, target())
        }
        _ => return None,
    })
}

/// Whether what comes after an instruction is looked up: it goes elsewhere, or changes what code is
/// translated for.
fn ends_unit(instruction: &Instruction) -> bool {
    instruction.flow_control() != iced_x86::FlowControl::Next
        || matches!(
            instruction.mnemonic(),
            Mnemonic::Sti
                | Mnemonic::Popf
                | Mnemonic::Popfd
                | Mnemonic::Popfq
                | Mnemonic::Stac
                | Mnemonic::Clac
                | Mnemonic::Hlt
        )
}

fn plan(instruction: &Instruction, mode: Mode) -> Option<Plan> {
    let harmless = inspect(instruction)?;
    let allowed = match harmless.class {
        Class::Integer | Class::VexInteger => true,
        Class::Sse => mode.has_sse(),
        Class::Avx => mode.has_avx(),
        // What decides about SSE decides about these, but for OSFXSR.
        Class::X87 => mode.has_sse() && x87::is_native(instruction.mnemonic()),
        Class::Mmx => mode.has_sse(),
    };
    if !allowed
        || (harmless.bit_offset && instruction.memory_size().size() < 4)
        || harmless.masked
        || (harmless.simd_float && !mode.masks_float())
        || matches!(
            instruction.mnemonic(),
            Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Rdrand | Mnemonic::Rdseed | Mnemonic::Xlatb
        )
    {
        return None;
    }
    // These change the registers that only 64-bit mode has.
    let all = matches!(
        instruction.mnemonic(),
        Mnemonic::Vzeroall | Mnemonic::Vzeroupper
    );
    if all && mode.is_compatibility() {
        return None;
    }
    let op_code = harmless.code.op_code();
    let mut plan = Plan {
        harmless,
        visitors: [None; 2],
        counts: matches!(
            instruction.mnemonic(),
            Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b
        ),
        indexes: matches!(
            instruction.mnemonic(),
            Mnemonic::Pcmpestri
                | Mnemonic::Pcmpestri64
                | Mnemonic::Pcmpistri
                | Mnemonic::Vpcmpestri
                | Mnemonic::Vpcmpestri64
                | Mnemonic::Vpcmpistri
        ),
        high: false,
        visits_rcx: false,
        detour: false,
        writes_memory: false,
    };
    // CH is no part of the register where the guest's RCX lives.
    plan.visits_rcx = (0..instruction.op_count()).any(|index| {
        instruction.op_kind(index) == OpKind::Register
            && instruction.op_register(index) == Register::CH
    });
    let mut guests: [Option<usize>; 3] = [None; 3];
    let mut memory = false;
    let mut needs_rex = false;
    for index in 0..instruction.op_count() {
        match instruction.op_kind(index) {
            OpKind::Memory => {
                memory = true;
                if !can_address(instruction) {
                    return None;
                }
                plan.writes_memory = match harmless.class {
                    Class::X87 => x87::stores(instruction.mnemonic()),
                    _ => index == 0 && !only_reads(instruction.mnemonic()),
                };
            }
            OpKind::Register => {
                let register = instruction.op_register(index);
                if !register.is_gpr() {
                    continue;
                }
                if op_code.op_kind(index) == OpCodeOperandKind::cl {
                    plan.counts = true;
                    continue;
                }
                if is_high_byte(register) {
                    plan.high = true;
                    continue;
                }
                let guest = number(register);
                if plan.visits_rcx && HOME[guest] == Some(GUEST_RCX) {
                    continue;
                }
                match HOME[guest] {
                    None => {
                        needs_rex = true;
                        if !guests.contains(&Some(guest)) {
                            let free = guests.iter_mut().find(|slot| slot.is_none())?;
                            *free = Some(guest);
                        }
                    }
                    Some(home) => needs_rex |= home.0 >= 8,
                }
                needs_rex |= register.size() == 8 || (register.size() == 1 && guest >= 4);
            }
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => {}
            _ => return None,
        }
    }
    if plan.visits_rcx {
        plan.counts = true;
        plan.indexes = true;
        return (!memory && !needs_rex).then_some(plan);
    }
    if plan.high {
        if plan.counts {
            return None;
        }
        if needs_rex {
            let widening = instruction.code() == Code::Movzx_r32_rm8 && !memory;
            if !widening {
                return None;
            }
            plan.detour = true;
            return Some(plan);
        }
    }
    if harmless.bit_offset {
        // It needs nothing but its own way.
        return Some(plan);
    }
    let mut free = [
        (!(plan.counts || plan.indexes || plan.high && memory)).then_some(SPARE),
        (!memory).then_some(ADDRESS),
    ]
    .into_iter()
    .flatten();
    let mut places = plan.visitors.iter_mut();
    for guest in guests.into_iter().flatten() {
        *places.next()? = Some((guest, free.next()?));
    }
    Some(plan)
}

/// Whether the first operand, if it is memory, is only read.
fn only_reads(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{Bt, Cmp, Imul, Mul, Test};
    matches!(mnemonic, Cmp | Test | Bt | Mul | Imul)
}

/// Whether the address of an instruction's memory operand can be formed by host code.
pub(crate) fn can_address(instruction: &Instruction) -> bool {
    let base = instruction.memory_base();
    let index = instruction.memory_index();
    let register = |register: Register| {
        register == Register::None || register.is_gpr64() || register.is_gpr32()
    };
    (is_instruction_pointer(base) || register(base)) && register(index)
}

/// Whether it may be a store to the code segment, which the interpreter refuses.
fn writes_code(instruction: &Instruction, mode: Mode) -> bool {
    mode.is_compatibility()
        && instruction.memory_segment() == Register::CS
        && instruction.op0_kind() == OpKind::Memory
}

/// Whether addresses are those of the address-size prefix.
fn has_short_address(instruction: &Instruction) -> bool {
    instruction.memory_base().is_gpr32()
        || instruction.memory_index().is_gpr32()
        || instruction.memory_displ_size() == 4
}

/// The guest's RCX as a count goes to the host's.
pub(crate) const COUNTER: Reg = RCX;

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory};

    use super::*;

    /// Legacy and VEX encodings of everything, with `[RDI]` as memory operand.
    fn with_memory() -> impl Iterator<Item = Instruction> {
        let modrm = || (0..8u8).map(|reg| reg << 3 | 7);
        let prefixes: [&[u8]; 8] = [
            &[],
            &[0x66],
            &[0xf3],
            &[0xf2],
            &[0x48],
            &[0x66, 0x48],
            &[0xf3, 0x48],
            &[0xf0],
        ];
        let maps: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];
        let legacy = prefixes.into_iter().flat_map(move |prefix| {
            maps.into_iter().flat_map(move |map| {
                (0..=255u8).flat_map(move |opcode| {
                    modrm().map(move |modrm| [prefix, map, &[opcode, modrm]].concat())
                })
            })
        });
        let vex = (1..4u8).flat_map(move |map| {
            (0..16u8).flat_map(move |last| {
                let last = last >> 3 << 7 | 0x78 | last & 7;
                (0..=255u8).flat_map(move |opcode| {
                    modrm().map(move |modrm| vec![0xc4, 0xe0 | map, last, opcode, modrm])
                })
            })
        });
        legacy.chain(vex).filter_map(|mut bytes| {
            bytes.resize(15, 0);
            let instruction = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
            let memory = (0..instruction.op_count())
                .any(|index| instruction.op_kind(index) == OpKind::Memory);
            memory.then_some(instruction)
        })
    }

    /// Host code checks an address for as many bytes as the decoder says that the operand has: an instruction that touches
    /// more, or other memory beside, would leave the guest's.
    #[test]
    fn instructions_that_run_in_place_touch_their_operand_and_no_more() {
        let everything = Mode::for_test_of_everything();
        let mut factory = InstructionInfoFactory::new();
        let mut seen = 0;
        for instruction in with_memory() {
            let (Kind::Same(plan) | Kind::BitOfMemory(plan)) = classify(&instruction, everything)
            else {
                continue;
            };
            seen += 1;
            let info = factory.info(&instruction);
            let [used] = info.used_memory() else {
                panic!("{instruction:?}: {:?}", info.used_memory());
            };
            let size = instruction.memory_size().size();
            assert!(
                size > 0 && used.memory_size().size() <= size,
                "{instruction:?}"
            );
            assert!(used.index() == Register::None, "{instruction:?}");
            let writes = !matches!(
                used.access(),
                iced_x86::OpAccess::Read | iced_x86::OpAccess::CondRead
            );
            assert!(plan.writes_memory || !writes, "{instruction:?}");
        }
        assert!(seen > 3000, "{seen}");
    }

    /// Of ten bytes with an offset of 32 bits the last two may lie elsewhere; those of other sizes go on.
    #[test]
    fn ten_bytes_with_short_addresses_are_the_interpreters() {
        let everything = Mode::for_test_of_everything();
        // fld tbyte gs:[rbx], gs:[ebx]; fld qword gs:[ebx]
        for (code, in_place) in [
            (&[0x65, 0xdb, 0x2b][..], true),
            (&[0x65, 0x67, 0xdb, 0x2b], false),
            (&[0x65, 0x67, 0xdd, 0x03], true),
        ] {
            let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
            let kind = classify(&instruction, everything);
            assert_eq!(matches!(kind, Kind::Same(_)), in_place, "{code:02x?}");
        }
    }
}
