//! What the loader said about the machine.

use core::ptr::read_unaligned;

/// How the image was entered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum BootProtocol {
    Unknown,
    Pvh,
    Multiboot,
}

impl BootProtocol {
    pub fn name(self) -> &'static str {
        match self {
            BootProtocol::Unknown => "unknown",
            BootProtocol::Pvh => "PVH",
            BootProtocol::Multiboot => "multiboot",
        }
    }
}

static mut ENTERED: (BootProtocol, u32) = (BootProtocol::Unknown, 0);

pub(crate) fn remember(protocol: BootProtocol, info: u32) {
    // SAFETY: one CPU, and nothing reads it yet.
    unsafe { (&raw mut ENTERED).write((protocol, info)) }
}

pub fn protocol() -> BootProtocol {
    // SAFETY: written once, before the program.
    unsafe { (&raw const ENTERED).read().0 }
}

/// The first words of `struct hvm_start_info`, version 1.
const PVH_MAGIC: u32 = 0x336E_C578;
const PVH_VERSION: u64 = 4;
const PVH_COMMAND_LINE: u64 = 24;
const PVH_MEMORY_MAP: u64 = 40;
const PVH_MEMORY_MAP_ENTRIES: u64 = 48;
const PVH_ENTRY_SIZE: u64 = 24;

/// Fields of the multiboot information (section 3.3) and the flags that make them valid.
const MULTIBOOT_COMMAND_LINE: u64 = 16;
const MULTIBOOT_MAP_LENGTH: u64 = 44;
const MULTIBOOT_MAP_ADDRESS: u64 = 48;
const MULTIBOOT_HAS_COMMAND_LINE: u32 = 1 << 2;
const MULTIBOOT_HAS_MAP: u32 = 1 << 6;

const USABLE: u32 = 1;

/// Usable memory: bytes, and the number of ranges they are in. `None` if the loader gave no map.
pub fn usable_memory() -> Option<(u64, u32)> {
    let mut total = (0, 0);
    let mut add = |size: u64, kind: u32| {
        if kind == USABLE {
            total = (total.0 + size, total.1 + 1);
        }
    };
    // SAFETY: one CPU.
    let (protocol, info) = unsafe { (&raw const ENTERED).read() };
    let info = u64::from(info);
    match protocol {
        BootProtocol::Pvh if word(info) == PVH_MAGIC && word(info + PVH_VERSION) >= 1 => {
            let map = long(info + PVH_MEMORY_MAP);
            for index in 0..u64::from(word(info + PVH_MEMORY_MAP_ENTRIES)) {
                let entry = map + index * PVH_ENTRY_SIZE;
                add(long(entry + 8), word(entry + 16));
            }
        }
        BootProtocol::Multiboot if word(info) & MULTIBOOT_HAS_MAP != 0 => {
            let mut entry = u64::from(word(info + MULTIBOOT_MAP_ADDRESS));
            let end = entry + u64::from(word(info + MULTIBOOT_MAP_LENGTH));
            while entry < end {
                // Each entry starts with its size, which does not count itself.
                add(long(entry + 12), word(entry + 20));
                entry += u64::from(word(entry)) + 4;
            }
        }
        _ => return None,
    }
    Some(total)
}

/// The command line, empty if there is none.
pub fn command_line() -> &'static str {
    // SAFETY: one CPU.
    let (protocol, info) = unsafe { (&raw const ENTERED).read() };
    let info = u64::from(info);
    let text = match protocol {
        BootProtocol::Pvh => long(info + PVH_COMMAND_LINE),
        BootProtocol::Multiboot if word(info) & MULTIBOOT_HAS_COMMAND_LINE != 0 => {
            u64::from(word(info + MULTIBOOT_COMMAND_LINE))
        }
        _ => 0,
    };
    if text == 0 {
        return "";
    }
    // SAFETY: the loader ends it with a NUL, and nothing else uses that memory.
    unsafe { core::ffi::CStr::from_ptr(text as *const _) }
        .to_str()
        .unwrap_or("")
}

fn word(address: u64) -> u32 {
    // SAFETY: the loader's structures lie in identity-mapped memory.
    unsafe { read_unaligned(address as *const u32) }
}

fn long(address: u64) -> u64 {
    // SAFETY: as in `word`.
    unsafe { read_unaligned(address as *const u64) }
}
