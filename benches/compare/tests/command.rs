//! The command from outside: the workloads themselves, and machines that misbehave in the place of QEMU's.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use trapgate_image::{CacheDir, cached};

/// Whether the stock image is there; nothing is fetched for a test.
fn has_image() -> bool {
    let has = CacheDir::from_env().is_ok_and(|cache| cached(&cache).is_some());
    if !has {
        eprintln!("skipped: the stock image is not in the cache; `trapgate run` fetches it");
    }
    has
}

/// Runs the command without trapgate; gives its output and its JSON.
fn compare(directory: &Path, words: &[&str]) -> (Output, Value) {
    compare_all(directory, &[&["--no-trapgate"], words].concat())
}

fn compare_all(directory: &Path, words: &[&str]) -> (Output, Value) {
    let json = directory.join("figures.json");
    let output = Command::new(env!("CARGO_BIN_EXE_trapgate-compare"))
        .args(["--quick", "--json"])
        .arg(&json)
        .args(words)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let text = fs::read_to_string(json).unwrap_or_else(|error| panic!("{error}: {said}"));
    (output, serde_json::from_str(&text).unwrap())
}

/// A program that stands in for QEMU's: a shell's `case` on the workloads that are left.
fn stand_in(directory: &Path, cases: &str) -> String {
    let path = directory.join("qemu");
    let script = format!(
        "#!/bin/sh\n\
         [ \"$1\" != --version ] || {{ echo QEMU emulator version 0.0; exit; }}\n\
         for word; do [ \"$before\" != -initrd ] || initrd=$word; before=$word; done\n\
         left=$(tail -c 2000 \"$initrd\" | grep -a -o \"'all' '[^']*'\")\n\
         echo trapgate-status: init\n\
         echo @clock 0\n\
         case \"$left\" in\n{cases}\nesac\n\
         echo @clock 1000000\n\
         echo @end\n"
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path.display().to_string()
}

#[test]
fn every_workload_runs_on_the_host_and_computes_the_same_each_time() {
    if !has_image() {
        return;
    }
    let directory = TempDir::new().unwrap();

    let (output, json) = compare(directory.path(), &["--no-qemu"]);

    assert!(output.status.success(), "{}", json["failures"]);
    let workloads = json["workloads"].as_array().unwrap();
    assert!(workloads.len() > 15);
    for row in workloads {
        let ran = row["times"]["native"]["median"].as_f64();
        let lacks = row["not_run"]["native"].as_str();
        assert!(
            ran.is_some_and(|seconds| seconds > 0.0) != lacks.is_some(),
            "{row}"
        );
    }
}

#[test]
fn trapgate_boots_and_computes_what_the_host_does() {
    if !has_image() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let file = |name: &str| directory.path().join(name).display().to_string();
    let (svg, markdown) = (file("chart.svg"), file("table.md"));

    let (output, json) = compare_all(
        directory.path(),
        &[
            "--no-qemu",
            "--engine",
            "jit",
            "--only",
            "crc,gzip,boot",
            "--svg",
            &svg,
            "--markdown",
            &markdown,
        ],
    );

    assert!(output.status.success(), "{}", json["failures"]);
    assert_eq!(json["engine"], "jit");
    let workloads = json["workloads"].as_array().unwrap();
    assert_eq!(workloads.len(), 2);
    for row in workloads.iter().chain([&json["boot"]]) {
        let median = row["times"]["trapgate"]["median"].as_f64();
        assert!(median.is_some_and(|seconds| seconds > 0.0), "{row}");
    }
    // Code for a boot alone is more than that.
    let mib = json["memory_mib"]["trapgate"].as_f64();
    assert!(mib.is_some_and(|mib| mib > 8.0), "{json}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        text.contains("crc") && text.contains("at most: trapgate"),
        "{text}"
    );
    assert!(fs::read_to_string(svg).unwrap().starts_with("<svg"));
    assert!(fs::read_to_string(markdown).unwrap().contains("| crc |"));
}

#[test]
fn machine_that_hangs_or_ends_loses_one_workload_and_not_the_others() {
    if !has_image() {
        return;
    }
    let directory = TempDir::new().unwrap();
    // One hangs in its first, the next ends in the second, the next computes something wrong, the last is well.
    let qemu = stand_in(
        directory.path(),
        "*crc,*) exec sleep 1000;;\n\
         *chase-l1,*) echo out of luck >&2; exit 1;;\n\
         *) echo @done double 1 1000; echo @done dd f424 5000,6000;;",
    );

    let (output, json) = compare(
        directory.path(),
        &[
            "--only",
            "crc,chase-l1,double,dd",
            "--limit",
            "1",
            "--qemu",
            &qemu,
        ],
    );

    assert!(!output.status.success());
    let failures: Vec<(&str, &str)> = json["failures"]
        .as_array()
        .unwrap()
        .iter()
        .map(|lost| {
            (
                lost["workload"].as_str().unwrap(),
                lost["reason"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(failures.len(), 3, "{failures:?}");
    let reason = |name| failures.iter().find(|(lost, _)| *lost == name).unwrap().1;
    assert!(reason("crc").contains("nothing came"));
    assert_eq!(reason("chase-l1"), "its process ended: out of luck");
    assert!(reason("double").contains("on the host"));
    let row = |name| {
        let workloads = json["workloads"].as_array().unwrap();
        workloads.iter().find(|row| row["name"] == name).unwrap()
    };
    assert_eq!(
        row("dd")["times"]["tcg"]["runs"],
        serde_json::json!([5e-6, 6e-6])
    );
    // What failed has no time there, and has on the host.
    for name in ["crc", "chase-l1", "double"] {
        assert!(row(name)["times"]["tcg"].is_null());
        assert!(row(name)["times"]["native"]["median"].is_number());
    }
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("failed: chase-l1 under TCG: its process ended: out of luck"));
}

#[test]
fn machine_that_does_not_boot_is_named_and_the_host_is_measured_all_the_same() {
    if !has_image() {
        return;
    }
    let directory = TempDir::new().unwrap();
    let qemu = directory.path().join("qemu");
    let script =
        "#!/bin/sh\n[ \"$1\" != --version ] || { echo 0.0; exit; }\necho no memory >&2; exit 1\n";
    fs::write(&qemu, script).unwrap();
    fs::set_permissions(&qemu, Permissions::from_mode(0o755)).unwrap();

    let (output, json) = compare(
        directory.path(),
        &["--only", "crc,boot", "--qemu", qemu.to_str().unwrap()],
    );

    assert!(!output.status.success());
    assert_eq!(json["failures"][0]["workload"], "boot");
    assert_eq!(
        json["failures"][0]["reason"],
        "its process ended: no memory"
    );
    assert!(json["workloads"][0]["times"]["native"]["median"].is_number());
}

#[test]
fn without_qemu_the_host_is_measured_and_a_note_says_so() {
    if !has_image() {
        return;
    }
    let directory = TempDir::new().unwrap();

    let (output, json) = compare(
        directory.path(),
        &["--only", "crc", "--qemu", "/no/such/qemu"],
    );

    assert!(output.status.success());
    assert!(
        json["notes"][0]
            .as_str()
            .unwrap()
            .contains("/no/such/qemu is not installed")
    );
}
