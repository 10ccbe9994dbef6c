//! What a vCPU did and what that cost, for those who want to know where the time goes.
//!
//! Counting is always on: a few additions on paths that leave host code anyway, and one in the refill of the inline
//! TLB. Time is measured only when asked for, by the TSC around every way out of translated code; what happens within
//! something else is charged once, to the innermost.
#![allow(unsafe_code)]

use crate::clock::host_counter;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use iced_x86::Code;
use trapgate_engine::{Cost, Costs, Counter, Measure};

use crate::context::VIEWS;
use crate::stubs::exit;

/// Host code's refills, by view, write, and whether of a slot rather than the table.
pub(crate) type Refills = [[[u64; 2]; 2]; VIEWS];

/// What a refill of the table, and of a slot, takes, in picoseconds: it runs in host code, where it is counted and not
/// measured. About 45 instructions, of which two loads wait for one another, and half as many.
const REFILL: [u64; 2] = [10_000, 5_000];

/// Something that costs time: an index of [`CostTable::cells`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell(u32);

/// Cells that belong to no instruction, with their names.
const KINDS: [&str; 8] = [
    "run_loop",
    "translated_code",
    "interpreted_block",
    "event",
    "translation",
    "link",
    "indirect_lookup",
    "invalidation",
];

impl Cell {
    /// The run loop: looks what is to be done, enters host code and leaves it.
    pub(crate) const LOOP: Self = Self(0);
    /// Host code.
    pub(crate) const CODE: Self = Self(1);
    /// A block that can't be translated.
    pub(crate) const INTERPRETED: Self = Self(2);
    /// Interrupts and exceptions.
    pub(crate) const EVENT: Self = Self(3);
    /// A unit is translated.
    pub(crate) const TRANSLATION: Self = Self(4);
    /// A direct jump that is not linked.
    pub(crate) const LINK: Self = Self(5);
    /// An indirect jump whose target is not in the table.
    pub(crate) const INDIRECT: Self = Self(6);
    /// Code is thrown away.
    pub(crate) const INVALIDATION: Self = Self(7);

    const MISSES: u32 = KINDS.len() as u32;
    const REFILLS: u32 = Self::MISSES + 2 * VIEWS as u32;
    const CODES: u32 = Self::REFILLS + 4 * VIEWS as u32;

    /// An access whose translation Rust code looks up.
    pub(crate) fn miss(view: usize, write: bool) -> Self {
        Self(Self::MISSES + 2 * view as u32 + u32::from(write))
    }

    /// An instruction that the interpreter does for host code.
    pub(crate) fn call_out(code: Code) -> Self {
        Self(Self::CODES + code as u32)
    }

    /// An instruction whose access can't be a plain load or store.
    pub(crate) fn slow(reason: Slow, code: Code) -> Self {
        let table = 1 + reason as u32;
        Self(Self::CODES + table * Code::values().len() as u32 + code as u32)
    }

    fn refill(index: usize) -> Self {
        Self(Self::REFILLS + index as u32)
    }

    /// A miss that host code sees to.
    pub(crate) fn of_refill(view: usize, write: usize, slot: usize) -> Self {
        Self::refill(view * 4 + write * 2 + slot)
    }

    /// How many there are.
    fn count() -> usize {
        Self::CODES as usize + (1 + Slow::NAMES.len()) * Code::values().len()
    }

    /// Kind and detail, as [`Cost`] has them.
    pub(crate) fn name(self) -> (&'static str, String) {
        let view = |view: u32| ["kernel", "kernel at user", "user"][view as usize % VIEWS];
        let way = |write: u32| ["read", "write"][write as usize & 1];
        if let Some(kind) = KINDS.get(self.0 as usize) {
            return (kind, String::new());
        }
        if self.0 < Self::REFILLS {
            let index = self.0 - Self::MISSES;
            let detail = format!("{} {}", view(index / 2), way(index));
            return ("tlb_miss", detail);
        }
        if self.0 < Self::CODES {
            let index = self.0 - Self::REFILLS;
            let kind = ["tlb_refill", "slot_refill"][index as usize & 1];
            let detail = format!("{} {}", view(index / 4), way(index / 2));
            return (kind, detail);
        }
        let index = (self.0 - Self::CODES) as usize;
        let codes = Code::values().len();
        let kind = match (index / codes).checked_sub(1) {
            None => "call_out",
            Some(reason) => Slow::NAMES[reason],
        };
        let code = Code::values().nth(index % codes).unwrap_or_default();
        (kind, instruction(code))
    }
}

