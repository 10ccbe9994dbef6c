//! Which bytes of guest memory hold decoded code, and what was written over.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use trapgate_engine::{Signal, Signals};
use trapgate_memory::{PAGE_SIZE, TraceListener};

/// Bytes that one bit of a page's map stands for.
const GRAIN: u64 = 32;

/// The bytes of code on each page, at a grain of 32 bytes: 128 bits a page. Pages where data lies
/// beside code (a kernel's own, a just-in-time compiler's) are written all the time.
#[derive(Debug, Default)]
struct Maps {
    pages: HashMap<u64, u128>,
    /// Pages whose code was written over and not yet thrown away.
    stale: Vec<u64>,
}

/// One vCPU's decoded code as the traces see it.
#[derive(Debug)]
pub(crate) struct CodePages {
    maps: Mutex<Maps>,
    has_stale: AtomicBool,
    signals: Arc<Signals>,
}

fn bits(offset: u64, length: u64) -> u128 {
    let first = offset / GRAIN;
    let last = (offset + length.max(1) - 1).min(PAGE_SIZE - 1) / GRAIN;
    (u128::MAX >> (127 - (last - first))) << first
}

impl CodePages {
    pub(crate) fn new(signals: Arc<Signals>) -> Self {
        Self {
            maps: Mutex::default(),
            has_stale: AtomicBool::new(false),
            signals,
        }
    }

    /// Notes code at `length` bytes from `gpa`, in one page.
    pub(crate) fn add(&self, gpa: u64, length: u64) {
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        let map = maps.pages.entry(gpa / PAGE_SIZE).or_default();
        *map |= bits(gpa % PAGE_SIZE, length);
    }

    /// How many pages with code are known.
    pub(crate) fn pages(&self) -> usize {
        let maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        maps.pages.len()
    }

    /// Whether code was written over since [`Self::take_stale`].
    #[inline]
    pub(crate) fn has_stale(&self) -> bool {
        self.has_stale.load(Ordering::Acquire)
    }

    /// Takes the pages (as page numbers) whose code was written over.
    pub(crate) fn take_stale(&self) -> Vec<u64> {
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        self.has_stale.store(false, Ordering::Release);
        let mut stale = std::mem::take(&mut maps.stale);
        stale.sort_unstable();
        stale.dedup();
        stale
    }

    /// Forgets all code.
    pub(crate) fn clear(&self) {
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        self.has_stale.store(false, Ordering::Release);
        maps.stale.clear();
        maps.pages.clear();
    }
}

impl TraceListener for CodePages {
    fn written(&self, gpa: u64, length: u64) {
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        let page = gpa / PAGE_SIZE;
        let hit = maps
            .pages
            .get(&page)
            .is_some_and(|map| map & bits(gpa % PAGE_SIZE, length) != 0);
        if hit {
            maps.pages.remove(&page);
            maps.stale.push(page);
            self.has_stale.store(true, Ordering::Release);
            self.signals.raise(Signal::Flush);
        }
    }

    fn wants(&self, gpa: u64) -> bool {
        let maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        maps.pages.contains_key(&(gpa / PAGE_SIZE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writes_over_code_make_a_page_stale() {
        let code = CodePages::new(Arc::new(Signals::default()));
        code.add(0x1040, 0x21);
        code.add(0x1f00, 0x100);
        code.written(0x1020, 0x20);
        code.written(0x1080, 0x10);
        assert!(!code.has_stale());
        code.written(0x107f, 1);
        assert!(code.has_stale());
        assert_eq!(code.take_stale(), [1]);
        code.written(0x1040, 8);
        assert!(!code.has_stale(), "the page's code was forgotten");
    }

    #[test]
    fn last_bytes_of_a_page_have_a_bit() {
        assert_eq!(bits(4095, 1), 1 << 127);
        assert_eq!(bits(0, 4096), u128::MAX);
    }
}
