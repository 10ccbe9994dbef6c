//! What the interpreter holds: a thunk, and what it has to know to run it.
#![allow(unsafe_code)]

use std::sync::Arc;

use crate::code_memory::Chunk;
use crate::registers::RegisterFile;

/// A thunk's host code: register file, then the host address of the memory operand (ignored
/// without one). The result is meaningful only when [`Thunk::run`] says so.
pub type EntryPoint = unsafe extern "sysv64" fn(*mut RegisterFile, *mut u8) -> u32;

/// Which architectural checks come before the instruction (SDM vol. 3A table 2-2, 9-1, 13.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// General registers only: no check.
    Integer,
    /// x87: #NM if CR0.EM or CR0.TS (FWAIT: if both CR0.MP and CR0.TS); #MF when [`Thunk::waiting`] and an exception is pending.
    X87,
    /// MMX registers: #UD if CR0.EM, #NM if CR0.TS, #MF if an exception is pending. If
    /// [`Thunk::uses_vector`], also as for SSE.
    Mmx,
    /// Legacy SSE: #UD if CR0.EM or not CR4.OSFXSR, #NM if CR0.TS.
    Sse,
    /// VEX with vector registers: #UD unless CR4.OSXSAVE, bits 1 and 2 of XCR0, and protected mode; #NM
    /// if CR0.TS. CR0.EM and CR4.OSFXSR don't matter.
    Avx,
    /// VEX with general registers only (BMI1, BMI2): #UD outside protected mode.
    VexInteger,
}

/// How the instruction uses its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Loads.
    Read,
    /// Stores. x87 stores leave memory unwritten on an unmasked exception, and so does any store
    /// whose outcome isn't [`Outcome::Done`]: fill a bounce buffer with the old contents first.
    Write,
    /// Both: translate for writing. Also a compare and exchange, which always writes.
    ReadWrite,
}

/// A memory operand that is read or written element by element under a mask register
/// (VMASKMOVPS and its kin). Elements whose mask is clear must not fault: give the thunk a bounce
/// buffer of the operand's full size and move only the selected elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ElementMask {
    /// Vector register with the mask: the top bit of each element selects it.
    pub register: u8,
    /// Element size in bytes (4 or 8).
    pub element_size: u8,
}

/// The explicit memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MemoryOperand {
    /// Bytes read or written at the host address.
    pub size: usize,
    /// Direction.
    pub access: Access,
    /// Required alignment of the guest's linear address, in bytes; 1 is none. A violation is
    /// #GP(0) (SDM vol. 1 10.4.1, 14.9).
    pub alignment: usize,
    /// Alignment whose violation is #AC where EFLAGS.AC asks for it, in bytes; 1 is none
    /// (SDM vol. 3A, table 7-7; vol. 2A, tables 2-19 to 2-26 for VEX).
    pub checked_alignment: usize,
    /// A host atomic on the host address: LOCK prefix, or XCHG. Don't run it across a cache line on
    /// guest memory (split lock), nor on a bounce buffer if other vCPUs run.
    pub locked: bool,
    /// BT, BTS, BTR, BTC with a register bit offset: the offset also moves the address. The
    /// interpreter adds `(offset >> log2(8 × size)) × size` (arithmetic shift of the signed offset)
    /// to the effective address; the thunk uses the offset modulo `8 × size`.
    pub bit_offset: bool,
    /// Set for masked loads and stores.
    pub mask: Option<ElementMask>,
}

/// What the x87 instruction does to FIP, FOP and FDP. The thunk leaves the guest's values in the
/// image (the host's would name the thunk), so the interpreter records the new ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum X87Pointers {
    /// Nothing to record: not x87, or a control instruction (which handles them itself).
    Unchanged,
    /// Record FIP and FOP.
    Instruction,
    /// Record FIP, FOP, and FDP of the memory operand.
    InstructionAndData,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "the instruction may have raised an exception"]
pub enum Outcome {
    /// The instruction is complete.
    Done,
    /// An unmasked SIMD floating-point exception: MXCSR's flags are set, nothing else has changed
    /// (but for MMX mode, which CVTPS2PI and its like enter). Raise #XM (#UD if not
    /// CR4.OSXMMEXCPT).
    ///
    /// Flags that may differ from the CPU's, since the instruction ran with its exceptions masked:
    /// PE is set next to an unmasked UE or OE even if the result would have been exact with a larger
    /// exponent; DPPS and DPPD, which compute in steps, may set flags of a step too many or few.
    SimdException,
    /// An unmasked x87 exception was pending, so nothing ran. Raise #MF (or FERR# if not CR0.NE).
    X87Pending,
}