/// Why an access can't be a plain load or store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slow {
    /// A device, or nothing, is there.
    Device,
    /// It goes on in the next page.
    Crossing,
    /// Someone is to hear of writes to the page: code was made of it, or it is logged.
    Traced,
}

impl Slow {
    const NAMES: [&str; 3] = ["device_access", "page_crossing", "traced_write"];
}

/// An instruction's name, as its documentation has it: mnemonic, then operands.
fn instruction(code: Code) -> String {
    let name = format!("{code:?}").to_lowercase();
    match name.split_once('_') {
        Some((mnemonic, operands)) => format!("{mnemonic} {}", operands.replace('_', ",")),
        None => name,
    }
}

#[derive(Debug, Default)]
struct Account {
    count: AtomicU64,
    ticks: AtomicU64,
}

/// Adds to what only this thread writes, though others read it.
fn add(to: &AtomicU64, more: u64) {
    to.store(
        to.load(Ordering::Relaxed).wrapping_add(more),
        Ordering::Relaxed,
    );
}

/// Counts and times of everything that costs; written by the vCPU's thread, read by any.
#[derive(Debug)]
pub(crate) struct CostTable {
    cells: Box<[Account]>,
    timed: bool,
    /// Two clocks at once: how long a tick is.
    start: (Instant, u64),
}

impl CostTable {
    fn new(timed: bool) -> Self {
        Self {
            cells: (0..Cell::count()).map(|_| Account::default()).collect(),
            timed,
            start: (Instant::now(), host_counter()),
        }
    }

    fn picoseconds_per_tick(&self) -> u128 {
        let (began, tick) = self.start;
        let elapsed = u128::from(host_counter().saturating_sub(tick).max(1));
        began.elapsed().as_nanos() * 1000 / elapsed
    }
}

impl Costs for CostTable {
    fn costs(&self) -> Vec<Cost> {
        let tick = self.picoseconds_per_tick();
        let happened = self.cells.iter().enumerate().filter_map(|(index, cell)| {
            let count = cell.count.load(Ordering::Relaxed);
            let ticks = cell.ticks.load(Ordering::Relaxed);
            (count != 0 || ticks != 0).then_some((Cell(index as u32), count, ticks))
        });
        happened
            .map(|(cell, count, ticks)| {
                let estimated = (Cell::REFILLS..Cell::CODES).contains(&cell.0);
                let nanoseconds = if estimated {
                    count * REFILL[(cell.0 - Cell::REFILLS) as usize & 1] / 1000
                } else {
                    u64::try_from(u128::from(ticks) * tick / 1000).unwrap_or(u64::MAX)
                };
                let (kind, detail) = cell.name();
                Cost {
                    kind,
                    detail,
                    count,
                    nanoseconds: self.timed.then_some(nanoseconds),
                    estimated,
                }
            })
            .collect()
    }
}

/// A stretch of time that is measured.
#[derive(Debug)]
#[must_use]
pub(crate) struct Span {
    began: u64,
    charged: u64,
    outer: Cell,
}

/// Counts of one vCPU.
#[derive(Debug)]
pub(crate) struct Statistics {
    /// Units translated.
    pub(crate) units: u64,
    /// Guest instructions in them.
    pub(crate) instructions: u64,
    /// Bytes of host code of them.
    pub(crate) host_bytes: u64,
    /// Direct jumps out of them.
    pub(crate) exits: u64,
    /// Direct jumps that were linked.
    pub(crate) links: u64,
    /// Times that host code was entered.
    pub(crate) entries: u64,
    /// Times that it was left, by [`crate::stubs::exit`].
    pub(crate) left: [u64; exit::COUNT],
    /// Indirect jumps whose target was looked up.
    pub(crate) indirect: u64,
    /// Translations fetched into the inline TLB by Rust code.
    pub(crate) misses: u64,
    /// Accesses that the interpreter did, by [`Slow`].
    pub(crate) slow: [u64; 3],
    /// Instructions that the interpreter did for host code.
    pub(crate) operations: u64,
    /// Blocks that the interpreter did because they could not be translated.
    pub(crate) interpreted: u64,
    /// Units thrown away because their code was written over, or to make them anew.
    pub(crate) dropped: u64,
    /// Times that all code was thrown away.
    pub(crate) flushes: u64,

    table: Arc<CostTable>,
    published: Vec<Counter>,
    /// What time is charged to at the moment.
    current: Cell,
    /// Ticks that were charged to anything.
    charged: u64,
}

