//! The guest's terminal, looked at by several at once.
//!
//! What the guest writes goes to everyone who is attached, and what they type goes to the guest in the order in which it
//! comes, as if they shared a keyboard. Someone who attaches sees first what the guest wrote last.
//!
//! A viewer who reads slowly slows the guest's output, as a slow terminal does. One who does not read at all for
//! [`PATIENCE`] is not waited for again until it has caught up: what it misses is left out, and it is told how much.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::lock;
use crate::problem::{Problem, ProblemKind};

/// Bytes of output that are kept for those who attach later.
pub const HISTORY: usize = 16 << 10;
/// Bytes of output that may wait for a viewer.
const QUEUE: usize = 256 << 10;
/// How long the guest's output waits for a viewer whose queue is full.
pub const PATIENCE: Duration = Duration::from_millis(250);
/// Most viewers at once.
pub const VIEWERS: usize = 16;
/// How long a viewer's input waits for a guest that takes none, before it is offered again: from, and to.
const OFFER_AGAIN: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(500));

/// Where a guest takes what is typed.
pub trait Keyboard: Send + Sync + 'static {
    /// Gives input to the guest; tells how many bytes of it were accepted. Must not wait.
    fn input(&self, data: &[u8]) -> usize;

    /// Tells the guest the size of the terminal, in characters; without effect on a serial port.
    fn resize(&self, columns: u16, rows: u16);
}

struct Queue {
    id: u64,
    bytes: VecDeque<u8>,
    /// Bytes left out before what comes next.
    lost: u64,
    /// It was waited for in vain, and has not caught up since.
    lagging: bool,
    changed: Arc<Notify>,
}

#[derive(Default)]
struct Hub {
    history: VecDeque<u8>,
    queues: Vec<Queue>,
    next_id: u64,
    keyboard: Option<Arc<dyn Keyboard>>,
    size: Option<(u16, u16)>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    hub: Mutex<Hub>,
    /// A viewer took bytes, or left.
    room: Condvar,
    /// Another keyboard, or none any more.
    connected: Notify,
}

/// The guest's terminal. Clones are the same terminal; it outlives a machine that restarts.
#[derive(Clone, Default)]
pub struct Terminal(Arc<Shared>);

impl fmt::Debug for Terminal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Terminal with {} viewers",
            lock(&self.0.hub).queues.len()
        )
    }
}

impl Terminal {
    /// The guest wrote this. Waits a little if a viewer is behind.
    pub fn push(&self, bytes: &[u8]) {
        let mut hub = lock(&self.0.hub);
        let old = (hub.history.len() + bytes.len()).saturating_sub(HISTORY);
        let old = old.min(hub.history.len());
        hub.history.drain(..old);
        let kept = &bytes[bytes.len().saturating_sub(HISTORY)..];
        hub.history.extend(kept);
        for piece in bytes.chunks(QUEUE / 4) {
            hub = self.make_room(hub, piece.len());
            for queue in &mut hub.queues {
                if queue.lagging {
                    queue.lost += piece.len() as u64;
                } else {
                    queue.bytes.extend(piece);
                    queue.changed.notify_one();
                }
            }
        }
    }

