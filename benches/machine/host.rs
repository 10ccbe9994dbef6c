//! What the figures were measured on.

use std::fs::read_to_string;
use std::thread::available_parallelism;

/// Names and values for the head of the report.
pub(crate) fn describe() -> Vec<(&'static str, String)> {
    let read = |path: &str| read_to_string(path).unwrap_or_default();
    let processor = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("an unknown processor".to_owned(), |(_, name)| {
            name.trim().to_owned()
        });
    let cpus = available_parallelism().map_or(1, usize::from);
    vec![
        ("trapgate", env!("CARGO_PKG_VERSION").to_owned()),
        ("host", format!("{processor}, {cpus} CPUs")),
        (
            "host kernel",
            read("/proc/sys/kernel/osrelease").trim().to_owned(),
        ),
        ("engine", "interp".to_owned()),
    ]
}

/// A warning if others use this machine: the figures are then theirs too.
pub(crate) fn busy() -> Option<String> {
    let load = read_to_string("/proc/loadavg").ok()?;
    let load: f64 = load.split_whitespace().next()?.parse().ok()?;
    (load > 0.5).then(|| {
        format!(
            "this machine was busy at the start (load {load}): speeds are lower than on a quiet one"
        )
    })
}
