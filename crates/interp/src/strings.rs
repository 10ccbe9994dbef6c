//! String instructions, with and without REP (SDM vol. 1, 7.3.9; vol. 2B, REP).
//!
//! A repeated one is interruptible and restartable after each element: RCX, RSI and RDI are right
//! whenever something else can see them.
#![allow(unsafe_code)]

use std::arch::asm;

use iced_x86::{Code, Instruction, Mnemonic};
use trapgate_memory::{HostAddress, PAGE_SIZE};
use trapgate_x86::registers::gpr::{RAX, RCX, RDI, RDX, RSI};
use trapgate_x86::registers::{rflags, sreg};

use crate::arithmetic::sized;
use crate::cpu::{Cpu, Step, Stop};
use crate::op::{Handler, Op, attribute};
use crate::tlb::Access;
use crate::width::Width;

const ES: u8 = sreg::ES as u8;

/// Elements after which a repeated instruction looks for interrupts.
const POLL: u64 = 4096;

/// Linear address of the source, DS:rSI or another segment's.
fn source<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<u64, Stop> {
    let offset = cpu.regs.gpr[RSI] & Cpu::address_mask(op);
    cpu.segment_address(usize::from(op.segment), offset, T::BYTES, false)
}

/// Linear address of the destination, ES:rDI.
fn destination<T: Width>(cpu: &mut Cpu, op: &Op, write: bool) -> Result<u64, Stop> {
    let offset = cpu.regs.gpr[RDI] & Cpu::address_mask(op);
    cpu.segment_address(sreg::ES, offset, T::BYTES, write)
}

/// Moves an index register or counter by `step`, at the address size.
#[inline(always)]
fn advance(cpu: &mut Cpu, op: &Op, register: usize, step: u64) {
    let value = cpu.regs.gpr[register].wrapping_add(step);
    match op.address_size() {
        2 => cpu.set_reg(register as u8, value as u16),
        4 => cpu.set_reg(register as u8, value as u32),
        _ => cpu.regs.gpr[register] = value,
    }
}

/// One element of a string instruction.
trait Element {
    /// Whether REPE and REPNE look at ZF after it.
    const COMPARES: bool = false;
    /// Index registers that a repeated instruction with 32-bit addresses zero-extends before its first element.
    const EXTENDED: &'static [usize] = &[];
    /// What is checked even if there are no elements.
    fn begin<T: Width>(_: &mut Cpu) -> Step {
        Ok(())
    }
    /// Does one element, index registers included.
    fn once<T: Width>(cpu: &mut Cpu, op: &Op) -> Step;
    /// Does up to `count` elements at once, where that can be done fast; says how many. Registers
    /// are moved but for the counter.
    fn bulk<T: Width>(_: &mut Cpu, _: &Op, _count: u64) -> u64 {
        0
    }
}

fn single<E: Element, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    E::once::<T>(cpu, op)
}

fn repeated<E: Element, T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    E::begin::<T>(cpu)?;
    if op.address_size() == 4 && cpu.is_64bit() {
        // Even if there are no elements, or the first one faults: the host CPU does so.
        cpu.regs.gpr[RCX] &= 0xffff_ffff;
        for &register in E::EXTENDED {
            cpu.regs.gpr[register] &= 0xffff_ffff;
        }
    }
    let mut until_poll = POLL;
    let flags = cpu.flags;
    loop {
        let count = cpu.regs.gpr[RCX] & Cpu::address_mask(op);
        if count == 0 {
            return Ok(());
        }
        let done = match E::bulk::<T>(cpu, op, count) {
            0 => {
                if let Err(stop) = E::once::<T>(cpu, op) {
                    // A fault shows the flags from before the instruction, however far it came
                    // (SDM vol. 2B, REP; the host CPU does so for REPE and REPNE alike).
                    if E::COMPARES {
                        cpu.flags = flags;
                    }
                    return Err(stop);
                }
                1
            }
            done => done,
        };
        advance(cpu, op, RCX, done.wrapping_neg());
        if E::COMPARES && cpu.flags.zero() != op.has(attribute::REP) {
            return Ok(());
        }
        if count == done {
            return Ok(());
        }
        until_poll = until_poll.saturating_sub(done);
        let poll = until_poll == 0 && cpu.signals.any();
        if poll || cpu.end_block || cpu.attention {
            // The instruction is not finished: it goes on from here after whatever it is that
            // must be seen to. RF, which that then has in its frame, keeps a breakpoint on the instruction from
            // hitting again (SDM vol. 3B, 19.3.1.1).
            cpu.rip = cpu.rip.wrapping_sub(u64::from(op.length));
            cpu.system_flags |= rflags::RF;
            cpu.update_attention();
            return Err(Stop::EndBlock);
        }
        if until_poll == 0 {
            until_poll = POLL;
        }
    }
}

