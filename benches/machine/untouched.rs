//! What RAM costs that the guest has not touched.

use std::sync::mpsc::channel;
use std::time::Duration;

use trapgate_vmm::{EngineChoice, EngineKind, Hooks, Machine, MachineConfig};

use crate::Failure;
use crate::child::{Values, run_all};
use crate::figure::Report;
use crate::footprint::{Footprint, mib};

/// The child that runs the built-in guest.
pub(crate) const CHILD: &str = "untouched";

/// Much more than the built-in guest uses.
const MEMORY: u64 = 4 << 30;

/// How long the guest may take to say hello.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn measure(report: &mut Report) -> Result<(), Failure> {
    for (name, runs) in run_all(CHILD, 1)? {
        report.add(name.replace('_', " "), "MiB", &runs);
    }
    Ok(())
}

/// Runs the built-in guest until it has said hello.
pub(crate) fn child() -> Result<Values, Failure> {
    let (said, hears) = channel();
    let hooks = Hooks {
        serial: Box::new(move |bytes| {
            let _ = said.send(bytes.to_vec());
        }),
        ..Hooks::default()
    };
    let config = MachineConfig {
        memory_bytes: MEMORY,
        kernel: trapgate_guests::BUILTIN.into(),
        engine: EngineChoice::Only(EngineKind::Interp),
        ..MachineConfig::default()
    };
    let _machine = Machine::start(config, hooks)?;
    hears
        .recv_timeout(LIMIT)
        .map_err(|_| "the built-in guest said nothing")?;
    let footprint = Footprint::now()?;
    Ok(Values::from([
        ("4_GiB_guest:_guest_RAM".to_owned(), mib(footprint.guest)),
        ("4_GiB_guest:_VMM".to_owned(), mib(footprint.vmm)),
    ]))
}
