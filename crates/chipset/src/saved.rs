//! What the saved states of the devices have in common.
//!
//! Every device has its state's type in a module `saved` of its own. Saving takes the device apart by
//! name, so that a new field does not compile until someone decides whether it is state; what is not
//! is a constant of the device, or follows from the rest. Restoring builds a device, and refuses what
//! no device can hold: a state may come from anybody.

use crate::ticks::NS_PER_SECOND;

/// The latest VM time that a machine can be restored at: 73 years, nanoseconds. Sums of two times stay
/// far from overflow, and so does a machine that goes on from there.
pub const LATEST: u64 = 1 << 61;

/// A saved state that no device can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// A register, counter or time has a value that it never takes.
    #[error("{device}: {what} is {value:#x}, which it never is")]
    Value {
        /// The device.
        device: &'static str,
        /// The register, counter or time.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A queue or table does not have the length it can have.
    #[error("{device}: {what} has {length} entries, and {expected}")]
    Length {
        /// The device.
        device: &'static str,
        /// The queue or table.
        what: &'static str,
        /// Entries it has.
        length: usize,
        /// What it can have.
        expected: &'static str,
    },
}

/// Checks one device's values.
#[derive(Clone, Copy)]
pub(crate) struct Check(pub(crate) &'static str);

impl Check {
    pub(crate) fn that(
        self,
        valid: bool,
        what: &'static str,
        value: impl Into<u64>,
    ) -> Result<(), StateError> {
        if valid {
            Ok(())
        } else {
            Err(StateError::Value {
                device: self.0,
                what,
                value: value.into(),
            })
        }
    }

    /// The value has no bits but those of `mask`.
    pub(crate) fn bits(
        self,
        what: &'static str,
        value: impl Into<u64>,
        mask: impl Into<u64>,
    ) -> Result<(), StateError> {
        let value = value.into();
        self.that(value & !mask.into() == 0, what, value)
    }

    /// The value is at most `limit`.
    pub(crate) fn at_most(
        self,
        what: &'static str,
        value: u64,
        limit: u64,
    ) -> Result<(), StateError> {
        self.that(value <= limit, what, value)
    }

    /// VM time can be this.
    pub(crate) fn time(self, what: &'static str, now: u64) -> Result<(), StateError> {
        self.at_most(what, now, LATEST)
    }

    pub(crate) fn length(
        self,
        what: &'static str,
        length: usize,
        limit: usize,
        expected: &'static str,
    ) -> Result<(), StateError> {
        if length <= limit {
            Ok(())
        } else {
            Err(StateError::Length {
                device: self.0,
                what,
                length,
                expected,
            })
        }
    }
}

/// Seconds between 1970 and the years that a clock of four digits can show, with room to spare.
pub(crate) const MOST_SECONDS: i64 = 1 << 45;

const _: () = assert!((LATEST / NS_PER_SECOND) < MOST_SECONDS as u64);
