//! Which instructions become thunks. A list of what is known to be harmless, never of what is not:
//! an instruction that a future decoder knows and this list doesn't is the interpreter's.

use iced_x86::{
    Code, EncodingKind, FlowControl, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register,
};

use crate::error::{ThunkError, Unsupported};
use crate::host::{Support, support};

/// Checks that `instruction` may run on the host, and gives the code to encode it with (forms that
/// only 16- and 32-bit mode have are replaced by their general form).
pub(crate) fn select(instruction: &Instruction) -> Result<Code, ThunkError> {
    let code = general_form(instruction.code());
    match refuse(instruction, code) {
        Some(reason) => Err(ThunkError::Unsupported { code, reason }),
        None => match support(code) {
            Support::Available => Ok(code),
            Support::Lacks(feature) => Err(ThunkError::HostLacks { code, feature }),
            Support::Unlisted => Err(ThunkError::Unsupported {
                code,
                reason: Unsupported::NotComputing,
            }),
        },
    }
}

/// INC and DEC in opcodes 40 … 4F, which are REX prefixes in 64-bit mode; and opcode 82, which is opcode 80 outside it.
fn general_form(code: Code) -> Code {
    match code {
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        other => other,
    }
}

fn refuse(instruction: &Instruction, code: Code) -> Option<Unsupported> {
    use Mnemonic as M;
    let mnemonic = code.mnemonic();
    if code == Code::INVALID || instruction.is_invalid() {
        return Some(Unsupported::Invalid);
    }
    if !matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return Some(Unsupported::Encoding);
    }
    if code.flow_control() != FlowControl::Next {
        return Some(Unsupported::ControlFlow);
    }
    match mnemonic {
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => return Some(Unsupported::MaskedStore),
        M::Div | M::Idiv => return Some(Unsupported::Divide),
        M::Ldmxcsr | M::Stmxcsr | M::Vldmxcsr | M::Vstmxcsr => {
            return Some(Unsupported::StateImage);
        }
        M::Lfence | M::Mfence | M::Sfence | M::Prefetchnta => {
            return Some(Unsupported::CacheControl);
        }
        M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Clflush => {
            return Some(Unsupported::CacheControl);
        }
        M::Lea => return Some(Unsupported::Address),
        _ => {}
    }
    if code.is_string_instruction() {
        return Some(Unsupported::String);
    }
    if code.is_stack_instruction() {
        return Some(Unsupported::Stack);
    }
    if code.is_privileged() {
        return Some(Unsupported::NotComputing);
    }
    let op_code = code.op_code();
    for index in 0..op_code.op_count() {
        match op_code.op_kind(index) {
            OpCodeOperandKind::mem_offs => return Some(Unsupported::Address),
            OpCodeOperandKind::mem_vsib32x
            | OpCodeOperandKind::mem_vsib64x
            | OpCodeOperandKind::mem_vsib32y
            | OpCodeOperandKind::mem_vsib64y => return Some(Unsupported::Gather),
            OpCodeOperandKind::seg_reg
            | OpCodeOperandKind::cr_reg
            | OpCodeOperandKind::dr_reg
            | OpCodeOperandKind::tr_reg => return Some(Unsupported::NotComputing),
            _ => {}
        }
    }
    if !op_code.mode64() {
        return Some(Unsupported::Only32Bit);
    }
    let computing = is_integer(mnemonic)
        || is_x87(mnemonic)
        || code.encoding() == EncodingKind::VEX
        || uses_simd_registers(instruction)
        // CVTTSS2SI of memory has a general register and no other.
        || is_simd_float(mnemonic)
        || matches!(mnemonic, M::Emms);
    if !computing {
        return Some(Unsupported::NotComputing);
    }
    if (0..instruction.op_count()).any(|index| instruction.op_kind(index) == OpKind::Memory)
        && instruction.memory_size().size() == 0
    {
        return Some(Unsupported::Address);
    }
    None
}

