//! The header of a snapshot, and sections.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use trapgate_x86::CpuProfile;
use trapgate_x86::profile::{CpuidContext, Level};

use crate::SnapshotError;

/// Version of the format: of the header, of the configuration, and of which parts there are. Sections
/// have versions of their own.
///
/// | version | what is new |
/// | --- | --- |
/// | 1 | the first |
/// | 2 | the profile in the header has a version |
pub const FORMAT_VERSION: u32 = 2;

/// Version of the CPU profiles: of everything that CPUID answers in any of them. Whoever changes an answer
/// raises this, so that a guest that has seen the old one is refused by a number and not by a checksum; a test knows
/// the answers of this version.
///
/// | version | what is new |
/// | --- | --- |
/// | 1 | the first that has a number; in format 1 the answers changed without one |
pub const PROFILE_VERSION: u32 = 1;

/// What the header says it is.
const FORMAT: &str = "trapgate-snapshot";

/// Name of the file.
pub(super) const NAME: &str = "snapshot.json";

/// No header is longer, with a thousand processors.
pub(super) const LONGEST: u64 = 4 << 20;

/// A part besides the header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    /// Bytes.
    pub length: u64,
    /// CRC-32, eight hexadecimal digits. Not of memory, which has a list of its own, nor of the
    /// configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub crc32: Option<String>,
}

impl Part {
    /// The part that `bytes` are.
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self::summed(bytes.len() as u64, crc32fast::hash(bytes))
    }

    pub(super) fn summed(length: u64, checksum: u32) -> Self {
        Self {
            length,
            crc32: Some(format!("{checksum:08x}")),
        }
    }

    /// Its checksum; one that is no number is nobody's.
    pub(super) fn checksum(&self, name: &str) -> Result<u32, SnapshotError> {
        let number = self.crc32.as_deref().filter(|text| text.len() == 8);
        number
            .and_then(|text| u32::from_str_radix(text, 16).ok())
            .ok_or_else(|| SnapshotError::Checksum {
                part: name.to_owned(),
            })
    }
}

/// The processors that the guest saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The level of the x86-64 psABI.
    pub level: Level,
    /// [`PROFILE_VERSION`]: a profile of the same name may offer more in a later one.
    pub version: u32,
    /// Ticks of the TSC in a second.
    pub tsc_hz: u64,
    /// CRC-32 of what CPUID answers.
    pub cpuid_crc32: String,
}

impl Profile {
    pub(super) fn of(level: Level, tsc_hz: u64) -> Self {
        let profile = CpuProfile::new(level, tsc_hz);
        let mut hasher = crc32fast::Hasher::new();
        let context = CpuidContext {
            processor: 0,
            processors: 1,
            cr4: 0,
            xcr0: 1,
            apic_enabled: true,
        };
        for group in [0u32, 0x4000_0000, 0x8000_0000] {
            for leaf in group..group + 0x20 {
                for subleaf in 0..4 {
                    let answer = profile.cpuid(leaf, subleaf, &context);
                    for register in [answer.eax, answer.ebx, answer.ecx, answer.edx] {
                        hasher.update(&register.to_le_bytes());
                    }
                }
            }
        }
        Self {
            level,
            version: PROFILE_VERSION,
            tsc_hz,
            cpuid_crc32: format!("{:08x}", hasher.finalize()),
        }
    }

    /// Refuses what this program does not offer.
    pub(super) fn check(&self) -> Result<(), SnapshotError> {
        let Self {
            level,
            version,
            tsc_hz,
            cpuid_crc32,
        } = self;
        if *version != PROFILE_VERSION {
            return Err(SnapshotError::ProfileVersion {
                level: level.name(),
                found: *version,
                known: PROFILE_VERSION,
            });
        }
        if Self::of(*level, *tsc_hz).cpuid_crc32 != *cpuid_crc32 {
            return Err(SnapshotError::Profile {
                reason: format!("CPUID of {} has other answers here", level.name()),
            });
        }
        Ok(())
    }
}

