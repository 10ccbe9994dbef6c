//! The Linux/x86 boot image (Documentation/arch/x86/boot.rst).

use crate::error::BootError;
use crate::le::{text_at, u16_at, u32_at, u64_at};
use crate::payload::{Compression, Packed};

/// Offsets of header fields, in the file and in the zero page alike.
pub(crate) mod field {
    pub(crate) const SETUP_SECTS: usize = 0x1f1;
    pub(crate) const SYSSIZE: usize = 0x1f4;
    pub(crate) const VID_MODE: usize = 0x1fa;
    pub(crate) const BOOT_FLAG: usize = 0x1fe;
    pub(crate) const JUMP_LENGTH: usize = 0x201;
    pub(crate) const HEADER: usize = 0x202;
    pub(crate) const VERSION: usize = 0x206;
    pub(crate) const KERNEL_VERSION: usize = 0x20e;
    pub(crate) const TYPE_OF_LOADER: usize = 0x210;
    pub(crate) const LOADFLAGS: usize = 0x211;
    pub(crate) const CODE32_START: usize = 0x214;
    pub(crate) const RAMDISK_IMAGE: usize = 0x218;
    pub(crate) const RAMDISK_SIZE: usize = 0x21c;
    pub(crate) const CMD_LINE_PTR: usize = 0x228;
    pub(crate) const INITRD_ADDR_MAX: usize = 0x22c;
    pub(crate) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(crate) const RELOCATABLE_KERNEL: usize = 0x234;
    pub(crate) const XLOADFLAGS: usize = 0x236;
    pub(crate) const CMDLINE_SIZE: usize = 0x238;
    pub(crate) const PAYLOAD_OFFSET: usize = 0x248;
    pub(crate) const PAYLOAD_LENGTH: usize = 0x24c;
    pub(crate) const SETUP_DATA: usize = 0x250;
    pub(crate) const PREF_ADDRESS: usize = 0x258;
    pub(crate) const INIT_SIZE: usize = 0x260;
}

/// `xloadflags`: the kernel has the 64-bit entry point at 0x200.
pub(crate) const XLF_KERNEL_64: u16 = 1 << 0;
/// Where the zero page's copy of the header has to end.
const HEADER_LIMIT: usize = 0x290;
/// Where protected-mode code lies in kernels that name no other place.
const DEFAULT_LOAD_ADDRESS: u64 = 0x10_0000;

/// A parsed boot image; it borrows the file.
#[derive(Clone, Debug)]
pub struct BzImage<'a> {
    file: &'a [u8],
    /// Offset of the protected-mode code in the file.
    code_offset: usize,
}

