//! Signals: what ends us ends the machine first, and gives the terminal back.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGWINCH, SIGXFSZ};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::event::Event;
use crate::failure::Failure;
use crate::{status, terminal};

/// Starts the thread that takes signals and reports them as [`Event`]s. A second one of those that end us ends
/// us at once, whatever the rest of the program is doing.
pub(crate) fn watch(events: Sender<Event>) -> Result<(), Failure> {
    let ignored = ignored_signals();
    let wanted = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGCONT, SIGWINCH];
    // Under `nohup`, or in the background of a script, some are ignored on purpose.
    let taken = wanted
        .into_iter()
        .filter(|signal| ignored & 1 << (signal - 1) == 0);
    let failed =
        |error: std::io::Error| Failure::new(status::HOST, "cannot take signals").cause(error);
    // A file that may not grow (`ulimit -f`) is an error for whoever writes it, not the end of the machine.
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map_err(failed)?;
    let mut signals = Signals::new(taken).map_err(failed)?;
    let thread = std::thread::Builder::new().name("signals".to_owned());
    let watch = move || {
        let mut ending = false;
        for signal in signals.forever() {
            match signal {
                SIGWINCH => drop(events.send(Event::Resized)),
                SIGTSTP => {
                    terminal::restore_for_a_while();
                    // Stops us; there is nothing to be done if it can't.
                    let _ = emulate_default_handler(SIGTSTP);
                }
                SIGCONT => {
                    terminal::make_raw_again();
                    let _ = events.send(Event::Resized);
                }
                _ if ending => {
                    terminal::restore();
                    std::process::exit(exit_status(signal).into());
                }
                _ => {
                    ending = true;
                    let _ = events.send(Event::Signal(signal));
                }
            }
        }
    };
    thread.spawn(watch).map_err(failed)?;
    Ok(())
}

/// Says which signal ends us, and gives the exit status.
pub(crate) fn tell(signal: i32) -> u8 {
    terminal::say(&format!("trapgate: {}", name(signal)));
    exit_status(signal)
}

/// The exit status after this signal.
pub(crate) fn exit_status(signal: i32) -> u8 {
    status::SIGNAL + u8::try_from(signal & 0x7f).unwrap_or(0)
}

/// What to call a signal.
pub(crate) fn name(signal: i32) -> &'static str {
    match signal {
        SIGHUP => "the terminal was closed (SIGHUP)",
        SIGINT => "interrupted",
        SIGQUIT => "quit (SIGQUIT)",
        SIGTERM => "terminated (SIGTERM)",
        _ => "ended by a signal",
    }
}

/// The signals that our parent told us to ignore, as bits from 0 (proc(5), `/proc/pid/status`, SigIgn).
fn ignored_signals() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    text.lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_after_a_signal_is_that_of_shells() {
        assert_eq!(exit_status(SIGHUP), 129);
        assert_eq!(exit_status(SIGINT), 130);
        assert_eq!(exit_status(SIGTERM), 143);
    }

    #[test]
    fn mask_of_ignored_signals_is_read() {
        // Rust ignores SIGPIPE (13) in every program.
        assert_ne!(ignored_signals() & 1 << 12, 0);
    }
}
