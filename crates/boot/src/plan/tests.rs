//! Plans for small kernels of every kind, applied and read back as the kernel would.

use std::io::Write as _;

use trapgate_memory::pc_ram_ranges;
use trapgate_x86::paging::pte;
use trapgate_x86::registers::{cr0, cr4, efer, gpr, rflags, sreg};

use super::*;
use crate::bzimage::field;
use crate::memory_map::MapKind;
use crate::samples::*;

const MIB: u64 = 1 << 20;
const X86_64: u16 = 62;

fn memory(bytes: u64) -> GuestMemory {
    GuestMemory::new(&pc_ram_ranges(bytes)).unwrap()
}

fn read(memory: &GuestMemory, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read(address, &mut bytes).unwrap();
    bytes
}

fn u32_at(memory: &GuestMemory, address: u64) -> u32 {
    u32::from_le_bytes(read(memory, address, 4).try_into().unwrap())
}

fn u64_at(memory: &GuestMemory, address: u64) -> u64 {
    u64::from_le_bytes(read(memory, address, 8).try_into().unwrap())
}

fn text(memory: &GuestMemory, address: u64) -> String {
    let bytes = read(memory, address, 256);
    crate::le::text_at(&bytes, 0).unwrap()
}

fn request<'a>(kernel: &'a [u8]) -> Request<'a> {
    Request {
        kernel,
        command_line: "console=ttyS0 quiet",
        ..Request::default()
    }
}

/// Loads, having checked that the parts of the plan neither overlap nor leave RAM.
fn loaded(request: &Request<'_>, memory: &GuestMemory) -> Entry {
    let plan = plan(request, memory, &Platform::default()).unwrap();
    let mut places: Vec<_> = plan.places().collect();
    places.sort_unstable_by_key(|place| (place.start, place.end));
    for pair in places.windows(2) {
        assert!(pair[0].end <= pair[1].start, "{places:x?}");
    }
    plan.apply(memory).unwrap()
}

fn linux_elf() -> Vec<u8> {
    elf64(X86_64, BANNER, &pvh_note(0))
}

/// What four-level page tables make of a linear address.
fn translate(memory: &GuestMemory, top: u64, linear: u64) -> u64 {
    let mut table = top;
    for level in [39, 30] {
        let entry = u64_at(memory, table + ((linear >> level) & 511) * 8);
        assert_eq!(entry & (pte::P | pte::W), pte::P | pte::W);
        table = entry & !0xfff;
    }
    let entry = u64_at(memory, table + ((linear >> 21) & 511) * 8);
    assert_eq!(entry & (pte::P | pte::PS), pte::P | pte::PS);
    (entry & !0x1f_ffff) | (linear & 0x1f_ffff)
}

