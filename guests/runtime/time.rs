//! How fast the TSC runs.

use crate::{cpu, pit};

/// TSC ticks per second and where the figure comes from.
pub struct TscFrequency {
    pub hertz: u64,
    pub source: &'static str,
}

/// Looks for the frequency where a hypervisor puts it (leaf 0x4000_0010, kHz), then where the CPU
/// puts it (leaf 0x15), and else measures it against the interval timer.
pub fn tsc_frequency() -> TscFrequency {
    const HYPERVISOR_PRESENT: u32 = 1 << 31;
    if cpu::cpuid(1, 0).ecx & HYPERVISOR_PRESENT != 0
        && cpu::cpuid(0x4000_0000, 0).eax >= 0x4000_0010
    {
        let kilohertz = cpu::cpuid(0x4000_0010, 0).eax;
        if kilohertz != 0 {
            return TscFrequency {
                hertz: u64::from(kilohertz) * 1000,
                source: "hypervisor",
            };
        }
    }
    if cpu::cpuid(0, 0).eax >= 0x15 {
        let leaf = cpu::cpuid(0x15, 0);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            let hertz = u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax);
            return TscFrequency {
                hertz,
                source: "cpuid",
            };
        }
    }
    const TICKS: u16 = 11_932; // 10 ms
    let start = cpu::read_tsc();
    pit::wait(TICKS);
    let elapsed = cpu::read_tsc() - start;
    TscFrequency {
        hertz: elapsed * pit::FREQUENCY / u64::from(TICKS),
        source: "timer",
    }
}

/// `ticks` of the TSC in nanoseconds.
pub fn nanoseconds(ticks: u64, frequency: &TscFrequency) -> u64 {
    (u128::from(ticks) * 1_000_000_000 / u128::from(frequency.hertz.max(1))) as u64
}
