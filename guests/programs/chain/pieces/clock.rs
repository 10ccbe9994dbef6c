//! The paravirtual clock: its register, and whether the time that it shows goes on.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use runtime::cpu;

use super::Piece;

/// Linux `Documentation/virt/kvm/x86/msr.rst`, `MSR_KVM_SYSTEM_TIME_NEW`.
const SYSTEM_TIME: u32 = 0x4B56_4D01;
const ENABLED: u64 = 1;

pub(super) static PIECES: [Piece; 1] = [Piece::new(
    "kvmclock",
    |random| random & 1,
    |which| cpu::write_msr(SYSTEM_TIME, place(which) as u64 | ENABLED),
    clock,
)
.if_it(|| {
    cpu::cpuid(0x4000_0000, 0).ebx == u32::from_le_bytes(*b"KVMK")
        && cpu::cpuid(0x4000_0001, 0).eax & 1 << 3 != 0
})];

/// `pvclock_vcpu_time_info`.
#[repr(C, align(32))]
struct Shared([u32; 8]);

static mut SHARED: [Shared; 2] = [const { Shared([0; 8]) }; 2];
/// What the clock showed last, in nanoseconds.
static LAST: AtomicU64 = AtomicU64::new(0);

fn place(which: u64) -> *const Shared {
    (&raw const SHARED)
        .cast::<Shared>()
        .wrapping_add(which as usize)
}

/// Which of the two places the clock is at; more than that if it has stopped being right.
fn clock() -> u64 {
    let register = cpu::read_msr(SYSTEM_TIME);
    let Some(which) = (0..2).find(|&which| place(which) as u64 | ENABLED == register) else {
        return register;
    };
    let now = time(place(which));
    let went_back = now < LAST.swap(now, Relaxed);
    which | u64::from(went_back) << 8 | u64::from(now == 0) << 9
}

/// The time in nanoseconds, by the formula of the kernel's documentation.
fn time(shared: *const Shared) -> u64 {
    // SAFETY: one of the two; the machine may write there, between two instructions.
    let words = || unsafe { shared.read_volatile().0 };
    loop {
        let [
            version,
            _,
            tsc_low,
            tsc_high,
            time_low,
            time_high,
            multiplier,
            shift_and_flags,
        ] = words();
        let now = cpu::read_tsc();
        // Written in between, or just now.
        if version & 1 != 0 || words()[..6] != [version, 0, tsc_low, tsc_high, time_low, time_high]
        {
            continue;
        }
        let wide = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
        let ticks = now.wrapping_sub(wide(tsc_low, tsc_high));
        let ticks = match shift_and_flags as i8 {
            right @ ..0 => ticks >> right.unsigned_abs(),
            left => ticks << left,
        };
        let passed = (u128::from(ticks) * u128::from(multiplier)) >> 32;
        return wide(time_low, time_high) + passed as u64;
    }
}
