//! What the host is.

use std::fs::read_to_string;
use std::thread::available_parallelism;

fn read(path: &str) -> String {
    read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// Names and values for the head of the report.
pub(crate) fn describe() -> Vec<(&'static str, String)> {
    let cpuinfo = read("/proc/cpuinfo");
    let field = |name: &str| {
        let line = cpuinfo.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.split_once(": ")?.1.trim().to_owned())
    };
    let number = |name| field(name).unwrap_or_default();
    let processor = field("model name").unwrap_or("an unknown processor".to_owned());
    let cpus = available_parallelism().map_or(1, usize::from);
    vec![
        (
            "host",
            format!(
                "{processor} (family {} model {}), {cpus} CPUs",
                number("cpu family"),
                number("model\t")
            ),
        ),
        ("host kernel", read("/proc/sys/kernel/osrelease")),
        (
            "host huge pages",
            read("/sys/kernel/mm/transparent_hugepage/enabled"),
        ),
    ]
}

/// The host's load, of the last minute.
pub(crate) fn load() -> Option<f64> {
    read("/proc/loadavg")
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}
