//! All figures of one run of this program.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::arguments::Arguments;
use crate::catalog::Kind;
use crate::measure::Results;
use crate::statistics::{geometric_mean, median, spread};
use crate::subject::Subject;

/// The runs of a workload on one subject.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Times {
    /// Seconds.
    pub(crate) median: f64,
    /// Of the shortest run, in seconds.
    pub(crate) least: f64,
    /// Of the middle half of the runs, as a part of the median.
    pub(crate) spread: f64,
    /// All, in seconds.
    pub(crate) runs: Vec<f64>,
}

impl Times {
    fn of(runs: &[f64]) -> Option<Self> {
        Some(Self {
            median: median(runs)?,
            least: runs.iter().copied().reduce(f64::min)?,
            spread: spread(runs)?,
            runs: runs.to_vec(),
        })
    }
}

/// How two or three times compare.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Ratios {
    /// trapgate's time ÷ the host's.
    pub(crate) trapgate_over_native: Option<f64>,
    /// TCG's time ÷ the host's.
    pub(crate) tcg_over_native: Option<f64>,
    /// TCG's time ÷ trapgate's.
    pub(crate) tcg_over_trapgate: Option<f64>,
}

impl Ratios {
    fn of(time: impl Fn(Subject) -> Option<f64>) -> Self {
        let ratio = |over, under| Some(time(over)? / time(under)?);
        Self {
            trapgate_over_native: ratio(Subject::Trapgate, Subject::Native),
            tcg_over_native: ratio(Subject::Tcg, Subject::Native),
            tcg_over_trapgate: ratio(Subject::Tcg, Subject::Trapgate),
        }
    }

    /// The geometric mean of each.
    fn mean<'a>(all: impl Iterator<Item = &'a Self> + Clone) -> Self {
        let mean = |field: fn(&Self) -> Option<f64>| geometric_mean(all.clone().filter_map(field));
        Self {
            trapgate_over_native: mean(|ratios| ratios.trapgate_over_native),
            tcg_over_native: mean(|ratios| ratios.tcg_over_native),
            tcg_over_trapgate: mean(|ratios| ratios.tcg_over_trapgate),
        }
    }
}

/// One workload, or the boot.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// Its name.
    pub(crate) name: &'static str,
    /// `None` for the boot.
    pub(crate) kind: Option<Kind>,
    /// What it does.
    pub(crate) what: &'static str,
    /// By subject.
    pub(crate) times: BTreeMap<Subject, Times>,
    /// Of the medians.
    pub(crate) ratios: Ratios,
    /// Of the shortest runs.
    pub(crate) ratios_of_least: Ratios,
    /// Where it does not run, and why.
    pub(crate) not_run: BTreeMap<Subject, String>,
}

impl Row {
    fn new(name: &'static str, kind: Option<Kind>, what: &'static str) -> Self {
        Self {
            name,
            kind,
            what,
            times: BTreeMap::new(),
            ratios: Ratios::default(),
            ratios_of_least: Ratios::default(),
            not_run: BTreeMap::new(),
        }
    }

    fn add(&mut self, subject: Subject, runs: &[f64]) {
        if let Some(times) = Times::of(runs) {
            self.times.insert(subject, times);
        }
        self.ratios = Ratios::of(|subject| Some(self.times.get(&subject)?.median));
        self.ratios_of_least = Ratios::of(|subject| Some(self.times.get(&subject)?.least));
    }

    /// Seconds, the median.
    pub(crate) fn median(&self, subject: Subject) -> Option<f64> {
        Some(self.times.get(&subject)?.median)
    }
}

/// A workload that failed.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Lost {
    /// Where.
    pub(crate) subject: Subject,
    /// Which; `boot` if the guest did not come to its first workload.
    pub(crate) workload: String,
    /// How.
    pub(crate) reason: String,
}

/// Geometric means over workloads.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Mean {
    /// Over which.
    pub(crate) of: &'static str,
    /// How many those are.
    pub(crate) workloads: usize,
    /// Of the medians.
    pub(crate) ratios: Ratios,
    /// Of the shortest runs: the same where the machine was quiet.
    pub(crate) ratios_of_least: Ratios,
}