impl Statistics {
    /// Nothing counted yet. With `timed` it measures time too.
    pub(crate) fn new(timed: bool) -> Self {
        let published = COUNTERS
            .iter()
            .map(|(name, measure, help)| Counter::new(name, *measure, help))
            .collect();
        Self {
            units: 0,
            instructions: 0,
            host_bytes: 0,
            exits: 0,
            links: 0,
            entries: 0,
            left: [0; exit::COUNT],
            indirect: 0,
            misses: 0,
            slow: [0; 3],
            operations: 0,
            interpreted: 0,
            dropped: 0,
            flushes: 0,
            table: Arc::new(CostTable::new(timed)),
            published,
            current: Cell::LOOP,
            charged: 0,
        }
    }

    /// Whether time is measured.
    pub(crate) fn timed(&self) -> bool {
        self.table.timed
    }

    /// For others to read.
    pub(crate) fn costs(&self) -> Arc<dyn Costs> {
        Arc::clone(&self.table) as Arc<dyn Costs>
    }

    /// For others to read.
    pub(crate) fn counters(&self) -> Vec<Counter> {
        self.published.clone()
    }

    /// It happened; time is charged to it until the innermost [`Self::stop`].
    pub(crate) fn count(&mut self, cell: Cell) {
        add(&self.table.cells[cell.0 as usize].count, 1);
        self.current = cell;
    }

    /// An access that can't be a plain load or store.
    pub(crate) fn slow(&mut self, reason: Slow, code: Code) {
        self.slow[reason as usize] += 1;
        self.count(Cell::slow(reason, code));
    }

    /// Time begins that is charged to what is counted next.
    pub(crate) fn start(&mut self) -> Span {
        Span {
            began: if self.table.timed { host_counter() } else { 0 },
            charged: self.charged,
            outer: self.current,
        }
    }

    /// It ends.
    pub(crate) fn stop(&mut self, span: Span) {
        if self.table.timed {
            let whole = host_counter().saturating_sub(span.began);
            // Both wrap alike.
            let within = self.charged.wrapping_sub(span.charged);
            let own = whole.saturating_sub(within);
            add(&self.table.cells[self.current.0 as usize].ticks, own);
            self.charged = self.charged.wrapping_add(own);
        }
        self.current = span.outer;
    }

    /// Makes the counts known. `code_bytes` are in use for code, and `refills` were made by host code.
    pub(crate) fn publish(&self, code_bytes: usize, refills: &Refills) {
        let mut all = 0;
        for (index, &count) in refills.as_flattened().as_flattened().iter().enumerate() {
            let cell = &self.table.cells[Cell::refill(index).0 as usize];
            cell.count.store(count, Ordering::Relaxed);
            all += count;
        }
        let [device, crossing, traced] = self.slow;
        let values: [u64; COUNTERS.len()] = [
            self.units,
            self.instructions,
            self.host_bytes,
            code_bytes as u64,
            self.entries,
            self.exits,
            self.links,
            self.left[exit::LINK as usize],
            self.left[exit::GO as usize]
                + self.left[exit::CALL as usize]
                + self.left[exit::RETURN as usize],
            self.left[exit::STOP as usize],
            self.indirect,
            all,
            self.misses,
            device,
            crossing,
            traced,
            self.operations,
            self.interpreted,
            self.dropped,
            self.flushes,
        ];
        for (counter, value) in self.published.iter().zip(values) {
            counter.set(value);
        }
    }
}

