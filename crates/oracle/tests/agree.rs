//! A bounded share of the oracle, the same cases each time: a difference that nobody has met yet is for a longer run to
//! find, not for a change that has nothing to do with it. `TRAPGATE_ORACLE_SEED` gives other cases, `TRAPGATE_ORACLE_SECONDS`
//! makes a run longer.

use std::time::Duration;

use trapgate_oracle::bench::OracleError;
use trapgate_oracle::campaign::Campaign;
use trapgate_oracle::engine::Kind;
use trapgate_oracle::{instructions, native, profile, sequences};
use trapgate_x86::profile::Level;

/// Where cases start from, unless it is said.
const SEED: u64 = 0x7a11_6a7e;
/// Batches in the time that tests have, at most: a faster host looks at no more.
const BATCHES: u64 = 600;

const ENGINES: [Kind; 2] = [Kind::Interpreter, Kind::Translator];

fn seed() -> u64 {
    let given = std::env::var("TRAPGATE_ORACLE_SEED").ok();
    let seed = given.and_then(|text| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok());
    let seed = seed.unwrap_or(SEED);
    eprintln!("TRAPGATE_ORACLE_SEED={seed:#x}");
    seed
}

fn seconds(otherwise: u64) -> Duration {
    let given = std::env::var("TRAPGATE_ORACLE_SECONDS").ok();
    let seconds = given.and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(otherwise))
}

fn batches() -> u64 {
    match std::env::var_os("TRAPGATE_ORACLE_SECONDS") {
        Some(_) => u64::MAX / 2,
        None => BATCHES,
    }
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

/// `most` seconds, until there are `enough` differences.
fn campaign(level: Level, most: u64, enough: u64) -> Campaign {
    Campaign {
        seed: seed(),
        first: 0,
        batches: batches(),
        time: seconds(most),
        jobs: 1,
        level,
        engines: ENGINES.to_vec(),
        enough,
    }
}

fn instructions_agree(level: Level, bits: u32, most: u64) {
    if !can_judge(level) {
        return;
    }
    let settings = instructions::Settings {
        campaign: campaign(level, most, 10),
        bits,
        code: None,
    };
    let report = match instructions::run(&settings) {
        Ok(report) => report,
        Err(error @ OracleError::Native(_)) => panic!("{error:?}"),
        Err(error) => panic!("{error}"),
    };
    eprintln!(
        "{} cases, {} of {} encodings, {} faults",
        report.cases, report.covered, report.encodings, report.faults
    );
    let texts: Vec<&str> = report
        .differences
        .iter()
        .map(|difference| difference.text.as_str())
        .collect();
    assert!(texts.is_empty(), "{}", texts.join("\n"));
    assert!(report.cases > 10_000, "only {} cases", report.cases);
    assert!(report.faults > report.cases / 20 && report.faults < report.cases / 2);
}

#[test]
fn instructions_of_64_bit_code_do_what_the_host_cpu_does() {
    instructions_agree(Level::V3, 64, 20);
}

#[test]
fn instructions_of_32_bit_code_do_what_the_host_cpu_does() {
    instructions_agree(Level::V3, 32, 12);
}

#[test]
fn instructions_of_the_smaller_profile_do_what_the_host_cpu_does() {
    instructions_agree(Level::V2, 64, 8);
}

#[test]
fn programs_do_what_they_do_on_the_host_cpu() {
    if !can_judge(Level::V3) {
        return;
    }
    let report =
        sequences::run(&campaign(Level::V3, 20, 1)).expect("host and engines can be asked");
    eprintln!(
        "{} programs, {} faults, {} jumps",
        report.programs, report.faults, report.jumps
    );
    assert!(
        report.differences.is_empty(),
        "{}",
        report.differences.join("\n")
    );
    assert!(report.programs > 500, "only {} programs", report.programs);
    assert!(report.jumps > report.programs * 20);
}
