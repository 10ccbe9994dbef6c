//! `trapgate doctor` and the texts of help.

use std::process::{Command, Stdio};

use serde_json::Value;

use crate::harness::{finish, skipped, trapgate};

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
    let json: Value = serde_json::from_slice(&run.stdout).unwrap();
    assert_eq!(json["can_run"], true);
    assert_eq!(json["engines"].as_array().unwrap().len(), 4);
}

/// What doctor says where `/dev` holds what `prepare` puts there and nothing else; `None`, said aloud, where the host lets
/// nobody make it so.
fn doctor_with_dev(prepare: &str) -> Option<Value> {
    let script = format!("mount -t tmpfs tmpfs /dev || exit 77; {prepare} exec \"$@\"");
    let mut command = Command::new("unshare");
    command
        .args(["--map-root-user", "--mount", "sh", "-c", &script, "sh"])
        // Not even root may open what its owner may not.
        .args(["setpriv", "--bounding-set=-all"])
        .args([env!("CARGO_BIN_EXE_trapgate"), "doctor", "--json"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let run = finish(command);
    if !run.stdout.is_empty() {
        return Some(serde_json::from_slice(&run.stdout).unwrap());
    }
    skipped(&format!("nobody may mount here: {}", run.stderr));
    None
}

#[test]
fn doctor_tells_a_host_without_kvm_from_one_that_keeps_it_to_itself() {
    for (prepare, complaint) in [
        ("", "there is no /dev/kvm"),
        (
            "touch /dev/kvm; chmod 0 /dev/kvm;",
            "no permission to open /dev/kvm",
        ),
    ] {
        let Some(report) = doctor_with_dev(prepare) else {
            return;
        };
        let findings = report["host"].as_array().unwrap();
        let hardware = findings
            .iter()
            .find(|finding| finding["name"] == "hardware");
        let says =
            |member: &str, text: &str| hardware.unwrap()[member].as_str().unwrap().contains(text);
        assert!(
            says("what", complaint) && says("cost", "in software"),
            "{report}"
        );
        assert!(
            report["chosen_because"]
                .as_str()
                .unwrap()
                .contains(complaint),
            "{report}"
        );
        assert_eq!(report["can_run"], true);
    }
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