/// What a boot image is there for: by custom an ELF executable.
#[derive(Debug)]
pub(crate) enum KernelProper<'a> {
    /// As it is.
    Plain(&'a [u8]),
    /// To be unpacked.
    Packed(Packed<'a>),
}

impl<'a> BzImage<'a> {
    /// Parses a file that begins as a boot image does ([`crate::detect()`]).
    pub fn parse(file: &'a [u8]) -> Result<Self, BootError> {
        let has = file.len() as u64;
        let truncated = |what, needs| BootError::Truncated { what, needs, has };
        if file.len() < HEADER_LIMIT {
            return Err(truncated("boot header", HEADER_LIMIT as u64));
        }
        // Zero stands for four, for the sake of boot loaders from before the field existed.
        let sectors = match file[field::SETUP_SECTS] {
            0 => 4,
            sectors => usize::from(sectors),
        };
        let image = Self {
            file,
            code_offset: (sectors + 1) * 512,
        };
        let version = image.protocol();
        if version < 0x206 {
            return Err(BootError::OldProtocol { version });
        }
        let code_bytes = u64::from(image.u32(field::SYSSIZE)) * 16;
        if code_bytes == 0 {
            return Err(BootError::Malformed {
                what: "the size of its protected-mode code",
                value: 0,
            });
        }
        // The size counts paragraphs of 16 bytes, the last of which need not be full.
        let needs = image.code_offset as u64 + code_bytes;
        if has + 15 < needs {
            return Err(truncated("protected-mode code", needs));
        }
        let payload_end = image.code_offset as u64
            + u64::from(image.u32(field::PAYLOAD_OFFSET))
            + u64::from(image.u32(field::PAYLOAD_LENGTH));
        if has < payload_end {
            return Err(truncated("compressed payload", payload_end));
        }
        Ok(image)
    }

    fn u16(&self, offset: usize) -> u16 {
        u16_at(self.file, offset).unwrap_or(0)
    }

    fn u32(&self, offset: usize) -> u32 {
        u32_at(self.file, offset).unwrap_or(0)
    }

    /// The boot protocol's version, major in the upper byte.
    pub fn protocol(&self) -> u16 {
        self.u16(field::VERSION)
    }

    /// What the kernel calls itself: release, who built it, build number and date.
    pub fn version(&self) -> Option<String> {
        let offset = usize::from(self.u16(field::KERNEL_VERSION));
        let setup = self.file.get(..self.code_offset)?;
        (offset != 0)
            .then(|| text_at(setup, offset + 0x200))
            .flatten()
    }

    /// How the kernel inside is packed; `None` if it is not, or in no known way.
    pub fn compression(&self) -> Option<Compression> {
        Compression::detect(self.payload())
    }

    /// The kernel inside, packed.
    fn payload(&self) -> &'a [u8] {
        let start = self.code_offset + self.u32(field::PAYLOAD_OFFSET) as usize;
        let end = start + self.u32(field::PAYLOAD_LENGTH) as usize;
        // Protocols before 2.08 have no such fields, and zeros in their place.
        if self.protocol() < 0x208 {
            return &[];
        }
        self.file.get(start..end).unwrap_or(&[])
    }

    /// The kernel inside, if it can be had without the kernel's own decompressor and says that it
    /// is at most `limit` bytes long (guest RAM is a good limit).
    pub(crate) fn kernel_proper(&self, limit: u64) -> Result<Option<KernelProper<'a>>, BootError> {
        let payload = self.payload();
        if payload.starts_with(b"\x7fELF") {
            return Ok(Some(KernelProper::Plain(payload)));
        }
        Ok(Packed::new(payload, limit)?.map(KernelProper::Packed))
    }

    /// The protected-mode code: the decompressor with its payload.
    pub(crate) fn code(&self) -> &'a [u8] {
        let length = self.u32(field::SYSSIZE) as usize * 16;
        let code = self.file.get(self.code_offset..).unwrap_or(&[]);
        &code[..length.min(code.len())]
    }

    /// Where the protected-mode code is best loaded, and how many bytes from there the kernel uses
    /// before it has looked at the memory map.
    pub(crate) fn load_range(&self) -> (u64, u64) {
        let relocatable = self.file[field::RELOCATABLE_KERNEL] != 0;
        let preferred = u64_at(self.file, field::PREF_ADDRESS).unwrap_or(0);
        let code = self.code().len() as u64;
        if self.protocol() < 0x20a {
            // No `init_size` yet: these kernels unpack to a few times their size.
            return (DEFAULT_LOAD_ADDRESS, code.saturating_mul(6));
        }
        let start = if relocatable && preferred != 0 {
            preferred
        } else {
            DEFAULT_LOAD_ADDRESS
        };
        (start, u64::from(self.u32(field::INIT_SIZE)).max(code))
    }

    /// Whether the kernel is a 64-bit one with an entry point for 64-bit loaders.
    pub fn has_64_bit_entry(&self) -> bool {
        self.protocol() >= 0x20c && self.u16(field::XLOADFLAGS) & XLF_KERNEL_64 != 0
    }

    /// The header as it goes into the zero page: bytes from offset 0x1f1.
    pub(crate) fn header(&self) -> &'a [u8] {
        // The jump instruction's operand says where the header ends (boot.rst, "details of
        // header fields", after the table for the 32-bit protocol).
        let end = field::HEADER + usize::from(self.file[field::JUMP_LENGTH]);
        &self.file[field::SETUP_SECTS..end.min(HEADER_LIMIT)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples::{gzip, image};

    #[test]
    fn header_fields_are_read() {
        let file = image(&gzip(b"\x7fELF and so on"));
        let parsed = BzImage::parse(&file).unwrap();
        assert_eq!(parsed.protocol(), 0x20f);
        assert_eq!(parsed.version().as_deref(), Some("6.6.6-test (someone) #1"));
        assert_eq!(parsed.compression(), Some(Compression::Gzip));
        assert!(parsed.has_64_bit_entry());
        assert_eq!(parsed.load_range(), (0x100_0000, 0x40_0000));
        assert_eq!(parsed.header().len(), 0x6a + 0x202 - 0x1f1);
        let Ok(Some(KernelProper::Packed(mut packed))) = parsed.kernel_proper(1 << 20) else {
            panic!("not packed");
        };
        assert_eq!(packed.head(4096).unwrap(), b"\x7fELF and so on");
    }

    #[test]
    fn payload_that_is_not_packed_is_borrowed() {
        let file = image(b"\x7fELF, plain");
        let parsed = BzImage::parse(&file).unwrap();
        let kernel = parsed.kernel_proper(0).unwrap().unwrap();
        assert!(matches!(kernel, KernelProper::Plain(b"\x7fELF, plain")));
    }

    #[test]
    fn truncation_is_told_from_damage() {
        let file = image(&gzip(b"kernel"));
        for length in 0..file.len() - 15 {
            let error = BzImage::parse(&file[..length]).unwrap_err();
            assert!(matches!(error, BootError::Truncated { .. }), "{error}");
        }
    }

    #[test]
    fn kernel_from_before_the_protocol_is_refused_with_its_version() {
        let mut file = image(&[]);
        file[field::VERSION..][..2].copy_from_slice(&0x204u16.to_le_bytes());
        let error = BzImage::parse(&file).unwrap_err();
        assert!(error.to_string().contains("2.04"), "{error}");
    }
}
