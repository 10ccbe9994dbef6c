//! Requests to a disk (virtio 1.2, 5.2.6).

use std::io;
use std::sync::Arc;

use trapgate_memory::GuestMemory;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::{Disk, SECTOR};
use super::{RANGES, ZERO_SECTORS};
use crate::queue::{copy_in, copy_out, length, part};
use crate::{Chain, ProtocolError, scatter};

/// Type, reserved, sector.
const HEADER: u64 = 16;
/// Sector, number of sectors, flags.
const RANGE: usize = 16;

/// Why a request failed, as its status byte.
enum Failure {
    Io,
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

/// Serves requests.
pub(super) struct Requests {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) write_through: bool,
    pub(super) queue: u16,
}

impl Requests {
    /// Serves one request; gives how many bytes of its buffers were written.
    pub(super) fn serve(
        &self,
        disk: &Disk,
        serial: &[u8; VIRTIO_BLK_ID_BYTES as usize],
        chain: &Chain,
    ) -> Result<u32, ProtocolError> {
        let short = ProtocolError::ShortRequest { queue: self.queue };
        let mut header = [0; HEADER as usize];
        let readable = length(&chain.readable);
        // The last byte is for the status.
        let room = length(&chain.writable).checked_sub(1).ok_or(short)?;
        if readable < HEADER || copy_out(&self.memory, &chain.readable, 0, &mut header) < 16 {
            return Err(short);
        }
        let [kind, _, sector_low, sector_high] = words(&header);
        let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
        let data = readable - HEADER;

        let result = match kind {
            VIRTIO_BLK_T_IN => self.read(disk, sector, chain, room),
            VIRTIO_BLK_T_OUT => self.write(disk, sector, chain, data),
            VIRTIO_BLK_T_FLUSH => disk.flush().map(|()| 0).map_err(Failure::from),
            VIRTIO_BLK_T_GET_ID => {
                let taken = serial.len().min(room as usize);
                Ok(copy_in(&self.memory, &chain.writable, 0, &serial[..taken]) as u32)
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                self.ranges(disk, kind, chain, data)
            }
            _ => Err(Failure::Unsupported),
        };
        let (status, written) = match result {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        copy_in(&self.memory, &chain.writable, room, &[status as u8]);
        Ok(written + 1)
    }

    fn read(&self, disk: &Disk, sector: u64, chain: &Chain, room: u64) -> Result<u32, Failure> {
        let offset = disk.offset(sector, room).ok_or(Failure::Io)?;
        let buffers = part(&chain.writable, 0, room);
        scatter::read(disk.file(), offset, &self.memory, buffers)?;
        // A chain has less than 4 GiB.
        Ok(room as u32)
    }

    fn write(&self, disk: &Disk, sector: u64, chain: &Chain, data: u64) -> Result<u32, Failure> {
        if disk.read_only() {
            return Err(Failure::Io);
        }
        let offset = disk.offset(sector, data).ok_or(Failure::Io)?;
        let buffers = part(&chain.readable, HEADER, data);
        scatter::write(disk.file(), offset, &self.memory, buffers)?;
        if self.write_through {
            disk.flush()?;
        }
        Ok(0)
    }

    /// Discards or zeroes ranges, of which all are checked before the first is touched.
    fn ranges(&self, disk: &Disk, kind: u32, chain: &Chain, data: u64) -> Result<u32, Failure> {
        if disk.read_only() {
            return Err(Failure::Io);
        }
        let mut bytes = [0; RANGE * RANGES as usize];
        if data == 0 || !data.is_multiple_of(RANGE as u64) || data > bytes.len() as u64 {
            return Err(Failure::Io);
        }
        let bytes = &mut bytes[..data as usize];
        copy_out(&self.memory, &chain.readable, HEADER, bytes);

        let discard = kind == VIRTIO_BLK_T_DISCARD;
        let allowed = if discard {
            0
        } else {
            VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
        };
        let parse = |bytes: &[u8; RANGE]| {
            let [low, high, sectors, flags] = words(bytes);
            if flags & !allowed != 0 {
                return Err(Failure::Unsupported);
            }
            if !discard && sectors > ZERO_SECTORS {
                return Err(Failure::Io);
            }
            let length = u64::from(sectors) * SECTOR;
            let offset = disk
                .offset(u64::from(high) << 32 | u64::from(low), length)
                .ok_or(Failure::Io)?;
            Ok((offset, length, flags != 0))
        };
        let (ranges, _) = bytes.as_chunks();
        for range in ranges {
            parse(range)?;
        }
        for range in ranges {
            let (offset, length, unmap) = parse(range)?;
            if length == 0 {
                continue;
            }
            if discard {
                disk.discard(offset, length)?;
            } else {
                disk.write_zeroes(offset, length, unmap)?;
            }
        }
        if self.write_through {
            disk.flush()?;
        }
        Ok(0)
    }
}

/// Four little-endian words.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    let (words, _) = bytes.as_chunks();
    std::array::from_fn(|index| u32::from_le_bytes(words[index]))
}
