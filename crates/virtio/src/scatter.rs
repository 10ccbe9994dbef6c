//! Moving bytes between a file and guest memory, without a copy in between.
//!
//! `vm-memory` can do this for one piece at a file's cursor; a disk wants all pieces of a request
//! at a position, in one system call.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use trapgate_memory::{GuestMemory, PageTraces};
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

use crate::Buffer;

/// Pieces that one system call gets. A driver may send a few hundred, but rarely does; the list
/// lives on the stack.
const PIECES: usize = 64;

type Piece<'a> = VolatileSlice<'a, PageTraces>;

/// Fills `buffers`, which are in RAM, from the file at `offset` bytes.
pub(crate) fn read(
    file: &File,
    offset: u64,
    memory: &GuestMemory,
    buffers: impl Iterator<Item = Buffer>,
) -> io::Result<()> {
    in_batches(memory, buffers, Permissions::Write, offset, |pieces, at| {
        let result = transfer(file, at, pieces, libc::preadv);
        // After the bytes have come, even if only some have.
        for piece in pieces.iter().flatten() {
            piece.bitmap().mark_dirty(0, piece.len());
        }
        result
    })
}

/// Writes `buffers`, which are in RAM, to the file at `offset` bytes.
pub(crate) fn write(
    file: &File,
    offset: u64,
    memory: &GuestMemory,
    buffers: impl Iterator<Item = Buffer>,
) -> io::Result<()> {
    in_batches(memory, buffers, Permissions::Read, offset, |pieces, at| {
        transfer(file, at, pieces, libc::pwritev)
    })
}

fn in_batches<'a>(
    memory: &'a GuestMemory,
    buffers: impl Iterator<Item = Buffer>,
    access: Permissions,
    mut offset: u64,
    mut move_batch: impl FnMut(&[Option<Piece<'a>>], u64) -> io::Result<u64>,
) -> io::Result<()> {
    let mut batch = [const { None }; PIECES];
    let mut filled = 0;
    for buffer in buffers {
        let pieces = memory
            .space()
            .get_slices(GuestAddress(buffer.gpa), buffer.length as usize, access)
            .map_err(io::Error::other)?;
        for piece in pieces {
            if filled == PIECES {
                offset += move_batch(&batch, offset)?;
                filled = 0;
            }
            batch[filled] = Some(piece.map_err(io::Error::other)?);
            filled += 1;
        }
    }
    move_batch(&batch[..filled], offset)?;
    Ok(())
}

/// `preadv` or `pwritev`.
type PositionedCall =
    unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> isize;

/// Moves all of `pieces`; gives how many bytes that were.
fn transfer(
    file: &File,
    offset: u64,
    pieces: &[Option<Piece<'_>>],
    call: PositionedCall,
) -> io::Result<u64> {
    let mut vectors = [const {
        libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }
    }; PIECES];
    let mut total = 0;
    for (vector, piece) in vectors.iter_mut().zip(pieces.iter().flatten()) {
        vector.iov_base = piece.ptr_guard_mut().as_ptr().cast();
        vector.iov_len = piece.len();
        total += piece.len() as u64;
    }

    let mut left = &mut vectors[..pieces.len()];
    let mut moved = 0;
    while moved < total {
        let position = libc::off_t::try_from(offset + moved)
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: every vector is a slice of a mapping of guest RAM, which the `VolatileSlice` in
        // `pieces` keeps borrowed; no Rust reference to those bytes exists. The list itself is an
        // exclusive borrow of `left.len()` vectors, no more than the 1024 that the call takes.
        let result = unsafe {
            call(
                file.as_raw_fd(),
                left.as_ptr(),
                left.len() as libc::c_int,
                position,
            )
        };
        let mut count = match usize::try_from(result) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
        };
        moved += count as u64;
        // Drop what is done, and shorten what is half done.
        while let Some(first) = left.first_mut()
            && count > 0
        {
            if count < first.iov_len {
                first.iov_base = first.iov_base.wrapping_byte_add(count);
                first.iov_len -= count;
                break;
            }
            count -= first.iov_len;
            left = &mut left[1..];
        }
    }
    Ok(total)
}
