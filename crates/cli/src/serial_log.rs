//! What the guest's kernel said: its last lines, and whether it panicked.

use std::collections::VecDeque;

use trapgate_image::STATUS_PREFIX;

/// Lines that are kept.
const LINES: usize = 200;
/// Bytes of a line that are kept; what follows on the same line is dropped.
const LINE: usize = 1024;
/// How Linux starts a panic (kernel/panic.c).
const PANIC: &str = "Kernel panic - not syncing: ";

/// The end of what a serial port carried, by lines.
#[derive(Debug, Default)]
pub(crate) struct SerialLog {
    lines: VecDeque<String>,
    current: Vec<u8>,
    panic: Option<String>,
    status_seen: bool,
    spoken: bool,
}

impl SerialLog {
    /// Takes more of what the port carries.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.spoken |= !bytes.is_empty();
        for &byte in bytes {
            match byte {
                b'\n' => self.end_line(),
                b'\r' => {}
                _ if self.current.len() < LINE => self.current.push(byte),
                _ => {}
            }
        }
    }

    fn end_line(&mut self) {
        let line = printable(&std::mem::take(&mut self.current));
        if let Some((_, reason)) = line.split_once(PANIC) {
            self.panic.get_or_insert_with(|| reason.trim().to_owned());
        }
        self.status_seen |= line.starts_with(STATUS_PREFIX);
        if self.lines.len() == LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// The reason of the kernel's panic, if it panicked since the start or the last [`Self::restarted`].
    pub(crate) fn panic(&self) -> Option<&str> {
        self.panic.as_deref()
    }

    /// Whether the guest's init reports here, which it does if it has no virtio-console.
    pub(crate) fn status_seen(&self) -> bool {
        self.status_seen
    }

    /// Whether anything came at all.
    pub(crate) fn spoken(&self) -> bool {
        self.spoken
    }

    /// The machine boots again.
    pub(crate) fn restarted(&mut self) {
        *self = Self::default();
    }

    /// At most `count` lines that help to see what went wrong: from the panic on if there was one, else the last.
    pub(crate) fn excerpt(&self, count: usize) -> Vec<String> {
        let mut lines: Vec<String> = self.lines.iter().cloned().collect();
        if !self.current.is_empty() {
            lines.push(printable(&self.current));
        }
        lines.retain(|line| !line.trim().is_empty());
        let last = lines.len().saturating_sub(count);
        let panic = lines.iter().position(|line| line.contains(PANIC));
        // With a line or two of what led to it.
        let start = panic.map_or(last, |at| at.saturating_sub(2));
        lines.drain(..start);
        lines.truncate(count);
        lines
    }
}

/// A line without what would act on a terminal: a guest must not be able to hide what we say.
fn printable(line: &[u8]) -> String {
    String::from_utf8_lossy(line)
        .chars()
        .map(|c| match c {
            '\t' => ' ',
            c if c.is_control() => '\u{b7}',
            c => c,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panic_is_found_across_pieces() {
        let mut log = SerialLog::default();
        log.push(b"[    1.0] all well\r\n[    1.1] Kernel pa");
        assert_eq!(log.panic(), None);
        log.push(b"nic - not syncing: VFS: no root\r\n[    1.2] CPU: 0\r\n");

        assert_eq!(log.panic(), Some("VFS: no root"));
        assert_eq!(
            log.excerpt(9)[1],
            "[    1.1] Kernel panic - not syncing: VFS: no root"
        );
    }

    #[test]
    fn only_the_last_lines_are_kept_and_long_ones_are_cut() {
        let mut log = SerialLog::default();
        for number in 0..1000 {
            log.push(format!("line {number}\n").as_bytes());
        }
        log.push(&[b'x'; 1 << 20]);

        let lines = log.excerpt(3);

        assert_eq!(lines[..2], ["line 998", "line 999"]);
        assert_eq!(lines[2].len(), LINE);
        assert!(log.lines.len() <= LINES);
    }

    #[test]
    fn terminal_sequences_of_the_guest_are_defused() {
        let mut log = SerialLog::default();
        log.push(b"\x1b[2Jgone\x07\n");
        assert_eq!(log.excerpt(1), ["\u{b7}[2Jgone\u{b7}"]);
    }

    #[test]
    fn restart_forgets_a_panic() {
        let mut log = SerialLog::default();
        log.push(b"Kernel panic - not syncing: x\n");
        log.restarted();
        assert_eq!(log.panic(), None);
        assert!(!log.spoken());
    }

    #[test]
    fn status_on_the_serial_port_is_noticed() {
        let mut log = SerialLog::default();
        log.push(b"trapgate-status: init\r\n");
        assert!(log.status_seen());
    }
}
