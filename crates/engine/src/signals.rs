//! How other threads reach a running vCPU.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Something that a vCPU must notice at its next instruction boundary, or block boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Signal {
    /// Leave [`crate::Vcpu::run`].
    Kick = 1 << 0,
    /// The interrupt controller may have an interrupt.
    Interrupt = 1 << 1,
    /// A non-maskable interrupt.
    Nmi = 1 << 2,
    /// Some engine wants all translations of guest memory looked up again.
    Flush = 1 << 3,
}

/// A word of [`Signal`]s that the vCPU polls, and a place to sleep while it is halted.
#[derive(Default)]
pub struct Signals {
    word: AtomicU32,
    asleep: Mutex<()>,
    wake: Condvar,
    /// For an engine that cannot look at the word while the guest runs.
    interrupter: Option<Box<dyn Fn() + Send + Sync>>,
}

impl fmt::Debug for Signals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Signals").field(&self.word).finish()
    }
}

impl Signals {
    /// Signals of an engine that hands the processor to the host's hardware. `interrupter` is called
    /// on the raising thread, after the signal is in the word, whenever one is raised that was
    /// not; it makes the processor look. An engine that first says that it is about to run, then looks at
    /// [`Self::any`], misses nothing: a sequentially consistent fence stands on either side.
    pub fn with_interrupter(interrupter: impl Fn() + Send + Sync + 'static) -> Self {
        Self {
            interrupter: Some(Box::new(interrupter)),
            ..Self::default()
        }
    }

    /// Raises a signal and wakes the vCPU's thread if it sleeps.
    pub fn raise(&self, signal: Signal) {
        let before = self.word.fetch_or(signal as u32, Ordering::AcqRel);
        if before & signal as u32 == 0 {
            // The lock orders this with the check in `sleep`, so that no wake-up is lost.
            drop(self.asleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
            if let Some(interrupter) = &self.interrupter {
                fence(Ordering::SeqCst);
                interrupter();
            }
        }
    }

    /// Takes a signal back; says whether it was raised.
    pub fn take(&self, signal: Signal) -> bool {
        self.word.fetch_and(!(signal as u32), Ordering::AcqRel) & signal as u32 != 0
    }

    /// Whether any signal is raised.
    #[inline(always)]
    pub fn any(&self) -> bool {
        self.word.load(Ordering::Relaxed) != 0
    }

    /// Whether a signal is raised.
    pub fn is_raised(&self, signal: Signal) -> bool {
        self.word.load(Ordering::Acquire) & signal as u32 != 0
    }

    /// Sleeps until a signal is raised, or for `limit`.
    pub fn sleep(&self, limit: Option<Duration>) {
        let guard = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        if self.any() {
            return;
        }
        match limit {
            Some(limit) => drop(self.wake.wait_timeout_while(guard, limit, |()| !self.any())),
            None => drop(self.wake.wait_while(guard, |()| !self.any())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn signal_raised_before_sleep_is_not_lost() {
        let signals = Signals::default();
        signals.raise(Signal::Interrupt);
        signals.sleep(None);
        assert!(signals.take(Signal::Interrupt));
        assert!(!signals.any());
    }

    #[test]
    fn interrupter_is_called_for_a_new_signal_only_and_sees_it() {
        let calls = Arc::new(AtomicU32::new(0));
        let seen = Arc::clone(&calls);
        let signals = Signals::with_interrupter(move || {
            seen.fetch_add(1, Ordering::Relaxed);
        });
        signals.raise(Signal::Kick);
        signals.raise(Signal::Kick);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        signals.raise(Signal::Nmi);
        assert_eq!(calls.load(Ordering::Relaxed), 2);
        assert!(signals.is_raised(Signal::Kick) && signals.is_raised(Signal::Nmi));
    }

    #[test]
    fn signal_wakes_a_sleeper() {
        let signals = Arc::new(Signals::default());
        let sleeper = {
            let signals = Arc::clone(&signals);
            std::thread::spawn(move || signals.sleep(None))
        };
        signals.raise(Signal::Kick);
        sleeper.join().unwrap();
        assert!(signals.is_raised(Signal::Kick));
    }
}
