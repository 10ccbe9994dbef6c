//! Who lies where in the guest's RAM while a plan is made.

use crate::error::BootError;
use crate::memory_map::{BIOS_END, LOW_END, MapEntry, MapKind};

/// The first 4 KiB hold the real-mode interrupt table and the BIOS data area.
const FIRST_FREE: u64 = 0x1000;
/// Page size of the architecture.
pub(crate) const PAGE: u64 = 4096;
/// Start of the hole for devices below 4 GiB on a PC.
const DEVICE_HOLE: u64 = 0xc000_0000;
/// What a kernel needs besides what is loaded, as a rule of thumb for the error message only.
const ROOM_TO_WORK: u64 = 32 << 20;

/// RAM that is still free, as ascending ranges without overlaps.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    free: Vec<(u64, u64)>,
    ram: Vec<(u64, u64)>,
    ram_bytes: u64,
    /// Bytes of initial RAM disks and modules that will be placed, for error messages.
    to_come: u64,
}

impl Layout {
    pub(crate) fn new(map: &[MapEntry], ram_bytes: u64, to_come: u64) -> Self {
        let ram: Vec<_> = map
            .iter()
            .filter(|entry| entry.kind == MapKind::Ram)
            .map(|entry| (entry.start.max(FIRST_FREE), entry.start + entry.length))
            .collect();
        Self {
            free: ram.clone(),
            ram,
            ram_bytes,
            to_come,
        }
    }

    /// The error for something that does not fit and whose last byte would lie before `end`.
    pub(crate) fn too_little(&self, what: &'static str, end: u64) -> BootError {
        BootError::TooLittleMemory {
            what,
            needs: (end + self.to_come + ROOM_TO_WORK).next_multiple_of(16 << 20),
            has: self.ram_bytes,
        }
    }

    /// Takes a fixed place in RAM. Places may overlap, as the segments of some kernels do.
    pub(crate) fn claim(
        &mut self,
        what: &'static str,
        start: u64,
        length: u64,
    ) -> Result<(), BootError> {
        let end = start.saturating_add(length);
        let in_ram = |(from, to): &(u64, u64)| *from <= start && end <= *to;
        if !self.ram.iter().any(in_ram) {
            return Err(if start >= BIOS_END && end <= DEVICE_HOLE {
                self.too_little(what, end)
            } else {
                BootError::NotRam { start, end }
            });
        }
        self.free = self
            .free
            .iter()
            .flat_map(|&(from, to)| [(from, to.min(start)), (from.max(end), to)])
            .filter(|(from, to)| from < to)
            .collect();
        Ok(())
    }

    /// Takes the lowest free place at or above `from`. `align` is a power of two.
    pub(crate) fn lowest(&mut self, length: u64, align: u64, from: u64) -> Option<u64> {
        let start = self.free.iter().find_map(|&(start, end)| {
            let start = start.max(from).checked_next_multiple_of(align)?;
            (start.checked_add(length)? <= end).then_some(start)
        })?;
        self.claim("", start, length).ok()?;
        Some(start)
    }

    /// Takes the highest free place that ends at or below `below`. `align` is a power of two.
    pub(crate) fn highest(&mut self, length: u64, align: u64, below: u64) -> Option<u64> {
        let start = self.free.iter().rev().find_map(|&(start, end)| {
            let place = end.min(below).checked_sub(length)? & !(align - 1);
            (place >= start).then_some(place)
        })?;
        self.claim("", start, length).ok()?;
        Some(start)
    }

    /// Takes a place below 640 KiB, where structures lie that a kernel reads before it has looked
    /// at the memory map; or, where a kernel itself lies there, the lowest place above.
    pub(crate) fn low(
        &mut self,
        what: &'static str,
        length: u64,
        align: u64,
    ) -> Result<u64, BootError> {
        self.lowest(length, align, FIRST_FREE)
            .filter(|start| start + length <= DEVICE_HOLE)
            .ok_or_else(|| self.too_little(what, length + LOW_END))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        let ram = |start, end| MapEntry {
            start,
            length: end - start,
            kind: MapKind::Ram,
        };
        let map = [ram(0, LOW_END), ram(0x10_0000, 0x100_0000)];
        Layout::new(&map, 0x100_0000, 0)
    }

    #[test]
    fn places_do_not_overlap_what_is_claimed() {
        let mut layout = layout();
        layout.claim("kernel", 0x2000, 0x1001).unwrap();
        assert_eq!(layout.low("table", 0x1000, 0x1000).unwrap(), 0x1000);
        assert_eq!(layout.low("table", 0x1000, 0x1000).unwrap(), 0x4000);
        assert_eq!(layout.low("bytes", 8, 8).unwrap(), 0x3008);
        assert_eq!(layout.highest(0x1800, PAGE, 0x80_0000), Some(0x7f_e000));
        assert_eq!(layout.highest(0x1800, PAGE, 0x80_0000), Some(0x7f_c000));
        assert_eq!(layout.lowest(0x10_0000, PAGE, 0), Some(0x10_0000));
    }

    #[test]
    fn claim_says_whether_more_memory_would_help() {
        let mut layout = layout();
        let beyond = layout.claim("the kernel", 0xf0_0000, 0x20_0000);
        assert!(matches!(beyond, Err(BootError::TooLittleMemory { .. })));
        for (start, length) in [(0x9_f000, 0x1000), (0, 0x100), (0xf000_0000, 1), (1, !0)] {
            let hole = layout.claim("the kernel", start, length);
            assert!(matches!(hole, Err(BootError::NotRam { .. })));
        }
    }
}
