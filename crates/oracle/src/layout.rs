//! Where everything lies: the same linear addresses natively and in the guest.
//!
//! The *arena* holds a batch of cases. The monitor and its records lie high, where no address that a case makes up
//! points by chance; code and data of the cases lie below 2 GiB, where every addressing form reaches them.

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Cases in a batch at most.
pub const CASES: usize = 1024;
/// Pieces of code in a batch at most.
pub const SLOTS: usize = 32;
/// Bytes of a record, of what goes in and of what comes out.
pub const RECORD: usize = 2048;

/// Memory that an arena takes, in bytes; offsets below are within it.
pub const ARENA_BYTES: usize = DATA_AT + SLOTS * BACKED_DATA * PAGE as usize;
/// Offset of the monitor's code.
pub const MONITOR_AT: usize = 0;
/// Bytes of the monitor's code at most.
pub const MONITOR_BYTES: usize = 0x2000;
/// Offset of what the monitor writes for itself.
pub const CONTROL_AT: usize = MONITOR_BYTES;
const CONTROL_BYTES: usize = 0x2000;
/// Offset of the page through which cases end.
pub const EXIT_AT: usize = CONTROL_AT + CONTROL_BYTES;
/// Offset of the records that go in.
pub const IN_AT: usize = EXIT_AT + PAGE as usize;
/// Offset of the records that come out.
pub const OUT_AT: usize = IN_AT + CASES * RECORD;
/// Offset of code: two pages for each slot.
pub const CODE_AT: usize = OUT_AT + CASES * RECORD;
/// Offset of data: [`BACKED_DATA`] pages for each slot.
pub const DATA_AT: usize = CODE_AT + SLOTS * 2 * PAGE as usize;
/// Pages of data that a slot has: two to write, one to read only, one for the stack.
pub const BACKED_DATA: usize = 4;

/// Linear distance of the code of two slots: two pages of code, then nothing.
pub const CODE_STRIDE: u64 = 0x4000;
/// Linear distance of the data of two slots.
pub const DATA_STRIDE: u64 = 0x8000;
/// Pages of a slot's data within its stride: to write, to write, read only, stack. Between them is nothing.
pub const DATA_PAGES: [u64; BACKED_DATA] = [1, 2, 4, 6];

/// A run of pages.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Linear address.
    pub linear: u64,
    /// Offset in the arena.
    pub offset: usize,
    /// Bytes.
    pub length: usize,
    /// Cases, or the monitor, may write it.
    pub writable: bool,
    /// It holds code.
    pub executable: bool,
}

/// Where the monitor starts: high, where no address that a case makes up points by chance.
pub const MONITOR: u64 = 0x5a5a_0000_0000;
/// What the monitor writes for itself.
pub const CONTROL: u64 = MONITOR + CONTROL_AT as u64;
const RECORDS_IN: u64 = MONITOR + 0x10_0000;
const RECORDS_OUT: u64 = MONITOR + 0x40_0000;
/// Where a case jumps to when it is done: low, as everything that cases know of.
pub const EXIT: u64 = 0x1000_0000;

/// A record that goes in.
pub const fn record_in(case: usize) -> u64 {
    RECORDS_IN + (case * RECORD) as u64
}

/// A record that comes out.
pub const fn record_out(case: usize) -> u64 {
    RECORDS_OUT + (case * RECORD) as u64
}

/// The first of a slot's two pages of code.
pub const fn code(slot: usize) -> u64 {
    EXIT + 0x10_0000 + slot as u64 * CODE_STRIDE
}

/// The start of a slot's data.
pub const fn data(slot: usize) -> u64 {
    EXIT + 0x40_0000 + slot as u64 * DATA_STRIDE
}

/// Whether an address is one that cases may come near.
pub const fn is_near(address: u64) -> bool {
    address >= EXIT && address < EXIT + 0x80_0000
}

/// All of it. `modifying`: code may be written by itself.
pub fn regions(modifying: bool) -> Vec<Region> {
    let region = |linear, offset, length, writable, executable| Region {
        linear,
        offset,
        length,
        writable,
        executable,
    };
    let page = PAGE as usize;
    let records = CASES * RECORD;
    let mut regions = vec![
        region(MONITOR, MONITOR_AT, MONITOR_BYTES, false, true),
        region(CONTROL, CONTROL_AT, CONTROL_BYTES, true, false),
        region(EXIT, EXIT_AT, page, false, true),
        region(record_in(0), IN_AT, records, false, false),
        region(record_out(0), OUT_AT, records, true, false),
    ];
    for slot in 0..SLOTS {
        let at = CODE_AT + slot * 2 * page;
        regions.push(region(code(slot), at, 2 * page, modifying, true));
        for (index, number) in DATA_PAGES.into_iter().enumerate() {
            let linear = data(slot) + number * PAGE;
            let offset = data_offset(slot, index);
            regions.push(region(linear, offset, page, index != READ_ONLY, false));
        }
    }
    regions
}

/// Which of a slot's pages of data cannot be written.
pub const READ_ONLY: usize = 2;

/// Offset of a page of a slot's data in the arena.
pub const fn data_offset(slot: usize, page: usize) -> usize {
    DATA_AT + (slot * BACKED_DATA + page) * PAGE as usize
}

/// Where the parts of a record lie.
pub mod record {
    /// General registers.
    pub const GPR: usize = 0;
    /// RFLAGS.
    pub const FLAGS: usize = 0x80;
    /// RIP: where to start; where it stopped, 0 if the case came to its end.
    pub const RIP: usize = 0x88;
    /// In: base of FS, then of GS.
    pub const BASES_IN: usize = 0x90;
    /// In: address and quadwords of two windows of memory.
    pub const WINDOWS_IN: usize = 0xa0;
    /// In: not 0 for 32-bit code.
    pub const COMPATIBILITY: usize = 0xc0;
    /// Out: vector, or one of [`super::vector`].
    pub const VECTOR: usize = 0x90;
    /// Out: error code.
    pub const ERROR: usize = 0x98;
    /// Out: the address of a page fault.
    pub const ADDRESS: usize = 0xa0;
    /// Out: bases of FS and GS.
    pub const BASES: usize = 0xa8;
    /// Out: selectors of DS, ES, FS, GS.
    pub const SELECTORS: usize = 0xb8;
    /// Out: selector of CS, if it stopped.
    pub const CODE_SEGMENT: usize = 0xc0;
    /// Out: selector of SS.
    pub const STACK_SEGMENT: usize = 0xc8;
    /// x87, SSE and AVX state.
    pub const XSAVE: usize = 0x100;
    /// Memory of the windows, one after the other.
    pub const MEMORY: usize = 0x440;
    /// Bytes for that.
    pub const MEMORY_BYTES: usize = super::RECORD - MEMORY;
}

/// What a record's vector says beside the processor's own.
pub mod vector {
    /// It came to its end.
    pub const NONE: u64 = 0x100;
    /// It did not come to an end in time.
    pub const TIMEOUT: u64 = 0x101;
    /// It called the system.
    pub const SYSTEM_CALL: u64 = 0x102;
    /// A signal that no instruction should raise.
    pub const SIGNAL: u64 = 0x103;
}
