//! Which engines there are, which of them can run here, and which is taken.

use std::cell::OnceCell;
use std::error::Error;
use std::sync::Arc;

use trapgate_engine::probe::{EngineKind, Host};
use trapgate_engine::{Observe, Vcpu, World};
use trapgate_interp::Interpreter;
use trapgate_jit::{Lockstep, Translating};
use trapgate_kvm::{Facts, InKernel, KvmError, KvmMachine, Lacks};
use trapgate_memory::GuestMemory;
use trapgate_x86::CpuProfile;
use trapgate_x86::profile::Level;

use crate::controllers::Controllers;
use crate::doorbells::Ringer;
use crate::{EngineChoice, MachineConfig, MachineError};

/// An engine, and whether it can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineReport {
    /// Which engine.
    pub kind: EngineKind,
    /// What speaks for it, or why it cannot be used.
    pub usable: Result<String, String>,
    /// Devices, and ways to and from devices, that the host's kernel has for machines on this engine.
    pub in_kernel: Vec<&'static str>,
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
            usable: usable(kind, host.level(), host),
            in_kernel: match kind {
                EngineKind::Kvm => Facts::probe()
                    .map(|facts| in_kernel(host, facts.in_kernel()).names())
                    .unwrap_or_default(),
                _ => Vec::new(),
            },
        })
        .collect()
}

/// What speaks for an engine, or why it cannot be used for processors of this level.
fn usable(kind: EngineKind, level: Level, host: &Host) -> Result<String, String> {
    match kind {
        EngineKind::Kvm => usable_kvm(level, host),
        EngineKind::Jit => trapgate_jit::usable().map_err(|error| one_line(&error)),
        EngineKind::Interp => Ok("runs on every x86-64 Linux host".to_owned()),
        EngineKind::Lockstep => trapgate_jit::usable()
            .map(|_| "checks the translator against the interpreter; by name only".to_owned())
            .map_err(|error| one_line(&error)),
    }
}

fn usable_kvm(level: Level, host: &Host) -> Result<String, String> {
    if !host.kvm.opens() {
        return Err(host.kvm.to_string());
    }
    let facts = Facts::probe().map_err(|error| one_line(&error))?;
    let profile = CpuProfile::new(level, facts.tsc_hz);
    match (facts.check_profile(&profile), host.kvm.is_hardware()) {
        (Ok(()), true) => Ok(host.kvm.to_string()),
        (Err(error), true) => Err(one_line(&error)),
        (Ok(()), false) => Ok(format!("{}; by name only", host.kvm)),
        (Err(KvmError::Profile { profile, features }), false) => Ok(format!(
            "{}; by name only, and guests lack {} of the features of {profile}",
            host.kvm,
            features.len(),
        )),
        (Err(error), false) => Err(one_line(&error)),
    }
}

/// An error and its causes.
fn one_line(error: &dyn Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {}", one_line(cause)),
        None => error.to_string(),
    }
}

/// Makes the processors of one machine.
pub(crate) trait Constructor {
    /// Processor `index` of `count`, the last two arguments. All calls have the same memory, profile
    /// and count.
    fn vcpu(
        &self,
        memory: Arc<GuestMemory>,
        world: Box<dyn World>,
        profile: CpuProfile,
        index: u32,
        count: u32,
    ) -> Result<Box<dyn Vcpu>, MachineError>;

    /// Interrupt controllers that the engine has of its own. Asked for when all processors are made.
    fn controllers(&self) -> Option<Arc<dyn Controllers>> {
        None
    }

    /// The engine's way to make doorbells ring without leaving the guest. Asked for when all processors are made.
    fn ringer(&self) -> Option<Arc<dyn Ringer>> {
        None
    }
}

/// Makes processors by a function, with the arguments of [`Constructor::vcpu`].
pub(crate) struct By<F>(pub(crate) F);

impl<F> Constructor for By<F>
where
    F: Fn(
        Arc<GuestMemory>,
        Box<dyn World>,
        CpuProfile,
        u32,
        u32,
    ) -> Result<Box<dyn Vcpu>, MachineError>,
{
    fn vcpu(
        &self,
        memory: Arc<GuestMemory>,
        world: Box<dyn World>,
        profile: CpuProfile,
        index: u32,
        count: u32,
    ) -> Result<Box<dyn Vcpu>, MachineError> {
        self.0(memory, world, profile, index, count)
    }
}

/// Makes processors of KVM.
pub(crate) struct OnKvm {
    lacks: Lacks,
    in_kernel: InKernel,
    /// Made with the first processor.
    machine: OnceCell<Arc<KvmMachine>>,
}

