//! Memory that this process takes beside the guest's, watched while something runs.

use std::fs::read_to_string;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// KiB that a process with a machine of one processor may take beyond the guest's memory (SPECIFICATION.md).
pub(crate) const MOST_BEYOND_RAM: u64 = 96 << 10;
/// What of this is the program itself, and not the machine.
const PROGRAM: u64 = 8 << 10;

/// Looks at this process's memory every few milliseconds. What it had before counts as the program: a test that failed
/// has read debugging information for its backtrace, a hundred MiB.
pub(crate) struct Watch {
    before: u64,
    over: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Watch {
    pub(crate) fn start() -> Self {
        let before = beyond_guest_ram();
        let over = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            let mut most = 0;
            while !seen.load(Ordering::Relaxed) {
                most = most.max(beyond_guest_ram());
                std::thread::sleep(Duration::from_millis(20));
            }
            most
        });
        Self {
            before,
            over,
            thread,
        }
    }

    /// The most that was seen, in KiB.
    pub(crate) fn most_kib(self) -> u64 {
        self.over.store(true, Ordering::Relaxed);
        let most = self.thread.join().expect("the watch does not panic");
        most.saturating_sub(self.before) + PROGRAM
    }
}

/// Proportional set size, in which what is mapped twice counts once, without mappings of a guest's memory.
fn beyond_guest_ram() -> u64 {
    let maps = read_to_string("/proc/self/smaps").expect("a process can read this of itself");
    let (mut sum, mut of_mapping) = (0, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Pss:") => of_mapping = words.next().map_or(0, |kib| kib.parse().unwrap_or(0)),
            // The last line of a mapping. Guest RAM alone was asked to be of large pages, or of small ones.
            Some("VmFlags:") if !words.any(|flag| ["hg", "nh"].contains(&flag)) => {
                sum += of_mapping;
            }
            _ => {}
        }
    }
    sum
}
