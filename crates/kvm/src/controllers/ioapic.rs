//! The I/O APIC's state, between the chipset's form and the kernel's (`struct kvm_ioapic_state`).

use trapgate_chipset::ioapic::IoApicState;
use trapgate_chipset::map::IO_APIC_ADDRESS;

const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
/// Bits of an entry that are kept: what the guest may write (82093AA, 3.2.4).
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// The registers as the kernel has them, without its unions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct KernelIoApic {
    pub(crate) base: u64,
    pub(crate) index: u32,
    pub(crate) id: u32,
    /// Pins that the kernel is to look at again when it gets this: asserted levels, unsent edges.
    pub(crate) requests: u32,
    pub(crate) entries: [u64; 24],
}

/// For the kernel, which sends what is in `requests`: an edge that was sent before must not be in it.
pub(crate) fn to_kernel(state: &IoApicState) -> KernelIoApic {
    let IoApicState {
        id,
        index,
        entries,
        asserted,
        edges,
    } = state;
    let levels = (0..24)
        .filter(|&pin| entries[pin] & LEVEL != 0)
        .fold(0, |levels, pin| levels | 1 << pin);
    KernelIoApic {
        base: IO_APIC_ADDRESS,
        index: (*index).into(),
        id: id >> 24,
        requests: asserted & levels | edges & !levels,
        entries: *entries,
    }
}

/// The inverse of [`to_kernel`]. The levels are the chipset's to know, and the kernel keeps no edge
/// that it could not send.
pub(crate) fn from_kernel(kernel: &KernelIoApic) -> IoApicState {
    IoApicState {
        id: kernel.id << 24 & 0x0f00_0000,
        index: kernel.index as u8,
        entries: kernel.entries.map(|entry| {
            let waits = if entry & LEVEL != 0 { REMOTE_IRR } else { 0 };
            entry & (WRITABLE | waits)
        }),
        asserted: 0,
        edges: 0,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn registers_come_back(id in 0u32..16, index: u8, entries: [u64; 24]) {
            let state = IoApicState {
                id: id << 24,
                index,
                entries: entries.map(|entry| {
                    entry & (WRITABLE | if entry & LEVEL != 0 { REMOTE_IRR } else { 0 })
                }),
                asserted: 0,
                edges: 0,
            };
            prop_assert_eq!(from_kernel(&to_kernel(&state)), state);
        }
    }

    #[test]
    fn kernel_is_asked_for_levels_and_unsent_edges_only() {
        let mut entries = [0; 24];
        entries[1] = LEVEL;
        entries[2] = LEVEL | REMOTE_IRR;
        let state = IoApicState {
            id: 0,
            index: 0,
            entries,
            asserted: 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4,
            edges: 1 << 4,
        };
        assert_eq!(to_kernel(&state).requests, 1 << 1 | 1 << 2 | 1 << 4);
    }
}
