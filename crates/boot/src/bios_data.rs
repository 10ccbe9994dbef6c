//! What a PC BIOS leaves below 1 MiB for those who look there.

use crate::memory_map::LOW_END;
use crate::platform::Platform;

/// Guest-physical address of the BIOS data area.
const ADDRESS: u64 = 0x400;
/// Offset of the extended area's segment.
const EBDA_SEGMENT: usize = 0x0e;
/// Offset of the number of KiB below the extended area.
const BASE_MEMORY: usize = 0x13;

/// The BIOS data area, with the ports of the serial lines and where low memory ends, and the
/// extended BIOS data area, which begins with its own size in KiB.
pub(crate) fn areas(platform: &Platform) -> Vec<(u64, Vec<u8>)> {
    let mut area = vec![0; BASE_MEMORY + 2];
    for (slot, serial) in area.chunks_exact_mut(2).zip(platform.serial.iter().take(4)) {
        slot.copy_from_slice(&serial.port.to_le_bytes());
    }
    area[EBDA_SEGMENT..][..2].copy_from_slice(&((LOW_END >> 4) as u16).to_le_bytes());
    area[BASE_MEMORY..][..2].copy_from_slice(&((LOW_END >> 10) as u16).to_le_bytes());
    vec![(ADDRESS, area), (LOW_END, vec![1])]
}
