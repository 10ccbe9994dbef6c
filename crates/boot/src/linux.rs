//! Linux through its boot protocol: the zero page, and where things lie
//! (Documentation/arch/x86/boot.rst and zero-page.rst).

use trapgate_x86::paging::pte;
use trapgate_x86::registers::gpr;

use crate::bzimage::{BzImage, field};
use crate::elf::Elf;
use crate::entry::Mode;
use crate::error::BootError;
use crate::layout::PAGE;
use crate::plan::{Builder, Entry, Protocol, Request};

/// Offset of the 64-bit entry point from the 32-bit one.
const ENTRY_64: u64 = 0x200;
/// Size of the zero page, bytes.
const ZERO_PAGE: usize = 4096;
/// Offset in it of the RSDP's address (protocol 2.14).
const ACPI_RSDP_ADDR: usize = 0x70;
/// Offset of the number of memory map entries.
const E820_ENTRIES: usize = 0x1e8;
/// Offset of the memory map.
const E820_TABLE: usize = 0x2d0;
/// Bytes in one of its entries.
const E820_ENTRY: usize = 20;
/// Entries that fit.
const E820_MAX: usize = 128;
/// `type_of_loader`: a boot loader without a number of its own.
const UNREGISTERED_LOADER: u8 = 0xff;
/// `loadflags`: the protected-mode code lies above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// `loadflags`: bits that describe what boot loaders and the real-mode code do, none of which
/// happened here.
const LOADER_BITS: u8 = 0b1110_0010;
/// `vid_mode`: "normal".
const VIDEO_NORMAL: u16 = 0xffff;
/// Highest address of an initial RAM disk, where a kernel does not say (boot.rst,
/// `initrd_addr_max`).
const DEFAULT_INITRD_MAX: u32 = 0x37ff_ffff;
/// Longest command line of x86 kernels since 2.6.31, without the NUL.
const DEFAULT_CMDLINE_SIZE: usize = 2047;

/// Plans entry into a kernel proper whose segments are already in the plan.
pub(crate) fn plan_vmlinux<'a>(
    builder: &mut Builder<'a>,
    request: &Request<'a>,
    elf: &Elf,
    image: Option<&BzImage<'_>>,
    version: Option<String>,
) -> Result<Entry, BootError> {
    let protocol = if elf.is_64_bit {
        Protocol::Linux64
    } else {
        Protocol::Linux32
    };
    let header = match image {
        Some(image) => image.header().to_vec(),
        None => header_of_vmlinux(),
    };
    let zero_page = ZeroPage::new(&header);
    enter(
        builder,
        request,
        zero_page,
        protocol,
        elf.physical_entry(),
        version,
    )
}

/// Plans entry into the decompressor that the boot image brings along.
pub(crate) fn plan_decompressor<'a>(
    builder: &mut Builder<'a>,
    request: &Request<'a>,
    image: &BzImage<'a>,
) -> Result<Entry, BootError> {
    let (start, length) = image.load_range();
    builder.layout.claim("the kernel", start, length)?;
    builder.write(start, image.code());
    let mut zero_page = ZeroPage::new(image.header());
    // 64-bit kernels only get here through a preferred address below 4 GiB: `claim` saw to it.
    zero_page.put(field::CODE32_START, &(start as u32).to_le_bytes());
    let (protocol, entry) = if image.has_64_bit_entry() {
        (Protocol::LinuxDecompressor64, start + ENTRY_64)
    } else {
        (Protocol::LinuxDecompressor32, start)
    };
    enter(
        builder,
        request,
        zero_page,
        protocol,
        entry,
        image.version(),
    )
}