impl OnKvm {
    /// In a machine of which the kernel does what it can of `in_kernel`.
    pub(crate) fn new(host: &Host, in_kernel: InKernel) -> Self {
        Self {
            lacks: if host.kvm.is_hardware() {
                Lacks::Refuse
            } else {
                Lacks::Hide
            },
            in_kernel,
            machine: OnceCell::new(),
        }
    }

    /// The machine, once there is one.
    #[cfg(test)]
    pub(crate) fn machine(&self) -> Option<&KvmMachine> {
        self.machine.get().map(Arc::as_ref)
    }
}

impl Constructor for OnKvm {
    fn vcpu(
        &self,
        memory: Arc<GuestMemory>,
        world: Box<dyn World>,
        profile: CpuProfile,
        index: u32,
        count: u32,
    ) -> Result<Box<dyn Vcpu>, MachineError> {
        let machine = match self.machine.get() {
            Some(machine) => machine,
            None => {
                let machine = KvmMachine::new(memory, profile, count, self.lacks, self.in_kernel)?;
                self.machine.get_or_init(|| machine)
            }
        };
        Ok(Box::new(machine.vcpu(world, index)?))
    }

    fn controllers(&self) -> Option<Arc<dyn Controllers>> {
        let machine = self.machine.get()?;
        machine
            .has_controllers()
            .then(|| Arc::clone(machine) as Arc<dyn Controllers>)
    }

    fn ringer(&self) -> Option<Arc<dyn Ringer>> {
        let machine = self.machine.get()?;
        let can = machine.in_kernel().ioeventfd;
        can.then(|| Arc::clone(machine) as Arc<dyn Ringer>)
    }
}

/// What a kernel that can do `able` is to do for machines.
fn in_kernel(host: &Host, able: InKernel) -> InKernel {
    if host.kvm.is_hardware() {
        return able;
    }
    // The chipset's controllers are slower and exact. Where guests are slow anyhow, exact is better: the local
    // APIC of a paravirtual KVM shows nothing in service. Doorbells are exact everywhere.
    let exact = InKernel {
        ioeventfd: true,
        ..InKernel::NOTHING
    };
    able.and(exact)
}

/// How processors of an engine are made.
fn constructor(
    kind: EngineKind,
    host: &Host,
    observe: Observe,
) -> Result<Box<dyn Constructor>, MachineError> {
    Ok(match kind {
        EngineKind::Kvm => Box::new(OnKvm::new(host, in_kernel(host, InKernel::ALL))),
        EngineKind::Jit => Box::new(By(move |memory, world, profile, index, count| {
            let vcpu = Translating::observed(memory, world, profile, index, count, observe)?;
            Ok(Box::new(vcpu) as Box<dyn Vcpu>)
        })),
        EngineKind::Interp => Box::new(By(|memory, world, profile, index, count| {
            let vcpu = Interpreter::new(memory, world, profile, index, count);
            Ok(Box::new(vcpu) as Box<dyn Vcpu>)
        })),
        EngineKind::Lockstep => Box::new(By(|memory, world, profile, index, count| {
            let vcpu = Lockstep::new(memory, world, profile, index, count)?;
            Ok(Box::new(vcpu) as Box<dyn Vcpu>)
        })),
    })
}

/// As [`choose`], with the way to make processors of what was chosen.
pub(crate) fn take(
    config: &MachineConfig,
    host: &Host,
) -> Result<(Choice, Box<dyn Constructor>), MachineError> {
    let choice = choose(config.engine, config.level, host)?;
    let make = constructor(choice.kind, host, config.observe)?;
    Ok((choice, make))
}

/// As [`take`], for a machine whose TSC has run at a frequency already: an engine that cannot have it is
/// not taken by itself, and refused by name.
pub(crate) fn take_saved(
    config: &MachineConfig,
    host: &Host,
) -> Result<(Choice, Box<dyn Constructor>), MachineError> {
    let taken = take(config, host)?;
    let kind = taken.0.kind;
    let hz = tsc_hz(kind, config.tsc_hz)?;
    if hz == config.tsc_hz {
        return Ok(taken);
    }
    let reason = format!(
        "its time-stamp counter runs at {hz} Hz, and the saved machine's at {}",
        config.tsc_hz
    );
    if config.engine != EngineChoice::Auto {
        return Err(MachineError::Engine {
            engine: kind,
            reason,
        });
    }
    let kind = match usable(EngineKind::Jit, config.level, host) {
        Ok(_) => EngineKind::Jit,
        Err(_) => EngineKind::Interp,
    };
    let by_name = MachineConfig {
        engine: EngineChoice::Only(kind),
        ..config.clone()
    };
    let (_, make) = take(&by_name, host)?;
    let reason = format!("not {}: {reason}", taken.0.kind);
    Ok((Choice { kind, reason }, make))
}