/// What SPECIFICATION.md promises, beside what was measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Target {
    /// What is promised.
    pub(crate) text: String,
    /// What was measured.
    pub(crate) measured: String,
    /// Whether that is as promised.
    pub(crate) met: bool,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    /// What was measured on, as names and values.
    pub(crate) about: Vec<(&'static str, String)>,
    /// For people.
    pub(crate) notes: Vec<String>,
    /// The engine that trapgate took.
    pub(crate) engine: Option<String>,
    /// How often everything was run.
    pub(crate) rounds: u32,
    /// By which sizes were divided.
    pub(crate) scale: u32,
    /// The workloads, in their order.
    pub(crate) workloads: Vec<Row>,
    /// From the monitors' start to init, if that was asked for.
    pub(crate) boot: Option<Row>,
    /// MiB resident beyond guest RAM, at the most that was seen in any round, by subject.
    pub(crate) memory_mib: BTreeMap<Subject, f64>,
    /// Geometric means: of all workloads, and by kind.
    pub(crate) means: Vec<Mean>,
    /// What is promised of these.
    pub(crate) targets: Vec<Target>,
    /// What failed.
    pub(crate) failures: Vec<Lost>,
}

impl Report {
    /// Puts together what was measured.
    pub(crate) fn new(
        about: Vec<(&'static str, String)>,
        mut notes: Vec<String>,
        arguments: &Arguments,
        results: &BTreeMap<Subject, Results>,
    ) -> Self {
        let workloads: Vec<Row> = arguments
            .workloads()
            .map(|entry| {
                let mut row = Row::new(entry.name, Some(entry.kind), entry.what);
                for (&subject, results) in results {
                    // What failed once is wrong, and not slow.
                    if let Some(runs) = results.seconds.get(entry.name)
                        && !results.failed.contains_key(entry.name)
                    {
                        row.add(subject, runs);
                    }
                    if let Some(reason) = results.skipped.get(entry.name) {
                        row.not_run.insert(subject, reason.clone());
                    }
                }
                row
            })
            .collect();
        let boot = arguments.boot().then(|| {
            let mut row = Row::new(crate::arguments::BOOT, None, "from start to init");
            for (&subject, results) in results {
                row.add(subject, &results.boots);
            }
            row
        });
        for (subject, results) in results {
            for rate in &results.clock {
                notes.push(format!(
                    "{}'s clock ran at {rate:.3} of the host's: its times are corrected by that",
                    subject.name()
                ));
            }
        }
        let memory_mib = results
            .iter()
            .filter_map(|(&subject, results)| {
                let most = results.memory.iter().copied().reduce(f64::max)?;
                Some((subject, most))
            })
            .collect();
        let failures = results
            .iter()
            .flat_map(|(&subject, results)| results.lost(subject))
            .collect();
        let means = means(&workloads);
        let mut report = Self {
            about,
            notes,
            engine: results.values().find_map(|results| results.engine.clone()),
            rounds: arguments.rounds(),
            scale: arguments.scale(),
            workloads,
            boot,
            memory_mib,
            means,
            targets: Vec::new(),
            failures,
        };
        report.targets = targets(&report);
        report
    }
}

fn means(workloads: &[Row]) -> Vec<Mean> {
    let groups = [
        ("all", None),
        ("compute", Some(Kind::Compute)),
        ("system", Some(Kind::System)),
    ];
    groups
        .into_iter()
        .filter_map(|(of, kind)| {
            let rows = || {
                workloads
                    .iter()
                    .filter(move |row| kind.is_none() || row.kind == kind)
            };
            let count = rows().filter(|row| row.times.len() > 1).count();
            (count > 0).then(|| Mean {
                of,
                workloads: count,
                ratios: Ratios::mean(rows().map(|row| &row.ratios)),
                ratios_of_least: Ratios::mean(rows().map(|row| &row.ratios_of_least)),
            })
        })
        .collect()
}

/// The promises that can be judged by what was measured.
fn targets(report: &Report) -> Vec<Target> {
    let mut targets = Vec::new();
    let mut target = |text: &str, value: Option<f64>, met: fn(f64) -> bool, of: String| {
        if let Some(value) = value {
            targets.push(Target {
                text: text.to_owned(),
                measured: format!("{value:.2}{of}"),
                met: met(value),
            });
        }
    };
    let mean = |of: &str| report.means.iter().find(|mean| mean.of == of);
    let rows = || report.workloads.iter();
    target(
        "TCG ÷ trapgate, geometric mean: at least 4",
        mean("all").and_then(|mean| mean.ratios.tcg_over_trapgate),
        |value| value >= 4.0,
        String::new(),
    );
    let least = rows()
        .filter_map(|row| Some((row.ratios.tcg_over_trapgate?, row.name)))
        .min_by(|a, b| a.0.total_cmp(&b.0));
    target(
        "TCG ÷ trapgate, each workload: above 1",
        least.map(|(value, _)| value),
        |value| value > 1.0,
        least.map_or(String::new(), |(_, name)| format!(" at least ({name})")),
    );
    target(
        "time ÷ native, geometric mean of compute: at most 2.5",
        mean("compute").and_then(|mean| mean.ratios.trapgate_over_native),
        |value| value <= 2.5,
        String::new(),
    );
    let most = rows()
        .filter(|row| row.kind == Some(Kind::System))
        .filter_map(|row| Some((row.ratios.trapgate_over_native?, row.name)))
        .max_by(|a, b| a.0.total_cmp(&b.0));
    target(
        "time ÷ native, each system workload: at most 6",
        most.map(|(value, _)| value),
        |value| value <= 6.0,
        most.map_or(String::new(), |(_, name)| format!(" at most ({name})")),
    );
    target(
        "TCG ÷ trapgate, start to init: at least 2",
        report
            .boot
            .as_ref()
            .and_then(|boot| boot.ratios.tcg_over_trapgate),
        |value| value >= 2.0,
        String::new(),
    );
    target(
        "resident beyond guest RAM: at most 96 MiB",
        report.memory_mib.get(&Subject::Trapgate).copied(),
        |value| value <= 96.0,
        " MiB".to_owned(),
    );
    targets
}

/// Reports to test with.
#[cfg(test)]
pub(crate) mod testing {
    use clap::Parser;

