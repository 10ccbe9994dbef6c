//! Memory that a monitor takes beside its guest's, watched while it runs.

use std::fs::read_to_string;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// From one look to the next, at least.
const PERIOD: Duration = Duration::from_millis(50);
/// So many times the time that a look takes lies between two: what is measured shares the host's processors with it.
const REST: u32 = 50;

/// Looks at a process's memory again and again: what grows until it is given back is seen at its largest.
pub(crate) struct Watch {
    /// The thread ends when this does.
    go_on: Sender<()>,
    thread: JoinHandle<Option<u64>>,
}

impl Watch {
    pub(crate) fn start(process: u32, ram_kib: u64) -> Self {
        let (go_on, over) = channel();
        let thread = std::thread::spawn(move || {
            let mut most = None;
            loop {
                let begun = Instant::now();
                most = most.max(beyond_guest_ram(process, ram_kib));
                let pause = PERIOD.max(begun.elapsed() * REST);
                if over.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                    return most.max(beyond_guest_ram(process, ram_kib));
                }
            }
        });
        Self { go_on, thread }
    }

    /// The most that was seen, in KiB; none if the process could not be looked at.
    pub(crate) fn most_kib(self) -> Option<u64> {
        drop(self.go_on);
        self.thread.join().ok()?
    }
}

/// KiB of memory that a process takes (`Pss`: what is mapped twice counts once), apart from the guest's RAM: a mapping that is as large as the
/// RAM and holds no code.
fn beyond_guest_ram(process: u32, ram_kib: u64) -> Option<u64> {
    let smaps = read_to_string(format!("/proc/{process}/smaps")).ok()?;
    resident(&smaps, ram_kib)
}

/// Reads what `proc_pid_smaps(5)` describes.
fn resident(smaps: &str, ram_kib: u64) -> Option<u64> {
    let (mut sum, mut is_guest, mut is_code) = (None, false, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next()?, words.next()?);
        // A field's name ends with a colon; a mapping's line begins with its addresses.
        if !name.ends_with(':') {
            is_code = value.contains('x');
            is_guest = false;
            continue;
        }
        let kib = || value.parse::<u64>().ok();
        match name {
            "Size:" => is_guest |= !is_code && kib()? >= ram_kib,
            "Pss:" if !is_guest => sum = Some(sum.unwrap_or(0) + kib()?),
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_not_counted() {
        let smaps = "\
10000-20000 r-xp 00000000 00:01 7 /bin/monitor
Size:                 64 kB
Pss:                  50 kB
VmFlags: rd ex mr mw
20000-30000 rw-p 00000000 00:00 0
Size:               1024 kB
Pss:                 300 kB
30000-40000 rw-p 00000000 00:00 0
Size:               1024 kB
Pss:                 700 kB
40000-50000 rwxp 00000000 00:00 0
Size:               2048 kB
Pss:                   7 kB
";
        assert_eq!(resident(smaps, 1024), Some(57));
        assert_eq!(resident(smaps, 4096), Some(1057));
        assert_eq!(resident("", 1024), None);
    }

    #[test]
    fn memory_that_was_given_back_is_remembered() {
        let watch = Watch::start(std::process::id(), 1 << 40);
        let seen = || beyond_guest_ram(std::process::id(), 1 << 40).unwrap();
        let before = seen();
        let mut large = vec![1_u8; 64 << 20];
        let most = seen();
        assert!(most > before + (60 << 10), "{before}, {most}");
        // Longer than from one look to the next.
        std::thread::sleep(5 * PERIOD);
        large.fill(2);
        drop(large);

        assert!(watch.most_kib().unwrap() > before + (60 << 10));
        assert!(seen() < before + (30 << 10));
    }
}
