//! What this process costs in memory, apart from the guest's RAM.

use crate::Failure;

/// Part of the name that mappings of guest RAM have in `smaps`: that of the memory file.
const GUEST: &str = "guest-memory";

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
        let mut is_guest = false;
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let (name, value) = (words.next().unwrap_or_default(), words.next());
            // A field's name ends with a colon; a mapping's line begins with its addresses.
            if !name.ends_with(':') {
                is_guest = line.contains(GUEST);
                continue;
            }
            let kib = value.and_then(|value| value.parse().ok()).unwrap_or(0);
            match name {
                "Rss:" if is_guest => footprint.guest += kib,
                "Rss:" => footprint.vmm += kib,
                "Pss:" if !is_guest => footprint.vmm_share += kib,
                _ => {}
            }
        }
        footprint
    }
}

/// KiB as MiB.
pub(crate) fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}
