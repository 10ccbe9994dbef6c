//! `trapgate doctor` and the texts of help.

use crate::harness::{finish, trapgate};

#[test]
fn doctor_names_every_engine_and_every_cost() {
    let run = finish(trapgate(&["doctor"]));
    assert_eq!(run.code(), Some(0), "{run:?}");
    for word in ["kvm", "jit", "interp", "memory", "kernel", "cache", "cost:"] {
        assert!(run.out().contains(word), "{word} is not in {}", run.out());
    }
    assert_eq!(run.stderr, "");
}

#[test]
fn doctor_speaks_json() {
    let run = finish(trapgate(&["doctor", "--json"]));
    let json: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(json["can_run"], true);
    assert_eq!(json["engines"].as_array().unwrap().len(), 4);
}

#[test]
fn help_and_version_go_to_standard_output() {
    for (arguments, text) in [
        (&["--help"][..], "trapgate doctor"),
        (&["run", "--help"], "Exit status:"),
        (&["doctor", "--help"], "--json"),
        (&["--version"], env!("CARGO_PKG_VERSION")),
    ] {
        let run = finish(trapgate(arguments));
        assert_eq!(run.code(), Some(0), "{run:?}");
        assert!(run.out().contains(text), "{run:?}");
        assert_eq!(run.stderr, "");
    }
}

#[test]
fn no_arguments_show_what_there_is() {
    let run = finish(trapgate::<&str>(&[]));
    assert_eq!(run.code(), Some(120), "{run:?}");
    assert!(run.stderr.contains("Examples:"), "{run:?}");
}
