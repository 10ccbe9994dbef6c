//! Trace flags: who wants to hear of a write to which page.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::PAGE_SIZE;

/// The reasons for which a page can be traced, as a set of bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceFlags(pub u8);

impl TraceFlags {
    /// No one wants to hear of writes to the page.
    pub const NONE: Self = Self(0);
    /// Some engine has decoded or translated code on the page.
    pub const CODE: Self = Self(1 << 0);
    /// The page was clean when the dirty log was last read.
    pub const CLEAN: Self = Self(1 << 1);

    /// Whether no bit is set.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether every bit of `other` is set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Someone who set a trace flag and is told of writes to pages that carry it.
pub trait TraceListener: Send + Sync {
    /// `length` bytes from guest-physical address `gpa` have been written; they lie in one page.
    /// Called after the write, on the thread that wrote.
    fn written(&self, gpa: u64, length: u64);

    /// Whether the listener still wants to hear of writes to the page of `gpa`. When none does,
    /// the page loses the flag. A listener that begins to want a page says so here first, then
    /// sets the flag, then reads the page.
    fn wants(&self, gpa: u64) -> bool;
}

/// Pages that are counted together: 2 MiB of them.
const RUN: usize = 512;

/// The trace flags of all pages of a guest's RAM, indexed by the page's place in the RAM file
/// (so holes in the physical address space cost nothing).
pub struct Traces {
    pages: Box<[AtomicU8]>,
    /// How many of each [`RUN`] of pages have flags.
    runs: Box<[AtomicU32]>,
    epoch: AtomicU64,
    device_writes: AtomicU64,
    listeners: RwLock<Vec<(TraceFlags, Arc<dyn TraceListener>)>>,
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Traces")
            .field("pages", &self.pages.len())
            .finish()
    }
}

impl Traces {
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            pages: (0..pages).map(|_| AtomicU8::new(0)).collect(),
            runs: (0..pages.div_ceil(RUN))
                .map(|_| AtomicU32::new(0))
                .collect(),
            epoch: AtomicU64::new(0),
            device_writes: AtomicU64::new(0),
            listeners: RwLock::default(),
        }
    }

    /// Adds a listener for writes to pages that carry any of `flags`.
    pub fn listen(&self, flags: TraceFlags, listener: Arc<dyn TraceListener>) {
        self.listeners
            .write()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .push((flags, listener));
    }

    /// The flags of a page; a page out of range has none.
    #[inline]
    pub fn get(&self, page: usize) -> TraceFlags {
        self.pages.get(page).map_or(TraceFlags::NONE, |flags| {
            TraceFlags(flags.load(Ordering::Acquire))
        })
    }

    /// Sets `flags` on a page; returns those that it had.
    pub fn set(&self, page: usize, flags: TraceFlags) -> TraceFlags {
        let Some(stored) = self.pages.get(page) else {
            return TraceFlags::NONE;
        };
        let before = TraceFlags(stored.fetch_or(flags.0, Ordering::AcqRel));
        if before.is_empty() && !flags.is_empty() {
            self.runs[page / RUN].fetch_add(1, Ordering::AcqRel);
        }
        if !before.contains(flags) {
            self.epoch.fetch_add(1, Ordering::AcqRel);
        }
        before
    }

    /// Changes whenever a page gets a flag that it did not have: whoever keeps translations that
    /// bypass the traces must look the pages up again.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Changes after each write by anyone but a processor: whoever compares what two of them see must know if someone
    /// else wrote in between.
    pub fn device_writes(&self) -> u64 {
        self.device_writes.load(Ordering::Acquire)
    }

    /// Clears `flags` on a page; returns those that it had.
    pub fn clear(&self, page: usize, flags: TraceFlags) -> TraceFlags {
        let Some(stored) = self.pages.get(page) else {
            return TraceFlags::NONE;
        };
        let before = TraceFlags(stored.fetch_and(!flags.0, Ordering::AcqRel));
        if !before.is_empty() && flags.contains(before) {
            self.runs[page / RUN].fetch_sub(1, Ordering::AcqRel);
        }
        before
    }

    /// Whether any of `count` pages from `first` may have flags: pages near them may stand for them.
    pub fn may_have(&self, first: usize, count: usize) -> bool {
        let runs = first / RUN..(first + count).div_ceil(RUN);
        // Below zero for a moment, if one thread sets and another clears the last flag: that counts as some.
        self.runs[runs.start.min(self.runs.len())..runs.end.min(self.runs.len())]
            .iter()
            .any(|run| run.load(Ordering::Acquire) != 0)
    }

    /// Tells the listeners that `length` bytes from `gpa`, all in RAM page `page`, were written.
    /// The first write to a [`TraceFlags::CLEAN`] page takes that flag away.
    #[cold]
    pub fn report(&self, page: usize, gpa: u64, length: u64) {
        let mut flags = self.clear(page, TraceFlags::CLEAN);
        let listeners = self
            .listeners
            .read()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        for (wanted, listener) in listeners.iter() {
            if wanted.0 & flags.0 != 0 {
                listener.written(gpa, length);
            }
        }
        flags.0 &= TraceFlags::CODE.0;
        let wanted = || {
            let interested = |(kind, listener): &(TraceFlags, Arc<dyn TraceListener>)| {
                kind.0 & flags.0 != 0 && listener.wants(gpa)
            };
            listeners.iter().any(interested)
        };
        if !flags.is_empty() && !wanted() {
            self.clear(page, flags);
            // Someone may have begun to want it meanwhile and seen the flag still set.
            if wanted() {
                self.set(page, flags);
            }
        }
    }
}

/// The traces of one RAM range, in the place where [`vm_memory`] keeps a dirty bitmap, so that
/// every device write passes by here.
#[derive(Clone, Debug)]
pub struct PageTraces {
    traces: Arc<Traces>,
    /// Guest-physical address of offset 0.
    base: u64,
    /// Offset in the RAM file of offset 0.
    file_offset: u64,
}

impl PageTraces {
    pub(crate) fn new(traces: Arc<Traces>, base: u64, file_offset: u64) -> Self {
        Self {
            traces,
            base,
            file_offset,
        }
    }
}

impl WithBitmapSlice<'_> for PageTraces {
    type S = Self;
}

impl BitmapSlice for PageTraces {}

impl Bitmap for PageTraces {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.traces.device_writes.fetch_add(1, Ordering::Release);
        let mut offset = offset as u64;
        let end = offset.saturating_add(len as u64);
        while offset < end {
            let at = self.file_offset + offset;
            let page = (at / PAGE_SIZE) as usize;
            let length = (PAGE_SIZE - at % PAGE_SIZE).min(end - offset);
            if !self.traces.get(page).is_empty() {
                self.traces.report(page, self.base + offset, length);
            }
            offset += length;
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = ((self.file_offset + offset as u64) / PAGE_SIZE) as usize;
        !self.traces.get(page).contains(TraceFlags::CLEAN)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            traces: Arc::clone(&self.traces),
            base: self.base + offset as u64,
            file_offset: self.file_offset + offset as u64,
        }
    }
}