/// How many of `count` elements fit in the page after `linear`, ascending.
fn elements_in_page<T: Width>(linear: u64, count: u64) -> u64 {
    ((PAGE_SIZE - linear % PAGE_SIZE) / T::BYTES).min(count)
}

/// Whether `bulk` may be used: ascending, flat 64-bit segments.
fn can_bulk(cpu: &Cpu, op: &Op) -> bool {
    op.address_size() == 8 && cpu.system_flags & rflags::DF == 0 && !cpu.attention
}

struct Move;

impl Element for Move {
    const EXTENDED: &'static [usize] = &[RSI, RDI];

    #[inline(always)]
    fn once<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
        let from = source::<T>(cpu, op)?;
        let value = cpu.read::<T>(from, op.segment)?;
        let to = destination::<T>(cpu, op, true)?;
        cpu.write(to, ES, value)?;
        let step = cpu.string_step(T::BYTES);
        advance(cpu, op, RSI, step);
        advance(cpu, op, RDI, step);
        Ok(())
    }

    fn bulk<T: Width>(cpu: &mut Cpu, op: &Op, count: u64) -> u64 {
        if !can_bulk(cpu, op) {
            return 0;
        }
        let from = cpu.linear(usize::from(op.segment), cpu.regs.gpr[RSI]);
        let to = cpu.regs.gpr[RDI];
        let count = elements_in_page::<T>(to, elements_in_page::<T>(from, count));
        let (Some(source), Some(target)) = (cpu.tlb.read(from, 1), cpu.tlb.write(to, 1)) else {
            return 0;
        };
        copy::<T>(source, target, count);
        let bytes = count * T::BYTES;
        cpu.regs.gpr[RSI] = cpu.regs.gpr[RSI].wrapping_add(bytes);
        cpu.regs.gpr[RDI] = to.wrapping_add(bytes);
        count
    }
}

/// The host's own REP MOVS with the same element size, so that overlapping operands give what the
/// guest's would.
fn copy<T: Width>(from: HostAddress, to: HostAddress, count: u64) {
    // SAFETY: the TLB vouches for the rest of both pages, and `count` elements stay inside. DF is
    // clear on entry to Rust's asm blocks.
    unsafe {
        match T::BYTES {
            1 => asm!("rep movsb", inout("rcx") count => _, inout("rsi") from.as_ptr() => _,
                      inout("rdi") to.as_ptr() => _, options(nostack, preserves_flags)),
            2 => asm!("rep movsw", inout("rcx") count => _, inout("rsi") from.as_ptr() => _,
                      inout("rdi") to.as_ptr() => _, options(nostack, preserves_flags)),
            4 => asm!("rep movsd", inout("rcx") count => _, inout("rsi") from.as_ptr() => _,
                      inout("rdi") to.as_ptr() => _, options(nostack, preserves_flags)),
            _ => asm!("rep movsq", inout("rcx") count => _, inout("rsi") from.as_ptr() => _,
                      inout("rdi") to.as_ptr() => _, options(nostack, preserves_flags)),
        }
    }
}

struct Store;

impl Element for Store {
    const EXTENDED: &'static [usize] = &[RDI];

    #[inline(always)]
    fn once<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
        let to = destination::<T>(cpu, op, true)?;
        cpu.write(to, ES, T::from_u64(cpu.regs.gpr[RAX]))?;
        let step = cpu.string_step(T::BYTES);
        advance(cpu, op, RDI, step);
        Ok(())
    }

    fn bulk<T: Width>(cpu: &mut Cpu, op: &Op, count: u64) -> u64 {
        if !can_bulk(cpu, op) {
            return 0;
        }
        let to = cpu.regs.gpr[RDI];
        let count = elements_in_page::<T>(to, count);
        let Some(target) = cpu.tlb.write(to, 1) else {
            return 0;
        };
        fill::<T>(target, cpu.regs.gpr[RAX], count);
        cpu.regs.gpr[RDI] = to.wrapping_add(count * T::BYTES);
        count
    }
}

