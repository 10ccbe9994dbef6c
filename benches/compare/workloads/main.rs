//! The workloads that trapgate and TCG are compared by: one static program that runs natively and in a guest.
//!
//! `workloads all NAME[,NAME…] WORK BUSYBOX SCALE SECONDS` runs each in a process of its own and prints, line by
//! line: `@clock N` (nanoseconds), then for each line that it reads one of `@done NAME CHECK NS[,NS…]`,
//! `@skip NAME REASON`, `@fail NAME REASON`; for one more line `@clock N`, `@end`. Sizes are divided by SCALE; SECONDS
//! are what one may take.

mod avx2;
mod bytecode;
mod chase;
mod checksums;
mod copy;
mod double;
mod libc;
mod objects;
mod pages;
mod ping_pong;
mod programs;
mod random;
mod runner;
mod sort;

use std::path::PathBuf;

/// What a workload needs to know.
pub(crate) struct Setting {
    /// A directory that is its own, on a file system in memory.
    pub(crate) work: PathBuf,
    /// The busybox whose programs it runs.
    pub(crate) busybox: PathBuf,
    /// By which its size is divided.
    pub(crate) scale: u64,
}

/// The measured part of a workload, ready to run any number of times. Gives what it computed, which must be
/// the same everywhere.
pub(crate) type Work = Box<dyn FnMut() -> Result<u64, String>>;

/// Why a workload does not begin.
pub(crate) enum NotRun {
    /// The processor lacks what it needs.
    Lacks(&'static str),
    /// It failed.
    Failed(String),
}

impl From<String> for NotRun {
    fn from(reason: String) -> Self {
        Self::Failed(reason)
    }
}

/// Prepares a workload.
pub(crate) fn prepare(name: &str, setting: &Setting) -> Result<Work, NotRun> {
    Ok(match name {
        "shell" => programs::shell(setting),
        "fork-exec" => programs::fork_exec(setting),
        "pipeline" => programs::pipeline(setting),
        "dd" => programs::dd(setting),
        "gzip" => programs::gzip(setting)?,
        "tar" => programs::tar(setting)?,
        "sha256" => checksums::sha256(setting),
        "crc" => checksums::crc(setting),
        "sort" => sort::sort(setting),
        "chase-l1" => chase::chase(16 << 10, 60_000_000 / setting.scale),
        "chase-dram" => chase::chase(256 << 20, 1_500_000 / setting.scale),
        "bytecode" => bytecode::run(setting),
        "virtual" => objects::run(setting),
        "double" => double::run(setting),
        "avx2" => avx2::run(setting)?,
        "copy" => copy::run(setting),
        "faults" => pages::faults(setting),
        "mmap" => pages::churn(setting),
        "ping-pong" => ping_pong::run(setting)?,
        _ => return Err(NotRun::Failed("there is no such workload".to_owned())),
    })
}

fn main() {
    runner::main();
}