fn uses_simd_registers(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|index| {
        instruction.op_kind(index) == OpKind::Register && {
            let register = instruction.op_register(index);
            register.is_vector_register() || register.is_mm()
        }
    })
}

/// Integer instructions on general registers and memory.
fn is_integer(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Adc | Adcx
            | Add
            | Adox
            | And
            | Andn
            | Bextr
            | Blsi
            | Blsmsk
            | Blsr
            | Bsf
            | Bsr
            | Bswap
            | Bt
            | Btc
            | Btr
            | Bts
            | Bzhi
            | Cbw
            | Cdq
            | Cdqe
            | Clc
            | Cmc
            | Cmova
            | Cmovae
            | Cmovb
            | Cmovbe
            | Cmove
            | Cmovg
            | Cmovge
            | Cmovl
            | Cmovle
            | Cmovne
            | Cmovno
            | Cmovnp
            | Cmovns
            | Cmovo
            | Cmovp
            | Cmovs
            | Cmp
            | Cmpxchg
            | Cmpxchg16b
            | Cmpxchg8b
            | Cqo
            | Crc32
            | Cwd
            | Cwde
            | Dec
            | Imul
            | Inc
            | Lahf
            | Lzcnt
            | Mov
            | Movbe
            | Movnti
            | Movsx
            | Movsxd
            | Movzx
            | Mul
            | Mulx
            | Neg
            | Not
            | Or
            | Pdep
            | Pext
            | Popcnt
            | Rcl
            | Rcr
            | Rdrand
            | Rdseed
            | Rol
            | Ror
            | Rorx
            | Sahf
            | Sal
            | Sar
            | Sarx
            | Sbb
            | Seta
            | Setae
            | Setb
            | Setbe
            | Sete
            | Setg
            | Setge
            | Setl
            | Setle
            | Setne
            | Setno
            | Setnp
            | Setns
            | Seto
            | Setp
            | Sets
            | Shl
            | Shld
            | Shlx
            | Shr
            | Shrd
            | Shrx
            | Stc
            | Sub
            | Test
            | Tzcnt
            | Xadd
            | Xchg
            | Xor
    )
}

/// x87 instructions as a decoder gives them (FINIT and its like are FWAIT and FNINIT).
pub(crate) fn is_x87(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        F2xm1
            | Fabs
            | Fadd
            | Faddp
            | Fbld
            | Fbstp
            | Fchs
            | Fcmovb
            | Fcmovbe
            | Fcmove
            | Fcmovnb
            | Fcmovnbe
            | Fcmovne
            | Fcmovnu
            | Fcmovu
            | Fcom
            | Fcomi
            | Fcomip
            | Fcomp
            | Fcompp
            | Fcos
            | Fdecstp
            | Fdiv
            | Fdivp
            | Fdivr
            | Fdivrp
            | Ffree
            | Ffreep
            | Fiadd
            | Ficom
            | Ficomp
            | Fidiv
            | Fidivr
            | Fild
            | Fimul
            | Fincstp
            | Fist
            | Fistp
            | Fisttp
            | Fisub
            | Fisubr
            | Fld
            | Fld1
            | Fldl2e
            | Fldl2t
            | Fldlg2
            | Fldln2
            | Fldpi
            | Fldz
            | Fmul
            | Fmulp
            | Fnop
            | Fpatan
            | Fprem
            | Fprem1
            | Fptan
            | Frndint
            | Fscale
            | Fsin
            | Fsincos
            | Fsqrt
            | Fst
            | Fstp
            | Fstpnce
            | Fsub
            | Fsubp
            | Fsubr
            | Fsubrp
            | Ftst
            | Fucom
            | Fucomi
            | Fucomip
            | Fucomp
            | Fucompp
            | Fxam
            | Fxch
            | Fxtract
            | Fyl2x
            | Fyl2xp1
    ) || is_x87_control(mnemonic)
}

