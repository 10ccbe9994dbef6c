//! The kernel's CPUID table from our CPU profile.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use trapgate_x86::CpuProfile;
use trapgate_x86::profile::CpuidContext;

use crate::KvmError;

/// Leaves of the profile, each with the number of its subleaves; one for those that have none.
const LEAVES: &[(u32, u32)] = &[
    (0x0, 1),
    (0x1, 1),
    (0x2, 1),
    (0x4, 4),
    (0x5, 1),
    (0x6, 1),
    (0x7, 1),
    (0xb, 3),
    (0xd, 3),
    (0x15, 1),
    (0x16, 1),
    (0x4000_0000, 1),
    (0x4000_0001, 1),
    (0x4000_0010, 1),
    (0x8000_0000, 1),
    (0x8000_0001, 1),
    (0x8000_0002, 1),
    (0x8000_0003, 1),
    (0x8000_0004, 1),
    (0x8000_0006, 1),
    (0x8000_0007, 1),
    (0x8000_0008, 1),
];

/// Leaves whose subleaf matters.
const INDEXED: [u32; 4] = [0x4, 0x7, 0xb, 0xd];

/// A register of CPUID's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Ebx,
    Ecx,
    Edx,
}

/// Features that a processor has or has not: where CPUID says so, and what they are called. What is
/// not here is a hint, or is there on every processor that runs 64-bit guests, or is our doing.
const FEATURES: &[(u32, Register, u32, &str)] = &[
    (1, Register::Ecx, 0, "sse3"),
    (1, Register::Ecx, 1, "pclmulqdq"),
    (1, Register::Ecx, 9, "ssse3"),
    (1, Register::Ecx, 12, "fma"),
    (1, Register::Ecx, 13, "cmpxchg16b"),
    (1, Register::Ecx, 17, "pcid"),
    (1, Register::Ecx, 19, "sse4.1"),
    (1, Register::Ecx, 20, "sse4.2"),
    (1, Register::Ecx, 22, "movbe"),
    (1, Register::Ecx, 23, "popcnt"),
    (1, Register::Ecx, 25, "aes"),
    (1, Register::Ecx, 26, "xsave"),
    (1, Register::Ecx, 28, "avx"),
    (1, Register::Ecx, 29, "f16c"),
    (1, Register::Ecx, 30, "rdrand"),
    (7, Register::Ebx, 0, "fsgsbase"),
    (7, Register::Ebx, 1, "tsc_adjust"),
    (7, Register::Ebx, 3, "bmi1"),
    (7, Register::Ebx, 5, "avx2"),
    (7, Register::Ebx, 7, "smep"),
    (7, Register::Ebx, 8, "bmi2"),
    (7, Register::Ebx, 10, "invpcid"),
    (7, Register::Ebx, 18, "rdseed"),
    (7, Register::Ebx, 19, "adx"),
    (7, Register::Ebx, 20, "smap"),
    (7, Register::Ecx, 2, "umip"),
    (7, Register::Ecx, 22, "rdpid"),
    (7, Register::Edx, 26, "spec_ctrl"),
    (0x8000_0001, Register::Ecx, 0, "lahf_lm"),
    (0x8000_0001, Register::Ecx, 5, "lzcnt"),
    (0x8000_0001, Register::Ecx, 8, "prefetchw"),
    (0x8000_0001, Register::Edx, 11, "syscall"),
    (0x8000_0001, Register::Edx, 20, "nx"),
    (0x8000_0001, Register::Edx, 26, "pdpe1gb"),
    (0x8000_0001, Register::Edx, 27, "rdtscp"),
    (0x8000_0001, Register::Edx, 29, "lm"),
];

/// What becomes of features that a profile has and KVM has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lacks {
    /// There is no machine then. What CPUID says is what the profile says.
    Refuse,
    /// The guest is told that it does not have them: for a paravirtual KVM, which is asked for by
    /// name. Control register bits that go with them then fault.
    Hide,
}

/// Processor `context.processor`'s table, and the names of the features that are hidden from it.
///
/// # Errors
/// [`KvmError::Profile`], if there are any and they may not be hidden.
pub(crate) fn table(
    profile: &CpuProfile,
    context: &CpuidContext,
    supported: &[kvm_cpuid_entry2],
    lacks: Lacks,
) -> Result<(CpuId, Vec<&'static str>), KvmError> {
    let mut entries: Vec<kvm_cpuid_entry2> = LEAVES
        .iter()
        .flat_map(|&(leaf, count)| (0..count).map(move |subleaf| (leaf, subleaf)))
        .map(|(leaf, subleaf)| entry(profile, context, leaf, subleaf))
        .collect();
    let mut hidden = Vec::new();
    for &(leaf, register, bit, name) in FEATURES {
        let offered = supported
            .iter()
            .find(|entry| entry.function == leaf && entry.index == 0)
            .is_some_and(|entry| value(entry, register) >> bit & 1 != 0);
        let Some(entry) = entries
            .iter_mut()
            .find(|entry| entry.function == leaf && entry.index == 0)
        else {
            continue;
        };
        if value(entry, register) >> bit & 1 != 0 && !offered {
            hidden.push(name);
            *value_mut(entry, register) &= !(1 << bit);
        }
    }
    if !hidden.is_empty() && lacks == Lacks::Refuse {
        return Err(KvmError::Profile {
            profile: profile.name(),
            features: hidden,
        });
    }
    if hidden.contains(&"xsave") {
        // Its leaf would speak of an instruction that is not there.
        entries.retain(|entry| entry.function != 0xd);
    }
    let table = CpuId::from_entries(&entries).map_err(|_| KvmError::Lacks {
        what: "room for so many CPUID leaves",
    })?;
    Ok((table, hidden))
}

