#![forbid(unsafe_code)]
//! From a kernel's file to a machine that is about to run it: what firmware and a boot loader leave
//! behind, as data.
//!
//! Everything here is pure. [`plan()`] reads the bytes of a kernel, of its initial RAM disks and
//! modules, and of nothing else, and says what lies where in guest memory and how the boot processor
//! starts; [`LoadPlan::apply`] writes it. [`load`] does both. The files are not trusted: a header
//! that lies gives a [`BootError`], never a panic or an allocation larger than the guest's RAM.
//!
//! Ways into a kernel, see [`Protocol`]:
//! - a Linux bzImage is unpacked by the host, straight into guest memory, and entered at its 64-bit
//!   entry with a zero page, so that the guest need not spend its first seconds unpacking itself; a payload in a format that the
//!   host cannot unpack is left to the kernel's own decompressor;
//! - an ELF executable with a PVH note, such as `vmlinux` from a build, is entered there;
//! - a multiboot 1 kernel gets its information structure and modules.
//!
//! Whatever the way, guest memory also gets ACPI tables (RSDP in the BIOS area, where a scan finds
//! it too), an SMBIOS table, and a memory map, all made from one [`Platform`].
//!
//! Guest memory must be as new, all zeros: a plan does not write zeros, so that untouched RAM costs
//! nothing.

pub mod acpi;
mod bios_data;
mod bzimage;
mod detect;
mod elf;
mod entry;
mod error;
mod layout;
mod le;
mod linux;
mod memory_map;
mod multiboot;
mod payload;
mod plan;
mod platform;
mod pvh;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod samples;
mod smbios;

pub use bzimage::BzImage;
pub use detect::{Kind, detect};
pub use entry::application_processor;
pub use error::BootError;
pub use memory_map::{MapEntry, MapKind, memory_map};
pub use payload::Compression;
pub use plan::{
    Data, Entry, LoadPlan, Module, Part, Protocol, Request, Unpacking, Write, load, plan,
};
pub use platform::{Ecam, Hpet, IoApic, Platform, Serial, Window};
