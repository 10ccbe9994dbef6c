//! How a function reaches the interrupt controllers.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// A message-signalled interrupt: a write of `data` to `address` (PCI 3.0, 6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Guest-physical, 0xfeex_xxxx on x86.
    pub address: u64,
    /// Vector, delivery and trigger mode.
    pub data: u32,
}

/// Takes message-signalled interrupts. Called with the locks of a function held (see the crate's
/// documentation for the order); from processor threads and device threads.
pub trait MessageSink: Send + Sync {
    /// Delivers a message. The guest chose its address and data: what is not an interrupt message
    /// (0xfeex_xxxx) is to be dropped.
    fn send(&self, message: Message);
}

/// A level-triggered interrupt line. Called like a [`MessageSink`].
pub trait InterruptLine: Send + Sync {
    /// Asserts (`true`) or releases the line. Repeating a level has no effect.
    fn set(&self, asserted: bool);
}

/// A line that several functions share: it is asserted while any of them asserts its input.
pub struct WiredOr {
    output: Arc<dyn InterruptLine>,
    /// How many inputs are asserted.
    asserted: Mutex<usize>,
}

struct Input {
    wire: Arc<WiredOr>,
    level: AtomicBool,
}

impl WiredOr {
    /// Puts a shared line in front of `output`.
    pub fn new(output: Arc<dyn InterruptLine>) -> Arc<Self> {
        Arc::new(Self {
            output,
            asserted: Mutex::new(0),
        })
    }

    /// One more input, released.
    pub fn input(self: &Arc<Self>) -> Arc<dyn InterruptLine> {
        Arc::new(Input {
            wire: Arc::clone(self),
            level: AtomicBool::new(false),
        })
    }
}

impl InterruptLine for Input {
    fn set(&self, asserted: bool) {
        let mut count = self
            .wire
            .asserted
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.level.swap(asserted, Ordering::Relaxed) == asserted {
            return;
        }
        let before = *count > 0;
        if asserted {
            *count += 1;
        } else {
            *count -= 1;
        }
        // The lock stays held, so that two inputs cannot swap the order of their edges.
        if before != (*count > 0) {
            self.wire.output.set(*count > 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Edges(Mutex<Vec<bool>>);

    impl InterruptLine for Edges {
        fn set(&self, asserted: bool) {
            self.0.lock().unwrap().push(asserted);
        }
    }

    #[test]
    fn shared_line_falls_only_when_every_input_has_fallen() {
        let edges = Arc::new(Edges::default());
        let wire = WiredOr::new(Arc::clone(&edges) as _);
        let (a, b) = (wire.input(), wire.input());

        a.set(true);
        b.set(true);
        b.set(true);
        a.set(false);
        assert_eq!(*edges.0.lock().unwrap(), [true]);
        b.set(false);
        assert_eq!(*edges.0.lock().unwrap(), [true, false]);
    }
}
