//! Snapshots: a machine's state as a directory, taken while it runs, and machines that go on from one.
//!
//! # Format
//! | part | what it is |
//! | --- | --- |
//! | `snapshot.json` | the [`Header`]: format version, CPU profile with its version, memory size, engine, and the list of all other parts with their lengths and checksums. Can be read on its own |
//! | `machine.json` | the machine's configuration, for people to edit: paths of disks, what a reset does |
//! | `memory` | guest RAM, sparse: the ranges one behind the other, pages of zeros as holes |
//! | `memory.json` | which chunks of `memory` have something in them, with a checksum of each |
//! | `state/*.json` | one section for each processor and device, and one for the clock: `{"version": …, "state": …}` |
//! | `boot/*` | kernel, initial RAM disks and modules, which a guest that resets the machine needs again |
//!
//! The kernel and its files are copied rather than named: they come from a cache that is cleaned, and may
//! have been made for one session; and a snapshot is to be complete but for its disks. They are read
//! only if the guest resets the machine.
//!
//! Checksums are CRC-32, as `gzip` has it: they find what a disk or a copy damages. A snapshot that
//! somebody has changed on purpose is not to be trusted with more than a guest is, and gets no more:
//! every value is checked by whoever takes it. The configuration has no checksum, since it may be
//! edited; what must not change in it stands in the header too.
//!
//! A stream (migration) would carry the same parts in the order of the table, memory last.
//!
//! # Versions
//! A program goes on from snapshots of its own versions, and refuses all others by the number that is different:
//! [`FORMAT_VERSION`], each section's, [`PROFILE_VERSION`]. Whatever changes what a snapshot says or what its guest
//! sees raises one of them. `tests/golden_snapshot.rs` holds a snapshot that must go on, and others that must be refused.
//!
//! # Taking one
//! Files that do not change are written first, then the machine stands still while its state is
//! collected and its memory copied to the host's page cache, and goes on while that is brought to the
//! disk. All happens in a temporary directory beside the one to be, which is renamed when everything
//! is on the disk.
//!
//! # Going on from one
//! Nothing of the memory is read: it is mapped, and what the guest writes stays with the process. So
//! any number of machines may go on from one snapshot, whose files must stay as they are for as long.
//! VM time goes on where it stood. The time in between does not exist for the guest: its clocks never go
//! back, and its time of day is late by as much, until it looks at the real-time clock, which has gone on, or is
//! told (NTP).
//!
//! Disks are not in a snapshot. They are expected where they were, with what they held then; a disk
//! that has been written to since is told of ([`Snapshot::warnings`]).

mod config;
mod error;
mod header;
mod parts;
mod restore;
mod save;
mod state;

#[cfg(test)]
mod tests;

pub use error::SnapshotError;
pub use header::{FORMAT_VERSION, Header, PROFILE_VERSION, Part, Profile};
pub(crate) use parts::SavedFile;
pub(crate) use restore::Materials;
pub use restore::Snapshot;
pub use save::SnapshotReport;
pub(crate) use save::Source;
pub(crate) use state::MachineState;
