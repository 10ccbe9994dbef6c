//! Why there is no KVM machine.

use std::io;

/// Why KVM cannot be used for a machine.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device does not open.
    #[error("/dev/kvm does not open")]
    Open(#[source] io::Error),
    /// Another ABI than that of the last fifteen years.
    #[error("/dev/kvm speaks version {version} of its interface; version 12 is needed")]
    Version {
        /// What it says.
        version: i32,
    },
    /// The host's kernel is too old, or its KVM lacks something that cannot be done without.
    #[error("this KVM lacks {what}")]
    Lacks {
        /// What it lacks.
        what: &'static str,
    },
    /// The CPU, or KVM, cannot give guests what their CPU profile promises.
    #[error("this KVM cannot give guests the CPU profile {profile}: it lacks {}", features.join(", "))]
    Profile {
        /// Name of the profile.
        profile: &'static str,
        /// Names of the features.
        features: Vec<&'static str>,
    },
    /// The guest's TSC cannot run at another speed than the host's.
    #[error("this KVM runs the guest's TSC at {host_hz} Hz and cannot scale it to {hz} Hz")]
    TscRate {
        /// What the profile says.
        hz: u64,
        /// What there is.
        host_hz: u64,
    },
    /// The guest's TSC would go back.
    #[error(
        "this KVM gives guests the host's TSC, and this guest's is up to {seconds} s ahead of it: it would go back"
    )]
    TscAhead {
        /// By how much, rounded up.
        seconds: u64,
    },
    /// A call failed.
    #[error("KVM refused {call}")]
    Call {
        /// Which one, by its name in the kernel's documentation.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Gives a failed call its name.
pub(crate) fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError::Call {
        call,
        source: io::Error::from_raw_os_error(error.errno()),
    }
}

/// As [`call`], for those of [`crate::calls`].
pub(crate) fn named(call: &'static str) -> impl FnOnce(io::Error) -> KvmError {
    move |source| KvmError::Call { call, source }
}
