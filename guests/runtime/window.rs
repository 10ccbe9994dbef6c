//! A window of 4 KiB pages at 512 GiB, whose page-table entries the program sets as it likes.

use crate::cpu;

pub const PRESENT: u64 = 1 << 0;
pub const WRITABLE: u64 = 1 << 1;
pub const USER: u64 = 1 << 2;
pub const ACCESSED: u64 = 1 << 5;
pub const DIRTY: u64 = 1 << 6;
pub const LARGE: u64 = 1 << 7;
pub const GLOBAL: u64 = 1 << 8;
pub const NO_EXECUTE: u64 = 1 << 63;

/// Where the window starts: the second entry of the PML4.
pub const BASE: u64 = 512 << 30;

#[repr(C, align(4096))]
struct Table([u64; 512]);

static mut DIRECTORY_POINTERS: Table = Table([0; 512]);
static mut DIRECTORY: Table = Table([0; 512]);
static mut PAGES: Table = Table([0; 512]);

/// The levels above the pages, which permit everything unless a program says otherwise.
#[derive(Clone, Copy)]
pub enum Upper {
    Pml4,
    DirectoryPointers,
    Directory,
}

/// Opens the window: nothing is mapped in it.
pub fn open() {
    for level in [Upper::Pml4, Upper::DirectoryPointers, Upper::Directory] {
        set_upper(level, PRESENT | WRITABLE | USER);
    }
    for page in 0..512 {
        unmap(page);
    }
}

/// Gives the entry above the window at `level` other permissions.
pub fn set_upper(level: Upper, flags: u64) {
    let (entry, table) = match level {
        Upper::Pml4 => (
            (cpu::read_cr3() & !0xFFF) as *mut u64,
            (&raw const DIRECTORY_POINTERS) as u64,
        ),
        Upper::DirectoryPointers => (
            (&raw mut DIRECTORY_POINTERS) as *mut u64,
            (&raw const DIRECTORY) as u64,
        ),
        Upper::Directory => ((&raw mut DIRECTORY) as *mut u64, (&raw const PAGES) as u64),
    };
    let index = if matches!(level, Upper::Pml4) { 1 } else { 0 };
    // SAFETY: the entry belongs to the window; the program runs outside of it.
    unsafe { entry.add(index).write_volatile(table | flags) }
    cpu::write_cr3(cpu::read_cr3());
}

/// The entry above the window at `level`, as the CPU left it.
pub fn upper(level: Upper) -> u64 {
    let (entry, index) = match level {
        Upper::Pml4 => ((cpu::read_cr3() & !0xFFF) as *const u64, 1),
        Upper::DirectoryPointers => ((&raw const DIRECTORY_POINTERS) as *const u64, 0),
        Upper::Directory => ((&raw const DIRECTORY) as *const u64, 0),
    };
    // SAFETY: as in `set_upper`.
    unsafe { entry.add(index).read_volatile() }
}

/// Writes the second entry of the window's page directory: it maps a 2 MiB page, or nothing.
/// Returns the first address it translates.
pub fn set_large(entry: u64) -> u64 {
    let address = BASE + (2 << 20);
    // SAFETY: as in `set_upper`.
    unsafe {
        ((&raw mut DIRECTORY) as *mut u64)
            .add(1)
            .write_volatile(entry)
    }
    cpu::invalidate_page(address);
    address
}

/// The entry that [`set_large`] wrote, as the CPU left it.
pub fn large_entry() -> u64 {
    // SAFETY: as in `set_upper`.
    unsafe {
        ((&raw const DIRECTORY) as *const u64)
            .add(1)
            .read_volatile()
    }
}

/// Writes the second entry of the window's page-directory-pointer table: it maps a 1 GiB page, or
/// nothing. Returns the first address it translates.
pub fn set_huge(entry: u64) -> u64 {
    let address = BASE + (1 << 30);
    // SAFETY: as in `set_upper`.
    unsafe {
        ((&raw mut DIRECTORY_POINTERS) as *mut u64)
            .add(1)
            .write_volatile(entry)
    }
    cpu::write_cr3(cpu::read_cr3());
    address
}

/// The entry that [`set_huge`] wrote, as the CPU left it.
pub fn huge_entry() -> u64 {
    // SAFETY: as in `set_upper`.
    unsafe {
        ((&raw const DIRECTORY_POINTERS) as *const u64)
            .add(1)
            .read_volatile()
    }
}

/// Maps page number `page` of the window (0 to 511) to the physical page at `physical`. Returns
/// its address.
pub fn map(page: usize, physical: u64, flags: u64) -> u64 {
    set_entry(page, physical & !0xFFF | flags)
}

/// Maps page number `page` to the memory behind `pointer`, which is identity-mapped.
pub fn map_memory<T>(page: usize, pointer: *const T, flags: u64) -> u64 {
    map(page, pointer as u64, flags) + (pointer as u64 & 0xFFF)
}

pub fn unmap(page: usize) -> u64 {
    set_entry(page, 0)
}

pub fn set_entry(page: usize, entry: u64) -> u64 {
    set_entry_silently(page, entry);
    let address = BASE + (page as u64) * 4096;
    cpu::invalidate_page(address);
    address
}

/// Changes the entry and leaves what the CPU remembers of the old one alone.
pub fn set_entry_silently(page: usize, entry: u64) {
    assert!(page < 512, "the window has 512 pages");
    // SAFETY: as in `set_upper`.
    unsafe {
        ((&raw mut PAGES) as *mut u64)
            .add(page)
            .write_volatile(entry)
    }
}

/// The page-table entry of page number `page`, as the CPU left it.
pub fn entry(page: usize) -> u64 {
    assert!(page < 512, "the window has 512 pages");
    // SAFETY: as in `set_upper`.
    unsafe { ((&raw const PAGES) as *const u64).add(page).read_volatile() }
}
