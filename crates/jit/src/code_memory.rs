//! Memory for host code: two views of the same memory, so that no mapping is writable and executable.
#![allow(unsafe_code)]

use std::io;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags, madvise, mmap, mmap_anonymous,
    mprotect, mremap, munmap,
};

/// Bytes of a large page.
const LARGE: usize = 2 << 20;
/// Of `linux/mman.h`.
const MADV_COLLAPSE: i32 = 25;

/// Host code of one vCPU, filled from its start.
#[derive(Debug)]
pub(crate) struct CodeMemory {
    writable: *mut u8,
    executable: *mut u8,
    size: usize,
    used: usize,
    /// Memory is not used again as long as there is other.
    once: bool,
}

// SAFETY: both views belong to this value alone.
unsafe impl Send for CodeMemory {}

impl CodeMemory {
    /// Reserves `size` bytes; the host gives memory as it is written.
    pub(crate) fn new(size: usize) -> io::Result<Self> {
        let file = memfd_create("trapgate-code", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, size as u64)?;
        let view = |protection| {
            // A large page of the host's can hold code only if it lies in the file as it lies in memory.
            // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of Rust's.
            let reserved = unsafe {
                mmap_anonymous(
                    core::ptr::null_mut(),
                    size + LARGE,
                    ProtFlags::empty(),
                    MapFlags::PRIVATE | MapFlags::NORESERVE,
                )
            }?;
            let before = reserved.addr().wrapping_neg() % LARGE;
            let start = reserved.wrapping_byte_add(before);
            // SAFETY: all three lie in what was just reserved, of which nobody knows yet.
            unsafe {
                if before != 0 {
                    let _ = munmap(reserved, before);
                }
                let _ = munmap(start.wrapping_byte_add(size), LARGE - before);
                mmap(
                    start,
                    size,
                    protection,
                    MapFlags::SHARED | MapFlags::FIXED,
                    &file,
                    0,
                )
                .inspect_err(|_| {
                    let _ = munmap(start, size);
                })
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
            once: false,
        })
    }

    /// As [`Self::new`], in memory whose code `perf` looks up in a map ([`crate::perf_map`]): shared memory of no
    /// file, which is called `/dev/zero`, and not the memfd. An address means one thing as long as `size` allows.
    pub(crate) fn named_by_map(size: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of Rust's.
        let writable = unsafe {
            mmap_anonymous(
                core::ptr::null_mut(),
                size,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
            )
        }?;
        // SAFETY: an old size of 0 makes a second view of the shared memory (mremap(2)), at an address of the
        // kernel's choice, and leaves the first one be. Nobody knows of either yet.
        let executable = unsafe {
            mremap(writable, 0, size, MremapFlags::MAYMOVE).and_then(|view| {
                let protection = MprotectFlags::READ | MprotectFlags::EXEC;
                mprotect(view, size, protection)
                    .map(|()| view)
                    .inspect_err(|_| {
                        let _ = munmap(view, size);
                    })
            })
        };
        let executable = executable.inspect_err(|_| {
            // SAFETY: just mapped, and nobody else knows of it.
            let _ = unsafe { munmap(writable, size) };
        })?;
        Ok(Self {
            writable: writable.cast(),
            executable: executable.cast(),
            size,
            used: 0,
            once: true,
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
        let before = self.used / LARGE;
        self.used = (self.used + code.len()).next_multiple_of(16).min(self.size);
        for full in before..self.used / LARGE {
            self.make_large(full * LARGE);
        }
    }

    /// Has the host put [`LARGE`] bytes that are full into one page, if it can (madvise(2), `MADV_COLLAPSE`, since Linux 6.1): much code has
    /// many pages, and a processor's TLB for code few entries.
    fn make_large(&self, offset: usize) {
        for view in [self.writable, self.executable] {
            // SAFETY: the range is inside the view; its contents stay. If the host refuses nothing changes.
            let _ = unsafe { libc::madvise(view.add(offset).cast(), LARGE, MADV_COLLAPSE) };
        }
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

    /// Forgets all code from `used` bytes on, and gives its memory back. If there is room for `more`, memory that is not
    /// to be used again is not.
    pub(crate) fn rewind(&mut self, used: usize, more: usize) {
        if self.once && self.left() >= more {
            return;
        }
        let start = used.next_multiple_of(4096);
        if start < self.used {
            // SAFETY: the range is inside the view, and nothing refers to code in it any more. The memory is shared by
            // both views and by no one else; it reads as zeros from now on. If the host refuses it stays.
            let _ = unsafe {
                madvise(
                    self.writable.add(start).cast(),
                    self.used - start,
                    Advice::LinuxRemove,
                )
            };
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Both kinds have two views of the same bytes, of which none can be written and executed.
    #[test]
    fn code_is_seen_in_a_view_that_cannot_be_written() {
        for make in [CodeMemory::new, CodeMemory::named_by_map] {
            let mut memory = make(1 << 16).unwrap();
            memory.append(&[0x90; 20]);
            assert_eq!(memory.used(), 32);
            // SAFETY: both views are mapped, and nobody writes meanwhile.
            let seen = unsafe { std::slice::from_raw_parts(memory.executable, 21) };
            assert_eq!((seen[19], seen[20]), (0x90, 0));
            let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
            let rights = |address: *mut u8| {
                let start = format!("{:x}-", address as usize);
                let line = maps.lines().find(|line| line.starts_with(&start));
                line.and_then(|line| line.split(' ').nth(1))
                    .map(str::to_owned)
            };
            assert_eq!(rights(memory.writable).as_deref(), Some("rw-s"));
            assert_eq!(rights(memory.executable).as_deref(), Some("r-xs"));
        }
    }

    #[test]
    fn memory_that_a_map_names_is_used_again_only_when_there_is_no_other() {
        let mut memory = CodeMemory::named_by_map(4096).unwrap();
        memory.append(&[0x90; 1024]);
        memory.rewind(64, 1024);
        assert_eq!(memory.used(), 1024);
        memory.rewind(64, 4096);
        assert_eq!(memory.used(), 64);
    }
}