/// x87 control instructions: they leave FIP, FOP and FDP alone or handle them by themselves.
pub(crate) fn is_x87_control(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Fldcw | Fldenv | Fnclex | Fnsave | Fnstcw | Fnstenv | Fninit | Fnstsw | Frstor | Wait
    ) || matches!(mnemonic, Fndisi | Fneni | Fnsetpm)
}

/// x87 instructions that run with an exception pending (SDM vol. 1 8.3.11).
pub(crate) fn is_x87_no_wait(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Fnclex | Fndisi | Fneni | Fninit | Fnsave | Fnsetpm | Fnstcw | Fnstenv | Fnstsw
    )
}

/// Instructions that read MXCSR or can raise SIMD floating-point exceptions (SDM vol. 2A table
/// 2-23 and the instructions' own pages).
pub(crate) fn is_simd_float(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Addpd
            | Addps
            | Addsd
            | Addss
            | Addsubpd
            | Addsubps
            | Cmppd
            | Cmpps
            | Cmpsd
            | Cmpss
            | Comisd
            | Comiss
            | Cvtdq2ps
            | Cvtpd2dq
            | Cvtpd2pi
            | Cvtpd2ps
            | Cvtpi2ps
            | Cvtps2dq
            | Cvtps2pd
            | Cvtps2pi
            | Cvtsd2si
            | Cvtsd2ss
            | Cvtsi2sd
            | Cvtsi2ss
            | Cvtss2sd
            | Cvtss2si
            | Cvttpd2dq
            | Cvttpd2pi
            | Cvttps2dq
            | Cvttps2pi
            | Cvttsd2si
            | Cvttss2si
            | Divpd
            | Divps
            | Divsd
            | Divss
            | Dppd
            | Dpps
            | Haddpd
            | Haddps
            | Hsubpd
            | Hsubps
            | Maxpd
            | Maxps
            | Maxsd
            | Maxss
            | Minpd
            | Minps
            | Minsd
            | Minss
            | Mulpd
            | Mulps
            | Mulsd
            | Mulss
            | Roundpd
            | Roundps
            | Roundsd
            | Roundss
            | Sqrtpd
            | Sqrtps
            | Sqrtsd
            | Sqrtss
            | Subpd
            | Subps
            | Subsd
            | Subss
            | Ucomisd
            | Ucomiss
    ) || matches!(
        mnemonic,
        Vaddpd
            | Vaddps
            | Vaddsd
            | Vaddss
            | Vaddsubpd
            | Vaddsubps
            | Vcmppd
            | Vcmpps
            | Vcmpsd
            | Vcmpss
            | Vcomisd
            | Vcomiss
            | Vcvtdq2ps
            | Vcvtpd2dq
            | Vcvtpd2ps
            | Vcvtph2ps
            | Vcvtps2dq
            | Vcvtps2pd
            | Vcvtps2ph
            | Vcvtsd2si
            | Vcvtsd2ss
            | Vcvtsi2sd
            | Vcvtsi2ss
            | Vcvtss2sd
            | Vcvtss2si
            | Vcvttpd2dq
            | Vcvttps2dq
            | Vcvttsd2si
            | Vcvttss2si
            | Vdivpd
            | Vdivps
            | Vdivsd
            | Vdivss
            | Vdppd
            | Vdpps
            | Vhaddpd
            | Vhaddps
            | Vhsubpd
            | Vhsubps
            | Vmaxpd
            | Vmaxps
            | Vmaxsd
            | Vmaxss
            | Vminpd
            | Vminps
            | Vminsd
            | Vminss
            | Vmulpd
            | Vmulps
            | Vmulsd
            | Vmulss
            | Vroundpd
            | Vroundps
            | Vroundsd
            | Vroundss
            | Vsqrtpd
            | Vsqrtps
            | Vsqrtsd
            | Vsqrtss
            | Vsubpd
            | Vsubps
            | Vsubsd
            | Vsubss
            | Vucomisd
            | Vucomiss
    ) || matches!(
        mnemonic,
        Vfmadd132pd
            | Vfmadd132ps
            | Vfmadd132sd
            | Vfmadd132ss
            | Vfmadd213pd
            | Vfmadd213ps
            | Vfmadd213sd
            | Vfmadd213ss
            | Vfmadd231pd
            | Vfmadd231ps
            | Vfmadd231sd
            | Vfmadd231ss
            | Vfmaddsub132pd
            | Vfmaddsub132ps
            | Vfmaddsub213pd
            | Vfmaddsub213ps
            | Vfmaddsub231pd
            | Vfmaddsub231ps
            | Vfmsub132pd
            | Vfmsub132ps
            | Vfmsub132sd
            | Vfmsub132ss
            | Vfmsub213pd
            | Vfmsub213ps
            | Vfmsub213sd
            | Vfmsub213ss
            | Vfmsub231pd
            | Vfmsub231ps
            | Vfmsub231sd
            | Vfmsub231ss
            | Vfmsubadd132pd
            | Vfmsubadd132ps
            | Vfmsubadd213pd
            | Vfmsubadd213ps
            | Vfmsubadd231pd
            | Vfmsubadd231ps
            | Vfnmadd132pd
            | Vfnmadd132ps
            | Vfnmadd132sd
            | Vfnmadd132ss
            | Vfnmadd213pd
            | Vfnmadd213ps
            | Vfnmadd213sd
            | Vfnmadd213ss
            | Vfnmadd231pd
            | Vfnmadd231ps
            | Vfnmadd231sd
            | Vfnmadd231ss
            | Vfnmsub132pd
            | Vfnmsub132ps
            | Vfnmsub132sd
            | Vfnmsub132ss
            | Vfnmsub213pd
            | Vfnmsub213ps
            | Vfnmsub213sd
            | Vfnmsub213ss
            | Vfnmsub231pd
            | Vfnmsub231ps
            | Vfnmsub231sd
            | Vfnmsub231ss
    )
}