#[test]
fn bzimage_is_unpacked_and_entered_in_64_bit_mode_with_a_zero_page() {
    let kernel = image(&gzip(&linux_elf()));
    let memory = memory(64 * MIB);
    let entry = loaded(&request(&kernel), &memory);

    assert_eq!(entry.protocol, Protocol::Linux64);
    assert_eq!(entry.version.as_deref(), Some("6.6.6-test (someone) #1"));
    assert_eq!(read(&memory, ELF_START, BANNER.len()), BANNER);
    let cpu = &entry.cpu;
    assert_eq!(cpu.rip, ELF_START);
    assert_eq!(cpu.rflags & rflags::IF, 0);
    let system = &cpu.system;
    assert_eq!(system.cr0 & (cr0::PE | cr0::PG), cr0::PE | cr0::PG);
    assert_eq!(system.cr4 & cr4::PAE, cr4::PAE);
    assert_eq!(system.efer, efer::LME | efer::LMA);
    assert_eq!(system.segments[sreg::CS].selector, 0x10);
    assert_eq!(system.segments[sreg::DS].selector, 0x18);
    for linear in [0, 0x1234, ELF_START, 3 << 30, (4 << 30) - 1] {
        assert_eq!(translate(&memory, system.cr3, linear), linear);
    }

    let zero_page = cpu.gpr[gpr::RSI];
    let put = |offset: usize| u32_at(&memory, zero_page + offset as u64);
    assert_eq!(put(field::HEADER), u32::from_le_bytes(*b"HdrS"));
    assert_eq!(put(field::TYPE_OF_LOADER) & 0xffff, 0x01ff);
    assert_eq!(
        text(&memory, put(field::CMD_LINE_PTR).into()),
        "console=ttyS0 quiet"
    );
    assert_eq!(put(field::RAMDISK_SIZE), 0);
    assert_eq!(read(&memory, put(0x70).into(), 8), b"RSD PTR ");
    // The sentinel: anything but zero makes Linux distrust the page.
    assert_eq!(read(&memory, zero_page + 0x1ef, 1), [0]);
    let map: Vec<_> = (0..read(&memory, zero_page + 0x1e8, 1)[0])
        .map(|index| {
            let at = zero_page + 0x2d0 + u64::from(index) * 20;
            (
                u64_at(&memory, at),
                u64_at(&memory, at + 8),
                u32_at(&memory, at + 16),
            )
        })
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x400, 2),
            (0xe_0000, 0x2_0000, 2),
            (0x10_0000, 63 * MIB, 1),
            (0xe000_0000, 0x10_0000, 2),
        ]
    );
}

#[test]
fn kernel_is_unpacked_in_pieces_into_its_place() {
    // Some MiB, so that the pieces are many, with pages of zeros among them.
    let content: Vec<u8> = (0..3 * MIB + 777)
        .map(|at| {
            if at >> 14 & 3 == 3 {
                0
            } else {
                ((at * at) >> 9) as u8
            }
        })
        .collect();
    let mut kernel = linux_elf();
    let start = 0x1000;
    kernel.truncate(start);
    kernel.extend(&content);
    // The segment's bytes in the file and in memory.
    for at in [64 + 32, 64 + 40] {
        kernel[at..at + 8].copy_from_slice(&(content.len() as u64).to_le_bytes());
    }
    // The note is gone.
    kernel[64 + 56..][..4].fill(0);
    let memory = memory(64 * MIB);
    let entry = loaded(&request(&image(&gzip(&kernel))), &memory);
    assert_eq!(entry.cpu.rip, ELF_START);
    assert!(read(&memory, ELF_START, content.len()) == content);
}

#[test]
fn program_headers_far_into_a_packed_kernel_are_found() {
    let mut kernel = linux_elf();
    let headers = kernel[64..64 + 2 * 56].to_vec();
    kernel[64..64 + 2 * 56].fill(0);
    let far = kernel.len() as u64;
    kernel.extend(headers);
    kernel[32..40].copy_from_slice(&far.to_le_bytes());
    let memory = memory(64 * MIB);
    let entry = loaded(&request(&image(&gzip(&kernel))), &memory);
    assert_eq!(entry.protocol, Protocol::Linux64);
    assert_eq!(read(&memory, ELF_START, BANNER.len()), BANNER);

    kernel.truncate(far as usize + 50);
    let kernel = image(&gzip(&kernel));
    let error = plan(&request(&kernel), &memory, &Platform::default()).unwrap_err();
    assert!(matches!(error, BootError::Truncated { .. }), "{error}");
}

#[test]
fn damage_behind_a_packed_kernels_headers_is_found_while_it_is_written() {
    let mut packed = gzip(&linux_elf());
    let end = packed.len();
    packed[end - 8] ^= 1; // the check sum
    let memory = memory(64 * MIB);
    let kernel = image(&packed);
    let plan = plan(&request(&kernel), &memory, &Platform::default()).unwrap();
    let error = plan.apply(&memory).unwrap_err();
    assert!(matches!(error, BootError::Payload { .. }), "{error}");
}