/// The host's own REP STOS.
fn fill<T: Width>(to: HostAddress, value: u64, count: u64) {
    // SAFETY: as for `copy`.
    unsafe {
        match T::BYTES {
            1 => asm!("rep stosb", inout("rcx") count => _, inout("rdi") to.as_ptr() => _,
                      in("rax") value, options(nostack, preserves_flags)),
            2 => asm!("rep stosw", inout("rcx") count => _, inout("rdi") to.as_ptr() => _,
                      in("rax") value, options(nostack, preserves_flags)),
            4 => asm!("rep stosd", inout("rcx") count => _, inout("rdi") to.as_ptr() => _,
                      in("rax") value, options(nostack, preserves_flags)),
            _ => asm!("rep stosq", inout("rcx") count => _, inout("rdi") to.as_ptr() => _,
                      in("rax") value, options(nostack, preserves_flags)),
        }
    }
}

struct Load;

impl Element for Load {
    #[inline(always)]
    fn once<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
        let from = source::<T>(cpu, op)?;
        let value = cpu.read::<T>(from, op.segment)?;
        // An 8-bit register's name is its byte offset, which for AL is zero too.
        cpu.set_reg(RAX as u8, value);
        let step = cpu.string_step(T::BYTES);
        advance(cpu, op, RSI, step);
        Ok(())
    }
}

struct Compare;

impl Element for Compare {
    const COMPARES: bool = true;

    #[inline(always)]
    fn once<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
        // The host CPU reads them in this order, which shows in faults.
        let to = destination::<T>(cpu, op, false)?;
        let b = cpu.read::<T>(to, ES)?;
        let from = source::<T>(cpu, op)?;
        let a = cpu.read::<T>(from, op.segment)?;
        let result = T::from_u64(a.to_u64().wrapping_sub(b.to_u64()));
        cpu.flags.sub(a, b, result);
        let step = cpu.string_step(T::BYTES);
        advance(cpu, op, RSI, step);
        advance(cpu, op, RDI, step);
        Ok(())
    }
}

struct Scan;

impl Element for Scan {
    const COMPARES: bool = true;

    #[inline(always)]
    fn once<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
        let to = destination::<T>(cpu, op, false)?;
        let b = cpu.read::<T>(to, ES)?;
        let a = T::from_u64(cpu.regs.gpr[RAX]);
        let result = T::from_u64(a.to_u64().wrapping_sub(b.to_u64()));
        cpu.flags.sub(a, b, result);
        let step = cpu.string_step(T::BYTES);
        advance(cpu, op, RDI, step);
        Ok(())
    }
}

struct Input;

impl Element for Input {
    fn begin<T: Width>(cpu: &mut Cpu) -> Step {
        cpu.check_port(cpu.regs.gpr[RDX] as u16, T::BYTES)
    }

    fn once<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
        let port = cpu.regs.gpr[RDX] as u16;
        cpu.check_port(port, T::BYTES)?;
        let to = destination::<T>(cpu, op, true)?;
        // The port must not be read for nothing.
        cpu.probe(to, T::BYTES, Access::Write, ES)?;
        let value = cpu.world.read_port(port, T::BYTES as u8);
        cpu.write(to, ES, T::from_u64(u64::from(value)))?;
        let step = cpu.string_step(T::BYTES);
        advance(cpu, op, RDI, step);
        Ok(())
    }
}

struct Output;

impl Element for Output {
    fn begin<T: Width>(cpu: &mut Cpu) -> Step {
        cpu.check_port(cpu.regs.gpr[RDX] as u16, T::BYTES)
    }

    fn once<T: Width>(cpu: &mut Cpu, op: &Op) -> Step {
        let port = cpu.regs.gpr[RDX] as u16;
        cpu.check_port(port, T::BYTES)?;
        let from = source::<T>(cpu, op)?;
        let value = cpu.read::<T>(from, op.segment)?;
        cpu.world
            .write_port(port, T::BYTES as u8, value.to_u64() as u32);
        let step = cpu.string_step(T::BYTES);
        advance(cpu, op, RSI, step);
        Ok(())
    }
}

