//! What the host does with the pages behind guest RAM, which are the process's own: how large they are, which of them
//! there are, and that they go.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::PAGE_SIZE;
use crate::access::HostAddress;

/// Asks for pages of 2 MiB where the host has them (Linux, `Documentation/admin-guide/mm/transhuge.rst`; its setting
/// "never" is left as it is): fewer faults, and the host's TLB reaches further. A guest's kernel
/// hands its memory out in runs, so it costs a Linux guest that has booted 5 % more memory.
pub(crate) fn prefer_huge(host: HostAddress, length: u64) -> io::Result<()> {
    advise(host, length, libc::MADV_HUGEPAGE)
}

/// Asks for small pages.
pub(crate) fn avoid_huge(host: HostAddress, length: u64) -> io::Result<()> {
    advise(host, length, libc::MADV_NOHUGEPAGE)
}

fn advise(host: HostAddress, length: u64, advice: i32) -> io::Result<()> {
    // SAFETY: this advice changes no contents; the addresses are of a mapping of ours.
    let result = unsafe { libc::madvise(host.as_ptr().cast(), length as usize, advice) };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // A kernel without huge pages makes none.
            error if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            error => Err(error),
        },
    }
}

/// Gives pages back: their bytes are zeros and take no memory.
pub(crate) fn discard(host: HostAddress, length: u64) -> io::Result<()> {
    // SAFETY: the addresses are of a mapping of ours, anonymous and private, to whose bytes nothing in the process has references.
    let result =
        unsafe { libc::madvise(host.as_ptr().cast(), length as usize, libc::MADV_DONTNEED) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The parts of a mapping that may have been touched, relative to it. Where the host does not tell that is all of it, which costs
/// time only.
pub(crate) fn touched(host: HostAddress, length: u64) -> Vec<Range<u64>> {
    present(host, length).unwrap_or_else(|_| std::iter::once(0..length).collect())
}

/// The pages of a mapping of the process's own that were touched, by `/proc/self/pagemap` (Linux,
/// `Documentation/admin-guide/mm/pagemap.rst`): bit 63 says present, bit 62 swapped out.
fn present(host: HostAddress, length: u64) -> io::Result<Vec<Range<u64>>> {
    const TOUCHED: u64 = 3 << 62;
    let file = File::open("/proc/self/pagemap")?;
    let first = host.as_ptr().addr() as u64 / PAGE_SIZE;
    let mut parts: Vec<Range<u64>> = Vec::new();
    let mut entries = vec![0; 8 * PAGE_SIZE as usize];
    let mut page = 0;
    let pages = length / PAGE_SIZE;
    while page < pages {
        let count = (pages - page).min(entries.len() as u64 / 8);
        let bytes = &mut entries[..8 * count as usize];
        file.read_exact_at(bytes, 8 * (first + page))?;
        for (index, entry) in (page..).zip(bytes.as_chunks::<8>().0) {
            if u64::from_le_bytes(*entry) & TOUCHED == 0 {
                continue;
            }
            let (start, end) = (index * PAGE_SIZE, (index + 1) * PAGE_SIZE);
            match parts.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => parts.push(start..end),
            }
        }
        page += count;
    }
    Ok(parts)
}