/// The frequency that the TSC of a new machine has on an engine, where `wanted` is what was asked for: the
/// hardware may not be able to scale its own.
pub(crate) fn tsc_hz(kind: EngineKind, wanted: u64) -> Result<u64, MachineError> {
    match kind {
        EngineKind::Kvm => Ok(Facts::probe()?.nearest_tsc_hz(wanted)),
        EngineKind::Jit | EngineKind::Interp | EngineKind::Lockstep => Ok(wanted),
    }
}

/// Takes an engine. Of its own accord never a paravirtual KVM, which is orders of magnitude slower for
/// unmodified kernels.
///
/// # Errors
/// [`MachineError::Engine`] if the one that was asked for cannot be used, [`MachineError::Level`] if the host's
/// processor is less than what the guest's is to be.
pub fn choose(choice: EngineChoice, level: Level, host: &Host) -> Result<Choice, MachineError> {
    let lacks = host.lacks(level);
    if !lacks.is_empty() {
        return Err(MachineError::Level { level, lacks });
    }
    match choice {
        EngineChoice::Only(engine) => match usable(engine, level, host) {
            Ok(_) => Ok(Choice {
                kind: engine,
                reason: "asked for".to_owned(),
            }),
            Err(reason) => Err(MachineError::Engine { engine, reason }),
        },
        EngineChoice::Auto => Ok(automatic(
            usable(EngineKind::Kvm, level, host),
            host,
            usable(EngineKind::Jit, level, host).is_ok(),
        )),
    }
}

fn automatic(kvm: Result<String, String>, host: &Host, jit: bool) -> Choice {
    let reason = match kvm {
        Ok(reason) if host.kvm.is_hardware() => {
            return Choice {
                kind: EngineKind::Kvm,
                reason,
            };
        }
        // What speaks for it by name is longer than what this is about.
        Ok(_) => host.kvm.to_string(),
        Err(reason) => reason,
    };
    Choice {
        kind: if jit {
            EngineKind::Jit
        } else {
            EngineKind::Interp
        },
        reason,
    }
}

#[cfg(test)]
mod tests {
    use trapgate_engine::probe::{Hardware, Kvm};

    use super::*;

    #[test]
    fn automatic_choice_is_usable_and_says_why() {
        let host = Host::probe();
        let choice = choose(EngineChoice::Auto, Level::V2, &host).unwrap();
        let report = engines(&host)
            .into_iter()
            .find(|report| report.kind == choice.kind)
            .unwrap();
        assert!(report.usable.is_ok());
        assert!(!choice.reason.is_empty());
    }

    #[test]
    fn engine_that_cannot_be_used_is_refused_by_name() {
        let host = host(Kvm::NoDevice { hardware: None });
        let error = choose(EngineChoice::Only(EngineKind::Kvm), Level::V2, &host).unwrap_err();
        assert!(error.to_string().contains("`kvm`"), "{error}");
        assert!(error.fix().is_some());
    }

    fn host(kvm: Kvm) -> Host {
        Host {
            kvm,
            ..Host::probe()
        }
    }

    #[test]
    fn hardware_is_taken_and_nothing_else_of_kvm_by_itself() {
        let works = || Ok("works".to_owned());
        let hardware = host(Kvm::Hardware(Hardware::Vmx));
        let choice = automatic(works(), &hardware, false);
        assert_eq!((choice.kind, &*choice.reason), (EngineKind::Kvm, "works"));

        let paravirtual = host(Kvm::Paravirtual);
        let choice = automatic(works(), &paravirtual, false);
        assert_eq!(choice.kind, EngineKind::Interp);
        assert!(choice.reason.contains("paravirtual"), "{}", choice.reason);

        // Hardware that lacks something of the profile.
        let choice = automatic(Err("it lacks smap".to_owned()), &hardware, true);
        assert_eq!(
            (choice.kind, &*choice.reason),
            (EngineKind::Jit, "it lacks smap")
        );
    }

    #[test]
    fn where_kvm_has_no_hardware_the_translator_is_taken() {
        for kvm in [
            Kvm::NoDevice { hardware: None },
            Kvm::NoPermission { hardware: None },
            Kvm::Paravirtual,
        ] {
            let host = host(kvm);
            let choice = choose(EngineChoice::Auto, host.level(), &host).unwrap();
            assert_eq!(choice.kind, EngineKind::Jit, "{}", choice.reason);
            // One line says why it is not KVM.
            assert!(
                choice.reason.to_lowercase().contains("kvm") && !choice.reason.contains('\n'),
                "{}",
                choice.reason
            );
        }
    }

    #[test]
    fn kvm_that_does_not_open_says_why() {
        for (kvm, says) in [
            (Kvm::NoDevice { hardware: None }, "no /dev/kvm"),
            (Kvm::NoPermission { hardware: None }, "permission"),
        ] {
            let error = usable(EngineKind::Kvm, Level::V2, &host(kvm)).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