    use super::*;

    fn arguments(words: &[&str]) -> Arguments {
        Arguments::parse_from(std::iter::once("compare").chain(words.iter().copied()))
    }

    fn results(seconds: &[(&str, &[f64])], boots: &[f64]) -> Results {
        Results {
            seconds: seconds
                .iter()
                .map(|(name, runs)| ((*name).to_owned(), runs.to_vec()))
                .collect(),
            boots: boots.to_vec(),
            ..Results::default()
        }
    }

    /// `crc`, which takes 1, 2 and 8 s, `dd`, and `avx2`, which does not run under trapgate.
    pub(crate) fn report() -> Report {
        let crc: &[f64] = &[1.0, 0.5, 9.0];
        let native = results(&[("crc", crc), ("avx2", &[0.1]), ("dd", &[0.25])], &[]);
        let mut trapgate = results(&[("crc", &[2.0]), ("dd", &[1.0])], &[1.0, 1.5, 1.25]);
        trapgate
            .skipped
            .insert("avx2".to_owned(), "no AVX2".to_owned());
        trapgate.memory = vec![50.0, 90.0, 60.0];
        let tcg = results(
            &[("crc", &[8.0]), ("avx2", &[10.0]), ("dd", &[2.0])],
            &[2.5],
        );
        let all = BTreeMap::from([
            (Subject::Native, native),
            (Subject::Trapgate, trapgate),
            (Subject::Tcg, tcg),
        ]);
        let arguments = arguments(&["--only", "crc,avx2,dd,boot"]);
        Report::new(Vec::new(), Vec::new(), &arguments, &all)
    }

