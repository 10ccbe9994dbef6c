//! The paravirtual clock that stock kernels know from KVM
//! (Linux `Documentation/virt/kvm/x86/msr.rst`, `MSR_KVM_SYSTEM_TIME_NEW`).

/// `pvclock_vcpu_time_info`: 32 bytes, 4-byte aligned in guest memory. Time is
/// `system_time + (((tsc - tsc_timestamp) << shift) * multiplier >> 32)` nanoseconds.
pub fn time_info(tsc: u64, nanoseconds: u64, tsc_hz: u64, version: u32) -> [u8; 32] {
    let (multiplier, shift) = scale(tsc_hz);
    let mut info = [0; 32];
    info[0..4].copy_from_slice(&version.to_le_bytes());
    info[8..16].copy_from_slice(&tsc.to_le_bytes());
    info[16..24].copy_from_slice(&nanoseconds.to_le_bytes());
    info[24..28].copy_from_slice(&multiplier.to_le_bytes());
    info[28] = shift as u8;
    // PVCLOCK_TSC_STABLE_BIT: all processors' clocks agree.
    info[29] = 1;
    info
}

/// `pvclock_wall_clock`: 12 bytes; the time of day when VM time was zero.
pub fn wall_clock(seconds: u32, nanoseconds: u32, version: u32) -> [u8; 12] {
    let mut clock = [0; 12];
    clock[0..4].copy_from_slice(&version.to_le_bytes());
    clock[4..8].copy_from_slice(&seconds.to_le_bytes());
    clock[8..12].copy_from_slice(&nanoseconds.to_le_bytes());
    clock
}

/// Multiplier (a 32-bit fraction) and left shift that turn ticks of `hz` into nanoseconds. The
/// multiplier has its top bit set, for precision.
fn scale(hz: u64) -> (u32, i8) {
    let mut shift = 0i8;
    let mut numerator = 1_000_000_000u128 << 32;
    let hz = u128::from(hz.max(1));
    while numerator / hz >= 1 << 32 {
        numerator >>= 1;
        shift += 1;
    }
    while numerator / hz < 1 << 31 {
        numerator <<= 1;
        shift -= 1;
    }
    ((numerator / hz) as u32, shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nanoseconds(ticks: u64, hz: u64) -> u64 {
        let (multiplier, shift) = scale(hz);
        let ticks = if shift < 0 {
            ticks >> -shift
        } else {
            ticks << shift
        };
        ((u128::from(ticks) * u128::from(multiplier)) >> 32) as u64
    }

    #[test]
    fn scale_turns_ticks_into_nanoseconds() {
        for hz in [100_000_000, 1_000_000_000, 2_000_000_000, 2_893_204_000] {
            let hour = nanoseconds(hz * 3600, hz);
            let error = hour.abs_diff(3_600_000_000_000);
            // The multiplier has 31 significant bits: under 0.5 ppb, 2 us an hour.
            assert!(error < 2_000_000, "{hz} Hz is off by {error} ns an hour");
        }
    }
}
