//! Other people's software in the guest, as a judge of ours: Linux's x86 selftests, CPython's tests, memtest86+,
//! 32-bit kernels.
//!
//! `cargo test --release -p trapgate-vmm --test software -- --nocapture` runs a share that takes a minute;
//! `TRAPGATE_SOFTWARE=all` before it runs all of it, which takes an hour or two. What was compared, and with what result,
//! is in `docs/fidelity.md`.
//!
//! Everything is fetched from Debian when the test runs and kept below the build's directory; nothing of it is in this
//! repository. Skipped, aloud, where packages or a compiler cannot be had.
#![forbid(unsafe_code)]

#[path = "../boot/mod.rs"]
mod boot;
#[path = "../boot/linux.rs"]
mod linux;
mod linux32;
mod memtest;
mod packages;
mod python;
mod selftests;

use std::io::Write;

use trapgate_vmm::EngineKind;

/// The engines that are compared. KVM is left out: with hardware it is the host's CPU that is tested.
const ENGINES: [EngineKind; 2] = [EngineKind::Interp, EngineKind::Jit];

/// Whether all is to be run, not the share that takes a minute.
fn everything() -> bool {
    std::env::var_os("TRAPGATE_SOFTWARE").is_some_and(|value| value == "all")
}

/// Says aloud that something did not take place.
fn skipped(what: &str, why: &str) {
    say(&format!("SKIPPED: {what}: {why}"));
}

/// Prints a line past the test harness, which would swallow it.
fn say(line: &str) {
    let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
}
