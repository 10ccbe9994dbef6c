//! Host-instruction thunks: one guest user-mode instruction, run on the host CPU on the guest's
//! values.
//!
//! Guest and host are the same architecture, so SSE, AVX, x87 and the rarer integer arithmetic is
//! never re-implemented. A *thunk* is a few bytes of host code made for one instruction: it loads
//! what the instruction reads from a [`RegisterFile`], runs the instruction, and stores what it
//! wrote. The interpreter keeps its architectural registers in the register file, so nothing is
//! marshalled.
//!
//! ```
//! use iced_x86::{Decoder, DecoderOptions};
//! use trapgate_thunk::{RegisterFile, ThunkCache};
//!
//! let mut cache = ThunkCache::new();
//! let mut registers = RegisterFile::new();
//! registers.vector[1].0[0] = 40;
//! registers.vector[2].0[0] = 2;
//! // paddd xmm1, xmm2
//! let instruction = Decoder::new(64, &[0x66, 0x0f, 0xfe, 0xca], DecoderOptions::NONE).decode();
//! let thunk = cache.thunk(&instruction)?;
//! thunk.run_registers(&mut registers);
//! assert_eq!(registers.vector[1].0[0], 42);
//! # Ok::<(), trapgate_thunk::ThunkError>(())
//! ```
//!
//! # Who does what
//!
//! The thunk does the arithmetic. The interpreter does everything that depends on the mode, on
//! privilege or on memory translation, *before* it runs the thunk:
//!
//! 1. checks by [`Thunk::class`]: CR0.EM/TS, CR4.OSFXSR/OSXSAVE, XCR0 (SDM vol. 3A 2.5, 13.2);
//! 2. for [`Thunk::memory`]: effective address, segment checks, alignment ([`MemoryOperand::alignment`],
//!    else #GP(0)), translation with the right access, and a host pointer: into guest RAM, or to a
//!    bounce buffer for device memory and accesses that cross a page;
//! 3. runs it and acts on the [`Outcome`];
//! 4. for x87: records the instruction and operand pointers ([`Thunk::x87_pointers`],
//!    [`FxsaveImage::set_pointers`]).
//!
//! A signal may arrive while a thunk runs: Linux gives the handler a fresh FPU state.
//!
//! # What a thunk can't do to the host
//!
//! Only instructions on a list of what is known to be harmless become thunks ([`Unsupported`] says
//! why another doesn't). SIMD floating point runs with all exceptions masked. An x87 or MMX
//! instruction runs only when no unmasked exception is pending, so the host never receives #MF.
//! No host address reaches the guest: the x87 pointers that the host CPU records are discarded.
//!
//! A hostile guest can still make the host slow: a LOCKed access that crosses a cache line
//! (*split lock*) takes a bus lock, and some hosts kill or throttle a process for it. The
//! interpreter sees [`MemoryOperand::locked`] and must send such an access through a bounce buffer.

mod cache;
mod code_memory;
mod compile;
mod emit;
mod environment;
mod error;
mod host;
mod inspect;
mod registers;
mod select;
mod thunk;
mod x87;

pub use cache::ThunkCache;
pub use error::{ThunkError, Unsupported};
pub use inspect::{Harmless, inspect};
pub use registers::{MXCSR_DEFAULT, RegisterFile, Vector};
pub use thunk::{
    Access, Class, ElementMask, EntryPoint, MemoryOperand, Outcome, Thunk, X87Pointers,
};
pub use x87::{EnvironmentFormat, FxsaveImage, x87_opcode};
