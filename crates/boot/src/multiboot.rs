//! Multiboot 0.6.96.

use std::ops::Range;

use trapgate_x86::registers::gpr;

use crate::elf::Elf;
use crate::entry::Mode;
use crate::error::BootError;
use crate::layout::PAGE;
use crate::le::u32_at;
use crate::memory_map::{BIOS_END, LOW_END, MapKind};
use crate::plan::{Builder, Entry, Protocol, Request};

/// What the header starts with (section 3.1.1).
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// What EAX holds at entry (section 3.2).
const LOADER_MAGIC: u32 = 0x2bad_b002;
/// The header lies in the first 8 KiB of the file (section 3.1).
const SEARCH_LIMIT: usize = 8192;
/// Header flag: addresses follow, for files that are not ELF.
const HAS_ADDRESSES: u32 = 1 << 16;
/// Header flags that the kernel needs honoured.
const REQUIRED: u32 = 0xffff;
/// Those that are: modules on page boundaries, memory information, and video mode, of which the
/// information structure says that there is none.
const KNOWN: u32 = 0b111;
/// Bytes in the information structure as far as we fill it in (section 3.3).
const INFO_BYTES: usize = 116;
/// What we call ourselves.
const LOADER_NAME: &str = "trapgate";

/// Offset of the multiboot header, if the file has one whose checksum is right.
pub(crate) fn find_header(file: &[u8]) -> Option<usize> {
    let end = file.len().min(SEARCH_LIMIT);
    (0..end).step_by(4).find(|&at| {
        let words = [at, at + 4, at + 8].map(|at| u32_at(&file[..end], at));
        let [Some(HEADER_MAGIC), Some(flags), Some(checksum)] = words else {
            return false;
        };
        HEADER_MAGIC.wrapping_add(flags).wrapping_add(checksum) == 0
    })
}

/// Where the parts of a file without ELF headers go.
#[derive(Debug, PartialEq, Eq)]
struct Flat {
    /// Which part of the file is loaded.
    file: Range<usize>,
    /// To which guest-physical address.
    load: u64,
    /// Bytes that it takes with its zeroed end.
    memory_size: u64,
    entry: u64,
}

impl Flat {
    /// From the addresses in the header at `at` (section 3.1.3).
    fn parse(file: &[u8], at: usize) -> Result<Self, BootError> {
        let has = file.len() as u64;
        let mut addresses = [0u64; 5];
        for (index, address) in addresses.iter_mut().enumerate() {
            let field = u32_at(file, at + 12 + index * 4).ok_or(BootError::Truncated {
                what: "multiboot header",
                needs: at as u64 + 32,
                has,
            })?;
            *address = u64::from(field);
        }
        let [header, load, load_end, bss_end, entry] = addresses;
        let malformed = |what, value| BootError::Malformed { what, value };
        let before_header = header
            .checked_sub(load)
            .ok_or(malformed("its multiboot header address", header))?;
        let start = (at as u64)
            .checked_sub(before_header)
            .ok_or(malformed("its multiboot load address", load))?;
        let length = match load_end {
            0 => has - start,
            end => end
                .checked_sub(load)
                .ok_or(malformed("its multiboot load end address", end))?,
        };
        if start + length > has {
            return Err(BootError::Truncated {
                what: "multiboot image",
                needs: start + length,
                has,
            });
        }
        Ok(Self {
            file: start as usize..(start + length) as usize,
            load,
            memory_size: bss_end.saturating_sub(load).max(length),
            entry,
        })
    }
}

/// Plans a multiboot kernel; `elf` if the file is an ELF executable. Initial RAM disks come first
/// among the modules.
pub(crate) fn plan<'a>(
    builder: &mut Builder<'a>,
    request: &Request<'a>,
    elf: Option<&Elf>,
) -> Result<Entry, BootError> {
    let file = request.kernel;
    let at = find_header(file).ok_or(BootError::NoEntry)?;
    let flags = u32_at(file, at + 4).unwrap_or(0);
    let unknown = flags & REQUIRED & !KNOWN;
    if unknown != 0 {
        return Err(BootError::MultibootFlags { flags: unknown });
    }
    let (entry, end) = match elf {
        Some(elf) if flags & HAS_ADDRESSES == 0 => {
            builder.write_segments(elf, file)?;
            (elf.physical_entry(), elf.end())
        }
        None if flags & HAS_ADDRESSES == 0 => return Err(BootError::NoEntry),
        _ => {
            let flat = Flat::parse(file, at)?;
            builder
                .layout
                .claim("the kernel", flat.load, flat.memory_size)?;
            builder.write(flat.load, &file[flat.file]);
            (flat.entry, flat.load + flat.memory_size)
        }
    };
    if entry > u64::from(u32::MAX) {
        return Err(BootError::Malformed {
            what: "its entry point, which 32-bit mode cannot reach,",
            value: entry,
        });
    }

    let modules = request.initrds.iter().map(|initrd| (*initrd, "")).chain(
        request
            .modules
            .iter()
            .map(|module| (module.data, module.command_line)),
    );
    let mut list = Vec::new();
    let mut count = 0;
    for (data, command_line) in modules {
        // Directly above the kernel, where kernels with small page tables can see them.
        let length = data.len() as u64;
        let start = builder
            .layout
            .lowest(length, PAGE, end.max(BIOS_END))
            .filter(|start| start + length < 1 << 32)
            .ok_or_else(|| builder.layout.too_little("a module", end))?;
        builder.write(start, data);
        let text = builder.write_text("command lines", command_line)?;
        for value in [start, start + length, text, 0] {
            list.extend((value as u32).to_le_bytes());
        }
        count += 1;
    }

    let mut map = Vec::new();
    for range in &builder.map {
        // The size field does not count itself (section 3.3, "mmap_length").
        map.extend(20u32.to_le_bytes());
        map.extend(range.start.to_le_bytes());
        map.extend(range.length.to_le_bytes());
        map.extend((range.kind as u32).to_le_bytes());
    }
    let map_length = map.len() as u32;
    let upper = builder
        .map
        .iter()
        .find(|range| range.start == BIOS_END && range.kind == MapKind::Ram)
        .map_or(0, |range| range.length);
    let command_line = builder.write_text("the command line", request.command_line)?;
    let name = builder.write_text("the boot loader's name", LOADER_NAME)?;
    let list = builder.write_low("the module list", list, 4)?;
    let map = builder.write_low("the memory map", map, 4)?;

    let mut info = vec![0; INFO_BYTES];
    let mut put = |offset: usize, value: u32| {
        info[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    };
    // Memory, command line, modules, memory map, boot loader name.
    put(0, 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9);
    put(4, (LOW_END >> 10) as u32);
    put(8, (upper >> 10) as u32);
    put(16, command_line as u32);
    put(20, count);
    put(24, list as u32);
    put(44, map_length);
    put(48, map as u32);
    put(64, name as u32);
    let info = builder.write_low("the multiboot information", info, 8)?;

    let mut cpu = builder.enter(Mode::Protected, entry)?;
    cpu.gpr[gpr::RAX] = u64::from(LOADER_MAGIC);
    cpu.gpr[gpr::RBX] = info;
    Ok(Entry {
        cpu,
        protocol: Protocol::Multiboot,
        version: None,
    })
}
