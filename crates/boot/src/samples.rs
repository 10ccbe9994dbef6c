//! Kernels small enough to be written by hand, for the tests and the fuzz target.

use std::io::Write;

use crate::bzimage::{XLF_KERNEL_64, field};

/// A 64-bit boot image of protocol 2.15 that carries `payload`.
pub fn image(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 2 * 512];
    let code_bytes = (0x300 + payload.len()).next_multiple_of(16);
    file[field::SETUP_SECTS] = 1;
    let mut put = |offset: usize, bytes: &[u8]| {
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(field::SYSSIZE, &((code_bytes / 16) as u32).to_le_bytes());
    put(field::BOOT_FLAG, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(field::HEADER, b"HdrS");
    put(field::VERSION, &0x20fu16.to_le_bytes());
    put(field::KERNEL_VERSION, &0x100u16.to_le_bytes());
    put(0x300, b"6.6.6-test (someone) #1\0");
    put(field::LOADFLAGS, &[1]);
    put(field::INITRD_ADDR_MAX, &0x7fff_ffffu32.to_le_bytes());
    put(field::KERNEL_ALIGNMENT, &0x20_0000u32.to_le_bytes());
    put(field::RELOCATABLE_KERNEL, &[1]);
    put(field::XLOADFLAGS, &XLF_KERNEL_64.to_le_bytes());
    put(field::CMDLINE_SIZE, &2047u32.to_le_bytes());
    put(field::PAYLOAD_OFFSET, &0x300u32.to_le_bytes());
    put(field::PAYLOAD_LENGTH, &(payload.len() as u32).to_le_bytes());
    put(field::PREF_ADDRESS, &0x100_0000u64.to_le_bytes());
    put(field::INIT_SIZE, &0x40_0000u32.to_le_bytes());
    file.resize(2 * 512 + code_bytes, 0x90);
    file[2 * 512 + 0x300..][..payload.len()].copy_from_slice(payload);
    file
}

pub fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// Where [`elf64`] and [`elf32`] want to lie.
pub const ELF_START: u64 = 0x10_0000;
/// Bytes of each that come from the file.
pub const ELF_FILE_BYTES: usize = 0x2000;
/// Bytes that each takes in memory.
pub const ELF_MEMORY_BYTES: u64 = 0x5000;

/// A note as it lies in the file.
pub fn note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for value in [name.len() as u32 + 1, description.len() as u32, kind] {
        note.extend(value.to_le_bytes());
    }
    for part in [[name, b"\0"].concat(), description.to_vec()] {
        note.extend(&part);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// The note of a PVH kernel.
pub fn pvh_note(entry: u64) -> Vec<u8> {
    note(b"Xen", 18, &entry.to_le_bytes())
}

/// A 64-bit executable with one segment, linked at -2 GiB as Linux is, and entered at its start. `content` lies at
/// the start of the segment's memory, `notes` in a segment of their own.
pub fn elf64(machine: u16, content: &[u8], notes: &[u8]) -> Vec<u8> {
    const CONTENT: usize = 0x1000;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0".to_vec();
    file.extend(machine.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for value in [ELF_START, 64, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for value in [64u16, 56, 2, 64, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    let notes_at = (CONTENT + ELF_FILE_BYTES - notes.len()) as u64;
    let notes_size = notes.len() as u64;
    let segments = [
        (
            1u32,
            CONTENT as u64,
            ELF_START,
            ELF_FILE_BYTES as u64,
            ELF_MEMORY_BYTES,
        ),
        (4, notes_at, 0, notes_size, notes_size),
    ];
    for (kind, offset, physical, file_bytes, memory_bytes) in segments {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        let linked = physical.wrapping_add(0xffff_ffff_8000_0000);
        for value in [offset, linked, physical, file_bytes, memory_bytes, 4] {
            file.extend(value.to_le_bytes());
        }
    }
    file.resize(CONTENT, 0);
    file.extend(content);
    file.resize(notes_at as usize, 0x90);
    file.extend(notes);
    file
}

/// A 32-bit executable with one segment, linked at 3 GiB and entered there.
pub fn elf32(content: &[u8]) -> Vec<u8> {
    const CONTENT: usize = 0x1000;
    let linked = 0xc000_0000 + ELF_START as u32;
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    for value in [1, linked + 0x10, 52, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    for value in [52u16, 32, 1, 40, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    let memory_bytes = ELF_MEMORY_BYTES as u32;
    let file_bytes = ELF_FILE_BYTES as u32;
    let start = ELF_START as u32;
    for value in [
        1,
        CONTENT as u32,
        linked,
        start,
        file_bytes,
        memory_bytes,
        7,
        4096,
    ] {
        file.extend(value.to_le_bytes());
    }
    file.resize(CONTENT, 0);
    file.extend(content);
    file.resize(CONTENT + ELF_FILE_BYTES, 0x90);
    file
}

/// A multiboot header with `flags`; `addresses` follow it.
pub fn multiboot_header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    [&[magic, flags, checksum], addresses]
        .concat()
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// What makes a kernel be taken for Linux, amid other things.
pub const BANNER: &[u8] =
    b"%s version %s\0Linux version %s\0Linux version 6.6.6-bare (someone) #1\n\0";
