//! Measures what SPECIFICATION.md promises of performance and memory: boot of the stock kernel,
//! guest instructions a second, the VMM's own memory, disk and console, the clock.
//!
//! `cargo bench -p trapgate-benches`, with options behind `--`; `-- --help` lists them.
//!
//! A speed depends on the host, so the loops also run natively in the same run, and the ratio is what
//! can be compared. Every machine runs in a process of its own, so that memory is counted from the
//! start and no run finds what another left behind.

mod arguments;
mod child;
mod figure;
mod footprint;
mod host;
mod linux;
mod loops;
mod restore;
mod untouched;

use std::process::ExitCode;

use arguments::{Action, Arguments, Group};
use figure::Report;

/// What goes wrong ends the figure that it happened in, and is printed.
type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match Arguments::parse(std::env::args().skip(1)) {
        Ok(Action::Measure(arguments)) => measure(&arguments),
        Ok(Action::Child(name)) => child::serve(&name),
        Ok(Action::Say(text)) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("error: {message}\n  fix: see `cargo bench -p trapgate-benches -- --help`");
            ExitCode::from(2)
        }
    }
}

fn measure(arguments: &Arguments) -> ExitCode {
    let mut report = Report::new(host::describe());
    if let Some(warning) = host::busy() {
        report.note(warning);
    }
    let image = arguments
        .groups()
        .any(Group::needs_linux)
        .then(linux::prepare);
    if let Some(Ok(kernel)) = &image {
        report.host.push(("guest kernel", kernel.clone()));
    }
    for group in arguments.groups() {
        if let (true, Some(Err(error))) = (group.needs_linux(), &image) {
            report.skip(group.name(), error.as_ref());
            continue;
        }
        let done = match group {
            Group::Loops => loops::measure(arguments.runs, &mut report),
            Group::Boot => linux::measure_boot(arguments.runs, &mut report),
            Group::Untouched => untouched::measure(&mut report),
            Group::Restore => restore::measure(arguments.runs, &mut report),
            Group::Transfer => linux::measure_transfer(arguments.runs, &mut report),
            Group::Clock => linux::measure_clock(&mut report),
        };
        if let Err(error) = done {
            report.skip(group.name(), error.as_ref());
        }
    }
    if arguments.json {
        println!("{}", report.json());
    } else {
        print!("{}", report.table());
    }
    ExitCode::SUCCESS
}
