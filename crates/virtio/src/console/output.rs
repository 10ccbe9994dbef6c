//! From the guest to the host: each port's transmit queue, on a thread of its own, so that one
//! whose reader is slow holds up neither the others nor the guest's processors.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use trapgate_memory::GuestMemory;
use trapgate_pci::StateError;

use crate::queue::{copy_out, length};
use crate::worker::Job;
use crate::{Chain, Notifier, PortOutput, ProtocolError, QueuePosition, Virtqueue};

/// Bytes taken out of the guest at a time. They count as written as soon as they are here.
const BATCH: usize = 64 << 10;
/// Buffers looked at in a step, since a guest may queue empty ones.
const BUFFERS: usize = 256;
/// Bytes that are kept of what a queue holds when the guest resets the device: more than Linux queues for a port (128
/// buffers of 32 KiB).
const KEPT: usize = 4 << 20;

pub(super) struct Active {
    pub(super) queue: Virtqueue,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) notifier: Arc<Notifier>,
}

/// What the thread works on.
#[derive(Default)]
pub(super) struct Output {
    pub(super) active: Option<Active>,
    chain: Chain,
    /// How far the buffer in `chain` has been taken, if one is in hand.
    taken: Option<u64>,
    /// Bytes of a queue that is gone, which the host has yet to get.
    kept: VecDeque<u8>,
    /// That the guest opened or closed the port, which the host has yet to hear: two at most.
    opened: VecDeque<bool>,
}

/// What only the thread touches.
pub(super) struct Host {
    output: Box<dyn PortOutput>,
    batch: Vec<u8>,
    /// To be told before and after the batch.
    before: Option<bool>,
    after: VecDeque<bool>,
}

impl Host {
    pub(super) fn new(output: Box<dyn PortOutput>) -> Self {
        Self {
            output,
            batch: Vec::new(),
            before: None,
            after: VecDeque::new(),
        }
    }
}

/// A buffer of the guest's of which the host has taken a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InHand {
    /// Index of the first descriptor of its chain.
    pub head: u16,
    /// Bytes taken.
    pub taken: u64,
}

impl Output {
    /// How far its queue has come, and what is in hand.
    pub(super) fn save(&self) -> (Option<QueuePosition>, Option<InHand>) {
        let Self {
            active,
            chain,
            taken,
            // This host's, as the queue that they were in is gone.
            kept: _,
            // Said again to whoever is there after a restore.
            opened: _,
        } = self;
        let in_hand = taken.map(|taken| InHand {
            head: chain.head,
            taken,
        });
        (
            active.as_ref().map(|active| active.queue.position()),
            in_hand,
        )
    }

    /// Takes up again what was in hand; the queue is there already, if there is one.
    pub(super) fn restore(&mut self, in_hand: Option<InHand>) -> Result<(), StateError> {
        let Some(InHand { head, taken }) = in_hand else {
            return Ok(());
        };
        let failed = |reason: String| StateError::Environment {
            kind: "virtio-console",
            reason,
        };
        let Some(active) = &self.active else {
            return Err(failed(
                "a buffer is in hand, and its queue is off".to_owned(),
            ));
        };
        active
            .queue
            .pop_again(head, &mut self.chain)
            .map_err(|error| failed(error.to_string()))?;
        let valid = taken <= length(&self.chain.readable);
        StateError::check(valid, "virtio-console", "bytes taken of a buffer", taken)?;
        self.taken = Some(taken);
        Ok(())
    }

    /// The port changed from closed to open, or back.
    pub(super) fn set_opened(&mut self, open: bool) {
        // A guest that toggles faster than the host listens: leave one of its pulses out.
        if self.opened.len() == 2 {
            self.opened.pop_back();
        } else {
            self.opened.push_back(open);
        }
    }

    /// The guest resets the device. What it had queued before was written: a guest that powers off resets its devices
    /// right after its last words, and does not wait until somebody has read them.
    pub(super) fn reset(&mut self) {
        let mut batch = Vec::new();
        for _ in 0..KEPT / BATCH {
            batch.clear();
            let gathered = self.gather(&mut batch);
            let room = KEPT - self.kept.len();
            self.kept.extend(batch.iter().take(room));
            if !gathered.is_ok_and(|gathered| gathered.more) {
                break;
            }
        }
        self.forget();
    }

    /// Forgets the queue.
    pub(super) fn forget(&mut self) {
        self.active = None;
        self.taken = None;
    }

    /// Fills `batch` from the queue.
    fn gather(&mut self, batch: &mut Vec<u8>) -> Result<Gathered, ProtocolError> {
        let Some(Active { queue, memory, .. }) = &mut self.active else {
            return Ok(Gathered::default());
        };
        let mut pushed = false;
        let mut more = true;
        for _ in 0..BUFFERS {
            if self.taken.is_none() {
                if !queue.pop(&mut self.chain)? {
                    more = false;
                    break;
                }
                self.taken = Some(0);
            }
            let taken = self.taken.unwrap_or(0);
            let left = length(&self.chain.readable) - taken;
            let start = batch.len();
            let size = left.min((BATCH - start) as u64);
            batch.resize(start + size as usize, 0);
            copy_out(memory, &self.chain.readable, taken, &mut batch[start..]);
            if size < left {
                self.taken = Some(taken + size);
                break;
            }
            self.taken = None;
            queue.push(self.chain.head, 0)?;
            pushed = true;
        }
        Ok(Gathered { more, pushed })
    }

    /// Fills `batch`, and tells the guest; whether there is more.
    fn advance(&mut self, batch: &mut Vec<u8>) -> Result<bool, ProtocolError> {
        if !self.kept.is_empty() {
            let bytes = self.kept.len().min(BATCH);
            batch.extend(self.kept.drain(..bytes));
            return Ok(true);
        }
        let Gathered { more, pushed } = self.gather(batch)?;
        if let Some(active) = &mut self.active
            && pushed
        {
            active.queue.signal()?;
        }
        Ok(more)
    }
}

/// What a look at the queue gave.
#[derive(Default)]
struct Gathered {
    /// The queue may have more.
    more: bool,
    /// Buffers went back to the guest.
    pushed: bool,
}

impl Job for Output {
    type Outside = Host;

    fn step(&mut self, host: &mut Host) -> bool {
        host.batch.clear();
        let more = self.advance(&mut host.batch).unwrap_or_else(|error| {
            if let Some(active) = self.active.take() {
                active.notifier.fail(error);
            }
            self.taken = None;
            false
        });
        host.before = self.opened.pop_front_if(|open| *open);
        // That the port is closed is told after all that was written to it.
        if !more {
            host.after.append(&mut self.opened);
        }
        more
    }

    fn after_step(host: &mut Host) {
        if let Some(open) = host.before.take() {
            host.output.guest_open(open);
        }
        if !host.batch.is_empty() {
            host.output.write(&host.batch);
        }
        for open in host.after.drain(..) {
            host.output.guest_open(open);
        }
    }
}