    /// A report of a run in which nothing came out.
    pub(crate) fn nothing() -> Report {
        let all = BTreeMap::from([(Subject::Native, Results::default())]);
        Report::new(Vec::new(), Vec::new(), &arguments(&[]), &all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean<'a>(report: &'a Report, of: &str) -> &'a Mean {
        report.means.iter().find(|mean| mean.of == of).unwrap()
    }

    fn close(value: Option<f64>, to: f64) -> bool {
        value.is_some_and(|value| (value / to - 1.0).abs() < 1e-9)
    }

    #[test]
    fn ratios_are_of_medians_and_beside_them_of_the_shortest_runs() {
        let report = testing::report();
        let crc = report
            .workloads
            .iter()
            .find(|row| row.name == "crc")
            .unwrap();
        assert_eq!(crc.ratios.trapgate_over_native, Some(2.0));
        assert_eq!(crc.ratios.tcg_over_native, Some(8.0));
        assert_eq!(crc.ratios.tcg_over_trapgate, Some(4.0));
        assert_eq!(crc.ratios_of_least.trapgate_over_native, Some(4.0));
        let boot = report.boot.as_ref().unwrap();
        assert_eq!(boot.ratios.tcg_over_trapgate, Some(2.0));
        assert_eq!(boot.ratios.trapgate_over_native, None);
    }

    #[test]
    fn means_are_of_those_that_have_the_ratio() {
        let report = testing::report();
        let all = mean(&report, "all");
        assert_eq!(all.workloads, 3);
        // crc and dd: 2 and 4; 4 and 2. avx2 is in TCG's mean only: 8, 100 and 8.
        assert!(close(all.ratios.trapgate_over_native, 8_f64.sqrt()));
        assert!(close(all.ratios.tcg_over_trapgate, 8_f64.sqrt()));
        assert!(close(all.ratios.tcg_over_native, 6400_f64.cbrt()));
        assert!(close(
            mean(&report, "compute").ratios.trapgate_over_native,
            2.0
        ));
        assert!(close(mean(&report, "system").ratios.tcg_over_trapgate, 2.0));
    }

    #[test]
    fn targets_are_judged_by_what_was_measured() {
        let report = testing::report();
        let judged: Vec<(&str, bool)> = report
            .targets
            .iter()
            .map(|target| (&target.measured[..], target.met))
            .collect();
        assert_eq!(
            judged,
            [
                ("2.83", false),
                ("2.00 at least (dd)", true),
                ("2.00", true),
                ("4.00 at most (dd)", true),
                ("2.00", true),
                ("90.00 MiB", true),
            ]
        );
        assert!(testing::nothing().targets.is_empty());
    }

    #[test]
    fn workload_that_failed_is_named_and_has_no_time() {
        let mut native = Results::default();
        native.seconds.insert("crc".to_owned(), vec![1.0]);
        native
            .failed
            .insert("crc".to_owned(), "computed 1".to_owned());
        let all = BTreeMap::from([(Subject::Native, native)]);
        let arguments = clap::Parser::parse_from(["compare", "--only", "crc"]);

        let report = Report::new(Vec::new(), Vec::new(), &arguments, &all);

        assert!(report.workloads[0].times.is_empty());
        assert_eq!(report.failures.len(), 1);
        assert_eq!(report.failures[0].workload, "crc");
    }

    #[test]
    fn json_has_every_run() {
        let json = serde_json::to_value(testing::report()).unwrap();
        let crc = &json["workloads"][0];
        assert_eq!(crc["name"], "crc");
        assert_eq!(crc["kind"], "compute");
        assert_eq!(
            crc["times"]["native"]["runs"],
            serde_json::json!([1.0, 0.5, 9.0])
        );
        assert_eq!(crc["times"]["tcg"]["median"], 8.0);
        assert_eq!(crc["ratios"]["tcg_over_trapgate"], 4.0);
        let avx2 = &json["workloads"][1];
        assert_eq!(avx2["not_run"]["trapgate"], "no AVX2");
        assert_eq!(json["boot"]["times"]["trapgate"]["median"], 1.25);
    }
}