fn entry(
    profile: &CpuProfile,
    context: &CpuidContext,
    leaf: u32,
    subleaf: u32,
) -> kvm_cpuid_entry2 {
    let answer = profile.cpuid(leaf, subleaf, context);
    kvm_cpuid_entry2 {
        function: leaf,
        index: subleaf,
        flags: if INDEXED.contains(&leaf) {
            KVM_CPUID_FLAG_SIGNIFCANT_INDEX
        } else {
            0
        },
        eax: answer.eax,
        ebx: answer.ebx,
        ecx: answer.ecx,
        edx: answer.edx,
        padding: [0; 3],
    }
}

fn value(entry: &kvm_cpuid_entry2, register: Register) -> u32 {
    match register {
        Register::Ebx => entry.ebx,
        Register::Ecx => entry.ecx,
        Register::Edx => entry.edx,
    }
}

fn value_mut(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Ebx => &mut entry.ebx,
        Register::Ecx => &mut entry.ecx,
        Register::Edx => &mut entry.edx,
    }
}

#[cfg(test)]
mod tests {
    use trapgate_x86::CpuidResult;
    use trapgate_x86::profile::Level;

    use super::*;

    fn profile() -> CpuProfile {
        CpuProfile::new(Level::V3, 2_000_000_000)
    }

    /// What a KVM that has everything says.
    fn everything() -> Vec<kvm_cpuid_entry2> {
        [1, 7, 0x8000_0001]
            .map(|function| kvm_cpuid_entry2 {
                function,
                ebx: u32::MAX,
                ecx: u32::MAX,
                edx: u32::MAX,
                ..kvm_cpuid_entry2::default()
            })
            .to_vec()
    }

    fn context() -> CpuidContext {
        CpuidContext {
            processor: 1,
            processors: 2,
            ..CpuidContext::default()
        }
    }

    #[test]
    fn table_is_the_profiles_where_kvm_has_everything() {
        let (table, hidden) = table(&profile(), &context(), &everything(), Lacks::Refuse).unwrap();
        assert!(hidden.is_empty());
        for entry in table.as_slice() {
            let answer = profile().cpuid(entry.function, entry.index, &context());
            let said = [entry.eax, entry.ebx, entry.ecx, entry.edx];
            let expected = [answer.eax, answer.ebx, answer.ecx, answer.edx];
            assert_eq!(said, expected, "{:#x}.{}", entry.function, entry.index);
        }
    }

    /// A leaf that the profile answers and that is missing in the table would read as zeros.
    #[test]
    fn every_leaf_of_the_profile_is_in_the_table() {
        let (table, _) = table(&profile(), &context(), &everything(), Lacks::Refuse).unwrap();
        let ranges = [
            0..=0x16,
            0x4000_0000..=0x4000_0010,
            0x8000_0000..=0x8000_0008,
        ];
        for leaf in ranges.into_iter().flatten() {
            for subleaf in 0..8 {
                let answer = profile().cpuid(leaf, subleaf, &context());
                let there = table.as_slice().iter().any(|entry| {
                    entry.function == leaf && (entry.index == subleaf || entry.flags == 0)
                });
                // The kernel makes up the topology beyond its last level by itself.
                let made_up = leaf == 0xb && subleaf > 2;
                let silent = answer == CpuidResult::default() || made_up;
                assert!(there || silent, "{leaf:#x}.{subleaf}");
            }
        }
    }

    #[test]
    fn missing_features_are_named_or_hidden() {
        let mut supported = everything();
        supported[0].ecx &= !(1 << 26);
        supported[1].ebx &= !(1 << 7 | 1 << 20);
        let error = table(&profile(), &context(), &supported, Lacks::Refuse).unwrap_err();
        assert!(error.to_string().ends_with("xsave, smep, smap"), "{error}");

        let (table, hidden) = table(&profile(), &context(), &supported, Lacks::Hide).unwrap();
        assert_eq!(hidden, ["xsave", "smep", "smap"]);
        let leaf7 = table
            .as_slice()
            .iter()
            .find(|entry| entry.function == 7)
            .unwrap();
        assert_eq!(leaf7.ebx & (1 << 7 | 1 << 20), 0);
        assert!(table.as_slice().iter().all(|entry| entry.function != 0xd));
    }
}
