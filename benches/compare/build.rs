//! Compiles `workloads/` to one static program for the machine that builds it.
//!
//! `rustc` is called directly, so that neither the profile nor flags of the host's build change what is measured. Where
//! the program cannot be built this crate still is, and says at run time what is missing: the rest of the workspace
//! does not need it.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// Environment variables through which the host's build could reach into the program's.
const NOT_INHERITED: &[&str] = &[
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTFLAGS",
    "CARGO_MAKEFLAGS",
    "MAKEFLAGS",
    "MFLAGS",
    "RUSTC_LOG",
];

const FLAGS: &[&str] = &[
    "--edition=2024",
    "--crate-name=workloads",
    "--target=x86_64-unknown-linux-gnu",
    "-Copt-level=3",
    "-Ccodegen-units=1",
    "-Cpanic=abort",
    "-Cdebug-assertions=no",
    // What distributions compile for; a workload that wants more asks the processor for it.
    "-Ctarget-cpu=x86-64",
    "-Ctarget-feature=+crt-static",
    "-Cstrip=symbols",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=workloads");
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    let program = out.join("workloads");
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or("rustc".into()));
    rustc
        // Panic messages name no directory of this machine.
        .current_dir(root)
        .args(FLAGS)
        .arg("-o")
        .arg(&program)
        .arg("workloads/main.rs");
    for variable in NOT_INHERITED {
        rustc.env_remove(variable);
    }
    let problem = match rustc.output() {
        Err(error) => format!("cannot start rustc: {error}"),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            if output.status.success() {
                for line in text.lines().filter(|line| !line.is_empty()) {
                    println!("cargo::warning={line}");
                }
                String::new()
            } else {
                text.into_owned()
            }
        }
    };
    if !problem.is_empty() {
        println!(
            "cargo::warning=the workloads cannot be built, so nothing can be compared; fix: install a C compiler \
             with a static C library (`apt-get install gcc libc6-dev`)"
        );
        // An empty program is known by its size.
        let _ = fs::write(&program, []);
    }
    let _ = fs::write(out.join("problem.txt"), problem);
}
