//! The tables, read back by a parser that knows only the specification's layouts.

use super::*;
use crate::platform::Window;

fn platform(processors: u32) -> Platform {
    Platform {
        apic_ids: (0..processors).collect(),
        pci_interrupts: [16, 17, 18, 19],
        pci_window_64: Some(Window {
            start: 1 << 38,
            length: 1 << 36,
        }),
        ..Platform::default()
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// The tables in a copy of the BIOS area.
fn area(platform: &Platform) -> Vec<u8> {
    let mut area = vec![0; (END - BIOS_START) as usize];
    for (address, bytes) in tables(platform).unwrap() {
        let at = (address - BIOS_START) as usize;
        area[at..at + bytes.len()].copy_from_slice(&bytes);
    }
    area
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The table at a guest-physical address, by its own length field.
fn table_at(area: &[u8], address: u64) -> &[u8] {
    let at = (address - BIOS_START) as usize;
    let length = u32_at(area, at + 4) as usize;
    &area[at..at + length]
}

/// Tables by signature, found from the RSDP through the XSDT.
fn find<'a>(area: &'a [u8], signature: &[u8]) -> Option<&'a [u8]> {
    let xsdt = table_at(area, u64_at(area, 24));
    xsdt[36..]
        .chunks_exact(8)
        .map(|entry| table_at(area, u64_at(entry, 0)))
        .find(|table| table.starts_with(signature))
}

/// Type and content of the MADT's entries.
fn madt_entries(madt: &[u8]) -> Vec<(u8, &[u8])> {
    let mut rest = &madt[44..];
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (entry, tail) = rest.split_at(usize::from(rest[1]));
        entries.push((entry[0], &entry[2..]));
        rest = tail;
    }
    entries
}

#[test]
fn every_table_is_reached_from_the_rsdp_and_sums_to_zero() {
    let area = area(&platform(2));
    assert!(area.starts_with(b"RSD PTR "));
    assert_eq!(sum(&area[..20]), 0);
    assert_eq!(sum(&area[..36]), 0);
    let rsdt = table_at(&area, u32_at(&area, 16).into());
    let xsdt = table_at(&area, u64_at(&area, 24));
    assert_eq!((sum(rsdt), sum(xsdt)), (0, 0));
    assert!(rsdt.starts_with(b"RSDT") && xsdt.starts_with(b"XSDT"));
    let short: Vec<_> = rsdt[36..]
        .chunks(4)
        .map(|e| u64::from(u32_at(e, 0)))
        .collect();
    let long: Vec<_> = xsdt[36..].chunks(8).map(|e| u64_at(e, 0)).collect();
    assert_eq!(short, long);
    for signature in [b"FACP", b"APIC", b"MCFG", b"HPET"] {
        assert_eq!(sum(find(&area, signature).unwrap()), 0);
    }
}

#[test]
fn fadt_has_the_platforms_ports_and_its_tables() {
    let area = area(&platform(1));
    let fadt = find(&area, b"FACP").unwrap();
    let facs = table_at(&area, u32_at(fadt, 36).into());
    assert!(facs.starts_with(b"FACS"));
    assert_eq!(u32_at(fadt, 36) % 64, 0);
    let dsdt = table_at(&area, u64_at(fadt, 140));
    assert!(dsdt.starts_with(b"DSDT"));
    assert_eq!((sum(dsdt), u32_at(fadt, 40)), (0, u64_at(fadt, 140) as u32));
    assert_eq!(
        [56, 64, 76].map(|at| u32_at(fadt, at)),
        [0x600, 0x604, 0x608]
    );
    assert_eq!(
        [152, 176, 212, 120].map(|at| u64_at(fadt, at)),
        [0x600, 0x604, 0x608, 0xcf9]
    );
    // SCI, no SMI command, reset value.
    assert_eq!((fadt[46], u32_at(fadt, 48), fadt[128]), (9, 0, 6));
}

#[test]
fn madt_lists_processors_io_apic_overrides_and_nmi() {
    let area = area(&platform(2));
    let entries = madt_entries(find(&area, b"APIC").unwrap());
    let expected: &[(u8, &[u8])] = &[
        (0, &[0, 0, 1, 0, 0, 0]),
        (0, &[1, 1, 1, 0, 0, 0]),
        (1, &[0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]),
        (2, &[0, 0, 2, 0, 0, 0, 0, 0]),
        (2, &[0, 9, 9, 0, 0, 0, 0xd, 0]),
        (4, &[0xff, 0, 0, 1]),
    ];
    assert_eq!(entries, expected);
}

#[test]
fn processors_beyond_the_xapic_get_x2apic_entries() {
    let area = area(&platform(300));
    let entries = madt_entries(find(&area, b"APIC").unwrap());
    let of_type = |kind| entries.iter().filter(|entry| entry.0 == kind).count();
    assert_eq!([0, 9, 10].map(of_type), [255, 45, 1]);
    let last = entries.iter().rfind(|entry| entry.0 == 9).unwrap();
    assert_eq!((u32_at(last.1, 2), u32_at(last.1, 10)), (299, 299));
}

#[test]
fn shared_pci_interrupts_below_16_are_declared_level_triggered() {
    let area = area(&Platform::default());
    let entries = madt_entries(find(&area, b"APIC").unwrap());
    for gsi in [10, 11] {
        let entry: &[u8] = &[0, gsi, gsi, 0, 0, 0, 0xd, 0];
        assert!(entries.contains(&(2, entry)));
    }
}

#[test]
fn tables_for_absent_devices_are_absent() {
    let platform = Platform {
        ecam: None,
        hpet: None,
        ..Platform::default()
    };
    let area = area(&platform);
    assert!(find(&area, b"MCFG").is_none() && find(&area, b"HPET").is_none());
    assert!(find(&area, b"FACP").is_some());
}

#[test]
fn too_many_processors_for_the_bios_area_are_an_error() {
    let error = tables(&platform(4000)).unwrap_err();
    assert!(error.to_string().contains("4000 processors"), "{error}");
}

#[test]
fn dsdt_names_its_devices() {
    let dsdt = dsdt::table(&platform(3));
    for name in [
        b"PCI0", b"_PRT", b"_OSC", b"MBRD", b"COM1", b"COM2", b"RTC0", b"PS2K", b"PS2M", b"HPET",
        b"C002", b"_S5_",
    ] {
        assert!(memchr::memmem::find(&dsdt, name).is_some(), "{name:?}");
    }
    // \_S5: soft off is sleep type 5 (7.4.2).
    let s5 = memchr::memmem::find(&dsdt, b"_S5_").unwrap();
    assert_eq!(dsdt[s5 + 4..s5 + 13], [0x12, 8, 4, 0x0a, 5, 0x0a, 5, 0, 0]);
}