fn enter<'a>(
    builder: &mut Builder<'a>,
    request: &Request<'a>,
    mut zero_page: ZeroPage,
    protocol: Protocol,
    entry: u64,
    version: Option<String>,
) -> Result<Entry, BootError> {
    if !request.modules.is_empty() {
        return Err(BootError::NoModules {
            protocol: "the Linux boot protocol",
        });
    }
    let length = request.command_line.len();
    let limit = zero_page.cmdline_size();
    if length > limit {
        return Err(BootError::CommandLineTooLong { length, limit });
    }
    let command_line = builder.write_text("the command line", request.command_line)?;
    let initrd_end = u64::from(zero_page.initrd_addr_max()) + 1;
    let (initrd, initrd_bytes) = builder.place_initrds(request, initrd_end)?;

    zero_page.put(field::CMD_LINE_PTR, &(command_line as u32).to_le_bytes());
    zero_page.put(field::RAMDISK_IMAGE, &(initrd as u32).to_le_bytes());
    zero_page.put(field::RAMDISK_SIZE, &(initrd_bytes as u32).to_le_bytes());
    zero_page.put(ACPI_RSDP_ADDR, &builder.rsdp.to_le_bytes());
    let entries = builder.map.len().min(E820_MAX);
    zero_page.put(E820_ENTRIES, &[entries as u8]);
    for (index, range) in builder.map.iter().take(entries).enumerate() {
        let at = E820_TABLE + index * E820_ENTRY;
        zero_page.put(at, &range.start.to_le_bytes());
        zero_page.put(at + 8, &range.length.to_le_bytes());
        zero_page.put(at + 16, &(range.kind as u32).to_le_bytes());
    }
    let zero_page = builder.write_low("the zero page", zero_page.bytes, PAGE)?;

    let mode = match protocol {
        Protocol::Linux64 | Protocol::LinuxDecompressor64 => Mode::Long {
            page_tables: identity_map(builder)?,
        },
        _ => Mode::Protected,
    };
    let mut cpu = builder.enter(mode, entry)?;
    cpu.gpr[gpr::RSI] = zero_page;
    Ok(Entry {
        cpu,
        protocol,
        version,
    })
}

/// Page tables that map the first 4 GiB to themselves, in pages of 2 MiB; gives their address.
fn identity_map(builder: &mut Builder<'_>) -> Result<u64, BootError> {
    const DIRECTORIES: u64 = 4;
    let length = (2 + DIRECTORIES) * PAGE;
    let top = builder.layout.low("page tables", length, PAGE)?;
    let pointers = top + PAGE;
    let directories = pointers + PAGE;
    let table = pte::P | pte::W;
    let mut entries = vec![0u64; (length / 8) as usize];
    entries[0] = pointers | table;
    for index in 0..DIRECTORIES {
        entries[512 + index as usize] = (directories + index * PAGE) | table;
    }
    for (index, entry) in entries[1024..].iter_mut().enumerate() {
        *entry = (index as u64) << 21 | table | pte::PS;
    }
    let bytes: Vec<u8> = entries
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect();
    builder.write(top, bytes);
    Ok(top)
}

/// The header that a boot image would have had around a bare vmlinux, from [`field::SETUP_SECTS`].
fn header_of_vmlinux() -> Vec<u8> {
    let mut page = vec![0; field::INIT_SIZE];
    let mut put = |offset: usize, bytes: &[u8]| {
        page[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(field::BOOT_FLAG, &0xaa55u16.to_le_bytes());
    put(field::HEADER, b"HdrS");
    put(field::VERSION, &0x20fu16.to_le_bytes());
    put(field::INITRD_ADDR_MAX, &0x7fff_ffffu32.to_le_bytes());
    put(field::KERNEL_ALIGNMENT, &0x20_0000u32.to_le_bytes());
    put(
        field::CMDLINE_SIZE,
        &(DEFAULT_CMDLINE_SIZE as u32).to_le_bytes(),
    );
    page.split_off(field::SETUP_SECTS)
}

/// `struct boot_params`.
struct ZeroPage {
    bytes: Vec<u8>,
}

impl ZeroPage {
    /// A zero page with a copy of the header, and in it what every boot loader sets.
    fn new(header: &[u8]) -> Self {
        let mut page = Self {
            bytes: vec![0; ZERO_PAGE],
        };
        page.put(field::SETUP_SECTS, header);
        page.put(field::VID_MODE, &VIDEO_NORMAL.to_le_bytes());
        page.put(field::TYPE_OF_LOADER, &[UNREGISTERED_LOADER]);
        let flags = page.bytes[field::LOADFLAGS] & !LOADER_BITS;
        page.put(field::LOADFLAGS, &[flags | LOADED_HIGH]);
        page.put(field::SETUP_DATA, &[0; 8]);
        page
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    fn u32(&self, offset: usize) -> u32 {
        crate::le::u32_at(&self.bytes, offset).unwrap_or(0)
    }

    fn initrd_addr_max(&self) -> u32 {
        match self.u32(field::INITRD_ADDR_MAX) {
            0 => DEFAULT_INITRD_MAX,
            limit => limit,
        }
    }

    fn cmdline_size(&self) -> usize {
        match self.u32(field::CMDLINE_SIZE) as usize {
            0 => DEFAULT_CMDLINE_SIZE,
            // More does not fit below 640 KiB; no kernel takes that much.
            size => size.min(0x1_0000),
        }
    }
}
