//! One subject in one round: its process runs a workload whenever it is told to.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::Failure;
use crate::arguments::{Arguments, BOOT};
use crate::image::Image;
use crate::measure::Results;
use crate::memory::Watch;
use crate::protocol::Event;
use crate::subject::{RAM_MIB, Running, Silence, Subject};

/// What comes behind the last workload, by the name under which it fails.
const END: &str = "end";
/// How much longer than a workload may take its process may be silent, before it counts as hanging.
const GRACE: Duration = Duration::from_secs(10);
/// From here on the clock of a guest is not believed any more, as a part of what the host's clock says.
const CLOCK_ERROR: f64 = 0.01;
/// Stretches that are too short to compare clocks by, in seconds.
const SHORT: f64 = 3.0;

/// A process and what it did since it was started. It is started again after a workload that took it along.
pub(crate) struct Session<'a> {
    subject: Subject,
    results: &'a mut Results,
    arguments: &'a Arguments,
    image: &'a Image,
    /// Workloads that it has still to run.
    left: Vec<&'static str>,
    running: Option<Running>,
    watch: Option<Watch>,
    /// What its clock said, and when.
    clocks: Vec<(Instant, u64)>,
    /// By its clock.
    seconds: BTreeMap<String, Vec<f64>>,
}

impl<'a> Session<'a> {
    /// Starts nothing yet.
    pub(crate) fn new(
        subject: Subject,
        results: &'a mut Results,
        arguments: &'a Arguments,
        image: &'a Image,
    ) -> Self {
        let left = arguments.workloads().map(|entry| entry.name);
        let left = left
            .filter(|&name| {
                !results.failed.contains_key(name) && !results.skipped.contains_key(name)
            })
            .collect();
        Self {
            subject,
            results,
            arguments,
            image,
            left,
            running: None,
            watch: None,
            clocks: Vec::new(),
            seconds: BTreeMap::new(),
        }
    }

    /// Starts its process, for the workloads that are left, and waits until it could run one.
    ///
    /// # Errors
    /// It cannot be started at all. One that does not come up is among the results.
    pub(crate) fn start(&mut self) -> Result<(), Failure> {
        let nothing_to_do = self.subject == Subject::Native && self.left.is_empty();
        if nothing_to_do || self.results.failed.contains_key(BOOT) {
            return Ok(());
        }
        let running = self.subject.start(&self.left, self.arguments, self.image)?;
        if self.subject != Subject::Native {
            self.watch = Some(Watch::start(running.process(), RAM_MIB << 10));
        }
        self.running = Some(running);
        self.follow(BOOT, |event| matches!(event, Event::Clock(_)));
        Ok(())
    }

    /// Has a workload run, unless it failed in an earlier round.
    ///
    /// # Errors
    /// The process had to be started again and could not.
    pub(crate) fn run(&mut self, name: &'static str) -> Result<(), Failure> {
        if !self.left.contains(&name) {
            return Ok(());
        }
        if self.running.is_none() {
            self.start()?;
        }
        self.left.retain(|other| *other != name);
        self.go(name, |event| event.over() == Some(name));
        Ok(())
    }

    /// Has the process say its last, and ends it.
    pub(crate) fn end(mut self) {
        self.go(END, |event| matches!(event, Event::End));
        self.settle();
    }

    /// Tells the process to go on, if there is one.
    fn go(&mut self, during: &str, until: impl Fn(&Event) -> bool) {
        if let Some(running) = &mut self.running {
            running.go();
            self.follow(during, until);
        }
    }

    /// Takes what the process says until something has been said, or it falls silent.
    fn follow(&mut self, during: &str, until: impl Fn(&Event) -> bool) {
        let limit = self.arguments.limit() + GRACE;
        while let Some(running) = &self.running {
            match running.next(limit) {
                Ok((at, event)) => {
                    let is_last = until(&event);
                    self.take(at, event);
                    if is_last {
                        return;
                    }
                }
                Err(silence) => self.lose(during, silence),
            }
        }
    }

    fn take(&mut self, at: Instant, event: Event) {
        let results = &mut *self.results;
        match event {
            Event::Engine(engine) => results.engine = Some(engine),
            Event::Init => {
                if let Some(running) = &self.running {
                    let taken = (at - running.begun).as_secs_f64();
                    eprint!(" {} init {taken:.2} s,", self.subject.name());
                    results.boots.push(taken);
                }
            }
            Event::Clock(nanoseconds) => self.clocks.push((at, nanoseconds)),
            Event::Done { name, check, runs } => {
                let expected = *results.checks.entry(name.clone()).or_insert(check);
                if check == expected {
                    let runs = runs.into_iter().map(|nanoseconds| nanoseconds as f64 / 1e9);
                    self.seconds.entry(name).or_default().extend(runs);
                } else {
                    let reason = format!("computed {check:x}, and in another round {expected:x}");
                    results.failed.insert(name, reason);
                }
            }
            Event::Skip { name, reason } => {
                results.skipped.insert(name, reason);
            }
            Event::Fail { name, reason } => {
                eprint!(" [{reason}]");
                results.failed.insert(name, reason);
            }
            Event::End => {}
        }
    }

    /// Ends a process that fell silent, and says what was lost by it.
    fn lose(&mut self, lost: &str, silence: Silence) {
        let Some(running) = self.running.take() else {
            return;
        };
        let mut reason = match silence {
            Silence::Late => format!(
                "nothing came for {} s",
                (self.arguments.limit() + GRACE).as_secs()
            ),
            Silence::Ended => "its process ended".to_owned(),
        };
        let last_words = running.end();
        if !last_words.is_empty() {
            reason += &format!(": {last_words}");
        }
        eprint!(" [{lost}: {reason}]");
        self.results.failed.insert(lost.to_owned(), reason);
        self.settle();
    }

    /// Adds what was measured since the process was started to the results, in the host's seconds.
    fn settle(&mut self) {
        let kib = self.watch.take().and_then(Watch::most_kib);
        let mib = kib.map(|kib| kib as f64 / 1024.0);
        self.results.memory.extend(mib);
        let mut factor = 1.0;
        if let [first, .., last] = &self.clocks[..] {
            let host = (last.0 - first.0).as_secs_f64();
            let guest = last.1.saturating_sub(first.1) as f64 / 1e9;
            if host > SHORT && (guest / host - 1.0).abs() > CLOCK_ERROR {
                factor = host / guest;
                self.results.clock.push(guest / host);
            }
        }
        self.clocks.clear();
        for (name, runs) in std::mem::take(&mut self.seconds) {
            let all = self.results.seconds.entry(name).or_default();
            all.extend(runs.iter().map(|run| run * factor));
        }
    }
}
