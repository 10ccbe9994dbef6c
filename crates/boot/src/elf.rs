//! ELF executables: what lies where, and ways in.

use std::ops::Range;

use object::elf::{EM_386, EM_X86_64, ET_DYN, ET_EXEC, FileHeader32, FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, elf};

use crate::error::BootError;
use crate::le::u32_at;

/// The note that holds the 32-bit entry point of PVH guests
/// (xen/include/public/elfnote.h, XEN_ELFNOTE_PHYS32_ENTRY).
const XEN_PHYS32_ENTRY: u32 = 18;

/// A part of the file that goes into memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Guest-physical.
    pub(crate) physical: u64,
    /// Where the kernel was linked to run.
    pub(crate) virtual_address: u64,
    /// Which bytes of the file; it has them.
    pub(crate) file: Range<u64>,
    /// Bytes in memory, at least those of the file; the rest is zero.
    pub(crate) memory_size: u64,
}

impl Segment {
    /// Guest-physical address after the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.physical + self.memory_size
    }
}

/// A parsed x86 executable.
#[derive(Clone, Debug)]
pub(crate) struct Elf {
    /// Whether the file is for 64-bit mode.
    pub(crate) is_64_bit: bool,
    /// The entry point as the header has it: physical for Linux, virtual for some others.
    pub(crate) entry: u64,
    /// What to load; not empty.
    pub(crate) segments: Vec<Segment>,
    /// Guest-physical entry point of the PVH protocol.
    pub(crate) pvh_entry: Option<u32>,
}

impl Elf {
    /// Parses a file of `length` bytes that starts with the ELF magic. Of its bytes only `head` need
    /// be there, the first [`Self::head_bytes`]; notes that lie beyond are not seen.
    pub(crate) fn parse(head: &[u8], length: u64) -> Result<Self, BootError> {
        if is_64_bit(head)? {
            parse::<FileHeader64<LittleEndian>>(head, length, true)
        } else {
            parse::<FileHeader32<LittleEndian>>(head, length, false)
        }
    }

    /// Up to where a file has to be there to be parsed, by its first 64 bytes.
    pub(crate) fn head_bytes(head: &[u8]) -> Result<u64, BootError> {
        Ok(if is_64_bit(head)? {
            headers_end(header::<FileHeader64<LittleEndian>>(head)?)
        } else {
            headers_end(header::<FileHeader32<LittleEndian>>(head)?)
        })
    }

    /// Guest-physical address after the last byte of the last segment.
    pub(crate) fn end(&self) -> u64 {
        self.segments.iter().map(Segment::end).max().unwrap_or(0)
    }

    /// The entry point as a guest-physical address, whichever way the header has it.
    pub(crate) fn physical_entry(&self) -> u64 {
        let contains = |start: u64, segment: &Segment| {
            self.entry >= start && self.entry - start < segment.memory_size
        };
        if self
            .segments
            .iter()
            .any(|segment| contains(segment.physical, segment))
        {
            return self.entry;
        }
        self.segments
            .iter()
            .find(|segment| contains(segment.virtual_address, segment))
            .map_or(self.entry, |segment| {
                self.entry - segment.virtual_address + segment.physical
            })
    }
}

fn is_64_bit(file: &[u8]) -> Result<bool, BootError> {
    match file.get(4) {
        Some(1) => Ok(false),
        Some(2) => Ok(true),
        Some(class) => Err(BootError::Malformed {
            what: "its ELF class",
            value: u64::from(*class),
        }),
        None => Err(BootError::Truncated {
            what: "ELF header",
            needs: 64,
            has: file.len() as u64,
        }),
    }
}

fn header<H>(file: &[u8]) -> Result<&H, BootError>
where
    H: FileHeader<Endian = LittleEndian>,
{
    let has = file.len() as u64;
    let needs = size_of::<H>() as u64;
    H::parse(file).map_err(|_| {
        if has < needs {
            BootError::Truncated {
                what: "ELF header",
                needs,
                has,
            }
        } else {
            BootError::Malformed {
                what: "its ELF identification",
                value: u32_at(file, 4).unwrap_or(0).into(),
            }
        }
    })
}

