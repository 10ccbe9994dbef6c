//! What a file is, from its first bytes.

use crate::error::BootError;
use crate::le::{u16_at, u32_at};
use crate::payload::Compression;

/// What a file that was given as a kernel turns out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A Linux/x86 boot image.
    BzImage,
    /// An ELF file for this architecture.
    Elf,
    /// A flat binary with a multiboot header.
    Multiboot,
    /// A kernel for another architecture, by name.
    Foreign(String),
    /// A file compressed as a whole.
    Compressed(Compression),
    /// Something that is not a kernel, as words that follow "is".
    Other(&'static str),
    /// No bytes.
    Empty,
}

/// Formats that people take for a kernel: offset, magic, and what it is.
const NOT_KERNELS: &[(usize, &[u8], &str)] = &[
    (0, b"070701", "an initramfs (a cpio archive)"),
    (0, b"070702", "an initramfs (a cpio archive)"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"KDMV", "a VMDK disk image"),
    (0, b"vhdxfile", "a VHDX disk image"),
    (0, b"!<arch>\n", "a Debian package or an object archive"),
    (0, b"\xed\xab\xee\xdb", "an RPM package"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"#!", "a script"),
    (
        0,
        b"\xd6\x50\x52\xe8",
        "a multiboot 2 kernel without an ELF header",
    ),
    (257, b"ustar", "a tar archive"),
    (0x8001, b"CD001", "an ISO 9660 disc image"),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (510, b"\x55\xaa", "a disk image with a boot sector"),
];

/// Names of `e_machine` in ELF headers (System V gABI, chapter 4).
pub(crate) fn elf_machine(machine: u16) -> String {
    let name = match machine {
        2 | 43 => "SPARC",
        4 => "68000",
        8 => "MIPS",
        20 => "32-bit PowerPC",
        21 => "64-bit PowerPC",
        22 => "IBM Z (s390)",
        40 => "32-bit ARM",
        42 => "SuperH",
        50 => "Itanium",
        183 => "64-bit ARM (aarch64)",
        243 => "RISC-V",
        247 => "BPF",
        258 => "LoongArch",
        _ => return format!("a machine with ELF number {machine}"),
    };
    name.into()
}

/// Names of the machine field in PE headers (Microsoft PE format, "Machine Types").
fn pe_machine(machine: u16) -> Option<String> {
    let name = match machine {
        0x8664 | 0x14c => return None,
        0xaa64 => "64-bit ARM (aarch64)",
        0x1c0 | 0x1c2 | 0x1c4 => "32-bit ARM",
        0x5032 => "32-bit RISC-V",
        0x5064 => "64-bit RISC-V",
        0x6232 | 0x6264 => "LoongArch",
        0x200 => "Itanium",
        _ => return Some(format!("a machine with PE number {machine:#x}")),
    };
    Some(name.into())
}

/// What `file` is. Looks at headers only: a truncated kernel is still a kernel.
pub fn detect(file: &[u8]) -> Kind {
    if file.is_empty() {
        return Kind::Empty;
    }
    if file.get(0x202..0x206) == Some(b"HdrS") && u16_at(file, 0x1fe) == Some(0xaa55) {
        return Kind::BzImage;
    }
    if file.starts_with(b"\x7fELF") {
        return detect_elf(file);
    }
    // Documentation/arch/arm64/booting.rst and riscv/boot-image-header.rst; these may carry an MZ
    // header too, so they come first.
    if file.get(0x38..0x3c) == Some(b"ARM\x64") {
        return Kind::Foreign("64-bit ARM (aarch64)".into());
    }
    if file.get(0x30..0x35) == Some(b"RISCV") {
        return Kind::Foreign("RISC-V".into());
    }
    if u32_at(file, 0x24) == Some(0x016f_2818) {
        return Kind::Foreign("32-bit ARM".into());
    }
    if file.starts_with(&[0x27, 0x05, 0x19, 0x56]) {
        return Kind::Other("a U-Boot image");
    }
    if file.starts_with(b"MZ") {
        return detect_pe(file);
    }
    if let Some(format) = Compression::detect(file) {
        return Kind::Compressed(format);
    }
    if crate::multiboot::find_header(file).is_some() {
        return Kind::Multiboot;
    }
    let known = NOT_KERNELS.iter().find(|(offset, magic, _)| {
        file.get(*offset..)
            .is_some_and(|tail| tail.starts_with(magic))
    });
    match known {
        Some((_, _, what)) => Kind::Other(what),
        None if file.iter().all(|byte| *byte == 0) => Kind::Other("nothing but zero bytes"),
        None if is_text(file) => Kind::Other("a text file"),
        None => Kind::Other("in a format that trapgate does not know"),
    }
}

