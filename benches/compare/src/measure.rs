//! The rounds: everything natively, then under trapgate, then under TCG, and again.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::Failure;
use crate::arguments::{Arguments, BOOT};
use crate::host;
use crate::image::Image;
use crate::memory::Watch;
use crate::protocol::Event;
use crate::report::{Lost, Report};
use crate::subject::{RAM_MIB, Running, Silence, Subject, qemu_version};

/// How much longer than a workload may take its process may be silent, before it counts as hanging.
const GRACE: Duration = Duration::from_secs(10);
/// From here on the clock of a guest is not believed any more, as a part of what the host's clock says.
const CLOCK_ERROR: f64 = 0.01;
/// Stretches that are too short to compare clocks by, in seconds.
const SHORT: f64 = 3.0;

/// All that one subject did, in all rounds.
#[derive(Default)]
pub(crate) struct Results {
    /// Seconds that each run took, by workload.
    pub(crate) seconds: BTreeMap<String, Vec<f64>>,
    /// What each workload computed first.
    pub(crate) checks: BTreeMap<String, u64>,
    /// Seconds from the start to init.
    pub(crate) boots: Vec<f64>,
    /// MiB beyond guest RAM in each round, where it was most.
    pub(crate) memory: Vec<f64>,
    /// Workloads that do not run there, and why.
    pub(crate) skipped: BTreeMap<String, String>,
    /// Workloads that failed, and how; they are not tried again.
    pub(crate) failed: BTreeMap<String, String>,
    /// Seconds of the guest's clock for one of the host's, where that had to be corrected.
    pub(crate) clock: Vec<f64>,
    pub(crate) engine: Option<String>,
}

/// Runs everything.
///
/// # Errors
/// There is nothing to run, or a process cannot be started at all.
pub(crate) fn measure(arguments: &Arguments, image: &Image) -> Result<Report, Failure> {
    let mut subjects = vec![Subject::Native];
    let mut about = host::describe();
    about.push(("guest kernel", image.kernel_name.clone()));
    about.push(("guest", format!("1 processor, {RAM_MIB} MiB")));
    let mut notes = Vec::new();
    if !arguments.no_trapgate {
        subjects.push(Subject::Trapgate);
        about.push(("trapgate", env!("CARGO_PKG_VERSION").to_owned()));
    }
    if !arguments.no_qemu {
        match qemu_version(&arguments.qemu) {
            Some(version) => {
                subjects.push(Subject::Tcg);
                about.push((
                    "QEMU",
                    format!("{version}, -accel tcg -cpu {}", arguments.qemu_cpu),
                ));
            }
            None => notes.push(format!(
                "TCG is not compared: {} is not installed",
                arguments.qemu.display()
            )),
        }
    }
    let load = host::load();
    let mut results: BTreeMap<Subject, Results> = BTreeMap::new();
    for round in 1..=arguments.rounds() {
        for &subject in &subjects {
            eprint!(
                "round {round} of {}, {}:",
                arguments.rounds(),
                subject.name()
            );
            let begun = Instant::now();
            one_round(
                subject,
                results.entry(subject).or_default(),
                arguments,
                image,
            )?;
            eprintln!(" ({:.0} s)", begun.elapsed().as_secs_f64());
        }
    }
    check_results(&mut results);
    // Before it began all load is of others; at the end this program has made some itself.
    let busy = [(load, 0.7), (host::load(), 2.5)];
    if let Some(load) = busy
        .into_iter()
        .find_map(|(load, quiet)| load.filter(|load| *load > quiet))
    {
        notes.push(format!(
            "others used this machine (load {load}): figures are rough"
        ));
    }
    if arguments.quick {
        notes.push("--quick: everything is small and ran once, so figures are rough".to_owned());
    }
    Ok(Report::new(about, notes, arguments, &results))
}

