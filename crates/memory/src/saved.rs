//! Guest memory in a file: written sparse, and mapped so that it need not be read.
//!
//! The file is as long as the RAM and has the ranges of RAM one behind the other; pages of zeros are
//! holes in it. Beside it goes a list of the [`CHUNK`]s in which there is something, with a checksum of
//! each. Restoring maps those of the file copy-on-write, and nothing where there is nothing: holes of a
//! file would be filled with pages of the host's cache, and on a tmpfs for good.
//!
//! A file that is mapped must not change. What becomes of a guest whose file is cut short is `gone.rs`'s subject; removing it
//! is harmless.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::access::HostAddress;
use crate::gone::Watch;
use crate::guest::{Backing, Mapped};
use crate::pages;
use crate::{GuestMemory, MemoryError, PAGE_SIZE, RamRange};

/// Bytes of guest memory that are listed, checked and mapped together. Small enough that a guest which
/// has touched little has few of them, large enough that a guest with much memory has few as well.
pub const CHUNK: u64 = 2 << 20;

const PAGE: usize = PAGE_SIZE as usize;

/// A chunk in which something was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedChunk {
    /// Where it is in the file, a multiple of [`CHUNK`]; it ends with the file at the latest.
    pub offset: u64,
    /// CRC-32 (that of zlib) of its bytes.
    pub checksum: u32,
}

impl SavedChunk {
    fn length(self, total: u64) -> u64 {
        CHUNK.min(total - self.offset)
    }
}

/// What restored memory remembers.
#[derive(Debug)]
pub(crate) struct Restored {
    /// The parts of the memory that are mapped from the file: start and length, as in the file.
    parts: Mutex<Vec<(u64, u64)>>,
    /// Set once the memory is mapped.
    watch: OnceLock<Watch>,
}

impl Restored {
    /// Who hears of it if the file is not whole any more.
    pub(crate) fn watch(&self) -> Option<&Watch> {
        self.watch.get()
    }

    fn parts(&self) -> Vec<(u64, u64)> {
        self.parts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Makes a range zeros again; nothing in it comes from the file any more.
    pub(crate) fn forget(&self, range: &Mapped) -> io::Result<()> {
        map_nothing(range.host, range.length)?;
        let outside = |&(start, _): &(u64, u64)| {
            !(range.file_offset..range.file_offset + range.length).contains(&start)
        };
        self.parts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(outside);
        Ok(())
    }
}

impl GuestMemory {
    /// Writes all that is not zero to an empty file, and tells which chunks these are. The caller sees
    /// to it that nobody changes the memory meanwhile.
    ///
    /// # Errors
    /// [`MemoryError::Save`]; the file is then of no use.
    pub fn save(&self, file: &File) -> Result<Vec<SavedChunk>, MemoryError> {
        let failed = |source| MemoryError::Save { source };
        let total = self.size();
        file.set_len(total).map_err(failed)?;
        let touched = self.touched();
        let mut chunks = Vec::new();
        let mut buffer = vec![0; CHUNK as usize];
        let mut touched = touched.into_iter().peekable();
        let mut offset = 0;
        while offset < total {
            let length = CHUNK.min(total - offset);
            let chunk = offset..offset + length;
            let bytes = &mut buffer[..length as usize];
            let mut clean = true;
            // The parts that may have something in them, and may reach into the next chunk.
            while let Some(part) = touched.peek().filter(|part| part.start < chunk.end) {
                if std::mem::take(&mut clean) {
                    bytes.fill(0);
                }
                let (start, end) = (part.start.max(chunk.start), part.end.min(chunk.end));
                let ends_here = part.end <= chunk.end;
                self.copy_out(
                    start,
                    &mut bytes[(start - offset) as usize..(end - offset) as usize],
                );
                if !ends_here {
                    break;
                }
                touched.next();
            }
            if !clean && write_pages(file, offset, bytes).map_err(failed)? {
                chunks.push(SavedChunk {
                    offset,
                    checksum: crc32fast::hash(bytes),
                });
            }
            offset += length;
        }
        Ok(chunks)
    }

