//! Memory below 2 GiB, which host code reaches by a 32-bit address without a register.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// A value in memory below 2 GiB, at an address that does not change. Host code reads and writes it, so
/// Rust code takes references to it only while no host code runs.
pub(crate) struct Low<T> {
    pointer: NonNull<T>,
}

// SAFETY: the memory belongs to this value alone, wherever it is sent.
unsafe impl<T: Send> Send for Low<T> {}

impl<T> Low<T> {
    const BYTES: usize = size_of::<T>().next_multiple_of(4096);

    /// Maps memory, lets `fill` write a value into it, which is all zeros before.
    ///
    /// # Safety
    /// After `fill` the memory holds a valid `T`.
    pub(crate) unsafe fn new(fill: impl FnOnce(*mut T)) -> io::Result<Self> {
        const { assert!(align_of::<T>() <= 4096) };
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of Rust's.
        let memory = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                Self::BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::from_bits_retain(MAP_32BIT),
            )
        }?;
        let Some(pointer) = NonNull::new(memory.cast::<T>()) else {
            return Err(io::ErrorKind::OutOfMemory.into());
        };
        if memory as u64 + Self::BYTES as u64 > 1 << 31 {
            // SAFETY: just mapped, and nobody knows of it.
            let _ = unsafe { munmap(memory, Self::BYTES) };
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        fill(pointer.as_ptr());
        Ok(Self { pointer })
    }

    /// Its address.
    pub(crate) fn pointer(&self) -> *mut T {
        self.pointer.as_ptr()
    }
}

/// mmap(2): put the mapping into the first 2 GiB.
const MAP_32BIT: u32 = 0x40;

impl<T> Drop for Low<T> {
    fn drop(&mut self) {
        // SAFETY: the memory holds a valid `T` (see `new`), of which this is the only owner.
        unsafe {
            ptr::drop_in_place(self.pointer.as_ptr());
            let _ = munmap(self.pointer.as_ptr().cast::<c_void>(), Self::BYTES);
        }
    }
}
