//! What can be wrong with what a person asked to boot.

use crate::payload::Compression;

/// Bytes in a MiB.
const MIB: u64 = 1 << 20;

/// Why a kernel cannot be booted. [`Self::fix`] says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel's file has no bytes.
    #[error("the kernel file is empty")]
    Empty,
    /// The file is recognisably something else, or nothing at all.
    #[error("the kernel file is {found}, not a kernel")]
    NotAKernel {
        /// What it is, as words that follow "is".
        found: &'static str,
    },
    /// A kernel, packed as a whole file.
    #[error("the kernel file is {format}-compressed as a whole")]
    CompressedFile {
        /// How it is packed.
        format: Compression,
    },
    /// A kernel of another processor architecture.
    #[error("the kernel is for {found}, and this machine is x86-64")]
    Architecture {
        /// The architecture's name, or its number in the file.
        found: String,
    },
    /// The file ends before what its headers promise.
    #[error("the kernel file is cut short: its {what} needs {needs} bytes, the file has {has}")]
    Truncated {
        /// Which part does not fit.
        what: &'static str,
        /// Bytes that the file would have to have.
        needs: u64,
        /// Bytes that it has.
        has: u64,
    },
    /// A header field that no kernel has.
    #[error("the kernel file is damaged: {what} is {value:#x}")]
    Malformed {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A bzImage older than the boot protocol we speak.
    #[error(
        "the kernel speaks Linux boot protocol {}.{:02}, and 2.06 (Linux 2.6.22) is the oldest supported",
        version >> 8, version & 0xff
    )]
    OldProtocol {
        /// Major version in the upper byte, minor in the lower.
        version: u16,
    },
    /// An ELF executable without any way in that we know.
    #[error(
        "the ELF file offers no way to boot it: it has no PVH note, no multiboot header, and is not a Linux kernel"
    )]
    NoEntry,
    /// The kernel inside of a bzImage does not unpack.
    #[error("the kernel's {format} payload does not unpack: {reason}")]
    Payload {
        /// How it is packed.
        format: Compression,
        /// What the decompressor said.
        reason: String,
    },
    /// The kernel inside of a bzImage is larger than guest RAM.
    #[error(
        "the kernel unpacks to {} MiB, and the guest has {} MiB of memory",
        size.div_ceil(MIB), limit / MIB
    )]
    PayloadTooLarge {
        /// Bytes of the kernel.
        size: u64,
        /// Bytes of guest RAM.
        limit: u64,
    },
    /// What is to be loaded needs more RAM than there is.
    #[error(
        "{what} needs about {} MiB of memory, and the guest has {} MiB",
        needs.div_ceil(MIB), has / MIB
    )]
    TooLittleMemory {
        /// What does not fit.
        what: &'static str,
        /// Bytes of RAM that would do.
        needs: u64,
        /// Bytes of RAM there are.
        has: u64,
    },
    /// The kernel wants to lie where there is no RAM for it, however much there is.
    #[error("the kernel wants to lie at {start:#x} to {end:#x}, which is not free RAM on a PC")]
    NotRam {
        /// First guest-physical address.
        start: u64,
        /// Guest-physical address after the last byte.
        end: u64,
    },
    /// The initial RAM disks do not fit below the highest address the kernel accepts.
    #[error(
        "the initrd of {} MiB does not fit into free memory below {limit:#x}, the highest address that the kernel accepts",
        bytes.div_ceil(MIB)
    )]
    InitrdTooLarge {
        /// Bytes in all initial RAM disks.
        bytes: u64,
        /// Guest-physical end of what the kernel accepts.
        limit: u64,
    },
    /// The kernel command line is longer than the kernel takes.
    #[error("the kernel command line is {length} bytes long, and this kernel takes {limit}")]
    CommandLineTooLong {
        /// Bytes it has.
        length: usize,
        /// Bytes it may have.
        limit: usize,
    },
    /// A NUL in a command line would cut it short.
    #[error("a command line contains a NUL byte")]
    CommandLineNul,
    /// Modules for a kernel that has no notion of them.
    #[error("modules were given, and a kernel booted through {protocol} takes none")]
    NoModules {
        /// The boot protocol's name.
        protocol: &'static str,
    },
    /// The multiboot header demands a feature that we do not have.
    #[error(
        "the multiboot header requires features {flags:#06x} that no version of multiboot 1 defines"
    )]
    MultibootFlags {
        /// The required bits that are not known.
        flags: u32,
    },
    /// The firmware tables do not fit into the BIOS area.
    #[error(
        "the firmware tables for {processors} processors need {bytes} bytes, and the BIOS area holds {limit}"
    )]
    TablesTooLarge {
        /// Number of processors.
        processors: usize,
        /// Bytes needed.
        bytes: u64,
        /// Bytes there are.
        limit: u64,
    },
    /// Guest memory refused a write; the plan was made for other memory than it was applied to.
    #[error(transparent)]
    Memory(#[from] trapgate_memory::MemoryError),
}

impl BootError {
    /// What to do about it, as a sentence for a person.
    pub fn fix(&self) -> String {
        match self {
            Self::Empty | Self::Truncated { .. } | Self::Malformed { .. } | Self::Payload { .. } => {
                "copy or download the kernel again; the file is probably incomplete".into()
            }
            Self::NotAKernel { .. } | Self::NoEntry => {
                "pass a Linux kernel (vmlinuz, bzImage or vmlinux), an ELF kernel with a PVH note, or a multiboot 1 kernel with `--kernel`".into()
            }
            Self::CompressedFile { format } => {
                format!("unpack it first, for example with `{}`", format.unpack_command())
            }
            Self::Architecture { .. } => "pass a kernel that was built for x86-64".into(),
            Self::OldProtocol { .. } => "pass a newer kernel: Linux 2.6.22 or later".into(),
            Self::PayloadTooLarge { size, .. } => format!(
                "give the guest more memory, for example `--memory {}M`",
                (size / MIB * 2).next_multiple_of(64).max(256)
            ),
            Self::TooLittleMemory { needs, .. } => {
                format!("give the guest more memory: `--memory {}M`", needs.div_ceil(MIB))
            }
            Self::NotRam { .. } => {
                "link the kernel at 1 MiB or above, and below 3 GiB".into()
            }
            Self::InitrdTooLarge { bytes, limit } => format!(
                "make the initrd smaller, or give the guest more memory: `--memory {}M`, of which the kernel can use what lies below {limit:#x}",
                (bytes / MIB * 2 + 128).next_multiple_of(64)
            ),
            Self::CommandLineTooLong { limit, .. } => {
                format!("shorten `--cmdline` to at most {limit} bytes")
            }
            Self::CommandLineNul => "remove the NUL byte".into(),
            Self::NoModules { .. } => "leave the modules out, or pack them into an initrd".into(),
            Self::MultibootFlags { .. } => {
                "use a kernel with a multiboot 1 header (multiboot 2 is not supported)".into()
            }
            Self::TablesTooLarge { .. } => "ask for fewer processors with `--cpus`".into(),
            Self::Memory(_) => "this is a defect of trapgate: please report it".into(),
        }
    }
}
