//! SMBIOS tables, by which a guest can tell what machine it runs on (DSP0134 3.6).

/// Guest-physical address of the entry point; kernels scan 0xf0000 to 0xfffff for it.
const ADDRESS: u64 = 0xf_0000;
/// Address of the structures.
const STRUCTURES: u64 = ADDRESS + 0x20;

/// The entry point and the structures, with their guest-physical addresses. `memory` is the size of
/// RAM in bytes.
pub(crate) fn tables(memory: u64) -> Vec<(u64, Vec<u8>)> {
    let mut structures = Vec::new();
    // BIOS information (7.1): vendor, version, segment, date, ROM size, characteristics: "not
    // supported", and in the second extension byte: a virtual machine.
    let mut bios = vec![1, 2, 0, 0xe0, 3, 0];
    bios.extend((1u64 << 3).to_le_bytes());
    bios.extend([0, 1 << 4, 0xff, 0xff, 0xff, 0xff]);
    let version = env!("CARGO_PKG_VERSION");
    add(
        &mut structures,
        0,
        &bios,
        &["trapgate", version, "01/01/2026"],
    );
    // System information (7.2): manufacturer, product, version, no serial number or UUID, woken by
    // the power switch.
    let mut system = vec![1, 2, 3, 0];
    system.extend([0; 16]);
    system.extend([6, 0, 0]);
    add(
        &mut structures,
        1,
        &system,
        &["trapgate", "trapgate virtual machine", version],
    );
    // Chassis (7.4): of type "other", all states safe.
    add(
        &mut structures,
        3,
        &[1, 1, 0, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0],
        &["trapgate"],
    );
    // Physical memory array (7.17) for system memory, with one device slot.
    let mut array = vec![1, 3, 6];
    array.extend(0x8000_0000u32.to_le_bytes());
    array.extend(0xfffeu16.to_le_bytes());
    array.extend(1u16.to_le_bytes());
    array.extend(memory.to_le_bytes());
    add(&mut structures, 16, &array, &[]);
    // End of table (7.45).
    add(&mut structures, 127, &[], &[]);

    // The 64-bit entry point (5.2.2).
    let mut entry = b"_SM3_\0\x18\x03\x06\0\x01\0".to_vec();
    entry.extend((structures.len() as u32).to_le_bytes());
    entry.extend(STRUCTURES.to_le_bytes());
    let sum = entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
    entry[5] = sum.wrapping_neg();
    vec![(ADDRESS, entry), (STRUCTURES, structures)]
}

/// Adds a structure of `kind`: its header, its formatted area, and its strings.
fn add(structures: &mut Vec<u8>, kind: u8, formatted: &[u8], strings: &[&str]) {
    structures.extend([kind, formatted.len() as u8 + 4]);
    structures.extend(u16::from(kind).to_le_bytes());
    structures.extend(formatted);
    for string in strings {
        structures.extend(string.as_bytes());
        structures.push(0);
    }
    if strings.is_empty() {
        structures.push(0);
    }
    structures.push(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_point_sums_to_zero_and_structures_end_with_the_end_marker() {
        let tables = tables(1 << 30);
        let [(_, entry), (address, structures)] = &tables[..] else {
            panic!("{tables:?}");
        };
        let sum = entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!((sum, entry.len()), (0, 24));
        assert_eq!(entry[16..24], address.to_le_bytes());
        let mut rest = &structures[..];
        let mut kinds = Vec::new();
        while !rest.is_empty() {
            kinds.push(rest[0]);
            let strings = usize::from(rest[1]);
            let end = rest[strings..].windows(2).position(|pair| pair == [0, 0]);
            rest = &rest[strings + end.unwrap() + 2..];
        }
        assert_eq!(kinds, [0, 1, 3, 16, 127]);
    }
}
