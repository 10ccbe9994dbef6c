//! Guest RAM: where it lies in the guest-physical address space and in the host process.

use std::io;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

use crate::access::HostAddress;
use crate::gone::Watch;
use crate::pages;
use crate::saved::Restored;
use crate::trace::{PageTraces, Traces};
use crate::{PAGE_SIZE, TraceFlags};

/// Guest-physical memory as devices see it, through the interfaces of [`vm_memory`].
pub type GuestSpace = GuestMemoryMmap<PageTraces>;

/// Where the PC's hole for memory-mapped devices starts.
const HOLE_START: u64 = 0xc000_0000;
/// Where RAM goes on above it.
const HOLE_END: u64 = 0x1_0000_0000;

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host refused the mapping.
    #[error("cannot reserve {bytes} bytes of guest memory")]
    Reserve {
        /// Size of the whole guest memory in bytes.
        bytes: u64,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A range is empty, not page-aligned, out of order, or overlaps another.
    #[error("guest memory range {start:#x}..+{length:#x} is empty, unaligned or overlaps another")]
    Range {
        /// Guest-physical start of the range.
        start: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// Memory cannot be written to a file.
    #[error("cannot write the guest's memory to a file")]
    Save {
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be mapped.
    #[error("cannot map the file with the guest's memory")]
    Map {
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A file with a guest's memory does not have its size.
    #[error("the file with the guest's memory has {found} bytes, and should have {expected}")]
    FileLength {
        /// Its size.
        found: u64,
        /// The size of the guest's memory.
        expected: u64,
    },
    /// A list of what is in a file with a guest's memory is wrong.
    #[error(
        "the list of saved memory has a part at {offset:#x} that is unaligned, out of order, or outside of the memory"
    )]
    Chunk {
        /// Where the part is said to be.
        offset: u64,
    },
    /// Saved memory is not what was saved.
    #[error("saved memory is damaged: the {length} bytes at {offset:#x} in its file have changed")]
    Damaged {
        /// Where in the file.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// An access touches addresses that are not RAM.
    #[error("guest-physical addresses {gpa:#x}..+{length:#x} are not all RAM")]
    NotRam {
        /// First guest-physical address of the access.
        gpa: u64,
        /// Its length in bytes.
        length: u64,
    },
}

/// A run of RAM in the guest-physical address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// Guest-physical, page-aligned.
    pub start: u64,
    /// Bytes, a multiple of the page size.
    pub length: u64,
}

/// The RAM ranges of a PC with `bytes` of memory: up to 3 GiB from address 0, the rest from 4 GiB,
/// so that the last GiB below 4 GiB is free for devices.
pub fn pc_ram_ranges(bytes: u64) -> Vec<RamRange> {
    let low = bytes.min(HOLE_START);
    let mut ranges = vec![RamRange {
        start: 0,
        length: low,
    }];
    if bytes > low {
        ranges.push(RamRange {
            start: HOLE_END,
            length: bytes - low,
        });
    }
    ranges
}

/// A range with the place of its mapping in this process.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapped {
    pub(crate) start: u64,
    pub(crate) length: u64,
    /// Where it starts if all ranges are laid one behind the other, as in a file that it is saved to.
    pub(crate) file_offset: u64,
    pub(crate) host: HostAddress,
}

/// Where the bytes come from. All pages are the process's own.
#[derive(Debug)]
pub(crate) enum Backing {
    /// Zeros at first.
    Fresh,
    /// Copies of a file's pages where there was something saved.
    Restored(Restored),
}

/// All RAM of one guest. Pages that the guest never touches cost nothing.
#[derive(Debug)]
pub struct GuestMemory {
    /// First: it watches over the mapping, and is dropped before it.
    pub(crate) backing: Backing,
    space: GuestSpace,
    pub(crate) mapped: Vec<Mapped>,
    traces: Arc<Traces>,
}

