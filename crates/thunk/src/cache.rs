//! Thunks by instruction.

use iced_x86::Instruction;

use crate::error::ThunkError;
use crate::thunk::Thunk;

/// Makes thunks and keeps them by instruction.
#[derive(Debug, Default)]
pub struct ThunkCache {}

impl ThunkCache {
    /// An empty cache; code memory is mapped when the first thunk is made.
    pub fn new() -> Self {
        Self::default()
    }

    /// The thunk for an instruction decoded in any mode. Its address, length, memory address and
    /// segment don't matter: only what it computes.
    ///
    /// # Errors
    ///
    /// When the interpreter must do the instruction itself, or the host can't ([`ThunkError`]).
    pub fn thunk(&mut self, instruction: &Instruction) -> Result<Thunk, ThunkError> {
        Err(ThunkError::Unsupported {
            code: instruction.code(),
            reason: crate::Unsupported::NotComputing,
        })
    }
}
