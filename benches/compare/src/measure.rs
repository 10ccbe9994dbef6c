//! The rounds: each workload natively, under trapgate and under TCG, then the next one, and all again.
//!
//! The speed of a machine that others use as well changes from one minute to the next. What is compared is therefore
//! run within seconds, and the guests stay up for a whole round, each idle while another one works.

use std::collections::BTreeMap;
use std::time::Instant;

use crate::Failure;
use crate::arguments::Arguments;
use crate::host;
use crate::image::Image;
use crate::report::{Lost, Report};
use crate::session::Session;
use crate::subject::{RAM_MIB, Subject, qemu_version};

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
    let mut results: BTreeMap<Subject, Results> = subjects
        .into_iter()
        .map(|subject| (subject, Results::default()))
        .collect();
    for round in 1..=arguments.rounds() {
        eprint!("round {round} of {}:", arguments.rounds());
        let begun = Instant::now();
        one_round(&mut results, arguments, image)?;
        eprintln!(" ({:.0} s)", begun.elapsed().as_secs_f64());
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

/// Runs all workloads once more, each on one subject after the other.
fn one_round(
    results: &mut BTreeMap<Subject, Results>,
    arguments: &Arguments,
    image: &Image,
) -> Result<(), Failure> {
    let mut sessions: Vec<Session<'_>> = results
        .iter_mut()
        .map(|(&subject, results)| Session::new(subject, results, arguments, image))
        .collect();
    for session in &mut sessions {
        session.start()?;
    }
    for entry in arguments.workloads() {
        eprint!(" {}", entry.name);
        for session in &mut sessions {
            session.run(entry.name)?;
        }
    }
    for session in sessions {
        session.end();
    }
    Ok(())
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
