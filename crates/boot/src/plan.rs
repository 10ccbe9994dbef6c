//! The whole of loading: from files to what lies in memory and how the processor starts.

use std::fmt;
use std::ops::{Deref, Range};

use trapgate_memory::{GuestMemory, MemoryError, PAGE_SIZE};
use trapgate_x86::CpuState;

use crate::bzimage::{BzImage, KernelProper};
use crate::detect::{Kind, bootable};
use crate::elf::{Elf, Segment, linux_version};
use crate::entry::Mode;
use crate::error::BootError;
use crate::layout::{Layout, PAGE};
use crate::memory_map::{MapEntry, memory_map};
use crate::payload::Packed;
use crate::platform::Platform;
use crate::{acpi, bios_data, linux, multiboot, pvh, smbios};

/// The least memory with which loading starts at all, in bytes.
const MINIMUM_MEMORY: u64 = 2 << 20;

/// A file for a kernel that takes several, with the command line that goes with it.
#[derive(Clone, Copy, Debug)]
pub struct Module<'a> {
    /// The file.
    pub data: &'a [u8],
    /// Its command line, by custom its name and then its arguments.
    pub command_line: &'a str,
}

/// What to boot.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request<'a> {
    /// The kernel's file.
    pub kernel: &'a [u8],
    /// Initial RAM disks, which are put one behind the other, each at a multiple of 4 bytes.
    /// A multiboot kernel gets them as its first modules.
    pub initrds: &'a [&'a [u8]],
    /// The kernel's command line.
    pub command_line: &'a str,
    /// Modules, for a multiboot or PVH kernel.
    pub modules: &'a [Module<'a>],
}

impl Request<'_> {
    /// Bytes of initial RAM disks, padding included.
    fn initrd_bytes(&self) -> u64 {
        self.initrds
            .iter()
            .map(|initrd| (initrd.len() as u64).next_multiple_of(4))
            .sum()
    }
}

/// The way into a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// The kernel proper, unpacked on the host, at its 64-bit entry with a zero page in RSI.
    Linux64,
    /// As [`Self::Linux64`], for a 32-bit kernel in protected mode.
    Linux32,
    /// The kernel's own decompressor at its 64-bit entry.
    LinuxDecompressor64,
    /// The kernel's own decompressor at its 32-bit entry.
    LinuxDecompressor32,
    /// PVH (Xen's x86/HVM direct boot ABI): 32-bit protected mode, start info in EBX.
    Pvh,
    /// Multiboot 0.6.96: 32-bit protected mode, information structure in EBX.
    Multiboot,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Linux64 => "the Linux 64-bit entry",
            Self::Linux32 => "the Linux 32-bit entry",
            Self::LinuxDecompressor64 | Self::LinuxDecompressor32 => {
                "the kernel's own decompressor"
            }
            Self::Pvh => "PVH",
            Self::Multiboot => "multiboot",
        })
    }
}

/// How the boot processor starts.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Its complete state. Other processors start as [`crate::application_processor`] says.
    pub cpu: CpuState,
    /// The way in.
    pub protocol: Protocol,
    /// What the kernel calls itself, if it says so where it can be found.
    pub version: Option<String>,
}

/// Bytes to be written, borrowed from the caller where that is possible.
#[derive(Clone)]
pub struct Data<'a>(Source<'a>);

#[derive(Clone)]
enum Source<'a> {
    Borrowed(&'a [u8]),
    Owned(Vec<u8>),
}

impl Deref for Data<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.0 {
            Source::Borrowed(bytes) => bytes,
            Source::Owned(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Data<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.len())
    }
}

impl<'a> From<&'a [u8]> for Data<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self(Source::Borrowed(bytes))
    }
}

impl From<Vec<u8>> for Data<'_> {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Source::Owned(bytes))
    }
}

/// Bytes and where in guest memory they go.
#[derive(Clone, Debug)]
pub struct Write<'a> {
    /// Guest-physical.
    pub address: u64,
    /// What goes there; what the plan does not mention is zero.
    pub data: Data<'a>,
}

/// A kernel that is unpacked straight into guest memory, and where the parts of it go.
#[derive(Debug)]
pub struct Unpacking<'a> {
    packed: Packed<'a>,
    /// None overlaps another in memory.
    pub parts: Vec<Part>,
}

/// A part of a file and where in guest memory it goes.
#[derive(Clone, Debug)]
pub struct Part {
    /// Which bytes of the unpacked file.
    pub file: Range<u64>,
    /// Guest-physical.
    pub address: u64,
}

impl Unpacking<'_> {
    fn apply(self, memory: &GuestMemory) -> Result<(), BootError> {
        self.packed.unpack(|offset, piece| {
            for part in &self.parts {
                let start = part.file.start.max(offset);
                let end = part.file.end.min(offset + piece.len() as u64);
                if start < end {
                    let address = part.address + (start - part.file.start);
                    let data = &piece[(start - offset) as usize..(end - offset) as usize];
                    write_where_not_zero(memory, address, data)?;
                }
            }
            Ok(())
        })
    }
}

