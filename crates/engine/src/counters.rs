//! Numbers that an engine keeps of a virtual processor, for people who want to know where the time goes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How a [`Counter`] moves, and in what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Events, of which there only are more and more.
    Events,
    /// Nanoseconds of host time, which only are more and more.
    Nanoseconds,
    /// Bytes that are in use at the moment.
    Bytes,
    /// How many there are at the moment.
    Level,
}

/// A number of one virtual processor. Its thread writes it, others read it at any time, without a lock.
///
/// On a fast path count in a plain variable, and [`Self::set`] it here where it costs nothing: at the latest when
/// [`crate::Vcpu::run`] returns. Whoever reads kicks the processor before if the number is to be fresh.
#[derive(Clone, Debug)]
pub struct Counter {
    name: &'static str,
    help: &'static str,
    measure: Measure,
    value: Arc<AtomicU64>,
}

impl Counter {
    /// A counter at 0. `name` is in lower case with underscores, `help` a short sentence without its full stop.
    pub fn new(name: &'static str, measure: Measure, help: &'static str) -> Self {
        Self {
            name,
            help,
            measure,
            value: Arc::default(),
        }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// What it counts, for people.
    pub fn help(&self) -> &'static str {
        self.help
    }

    /// How it moves.
    pub fn measure(&self) -> Measure {
        self.measure
    }

    /// Adds to it.
    pub fn add(&self, more: u64) {
        self.value.fetch_add(more, Ordering::Relaxed);
    }

    /// Replaces its value.
    pub fn set(&self, value: u64) {
        self.value.store(value, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.value.load(Ordering::Relaxed)
    }
}

/// What an engine is to find out beside its counters. Both cost time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Observe {
    /// Measure where host time goes, for [`Cost::nanoseconds`], and count every guest instruction.
    pub costs: bool,
    /// Tell `perf` what translated code belongs to, in `/tmp/perf-PID.map`.
    pub perf_map: bool,
}

/// Something that a processor's engine spends host time on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cost {
    /// What it is, of a few kinds; in lower case with underscores.
    pub kind: &'static str,
    /// Which of this kind, such as an instruction; empty if there is but one.
    pub detail: String,
    /// How often it happened.
    pub count: u64,
    /// Host time that it took, without that of other costs within it; `None` if [`Observe::costs`] was not asked for.
    pub nanoseconds: Option<u64>,
    /// The time is not measured but its count times what one is known to take.
    pub estimated: bool,
}

/// The costs of one virtual processor, which other threads read at any time.
pub trait Costs: Send + Sync {
    /// All that happened at least once, in any order.
    fn costs(&self) -> Vec<Cost>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clone_is_the_same_counter() {
        let counter = Counter::new("misses", Measure::Events, "Times that it missed");
        let reader = counter.clone();
        counter.set(5);
        counter.add(2);
        assert_eq!((reader.get(), reader.name()), (7, "misses"));
    }
}
