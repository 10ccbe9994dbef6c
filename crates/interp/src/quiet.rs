//! Quiet instructions: those that touch nothing but general registers and flags, and cannot fault.
//!
//! The run loop executes a run of them without looking up in between, and RIP need not be right. So
//! nobody sees the flags between them either, and those that a later instruction of the run
//! overwrites unread are not worked out at all.

use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

use crate::op::{AddressForm, Handler, Op};
use crate::{arithmetic, moves};

/// The arithmetic flags, as the decoder names them.
const FLAGS: u32 = RflagsBits::CF
    | RflagsBits::PF
    | RflagsBits::AF
    | RflagsBits::ZF
    | RflagsBits::SF
    | RflagsBits::OF;

/// What must be known of an instruction to join it with its neighbours.
#[derive(Clone, Copy)]
pub(crate) struct Traits {
    quiet: bool,
    /// Flags that it reads.
    reads: u32,
    /// Flags that it certainly overwrites.
    writes: u32,
    /// Flags that it may change.
    changes: u32,
    /// A handler that leaves the flags alone.
    flagless: Option<Handler>,
}

impl Traits {
    /// Of an instruction and the op that it became.
    pub(crate) fn of(instruction: &Instruction, op: &Op) -> Self {
        let changes = instruction.rflags_modified() & FLAGS;
        // A shift by CL changes nothing when CL is zero.
        let certain = !is_shift(instruction) || instruction.op1_kind() != OpKind::Register;
        Self {
            quiet: is_quiet(instruction, op),
            reads: instruction.rflags_read() & FLAGS,
            writes: if certain { changes } else { 0 },
            changes,
            flagless: arithmetic::without_flags(instruction, op),
        }
    }
}

fn is_shift(instruction: &Instruction) -> bool {
    use Mnemonic::{Rcl, Rcr, Rol, Ror, Sal, Sar, Shl, Shr};
    matches!(
        instruction.mnemonic(),
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr
    )
}

fn is_quiet(instruction: &Instruction, op: &Op) -> bool {
    let only_registers = match instruction.mnemonic() {
        // Its address is the result; relative to RIP it would need RIP.
        Mnemonic::Lea => op.form != AddressForm::Rip && op.base != crate::op::RIP_REGISTER,
        Mnemonic::Div | Mnemonic::Idiv => false,
        _ => !op.has_memory() && no_memory(instruction),
    };
    let mut copy = *op;
    let written_out = moves::lower(instruction, &mut copy).is_some()
        || arithmetic::lower(instruction, &mut copy).is_some();
    only_registers && written_out
}

fn no_memory(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).all(|operand| instruction.op_kind(operand) != OpKind::Memory)
}

/// Marks the runs of quiet ops in a block, and takes the work on dead flags out of them.
pub(crate) fn join(ops: &mut [Op], traits: &[Traits]) {
    // An op without traits is an undefined instruction at the block's end.
    let mut end = traits.len();
    while end > 0 {
        if !traits[end - 1].quiet {
            end -= 1;
            continue;
        }
        let mut start = end - 1;
        while start > 0 && traits[start - 1].quiet {
            start -= 1;
        }
        drop_dead_flags(&mut ops[start..end], &traits[start..end]);
        ops[start].quiet = (end - start) as u8;
        ops[start].extra = ops[start..end].iter().map(|op| u16::from(op.length)).sum();
        end = start;
    }
}

/// At the end of a run all flags may be read.
fn drop_dead_flags(ops: &mut [Op], traits: &[Traits]) {
    let mut live = FLAGS;
    for (op, traits) in ops.iter_mut().zip(traits).rev() {
        match traits.flagless {
            Some(handler) if traits.changes & live == 0 => op.handler = handler,
            _ => {}
        }
        live = live & !traits.writes | traits.reads;
    }
}