/// What lies where, and how the boot processor starts.
#[derive(Debug)]
pub struct LoadPlan<'a> {
    /// In no particular order; no two overlap.
    pub writes: Vec<Write<'a>>,
    /// The kernel, where it is not among the writes. They do not overlap.
    pub unpacking: Option<Unpacking<'a>>,
    /// How the boot processor starts.
    pub entry: Entry,
}

impl LoadPlan<'_> {
    /// Where in guest memory the parts lie, in no particular order. No two overlap.
    pub fn places(&self) -> impl Iterator<Item = Range<u64>> {
        let written = self.writes.iter();
        let written = written.map(|write| (write.address, write.data.len() as u64));
        let unpacked = self.unpacking.iter().flat_map(|kernel| &kernel.parts);
        let unpacked = unpacked.map(|part| (part.address, part.file.end - part.file.start));
        written
            .chain(unpacked)
            .map(|(start, length)| start..start + length)
    }

    /// Writes everything into `memory`, which is all zeros, and says how to go on. Pages that would stay zero are not
    /// touched.
    ///
    /// A kernel that is packed may turn out here to be damaged; part of it is in memory then.
    pub fn apply(self, memory: &GuestMemory) -> Result<Entry, BootError> {
        if let Some(unpacking) = self.unpacking {
            unpacking.apply(memory)?;
        }
        for write in &self.writes {
            write_where_not_zero(memory, write.address, &write.data)?;
        }
        Ok(self.entry)
    }
}

/// Writes the pages of `data` that are not all zeros, neighbours together.
fn write_where_not_zero(
    memory: &GuestMemory,
    address: u64,
    data: &[u8],
) -> Result<(), MemoryError> {
    const ZEROS: [u8; PAGE_SIZE as usize] = [0; PAGE_SIZE as usize];
    let page_end = |at: usize| {
        let in_page = (address + at as u64) % PAGE_SIZE;
        (at + (PAGE_SIZE - in_page) as usize).min(data.len())
    };
    let mut run = 0..0;
    while run.end < data.len() {
        let end = page_end(run.end);
        let page = &data[run.end..end];
        if page == &ZEROS[..page.len()] {
            memory.write(address + run.start as u64, &data[run.clone()])?;
            run.start = end;
        }
        run.end = end;
    }
    memory.write(address + run.start as u64, &data[run])
}

/// A plan in the making.
#[derive(Debug)]
pub(crate) struct Builder<'a> {
    /// What is free.
    pub(crate) layout: Layout,
    /// The memory map for the kernel.
    pub(crate) map: Vec<MapEntry>,
    /// Guest-physical address of the ACPI RSDP.
    pub(crate) rsdp: u64,
    writes: Vec<Write<'a>>,
    unpacking: Option<Unpacking<'a>>,
}

impl<'a> Builder<'a> {
    /// Adds bytes at a place that was taken in the layout.
    pub(crate) fn write(&mut self, address: u64, data: impl Into<Data<'a>>) {
        let data = data.into();
        self.writes.push(Write { address, data });
    }

    /// Adds bytes below 640 KiB (see [`Layout::low`]); gives their address.
    pub(crate) fn write_low(
        &mut self,
        what: &'static str,
        data: Vec<u8>,
        align: u64,
    ) -> Result<u64, BootError> {
        let address = self.layout.low(what, data.len() as u64, align)?;
        self.write(address, data);
        Ok(address)
    }

    /// Adds a text with its NUL.
    pub(crate) fn write_text(&mut self, what: &'static str, text: &str) -> Result<u64, BootError> {
        if text.contains('\0') {
            return Err(BootError::CommandLineNul);
        }
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.write_low(what, bytes, 1)
    }

    /// Claims the places of an executable's segments.
    fn claim_segments(&mut self, elf: &Elf) -> Result<(), BootError> {
        // The highest first: should memory be too little, the error names what all need.
        let mut segments: Vec<_> = elf.segments.iter().collect();
        segments.sort_by_key(|segment| std::cmp::Reverse(segment.end()));
        for segment in segments {
            self.layout
                .claim("the kernel", segment.physical, segment.memory_size)?;
        }
        Ok(())
    }

    /// Adds the segments of an executable that is there as a whole.
    pub(crate) fn write_segments(&mut self, elf: &Elf, file: &'a [u8]) -> Result<(), BootError> {
        self.claim_segments(elf)?;
        for segment in &elf.segments {
            // In the file, as `Elf::parse` saw to.
            let data = &file[segment.file.start as usize..segment.file.end as usize];
            self.write(segment.physical, data);
        }
        Ok(())
    }

    /// Adds the segments of an executable that is packed.
    fn unpack_segments(&mut self, elf: &Elf, packed: Packed<'a>) -> Result<(), BootError> {
        self.claim_segments(elf)?;
        let part = |segment: &Segment| Part {
            file: segment.file.clone(),
            address: segment.physical,
        };
        self.unpacking = Some(Unpacking {
            packed,
            parts: elf.segments.iter().map(part).collect(),
        });
        Ok(())
    }