    /// Copies bytes that lie at `offset` in the file.
    fn copy_out(&self, offset: u64, bytes: &mut [u8]) {
        let mut offset = offset;
        let mut rest = bytes;
        while !rest.is_empty() {
            let Some(range) = self
                .mapped
                .iter()
                .find(|range| offset.wrapping_sub(range.file_offset) < range.length)
            else {
                return;
            };
            let skipped = offset - range.file_offset;
            let length = (range.length - skipped).min(rest.len() as u64);
            let (now, later) = rest.split_at_mut(length as usize);
            // All of it is RAM.
            let _ = self.read(range.start + skipped, now);
            offset += length;
            rest = later;
        }
    }

    /// The parts of memory that may hold something, ascending, as places in the file.
    fn touched(&self) -> Vec<std::ops::Range<u64>> {
        let mut parts = match &self.backing {
            Backing::Fresh => Vec::new(),
            Backing::Restored(restored) => restored
                .parts()
                .into_iter()
                .map(|(start, length)| start..start + length)
                .collect(),
        };
        for range in &self.mapped {
            let start = range.file_offset;
            let touched = pages::touched(range.host, range.length);
            parts.extend(touched.iter().map(|p| start + p.start..start + p.end));
        }
        united(parts)
    }

    /// RAM for `ranges` as it was saved to `file`. Nothing is read now; what the guest writes does not
    /// reach the file.
    ///
    /// # Errors
    /// For a file or a list that is not of this memory, or that the host does not map.
    pub fn restore(
        ranges: &[RamRange],
        file: &File,
        chunks: &[SavedChunk],
    ) -> Result<Self, MemoryError> {
        let failed = |source| MemoryError::Map { source };
        let total = checked_total(ranges, file, chunks)?;
        let mut parts: Vec<(u64, u64)> = Vec::new();
        for chunk in chunks {
            let length = chunk.length(total);
            match parts.last_mut() {
                Some((start, before)) if *start + *before == chunk.offset => *before += length,
                _ => parts.push((chunk.offset, length)),
            }
        }
        let restored = Restored {
            parts: Mutex::new(Vec::new()),
            watch: OnceLock::new(),
        };
        let memory = Self::map(ranges, Backing::Restored(restored))?;
        let mut mapped_parts = Vec::new();
        for range in &memory.mapped {
            // It takes no more than the guest touches.
            pages::avoid_huge(range.host, range.length).map_err(failed)?;
            let end = range.file_offset + range.length;
            for &(start, length) in &parts {
                let (from, to) = (start.max(range.file_offset), (start + length).min(end));
                if from < to {
                    let host = range.host.offset(from - range.file_offset);
                    map_file(host, to - from, file, from).map_err(failed)?;
                    mapped_parts.push((from, to - from));
                }
            }
        }
        if let Backing::Restored(restored) = &memory.backing {
            *restored
                .parts
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = mapped_parts;
            let ranges = memory.mapped.iter();
            let watch = Watch::over(ranges.map(|range| (range.host, range.length)));
            // It is set once.
            let _ = restored.watch.set(watch.map_err(failed)?);
        }
        Ok(memory)
    }

