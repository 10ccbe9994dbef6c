//! Running a machine to its end, and what it wrote.
#![allow(
    dead_code,
    unused_imports,
    reason = "each test binary uses its own part"
)]

mod skipped;

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use trapgate_vmm::{Machine, Outcome, PortOutput};

pub(crate) use skipped::skipped;

/// Text that grows, and can be waited for.
#[derive(Clone, Default)]
pub(crate) struct Transcript(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Transcript {
    /// Adds output.
    pub(crate) fn add(&self, bytes: &[u8]) {
        self.0.0.lock().unwrap().extend_from_slice(bytes);
        self.0.1.notify_all();
    }

    /// All of it.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap()).into_owned()
    }

    /// Waits until it contains `text`.
    #[track_caller]
    pub(crate) fn wait_for(&self, text: &str) {
        let came = self.waits_until(LIMIT, |all| all.contains(text));
        assert!(came, "`{text}` never came; what came:\n{}", self.text());
    }

    /// Waits until `is_done` of all of it, at most `limit`; whether it came to that.
    pub(crate) fn waits_until(&self, limit: Duration, is_done: impl Fn(&str) -> bool) -> bool {
        let guard = self.0.0.lock().unwrap();
        let missing = |bytes: &mut Vec<u8>| !is_done(&String::from_utf8_lossy(bytes));
        let (_guard, timeout) = self.0.1.wait_timeout_while(guard, limit, missing).unwrap();
        !timeout.timed_out()
    }
}

impl PortOutput for Transcript {
    fn write(&mut self, data: &[u8]) {
        self.add(data);
    }
}

/// Long enough that a guest that is not done by then never will be, even on a host that is busy.
pub(crate) const LIMIT: Duration = Duration::from_secs(600);

/// Waits for the end of a machine; `serial` is what it said until then.
#[track_caller]
pub(crate) fn end<'a>(machine: &'a Machine, serial: &Transcript) -> &'a Outcome {
    if let Some(outcome) = machine.wait_for(LIMIT) {
        return outcome;
    }
    let states = machine.pause().processors();
    let at: Vec<_> = states
        .iter()
        .map(|state| (state.rip, state.system.activity))
        .collect();
    panic!(
        "the guest does not end; its processors are at {at:x?}, its serial port said:\n{}",
        serial.text()
    );
}