#[test]
fn initrds_lie_high_one_behind_the_other_at_multiples_of_four() {
    let kernel = image(&gzip(&linux_elf()));
    let memory = memory(64 * MIB);
    let request = Request {
        initrds: &[b"first", b"second!!"],
        ..request(&kernel)
    };
    let entry = loaded(&request, &memory);
    let zero_page = entry.cpu.gpr[gpr::RSI];
    let start = u64::from(u32_at(&memory, zero_page + field::RAMDISK_IMAGE as u64));
    assert_eq!(start, 64 * MIB - 4096);
    assert_eq!(u32_at(&memory, zero_page + field::RAMDISK_SIZE as u64), 16);
    assert_eq!(read(&memory, start, 16), b"first\0\0\0second!!");
}

#[test]
fn initrd_stays_below_the_highest_address_that_the_kernel_accepts() {
    let mut kernel = image(&gzip(&linux_elf()));
    kernel[field::INITRD_ADDR_MAX..][..4].copy_from_slice(&0x1ff_ffffu32.to_le_bytes());
    let memory = memory(64 * MIB);
    let small = Request {
        initrds: &[&[1; 100]],
        ..request(&kernel)
    };
    let zero_page = loaded(&small, &memory).cpu.gpr[gpr::RSI];
    assert_eq!(
        u32_at(&memory, zero_page + field::RAMDISK_IMAGE as u64),
        0x1ff_f000
    );

    let large = vec![1; 33 << 20];
    let too_large = Request {
        initrds: &[&large],
        ..small
    };
    let error = plan(&too_large, &memory, &Platform::default()).unwrap_err();
    assert!(matches!(error, BootError::InitrdTooLarge { .. }), "{error}");
}

#[test]
fn payload_that_the_host_cannot_unpack_is_left_to_the_kernels_decompressor() {
    let kernel = image(b"\x89LZO\0\r\n\x1a\n and some payload");
    let memory = memory(64 * MIB);
    let entry = loaded(&request(&kernel), &memory);
    assert_eq!(entry.protocol, Protocol::LinuxDecompressor64);
    assert_eq!(entry.cpu.rip, 0x100_0200);
    assert_eq!(read(&memory, 0x100_0300, 4), b"\x89LZO");
    let zero_page = entry.cpu.gpr[gpr::RSI];
    assert_eq!(
        u32_at(&memory, zero_page + field::CODE32_START as u64),
        0x100_0000
    );
}

#[test]
fn kernel_without_a_64_bit_entry_is_entered_in_protected_mode() {
    let mut kernel = image(b"\x89LZO\0\r\n\x1a\n and some payload");
    kernel[field::XLOADFLAGS] = 0;
    let memory = memory(64 * MIB);
    let entry = loaded(&request(&kernel), &memory);
    assert_eq!(entry.protocol, Protocol::LinuxDecompressor32);
    assert_eq!(entry.cpu.rip, 0x100_0000);
    assert_eq!(entry.cpu.system.cr0 & (cr0::PE | cr0::PG), cr0::PE);
    assert_eq!(entry.cpu.system.efer, 0);
}

#[test]
fn bare_vmlinux_is_known_by_its_banner_and_gets_a_header() {
    let kernel = elf64(X86_64, BANNER, &note(b"GNU", 3, b"build id"));
    let memory = memory(64 * MIB);
    let entry = loaded(&request(&kernel), &memory);
    assert_eq!(entry.protocol, Protocol::Linux64);
    assert_eq!(entry.version.as_deref(), Some("6.6.6-bare (someone) #1"));
    let zero_page = entry.cpu.gpr[gpr::RSI];
    assert_eq!(read(&memory, zero_page + field::HEADER as u64, 4), b"HdrS");
}

