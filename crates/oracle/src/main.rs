//! `trapgate-oracle`: the host CPU as judge of the engines.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use trapgate_oracle::bench::Times;
use trapgate_oracle::campaign::Campaign;
use trapgate_oracle::engine::Kind;
use trapgate_oracle::judge::Waiver;
use trapgate_oracle::{instructions, sequences};
use trapgate_x86::profile::Level;

/// Runs generated instructions and programs natively and on trapgate's engines, and compares.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Single instructions in all their forms.
    Instructions(Options),
    /// Random programs.
    Sequences(Options),
}

#[derive(Args)]
struct Options {
    /// Seconds to run.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where all choices come from; from the clock unless given.
    #[arg(long, value_parser = number)]
    seed: Option<u64>,
    /// Batches at most.
    #[arg(long)]
    batches: Option<u64>,
    /// Only this batch: repeats a difference.
    #[arg(long)]
    batch: Option<u64>,
    /// The first batch: repeats what came before a difference too.
    #[arg(long, conflicts_with = "batch")]
    first: Option<u64>,
    /// Threads.
    #[arg(long, default_value_t = 1)]
    jobs: usize,
    /// CPU profile.
    #[arg(long, default_value = "v3")]
    cpu: Cpu,
    /// Engines.
    #[arg(long, value_delimiter = ',', default_value = "interpreter,translator")]
    engines: Vec<Engine>,
    /// Instructions whose name contains this.
    #[arg(long)]
    code: Option<String>,
    /// Cases of each encoding in a batch, 32 at most: fewer reach all encodings sooner.
    #[arg(long, default_value_t = instructions::EACH)]
    each: usize,
    /// 32-bit code in compatibility mode.
    #[arg(long)]
    compatibility: bool,
    /// Differences after which to stop.
    #[arg(long, default_value_t = 100)]
    enough: u64,
}

#[derive(Clone, Copy, ValueEnum)]
enum Cpu {
    V2,
    V3,
}

#[derive(Clone, Copy, ValueEnum)]
enum Engine {
    Interpreter,
    Translator,
}

fn number(text: &str) -> Result<u64, std::num::ParseIntError> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    }
}

fn main() -> ExitCode {
    let what = Arguments::parse().what;
    let (What::Instructions(options) | What::Sequences(options)) = &what;
    let seed = options.seed.unwrap_or_else(trapgate_oracle::fresh_seed);
    let batches = match (options.batch, options.batches) {
        (Some(_), _) => 1,
        (None, Some(batches)) => batches,
        (None, None) => u64::MAX / 2,
    };
    let level = match options.cpu {
        Cpu::V2 => Level::V2,
        Cpu::V3 => Level::V3,
    };
    let engines = options
        .engines
        .iter()
        .map(|engine| match engine {
            Engine::Interpreter => Kind::Interpreter,
            Engine::Translator => Kind::Translator,
        })
        .collect();
    println!("seed {seed:#x}");
    let campaign = Campaign {
        seed,
        first: options.batch.or(options.first).unwrap_or(0),
        batches,
        time: Duration::from_secs(options.seconds),
        jobs: options.jobs,
        level,
        engines,
        enough: options.enough,
    };
    let outcome = match &what {
        What::Instructions(options) => {
            let settings = instructions::Settings {
                campaign,
                bits: if options.compatibility { 32 } else { 64 },
                code: options.code.clone(),
                each: options.each.clamp(1, instructions::EACH),
            };
            instructions::run(&settings).map(|report| show(level, &report))
        }
        What::Sequences(_) => sequences::run(&campaign).map(|report| tell(&report)),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            eprintln!("  cause: {cause}");
            source = cause.source();
        }
        ExitCode::from(2)
    })
}

fn tell(report: &sequences::Report) -> ExitCode {
    for difference in &report.differences {
        println!("{difference}\n");
    }
    println!(
        "{} programs, {} ended by a fault, {} jumps, {} not judged; children that died: {}",
        report.programs, report.faults, report.jumps, report.unjudged, report.deaths
    );
    end(&report.times, &report.waived, report.different)
}

fn show(level: Level, report: &instructions::Report) -> ExitCode {
    for difference in &report.differences {
        println!("{}\n", difference.text);
    }
    println!(
        "{} encodings of {}, {} covered ({:.2} %), {} of them completed without a fault",
        report.encodings,
        level.name(),
        report.covered,
        100.0 * report.covered as f64 / report.encodings as f64,
        report.completed,
    );
    for (reason, count) in &report.excluded {
        println!("{count} encodings of them have no cases: they {reason}");
    }
    if report.missing.len() <= 400 {
        for name in &report.missing {
            println!("not covered: {name}");
        }
    }
    println!(
        "{} cases in {} batches, {} faulted, {} not judged; children that died: {}",
        report.cases, report.batches, report.faults, report.unjudged, report.deaths
    );
    end(&report.times, &report.waived, report.different)
}

fn end(times: &Times, waived: &BTreeMap<Waiver, u64>, different: u64) -> ExitCode {
    for (waiver, count) in waived {
        println!("{count} times {waiver}");
    }
    println!("{times:.1?}");
    println!("{different} differences");
    if different == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