/// The header.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// `trapgate-snapshot`.
    pub format: String,
    /// [`FORMAT_VERSION`].
    pub version: u32,
    /// The program that wrote it, with its version. For people.
    pub program: String,
    /// Host time when it was written, seconds since 1970. For people.
    pub created: u64,
    /// What runs in the machine, if it is known. For people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<String>,
    /// The engine that it was taken under; any other may go on.
    pub engine: String,
    /// The processors that the guest sees.
    pub profile: Profile,
    /// How many of them.
    pub cpus: u32,
    /// RAM, bytes.
    pub memory_bytes: u64,
    /// All other parts, by the names of their files.
    pub parts: BTreeMap<String, Part>,
}

/// What can be said of any version's header.
#[derive(Deserialize)]
struct AnyHeader {
    format: String,
    version: u64,
}

impl Header {
    pub(super) fn format() -> String {
        FORMAT.to_owned()
    }

    /// Reads a header; the version first, since all else depends on it.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, SnapshotError> {
        let unreadable = |reason: String| SnapshotError::Unreadable {
            part: NAME.to_owned(),
            reason,
        };
        let AnyHeader { format, version } =
            serde_json::from_slice(bytes).map_err(|error| unreadable(error.to_string()))?;
        if format != FORMAT {
            return Err(unreadable(format!("its format is `{format}`")));
        }
        if version != u64::from(FORMAT_VERSION) {
            return Err(SnapshotError::Version {
                found: version,
                known: FORMAT_VERSION,
            });
        }
        let header: Self =
            serde_json::from_slice(bytes).map_err(|error| unreadable(error.to_string()))?;
        header.profile.check()?;
        Ok(header)
    }
}

#[derive(Serialize)]
struct Section<'a, T> {
    version: u32,
    state: &'a T,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadSection<T> {
    #[serde(rename = "version")]
    _version: u32,
    state: T,
}

#[derive(Deserialize)]
struct AnySection {
    version: u64,
}

/// The bytes of a section.
pub(super) fn section(version: u32, state: &impl Serialize) -> Vec<u8> {
    // Plain data: there is nothing in it that JSON has no words for.
    let mut bytes = serde_json::to_vec_pretty(&Section { version, state }).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}

/// What a section says, if it is of this version.
pub(super) fn read_section<T: DeserializeOwned>(
    part: &str,
    version: u32,
    bytes: &[u8],
) -> Result<T, SnapshotError> {
    let unreadable = |error: serde_json::Error| SnapshotError::Unreadable {
        part: part.to_owned(),
        reason: error.to_string(),
    };
    let found = section_version(part, bytes)?;
    if found != u64::from(version) {
        return Err(SnapshotError::SectionVersion {
            part: part.to_owned(),
            found,
            known: version,
        });
    }
    let section: ReadSection<T> = serde_json::from_slice(bytes).map_err(unreadable)?;
    Ok(section.state)
}

/// The version of a section.
pub(super) fn section_version(part: &str, bytes: &[u8]) -> Result<u64, SnapshotError> {
    let section: AnySection =
        serde_json::from_slice(bytes).map_err(|error| SnapshotError::Unreadable {
            part: part.to_owned(),
            reason: error.to_string(),
        })?;
    Ok(section.version)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What CPUID answered when the profiles got their present version.
    #[test]
    fn cpuid_changes_with_the_version_of_the_profiles_only() {
        let answers =
            [Level::V2, Level::V3].map(|level| Profile::of(level, 1_000_000_000).cpuid_crc32);
        assert_eq!(
            (PROFILE_VERSION, answers.each_ref().map(String::as_str)),
            (1, ["c9e24e91", "1884a44e"]),
            "raise PROFILE_VERSION, and keep another golden snapshot (tests/golden_snapshot.rs)"
        );
    }

    #[test]
    fn profile_of_another_version_is_refused_by_its_number() {
        let profile = Profile {
            version: PROFILE_VERSION + 1,
            cpuid_crc32: "00000000".to_owned(),
            ..Profile::of(Level::V2, 1_000_000_000)
        };
        let error = profile.check().unwrap_err();
        assert!(
            matches!(error, SnapshotError::ProfileVersion { found, .. } if found == PROFILE_VERSION + 1),
            "{error}"
        );
    }
}
