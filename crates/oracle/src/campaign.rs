//! Batch after batch, on several threads: what is the same for instructions and for programs.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use trapgate_x86::profile::Level;

use crate::bench::OracleError;
use crate::engine::Kind;
use crate::random::Random;

/// What to run, of whichever kind.
#[derive(Clone, Debug)]
pub struct Campaign {
    /// Where all choices come from.
    pub seed: u64,
    /// The first batch.
    pub first: u64,
    /// Batches at most.
    pub batches: u64,
    /// Time at most.
    pub time: Duration,
    /// Threads, each with a native child and engines of its own.
    pub jobs: usize,
    /// Which profile.
    pub level: Level,
    /// Which engines.
    pub engines: Vec<Kind>,
    /// Differences after which to stop.
    pub enough: u64,
}

/// A campaign under way.
pub(crate) struct Course<'a> {
    campaign: &'a Campaign,
    next: AtomicU64,
    stop: AtomicBool,
    begun: Instant,
    minutes: AtomicU64,
}

impl<'a> Course<'a> {
    pub(crate) fn new(campaign: &'a Campaign) -> Self {
        Self {
            campaign,
            next: AtomicU64::new(campaign.first),
            stop: AtomicBool::new(false),
            begun: Instant::now(),
            minutes: AtomicU64::new(0),
        }
    }

    /// Does the work of a thread on each of them.
    pub(crate) fn run(
        &self,
        work: impl Fn() -> Result<(), OracleError> + Sync,
    ) -> Result<(), OracleError> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.campaign.jobs.max(1))
                .map(|_| scope.spawn(&work))
                .collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().expect("the oracle's threads do not panic"))
        })
    }

    /// The number of the next batch and where its choices come from, unless that was all.
    pub(crate) fn next(&self) -> Option<(u64, Random)> {
        let Campaign {
            seed,
            first,
            batches,
            time,
            ..
        } = *self.campaign;
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        if number >= first.saturating_add(batches)
            || self.begun.elapsed() >= time
            || self.stop.load(Ordering::Relaxed)
        {
            return None;
        }
        let mut random = Random(seed ^ number.wrapping_mul(0xd134_2543_de82_ef95));
        random.next();
        Some((number, random))
    }

    /// Ends it if there were enough differences, and tells a person each minute where it is.
    pub(crate) fn note(&self, done: u64, what: &str, different: u64) {
        if different >= self.campaign.enough {
            self.stop.store(true, Ordering::Relaxed);
        }
        let minutes = self.begun.elapsed().as_secs() / 60;
        if self.minutes.swap(minutes, Ordering::Relaxed) < minutes {
            eprintln!("{minutes} minutes: {done} {what}, {different} differences");
        }
    }
}