    /// Waits until every viewer that reads has room, or has shown that it does not read.
    fn make_room<'a>(
        &'a self,
        mut hub: std::sync::MutexGuard<'a, Hub>,
        count: usize,
    ) -> std::sync::MutexGuard<'a, Hub> {
        let full = |queue: &Queue| !queue.lagging && queue.bytes.len() + count > QUEUE;
        let end = Instant::now() + PATIENCE;
        while hub.queues.iter().any(full) && !hub.closed {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let late = hub.queues.iter_mut().filter(|queue| full(queue));
                late.for_each(|queue| queue.lagging = true);
                break;
            }
            hub = self
                .0
                .room
                .wait_timeout(hub, left)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
        hub
    }

    /// From now on the guest takes input here.
    pub fn connect(&self, keyboard: Arc<dyn Keyboard>) {
        let mut hub = lock(&self.0.hub);
        if let Some((columns, rows)) = hub.size {
            keyboard.resize(columns, rows);
        }
        hub.keyboard = Some(keyboard);
        drop(hub);
        self.0.connected.notify_waiters();
    }

    /// The machine is gone for now; input waits for the next.
    pub fn disconnect(&self) {
        lock(&self.0.hub).keyboard = None;
    }

    /// The guest is gone for good: viewers get what is left, and then see the end.
    pub fn close(&self) {
        let mut hub = lock(&self.0.hub);
        hub.closed = true;
        hub.keyboard = None;
        hub.queues
            .iter()
            .for_each(|queue| queue.changed.notify_one());
        drop(hub);
        self.0.room.notify_all();
        self.0.connected.notify_waiters();
    }

    /// Tells the guest the size of the window that was looked at last.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut hub = lock(&self.0.hub);
        hub.size = Some((columns, rows));
        let keyboard = hub.keyboard.clone();
        drop(hub);
        if let Some(keyboard) = keyboard {
            keyboard.resize(columns, rows);
        }
    }

    /// Looks at the terminal from now on, beginning with what the guest wrote last.
    ///
    /// # Errors
    /// The guest is gone, or too many look already.
    pub fn attach(&self) -> Result<Viewer, Problem> {
        let mut hub = lock(&self.0.hub);
        if hub.closed {
            return Err(ProblemKind::Ended.into());
        }
        if hub.queues.len() >= VIEWERS {
            return Err(Problem::new(ProblemKind::Busy)
                .cause(format!("{VIEWERS} are attached to its terminal already"))
                .fix("detach one of them"));
        }
        let changed = Arc::new(Notify::new());
        let id = hub.next_id;
        hub.next_id += 1;
        let bytes = hub.history.clone();
        changed.notify_one();
        hub.queues.push(Queue {
            id,
            bytes,
            lost: 0,
            lagging: false,
            changed: Arc::clone(&changed),
        });
        Ok(Viewer {
            id,
            changed,
            terminal: self.clone(),
        })
    }

    /// Offers input to the guest; how many bytes of it were accepted, or `None` if the guest is gone for good.
    fn offer(&self, data: &[u8]) -> Option<usize> {
        let hub = lock(&self.0.hub);
        if hub.closed {
            return None;
        }
        let keyboard = hub.keyboard.clone();
        drop(hub);
        Some(keyboard.map_or(0, |keyboard| keyboard.input(data)))
    }
}

/// Someone who is attached. Dropping it detaches.
#[derive(Debug)]
pub struct Viewer {
    id: u64,
    changed: Arc<Notify>,
    terminal: Terminal,
}

impl Viewer {
    /// Waits for output; `None` once the guest is gone and everything was read.
    pub async fn read(&self) -> Option<Vec<u8>> {
        loop {
            if let Some(bytes) = self.take() {
                return bytes;
            }
            self.changed.notified().await;
        }
    }

    /// Some output; `Some(None)` at the end, `None` if there is nothing at the moment.
    fn take(&self) -> Option<Option<Vec<u8>>> {
        let mut hub = lock(&self.terminal.0.hub);
        let closed = hub.closed;
        let queue = hub.queues.iter_mut().find(|queue| queue.id == self.id)?;
        if !queue.bytes.is_empty() {
            let bytes = std::mem::take(&mut queue.bytes).into();
            drop(hub);
            self.terminal.0.room.notify_all();
            return Some(Some(bytes));
        }
        if queue.lost > 0 {
            let lost = std::mem::take(&mut queue.lost);
            queue.lagging = false;
            let note = format!("\r\n[trapgate: {lost} bytes of output are missing here]\r\n");
            return Some(Some(note.into_bytes()));
        }
        queue.lagging = false;
        closed.then_some(None)
    }

    /// Types all of `data`, and waits as often as the guest needs; `false` if the guest is gone for good.
    pub async fn write(&self, mut data: &[u8]) -> bool {
        let mut pause = OFFER_AGAIN.0;
        loop {
            let connected = self.terminal.0.connected.notified();
            let Some(taken) = self.terminal.offer(data) else {
                return false;
            };
            data = &data[taken..];
            if data.is_empty() {
                return true;
            }
            // The guest does not say when it takes input again. Nobody waits here while nobody types.
            pause = if taken > 0 {
                OFFER_AGAIN.0
            } else {
                (pause * 2).min(OFFER_AGAIN.1)
            };
            let _ = tokio::time::timeout(pause, connected).await;
        }
    }
}

