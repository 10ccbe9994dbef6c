//! What a machine remembers, piece by piece: written, left alone for a while, read back.

mod chipset;
mod clock;
mod segments;
mod system;

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use runtime::interrupts::{self, TrapFrame};
use runtime::{cpu, local_apic, println};

use crate::mix::Hash;

/// Something that keeps a value.
struct Piece {
    name: &'static str,
    /// Whether this machine has it.
    exists: fn() -> bool,
    /// A value that it can keep, from a random one.
    fit: fn(u64) -> u64,
    write: fn(u64),
    read: fn() -> u64,
}

impl Piece {
    const fn new(
        name: &'static str,
        fit: fn(u64) -> u64,
        write: fn(u64),
        read: fn() -> u64,
    ) -> Piece {
        Piece {
            name,
            exists: || true,
            fit,
            write,
            read,
        }
    }

    const fn if_it(mut self, exists: fn() -> bool) -> Piece {
        self.exists = exists;
        self
    }
}

/// In the order in which they are read, and then written.
static PIECES: [&[Piece]; 4] = [
    &system::PIECES,
    &segments::PIECES,
    &chipset::PIECES,
    &clock::PIECES,
];
const MOST: usize = 64;

pub struct Pieces {
    /// What each holds; `None`: it is not there, or left out.
    held: [Option<u64>; MOST],
    /// How often one held something else.
    pub lost: u32,
    has_watch: bool,
    has_nmi: bool,
}

fn all() -> impl Iterator<Item = (usize, &'static Piece)> {
    PIECES.iter().copied().flatten().enumerate()
}

impl Pieces {
    /// `left_out` names pieces, separated by commas.
    pub fn new(left_out: &str) -> Pieces {
        let wanted = |name: &str| left_out.split(',').all(|other| other != name);
        let mut pieces = Pieces {
            held: [None; MOST],
            lost: 0,
            has_watch: wanted("watch"),
            has_nmi: wanted("nmi"),
        };
        interrupts::set_handler(1, watched);
        interrupts::set_handler(2, non_maskable);
        segments::prepare();
        system::prepare();
        for (index, piece) in all() {
            if wanted(piece.name) && (piece.exists)() {
                let value = (piece.fit)(0x5851_F42D_4C95_7F2D);
                (piece.write)(value);
                pieces.held[index] = Some(value);
            } else {
                println!("note: without {}", piece.name);
            }
        }
        pieces
    }

    /// Reads and compares all, then writes other values.
    pub fn visit(&mut self, number: u64, hash: &mut Hash) {
        for (index, piece) in all() {
            let Some(expected) = self.held[index] else {
                continue;
            };
            let value = (piece.read)();
            if value != expected {
                self.lost += 1;
                println!(
                    "chain: lost {}: {value:#x} instead of {expected:#x}",
                    piece.name
                );
            }
            hash.take(value);
        }
        let traps = UNEXPECTED_TRAPS.swap(0, Relaxed);
        if traps != 0 {
            self.lost += 1;
            println!("chain: {traps} debug exceptions that nobody asked for");
        }
        if self.has_watch {
            let events = watch(number % 8 == 0);
            hash.take(events.into());
        }
        if self.has_nmi && number % 4 == 0 {
            hash.take(interrupt_without_mask());
        }
        for (index, piece) in all() {
            if let Some(held) = &mut self.held[index] {
                let random = (hash.value() ^ index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
                *held = (piece.fit)(random ^ random >> 32);
                (piece.write)(*held);
            }
        }
    }
}

/// Like an address: the upper 16 bits repeat bit 47.
fn canonical(random: u64) -> u64 {
    ((random << 16) as i64 >> 16) as u64
}

static WATCHED: AtomicU64 = AtomicU64::new(0);
static WATCH_EVENTS: AtomicU32 = AtomicU32::new(0);

/// Others: of a TF that an engine left behind, say.
static UNEXPECTED_TRAPS: AtomicU32 = AtomicU32::new(0);

fn watched(_: &mut TrapFrame) {
    // Breakpoint 3, and nothing else.
    let events = if cpu::read_dr6() & 0xE00F == 8 {
        &WATCH_EVENTS
    } else {
        &UNEXPECTED_TRAPS
    };
    events.fetch_add(1, Relaxed);
    cpu::write_dr6(0xFFFF_0FF0);
}

/// Writes where breakpoint 3 points, with the breakpoint on or off: how often that was noticed.
fn watch(on: bool) -> u32 {
    const WRITE_OF_8_BYTES: u64 = (0b1001 << 28) | 1 << 6;
    let before = WATCH_EVENTS.load(Relaxed);
    let old = cpu::read_dr7();
    cpu::write_dr3(WATCHED.as_ptr() as u64);
    cpu::write_dr6(0xFFFF_0FF0);
    cpu::write_dr7(if on { old | WRITE_OF_8_BYTES } else { old });
    for value in 0..3 {
        WATCHED.store(value, Relaxed);
    }
    cpu::write_dr7(old);
    WATCH_EVENTS.load(Relaxed) - before
}

static NMIS: AtomicU64 = AtomicU64::new(0);
static NMI_DEPTH: AtomicU64 = AtomicU64::new(0);
static NMI_DEEPEST: AtomicU64 = AtomicU64::new(0);

fn non_maskable(_: &mut TrapFrame) {
    NMI_DEEPEST.fetch_max(NMI_DEPTH.fetch_add(1, Relaxed) + 1, Relaxed);
    // The second waits for the end of the first, however long that takes.
    if NMIS.fetch_add(1, Relaxed) % 2 == 0 {
        local_apic::nmi_self();
        let end = cpu::read_tsc() + 20_000;
        while cpu::read_tsc() < end {}
    }
    NMI_DEPTH.fetch_sub(1, Relaxed);
}

/// Two interrupts: how many came, and how many at a time.
fn interrupt_without_mask() -> u64 {
    let before = NMIS.load(Relaxed);
    local_apic::nmi_self();
    // Far longer than it takes; what does not come is counted as lost by the hash.
    let end = cpu::read_tsc() + 5_000_000_000;
    while NMIS.load(Relaxed) < before + 2 && cpu::read_tsc() < end {}
    (NMIS.load(Relaxed) - before) << 8 | NMI_DEEPEST.load(Relaxed)
}