impl GuestMemory {
    /// Reserves RAM for `ranges`, which are in ascending order.
    pub fn new(ranges: &[RamRange]) -> Result<Self, MemoryError> {
        let memory = Self::map(ranges, Backing::Fresh)?;
        for range in &memory.mapped {
            pages::prefer_huge(range.host, range.length).map_err(|source| {
                MemoryError::Reserve {
                    bytes: memory.size(),
                    source,
                }
            })?;
        }
        Ok(memory)
    }

    /// Maps RAM for `ranges`.
    pub(crate) fn map(ranges: &[RamRange], backing: Backing) -> Result<Self, MemoryError> {
        let bytes = total(ranges)?;
        let reserve = |source| MemoryError::Reserve { bytes, source };
        let traces = Arc::new(Traces::new((bytes / PAGE_SIZE) as usize));

        let mut regions = Vec::new();
        let mut mapped = Vec::new();
        let mut file_offset = 0;
        for range in ranges {
            let page_traces = PageTraces::new(Arc::clone(&traces), range.start, file_offset);
            let mapping = MmapRegionBuilder::new_with_bitmap(range.length as usize, page_traces)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
                .build()
                .map_err(|error| reserve(io::Error::other(error)))?;
            mapped.push(Mapped {
                start: range.start,
                length: range.length,
                file_offset,
                host: host_address(mapping.as_ptr()),
            });
            let region = GuestRegionMmap::new(mapping, GuestAddress(range.start)).ok_or(
                MemoryError::Range {
                    start: range.start,
                    length: range.length,
                },
            )?;
            regions.push(region);
            file_offset += range.length;
        }
        let space = GuestSpace::from_regions(regions)
            .map_err(|error| reserve(io::Error::other(error.to_string())))?;
        Ok(Self {
            space,
            mapped,
            traces,
            backing,
        })
    }

    /// The address space for devices; writes through it are traced.
    pub fn space(&self) -> &GuestSpace {
        &self.space
    }

    /// The trace flags of all pages.
    pub fn traces(&self) -> &Arc<Traces> {
        &self.traces
    }

