//! Instructions that change nothing a program could see: NOPs, hints, fences, cache line flushes
//! (SDM vol. 2, NOP, PAUSE, PREFETCHh, CLFLUSH, LFENCE, MFENCE, SFENCE).

use std::sync::atomic::{Ordering, fence};

use iced_x86::{Instruction, Mnemonic};

use crate::control::op_undefined;
use crate::cpu::{Cpu, Step};
use crate::op::{Handler, Op};
use crate::tlb::Access;

/// The handler of an instruction that this module owns.
pub(crate) fn lower(instruction: &Instruction, _op: &mut Op) -> Option<Handler> {
    let handler: Handler = match instruction.mnemonic() {
        // Without CET the shadow-stack reads and ENDBR are NOPs; CLDEMOTE and the unassigned
        // PREFETCH forms lie in the space reserved for hints.
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr64
        | Mnemonic::Endbr32
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        | Mnemonic::Cldemote => op_nop,
        Mnemonic::Pause => op_pause,
        Mnemonic::Lfence => op_load_fence,
        Mnemonic::Mfence | Mnemonic::Sfence => op_fence,
        Mnemonic::Clflush => op_flush_line,
        // Not in the profiles.
        Mnemonic::Clflushopt
        | Mnemonic::Clwb
        | Mnemonic::Clzero
        | Mnemonic::Serialize
        | Mnemonic::Movdiri
        | Mnemonic::Movdir64b => op_undefined,
        _ => return None,
    };
    Some(handler)
}

fn op_nop(_cpu: &mut Cpu, _op: &Op) -> Step {
    Ok(())
}

/// PAUSE: the guest spins, and says so to the host's core.
fn op_pause(_cpu: &mut Cpu, _op: &Op) -> Step {
    std::hint::spin_loop();
    Ok(())
}

/// LFENCE. Guest loads are host loads, which the host keeps in order; nothing of ours may move
/// across either.
fn op_load_fence(_cpu: &mut Cpu, _op: &Op) -> Step {
    fence(Ordering::Acquire);
    Ok(())
}

/// MFENCE, and SFENCE: thunks run non-temporal stores on guest memory, which only a real fence
/// puts in order.
fn op_fence(_cpu: &mut Cpu, _op: &Op) -> Step {
    fence(Ordering::SeqCst);
    Ok(())
}

/// CLFLUSH: faults as a load of a byte would, and is one for access rights and the accessed flag.
fn op_flush_line(cpu: &mut Cpu, op: &Op) -> Step {
    let linear = cpu.operand_address(op, 1, false)?;
    cpu.probe(linear, 1, Access::Read, op.segment)
}