    /// Places the initial RAM disks as high as the kernel accepts them; gives their address and
    /// length, zeros if there are none.
    pub(crate) fn place_initrds(
        &mut self,
        request: &Request<'a>,
        limit: u64,
    ) -> Result<(u64, u64), BootError> {
        let bytes = request.initrd_bytes();
        if bytes == 0 {
            return Ok((0, 0));
        }
        let Some(start) = self.layout.highest(bytes, PAGE, limit) else {
            return Err(BootError::InitrdTooLarge { bytes, limit });
        };
        let mut at = start;
        for initrd in request.initrds {
            self.write(at, *initrd);
            at += (initrd.len() as u64).next_multiple_of(4);
        }
        Ok((start, bytes))
    }

    /// Adds descriptor tables and gives a processor about to run `entry`.
    pub(crate) fn enter(&mut self, mode: Mode, entry: u64) -> Result<CpuState, BootError> {
        let gdt = self.write_low("the descriptor table", mode.gdt(), 8)?;
        Ok(mode.state(entry, gdt))
    }
}

/// Says what lies where in `memory`, and how the boot processor starts. Writes nothing.
pub fn plan<'a>(
    request: &Request<'a>,
    memory: &GuestMemory,
    platform: &Platform,
) -> Result<LoadPlan<'a>, BootError> {
    let kind = bootable(request.kernel)?;
    let low = memory.ranges().next().filter(|range| range.start == 0);
    if low.is_none_or(|range| range.length < MINIMUM_MEMORY) {
        return Err(BootError::TooLittleMemory {
            what: "a PC",
            needs: MINIMUM_MEMORY,
            has: memory.size(),
        });
    }
    let map = memory_map(memory, platform);
    let modules: u64 = request
        .modules
        .iter()
        .map(|module| module.data.len() as u64)
        .sum();
    let mut builder = Builder {
        layout: Layout::new(&map, memory.size(), request.initrd_bytes() + modules),
        map,
        rsdp: acpi::RSDP_ADDRESS,
        writes: Vec::new(),
        unpacking: None,
    };
    let tables = acpi::tables(platform)?
        .into_iter()
        .chain(smbios::tables(memory.size()))
        .chain(bios_data::areas(platform));
    for (address, bytes) in tables {
        builder.write(address, bytes);
    }
    let entry = match kind {
        Kind::BzImage => plan_bzimage(&mut builder, request, memory.size())?,
        Kind::Elf => plan_elf(&mut builder, request)?,
        _ => multiboot::plan(&mut builder, request, None)?,
    };
    Ok(LoadPlan {
        writes: builder.writes,
        unpacking: builder.unpacking,
        entry,
    })
}

/// [`plan()`] and [`LoadPlan::apply`] in one.
pub fn load(
    request: &Request<'_>,
    memory: &GuestMemory,
    platform: &Platform,
) -> Result<Entry, BootError> {
    plan(request, memory, platform)?.apply(memory)
}

fn plan_bzimage<'a>(
    builder: &mut Builder<'a>,
    request: &Request<'a>,
    memory_size: u64,
) -> Result<Entry, BootError> {
    let image = BzImage::parse(request.kernel)?;
    let elf = match image.kernel_proper(memory_size)? {
        Some(KernelProper::Plain(file)) => {
            let elf = Elf::parse(file, file.len() as u64)?;
            builder.write_segments(&elf, file)?;
            Some(elf)
        }
        Some(KernelProper::Packed(mut packed)) => {
            let elf = packed_elf(&mut packed)?;
            if let Some(elf) = &elf {
                builder.unpack_segments(elf, packed)?;
            }
            elf
        }
        None => None,
    };
    // Kernels before 2.6.26 carry a flat image, which only their decompressor knows where to put.
    match elf {
        Some(elf) => linux::plan_vmlinux(builder, request, &elf, Some(&image), image.version()),
        None => linux::plan_decompressor(builder, request, &image),
    }
}

/// What the first bytes of a packed executable say; `None` if it is something else.
fn packed_elf(packed: &mut Packed<'_>) -> Result<Option<Elf>, BootError> {
    let size = packed.size();
    let head = packed.head(PAGE)?;
    if !head.starts_with(b"\x7fELF") {
        return Ok(None);
    }
    let needs = Elf::head_bytes(head)?;
    Elf::parse(packed.head(needs)?, size).map(Some)
}

fn plan_elf<'a>(builder: &mut Builder<'a>, request: &Request<'a>) -> Result<Entry, BootError> {
    let elf = Elf::parse(request.kernel, request.kernel.len() as u64)?;
    if elf.pvh_entry.is_none() && multiboot::find_header(request.kernel).is_some() {
        return multiboot::plan(builder, request, Some(&elf));
    }
    let version = linux_version(request.kernel);
    if elf.pvh_entry.is_none() && version.is_none() {
        return Err(BootError::NoEntry);
    }
    builder.write_segments(&elf, request.kernel)?;
    match elf.pvh_entry {
        Some(entry) => pvh::plan(builder, request, entry, version),
        None => linux::plan_vmlinux(builder, request, &elf, None, version),
    }
}

#[cfg(test)]
mod tests;
