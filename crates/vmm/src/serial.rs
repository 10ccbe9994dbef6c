//! The first serial port's two directions, apart from the chipset's lock.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::board::Board;
use crate::lock;

/// Bytes of output that may wait for the host before the guest does.
const PATIENCE: usize = 256 << 10;
/// How long the guest waits then, for each byte. A host that does not read at all so gets the bytes
/// at a rate at which they cost next to no memory, and the guest still answers to a stop.
const THROTTLE: Duration = Duration::from_millis(500);

#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    /// The sink is being given bytes.
    writing: bool,
    closed: bool,
}

/// What COM1 sent and the host has not taken yet.
#[derive(Default)]
pub(crate) struct SerialOutput {
    queue: Mutex<Queue>,
    arrived: Condvar,
    taken: Condvar,
}

impl SerialOutput {
    /// Adds output. Takes no other lock, and does not wait.
    pub(crate) fn push(&self, bytes: &[u8]) {
        lock(&self.queue).bytes.extend_from_slice(bytes);
        self.arrived.notify_one();
    }

    /// Waits a little if the host is behind.
    pub(crate) fn throttle(&self) {
        let queue = lock(&self.queue);
        if queue.bytes.len() >= PATIENCE {
            drop(self.taken.wait_timeout_while(queue, THROTTLE, |queue| {
                queue.bytes.len() >= PATIENCE && !queue.closed
            }));
        }
    }

    /// Gives everything to the sink, until [`Self::close`].
    pub(crate) fn run(&self, sink: &mut dyn FnMut(&[u8])) {
        let mut batch = Vec::new();
        loop {
            let mut queue = lock(&self.queue);
            queue.writing = false;
            self.taken.notify_all();
            let mut queue = self
                .arrived
                .wait_while(queue, |queue| queue.bytes.is_empty() && !queue.closed)
                .unwrap_or_else(PoisonError::into_inner);
            if queue.bytes.is_empty() {
                return;
            }
            batch.clear();
            std::mem::swap(&mut batch, &mut queue.bytes);
            queue.writing = true;
            drop(queue);
            sink(&batch);
        }
    }

    /// Waits until the host has taken everything; `false` if that takes longer than `limit`.
    pub(crate) fn drain(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        let mut queue = lock(&self.queue);
        while queue.writing || !queue.bytes.is_empty() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            queue = self
                .taken
                .wait_timeout(queue, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }

    /// Ends [`Self::run`] once everything is taken.
    pub(crate) fn close(&self) {
        lock(&self.queue).closed = true;
        self.arrived.notify_all();
        self.taken.notify_all();
    }
}

/// The host's side of COM1's receiver. It may outlive the machine, and then accepts nothing.
#[derive(Clone)]
pub struct SerialHandle {
    pub(crate) board: Arc<Board>,
}

impl SerialHandle {
    /// Gives input to the guest; tells how many bytes of it were accepted.
    pub fn input(&self, data: &[u8]) -> usize {
        self.board.serial_input(data)
    }

    /// Gives all of `data` to the guest, and waits as often as need be; `false` if the machine ended
    /// before.
    pub fn input_all(&self, mut data: &[u8]) -> bool {
        while !data.is_empty() {
            if !self.board.wait_for_serial_room() {
                return false;
            }
            data = &data[self.input(data)..];
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn output_arrives_in_order_and_drain_waits_for_the_sink() {
        let output = Arc::new(SerialOutput::default());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let thread = {
            let (output, seen) = (Arc::clone(&output), Arc::clone(&seen));
            thread::spawn(move || {
                output.run(&mut |bytes: &[u8]| seen.lock().unwrap().extend_from_slice(bytes));
            })
        };
        let sent: Vec<u8> = (0..=255).collect();
        for byte in &sent {
            output.push(&[*byte]);
        }
        assert!(output.drain(Duration::from_secs(60)));
        assert_eq!(*seen.lock().unwrap(), sent);
        output.close();
        thread.join().unwrap();
    }

    #[test]
    fn sink_that_takes_nothing_holds_nobody_up_for_ever() {
        let output = Arc::new(SerialOutput::default());
        let (release, blocked) = mpsc::channel::<()>();
        let thread = {
            let output = Arc::clone(&output);
            thread::spawn(move || {
                output.run(&mut |_: &[u8]| {
                    let _ = blocked.recv();
                });
            })
        };
        output.push(b"x");
        assert!(!output.drain(Duration::from_millis(5)));
        drop(release);
        assert!(output.drain(Duration::from_secs(60)));
        output.close();
        thread.join().unwrap();
    }
}
