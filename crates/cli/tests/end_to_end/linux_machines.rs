//! Linux in the background.

use std::process::Stdio;

use rustix::process::Signal;

use crate::harness::{linux, start, stdout_of};
use crate::machines::Place;

#[test]
fn shell_in_the_background_is_attached_to_and_shuts_down_when_it_is_stopped() {
    let Some(_turn) = linux() else { return };
    let place = Place::new();
    place.done("run --detach --quiet --name debian");
    let mut console = place.on_terminal("console debian");
    console.screen.expect("# ");
    console.press("stty size; echo $((6 * 7))\r");
    console.screen.expect("37 101\r\n42\r\n");
    console.press("\u{1d}");
    assert_eq!(console.end(), Some(0));

    // The button's driver comes after the shell.
    let mut console = place.on_terminal("console debian");
    console.press("until pidof acpid; do sleep 0.1; done; echo re''ady\r");
    console.screen.expect("ready");
    let stop = place.done("stop --grace 120 debian");
    assert_eq!(stop.stderr, "", "it was not forced");
    assert_eq!(console.end(), Some(0));
    assert!(place.machines().is_empty());
}

#[test]
fn command_whose_streams_are_ours_has_no_terminal_to_attach_to() {
    let Some(_turn) = linux() else { return };
    let place = Place::new();
    let mut command = place.command("run --name x -- sh -c");
    command.arg("echo runs; exec cat").stdin(Stdio::piped());
    let mut child = start(command);
    stdout_of(&mut child).expect("runs");

    let refused = place.finish("console x");

    assert_eq!(refused.code(), Some(1), "{refused:?}");
    assert!(refused.stderr.contains("no terminal"), "{refused:?}");
    child.signal(Signal::TERM);
    child.wait();
}
