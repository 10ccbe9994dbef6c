//! A machine in a process of its own: this program again, with [`OPTION`].

use std::collections::BTreeMap;
use std::process::{Command, ExitCode, Stdio};

use crate::{Failure, linux, loops, untouched};

/// The option that makes a process a child; a name from [`serve`] follows it.
pub(crate) const OPTION: &str = "--child";

/// What a child measured, by name.
pub(crate) type Values = BTreeMap<String, f64>;

/// Runs a child and gives what it measured.
///
/// # Errors
/// It failed; it has said why on standard error.
pub(crate) fn run(name: &str) -> Result<Values, Failure> {
    let child = Command::new(std::env::current_exe()?)
        .args([OPTION, name])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    if !child.status.success() {
        return Err(format!("the process for `{name}` failed: {}", child.status).into());
    }
    let text = String::from_utf8(child.stdout)?;
    let mut values = Values::new();
    for line in text.lines() {
        let (name, value) = line
            .split_once(' ')
            .ok_or(format!("a child said `{line}`"))?;
        values.insert(name.to_owned(), value.parse()?);
    }
    Ok(values)
}

/// Runs `name` several times; gives each value's runs.
///
/// # Errors
/// A run failed.
pub(crate) fn run_all(name: &str, runs: usize) -> Result<BTreeMap<String, Vec<f64>>, Failure> {
    let mut all: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for run_number in 1..=runs {
        eprintln!("{name}: run {run_number} of {runs}");
        for (name, value) in run(name)? {
            all.entry(name).or_default().push(value);
        }
    }
    Ok(all)
}

/// The child's side: measures, and says the values on standard output.
pub(crate) fn serve(name: &str) -> ExitCode {
    let measured = match name {
        loops::CHILD => loops::child(),
        linux::BOOT => linux::boot_child(),
        linux::TRANSFER => linux::transfer_child(),
        linux::CLOCK => linux::clock_child(),
        untouched::CHILD => untouched::child(),
        _ => Err(format!("there is no child called `{name}`").into()),
    };
    match measured {
        Ok(values) => {
            for (name, value) in values {
                println!("{name} {value}");
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
