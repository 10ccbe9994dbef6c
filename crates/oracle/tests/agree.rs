//! A bounded share of the oracle: each encoding in a few cases, the same cases each time. A difference that nobody has met
//! yet is for a longer run to find, not for a change that has nothing to do with it. `TRAPGATE_ORACLE_SEED` gives other
//! cases, `TRAPGATE_ORACLE_SECONDS` runs for so long, with more cases of each encoding: `.ci/run` does so for a minute.

use std::io::Write;
use std::time::Duration;

use trapgate_oracle::bench::OracleError;
use trapgate_oracle::campaign::Campaign;
use trapgate_oracle::engine::Kind;
use trapgate_oracle::{instructions, native, profile, sequences};
use trapgate_x86::profile::Level;

/// Where cases start from, unless it is said.
const SEED: u64 = 0x7a11_6a7e;
/// Cases of each encoding.
const EACH: usize = 2;
/// Batches of programs.
const PROGRAMS: u64 = 60;
/// More than any host takes for that.
const MOST: Duration = Duration::from_secs(300);

const ENGINES: [Kind; 2] = [Kind::Interpreter, Kind::Translator];

/// For whoever reads the log: the test harness keeps what a passing test prints by macros.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn seed() -> u64 {
    let given = std::env::var("TRAPGATE_ORACLE_SEED").ok();
    let seed = given.and_then(|text| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok());
    let seed = seed.unwrap_or(SEED);
    say(&format!("TRAPGATE_ORACLE_SEED={seed:#x}"));
    seed
}

/// The time that was asked for.
fn seconds() -> Option<Duration> {
    let given = std::env::var("TRAPGATE_ORACLE_SECONDS").ok()?;
    given.parse().ok().map(Duration::from_secs)
}

/// Whether this host can judge a profile; says so if not.
fn can_judge(level: Level) -> bool {
    if let Err(error) = native::usable() {
        eprintln!("skipped: {error}");
        return false;
    }
    if !profile::host_has(level) {
        eprintln!("skipped: the host CPU has less than {}", level.name());
        return false;
    }
    true
}

/// So many batches, or the time that was asked for, until there are `enough` differences.
fn campaign(level: Level, batches: u64, enough: u64) -> Campaign {
    let time = seconds();
    Campaign {
        seed: seed(),
        first: 0,
        batches: if time.is_some() {
            u64::MAX / 2
        } else {
            batches
        },
        time: time.unwrap_or(MOST),
        jobs: 1,
        level,
        engines: ENGINES.to_vec(),
        enough,
    }
}

fn instructions_agree(level: Level, bits: u32) {
    if !can_judge(level) {
        return;
    }
    let bounded = seconds().is_none();
    let mut settings = instructions::Settings {
        campaign: campaign(level, 0, 10),
        bits,
        code: None,
        each: if bounded { EACH } else { instructions::EACH },
    };
    if bounded {
        settings.campaign.batches = settings.sweep();
    }
    let report = match instructions::run(&settings) {
        Ok(report) => report,
        Err(error @ OracleError::Native(_)) => panic!("{error:?}"),
        Err(error) => panic!("{error}"),
    };
    say(&format!(
        "{} cases, {} of {} encodings, {} faults, {} not judged",
        report.cases, report.covered, report.encodings, report.faults, report.unjudged
    ));
    let texts: Vec<&str> = report
        .differences
        .iter()
        .map(|difference| difference.text.as_str())
        .collect();
    assert!(texts.is_empty(), "{}", texts.join("\n"));
    assert!(report.faults > report.cases / 20 && report.faults < report.cases / 2);
    assert!(
        report.unjudged <= report.cases / 10_000,
        "{} of {} cases not judged",
        report.unjudged,
        report.cases
    );
    let missing = report.encodings - report.covered;
    assert!(
        !bounded || missing * 1000 <= report.encodings,
        "{missing} encodings have no case, as {:?}",
        &report.missing[..report.missing.len().min(20)]
    );
}

#[test]
fn instructions_of_64_bit_code_do_what_the_host_cpu_does() {
    instructions_agree(Level::V3, 64);
}

#[test]
fn instructions_of_32_bit_code_do_what_the_host_cpu_does() {
    instructions_agree(Level::V3, 32);
}

#[test]
fn instructions_of_the_smaller_profile_do_what_the_host_cpu_does() {
    instructions_agree(Level::V2, 64);
}

#[test]
fn programs_do_what_they_do_on_the_host_cpu() {
    if !can_judge(Level::V3) {
        return;
    }
    let report =
        sequences::run(&campaign(Level::V3, PROGRAMS, 1)).expect("host and engines can be asked");
    say(&format!(
        "{} programs, {} faults, {} jumps, {} not judged",
        report.programs, report.faults, report.jumps, report.unjudged
    ));
    assert!(
        report.differences.is_empty(),
        "{}",
        report.differences.join("\n")
    );
    assert!(report.programs > 500, "only {} programs", report.programs);
    assert!(
        report.unjudged <= report.programs / 200,
        "{} programs not judged",
        report.unjudged
    );
    assert!(report.jumps > report.programs * 20);
}
