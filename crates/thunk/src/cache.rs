//! Thunks by instruction.
#![allow(unsafe_code)]

use std::collections::HashMap;

use iced_x86::{Code, CodeSize, Instruction, Mnemonic, OpKind, Register};

use crate::code_memory::CodeMemory;
use crate::compile::Compiler;
use crate::environment;
use crate::error::ThunkError;
use crate::select::select;
use crate::thunk::{EntryPoint, Thunk};

/// Most code memory a cache takes, in bytes, unless told otherwise: some 80 000 thunks, whose
/// entries take four times as much again. Ordinary guests need a few thousand.
const DEFAULT_LIMIT: usize = 4 << 20;

/// What a thunk depends on: the instruction without its address, memory address and length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    code: Code,
    registers: [Register; 5],
    immediate: u64,
    locked: bool,
    /// VZEROUPPER and VZEROALL reach fewer registers outside 64-bit mode.
    narrow: bool,
}

impl Key {
    fn new(instruction: &Instruction, code: Code) -> Self {
        let mut key = Self {
            code,
            registers: [Register::None; 5],
            immediate: 0,
            locked: instruction.has_lock_prefix(),
            narrow: matches!(code.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall)
                && instruction.code_size() != CodeSize::Code64,
        };
        for index in 0..instruction.op_count() {
            match instruction.op_kind(index) {
                OpKind::Register => {
                    key.registers[index as usize] = instruction.op_register(index);
                }
                // Two immediates (EXTRQ, INSERTQ) are bytes.
                OpKind::Immediate8_2nd => {
                    key.immediate |= u64::from(instruction.immediate8_2nd()) << 8;
                }
                OpKind::Memory => {}
                _ => key.immediate |= instruction.try_immediate(index).unwrap_or(0),
            }
        }
        key
    }
}

/// Makes thunks and keeps them by instruction. One for each vCPU thread, or one under a lock.
#[derive(Debug)]
pub struct ThunkCache {
    thunks: HashMap<Key, Thunk>,
    compiler: Compiler,
    memory: CodeMemory,
}

impl ThunkCache {
    /// An empty cache that takes at most 4 MiB of code memory; it is mapped as needed.
    pub fn new() -> Self {
        Self::with_limit(DEFAULT_LIMIT)
    }

    /// An empty cache that takes at most `limit` bytes of code memory (64 KiB at least).
    pub fn with_limit(limit: usize) -> Self {
        Self {
            thunks: HashMap::new(),
            compiler: Compiler::default(),
            memory: CodeMemory::new(limit),
        }
    }

    /// The thunk for an instruction decoded in any mode. Its address, length, memory address and
    /// segment don't matter: only what it computes.
    ///
    /// When code memory runs out the cache forgets its thunks and starts again; memory comes back
    /// as the thunks that were handed out are dropped.
    ///
    /// # Errors
    ///
    /// When the interpreter must do the instruction itself ([`ThunkError::Unsupported`]), the host
    /// can't ([`ThunkError::HostLacks`]), or there is no code memory ([`ThunkError::Full`],
    /// [`ThunkError::Map`]).
    pub fn thunk(&mut self, instruction: &Instruction) -> Result<Thunk, ThunkError> {
        let code = select(instruction)?;
        let key = Key::new(instruction, code);
        if let Some(thunk) = self.thunks.get(&key) {
            return Ok(thunk.clone());
        }
        let thunk = match environment::thunk(code) {
            Some(thunk) => thunk,
            None => self.compile(instruction, code)?,
        };
        self.thunks.insert(key, thunk.clone());
        Ok(thunk)
    }

    /// Thunks in the cache.
    pub fn len(&self) -> usize {
        self.thunks.len()
    }

    /// Whether the cache has no thunks.
    pub fn is_empty(&self) -> bool {
        self.thunks.is_empty()
    }

    fn compile(&mut self, instruction: &Instruction, code: Code) -> Result<Thunk, ThunkError> {
        let draft = self.compiler.compile(instruction, code)?;
        let stored = match self.memory.store(self.compiler.code()) {
            Err(ThunkError::Full { .. }) => {
                self.thunks.clear();
                self.memory.store(self.compiler.code())?
            }
            other => other?,
        };
        let (address, chunk) = stored;
        // SAFETY: the code at `address` was made for this signature, and `chunk` in the same thunk
        // keeps it mapped.
        let entry = unsafe { core::mem::transmute::<*mut u8, EntryPoint>(address.as_ptr()) };
        Ok(Thunk {
            entry,
            fallible: draft.fallible,
            class: draft.class,
            waiting: draft.waiting,
            uses_vector: draft.uses_vector,
            simd_float: draft.simd_float,
            memory: draft.memory,
            x87_pointers: draft.x87_pointers,
            _code: Some(chunk),
        })
    }
}

impl Default for ThunkCache {
    fn default() -> Self {
        Self::new()
    }
}
