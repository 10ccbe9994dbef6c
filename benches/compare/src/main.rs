//! How fast guests are: the same static programs natively, under trapgate, and under QEMU's TCG with the same kernel
//! and initramfs, interleaved in one run: program by program.
//!
//! `cargo run --release -p trapgate-compare`, with options behind `--`; `-- --help` lists them.
//!
//! Both monitors are processes that get the same files and talk through a serial port that is their standard output,
//! so that they are started, timed and ended in one way. trapgate's is this program again: see [`monitor`].
#![forbid(unsafe_code)]

mod arguments;
mod catalog;
mod chart;
mod host;
mod image;
mod measure;
mod memory;
mod monitor;
mod protocol;
mod report;
mod session;
mod statistics;
mod subject;
mod table;

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;

use arguments::Arguments;

/// What went wrong, for a person.
pub(crate) type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|word| word == monitor::OPTION) {
        return ended(monitor::main(words.collect()));
    }
    ended(run(&Arguments::parse()))
}

fn ended(result: Result<ExitCode, Failure>) -> ExitCode {
    result.unwrap_or_else(|error| {
        eprintln!("error: {error}");
        ExitCode::FAILURE
    })
}

fn run(arguments: &Arguments) -> Result<ExitCode, Failure> {
    let image = image::prepare(arguments)?;
    let report = measure::measure(arguments, &image)?;
    print!("{}", table::table(&report));
    write(arguments.json.as_deref(), || {
        Ok(serde_json::to_string_pretty(&report)? + "\n")
    })?;
    write(arguments.markdown.as_deref(), || {
        Ok(table::markdown(&report))
    })?;
    write(arguments.svg.as_deref(), || Ok(chart::svg(&report)))?;
    Ok(if report.failures.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Writes to a file, if one was asked for.
fn write(
    path: Option<&Path>,
    text: impl FnOnce() -> Result<String, Failure>,
) -> Result<(), Failure> {
    if let Some(path) = path {
        std::fs::write(path, text()?)
            .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    }
    Ok(())
}