    /// The RAM ranges, ascending.
    pub fn ranges(&self) -> impl Iterator<Item = RamRange> + '_ {
        self.mapped.iter().map(|range| RamRange {
            start: range.start,
            length: range.length,
        })
    }

    /// Bytes of RAM in all.
    pub fn size(&self) -> u64 {
        self.mapped.iter().map(|range| range.length).sum()
    }

    fn mapped(&self, gpa: u64) -> Option<&Mapped> {
        self.mapped
            .iter()
            .find(|range| gpa.wrapping_sub(range.start) < range.length)
    }

    /// Where the byte at `gpa` lies in this process; the rest of its page follows. `None` where
    /// there is no RAM. Writing through it bypasses the traces: the caller asks [`Self::traces`]
    /// first. The address is good as long as this `GuestMemory` lives.
    #[inline]
    pub fn host(&self, gpa: u64) -> Option<HostAddress> {
        self.mapped(gpa)
            .map(|range| range.host.offset(gpa - range.start))
    }

    /// Where the `bytes` at `gpa` lie in this process, if all of them are RAM and lie there one behind the other; and whether any of their
    /// pages may be traced. On the same terms as [`Self::host`].
    pub fn run(&self, gpa: u64, bytes: u64) -> Option<(HostAddress, bool)> {
        let range = self.mapped(gpa)?;
        let skipped = gpa - range.start;
        if range.length - skipped < bytes {
            return None;
        }
        let first = (range.file_offset + skipped) / PAGE_SIZE;
        let count = bytes.div_ceil(PAGE_SIZE);
        let traced = self.traces.may_have(first as usize, count as usize);
        Some((range.host.offset(skipped), traced))
    }

    /// The page's index in [`Self::traces`], or `None` where there is no RAM.
    #[inline]
    pub fn page_index(&self, gpa: u64) -> Option<usize> {
        self.mapped(gpa)
            .map(|range| ((range.file_offset + gpa - range.start) / PAGE_SIZE) as usize)
    }

    /// The trace flags of the page that holds `gpa`; none where there is no RAM.
    pub fn flags(&self, gpa: u64) -> TraceFlags {
        self.page_index(gpa)
            .map_or(TraceFlags::NONE, |page| self.traces.get(page))
    }

    /// Who hears of it if a thread touches a page of this memory that is gone with the file it came from; the thread
    /// stands still then. Memory that comes from no file has none.
    pub fn watch(&self) -> Option<&Watch> {
        match &self.backing {
            Backing::Fresh => None,
            Backing::Restored(restored) => restored.watch(),
        }
    }

    /// Makes all of it zeros, as new: the host gets its pages back. Whoever traces a page hears that
    /// it was written. The caller sees to it that nobody uses the memory meanwhile.
    pub fn zero(&self) -> Result<(), MemoryError> {
        for range in &self.mapped {
            let zeroed = match &self.backing {
                Backing::Fresh => pages::discard(range.host, range.length),
                Backing::Restored(restored) => restored.forget(range),
            };
            zeroed.map_err(|source| MemoryError::Reserve {
                bytes: self.size(),
                source,
            })?;
            for gpa in (range.start..range.start + range.length).step_by(PAGE_SIZE as usize) {
                let page = ((range.file_offset + gpa - range.start) / PAGE_SIZE) as usize;
                if !self.traces.get(page).is_empty() {
                    self.traces.report(page, gpa, PAGE_SIZE);
                }
            }
        }
        Ok(())
    }

    /// Copies guest memory out.
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.space
            .read_slice(data, GuestAddress(gpa))
            .map_err(|_| MemoryError::NotRam {
                gpa,
                length: data.len() as u64,
            })
    }

    /// Copies into guest memory, through the traces. All of it or nothing.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        let not_ram = MemoryError::NotRam {
            gpa,
            length: data.len() as u64,
        };
        if !self.space.check_range(GuestAddress(gpa), data.len()) {
            return Err(not_ram);
        }
        self.space
            .write_slice(data, GuestAddress(gpa))
            .map_err(|_| not_ram)
    }
}

/// Bytes in all ranges, which must be in ascending order.
pub(crate) fn total(ranges: &[RamRange]) -> Result<u64, MemoryError> {
    let mut bytes = 0;
    let mut end = 0;
    for range in ranges {
        let aligned = (range.start | range.length) % PAGE_SIZE == 0;
        if !aligned || range.length == 0 || range.start < end {
            return Err(MemoryError::Range {
                start: range.start,
                length: range.length,
            });
        }
        end = range.start + range.length;
        bytes += range.length;
    }
    Ok(bytes)
}

