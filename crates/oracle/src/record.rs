//! Records: what a case starts from, and what it ends with.

use crate::layout::{RECORD, record as at};

/// Bytes of x87, SSE and AVX state.
pub const XSAVE_BYTES: usize = 832;

/// Reads a quadword.
pub fn quad(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

/// Writes a quadword.
pub fn put(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Memory that a case starts with and that is looked at after it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Where.
    pub address: u64,
    /// Quadwords.
    pub quads: u64,
}

impl Window {
    /// What a run of bytes has of one of the `pages` (start, end); whole quadwords, at most `most` bytes.
    pub fn within(start: u64, length: u64, pages: &[(u64, u64)], most: u64) -> Self {
        let end = start.saturating_add(length);
        for &(first, last) in pages {
            let (from, to) = (start.max(first) & !7, end.min(last).next_multiple_of(8));
            if from < to {
                return Self {
                    address: from,
                    quads: (to - from).min(most & !7) / 8,
                };
            }
        }
        Self::default()
    }

    /// Bytes.
    pub const fn length(self) -> u64 {
        self.quads * 8
    }

    /// Where an address lies in it.
    pub fn position(self, address: u64) -> Option<usize> {
        let at = address.checked_sub(self.address)?;
        (at < self.length()).then_some(at as usize)
    }
}

/// What a case starts from, beside most of its x87 and vector state and its memory.
#[derive(Clone, Debug, Default)]
pub struct Start {
    /// The general registers, as instructions number them.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub flags: u64,
    /// RIP.
    pub rip: u64,
    /// Bases of FS and GS.
    pub bases: [u64; 2],
    /// Memory.
    pub windows: [Window; 2],
    /// The code has 32 bits.
    pub compatibility: bool,
    /// MXCSR, which [`Self::write`] leaves to whoever writes the x87 and vector state.
    pub mxcsr: u32,
}

impl Start {
    /// Writes the record.
    pub fn write(&self, record: &mut [u8]) {
        for (index, value) in self.gpr.iter().enumerate() {
            put(record, at::GPR + index * 8, *value);
        }
        put(record, at::FLAGS, self.flags);
        put(record, at::RIP, self.rip);
        for (index, base) in self.bases.iter().enumerate() {
            put(record, at::BASES_IN + index * 8, *base);
        }
        for (index, window) in self.windows.iter().enumerate() {
            put(record, at::WINDOWS_IN + index * 16, window.address);
            put(record, at::WINDOWS_IN + index * 16 + 8, window.quads);
        }
        put(record, at::COMPATIBILITY, u64::from(self.compatibility));
    }

    /// Reads it back.
    pub fn read(record: &[u8]) -> Self {
        let window = |index: usize| Window {
            address: quad(record, at::WINDOWS_IN + index * 16),
            quads: quad(record, at::WINDOWS_IN + index * 16 + 8),
        };
        Self {
            gpr: std::array::from_fn(|index| quad(record, at::GPR + index * 8)),
            flags: quad(record, at::FLAGS),
            rip: quad(record, at::RIP),
            bases: [quad(record, at::BASES_IN), quad(record, at::BASES_IN + 8)],
            windows: [window(0), window(1)],
            compatibility: quad(record, at::COMPATIBILITY) != 0,
            mxcsr: quad(record, at::XSAVE + 24) as u32,
        }
    }
}

/// Record number `case` of an area of them.
pub fn of(area: &[u8], case: usize) -> &[u8] {
    &area[case * RECORD..][..RECORD]
}

/// Record number `case` of an area of them, to write.
pub fn of_mut(area: &mut [u8], case: usize) -> &mut [u8] {
    &mut area[case * RECORD..][..RECORD]
}
