//! Which engines there are, which of them can run here, and which is taken.

use std::sync::Arc;

use trapgate_engine::probe::{EngineKind, Host};
use trapgate_engine::{Vcpu, World};
use trapgate_interp::Interpreter;
use trapgate_memory::GuestMemory;
use trapgate_x86::CpuProfile;

use crate::{EngineChoice, MachineError};

/// An engine, and whether it can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineReport {
    /// Which engine.
    pub kind: EngineKind,
    /// What speaks for it, or why it cannot be used.
    pub usable: Result<String, String>,
}

/// The engine that was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Which engine.
    pub kind: EngineKind,
    /// Why, for one line of print.
    pub reason: String,
}

/// Every engine, the fastest first, with whether it can be used on `host`.
pub fn engines(host: &Host) -> Vec<EngineReport> {
    EngineKind::ALL
        .into_iter()
        .map(|kind| EngineReport {
            kind,
            usable: usable(kind, host),
        })
        .collect()
}

fn usable(kind: EngineKind, host: &Host) -> Result<String, String> {
    match kind {
        EngineKind::Kvm => Err(format!("not in this version ({})", host.kvm)),
        EngineKind::Jit => trapgate_jit::usable().map_err(|error| error.to_string()),
        EngineKind::Interp => Ok("runs on every x86-64 Linux host".to_owned()),
    }
}

/// Makes processor `index` of `count`, the last two arguments.
pub(crate) type Constructor =
    fn(Arc<GuestMemory>, Box<dyn World>, CpuProfile, u32, u32) -> Box<dyn Vcpu>;

/// How processors of an engine are made; `None` for those that are not in this version.
fn constructor(kind: EngineKind) -> Option<Constructor> {
    match kind {
        EngineKind::Kvm => None,
        EngineKind::Jit => Some(|memory, world, profile, index, count| {
            Box::new(trapgate_jit::Translating::new(memory, world, profile, index, count).unwrap())
        }),
        EngineKind::Interp => Some(|memory, world, profile, index, count| {
            Box::new(Interpreter::new(memory, world, profile, index, count))
        }),
    }
}

/// As [`choose`], with the way to make processors of what was chosen.
pub(crate) fn take(
    choice: EngineChoice,
    host: &Host,
) -> Result<(Choice, Constructor), MachineError> {
    let choice = choose(choice, host)?;
    match constructor(choice.kind) {
        Some(make) => Ok((choice, make)),
        None => Err(MachineError::Engine {
            engine: choice.kind,
            reason: "not in this version".to_owned(),
        }),
    }
}

/// Takes an engine. Of its own accord never a paravirtual KVM, which is orders of magnitude slower for
/// unmodified kernels.
///
/// # Errors
/// [`MachineError::Engine`] if the one that was asked for cannot be used.
pub fn choose(choice: EngineChoice, host: &Host) -> Result<Choice, MachineError> {
    match choice {
        EngineChoice::Only(engine) => match usable(engine, host) {
            Ok(_) => Ok(Choice {
                kind: engine,
                reason: "asked for".to_owned(),
            }),
            Err(reason) => Err(MachineError::Engine { engine, reason }),
        },
        EngineChoice::Auto => Ok(Choice {
            kind: EngineKind::Interp,
            reason: "the only one in this version".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn automatic_choice_is_usable_and_says_why() {
        let host = Host::probe();
        let choice = choose(EngineChoice::Auto, &host).unwrap();
        let report = engines(&host)
            .into_iter()
            .find(|report| report.kind == choice.kind)
            .unwrap();
        assert!(report.usable.is_ok());
        assert!(!choice.reason.is_empty());
    }

    #[test]
    fn engine_that_cannot_be_used_is_refused_by_name() {
        let host = Host::probe();
        let error = choose(EngineChoice::Only(EngineKind::Kvm), &host).unwrap_err();
        assert!(error.to_string().contains("`kvm`"), "{error}");
        assert!(error.fix().is_some());
    }
}
