//! The saved state of functions and of their bus.
//!
//! The bus knows nothing of what its functions are, so it passes their states on as JSON values. Each
//! function has a type of its own for its state, which says what kind of function it belongs to and
//! which version of its shape it is.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a function can't be restored to.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// There are more or fewer functions on the bus than were saved.
    #[error("the state is of {saved} PCI functions, and the machine has {present}")]
    Functions {
        /// How many were saved.
        saved: usize,
        /// How many there are.
        present: usize,
    },
    /// The state is another function's.
    #[error("the state is of a `{saved}`, and the machine has a `{present}` in its place")]
    Kind {
        /// What was saved.
        saved: String,
        /// What is there.
        present: &'static str,
    },
    /// The state has another shape.
    #[error("the state of the `{kind}` has version {saved}; this program knows version {known}")]
    Version {
        /// What it is the state of.
        kind: &'static str,
        /// The version that was saved.
        saved: u32,
        /// The version that is known.
        known: u32,
    },
    /// The state is not made of the fields that it should be.
    #[error("the state of the `{kind}` cannot be read: {reason}")]
    Unreadable {
        /// What it is the state of.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A register or a part of it has a value that it never takes.
    #[error("`{kind}`: {what} is {value:#x}, which it never is")]
    Value {
        /// The function.
        kind: &'static str,
        /// The register.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// Something that the function works with is not as it was.
    #[error("`{kind}`: {reason}")]
    Environment {
        /// The function.
        kind: &'static str,
        /// What is different.
        reason: String,
    },
}

impl StateError {
    /// Refuses a value unless it is valid.
    ///
    /// # Errors
    /// [`Self::Value`].
    pub fn check(
        valid: bool,
        kind: &'static str,
        what: &'static str,
        value: impl Into<u64>,
    ) -> Result<(), Self> {
        if valid {
            Ok(())
        } else {
            Err(Self::Value {
                kind,
                what,
                value: value.into(),
            })
        }
    }
}

/// The saved state of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedFunction {
    /// What it is: `virtio-block`, for one.
    pub kind: String,
    /// Version of the shape of its state.
    pub version: u32,
    /// Its state.
    pub state: Value,
}

impl SavedFunction {
    /// A state of plain data: structures, sequences, numbers and text.
    pub fn new(kind: &'static str, version: u32, state: &impl Serialize) -> Self {
        Self {
            kind: kind.to_owned(),
            version,
            // Only maps with keys that are no text, and types that refuse, can't be written.
            state: serde_json::to_value(state).unwrap_or_default(),
        }
    }

    /// The state, if it is of this kind and version.
    ///
    /// # Errors
    /// Another kind, version or shape.
    pub fn read<T: DeserializeOwned>(
        &self,
        kind: &'static str,
        version: u32,
    ) -> Result<T, StateError> {
        let Self {
            kind: saved,
            version: saved_version,
            state,
        } = self;
        if saved != kind {
            return Err(StateError::Kind {
                saved: saved.clone(),
                present: kind,
            });
        }
        if *saved_version != version {
            return Err(StateError::Version {
                kind,
                saved: *saved_version,
                known: version,
            });
        }
        T::deserialize(state).map_err(|error| StateError::Unreadable {
            kind,
            reason: error.to_string(),
        })
    }
}

/// The saved state of a bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BusState {
    /// What was last written to port 0xcf8.
    pub address: u32,
    /// Its functions, by slot.
    pub functions: Vec<SavedFunction>,
}

/// The saved state of a function's configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigSpaceState {
    /// All of its bytes.
    #[serde(with = "hex::serde")]
    pub bytes: [u8; 256],
}

/// The saved state of one MSI-X vector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorState {
    /// Message address; a multiple of 4.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// The mask bit.
    pub masked: bool,
    /// The pending bit.
    pub pending: bool,
}

/// The saved state of an MSI-X table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    /// The vectors.
    pub vectors: Vec<VectorState>,
    /// The capability's control register, as last taken over.
    pub control: u16,
}