/// Legacy SSE instructions whose 128-bit memory operand may be misaligned (SDM vol. 1 10.4.1,
/// 12.10.3: the unaligned moves, LDDQU, and the string compares).
pub(crate) fn is_unaligned_sse(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Movups | Movupd | Movdqu | Lddqu | Pcmpestri | Pcmpestri64 | Pcmpestrm | Pcmpestrm64
    ) || matches!(mnemonic, Pcmpistri | Pcmpistrm)
}

/// VEX instructions whose memory operand must be aligned to its size (SDM vol. 1 14.9).
pub(crate) fn is_aligned_vex(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Vmovapd | Vmovaps | Vmovdqa | Vmovntdq | Vmovntdqa | Vmovntpd | Vmovntps
    )
}

/// Element size in bytes of masked moves.
pub(crate) fn masked_element_size(mnemonic: Mnemonic) -> Option<u8> {
    use Mnemonic::*;
    match mnemonic {
        Vmaskmovps | Vpmaskmovd => Some(4),
        Vmaskmovpd | Vpmaskmovq => Some(8),
        _ => None,
    }
}

/// BT and its kin, whose register bit offset also moves the address of a memory operand.
pub(crate) fn is_bit_test(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(mnemonic, Bt | Btc | Btr | Bts)
}

/// Whether the operand's register is fixed by the opcode (AL, CL, …), so can't be another one.
pub(crate) fn is_fixed_register(kind: OpCodeOperandKind) -> bool {
    use OpCodeOperandKind::*;
    matches!(kind, al | cl | ax | dx | eax | rax)
}

/// Number (0 … 15) of a general register of any size, and whether it is AH, CH, DH or BH.
pub(crate) fn general_number(register: Register) -> Option<(u8, bool)> {
    match register {
        Register::AH => Some((0, true)),
        Register::CH => Some((1, true)),
        Register::DH => Some((2, true)),
        Register::BH => Some((3, true)),
        _ if register.is_gpr() => Some((register.full_register().number() as u8, false)),
        _ => None,
    }
}