/// The handler of an instruction that this module executes.
pub(crate) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    // MOVSD and CMPSD are also SSE2 instructions.
    if !instruction.is_string_instruction() {
        return None;
    }
    let repeat = op.has(attribute::REP | attribute::REPNE);
    let size = match instruction.code() {
        Code::Movsb_m8_m8
        | Code::Stosb_m8_AL
        | Code::Lodsb_AL_m8
        | Code::Cmpsb_m8_m8
        | Code::Scasb_AL_m8
        | Code::Insb_m8_DX
        | Code::Outsb_DX_m8 => 1,
        Code::Movsw_m16_m16
        | Code::Stosw_m16_AX
        | Code::Lodsw_AX_m16
        | Code::Cmpsw_m16_m16
        | Code::Scasw_AX_m16
        | Code::Insw_m16_DX
        | Code::Outsw_DX_m16 => 2,
        Code::Movsd_m32_m32
        | Code::Stosd_m32_EAX
        | Code::Lodsd_EAX_m32
        | Code::Cmpsd_m32_m32
        | Code::Scasd_EAX_m32
        | Code::Insd_m32_DX
        | Code::Outsd_DX_m32 => 4,
        _ => 8,
    };
    op.set_operand_size(size);
    let pick = |one: Handler, many: Handler| if repeat { many } else { one };
    Some(match instruction.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => {
            pick(sized!(size, single, Move), sized!(size, repeated, Move))
        }
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
            pick(sized!(size, single, Store), sized!(size, repeated, Store))
        }
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => {
            pick(sized!(size, single, Load), sized!(size, repeated, Load))
        }
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => pick(
            sized!(size, single, Compare),
            sized!(size, repeated, Compare),
        ),
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => {
            pick(sized!(size, single, Scan), sized!(size, repeated, Scan))
        }
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => {
            pick(sized!(size, single, Input), sized!(size, repeated, Input))
        }
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => {
            pick(sized!(size, single, Output), sized!(size, repeated, Output))
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use trapgate_x86::registers::gpr;

    use super::*;
    use crate::testing::{GP0, execute, fault, long_cpu, set_cpl};

    /// SDM vol. 3B, 19.3.1.1: whatever comes in the middle has RF in its frame.
    #[test]
    fn instruction_that_is_stopped_half_way_has_the_resume_flag() {
        let (mut cpu, _) = long_cpu();
        let rep_stosb: &[u8] = &[0xf3, 0xaa];
        cpu.regs.gpr[RDI] = 0x8000;
        cpu.regs.gpr[RCX] = 2;
        cpu.attention = true;
        assert_eq!(execute(&mut cpu, rep_stosb), Err(Stop::EndBlock));
        assert_eq!(
            (cpu.regs.gpr[RCX], cpu.rflags() & rflags::RF),
            (1, rflags::RF)
        );

        cpu.set_rflags(0);
        cpu.attention = false;
        cpu.rip = 0;
        assert_eq!(execute(&mut cpu, rep_stosb), Ok(()));
        assert_eq!((cpu.regs.gpr[RCX], cpu.rflags() & rflags::RF), (0, 0));
    }

    /// As the host CPU does.
    #[test]
    fn repeated_instruction_with_short_addresses_extends_its_registers_even_for_no_element() {
        let high = 0x1234_5678_0000_0000;
        // rep movs, stos, lods, scas with 32-bit addresses: whether RSI and RDI are extended.
        for (opcode, source, target) in [
            (0xa4, true, true),
            (0xaa, false, true),
            (0xac, false, false),
            (0xae, false, false),
        ] {
            let (mut cpu, _) = long_cpu();
            for register in [gpr::RCX, gpr::RSI, gpr::RDI] {
                cpu.regs.gpr[register] = high;
            }
            execute(&mut cpu, &[0xf3, 0x67, opcode]).unwrap();
            assert_eq!(cpu.regs.gpr[gpr::RCX], 0, "{opcode:#x}");
            assert_eq!(cpu.regs.gpr[gpr::RSI] == 0, source, "{opcode:#x}");
            assert_eq!(cpu.regs.gpr[gpr::RDI] == 0, target, "{opcode:#x}");
        }
    }

    #[test]
    fn right_to_a_port_is_needed_even_for_no_element() {
        for opcode in [0x6c, 0x6e] {
            let (mut cpu, _) = long_cpu();
            set_cpl(&mut cpu, 3);
            cpu.sys.tr.limit = 0;
            cpu.regs.gpr[gpr::RCX] = 0;
            assert_eq!(fault(&mut cpu, &[0xf3, opcode]), GP0, "{opcode:#x}");
        }
    }
}
