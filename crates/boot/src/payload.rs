//! Unpacking what a bzImage carries, on the host.

use std::fmt;
use std::io::{self, Read};
use std::ops::Range;

use crate::error::BootError;
use crate::le::u32_at;

/// The largest dictionary or window that a decompressor may ask for. Kernels are packed with up to
/// 128 MiB (`zstd --ultra -22`).
const MAX_WINDOW: u64 = 160 << 20;

/// Uncompressed bytes in a full block of the legacy LZ4 frame (LZ4 frame format, "Legacy frame").
const LZ4_BLOCK: usize = 8 << 20;

/// Address space that is taken for a block. The C library gives memory of that size back to the
/// system as soon as it is freed; after less it would keep as much of whatever is freed later
/// (mallopt(3), `M_MMAP_THRESHOLD`).
const LZ4_RESERVED: usize = 40 << 20;

/// Bytes that are unpacked at a time.
const PIECE: u64 = 256 << 10;

/// The formats that kernels are packed in (`scripts/Makefile.lib` of Linux).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// bzip2.
    Bzip2,
    /// LZMA "alone".
    Lzma,
    /// xz, with the x86 branch filter.
    Xz,
    /// LZO, which is left to the guest's own decompressor.
    Lzo,
    /// LZ4 in its legacy frame.
    Lz4,
    /// Zstandard.
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "LZMA",
            Self::Xz => "xz",
            Self::Lzo => "LZO",
            Self::Lz4 => "LZ4",
            Self::Zstd => "zstd",
        })
    }
}

impl Compression {
    /// The format of `data` by its magic number.
    pub fn detect(data: &[u8]) -> Option<Self> {
        const MAGIC: &[(&[u8], Compression)] = &[
            (b"\x1f\x8b", Compression::Gzip),
            (b"BZh", Compression::Bzip2),
            (b"\x5d\x00\x00", Compression::Lzma),
            (b"\xfd7zXZ\x00", Compression::Xz),
            (b"\x89LZO", Compression::Lzo),
            (b"\x02\x21\x4c\x18", Compression::Lz4),
            (b"\x04\x22\x4d\x18", Compression::Lz4),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        ];
        MAGIC
            .iter()
            .find(|(magic, _)| data.starts_with(magic))
            .map(|(_, format)| *format)
    }

    /// A command that unpacks a file of this format.
    pub fn unpack_command(self) -> &'static str {
        match self {
            Self::Gzip => "gunzip -c FILE > vmlinux",
            Self::Bzip2 => "bunzip2 -c FILE > vmlinux",
            Self::Lzma | Self::Xz => "xz -dc FILE > vmlinux",
            Self::Lzo => "lzop -dc FILE > vmlinux",
            Self::Lz4 => "lz4 -dc FILE > vmlinux",
            Self::Zstd => "zstd -dc FILE > vmlinux",
        }
    }
}

/// What a bzImage carries in a format that the host can unpack.
///
/// It is unpacked piece by piece, so that a kernel of any size costs no more of the host's memory
/// than its decompressor needs (for xz as Linux uses it a dictionary of 32 MiB).
pub(crate) struct Packed<'a> {
    format: Compression,
    /// Bytes unpacked, by the size field.
    size: u64,
    reader: Box<dyn Read + 'a>,
    /// What was read of it.
    head: Vec<u8>,
}

impl fmt::Debug for Packed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes, {}", self.size, self.format)
    }
}

impl<'a> Packed<'a> {
    /// Takes a payload that says that it has at most `limit` bytes unpacked. `None` if it is not
    /// packed, or the host has no decompressor for it.
    ///
    /// The payload ends with its unpacked size in 32 bits (Documentation/arch/x86/boot.rst,
    /// `payload_length`); for gzip that is part of the format, for the others it was appended.
    pub(crate) fn new(payload: &'a [u8], limit: u64) -> Result<Option<Self>, BootError> {
        let format = match Compression::detect(payload) {
            None | Some(Compression::Lzo) => return Ok(None),
            Some(format) => format,
        };
        let damaged = |reason: String| BootError::Payload { format, reason };
        let size = payload.len().checked_sub(4);
        let size = size.and_then(|at| u32_at(payload, at));
        let size = size.ok_or_else(|| damaged("it is shorter than its size field".into()))?;
        let size = u64::from(size);
        if size > limit {
            return Err(BootError::PayloadTooLarge { size, limit });
        }
        let reader = reader(format, payload).map_err(|error| damaged(error.to_string()))?;
        Ok(Some(Self {
            format,
            size,
            reader,
            head: Vec::new(),
        }))
    }

