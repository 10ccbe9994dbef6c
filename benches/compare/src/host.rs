//! What the host is, and what a process costs on it.

use std::fs::read_to_string;
use std::thread::available_parallelism;

/// Part of the name that trapgate's mappings of guest RAM have in `smaps`.
const GUEST: &str = "guest-memory";

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

/// KiB of memory that a process takes (`Pss`: what is mapped twice counts once), apart from the guest's RAM: the mappings of that name, or one that is as large as the
/// RAM and holds no code.
pub(crate) fn beyond_guest_ram(process: u32, ram_kib: u64) -> Option<u64> {
    let smaps = read_to_string(format!("/proc/{process}/smaps")).ok()?;
    resident(&smaps, ram_kib)
}

/// Reads what `proc_pid_smaps(5)` describes.
fn resident(smaps: &str, ram_kib: u64) -> Option<u64> {
    let (mut sum, mut is_guest, mut is_code) = (None, false, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next()?, words.next()?);
        // A field's name ends with a colon; a mapping's line begins with its addresses.
        if !name.ends_with(':') {
            is_code = value.contains('x');
            is_guest = line.contains(GUEST);
            continue;
        }
        let kib = || value.parse::<u64>().ok();
        match name {
            "Size:" => is_guest |= !is_code && kib()? >= ram_kib,
            "Pss:" if !is_guest => sum = Some(sum.unwrap_or(0) + kib()?),
            _ => {}
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_not_counted() {
        let smaps = "\
10000-20000 r-xp 00000000 00:01 7 /bin/monitor
Size:                 64 kB
Pss:                  50 kB
VmFlags: rd ex mr mw
20000-30000 rw-s 00000000 00:01 9 /memfd:guest-memory (deleted)
Size:                512 kB
Pss:                 300 kB
30000-40000 rw-p 00000000 00:00 0
Size:               1024 kB
Pss:                 700 kB
40000-50000 rwxp 00000000 00:00 0
Size:               2048 kB
Pss:                   7 kB
";
        assert_eq!(resident(smaps, 1024), Some(57));
        assert_eq!(resident(smaps, 4096), Some(757));
        assert_eq!(resident("", 1024), None);
    }
}
