//! The map of guest-physical memory that firmware hands to the kernel (ACPI 6.5, chapter 15).

use trapgate_memory::{GuestMemory, RamRange};

use crate::platform::Platform;

/// End of the RAM below 640 KiB that belongs to the kernel; the extended BIOS data area follows.
pub(crate) const LOW_END: u64 = 0x9_fc00;
/// End of the extended BIOS data area, start of the VGA window.
const EBDA_END: u64 = 0xa_0000;
/// The BIOS area, where the firmware's tables lie.
pub(crate) const BIOS_START: u64 = 0xe_0000;
/// End of the BIOS area.
pub(crate) const BIOS_END: u64 = 0x10_0000;

/// What a range of guest-physical addresses is for, with the numbers that E820, multiboot and PVH
/// share (ACPI 6.5, table 15-1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// RAM that the kernel may use.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapEntry {
    /// Guest-physical.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// What it is for.
    pub kind: MapKind,
}

impl MapEntry {
    fn between(start: u64, end: u64, kind: MapKind) -> Self {
        let length = end - start;
        Self {
            start,
            length,
            kind,
        }
    }
}

/// The memory map of a PC with this RAM, ascending. The BIOS areas below 1 MiB, and the PCI
/// configuration space, are reserved; RAM below 1 MiB is assumed to reach from 0 to there.
pub fn memory_map(memory: &GuestMemory, platform: &Platform) -> Vec<MapEntry> {
    let mut map = vec![
        MapEntry::between(0, LOW_END, MapKind::Ram),
        MapEntry::between(LOW_END, EBDA_END, MapKind::Reserved),
        MapEntry::between(BIOS_START, BIOS_END, MapKind::Reserved),
    ];
    for RamRange { start, length } in memory.ranges() {
        let end = start + length;
        let start = start.max(BIOS_END);
        if start < end {
            map.push(MapEntry::between(start, end, MapKind::Ram));
        }
    }
    if let Some(ecam) = platform.ecam {
        // Linux uses the memory-mapped configuration space only where the map reserves it.
        let length = ecam.length();
        map.push(MapEntry::between(
            ecam.address,
            ecam.address + length,
            MapKind::Reserved,
        ));
    }
    map.sort_by_key(|entry| entry.start);
    map
}

#[cfg(test)]
mod tests {
    use trapgate_memory::pc_ram_ranges;

    use super::*;

    #[test]
    fn map_is_ascending_without_overlaps_and_covers_all_ram() {
        let memory = GuestMemory::new(&pc_ram_ranges(5 << 30)).unwrap();
        let map = memory_map(&memory, &Platform::default());
        for pair in map.windows(2) {
            assert!(pair[0].start + pair[0].length <= pair[1].start);
        }
        let ram: u64 = map
            .iter()
            .filter(|entry| entry.kind == MapKind::Ram)
            .map(|entry| entry.length)
            .sum();
        assert_eq!(ram, (5 << 30) - (BIOS_END - LOW_END));
        let ecam = map.iter().find(|entry| entry.start == 0xe000_0000).unwrap();
        assert_eq!(ecam.kind, MapKind::Reserved);
        assert_eq!(ecam.length, 1 << 20);
    }
}
