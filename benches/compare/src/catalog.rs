//! Which workloads there are; `workloads/main.rs` has what they do.

use serde::Serialize;

/// What a workload mostly does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// It computes in user mode.
    Compute,
    /// It makes system calls, page faults, processes or context switches.
    System,
}

impl Kind {
    /// In one word.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::System => "system",
        }
    }
}

/// A workload, as it is known before it runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// How `--only` and the results call it.
    pub(crate) name: &'static str,
    /// What it mostly does.
    pub(crate) kind: Kind,
    /// What it does, for a list.
    pub(crate) what: &'static str,
}

const fn compute(name: &'static str, what: &'static str) -> Entry {
    Entry {
        name,
        kind: Kind::Compute,
        what,
    }
}

const fn system(name: &'static str, what: &'static str) -> Entry {
    Entry {
        name,
        kind: Kind::System,
        what,
    }
}

/// All workloads, in the order in which they run.
pub(crate) const CATALOG: &[Entry] = &[
    compute("shell", "a loop of a shell's builtins"),
    compute("sha256", "SHA-256 of 64 MiB, in integer code"),
    compute("sort", "sorts 2 million integers"),
    compute("crc", "CRC-32 of 64 MiB, byte by byte"),
    compute("chase-l1", "follows pointers within 16 KiB"),
    compute("chase-dram", "follows pointers within 256 MiB"),
    compute("bytecode", "an interpreter of bytecode"),
    compute("virtual", "virtual calls on objects of eight types"),
    compute("double", "five bodies that attract each other"),
    compute("avx2", "bits and matrices, with AVX2 and FMA"),
    compute("copy", "memset and memcpy, 1 KiB to 1 MiB"),
    compute("gzip", "gzip of a tree's archive of 4 MiB"),
    system("fork-exec", "a shell starts 500 programs"),
    system("pipeline", "a pipeline of seven programs"),
    system("dd", "dd with bs=1: two system calls a byte"),
    system("faults", "touches fresh pages"),
    system("ping-pong", "two processes and two pipes"),
    system("mmap", "mmap and munmap of 128 KiB"),
    system("tar", "tar and untar of a tree"),
];
