//! Tests of the built images: a loader must find in them what it looks for.

use crate::{BUILTIN, Program, all, named};

const MULTIBOOT_MAGIC: u32 = 0x1BAD_B002;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn segments(image: &[u8]) -> Vec<Segment> {
    let table = long(image, 32) as usize;
    let count = usize::from(u16::from_le_bytes(image[56..58].try_into().unwrap()));
    (0..count)
        .map(|index| {
            let at = table + index * 56;
            Segment {
                kind: word(image, at),
                offset: long(image, at + 8),
                address: long(image, at + 24),
                file_size: long(image, at + 32),
                memory_size: long(image, at + 40),
            }
        })
        .collect()
}

#[test]
fn programs_are_found_by_name() {
    assert!(all().is_sorted_by_key(|program| program.name));
    assert_eq!(named("hello").map(|program| program.image), Some(BUILTIN));
    assert!(named("nobody").is_none());
}

#[test]
fn images_are_static_64_bit_elf_files_loaded_at_1_mib() {
    for Program { name, image, .. } in all() {
        assert_eq!(&image[..7], b"\x7fELF\x02\x01\x01", "{name}");
        assert_eq!(&image[16..20], [2, 0, 62, 0], "{name}: executable, x86-64");
        let loads: Vec<_> = segments(image)
            .into_iter()
            .filter(|segment| segment.kind == PT_LOAD)
            .collect();
        assert_eq!(loads[0].address, 0x10_0000, "{name}");
    }
}

/// A multiboot loader with address fields copies the file as one piece.
#[test]
fn addresses_and_file_offsets_keep_their_distance() {
    for Program { name, image, .. } in all() {
        let loads: Vec<_> = segments(image)
            .into_iter()
            .filter(|segment| segment.kind == PT_LOAD)
            .collect();
        let distance = loads[0].address - loads[0].offset;
        assert!(
            loads
                .iter()
                .all(|segment| segment.address - segment.offset == distance),
            "{name}"
        );
        // Only the last segment has a part that is not in the file.
        let (_, first) = loads.split_last().unwrap();
        assert!(
            first
                .iter()
                .all(|segment| segment.file_size == segment.memory_size),
            "{name}"
        );
    }
}

#[test]
fn multiboot_header_is_early_aligned_and_consistent() {
    for Program { name, image, .. } in all() {
        let at = (0..8192)
            .step_by(4)
            .find(|&at| word(image, at) == MULTIBOOT_MAGIC);
        let at = at.unwrap_or_else(|| panic!("{name}: no multiboot header"));
        let sum = word(image, at)
            .wrapping_add(word(image, at + 4))
            .wrapping_add(word(image, at + 8));
        assert_eq!(sum, 0, "{name}: checksum");
        let loads: Vec<_> = segments(image)
            .into_iter()
            .filter(|segment| segment.kind == PT_LOAD)
            .collect();
        let [header, load, load_end, bss_end, _entry] =
            [12, 16, 20, 24, 28].map(|field| u64::from(word(image, at + field)));
        assert_eq!(header - load, at as u64 - loads[0].offset, "{name}");
        assert_eq!(load, loads[0].address, "{name}");
        let last = loads.last().unwrap();
        assert_eq!(load_end, last.address + last.file_size, "{name}");
        assert_eq!(bss_end, last.address + last.memory_size, "{name}");
    }
}

#[test]
fn pvh_note_names_the_elf_entry() {
    for Program { name, image, .. } in all() {
        let note = segments(image)
            .into_iter()
            .find(|segment| segment.kind == PT_NOTE);
        let at = note.unwrap_or_else(|| panic!("{name}: no note")).offset as usize;
        assert_eq!(
            [word(image, at), word(image, at + 4), word(image, at + 8)],
            [4, 8, 18],
            "{name}"
        );
        assert_eq!(&image[at + 12..at + 16], b"Xen\0", "{name}");
        assert_eq!(long(image, at + 16), long(image, 24), "{name}");
    }
}

/// A panic message in a guest must not tell where the image was built.
#[test]
fn images_name_no_directory_of_the_build_machine() {
    let here = env!("CARGO_MANIFEST_DIR").as_bytes();
    for Program { name, image, .. } in all() {
        assert!(
            !image.windows(here.len()).any(|window| window == here),
            "{name}"
        );
    }
}

/// A guest that died early must not pass for one that said all it had to say.
#[test]
fn expected_outputs_end_with_the_guests_last_line() {
    let expected: Vec<_> = all()
        .iter()
        .filter_map(|program| Some((program.name, program.expected?)))
        .collect();
    assert!(expected.len() >= 8, "every program but hello");
    for (name, text) in expected {
        assert_eq!(text.lines().last(), Some(format!("{name}: done").as_str()));
        assert!(!text.contains(['\r', '\t']), "{name}");
    }
}
