//! Memory for host code: two views of one memfd, so that no mapping is writable and executable.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::{Arc, Weak};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::error::ThunkError;

/// Bytes in a chunk: small enough that a cache with few thunks costs little.
const CHUNK_SIZE: usize = 64 << 10;

/// Thunks start at multiples of this many bytes, as branch targets like it.
const ALIGNMENT: usize = 16;

/// INT3 in memory that no thunk occupies.
const FILL: u8 = 0xcc;

/// A piece of code memory, mapped twice. Thunks hold it; it is unmapped with the last of them.
#[derive(Debug)]
pub(crate) struct Chunk {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
}

// SAFETY: the executable view is only read and run. The writable one is written only by the
// `CodeMemory` that made the chunk, through `&mut`, and only past what it has handed out.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn map() -> Result<Self, ThunkError> {
        let fail = |cause: rustix::io::Errno| ThunkError::Map {
            size: CHUNK_SIZE,
            cause: cause.into(),
        };
        let file = memfd_create("trapgate-thunks", MemfdFlags::CLOEXEC).map_err(fail)?;
        ftruncate(&file, CHUNK_SIZE as u64).map_err(fail)?;
        let view = |protection| {
            // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of Rust's.
            unsafe {
                mmap(
                    core::ptr::null_mut(),
                    CHUNK_SIZE,
                    protection,
                    MapFlags::SHARED,
                    &file,
                    0,
                )
            }
            .map_err(fail)
        };
        let writable = view(ProtFlags::READ | ProtFlags::WRITE)?;
        let executable = match view(ProtFlags::READ | ProtFlags::EXEC) {
            Ok(address) => address,
            Err(error) => {
                // SAFETY: just mapped, and nobody else knows of it.
                let _ = unsafe { munmap(writable, CHUNK_SIZE) };
                return Err(error);
            }
        };
        // SAFETY: the whole view is ours and writable.
        unsafe { core::ptr::write_bytes(writable.cast::<u8>(), FILL, CHUNK_SIZE) };
        let some = |address: *mut core::ffi::c_void| {
            NonNull::new(address.cast()).ok_or_else(|| fail(rustix::io::Errno::NOMEM))
        };
        Ok(Self {
            writable: some(writable)?,
            executable: some(executable)?,
        })
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this size; every thunk in it holds the chunk, so none is
        // left to run, and the `CodeMemory` that writes to it held it too.
        unsafe {
            let _ = munmap(self.writable.as_ptr().cast(), CHUNK_SIZE);
            let _ = munmap(self.executable.as_ptr().cast(), CHUNK_SIZE);
        }
    }
}

/// Hands out code memory, chunk by chunk, up to a limit.
#[derive(Debug)]
pub(crate) struct CodeMemory {
    current: Option<Arc<Chunk>>,
    used: usize,
    chunks: Vec<Weak<Chunk>>,
    limit: usize,
}

impl CodeMemory {
    /// No memory yet; `limit` in bytes, at least one chunk.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            current: None,
            used: 0,
            chunks: Vec::new(),
            limit: limit.max(CHUNK_SIZE),
        }
    }

    /// Puts `code` into executable memory: its address and what keeps it mapped.
    ///
    /// # Errors
    ///
    /// [`ThunkError::Full`] at the limit (dropping thunks makes room), [`ThunkError::Map`] if the
    /// kernel has none.
    pub(crate) fn store(&mut self, code: &[u8]) -> Result<(NonNull<u8>, Arc<Chunk>), ThunkError> {
        debug_assert!(code.len() <= CHUNK_SIZE);
        let chunk = match &self.current {
            Some(chunk) if self.used + code.len() <= CHUNK_SIZE => Arc::clone(chunk),
            _ => self.grow()?,
        };
        // SAFETY: `used + len` is within the chunk, both views are that large, and no thunk's code
        // lies there yet, so nobody runs the bytes being written.
        let executable = unsafe {
            core::ptr::copy_nonoverlapping(
                code.as_ptr(),
                chunk.writable.as_ptr().add(self.used),
                code.len(),
            );
            chunk.executable.add(self.used)
        };
        self.used = (self.used + code.len()).next_multiple_of(ALIGNMENT);
        Ok((executable, chunk))
    }

    /// Lets go of the current chunk, so that it is freed with its last thunk.
    pub(crate) fn release(&mut self) {
        self.current = None;
        self.used = 0;
    }

    fn grow(&mut self) -> Result<Arc<Chunk>, ThunkError> {
        self.release();
        self.chunks.retain(|chunk| chunk.strong_count() > 0);
        if (self.chunks.len() + 1) * CHUNK_SIZE > self.limit {
            return Err(ThunkError::Full { limit: self.limit });
        }
        let chunk = Arc::new(Chunk::map()?);
        self.chunks.push(Arc::downgrade(&chunk));
        self.current = Some(Arc::clone(&chunk));
        Ok(chunk)
    }
}
