//! Kernels of every kind with anything wrong with them: loading gives an error, or a plan whose parts
//! lie in guest memory and do not overlap, and takes no more memory than the guest has.
#![no_main]
#![forbid(unsafe_code)]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use trapgate_boot::{BootError, BzImage, Module, Platform, Request, detect, plan, samples};
use trapgate_memory::{GuestMemory, pc_ram_ranges};

#[derive(Arbitrary, Debug)]
struct Input {
    memory: MemorySize,
    kernel: Kernel,
    bends: Vec<Bend>,
    /// Bytes that are left of the file.
    cut: Option<u16>,
    initrds: Vec<u16>,
    modules: Vec<(u16, String)>,
    command_line: String,
    processors: u8,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum MemorySize {
    Pages(u16),
    Mebibytes16,
    Mebibytes64,
}

#[derive(Arbitrary, Debug)]
enum Kernel {
    Raw(Vec<u8>),
    Image(Payload),
    Elf(Executable),
    Multiboot { flags: u32, addresses: Vec<u32> },
}

#[derive(Arbitrary, Debug)]
enum Payload {
    /// Something unpacked, or that says that it is packed.
    Raw(Vec<u8>),
    Plain(Executable),
    Gzip(Executable),
    Packed(Format, Vec<u8>),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Format {
    Gzip,
    Bzip2,
    Lzma,
    Xz,
    Lz4,
    Zstd,
}

impl Format {
    /// What files of this format start with.
    fn magic(self) -> &'static [u8] {
        match self {
            Self::Gzip => &[0x1f, 0x8b, 8, 0],
            Self::Bzip2 => b"BZh9",
            Self::Lzma => &[0x5d, 0, 0],
            Self::Xz => b"\xfd7zXZ\0",
            Self::Lz4 => &[0x02, 0x21, 0x4c, 0x18],
            Self::Zstd => &[0x28, 0xb5, 0x2f, 0xfd],
        }
    }
}

#[derive(Arbitrary, Debug)]
struct Executable {
    wide: bool,
    /// Content of its segment: Linux's banner, a multiboot header, or anything.
    content: Content,
    note: Option<(u32, Vec<u8>)>,
    bends: Vec<Bend>,
}

#[derive(Arbitrary, Debug)]
enum Content {
    Linux,
    Multiboot { flags: u32, addresses: Vec<u32> },
    Any(Vec<u8>),
}

/// A field overwritten.
#[derive(Arbitrary, Debug)]
enum Bend {
    /// In an ELF header or its program headers.
    Elf(u8, Value),
    /// In the boot image's header.
    Header(u8, Value),
    Anywhere(u16, Value),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Value {
    Byte(u8),
    Word(u16),
    Doubleword(u32),
    Quadword(u64),
}

impl Bend {
    fn apply(&self, file: &mut [u8]) {
        let (offset, value) = match *self {
            Self::Elf(offset, value) => (usize::from(offset), value),
            Self::Header(offset, value) => (0x1f1 + usize::from(offset & 0x7f), value),
            Self::Anywhere(offset, value) => (usize::from(offset), value),
        };
        let bytes = match value {
            Value::Byte(value) => value.to_le_bytes().to_vec(),
            Value::Word(value) => value.to_le_bytes().to_vec(),
            Value::Doubleword(value) => value.to_le_bytes().to_vec(),
            Value::Quadword(value) => value.to_le_bytes().to_vec(),
        };
        for (place, byte) in file.iter_mut().skip(offset).zip(bytes) {
            *place = byte;
        }
    }
}

impl Executable {
    fn file(&self) -> Vec<u8> {
        const ROOM: usize = samples::ELF_FILE_BYTES / 2;
        const X86_64: u16 = 62;
        let mut content = match &self.content {
            Content::Linux => samples::BANNER.to_vec(),
            Content::Multiboot { flags, addresses } => samples::multiboot_header(*flags, addresses),
            Content::Any(bytes) => bytes.clone(),
        };
        content.truncate(ROOM);
        let mut file = if self.wide {
            let note = self.note.as_ref().map(|(kind, description)| {
                samples::note(b"Xen", *kind, &description[..description.len().min(64)])
            });
            samples::elf64(X86_64, &content, &note.unwrap_or_default())
        } else {
            samples::elf32(&content)
        };
        for bend in &self.bends {
            bend.apply(&mut file);
        }
        file
    }
}

impl Kernel {
    fn file(&self) -> Vec<u8> {
        match self {
            Self::Raw(bytes) => bytes.clone(),
            Self::Image(payload) => samples::image(&match payload {
                Payload::Raw(bytes) => bytes.clone(),
                Payload::Plain(executable) => executable.file(),
                Payload::Gzip(executable) => samples::gzip(&executable.file()),
                Payload::Packed(format, bytes) => [format.magic(), bytes].concat(),
            }),
            Self::Elf(executable) => executable.file(),
            Self::Multiboot { flags, addresses } => {
                let mut file = samples::multiboot_header(*flags, addresses);
                file.resize(0x2000, 0x90);
                file
            }
        }
    }
}

fuzz_target!(|input: Input| {
    let bytes = match input.memory {
        MemorySize::Pages(count) => (u64::from(count % 0x1000) + 1) << 12,
        MemorySize::Mebibytes16 => 16 << 20,
        MemorySize::Mebibytes64 => 64 << 20,
    };
    let memory = GuestMemory::new(&pc_ram_ranges(bytes)).expect("the host has memory");
    let mut kernel = input.kernel.file();
    for bend in &input.bends {
        bend.apply(&mut kernel);
    }
    if let Some(cut) = input.cut {
        kernel.truncate(cut.into());
    }

    let _ = detect(&kernel);
    if let Ok(image) = BzImage::parse(&kernel) {
        let _ = (
            image.version(),
            image.compression(),
            image.has_64_bit_entry(),
        );
    }
    // Files of a size that anybody may choose need not be in the input.
    let ones = vec![1; usize::from(u16::MAX)];
    let initrds: Vec<_> = input
        .initrds
        .iter()
        .map(|&bytes| &ones[..bytes.into()])
        .collect();
    let modules: Vec<_> = input
        .modules
        .iter()
        .map(|(bytes, command_line)| Module {
            data: &ones[..usize::from(*bytes)],
            command_line,
        })
        .collect();
    let request = Request {
        kernel: &kernel,
        initrds: &initrds,
        command_line: &input.command_line,
        modules: &modules,
    };
    let platform = Platform {
        apic_ids: (0..u32::from(input.processors.max(1))).collect(),
        ..Platform::default()
    };
    let plan = match plan(&request, &memory, &platform) {
        Ok(plan) => plan,
        Err(error) => {
            assert!(!error.to_string().is_empty() && !error.fix().is_empty());
            return;
        }
    };
    let mut places: Vec<_> = plan.places().collect();
    places.sort_unstable_by_key(|place| (place.start, place.end));
    assert!(
        places.windows(2).all(|pair| pair[0].end <= pair[1].start),
        "{places:x?}"
    );
    match plan.apply(&memory) {
        // Every part lies in guest memory, but what is unpacked may be damaged.
        Ok(_) | Err(BootError::Payload { .. }) => {}
        Err(error) => panic!("{error}"),
    }
});