    /// Reads all of a file with saved memory and compares it with its list, for those who want to know
    /// before they restore it.
    ///
    /// # Errors
    /// [`MemoryError::Damaged`] for the first part that is not what was saved.
    pub fn check_saved(
        ranges: &[RamRange],
        file: &File,
        chunks: &[SavedChunk],
    ) -> Result<(), MemoryError> {
        let total = checked_total(ranges, file, chunks)?;
        let mut buffer = vec![0; CHUNK as usize];
        for chunk in chunks {
            let length = chunk.length(total);
            let bytes = &mut buffer[..length as usize];
            file.read_exact_at(bytes, chunk.offset)
                .map_err(|source| MemoryError::Map { source })?;
            if crc32fast::hash(bytes) != chunk.checksum {
                return Err(MemoryError::Damaged {
                    offset: chunk.offset,
                    length,
                });
            }
        }
        Ok(())
    }
}

/// Bytes of memory in `ranges`, if file and list are of as much.
fn checked_total(
    ranges: &[RamRange],
    file: &File,
    chunks: &[SavedChunk],
) -> Result<u64, MemoryError> {
    let total = crate::guest::total(ranges)?;
    let found = file
        .metadata()
        .map_err(|source| MemoryError::Map { source })?
        .len();
    if found != total {
        return Err(MemoryError::FileLength {
            found,
            expected: total,
        });
    }
    let mut next = 0;
    for &SavedChunk { offset, .. } in chunks {
        if offset < next || offset >= total || !offset.is_multiple_of(CHUNK) {
            return Err(MemoryError::Chunk { offset });
        }
        next = offset + 1;
    }
    Ok(total)
}

/// Writes the pages of a chunk that are not zeros; whether there were any.
fn write_pages(file: &File, offset: u64, bytes: &[u8]) -> io::Result<bool> {
    const ZEROS: [u8; PAGE] = [0; PAGE];
    let mut any = false;
    let mut start = None;
    for at in (0..bytes.len()).step_by(PAGE).chain([bytes.len()]) {
        let full = bytes
            .get(at..at + PAGE)
            .is_some_and(|page| page != ZEROS.as_slice());
        match (full, start) {
            (true, None) => start = Some(at),
            (false, Some(from)) => {
                file.write_all_at(&bytes[from..at], offset + from as u64)?;
                any = true;
                start = None;
            }
            _ => {}
        }
    }
    Ok(any)
}

/// Sorts parts, and joins those that touch.
fn united(mut parts: Vec<std::ops::Range<u64>>) -> Vec<std::ops::Range<u64>> {
    parts.sort_by_key(|part| part.start);
    let mut joined: Vec<std::ops::Range<u64>> = Vec::with_capacity(parts.len());
    for part in parts {
        match joined.last_mut() {
            Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
            _ => joined.push(part),
        }
    }
    joined
}

/// Replaces a part of a mapping of ours.
#[allow(unsafe_code)]
fn replace(host: HostAddress, length: u64, flags: i32, fd: i32, offset: u64) -> io::Result<()> {
    // SAFETY: the addresses lie in a mapping of guest RAM that belongs to the caller's `GuestMemory`, to
    // whose bytes nothing in the process has references; it stays mapped, with other contents.
    let mapped = unsafe {
        libc::mmap(
            host.as_ptr().cast(),
            length as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED | flags,
            fd,
            offset as i64,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn map_file(host: HostAddress, length: u64, file: &File, offset: u64) -> io::Result<()> {
    replace(host, length, 0, file.as_raw_fd(), offset)
}

fn map_nothing(host: HostAddress, length: u64) -> io::Result<()> {
    replace(host, length, libc::MAP_ANONYMOUS, -1, 0)?;
    pages::avoid_huge(host, length)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    const LOW: u64 = 5 << 20;
    const HIGH: u64 = 1 << 32;

    /// Not a multiple of the chunk's size, so that chunks reach over the hole between the ranges.
    fn ranges() -> Vec<RamRange> {
        let range = |start, length| RamRange { start, length };
        vec![range(0, LOW), range(HIGH, 4 << 20)]
    }

    fn fresh() -> GuestMemory {
        GuestMemory::new(&ranges()).unwrap()
    }

    fn saved(memory: &GuestMemory) -> (File, Vec<SavedChunk>) {
        let file = tempfile::tempfile().unwrap();
        let chunks = memory.save(&file).unwrap();
        GuestMemory::check_saved(&ranges(), &file, &chunks).unwrap();
        (file, chunks)
    }

    fn restored((file, chunks): &(File, Vec<SavedChunk>)) -> GuestMemory {
        GuestMemory::restore(&ranges(), file, chunks).unwrap()
    }

    fn all(memory: &GuestMemory) -> Vec<u8> {
        let mut bytes = vec![0; memory.size() as usize];
        let (low, high) = bytes.split_at_mut(LOW as usize);
        memory.read(0, low).unwrap();
        memory.read(HIGH, high).unwrap();
        bytes
    }

    fn gpa(offset: u64) -> u64 {
        if offset < LOW {
            offset
        } else {
            HIGH + offset - LOW
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: 24,
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn memory_is_the_same_after_being_saved_and_restored_again_and_again(
            rounds in proptest::collection::vec(
                proptest::collection::vec((0u64..(9 << 20) - 8, 0u8..4), 0..20), 1..4),
        ) {
            let mut memory = fresh();
            for writes in rounds {
                for (offset, byte) in writes {
                    // Zeros too, which make pages empty again.
                    let room = if offset < LOW { LOW - offset } else { 8 };
                    let length = room.min(8) as usize;
                    memory.write(gpa(offset), &[byte; 8][..length]).unwrap();
                }
                let expected = all(&memory);
                let snapshot = saved(&memory);
                memory = restored(&snapshot);
                prop_assert!(all(&memory) == expected);
                // And from the copy alone, which nothing was written to.
                prop_assert!(all(&restored(&saved(&memory))) == expected);
            }
        }
    }

    #[test]
    fn pages_of_zeros_take_no_room_and_no_chunk() {
        let memory = fresh();
        memory.write(0x3000, &[0; 0x2000]).unwrap();
        memory.write(0x20_1000, &[7]).unwrap();
        let (file, chunks) = saved(&memory);
        assert_eq!(
            chunks.iter().map(|chunk| chunk.offset).collect::<Vec<_>>(),
            [CHUNK]
        );
        assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
    }

    #[test]
    fn writes_reach_neither_the_file_nor_another_that_is_restored_from_it() {
        let memory = fresh();
        memory.write(0x1000, &[1; 4]).unwrap();
        let snapshot = saved(&memory);
        let (one, other) = (restored(&snapshot), restored(&snapshot));
        one.write(0x1000, &[2; 4]).unwrap();
        one.write(HIGH, &[3; 4]).unwrap();
        assert_eq!(one.host(0x1000).unwrap().load_u32(), 0x0202_0202);
        assert_eq!(other.host(0x1000).unwrap().load_u32(), 0x0101_0101);
        assert_eq!(other.host(HIGH).unwrap().load_u32(), 0);
        GuestMemory::check_saved(&ranges(), &snapshot.0, &snapshot.1).unwrap();
    }

    #[test]
    fn restored_memory_that_is_zeroed_is_as_new() {
        let memory = fresh();
        memory.write(0x1000, &[1; 4]).unwrap();
        memory.write(HIGH, &[1; 4]).unwrap();
        let memory = restored(&saved(&memory));
        memory.write(0x2000, &[1; 4]).unwrap();
        memory.zero().unwrap();
        assert!(all(&memory).iter().all(|&byte| byte == 0));
        assert!(saved(&memory).1.is_empty());
        memory.write(0x1000, &[5]).unwrap();
        assert_eq!(all(&restored(&saved(&memory)))[0x1000], 5);
    }

    #[test]
    fn damage_is_found_by_looking_at_all() {
        let memory = fresh();
        memory.write(0x1000, &[1; 4]).unwrap();
        let (file, chunks) = saved(&memory);
        for at in [0x1002, 0x1f_ffff] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            let error = GuestMemory::check_saved(&ranges(), &file, &chunks).unwrap_err();
            assert!(
                matches!(error, MemoryError::Damaged { offset: 0, .. }),
                "{error}"
            );
            file.write_all_at(&byte, at).unwrap();
        }
    }

    #[test]
    fn files_and_lists_of_other_memory_are_refused() {
        let memory = fresh();
        memory.write(0x1000, &[1; 4]).unwrap();
        let (file, _) = saved(&memory);
        let chunk = |offset| SavedChunk {
            offset,
            checksum: 0,
        };
        for list in [
            &[chunk(1)][..],
            &[chunk(9 << 20)],
            &[chunk(u64::MAX - CHUNK + 1)],
            &[chunk(CHUNK), chunk(0)],
            &[chunk(0), chunk(0)],
        ] {
            let error = GuestMemory::restore(&ranges(), &file, list).unwrap_err();
            assert!(matches!(error, MemoryError::Chunk { .. }), "{error}");
        }
        file.set_len(8 << 20).unwrap();
        let error = GuestMemory::restore(&ranges(), &file, &[chunk(0)]).unwrap_err();
        assert!(matches!(error, MemoryError::FileLength { .. }), "{error}");
    }

    #[test]
    fn a_file_that_takes_no_more_is_an_error() {
        let memory = fresh();
        memory.write(0x1000, &[1; 4]).unwrap();
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert!(matches!(memory.save(&full), Err(MemoryError::Save { .. })));
    }

    /// Given memory whose file is cut short, when a thread touches a page that is gone, then whoever watches is told, and
    /// the thread gets nothing. Other memory is not concerned.
    #[test]
    fn who_watches_hears_of_pages_that_are_gone() {
        let memory = fresh();
        memory.write(0x1000, &[1; 4]).unwrap();
        memory.write(0x5000, &[1; 4]).unwrap();
        let (one, other) = (saved(&memory), saved(&memory));
        let (short, whole) = (Arc::new(restored(&one)), restored(&other));
        one.0.set_len(0x2000).unwrap();
        assert_eq!(short.host(0x1000).unwrap().load_u32(), 0x0101_0101);
        let touched = Arc::clone(&short);
        let thread = std::thread::spawn(move || touched.host(0x5000).unwrap().load_u32());

        assert!(short.watch().unwrap().wait());

        assert!(!thread.is_finished());
        assert_eq!(whole.host(0x5000).unwrap().load_u32(), 0x0101_0101);
        whole.watch().unwrap().end();
        assert!(!whole.watch().unwrap().wait());
    }

    #[test]
    fn what_is_not_touched_is_not_in_memory() {
        let memory = fresh();
        for page in 0..512 {
            memory.write(page * PAGE_SIZE, &[1]).unwrap();
        }
        let memory = restored(&saved(&memory));
        memory.write(0x5000, &[2]).unwrap();
        memory.write(HIGH + 0x5000, &[2]).unwrap();
        let own: usize = memory
            .mapped
            .iter()
            .map(|range| {
                let pages = pages::touched(range.host, range.length);
                pages
                    .iter()
                    .map(|part| (part.end - part.start) as usize)
                    .sum::<usize>()
            })
            .sum();
        // One page that was copied, one that is new, and the host may map neighbours from its cache.
        assert!(own <= 64 << 10, "{own} bytes");
    }

    #[test]
    fn what_a_fresh_guest_did_not_touch_is_not_looked_at() {
        let ranges = [RamRange {
            start: 0,
            length: 64 << 20,
        }];
        let memory = GuestMemory::new(&ranges).unwrap();
        memory.write(0x5000, &[2]).unwrap();
        let touched = memory.touched();
        assert!(touched[0].contains(&0x5000), "{touched:x?}");
        let bytes: u64 = touched.iter().map(|part| part.end - part.start).sum();
        // A page of the host's, which may be a large one.
        assert!(bytes <= 4 << 20, "{touched:x?}");
        memory.zero().unwrap();
        assert_eq!(memory.touched(), []);
    }
}
