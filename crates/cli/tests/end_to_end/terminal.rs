//! The terminal: raw while the guest has it, and afterwards as it was, whatever happened.

use rustix::process::{Signal, WaitOptions, waitpid};

use crate::harness::OnTerminal;

fn at_the_prompt(arguments: &[&str]) -> OnTerminal {
    let mut session = OnTerminal::start(arguments);
    session.screen.expect("> ");
    session
}

#[test]
fn keys_reach_the_guest_and_its_answer_the_screen() {
    let mut session = at_the_prompt(&["run", "builtin"]);
    assert!(session.is_raw());

    session.press("6 * 7\r");

    session.screen.expect("\r\n42\r\n");
    assert_eq!(session.end(), Some(0));
}

#[test]
fn first_line_says_how_to_leave_and_the_key_does_it() {
    let mut session = OnTerminal::start(&["run", "builtin"]);
    session.screen.expect("trapgate: ");
    session.screen.expect("Ctrl-] leaves");
    session.screen.expect("> ");

    session.press("12\u{1d}");

    assert_eq!(session.end(), Some(0));
    session.screen.expect("left");
}

#[test]
fn control_c_is_a_key_like_any_other() {
    let mut session = at_the_prompt(&["run", "builtin"]);
    session.press("\u{3}1 + 1\r");
    session.screen.expect("\r\n2\r\n");
    assert_eq!(session.end(), Some(0));
}

#[test]
fn signals_give_the_terminal_back() {
    for (signal, status) in [
        (Signal::TERM, 143),
        (Signal::INT, 130),
        (Signal::HUP, 129),
        (Signal::QUIT, 131),
    ] {
        let mut session = at_the_prompt(&["run", "builtin"]);
        assert!(session.is_raw());
        session.child.signal(signal);
        assert_eq!(session.end(), Some(status));
    }
}

#[test]
fn stopping_gives_the_terminal_back_for_a_while() {
    let mut session = at_the_prompt(&["run", "builtin"]);

    // When it is stopped as by Ctrl-Z
    session.child.signal(Signal::TSTP);
    let pid = session.child.pid();
    let (_, status) = waitpid(Some(pid), WaitOptions::UNTRACED).unwrap().unwrap();
    assert!(status.stopped());
    assert!(!session.is_raw());

    // Then it goes on where it was
    session.child.signal(Signal::CONT);
    session.wait_until_raw(true);
    session.press("2 + 3\r");
    session.screen.expect("\r\n5\r\n");
    assert_eq!(session.end(), Some(0));
}

#[test]
fn errors_leave_the_terminal_alone() {
    let mut session = OnTerminal::start(&["run", "--kernel", "/dev/null"]);
    session.screen.expect("error: cannot boot `/dev/null`");
    assert_eq!(session.end(), Some(121));
}

#[test]
fn closing_the_window_ends_the_machine() {
    let mut session = at_the_prompt(&["run", "builtin"]);
    session.hang_up();
    assert_eq!(session.child.wait().code(), Some(129));
}

#[test]
fn leaving_works_although_the_guest_takes_no_keys() {
    // Given a guest that computes for a long time, and more keys than a serial port holds
    let mut session = at_the_prompt(&["run", "builtin"]);
    session.press("primes 10000000\r");
    for _ in 0..100 {
        session.press(&"x".repeat(40));
    }
    session.press("\u{1d}");
    assert_eq!(session.end(), Some(0));
}
