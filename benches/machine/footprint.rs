//! What this process costs in memory, apart from the guest's RAM.

use crate::Failure;

/// What `smaps` says of guest RAM alone: it was asked to be of large pages, or of small ones.
const GUEST: [&str; 2] = ["hg", "nh"];

/// Resident memory of this process in KiB.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Footprint {
    /// Guest RAM that is there.
    pub(crate) guest: u64,
    /// Everything else that is mapped and there, the program itself and its libraries too.
    pub(crate) vmm: u64,
    /// As [`Self::vmm`], with pages that other processes share counted by their share.
    pub(crate) vmm_share: u64,
}

impl Footprint {
    /// Of this process, now.
    ///
    /// # Errors
    /// `/proc` is not there.
    pub(crate) fn now() -> Result<Self, Failure> {
        Ok(Self::of(&std::fs::read_to_string("/proc/self/smaps")?))
    }

    /// Reads what `proc_pid_smaps(5)` describes.
    fn of(smaps: &str) -> Self {
        let mut footprint = Self::default();
        let (mut rss, mut pss) = (0, 0);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (name, mut values) = (words.next().unwrap_or_default(), words);
            match name {
                "Rss:" => rss = first(values),
                "Pss:" => pss = first(values),
                // The last line of a mapping.
                "VmFlags:" if values.any(|flag| GUEST.contains(&flag)) => footprint.guest += rss,
                "VmFlags:" => {
                    footprint.vmm += rss;
                    footprint.vmm_share += pss;
                }
                _ => {}
            }
        }
        footprint
    }
}

/// The first of a field's values, KiB.
fn first<'a>(mut values: impl Iterator<Item = &'a str>) -> u64 {
    values.next().and_then(|kib| kib.parse().ok()).unwrap_or(0)
}

/// KiB as MiB.
pub(crate) fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
