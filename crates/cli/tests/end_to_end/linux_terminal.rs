//! A shell in Linux, on a pseudo-terminal.

use crate::harness::{OnTerminal, linux};

#[test]
fn shell_has_a_terminal_with_size_job_control_and_status() {
    let Some(_turn) = linux() else { return };
    let mut session = OnTerminal::start(&["run"]);
    session.screen.expect("Ctrl-] leaves");
    session.screen.expect("# ");
    assert!(session.is_raw());

    // The window's size, and a change of it
    session.press("stty size; echo $TERM\r");
    session.screen.expect("\r\n37 101\r\nxterm\r\n");
    session.resize(90, 20);
    session.press("while ! stty size | grep -q '^20 90'; do sleep 0.1; done; echo re''sized\r");
    session.screen.expect("resized");

    // Ctrl-C and Ctrl-Z are the guest's
    session.press("echo bu''sy; sleep 1000\r");
    session.screen.expect("busy");
    session.press("\u{3}");
    session.press("echo $? fr''ee\r");
    session.screen.expect("130 free");
    // (not `sleep` again, which is a part of this shell, and shells can't be stopped)
    session.press("echo bu''sy; cat\r");
    session.screen.expect("busy");
    // Not before it runs, or the key would go to the shell.
    session.press("ping\r");
    session.screen.expect("ping");
    session.screen.expect("ping");
    session.press("\u{1a}");
    session.screen.expect("topped");
    // (`fg` waits for its end; `wait` does not wait for what is stopped, and a shell with a stopped
    // job does not leave at once)
    session.press("kill -9 %1; fg; echo wo''rks\r");
    session.screen.expect("works");

    session.press("exit 5\r");
    assert_eq!(session.end(), Some(5));
}

#[test]
fn leaving_in_the_middle_gives_the_terminal_back() {
    let Some(_turn) = linux() else { return };
    let mut session = OnTerminal::start(&["run"]);
    session.screen.expect("# ");
    session.press("\u{1d}");
    assert_eq!(session.end(), Some(0));
}

#[test]
fn control_c_while_it_boots_ends_it() {
    let Some(_turn) = linux() else { return };
    let mut session = OnTerminal::start(&["run"]);
    session.screen.expect("booting Linux");
    assert!(!session.is_raw());
    session.press("\u{3}");
    assert_eq!(session.end(), Some(130));
}

#[test]
fn command_on_a_terminal_gets_one() {
    let Some(_turn) = linux() else { return };
    let mut session = OnTerminal::start(&["run", "--", "sh", "-c", "tty; stty size; exit 4"]);
    session.screen.expect("/dev/hvc0\r\n37 101\r\n");
    assert_eq!(session.end(), Some(4));
}

#[test]
fn reboot_boots_again_and_poweroff_ends() {
    let Some(_turn) = linux() else { return };
    let mut session = OnTerminal::start(&["run"]);
    session.screen.expect("# ");
    session.press("touch /tmp/mark; reboot\r");
    session.screen.expect("the guest restarts");
    session.screen.expect("# ");
    session.press("ls /tmp/mark || echo a''new\r");
    session.screen.expect("anew");
    session.press("poweroff\r");
    assert_eq!(session.end(), Some(0));
}