#[test]
fn pvh_kernel_gets_start_info_with_modules_and_memory_map() {
    let kernel = elf64(X86_64, b"kernel", &pvh_note(ELF_START + 0x40));
    let memory = memory(64 * MIB);
    let request = Request {
        initrds: &[b"initrd"],
        modules: &[Module {
            data: b"module",
            command_line: "name and arguments",
        }],
        ..request(&kernel)
    };
    let entry = loaded(&request, &memory);
    assert_eq!(entry.protocol, Protocol::Pvh);
    assert_eq!(entry.cpu.rip, ELF_START + 0x40);
    assert_eq!(entry.cpu.system.cr4, 0);
    assert_eq!(entry.cpu.system.tr.limit, 0x67);
    let info = entry.cpu.gpr[gpr::RBX];
    assert_eq!(u32_at(&memory, info), 0x336e_c578);
    assert_eq!([4, 12].map(|at| u32_at(&memory, info + at)), [1, 2]);
    assert_eq!(
        text(&memory, u64_at(&memory, info + 24)),
        "console=ttyS0 quiet"
    );
    assert_eq!(read(&memory, u64_at(&memory, info + 32), 8), b"RSD PTR ");
    let modules = u64_at(&memory, info + 16);
    assert_eq!(read(&memory, u64_at(&memory, modules), 6), b"initrd");
    assert_eq!(u64_at(&memory, modules + 8), 8);
    assert_eq!(read(&memory, u64_at(&memory, modules + 32), 6), b"module");
    assert_eq!(
        text(&memory, u64_at(&memory, modules + 48)),
        "name and arguments"
    );
    let map = u64_at(&memory, info + 40);
    assert_eq!(u32_at(&memory, info + 48), 5);
    let ram = [0, 8, 16].map(|at| u64_at(&memory, map + 3 * 24 + at));
    assert_eq!(ram, [MIB, 63 * MIB, MapKind::Ram as u64]);
}

#[test]
fn multiboot_elf_gets_its_information_and_modules() {
    let kernel = elf32(&multiboot_header(0b11, &[]));
    let memory = memory(16 * MIB);
    let request = Request {
        modules: &[
            Module {
                data: &[7; 5000],
                command_line: "one",
            },
            Module {
                data: b"2",
                command_line: "two",
            },
        ],
        ..request(&kernel)
    };
    let entry = loaded(&request, &memory);
    assert_eq!(entry.protocol, Protocol::Multiboot);
    // The header has the entry point as a linear address, where it is not yet.
    assert_eq!(entry.cpu.rip, ELF_START + 0x10);
    assert_eq!(entry.cpu.gpr[gpr::RAX], 0x2bad_b002);
    let info = entry.cpu.gpr[gpr::RBX];
    let field = |offset| u32_at(&memory, info + offset);
    assert_eq!(field(0), 0b10_0100_1101);
    assert_eq!([field(4), field(8)], [639, 15 * 1024]);
    assert_eq!(text(&memory, field(16).into()), "console=ttyS0 quiet");
    assert_eq!(text(&memory, field(64).into()), "trapgate");
    assert_eq!(field(20), 2);
    let module =
        |index: u64, word: u64| u32_at(&memory, u64::from(field(24)) + index * 16 + word * 4);
    let first = u64::from(module(0, 0));
    assert_eq!(first, ELF_START + ELF_MEMORY_BYTES);
    assert_eq!(u64::from(module(0, 1)), first + 5000);
    assert_eq!(u64::from(module(1, 0)), first + 0x2000);
    assert_eq!(read(&memory, first + 0x2000, 1), b"2");
    assert_eq!(text(&memory, module(1, 2).into()), "two");
    let (length, map) = (field(44), u64::from(field(48)));
    assert_eq!((length, u32_at(&memory, map)), (5 * 24, 20));
    assert_eq!(u64_at(&memory, map + 3 * 24 + 4), MIB);
}

