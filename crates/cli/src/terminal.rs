//! The terminal that we were started from: raw while the guest has it, and restored whatever happens.
//!
//! What is to be restored is global, since the signal thread and the panic hook must reach it too.

use std::io;
use std::sync::{Mutex, PoisonError};

use rustix::stdio::{stderr, stdin, stdout};
use rustix::termios::{
    LocalModes, OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr,
};

/// Who has the terminal.
#[derive(Clone, Copy, PartialEq, Eq)]
enum User {
    /// The guest: it is raw.
    Guest,
    /// A page of ours: a screen of its own, without echo; Ctrl-C and Ctrl-Z stay signals.
    Page,
}

/// The terminal's settings from before it was taken, and by whom.
static SAVED: Mutex<Option<(Termios, User)>> = Mutex::new(None);

/// Another screen, without cursor.
const TAKE_SCREEN: &[u8] = b"\x1b[?1049h\x1b[?25l";
/// The one that there was before.
const GIVE_SCREEN: &[u8] = b"\x1b[?1049l";

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
    take(User::Guest)
}

/// Takes a screen for a page of ours; keys come one by one, and are not shown.
///
/// # Errors
/// That standard input is no terminal.
pub(crate) fn take_screen() -> io::Result<()> {
    take(User::Page)
}

fn take(user: User) -> io::Result<()> {
    let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    let cooked = match saved.as_ref() {
        Some((cooked, _)) => cooked.clone(),
        None => tcgetattr(stdin())?,
    };
    let mut raw = cooked.clone();
    match user {
        User::Guest => raw.make_raw(),
        User::Page => raw.local_modes -= LocalModes::ICANON | LocalModes::ECHO,
    }
    // Keys that were typed during the boot stay, and reach the guest.
    tcsetattr(stdin(), OptionalActions::Drain, &raw)?;
    *saved = Some((cooked, user));
    if user == User::Page {
        rustix::io::write(stdout(), TAKE_SCREEN)?;
    }
    Ok(())
}

/// Makes the terminal raw again after we were stopped, if it was.
pub(crate) fn make_raw_again() {
    if let Some(user) = user() {
        // The terminal may be gone; then there is nothing to set.
        let _ = take(user);
    }
}

/// Whether the guest has the keyboard.
pub(crate) fn is_raw() -> bool {
    user() == Some(User::Guest)
}

fn user() -> Option<User> {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    saved.as_ref().map(|(_, user)| *user)
}

/// Gives the terminal back as it was. May be called at any time, any number of times.
pub(crate) fn restore() {
    let mut saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((cooked, user)) = saved.take() {
        set(&cooked, user);
    }
}

/// Like [`restore`], until [`make_raw_again`].
pub(crate) fn restore_for_a_while() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((cooked, user)) = saved.as_ref() {
        set(cooked, *user);
    }
}

fn set(cooked: &Termios, user: User) {
    // No error can be helped here: the terminal may be gone.
    let _ = tcsetattr(stdin(), OptionalActions::Now, cooked);
    if isatty(stdout()) {
        if user == User::Page {
            let _ = rustix::io::write(stdout(), GIVE_SCREEN);
        }
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
