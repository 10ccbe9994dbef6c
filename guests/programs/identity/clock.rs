//! The paravirtual clock that leaf 0x4000_0001 offers (Linux Documentation/virt/kvm/x86/msr.rst).

use runtime::println;

use crate::register::Register;

const OLD: [u32; 2] = [0x11, 0x12];
const NEW: [u32; 2] = [0x4B56_4D00, 0x4B56_4D01];

#[repr(C, align(64))]
struct Shared([u32; 16]);

static mut SHARED: Shared = Shared([0; 16]);

fn word(index: usize) -> u32 {
    // SAFETY: inside the array; the machine writes it while an MSR is written.
    unsafe { (&raw const SHARED).cast::<u32>().add(index).read_volatile() }
}

pub fn show() {
    // SAFETY: an address, no access.
    let address = (&raw const SHARED) as u64;
    for (name, [wall_clock, system_time]) in [("old", OLD), ("new", NEW)] {
        let written = Register::Msr(wall_clock).write(address);
        println!(
            "wall clock, {name}: {}, version {}, of this century {}, nanoseconds {}",
            taken(written.is_ok()),
            even(word(0)),
            u8::from(word(1) > 946_684_800),
            if word(2) < 1_000_000_000 {
                "right"
            } else {
                "wrong"
            }
        );
        // Bit 0 turns it on.
        let written = Register::Msr(system_time).write(address | 1);
        println!(
            "system time, {name}: {}, version {}, scale {}, flags {:#x}, reads back {}",
            taken(written.is_ok()),
            even(word(0)),
            if word(6) != 0 { "there" } else { "none" },
            word(7) >> 8 & 0xFF,
            u8::from(Register::Msr(system_time).read().ok() == Some(address | 1))
        );
        let _ = Register::Msr(system_time).write(0);
    }
}

fn taken(taken: bool) -> &'static str {
    if taken { "taken" } else { "refused" }
}

/// Odd: being written. Zero: never written.
fn even(version: u32) -> &'static str {
    match (version, version % 2) {
        (0, _) => "zero",
        (_, 0) => "even",
        _ => "odd",
    }
}