/// Where the program header table ends.
fn headers_end<H>(header: &H) -> u64
where
    H: FileHeader<Endian = LittleEndian>,
{
    let endian = LittleEndian;
    let bytes = u64::from(header.e_phnum(endian)) * u64::from(header.e_phentsize(endian));
    header.e_phoff(endian).into().saturating_add(bytes)
}

fn parse<H>(head: &[u8], length: u64, is_64_bit: bool) -> Result<Elf, BootError>
where
    H: FileHeader<Endian = LittleEndian>,
{
    let endian = LittleEndian;
    let header = header::<H>(head)?;
    let machine = header.e_machine(endian);
    if machine != EM_X86_64 && machine != EM_386 {
        return Err(BootError::Architecture {
            found: crate::detect::elf_machine(machine),
        });
    }
    let kind = header.e_type(endian);
    if kind != ET_EXEC && kind != ET_DYN {
        return Err(BootError::Malformed {
            what: "its ELF type (an object or core file, not an executable)",
            value: u64::from(kind),
        });
    }
    let headers = header
        .program_headers(endian, head)
        .map_err(|_| BootError::Truncated {
            what: "program header table",
            needs: headers_end(header),
            has: length,
        })?;
    let mut segments = Vec::new();
    let mut pvh_entry = None;
    for program in headers {
        let kind = program.p_type(endian);
        if kind == PT_LOAD {
            segments.extend(load_segment(program, length)?);
        } else if kind == elf::PT_NOTE {
            pvh_entry = pvh_entry.or_else(|| find_pvh_entry(program, head));
        }
    }
    if segments.is_empty() {
        return Err(BootError::Malformed {
            what: "the number of its loadable segments",
            value: 0,
        });
    }
    Ok(Elf {
        is_64_bit,
        entry: header.e_entry(endian).into(),
        segments,
        pvh_entry,
    })
}

fn load_segment<P>(program: &P, length: u64) -> Result<Option<Segment>, BootError>
where
    P: ProgramHeader<Endian = LittleEndian>,
{
    let endian = LittleEndian;
    let file_size: u64 = program.p_filesz(endian).into();
    let memory_size = program.p_memsz(endian).into().max(file_size);
    let physical: u64 = program.p_paddr(endian).into();
    if memory_size == 0 {
        return Ok(None);
    }
    let start: u64 = program.p_offset(endian).into();
    let end = start.saturating_add(file_size);
    if end > length {
        return Err(BootError::Truncated {
            what: "loadable segment",
            needs: end,
            has: length,
        });
    }
    if physical.checked_add(memory_size).is_none() {
        return Err(BootError::Malformed {
            what: "the size of a loadable segment",
            value: memory_size,
        });
    }
    Ok(Some(Segment {
        physical,
        virtual_address: program.p_vaddr(endian).into(),
        file: start..end,
        memory_size,
    }))
}

/// Damaged notes are as good as none: the other ways in may still work.
fn find_pvh_entry<P>(program: &P, file: &[u8]) -> Option<u32>
where
    P: ProgramHeader<Endian = LittleEndian>,
{
    let mut notes = program.notes(LittleEndian, file).ok()??;
    while let Ok(Some(note)) = notes.next() {
        if note.name() == b"Xen" && note.n_type(LittleEndian) == XEN_PHYS32_ENTRY {
            return u32_at(note.desc(), 0);
        }
    }
    None
}

/// What Linux calls itself in its banner, "Linux version …", which also tells that it is Linux.
pub(crate) fn linux_version(vmlinux: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    memchr::memmem::find_iter(vmlinux, BANNER).find_map(|at| {
        let text = &vmlinux[at + BANNER.len()..];
        let text = &text[..text.len().min(512)];
        // The format string for /proc/version starts alike.
        if !text.first()?.is_ascii_digit() {
            return None;
        }
        let end = text.iter().position(|byte| matches!(byte, 0 | b'\n'))?;
        Some(String::from_utf8_lossy(&text[..end]).into_owned())
    })
}
