//! An engine whose guests are closures.

use std::sync::Arc;

use trapgate_engine::probe::EngineKind;
use trapgate_engine::{Exit, Signal, Signals, StateError, Vcpu, World};
use trapgate_memory::GuestMemory;
use trapgate_x86::{Activity, CpuState};

use crate::engines::{By, Constructor};
use crate::{Choice, Content, Hooks, Machine, MachineConfig, Snapshot};

/// What a scripted guest sees of its processor, and does.
pub(crate) struct Guest {
    pub(crate) world: Box<dyn World>,
    pub(crate) memory: Arc<GuestMemory>,
    pub(crate) signals: Arc<Signals>,
    pub(crate) state: CpuState,
    /// Times that the processor was let run in the running state, from 1.
    pub(crate) runs: u64,
}

impl Guest {
    pub(crate) fn out(&mut self, port: u16, value: u8) {
        self.world.write_port(port, 1, value.into());
    }

    /// Ends the machine by the debug-exit port, which makes `status` of `value << 1 | 1`.
    pub(crate) fn exit(&mut self, value: u32) -> Exit {
        self.world.write_port(0xf4, 4, value);
        Exit::Halted
    }

    /// ACPI S5.
    pub(crate) fn power_off(&mut self) -> Exit {
        self.world.write_port(0x604, 2, 5 << 10 | 1 << 13);
        Exit::Halted
    }

    /// Writes a register of the local APIC at its usual place.
    pub(crate) fn apic(&mut self, register: u64, value: u32) {
        self.world
            .write_memory(0xfee0_0000 + register, &value.to_le_bytes());
    }

    /// Executes nothing, at full speed, until it is kicked.
    pub(crate) fn spin(&mut self) -> Exit {
        while !self.signals.take(Signal::Kick) {
            std::thread::yield_now();
        }
        Exit::Kicked
    }
}

/// A guest program: called whenever its processor is let run and is not waiting to be started.
pub(crate) type Script = Box<dyn FnMut(&mut Guest) -> Exit + Send>;

struct Scripted {
    guest: Guest,
    script: Script,
}

impl Vcpu for Scripted {
    fn run(&mut self) -> Exit {
        self.guest.signals.take(Signal::Flush);
        if self.guest.signals.take(Signal::Kick) {
            return Exit::Kicked;
        }
        if self.guest.state.system.activity != Activity::Running {
            self.guest.signals.take(Signal::Interrupt);
            return Exit::Halted;
        }
        self.guest.runs += 1;
        (self.script)(&mut self.guest)
    }

    fn step(&mut self) -> Exit {
        self.run()
    }

    fn state(&mut self) -> CpuState {
        self.guest.state.clone()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), StateError> {
        self.guest.state = state.clone();
        Ok(())
    }

    fn signals(&self) -> Arc<Signals> {
        Arc::clone(&self.guest.signals)
    }

    fn instructions(&self) -> u64 {
        self.guest.runs
    }
}

/// A machine with a processor for each script, and a real kernel in its memory.
pub(crate) fn machine(
    scripts: Vec<Script>,
    hooks: Hooks,
    change: impl FnOnce(&mut MachineConfig),
) -> Machine {
    let mut config = MachineConfig {
        cpus: scripts.len() as u32,
        memory_bytes: 16 << 20,
        kernel: Content::from(trapgate_guests::BUILTIN),
        ..MachineConfig::default()
    };
    change(&mut config);
    Machine::start_on(config, hooks, choice(), &scripted(scripts)).unwrap()
}

/// A machine that goes on from a snapshot, with a script for each processor.
pub(crate) fn restored(snapshot: &Snapshot, scripts: Vec<Script>) -> Machine {
    Machine::restore_on(snapshot, Hooks::default(), choice(), &scripted(scripts)).unwrap()
}

fn choice() -> Choice {
    Choice {
        kind: EngineKind::Interp,
        reason: "a test".to_owned(),
    }
}

/// Makes a processor for each script.
fn scripted(scripts: Vec<Script>) -> impl Constructor {
    let scripts: Vec<_> = scripts
        .into_iter()
        .map(|script| std::sync::Mutex::new(Some(script)))
        .collect();
    By(move |memory, world, _, index: u32, _| {
        let script = scripts[index as usize].lock().unwrap().take().unwrap();
        Ok(Box::new(Scripted {
            guest: Guest {
                world,
                memory,
                signals: Arc::default(),
                state: CpuState::default(),
                runs: 0,
            },
            script,
        }) as Box<dyn Vcpu>)
    })
}
