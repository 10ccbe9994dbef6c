//! Lists in memory of their own.
//!
//! A `Vec` that grows moves, and what it leaves behind stays with the allocator, so nobody could say what a cache of
//! code costs a process. A list here grows in place, costs what is in it, and gives all of that back when it is emptied.
#![allow(unsafe_code)]

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// See the module. It never holds more than what it was made for.
#[derive(Debug)]
pub(crate) struct List<T> {
    start: NonNull<T>,
    length: usize,
    most: usize,
}

// SAFETY: the memory belongs to this value alone, wherever it is sent.
unsafe impl<T: Send> Send for List<T> {}

impl<T: Copy> List<T> {
    /// An empty list for at most `most` values; the host gives memory as they come.
    pub(crate) fn new(most: usize) -> io::Result<Self> {
        const { assert!(align_of::<T>() <= 4096 && size_of::<T>() > 0) };
        // SAFETY: a new mapping at an address of the kernel's choice aliases nothing of Rust's.
        let memory = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                most * size_of::<T>(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let start = NonNull::new(memory.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            start,
            length: 0,
            most,
        })
    }

    /// Bytes that the values take.
    pub(crate) fn bytes(&self) -> usize {
        self.length * size_of::<T>()
    }

    /// Whether no other value fits.
    pub(crate) fn is_full(&self) -> bool {
        self.length == self.most
    }

    /// Adds a value; there must be room.
    pub(crate) fn push(&mut self, value: T) {
        self.extend_from_slice(&[value]);
    }

    /// Adds values; there must be room.
    pub(crate) fn extend_from_slice(&mut self, values: &[T]) {
        assert!(
            values.len() <= self.most - self.length,
            "the caller looked if there is room"
        );
        // SAFETY: the range is inside the mapping, as just checked, and no reference to it is out: `self` is borrowed
        // exclusively.
        unsafe {
            let end = self.start.add(self.length).as_ptr();
            ptr::copy_nonoverlapping(values.as_ptr(), end, values.len());
        }
        self.length += values.len();
    }

    /// Forgets all values and gives their memory back.
    pub(crate) fn clear(&mut self) {
        let bytes = self.bytes();
        self.length = 0;
        // SAFETY: the mapping is private and this value's own, and nothing in it counts any more. If the host refuses,
        // the memory stays and is used again.
        let _ = unsafe { madvise(self.start.as_ptr().cast(), bytes, Advice::LinuxDontNeed) };
    }
}

impl<T> Deref for List<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the first `length` values were written, and are borrowed with `self`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }
}

impl<T> DerefMut for List<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`, exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl<T> Drop for List<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this size. The values are `Copy`, so there is nothing else to drop.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.most * size_of::<T>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_holds_what_was_added_until_it_is_emptied() {
        let mut list = List::new(5000).unwrap();
        list.extend_from_slice(&[1u64, 2, 3]);
        list.push(4);
        list[1] = 7;
        assert_eq!(&*list, [1, 7, 3, 4]);
        assert_eq!(list.bytes(), 32);
        list.clear();
        assert!(list.is_empty());
        list.extend_from_slice(&[5; 5000]);
        assert!(list.is_full());
        assert_eq!(list[4999], 5);
    }

    #[test]
    #[should_panic(expected = "room")]
    fn full_list_takes_nothing() {
        let mut list = List::new(1).unwrap();
        list.push(1u8);
        list.push(2);
    }
}
