//! Keeps the guest off the stage until we have said what runs.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// Output of the guest that comes before the first line of ours waits behind it. Clones are the same curtain.
#[derive(Clone, Default)]
pub(crate) struct Curtain(Arc<(Mutex<bool>, Condvar)>);

impl Curtain {
    /// Lets the guest's output pass, from now on.
    pub(crate) fn raise(&self) {
        let (raised, changed) = &*self.0;
        *raised.lock().unwrap_or_else(PoisonError::into_inner) = true;
        changed.notify_all();
    }

    /// Waits until [`Self::raise`].
    pub(crate) fn wait(&self) {
        let (raised, changed) = &*self.0;
        let raised = raised.lock().unwrap_or_else(PoisonError::into_inner);
        drop(changed.wait_while(raised, |raised| !*raised));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn output_comes_after_the_curtain_is_raised() {
        let curtain = Curtain::default();
        let (events, order) = channel();
        let guest = {
            let (curtain, events) = (curtain.clone(), events.clone());
            std::thread::spawn(move || {
                curtain.wait();
                events.send("guest").unwrap();
            })
        };
        events.send("we").unwrap();
        curtain.raise();
        guest.join().unwrap();
        // Raised once, it stays so.
        curtain.wait();
        assert_eq!(order.try_iter().collect::<Vec<_>>(), ["we", "guest"]);
    }
}
