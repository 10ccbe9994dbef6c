//! The state in which boot loaders enter kernels, and in which firmware leaves other processors.

use trapgate_x86::descriptor::{access, system};
use trapgate_x86::registers::{cr0, cr4, efer, sreg};
use trapgate_x86::{Activity, CpuState, Segment, TableRegister};

/// Code selector of the boot protocol (`__BOOT_CS`; boot.rst, "64-bit Boot Protocol").
const CODE: u16 = 0x10;
/// Data selector (`__BOOT_DS`).
const DATA: u16 = 0x18;
/// Selector of the task state segment.
const TSS: u16 = 0x20;
/// MTRR default type register: enabled, fixed ranges too, write-back (SDM vol. 3A, 12.11.2.1).
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// Mode that a kernel is entered in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Protected mode with flat 32-bit segments, without paging.
    Protected,
    /// 64-bit mode with the page tables at this guest-physical address.
    Long {
        /// Guest-physical address of the top-level page table.
        page_tables: u64,
    },
}

impl Mode {
    fn code_segment(self) -> Segment {
        let size = match self {
            Self::Protected => access::DB,
            Self::Long { .. } => access::L,
        };
        Segment::flat(CODE, access::CODE | access::READABLE | size)
    }

    /// The global descriptor table to go with the segments, so that a kernel may load them again.
    pub(crate) fn gdt(self) -> Vec<u8> {
        let entries = [
            0,
            0,
            descriptor(self.code_segment()),
            descriptor(data_segment()),
            descriptor(task_segment()),
            // Upper half of the 64-bit mode's task descriptor.
            0,
        ];
        entries
            .iter()
            .flat_map(|entry| entry.to_le_bytes())
            .collect()
    }

    /// A processor that is about to run `entry` in this mode: interrupts off, everything else as
    /// after reset. `gdt` is the guest-physical address of [`Self::gdt`].
    pub(crate) fn state(self, entry: u64, gdt: u64) -> CpuState {
        let mut cpu = CpuState {
            rip: entry,
            ..CpuState::default()
        };
        let system = &mut cpu.system;
        system.mtrrs.default_type = MTRR_WRITE_BACK;
        system.segments = [data_segment(); 6];
        system.segments[sreg::CS] = self.code_segment();
        system.ldtr = Segment::null(0);
        system.tr = task_segment();
        system.gdtr = TableRegister {
            base: gdt,
            limit: self.gdt().len() as u16 - 1,
        };
        system.idtr = TableRegister { base: 0, limit: 0 };
        system.cr0 = cr0::PE | cr0::ET;
        if let Self::Long { page_tables } = self {
            system.cr0 |= cr0::PG;
            system.cr3 = page_tables;
            system.cr4 = cr4::PAE;
            system.efer = efer::LME | efer::LMA;
        }
        cpu
    }
}

fn data_segment() -> Segment {
    Segment::flat(DATA, access::WRITABLE | access::DB)
}

/// A busy 32-bit TSS of minimal size at address 0, as PVH demands
/// (xen/include/public/arch-x86/hvm/start_info.h).
fn task_segment() -> Segment {
    Segment {
        selector: TSS,
        base: 0,
        limit: 0x67,
        access: access::P | system::TSS_BUSY,
    }
}

/// The descriptor from which loading gives `segment`, whose base is 0.
fn descriptor(segment: Segment) -> u64 {
    let limit = if segment.has(access::G) {
        segment.limit >> 12
    } else {
        segment.limit
    };
    let (low, high) = (u64::from(limit & 0xffff), u64::from(limit >> 16));
    low | high << 48 | u64::from(segment.access & 0xf0ff) << 40
}

/// The state in which firmware leaves every processor but the first: waiting for a start-up IPI,
/// with the memory type registers set as the boot processor's are.
pub fn application_processor() -> CpuState {
    let mut cpu = CpuState::default();
    cpu.system.mtrrs.default_type = MTRR_WRITE_BACK;
    cpu.system.activity = Activity::WaitForSipi;
    cpu
}

#[cfg(test)]
mod tests {
    use trapgate_x86::Descriptor;

    use super::*;

    #[test]
    fn descriptors_load_as_the_segments_that_are_set() {
        for mode in [
            Mode::Protected,
            Mode::Long {
                page_tables: 0x9000,
            },
        ] {
            let gdt = mode.gdt();
            let state = mode.state(0x100_0000, 0x1000);
            let segments = state.system.segments.iter().chain([&state.system.tr]);
            for segment in segments {
                let at = usize::from(segment.selector);
                let bytes = gdt[at..at + 8].try_into().unwrap();
                let loaded = Descriptor(u64::from_le_bytes(bytes)).segment(segment.selector);
                assert_eq!(loaded, *segment);
            }
            assert_eq!(usize::from(state.system.gdtr.limit), gdt.len() - 1);
        }
    }
}
