//! The `trapgate` command: arguments, terminal, progress, and messages to people.
#![forbid(unsafe_code)]

mod arguments;
mod clients;
mod console;
mod curtain;
mod detach;
mod disk_argument;
mod doctor;
mod event;
mod failure;
mod guest;
mod keyboard;
mod output;
mod progress;
mod restore;
mod run;
mod scene;
mod serial_log;
mod signals;
mod size;
mod socket;
mod stats;
mod status;
mod stock;
mod terminal;
mod top;

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use arguments::{Action, Arguments};

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Nothing can be done if the message can't be printed either.
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => status::SUCCESS.into(),
                _ => status::USAGE.into(),
            };
        }
    };
    restore_terminal_before_panics();
    let result = match &arguments.action {
        Action::Run(run) => run::run(run),
        Action::Ps(ps) => clients::ps(ps),
        Action::Top(top) => top::top(top),
        Action::Pause(machine) => clients::pause(&machine.name),
        Action::Resume(machine) => clients::resume(&machine.name),
        Action::Stop(stop) => clients::stop(stop),
        Action::Snapshot(snapshot) => clients::snapshot(snapshot),
        Action::Restore(restore) => restore::restore(restore),
        Action::Console(machine) => console::console(&machine.name),
        Action::Doctor(doctor) => doctor::doctor(doctor),
    };
    terminal::restore();
    let status = result.unwrap_or_else(|failure| {
        terminal::say(&failure.to_string());
        failure.status
    });
    // Threads that still wait for input or output end with us.
    std::process::exit(status.into())
}

/// A defect of ours on whatever thread must not leave the person with a raw terminal, nor its message unreadable.
fn restore_terminal_before_panics() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        terminal::restore_for_a_while();
        print(panic);
        terminal::make_raw_again();
    }));
}