#[allow(unsafe_code)]
fn host_address(mapping: *mut u8) -> HostAddress {
    // SAFETY: the mapping lives as long as the `GuestMemory` that hands addresses into it out, and
    // `vm-memory` makes no references to its bytes either.
    unsafe { HostAddress::new(mapping) }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::TraceListener;

    #[derive(Default)]
    struct Heard(Mutex<Vec<(u64, u64)>>);

    impl TraceListener for Heard {
        fn written(&self, gpa: u64, length: u64) {
            self.0.lock().unwrap().push((gpa, length));
        }

        fn wants(&self, gpa: u64) -> bool {
            gpa < 0x10_3000
        }
    }

    fn two_ranges() -> GuestMemory {
        GuestMemory::new(&[
            RamRange {
                start: 0,
                length: 0x4000,
            },
            RamRange {
                start: 0x10_0000,
                length: 0x4000,
            },
        ])
        .unwrap()
    }

    #[test]
    fn memory_beyond_three_gib_goes_above_the_device_hole() {
        let ranges = pc_ram_ranges(5 << 30);
        assert_eq!(
            ranges,
            [
                RamRange {
                    start: 0,
                    length: 3 << 30
                },
                RamRange {
                    start: 4 << 30,
                    length: 2 << 30
                },
            ]
        );
    }

    #[test]
    fn device_writes_and_host_addresses_see_the_same_bytes() {
        let memory = two_ranges();
        memory.write(0x10_1ffe, &[1, 2, 3, 4]).unwrap();
        let host = memory.host(0x10_2000).unwrap();
        assert_eq!(host.load_u16(), 0x0403);
    }

    #[test]
    fn access_across_a_hole_is_refused_and_writes_nothing() {
        let memory = two_ranges();
        assert!(memory.write(0x3ffe, &[9; 4]).is_err());
        let mut bytes = [0; 2];
        memory.read(0x3ffe, &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0]);
        assert!(memory.host(0x4000).is_none());
    }

    #[test]
    fn write_to_a_traced_page_is_heard_page_by_page() {
        let memory = two_ranges();
        let heard = Arc::new(Heard::default());
        memory
            .traces()
            .listen(TraceFlags::CODE, Arc::clone(&heard) as _);
        for gpa in [0x10_1000, 0x10_2000] {
            let page = memory.page_index(gpa).unwrap();
            memory.traces().set(page, TraceFlags::CODE);
        }
        memory.write(0x10_1ff0, &[0; 0x20]).unwrap();
        memory.write(0x10_0000, &[0; 0x20]).unwrap();
        assert_eq!(
            *heard.0.lock().unwrap(),
            [(0x10_1ff0, 0x10), (0x10_2000, 0x10)]
        );
    }

    #[test]
    fn page_that_no_listener_wants_any_more_loses_its_flag() {
        let memory = two_ranges();
        let heard = Arc::new(Heard::default());
        memory
            .traces()
            .listen(TraceFlags::CODE, Arc::clone(&heard) as _);
        for gpa in [0x10_2000, 0x10_3000] {
            let page = memory.page_index(gpa).unwrap();
            memory.traces().set(page, TraceFlags::CODE);
            memory.write(gpa, &[1]).unwrap();
        }
        assert_eq!(memory.flags(0x10_2000), TraceFlags::CODE);
        assert_eq!(memory.flags(0x10_3000), TraceFlags::NONE);
    }

    #[test]
    fn first_write_to_a_clean_page_makes_it_dirty_for_good() {
        let memory = two_ranges();
        let heard = Arc::new(Heard::default());
        memory
            .traces()
            .listen(TraceFlags::CLEAN, Arc::clone(&heard) as _);
        memory.traces().set(1, TraceFlags::CLEAN);
        memory.write(0x1000, &[1]).unwrap();
        memory.write(0x1000, &[2]).unwrap();
        assert_eq!(*heard.0.lock().unwrap(), [(0x1000, 1)]);
        assert!(memory.flags(0x1000).is_empty());
    }

    #[test]
    fn zeroed_memory_is_as_new_and_traced_pages_hear_of_it() {
        let memory = two_ranges();
        let heard = Arc::new(Heard::default());
        memory
            .traces()
            .listen(TraceFlags::CODE, Arc::clone(&heard) as _);
        memory.write(0x1000, &[1, 2, 3]).unwrap();
        memory.write(0x10_3ffc, &[4; 4]).unwrap();
        let page = memory.page_index(0x10_3000).unwrap();
        memory.traces().set(page, TraceFlags::CODE);

        memory.zero().unwrap();

        let mut bytes = [9; 4];
        memory.read(0x1000, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4]);
        assert_eq!(memory.host(0x10_3ffc).unwrap().load_u32(), 0);
        assert_eq!(*heard.0.lock().unwrap(), [(0x10_3000, PAGE_SIZE)]);
    }

    #[test]
    fn overlapping_or_unaligned_ranges_are_refused() {
        for ranges in [
            [(0, 0x2000), (0x1000, 0x1000)],
            [(0, 0x1000), (0x1800, 0x1000)],
            [(0, 0x1000), (0x1000, 0)],
        ] {
            let ranges = ranges.map(|(start, length)| RamRange { start, length });
            assert!(GuestMemory::new(&ranges).is_err());
        }
    }
}