impl Drop for Viewer {
    fn drop(&mut self) {
        lock(&self.terminal.0.hub)
            .queues
            .retain(|queue| queue.id != self.id);
        self.terminal.0.room.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap()
            .block_on(future)
    }

    #[derive(Default)]
    struct Typed {
        bytes: Mutex<Vec<u8>>,
        /// Bytes that it takes at a time; 0 refuses every other call.
        calls: AtomicUsize,
    }

    impl Keyboard for Typed {
        fn input(&self, data: &[u8]) -> usize {
            let taken = match self.calls.fetch_add(1, Ordering::Relaxed) % 2 {
                0 => 0,
                _ => data.len().min(3),
            };
            lock(&self.bytes).extend(&data[..taken]);
            taken
        }

        fn resize(&self, columns: u16, rows: u16) {
            lock(&self.bytes).extend(format!("<{columns}x{rows}>").bytes());
        }
    }

    #[test]
    fn everyone_sees_the_output_and_those_who_come_late_its_end() {
        let terminal = Terminal::default();
        let early = terminal.attach().unwrap();
        terminal.push(&vec![b'x'; 2 * HISTORY]);
        terminal.push(b"end");
        let late = terminal.attach().unwrap();
        terminal.push(b"more");
        terminal.close();

        let all = |viewer: &Viewer| {
            let mut seen = Vec::new();
            while let Some(bytes) = run(viewer.read()) {
                seen.extend(bytes);
            }
            seen
        };

        let seen = all(&early);
        assert_eq!(seen.len(), 2 * HISTORY + 7);
        assert!(seen.ends_with(b"xendmore"));
        let seen = all(&late);
        assert_eq!(seen.len(), HISTORY + 4);
        assert!(seen.ends_with(b"xendmore"));
    }

    #[test]
    fn input_arrives_whole_although_the_guest_takes_it_in_pieces() {
        let terminal = Terminal::default();
        let viewer = terminal.attach().unwrap();
        let keyboard = Arc::new(Typed::default());
        terminal.connect(keyboard.clone());
        assert!(run(viewer.write(b"hello, guest")));
        assert_eq!(*lock(&keyboard.bytes), b"hello, guest");
    }

    #[test]
    fn input_waits_for_a_machine_that_restarts_and_ends_with_the_last() {
        let terminal = Terminal::default();
        let viewer = terminal.attach().unwrap();
        terminal.resize(80, 25);
        let keyboard = Arc::new(Typed::default());
        let connect = {
            let (terminal, keyboard) = (terminal.clone(), keyboard.clone());
            std::thread::spawn(move || terminal.connect(keyboard))
        };
        assert!(run(viewer.write(b"x")));
        connect.join().unwrap();
        assert_eq!(*lock(&keyboard.bytes), b"<80x25>x");
        terminal.disconnect();
        terminal.close();
        assert!(!run(viewer.write(b"y")));
        assert_eq!(terminal.attach().unwrap_err().kind, ProblemKind::Ended);
    }

    #[test]
    fn viewer_that_does_not_read_misses_output_and_is_told_how_much() {
        let terminal = Terminal::default();
        let asleep = terminal.attach().unwrap();
        let total = QUEUE + 100_000;
        for _ in 0..total / 1000 {
            terminal.push(&[b'x'; 1000]);
        }
        // What is there already comes first, then what is missing, then what comes afterwards.
        let first = run(asleep.read()).unwrap();
        assert!(first.len() <= QUEUE);
        let note = String::from_utf8(run(asleep.read()).unwrap()).unwrap();
        let missing = total / 1000 * 1000 - first.len();
        assert!(note.contains(&format!(" {missing} bytes")), "{note}");
        terminal.push(b"awake");
        assert_eq!(run(asleep.read()).unwrap(), b"awake");
    }

    #[test]
    fn viewers_are_limited_and_one_who_leaves_makes_room() {
        let terminal = Terminal::default();
        let mut viewers: Vec<_> = (0..VIEWERS).map(|_| terminal.attach().unwrap()).collect();
        assert_eq!(terminal.attach().unwrap_err().kind, ProblemKind::Busy);
        viewers.pop();
        assert!(terminal.attach().is_ok());
    }
}