    /// Bytes unpacked, if the size field is right, which [`Self::unpack`] finds out.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// The first `length` bytes, or all if they are fewer.
    pub(crate) fn head(&mut self, length: u64) -> Result<&[u8], BootError> {
        let length = length.min(self.size);
        if let Some(more) = length.checked_sub(self.head.len() as u64) {
            let read = self.reader.by_ref().take(more).read_to_end(&mut self.head);
            read.map_err(|error| self.damaged(error.to_string()))?;
        }
        Ok(&self.head)
    }

    /// Hands everything to `take`, piece by piece with its offset.
    pub(crate) fn unpack(
        mut self,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), BootError>,
    ) -> Result<(), BootError> {
        let mut piece = std::mem::take(&mut self.head);
        let mut offset = 0;
        loop {
            let more = PIECE.saturating_sub(piece.len() as u64);
            let read = self.reader.by_ref().take(more).read_to_end(&mut piece);
            read.map_err(|error| self.damaged(error.to_string()))?;
            let end = offset + piece.len() as u64;
            if end > self.size || (piece.is_empty() && end != self.size) {
                let size = self.size;
                let more = if end > size { " or more" } else { "" };
                return Err(self.damaged(format!("it gives {end} bytes{more} instead of {size}")));
            }
            if piece.is_empty() {
                return Ok(());
            }
            take(offset, &piece)?;
            offset = end;
            piece.clear();
        }
    }

    fn damaged(&self, reason: String) -> BootError {
        BootError::Payload {
            format: self.format,
            reason,
        }
    }
}

/// What unpacks a payload, which has a size field at its end.
fn reader<'a>(format: Compression, payload: &'a [u8]) -> io::Result<Box<dyn Read + 'a>> {
    const LIMIT_KIB: u32 = (MAX_WINDOW >> 10) as u32;
    let stream = &payload[..payload.len() - 4];
    Ok(match format {
        Compression::Gzip => Box::new(flate2::read::GzDecoder::new(payload)),
        Compression::Bzip2 => Box::new(bzip2::read::BzDecoder::new(stream)),
        Compression::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(
            stream, false, LIMIT_KIB,
        )),
        Compression::Lzma => Box::new(lzma_rust2::LzmaReader::new_mem_limit(
            stream, LIMIT_KIB, None,
        )?),
        Compression::Zstd => Box::new(
            ruzstd::decoding::StreamingDecoder::new_with_max_window_size(stream, MAX_WINDOW)
                .map_err(io::Error::other)?,
        ),
        Compression::Lz4 => Box::new(LegacyLz4::new(stream)?),
        Compression::Lzo => return Err(io::Error::other("LZO is left to the kernel")),
    })
}

/// A reader of the legacy LZ4 frame: after the magic number, blocks with their compressed size in
/// front; each but the last holds [`LZ4_BLOCK`] bytes.
struct LegacyLz4<'a> {
    /// The blocks to come.
    stream: &'a [u8],
    block: Vec<u8>,
    /// What of the block is not read yet.
    rest: Range<usize>,
}

impl<'a> LegacyLz4<'a> {
    fn new(stream: &'a [u8]) -> io::Result<Self> {
        const LEGACY_MAGIC: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
        let stream = stream
            .strip_prefix(LEGACY_MAGIC)
            .ok_or_else(|| io::Error::other("it is not the legacy LZ4 frame that kernels use"))?;
        Ok(Self {
            stream,
            block: Vec::with_capacity(LZ4_RESERVED),
            rest: 0..0,
        })
    }
}