#[test]
fn multiboot_kernel_without_elf_headers_lies_where_its_header_says() {
    let start = 0x20_0000;
    let addresses = [
        start + 16,
        start,
        start + 0x40,
        start + 0x3000,
        start + 0x30,
    ];
    let mut kernel = vec![0x11; 16 + 48];
    kernel.extend(vec![0x22; 0x100]);
    kernel[16..16 + 32].copy_from_slice(&multiboot_header(1 << 16, &addresses));
    let memory = memory(16 * MIB);
    let request = Request {
        initrds: &[b"module"],
        ..request(&kernel)
    };
    let entry = loaded(&request, &memory);
    assert_eq!(entry.cpu.rip, u64::from(start) + 0x30);
    assert_eq!(read(&memory, start.into(), 0x40), kernel[..0x40]);
    // Not loaded: it is beyond the load end address.
    assert_eq!(read(&memory, u64::from(start) + 0x40, 1), [0]);
    assert_eq!(read(&memory, u64::from(start) + 0x3000, 6), b"module");
}

#[test]
fn multiboot_features_that_do_not_exist_are_refused() {
    let kernel = elf32(&multiboot_header(1 << 5, &[]));
    let error = plan(&request(&kernel), &memory(16 * MIB), &Platform::default()).unwrap_err();
    assert!(
        matches!(error, BootError::MultibootFlags { flags: 0x20 }),
        "{error}"
    );
}

