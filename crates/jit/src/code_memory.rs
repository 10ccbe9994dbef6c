//! Memory for host code: two views of one memfd, so that no mapping is writable and executable.
#![allow(unsafe_code)]

use std::io;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Host code of one vCPU, filled from its start.
#[derive(Debug)]
pub(crate) struct CodeMemory {
    writable: *mut u8,
    executable: *mut u8,
    size: usize,
    used: usize,
}

// SAFETY: both views belong to this value alone.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Reserves `size` bytes; the host gives memory as it is written.
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        let file = memfd_create("trapgate-code", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, size as u64)?;
        let view = |protection| {
            // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of Rust's.
            unsafe {
                mmap(
                    core::ptr::null_mut(),
                    size,
                    protection,
                    MapFlags::SHARED,
                    &file,
                    0,
                )
            }
        };
        let writable = view(ProtFlags::READ | ProtFlags::WRITE)?;
        let executable = match view(ProtFlags::READ | ProtFlags::EXEC) {
            Ok(address) => address,
            Err(error) => {
                // SAFETY: just mapped, and nobody else knows of it.
                let _ = unsafe { munmap(writable, size) };
                return Err(error.into());
            }
        };
        Ok(Self {
            writable: writable.cast(),
            executable: executable.cast(),
            size,
            used: 0,
        })
    }

    /// Address at which the next code will run.
    pub(crate) fn next(&self) -> u64 {
        self.executable as u64 + self.used as u64
    }

    /// Bytes that are left.
    pub(crate) fn left(&self) -> usize {
        self.size - self.used
    }

    /// Bytes that are used.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// Puts code, made for the address that [`Self::next`] gave, in its place.
    pub(crate) fn append(&mut self, code: &[u8]) {
        assert!(code.len() <= self.left(), "the caller looked if it fits");
        // SAFETY: the range is inside the view, as just checked, and nobody runs it: nothing refers to
        // code beyond `used`.
        unsafe {
            core::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(self.used), code.len());
        }
        self.used = (self.used + code.len()).next_multiple_of(16).min(self.size);
    }

    /// Sets the rel32 at address `at` to reach `target`. No host code runs meanwhile: a vCPU's code is
    /// changed by its own thread.
    pub(crate) fn patch(&mut self, at: u64, target: u64) {
        let offset = (at - self.executable as u64) as usize;
        assert!(offset + 4 <= self.used, "the place is inside the code");
        let distance = target.wrapping_sub(at + 4) as i32;
        // SAFETY: inside the view, as just checked.
        unsafe {
            core::ptr::copy_nonoverlapping(
                distance.to_le_bytes().as_ptr(),
                self.writable.add(offset),
                4,
            );
        }
    }

    /// Code between two addresses.
    pub(crate) fn bytes(&self, from: u64, to: u64) -> &[u8] {
        let start = (from - self.executable as u64) as usize;
        let end = (to - self.executable as u64) as usize;
        assert!(
            start <= end && end <= self.used,
            "the range is inside the code"
        );
        // SAFETY: inside the view, as just checked; who changes code borrows this exclusively.
        unsafe { core::slice::from_raw_parts(self.writable.add(start), end - start) }
    }

    /// Forgets all code from `used` bytes on.
    pub(crate) fn rewind(&mut self, used: usize) {
        self.used = used.min(self.used);
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size; nothing runs code of a vCPU that is gone.
        unsafe {
            let _ = munmap(self.writable.cast(), self.size);
            let _ = munmap(self.executable.cast(), self.size);
        }
    }
}