fn is_text(file: &[u8]) -> bool {
    let start = &file[..file.len().min(512)];
    start
        .iter()
        .all(|byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace())
}

fn detect_elf(file: &[u8]) -> Kind {
    let big_endian = file.get(5) == Some(&2);
    match u16_at(file, 0x12) {
        Some(machine) if big_endian => Kind::Foreign(elf_machine(machine.swap_bytes())),
        // EM_386 and EM_X86_64. A file too short to tell is found out when it is parsed.
        Some(3 | 62) | None => Kind::Elf,
        Some(machine) => Kind::Foreign(elf_machine(machine)),
    }
}

fn detect_pe(file: &[u8]) -> Kind {
    let header = u32_at(file, 0x3c).unwrap_or(0) as usize;
    let has_signature = file
        .get(header..)
        .is_some_and(|tail| tail.starts_with(b"PE\0\0"));
    let machine = has_signature
        .then(|| u16_at(file, header.checked_add(4)?))
        .flatten();
    match machine.map(pe_machine) {
        Some(Some(foreign)) => Kind::Foreign(foreign),
        Some(None) => Kind::Other("an EFI or Windows program without a Linux boot header"),
        None => Kind::Other("a DOS program"),
    }
}

/// As [`detect`], with what cannot be booted as the error.
pub(crate) fn bootable(file: &[u8]) -> Result<Kind, BootError> {
    match detect(file) {
        kind @ (Kind::BzImage | Kind::Elf | Kind::Multiboot) => Ok(kind),
        Kind::Foreign(found) => Err(BootError::Architecture { found }),
        Kind::Compressed(format) => Err(BootError::CompressedFile { format }),
        Kind::Other(found) => Err(BootError::NotAKernel { found }),
        Kind::Empty => Err(BootError::Empty),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(offset: usize, magic: &[u8]) -> Vec<u8> {
        let mut file = vec![0x80; 0x9000];
        file[offset..offset + magic.len()].copy_from_slice(magic);
        file
    }

    #[test]
    fn files_that_are_not_kernels_are_named() {
        for (file, words) in [
            (with(0, b"070701"), "initramfs"),
            (with(0, b"QFI\xfb"), "qcow2"),
            (with(0x8001, b"CD001"), "ISO 9660"),
            (with(510, b"\x55\xaa"), "boot sector"),
            (b"hello\n".to_vec(), "text"),
            (vec![0; 4096], "zero bytes"),
            (with(0, b""), "does not know"),
        ] {
            let message = bootable(&file).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        }
    }

    #[test]
    fn kernels_for_other_machines_are_named() {
        let mut elf = with(0, b"\x7fELF\x02\x01\x01");
        elf[0x12..0x14].copy_from_slice(&183u16.to_le_bytes());
        let mut big_endian = with(0, b"\x7fELF\x02\x02\x01");
        big_endian[0x12..0x14].copy_from_slice(&22u16.to_be_bytes());
        let mut pe = with(0, b"MZ");
        pe[0x3c..0x40].copy_from_slice(&0x80u32.to_le_bytes());
        pe[0x80..0x86].copy_from_slice(b"PE\0\0\x64\xaa");
        for (file, words) in [
            (elf, "aarch64"),
            (big_endian, "s390"),
            (pe, "aarch64"),
            (with(0x38, b"ARM\x64"), "aarch64"),
            (with(0x30, b"RISCV\0\0\0"), "RISC-V"),
            (with(0x24, &[0x18, 0x28, 0x6f, 0x01]), "32-bit ARM"),
        ] {
            let error = bootable(&file).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
            assert!(matches!(error, BootError::Architecture { .. }));
        }
    }

    #[test]
    fn compressed_file_comes_with_the_command_that_unpacks_it() {
        let error = bootable(&with(0, &[0x1f, 0x8b, 8])).unwrap_err();
        assert!(error.to_string().contains("gzip"));
        assert!(error.fix().contains("gunzip"));
    }

    #[test]
    fn empty_file_is_empty() {
        assert!(matches!(bootable(&[]), Err(BootError::Empty)));
    }
}
