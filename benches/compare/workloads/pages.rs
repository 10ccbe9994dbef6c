//! Page faults, and mappings that come and go.

use std::ptr::null_mut;

use crate::libc::{
    MADV_NOHUGEPAGE, MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE, madvise, mmap, munmap,
};
use crate::{Setting, Work};

const PAGE: usize = 4096;

/// Maps fresh memory in small pages, writes a byte at each of `offsets`, and unmaps it.
fn touch(size: usize, offsets: impl Iterator<Item = usize>) -> Result<u64, String> {
    let mut sum = 0;
    // SAFETY: the mapping is new, ours alone, and is accessed only below `size` and before it is unmapped.
    unsafe {
        let at = mmap(
            null_mut(),
            size,
            PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS,
            -1,
            0,
        );
        if at.addr() == usize::MAX {
            return Err(format!("mmap: {}", std::io::Error::last_os_error()));
        }
        if size > 1 << 20 {
            madvise(at, size, MADV_NOHUGEPAGE);
        }
        for offset in offsets {
            let byte = at.cast::<u8>().add(offset.min(size - 1));
            sum += u64::from(byte.read_volatile()) + 1;
            byte.write_volatile(1);
        }
        munmap(at, size);
    }
    Ok(sum)
}

pub(crate) fn faults(setting: &Setting) -> Work {
    const SIZE: usize = 32 << 20;
    let passes = 8 / setting.scale.min(8);
    Box::new(move || {
        (0..passes).try_fold(0, |sum, _| {
            // Scattered within each 2 MiB, so that faults come in no order but close to each other.
            let pages = (0..SIZE / PAGE).map(|page| (page & !511) | ((page * 167) & 511));
            Ok(sum + touch(SIZE, pages.map(|page| page * PAGE))?)
        })
    })
}

pub(crate) fn churn(setting: &Setting) -> Work {
    const SIZE: usize = 128 << 10;
    let passes = 20_000 / setting.scale;
    Box::new(move || {
        (0..passes).try_fold(
            0,
            |sum, _| Ok(sum + touch(SIZE, [0, SIZE - 1].into_iter())?),
        )
    })
}