/// Runs all workloads once more; boots again after one that took its machine with it.
fn one_round(
    subject: Subject,
    results: &mut Results,
    arguments: &Arguments,
    image: &Image,
) -> Result<(), Failure> {
    let mut left: Vec<&str> = arguments
        .workloads()
        .map(|entry| entry.name)
        .filter(|name| !results.failed.contains_key(*name) && !results.skipped.contains_key(*name))
        .collect();
    if subject == Subject::Native && left.is_empty() {
        return Ok(());
    }
    if results.failed.contains_key(BOOT) {
        return Ok(());
    }
    let mut first = true;
    while first || !left.is_empty() {
        first = false;
        let running = subject.start(&left, arguments, image)?;
        let followed = follow(subject, &running, results, arguments.limit());
        let last_words = running.end();
        let Err(stop) = followed else {
            return Ok(());
        };
        let mut reason = match stop.silence {
            Silence::Late => format!(
                "nothing came for {} s",
                (arguments.limit() + GRACE).as_secs()
            ),
            Silence::Ended => "its process ended".to_owned(),
        };
        if !last_words.is_empty() {
            reason += &format!(": {last_words}");
        }
        let lost = stop.during.unwrap_or(BOOT.to_owned());
        eprint!(" [{lost}: {reason}]");
        // What stands before it in the list has run.
        match left.iter().position(|name| *name == lost) {
            Some(index) => left = left.split_off(index + 1),
            None => left.clear(),
        }
        results.failed.insert(lost, reason);
    }
    Ok(())
}

/// Where a process fell silent.
struct Stop {
    silence: Silence,
    /// The workload that ran; none while it booted.
    during: Option<String>,
}

/// Takes what a process says until it has run everything.
fn follow(
    subject: Subject,
    running: &Running,
    results: &mut Results,
    limit: Duration,
) -> Result<(), Stop> {
    let watch =
        (subject != Subject::Native).then(|| Watch::start(running.process(), RAM_MIB << 10));
    let mut during = None;
    let mut clocks: Vec<(Instant, u64)> = Vec::new();
    let mut seconds: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    loop {
        let (at, event) = match running.next(limit + GRACE) {
            Ok(event) => event,
            Err(silence) => {
                take(results, seconds, &clocks);
                return Err(Stop { silence, during });
            }
        };
        match event {
            Event::Engine(engine) => results.engine = Some(engine),
            Event::Init => {
                let taken = at - running.begun;
                eprint!(" init {:.2} s,", taken.as_secs_f64());
                results.boots.push(taken.as_secs_f64());
            }
            Event::Clock(nanoseconds) => clocks.push((at, nanoseconds)),
            Event::Start(name) => {
                eprint!(" {name}");
                during = Some(name);
            }
            Event::Done { name, check, runs } => {
                let expected = *results.checks.entry(name.clone()).or_insert(check);
                if check == expected {
                    let runs = runs.into_iter().map(|nanoseconds| nanoseconds as f64 / 1e9);
                    seconds.entry(name).or_default().extend(runs);
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
            Event::End => {
                let kib = watch.and_then(Watch::most_kib);
                results.memory.extend(kib.map(|kib| kib as f64 / 1024.0));
                take(results, seconds, &clocks);
                return Ok(());
            }
        }
    }
}

/// Adds what was measured to the results, in the host's seconds.
fn take(results: &mut Results, seconds: BTreeMap<String, Vec<f64>>, clocks: &[(Instant, u64)]) {
    let mut factor = 1.0;
    if let [first, .., last] = clocks {
        let host = (last.0 - first.0).as_secs_f64();
        let guest = last.1.saturating_sub(first.1) as f64 / 1e9;
        if host > SHORT && (guest / host - 1.0).abs() > CLOCK_ERROR {
            factor = host / guest;
            results.clock.push(guest / host);
        }
    }
    for (name, runs) in seconds {
        let all = results.seconds.entry(name).or_default();
        all.extend(runs.iter().map(|run| run * factor));
    }
}

/// Fails what a guest computed otherwise than the host.
fn check_results(results: &mut BTreeMap<Subject, Results>) {
    let Some(native) = results.get(&Subject::Native) else {
        return;
    };
    let right = native.checks.clone();
    for (_, of) in results
        .iter_mut()
        .filter(|(subject, _)| **subject != Subject::Native)
    {
        for (name, check) in &of.checks {
            if let Some(right) = right.get(name)
                && right != check
            {
                let reason = format!("computed {check:x}, and on the host {right:x}");
                of.failed.insert(name.clone(), reason);
            }
        }
    }
}

impl Results {
    /// What was lost, for the report.
    pub(crate) fn lost(&self, subject: Subject) -> impl Iterator<Item = Lost> + '_ {
        self.failed.iter().map(move |(workload, reason)| Lost {
            subject,
            workload: workload.clone(),
            reason: reason.clone(),
        })
    }
}
