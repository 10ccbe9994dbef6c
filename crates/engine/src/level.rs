//! What a host's processor must have for a guest's.

use trapgate_x86::profile::Level;

use crate::probe::Host;

/// Instructions of x86-64-v2 and, in addition, of v3 (System V psABI 1.0, 3.1.1), under the probe's names.
const V2: &[&str] = &["sse3", "ssse3", "sse4.1", "sse4.2", "popcnt", "cmpxchg16b"];
const V3: &[&str] = &[
    "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe",
];

impl Host {
    /// What this host lacks of a level: a guest's arithmetic runs on its processor.
    pub fn lacks(&self, level: Level) -> Vec<&'static str> {
        let more: &[_] = match level {
            Level::V2 => &[],
            Level::V3 => V3,
        };
        let all = V2.iter().chain(more).copied();
        all.filter(|name| !self.has(name)).collect()
    }

    /// The highest level that a guest can have here.
    pub fn level(&self) -> Level {
        if self.lacks(Level::V3).is_empty() {
            Level::V3
        } else {
            Level::V2
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(lacking: &[&str]) -> Host {
        let mut host = Host::probe();
        host.features = [V2, V3]
            .concat()
            .into_iter()
            .map(|name| (name, !lacking.contains(&name)))
            .collect();
        host
    }

    #[test]
    fn guest_gets_the_highest_level_that_the_host_has() {
        assert_eq!(host(&[]).level(), Level::V3);
        assert_eq!(host(&["fma"]).level(), Level::V2);
    }

    #[test]
    fn what_is_lacking_is_named() {
        let host = host(&["popcnt", "movbe"]);
        assert_eq!(host.lacks(Level::V2), ["popcnt"]);
        assert_eq!(host.lacks(Level::V3), ["popcnt", "movbe"]);
    }
}
