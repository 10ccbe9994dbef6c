//! What the workloads' program and the guest's init say, line by line; `workloads/main.rs` describes it.

use trapgate_image::STATUS_PREFIX;

/// A line that means something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Which engine trapgate took.
    Engine(String),
    /// The guest's first program runs.
    Init,
    /// The clock of whoever says so, in nanoseconds.
    Clock(u64),
    /// A workload has run.
    Done {
        name: String,
        /// What it computed.
        check: u64,
        /// Nanoseconds that each run took.
        runs: Vec<u64>,
    },
    /// A workload does not run here, and why.
    Skip { name: String, reason: String },
    /// A workload failed.
    Fail { name: String, reason: String },
    /// That is all.
    End,
}

impl Event {
    /// The workload that is over by it, however it ended.
    pub(crate) fn over(&self) -> Option<&str> {
        match self {
            Self::Done { name, .. } | Self::Skip { name, .. } | Self::Fail { name, .. } => {
                Some(name)
            }
            _ => None,
        }
    }
}

/// Reads a line. The kernel's messages go to the same port: those are none, and what stands before ours, because the
/// kernel was interrupted in a line, is passed over.
pub(crate) fn parse(line: &str) -> Option<Event> {
    if let Some((_, status)) = line.split_once(STATUS_PREFIX) {
        return (status.trim() == "init").then_some(Event::Init);
    }
    let (_, ours) = line.split_once('@')?;
    let (word, rest) = ours
        .trim_end()
        .split_once(' ')
        .unwrap_or((ours.trim_end(), ""));
    let named = || {
        let (name, reason) = rest.split_once(' ').unwrap_or((rest, ""));
        (name.to_owned(), reason.to_owned())
    };
    Some(match word {
        "clock" => Event::Clock(rest.parse().ok()?),
        "engine" => Event::Engine(rest.to_owned()),
        "done" => {
            let mut words = rest.split(' ');
            let (name, check, runs) = (words.next()?, words.next()?, words.next()?);
            let runs: Result<Vec<u64>, _> = runs.split(',').map(str::parse).collect();
            Event::Done {
                name: name.to_owned(),
                check: u64::from_str_radix(check, 16).ok()?,
                runs: runs.ok()?,
            }
        }
        "skip" => {
            let (name, reason) = named();
            Event::Skip { name, reason }
        }
        "fail" => {
            let (name, reason) = named();
            Event::Fail { name, reason }
        }
        "end" => Event::End,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_program_are_read() {
        let name = || "crc".to_owned();
        let fails = |reason: &str| Event::Fail {
            name: name(),
            reason: reason.to_owned(),
        };
        for (line, event) in [
            ("@clock 12\r", Event::Clock(12)),
            (
                "@fail crc it ended with signal: 9",
                fails("it ended with signal: 9"),
            ),
            ("@fail crc", fails("")),
            ("@end\r\n", Event::End),
            ("trapgate-status: init\r", Event::Init),
            (
                "[    1.0] tsc: Marking @done crc b9f311e2 7,8",
                Event::Done {
                    name: name(),
                    check: 0xb9f3_11e2,
                    runs: vec![7, 8],
                },
            ),
        ] {
            assert_eq!(parse(line), Some(event), "{line}");
        }
    }

    #[test]
    fn what_is_not_whole_means_nothing() {
        for line in [
            "",
            "@",
            "@done crc b9f311e2",
            "@done crc b9f311e2 ",
            "@done crc nonsense 1",
            "@done crc 1 1,,2",
            "@clock",
            "@other thing",
            "trapgate-status: 0",
            "[    0.1] Linux version 6.1 (debian-kernel@lists.debian.org)",
        ] {
            assert_eq!(parse(line), None, "{line}");
        }
    }
}