/// Host code for one guest instruction. Cheap to clone; keeps its code memory alive.
#[derive(Clone, Debug)]
pub struct Thunk {
    pub(crate) entry: EntryPoint,
    /// Result of `entry` is an outcome.
    pub(crate) fallible: bool,
    /// The checks to make first.
    pub class: Class,
    /// Checks for a pending x87 exception first (x87 but FNxxx, and MMX). [`Thunk::run`] checks it
    /// too; here for interpreters that need #MF before the memory operand's faults.
    pub waiting: bool,
    /// Reads or writes vector registers.
    pub uses_vector: bool,
    /// Can raise #XM, so reads MXCSR.
    pub simd_float: bool,
    /// The memory operand, if any.
    pub memory: Option<MemoryOperand>,
    /// What to record after an x87 instruction.
    pub x87_pointers: X87Pointers,
    /// Keeps the code mapped; none for thunks that are functions of this crate.
    pub(crate) _code: Option<Arc<Chunk>>,
}

impl Thunk {
    /// Runs the instruction on `registers` and the memory operand at `memory`.
    ///
    /// # Safety
    ///
    /// If [`Thunk::memory`] is set, `memory` is valid for its size and access throughout the call
    /// aligned to [`MemoryOperand::alignment`],
    /// and nothing in Rust holds a reference to those bytes (other threads may access guest memory
    /// at the same time, as other vCPUs do). For a masked operand that holds for the full size.
    #[inline]
    pub unsafe fn run(&self, registers: &mut RegisterFile, memory: *mut u8) -> Outcome {
        // SAFETY: `entry` is code made for this signature, mapped as long as `self._code` lives;
        // the register file is borrowed exclusively, the caller vouches for `memory`.
        let status = unsafe { (self.entry)(registers, memory) };
        if !self.fallible {
            return Outcome::Done;
        }
        match status {
            STATUS_DONE => Outcome::Done,
            STATUS_SIMD => Outcome::SimdException,
            _ => Outcome::X87Pending,
        }
    }

    /// Runs the instruction with a bounce buffer (or none) as its memory operand.
    ///
    /// # Panics
    ///
    /// If `memory` is shorter than the memory operand: the caller's mistake.
    pub fn run_buffered(&self, registers: &mut RegisterFile, memory: &mut [u8]) -> Outcome {
        let size = self.memory.map_or(0, |operand| operand.size);
        assert!(
            memory.len() >= size,
            "a memory operand of {size} bytes with a buffer of {}",
            memory.len()
        );
        // The guest's alignment rule concerns the guest's address; the host instruction has the same
        // rule for this one.
        let alignment = self.memory.map_or(1, |operand| operand.alignment);
        if (memory.as_ptr() as usize).is_multiple_of(alignment) {
            // SAFETY: the buffer is borrowed exclusively, long enough, and aligned.
            return unsafe { self.run(registers, memory.as_mut_ptr()) };
        }
        let mut aligned = AlignedBuffer([0; 128]);
        aligned.0[..size].copy_from_slice(&memory[..size]);
        // SAFETY: the buffer is ours, aligned, and longer than any operand (FSAVE's 108 bytes).
        let outcome = unsafe { self.run(registers, aligned.0.as_mut_ptr()) };
        memory[..size].copy_from_slice(&aligned.0[..size]);
        outcome
    }

    /// Runs an instruction without memory operand.
    ///
    /// # Panics
    ///
    /// If the instruction has a memory operand: the caller's mistake.
    #[inline]
    pub fn run_registers(&self, registers: &mut RegisterFile) -> Outcome {
        assert!(
            self.memory.is_none(),
            "the instruction has a memory operand"
        );
        // SAFETY: there is no memory operand, so the pointer isn't used.
        unsafe { self.run(registers, core::ptr::null_mut()) }
    }

    /// The host code. Valid as long as this thunk (or a clone) lives; same obligations as
    /// [`Thunk::run`].
    pub fn entry(&self) -> EntryPoint {
        self.entry
    }
}

/// The instruction is complete.
pub(crate) const STATUS_DONE: u32 = 0;
/// An unmasked SIMD floating-point exception was found.
pub(crate) const STATUS_SIMD: u32 = 1;
/// An unmasked x87 exception was pending.
pub(crate) const STATUS_X87_PENDING: u32 = 2;

#[repr(C, align(64))]
struct AlignedBuffer([u8; 128]);