impl Read for LegacyLz4<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() && !self.stream.is_empty() {
            let length = u32_at(self.stream, 0)
                .ok_or_else(|| io::Error::other("it ends in a block's size"))?;
            let end = 4 + length as usize;
            let packed = self.stream.get(4..end);
            let packed = packed.ok_or_else(|| io::Error::other("it ends in a block"))?;
            self.stream = &self.stream[end..];
            self.block.resize(LZ4_BLOCK, 0);
            let filled = lz4_flex::block::decompress_into(packed, &mut self.block)
                .map_err(io::Error::other)?;
            self.rest = 0..filled;
        }
        let length = self.rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&self.block[self.rest.start..][..length]);
        self.rest.start += length;
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// Bytes that compress, but not to nothing.
    fn sample(length: usize) -> Vec<u8> {
        (0..length)
            .map(|index| ((index * index) >> 7) as u8)
            .collect()
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn bzip2(data: &[u8]) -> Vec<u8> {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        encoder.write_all(data).unwrap();
        with_size(encoder.finish().unwrap(), data.len())
    }

    fn lz4(data: &[u8]) -> Vec<u8> {
        let mut stream = 0x184c_2102u32.to_le_bytes().to_vec();
        for block in data.chunks(LZ4_BLOCK) {
            let packed = lz4_flex::block::compress(block);
            stream.extend_from_slice(&(packed.len() as u32).to_le_bytes());
            stream.extend_from_slice(&packed);
        }
        with_size(stream, data.len())
    }

    fn xz(data: &[u8]) -> Vec<u8> {
        let mut options = lzma_rust2::XzOptions::with_preset(1);
        options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
        let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        writer.write_all(data).unwrap();
        with_size(writer.finish().unwrap(), data.len())
    }

    fn lzma(data: &[u8]) -> Vec<u8> {
        let options = lzma_rust2::LzmaOptions::with_preset(1);
        let mut writer =
            lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
        writer.write_all(data).unwrap();
        with_size(writer.finish().unwrap(), data.len())
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        let level = ruzstd::encoding::CompressionLevel::Fastest;
        with_size(ruzstd::encoding::compress_to_vec(data, level), data.len())
    }

    fn with_size(mut stream: Vec<u8>, size: usize) -> Vec<u8> {
        stream.extend_from_slice(&(size as u32).to_le_bytes());
        stream
    }

    fn all_formats(data: &[u8]) -> Vec<(Compression, Vec<u8>)> {
        vec![
            (Compression::Gzip, gzip(data)),
            (Compression::Bzip2, bzip2(data)),
            (Compression::Lz4, lz4(data)),
            (Compression::Xz, xz(data)),
            (Compression::Lzma, lzma(data)),
            (Compression::Zstd, zstd(data)),
        ]
    }

    fn unpack(payload: &[u8], limit: u64) -> Result<Vec<u8>, BootError> {
        let packed = Packed::new(payload, limit)?.expect("a format that the host unpacks");
        let mut unpacked = Vec::new();
        packed.unpack(|offset, piece| {
            assert_eq!(offset, unpacked.len() as u64);
            unpacked.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(unpacked)
    }

    #[test]
    fn every_format_is_known_by_its_magic_and_unpacks() {
        // More than a piece, and not a multiple of it.
        let data = sample(2 * PIECE as usize + 300_000);
        for (format, payload) in all_formats(&data) {
            assert_eq!(Compression::detect(&payload), Some(format));
            let unpacked = unpack(&payload, 1 << 20).unwrap();
            assert!(unpacked == data, "{format}");
        }
    }

    #[test]
    fn head_is_had_without_the_rest() {
        let data = sample(300_000);
        for (format, mut payload) in all_formats(&data) {
            let start = payload.len() - 200;
            payload[start..][..100].fill(0xa5);
            let mut packed = Packed::new(&payload, 1 << 20).unwrap().unwrap();
            // What bzip2, LZ4 and xz check as a whole is all that they give.
            if matches!(format, Compression::Gzip | Compression::Lzma) {
                assert!(packed.head(5000).unwrap() == &data[..5000], "{format}");
            }
            assert!(unpack(&payload, 1 << 20).is_err(), "{format}");
        }
        let payload = gzip(&data);
        let mut packed = Packed::new(&payload, 1 << 20).unwrap().unwrap();
        assert!(packed.head(100).unwrap() == &data[..100]);
        assert!(packed.head(u64::MAX).unwrap() == data);
        let mut length = 0;
        let unpacked = packed.unpack(|_, piece| {
            length += piece.len();
            Ok(())
        });
        unpacked.unwrap();
        assert_eq!(length, data.len());
    }

    #[test]
    fn lz4_spans_blocks() {
        let data = sample(LZ4_BLOCK + 12345);
        assert!(unpack(&lz4(&data), 1 << 30).unwrap() == data);
    }

    #[test]
    fn size_field_that_lies_is_an_error() {
        let data = sample(10_000);
        for (format, payload) in all_formats(&data) {
            for size in [0u32, 9_999, 10_001, 1 << 19] {
                let mut payload = payload.clone();
                let end = payload.len() - 4;
                payload[end..].copy_from_slice(&size.to_le_bytes());
                let result = unpack(&payload, 1 << 20);
                assert!(
                    matches!(result, Err(BootError::Payload { .. })),
                    "{format} {size}"
                );
            }
        }
    }

    #[test]
    fn kernel_larger_than_guest_memory_is_refused_before_unpacking() {
        for (_, payload) in all_formats(&sample(10_000)) {
            let result = Packed::new(&payload, 9_999);
            assert!(matches!(result, Err(BootError::PayloadTooLarge { .. })));
        }
    }

    #[test]
    fn truncated_payload_is_an_error() {
        for (format, payload) in all_formats(&sample(2_000)) {
            // Shorter than its magic number it has no format.
            for length in 8..payload.len() - 4 {
                let cut = with_size(payload[..length].to_vec(), 2_000);
                assert!(unpack(&cut, 1 << 20).is_err(), "{format} {length}");
            }
        }
    }

    #[test]
    fn lzo_is_left_to_the_guest() {
        let payload = b"\x89LZO\0\r\n\x1a\n1234\x10\0\0\0";
        assert!(Packed::new(payload, 1 << 20).unwrap().is_none());
    }
}