/// The counters, in the order of [`Statistics::publish`].
const COUNTERS: [(&str, Measure, &str); 20] = [
    (
        "translations",
        Measure::Events,
        "Units of guest code that were translated",
    ),
    (
        "translated_instructions",
        Measure::Events,
        "Guest instructions in them",
    ),
    (
        "translated_host_bytes",
        Measure::Events,
        "Bytes of host code made of them",
    ),
    (
        "code_bytes",
        Measure::Bytes,
        "Memory for translated code that is in use",
    ),
    (
        "code_entries",
        Measure::Events,
        "Times that translated code was entered from the run loop",
    ),
    (
        "direct_exits",
        Measure::Events,
        "Direct jumps out of units that were made",
    ),
    (
        "direct_exits_linked",
        Measure::Events,
        "Direct jumps that were linked to the code they lead to",
    ),
    (
        "unlinked_exits",
        Measure::Events,
        "Direct jumps taken before they were linked",
    ),
    (
        "look_exits",
        Measure::Events,
        "Times that translated code was left since a page of code may be another by now, or for an event",
    ),
    (
        "stop_exits",
        Measure::Events,
        "Times that translated code was left after a fault, or an instruction that went elsewhere",
    ),
    (
        "indirect_lookups",
        Measure::Events,
        "Indirect jumps and returns whose target was not in the table",
    ),
    (
        "tlb_refills",
        Measure::Events,
        "Misses of the inline TLB and its slots that translated code filled itself",
    ),
    (
        "tlb_misses",
        Measure::Events,
        "Misses of the inline TLB that had to be looked up outside of translated code",
    ),
    (
        "device_accesses",
        Measure::Events,
        "Accesses of translated code to what is not RAM",
    ),
    (
        "page_crossings",
        Measure::Events,
        "Accesses of translated code that go across the end of a page",
    ),
    (
        "traced_writes",
        Measure::Events,
        "Writes of translated code to pages of which someone wants to hear: they hold code, or are logged",
    ),
    (
        "call_outs",
        Measure::Events,
        "Instructions that the interpreter did for translated code",
    ),
    (
        "interpreted_blocks",
        Measure::Events,
        "Blocks that the interpreter did because they can't be translated",
    ),
    (
        "units_dropped",
        Measure::Events,
        "Units thrown away because their code was written over, or to be made anew",
    ),
    (
        "code_flushes",
        Measure::Events,
        "Times that all translated code was thrown away",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn found(costs: &[Cost], kind: &str) -> Vec<(String, u64)> {
        let of_kind = costs.iter().filter(|cost| cost.kind == kind);
        of_kind
            .map(|cost| (cost.detail.clone(), cost.count))
            .collect()
    }

    #[test]
    fn every_cell_has_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = (0..Cell::count() as u32)
            .map(|index| Cell(index).name())
            .collect();
        assert_eq!(names.len(), Cell::count());
    }

    #[test]
    fn what_happened_is_told_by_kind_and_instruction() {
        let mut statistics = Statistics::new(false);
        statistics.count(Cell::call_out(Code::Mov_cr_r64));
        statistics.count(Cell::call_out(Code::Mov_cr_r64));
        statistics.slow(Slow::Device, Code::Mov_rm32_r32);
        statistics.count(Cell::miss(2, true));

        let costs = statistics.costs().costs();
        assert_eq!(costs.len(), 3);
        assert_eq!(found(&costs, "call_out"), [("mov cr,r64".to_owned(), 2)]);
        assert_eq!(
            found(&costs, "device_access"),
            [("mov rm32,r32".to_owned(), 1)]
        );
        assert_eq!(found(&costs, "tlb_miss"), [("user write".to_owned(), 1)]);
        assert!(costs.iter().all(|cost| cost.nanoseconds.is_none()));
    }

    #[test]
    fn refills_are_told_with_an_estimate() {
        let statistics = Statistics::new(true);
        let mut refills = Refills::default();
        refills[0][1][1] = 500;
        statistics.publish(64, &refills);
        let costs = statistics.costs().costs();
        assert_eq!(
            found(&costs, "slot_refill"),
            [("kernel write".to_owned(), 500)]
        );
        assert_eq!(costs[0].nanoseconds, Some(500 * REFILL[1] / 1000));
        assert!(costs[0].estimated);
        let counters = statistics.counters();
        let value = |name| {
            let counter = counters.iter().find(|counter| counter.name() == name);
            counter.map(Counter::get)
        };
        assert_eq!(value("tlb_refills"), Some(500));
        assert_eq!(value("code_bytes"), Some(64));
    }

    /// What lies within something else is charged once.
    #[test]
    fn time_of_the_inner_is_not_the_outers() {
        let mut statistics = Statistics::new(true);
        let whole = host_counter();
        let outer = statistics.start();
        statistics.count(Cell::CODE);
        for _ in 0..3 {
            let inner = statistics.start();
            statistics.count(Cell::EVENT);
            std::hint::black_box(host_counter());
            statistics.stop(inner);
        }
        statistics.stop(outer);
        let whole = host_counter() - whole;

        let charged = |cell: Cell| {
            let cell = &statistics.table.cells[cell.0 as usize];
            cell.ticks.load(Ordering::Relaxed)
        };
        assert!(charged(Cell::EVENT) > 0 && charged(Cell::CODE) > 0);
        assert!(charged(Cell::EVENT) + charged(Cell::CODE) <= whole);
        assert_eq!(statistics.current, Cell::LOOP);
    }

    #[test]
    fn names_of_instructions_read_like_their_documentation() {
        for (code, name) in [
            (Code::Rdtsc, "rdtsc"),
            (Code::Mov_cr_r64, "mov cr,r64"),
            (Code::Iretq, "iretq"),
        ] {
            assert_eq!(instruction(code), name);
        }
    }
}
