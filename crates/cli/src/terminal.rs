//! The terminal that we were started from: raw while the guest has it, and restored whatever happens.
//!
//! What is to be restored is global, since the signal thread and the panic hook must reach it too.

use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::stdio::{stderr, stdin, stdout};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

/// The terminal's settings from before it was made raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Shows the cursor, ends colours: what a guest that was cut off may have left.
const CALM: &[u8] = b"\x1b[?25h\x1b[m";

/// Whether standard input is a terminal.
pub(crate) fn stdin_is_terminal() -> bool {
    isatty(stdin())
}

/// Whether standard output is a terminal.
pub(crate) fn stdout_is_terminal() -> bool {
    isatty(stdout())
}

/// Whether standard error is a terminal.
pub(crate) fn stderr_is_terminal() -> bool {
    isatty(stderr())
}

/// Columns and rows of the terminal, if we have one and it knows.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdout())
        .or_else(|_| tcgetwinsize(stdin()))
        .ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Hands the keyboard to the guest: every key reaches it as it is, Ctrl-C too.
///
/// # Errors
/// That standard input is no terminal.
pub(crate) fn make_raw() -> io::Result<()> {
    let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    let cooked = match saved.as_ref() {
        Some(cooked) => cooked.clone(),
        None => tcgetattr(stdin())?,
    };
    let mut raw = cooked.clone();
    raw.make_raw();
    // Keys that were typed during the boot stay, and reach the guest.
    tcsetattr(stdin(), OptionalActions::Drain, &raw)?;
    *saved = Some(cooked);
    Ok(())
}

/// Makes the terminal raw again after we were stopped, if it was.
pub(crate) fn make_raw_again() {
    let was_raw = SAVED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .is_some();
    if was_raw {
        // The terminal may be gone; then there is nothing to set.
        let _ = make_raw();
    }
}

/// Whether the guest has the keyboard.
pub(crate) fn is_raw() -> bool {
    SAVED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .is_some()
}

/// Gives the terminal back as it was. May be called at any time, any number of times.
pub(crate) fn restore() {
    let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(cooked) = saved.take() {
        set(&cooked);
    }
}

/// Like [`restore`], until [`make_raw_again`].
pub(crate) fn restore_for_a_while() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(cooked) = saved.as_ref() {
        set(cooked);
    }
}

fn set(cooked: &Termios) {
    // No error can be helped here: the terminal may be gone.
    let _ = tcsetattr(stdin(), OptionalActions::Now, cooked);
    if isatty(stdout()) {
        let _ = rustix::io::write(stdout(), CALM);
    }
}

/// Prints a line of ours on standard error, also where the terminal is raw.
pub(crate) fn say(text: &str) {
    let end = if is_raw() { "\r\n" } else { "\n" };
    let text = text.replace('\n', end) + end;
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        match rustix::io::write(stderr(), rest) {
            Ok(count) => rest = &rest[count..],
            Err(rustix::io::Errno::INTR) => {}
            // Nobody listens.
            Err(_) => return,
        }
    }
}