#[test]
fn too_little_memory_says_how_much_would_do() {
    let kernel = image(b"\x89LZO and some payload");
    let initrd = vec![1; 3 << 20];
    let request = Request {
        initrds: &[&initrd],
        ..request(&kernel)
    };
    let platform = Platform::default();
    let error = plan(&request, &memory(17 * MIB), &platform).unwrap_err();
    let BootError::TooLittleMemory { needs, has, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(*has, 17 * MIB);
    assert!(error.fix().contains("--memory 64M"), "{}", error.fix());
    assert!(plan(&request, &memory(*needs), &platform).is_ok());
}

#[test]
fn requests_that_make_no_sense_are_refused_with_a_fix() {
    let memory = memory(64 * MIB);
    let platform = Platform::default();
    let linux = image(&gzip(&linux_elf()));
    let program = elf64(X86_64, b"int main", &note(b"GNU", 3, b"build id"));
    let foreign = elf64(183, b"", &[]);
    let long = "x".repeat(2048);
    let modules = [Module {
        data: b"",
        command_line: "",
    }];
    let base = request(&linux);
    let with_line = |command_line| Request {
        command_line,
        ..base
    };
    let with_modules = Request {
        modules: &modules,
        ..base
    };
    for (request, words) in [
        (with_line(&long[..]), "2048 bytes long"),
        (with_line("a\0b"), "NUL"),
        (with_modules, "modules were given"),
        (request(&program), "no way to boot"),
        (request(&foreign), "aarch64"),
        (request(&linux[..700]), "cut short"),
        (request(&linux[..100]), "zero bytes"),
        (request(b"\x7fELF\x02\x01\x01"), "cut short"),
        (request(b"\x7fELF"), "cut short"),
        (request(b"hello"), "text file"),
        (request(b""), "empty"),
    ] {
        let error = plan(&request, &memory, &platform).unwrap_err();
        assert!(error.to_string().contains(words), "{error} / {words}");
        assert!(!error.fix().is_empty());
    }
    assert!(plan(&with_line(&long[..2047]), &memory, &platform).is_ok());
}

#[test]
fn pages_of_zeros_stay_untouched() {
    let memory = memory(4 * MIB);
    let mut data = vec![0; 0x5000];
    data[0x10] = 1;
    data[0x2fff] = 2;
    data[0x3000] = 3;
    let dirty = trapgate_memory::TraceFlags::CLEAN;
    for page in 0..1024 {
        memory.traces().set(page, dirty);
    }
    write_where_not_zero(&memory, 0x10_0800, &data).unwrap();
    assert_eq!(read(&memory, 0x10_0800, data.len()), data);
    let written: Vec<_> = (0x100..0x107)
        .filter(|page| !memory.traces().get(*page).contains(dirty))
        .collect();
    // The data lies in pages 0x100 to 0x105, with bytes other than zero in these.
    assert_eq!(written, [0x100, 0x103]);
}

/// A small generator (xorshift64*), so that a failure can be repeated from its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}

#[test]
fn damaged_kernels_give_errors_or_plans_within_ram_and_never_panic() {
    const INTERESTING: [u8; 6] = [0, 1, 0x7f, 0x80, 0xfe, 0xff];
    let memory = memory(32 * MIB);
    let platform = Platform::default();
    let flat = [
        vec![0; 16],
        multiboot_header(1 << 16, &[0x10_0010, 0x10_0000, 0, 0x10_4000, 0x10_0030]),
        vec![0x90; 64],
    ]
    .concat();
    let samples = [
        image(&gzip(&linux_elf())),
        image(b"\x89LZO and some payload"),
        elf64(X86_64, BANNER, &pvh_note(ELF_START)),
        elf32(&multiboot_header(3, &[])),
        flat,
    ];
    let mut refused = 0;
    let mut planned = 0;
    for (number, sample) in samples.iter().enumerate() {
        for seed in 1..=4000 {
            let mut random = Random(seed * 8 + number as u64 + 1);
            let mut kernel = sample.clone();
            for _ in 0..=random.below(4) {
                // Headers lie in the first KiB, and in the last bytes: notes and payload size.
                let near_end = kernel.len() - 1 - random.below(64.min(kernel.len()));
                let at = [random.below(1024.min(kernel.len())), near_end][random.below(8) / 7];
                kernel[at] = match random.below(2) {
                    0 => INTERESTING[random.below(INTERESTING.len())],
                    _ => random.below(256) as u8,
                };
            }
            if random.below(10) == 0 {
                kernel.truncate(random.below(kernel.len()));
            }
            let request = Request {
                initrds: &[b"initrd"],
                ..request(&kernel)
            };
            match plan(&request, &memory, &platform) {
                Ok(plan) => {
                    planned += 1;
                    for place in plan.places() {
                        assert!(place.end <= 32 * MIB, "sample {number}, seed {seed}");
                    }
                    if let Err(error) = plan.apply(&memory) {
                        assert!(matches!(error, BootError::Payload { .. }), "{error}");
                    }
                }
                Err(error) => {
                    refused += 1;
                    assert!(!error.fix().is_empty() && !error.to_string().is_empty());
                }
            }
        }
    }
    // Both happen often, or the damage is not of the kind that tests anything.
    assert!(refused > 2000 && planned > 2000, "{refused} {planned}");
}

#[test]
fn stock_kernel_loads_as_its_headers_say() {
    let Some(path) = std::env::var_os("TRAPGATE_TEST_KERNEL") else {
        // Not through the test harness, which would swallow it.
        let mut stderr = std::io::stderr();
        let _ = writeln!(
            stderr,
            "skipped: TRAPGATE_TEST_KERNEL does not name a Linux bzImage"
        );
        return;
    };
    let kernel = std::fs::read(path).unwrap();
    let memory = memory(512 * MIB);
    let entry = loaded(&request(&kernel), &memory);
    assert_eq!(entry.protocol, Protocol::Linux64);
    let version = entry.version.unwrap();
    assert!(version.starts_with(|first: char| first.is_ascii_digit()));
    // The banner that the unpacked kernel holds names the same release as the boot header.
    let release = version.split(' ').next().unwrap();
    let image = BzImage::parse(&kernel).unwrap();
    let Ok(Some(KernelProper::Packed(mut packed))) = image.kernel_proper(512 * MIB) else {
        panic!("not a kernel that the host unpacks");
    };
    let vmlinux = packed.head(u64::MAX).unwrap();
    assert!(linux_version(vmlinux).unwrap().starts_with(release));
    let elf = Elf::parse(vmlinux, vmlinux.len() as u64).unwrap();
    assert_eq!(entry.cpu.rip, elf.physical_entry());
    for segment in &elf.segments {
        let data = &vmlinux[segment.file.start as usize..segment.file.end as usize];
        let loaded = read(&memory, segment.physical, data.len());
        assert!(loaded == data, "{:#x}", segment.physical);
    }
}
