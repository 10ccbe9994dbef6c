//! Unpacking what a bzImage carries, on the host.

use std::fmt;
use std::io::Read;

use crate::error::BootError;
use crate::le::u32_at;

/// The largest dictionary or window that a decompressor may ask for. Kernels are packed with up to
/// 128 MiB (`zstd --ultra -22`).
const MAX_WINDOW: u64 = 160 << 20;

/// Uncompressed bytes in a full block of the legacy LZ4 frame (LZ4 frame format, "Legacy frame").
const LZ4_BLOCK: usize = 8 << 20;

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

/// Unpacks a bzImage's payload of at most `limit` bytes unpacked. `None` if the host has no
/// decompressor for `format`.
///
/// The payload ends with its unpacked size in 32 bits (Documentation/arch/x86/boot.rst,
/// `payload_length`); for gzip that is part of the format, for the others it was appended.
pub(crate) fn unpack(
    format: Compression,
    payload: &[u8],
    limit: u64,
) -> Result<Option<Vec<u8>>, BootError> {
    if format == Compression::Lzo {
        return Ok(None);
    }
    let failed = |reason: String| BootError::Payload { format, reason };
    let Some(split) = payload.len().checked_sub(4) else {
        return Err(failed("it is shorter than its size field".into()));
    };
    let (stream, size) = payload.split_at(split);
    let size = u64::from(u32_at(size, 0).unwrap_or(0));
    if size > limit {
        return Err(BootError::PayloadTooLarge { size, limit });
    }
    let unpacked = match format {
        Compression::Gzip => collect(flate2::read::GzDecoder::new(payload), size),
        Compression::Bzip2 => collect(bzip2::read::BzDecoder::new(stream), size),
        Compression::Xz => collect(
            lzma_rust2::XzReader::new_mem_limit(stream, false, (MAX_WINDOW >> 10) as u32),
            size,
        ),
        Compression::Lzma => {
            let limit_kb = (MAX_WINDOW >> 10) as u32;
            lzma_rust2::LzmaReader::new_mem_limit(stream, limit_kb, None)
                .map_err(|error| error.to_string())
                .and_then(|reader| collect(reader, size))
        }
        Compression::Zstd => {
            ruzstd::decoding::StreamingDecoder::new_with_max_window_size(stream, MAX_WINDOW)
                .map_err(|error| error.to_string())
                .and_then(|reader| collect(reader, size))
        }
        Compression::Lz4 => unpack_lz4(stream, size as usize),
        Compression::Lzo => Err("LZO is left to the kernel".into()),
    }
    .map_err(failed)?;
    if unpacked.len() as u64 != size {
        let found = unpacked.len();
        return Err(failed(format!(
            "it gives {found} bytes instead of {size}, or more"
        )));
    }
    Ok(Some(unpacked))
}

/// Reads at most one byte more than `size`.
fn collect(reader: impl Read, size: u64) -> Result<Vec<u8>, String> {
    // A size that lies reserves address space, not memory, and at most what guest RAM has.
    let mut unpacked = Vec::with_capacity(size as usize);
    reader
        .take(size.saturating_add(1))
        .read_to_end(&mut unpacked)
        .map_err(|error| error.to_string())?;
    Ok(unpacked)
}

/// The legacy LZ4 frame: after the magic number, blocks with their compressed size in front; each
/// but the last holds [`LZ4_BLOCK`] bytes.
fn unpack_lz4(mut stream: &[u8], size: usize) -> Result<Vec<u8>, String> {
    const LEGACY_MAGIC: u32 = 0x184c_2102;
    if u32_at(stream, 0) != Some(LEGACY_MAGIC) {
        return Err("it is not the legacy LZ4 frame that kernels use".into());
    }
    stream = &stream[4..];
    let mut unpacked = vec![0; size];
    let mut filled = 0;
    while !stream.is_empty() {
        let length = u32_at(stream, 0).ok_or("it ends in a block's size")? as usize;
        let block = stream
            .get(4..)
            .and_then(|tail| tail.get(..length))
            .ok_or("it ends in a block")?;
        stream = &stream[4 + length..];
        let room = &mut unpacked[filled..];
        let room = room.len().min(LZ4_BLOCK);
        let target = &mut unpacked[filled..filled + room];
        filled += lz4_flex::block::decompress_into(block, target).map_err(|e| e.to_string())?;
    }
    unpacked.truncate(filled);
    Ok(unpacked)
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

    #[test]
    fn every_format_is_known_by_its_magic_and_unpacks() {
        let data = sample(300_000);
        for (format, payload) in all_formats(&data) {
            assert_eq!(Compression::detect(&payload), Some(format));
            let unpacked = unpack(format, &payload, 1 << 20).unwrap();
            assert!(unpacked.as_deref() == Some(&data[..]), "{format}");
        }
    }

    #[test]
    fn lz4_spans_blocks() {
        let data = sample(LZ4_BLOCK + 12345);
        let unpacked = unpack(Compression::Lz4, &lz4(&data), 1 << 30).unwrap();
        assert!(unpacked.as_deref() == Some(&data[..]));
    }

    #[test]
    fn size_field_that_lies_is_an_error() {
        let data = sample(10_000);
        for (format, payload) in all_formats(&data) {
            for size in [0u32, 9_999, 10_001, 1 << 19] {
                let mut payload = payload.clone();
                let end = payload.len() - 4;
                payload[end..].copy_from_slice(&size.to_le_bytes());
                let result = unpack(format, &payload, 1 << 20);
                assert!(
                    matches!(result, Err(BootError::Payload { .. })),
                    "{format} {size}"
                );
            }
        }
    }

    #[test]
    fn kernel_larger_than_guest_memory_is_refused_before_unpacking() {
        for (format, payload) in all_formats(&sample(10_000)) {
            let result = unpack(format, &payload, 9_999);
            assert!(matches!(result, Err(BootError::PayloadTooLarge { .. })));
        }
    }

    #[test]
    fn truncated_payload_is_an_error() {
        for (format, payload) in all_formats(&sample(2_000)) {
            for length in 0..payload.len() - 4 {
                let cut = with_size(payload[..length].to_vec(), 2_000);
                assert!(unpack(format, &cut, 1 << 20).is_err(), "{format} {length}");
            }
        }
    }

    #[test]
    fn lzo_is_left_to_the_guest() {
        let payload = b"\x89LZO\0\r\n\x1a\n1234\x10\0\0\0";
        let unpacked = unpack(Compression::Lzo, payload, 1 << 20).unwrap();
        assert_eq!(unpacked, None);
    }
}
