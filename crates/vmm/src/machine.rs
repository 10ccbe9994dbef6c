//! The machine as its owner sees it.

use std::time::Duration;

use trapgate_boot::Protocol;
use trapgate_virtio::{ConsoleHandle, PortOutput};
use trapgate_x86::CpuState;

use crate::{Choice, Counters, MachineConfig, MachineError, Outcome, SerialHandle};

/// A named port of the virtio console (under Linux `/sys/class/virtio-ports/*/name`).
pub struct Port {
    /// Its name.
    pub name: String,
    /// Where the guest's output goes.
    pub output: Box<dyn PortOutput>,
}

/// Where the guest's output goes.
pub struct Hooks {
    /// Takes what the guest writes to COM1. Called on a thread of its own, and may wait.
    pub serial: Box<dyn FnMut(&[u8]) + Send>,
    /// Takes what the guest writes to its terminal, `/dev/hvc0`; without it there is no terminal.
    pub terminal: Option<Box<dyn PortOutput>>,
    /// Named ports.
    pub ports: Vec<Port>,
}

impl Default for Hooks {
    /// Everything is dropped; there is neither terminal nor port.
    fn default() -> Self {
        Self {
            serial: Box::new(|_| {}),
            terminal: None,
            ports: Vec::new(),
        }
    }
}

/// The host's side of a terminal or port.
#[derive(Clone)]
pub struct PortHandle {
    console: ConsoleHandle,
    port: usize,
}

impl PortHandle {
    /// Gives input to the guest; tells how many bytes of it were accepted. The guest gets them when it
    /// has the port open.
    pub fn input(&self, data: &[u8]) -> usize {
        self.console.input(self.port, data)
    }

    /// Gives all of `data` to the guest, and waits as often as need be; `false` if the port was closed,
    /// or the machine ended, before.
    pub fn input_all(&self, data: &[u8]) -> bool {
        self.console.input_all(self.port, data)
    }

    /// There will be no more input; the guest sees the end once it has read what there is (not on a
    /// terminal, which has no end).
    pub fn close_input(&self) {
        self.console.close_input(self.port);
    }

    /// Tells the guest the size of the terminal, in characters.
    pub fn resize(&self, columns: u16, rows: u16) {
        self.console.resize(columns, rows);
    }
}

/// A running machine. Dropping it stops it.
pub struct Machine {}

/// What other threads, such as a signal handler's, can do with a machine. It may outlive the machine
/// and then does nothing.
#[derive(Clone)]
pub struct MachineHandle {}

impl MachineHandle {
    /// Stops the machine as if its power cord were pulled; [`Machine::wait`] gives [`Outcome::Stopped`].
    pub fn stop(&self) {
        todo!()
    }

    /// Presses the ACPI power button, which asks the guest to shut down.
    pub fn power_button(&self) {
        todo!()
    }
}

impl Machine {
    /// Builds a machine and lets it run.
    ///
    /// # Errors
    /// Any [`MachineError`]; [`MachineError::fix`] says what to do about it.
    pub fn start(_config: MachineConfig, _hooks: Hooks) -> Result<Self, MachineError> {
        todo!()
    }

    /// Waits until the machine has ended and everything that the guest wrote until then has been given
    /// to the hooks (or their owners have not taken it for two seconds). Once ended it gives the same
    /// answer again.
    pub fn wait(&self) -> &Outcome {
        todo!()
    }

    /// Like [`Self::wait`] for at most `limit`; `None` if the machine then still runs.
    pub fn wait_for(&self, _limit: Duration) -> Option<&Outcome> {
        todo!()
    }

    /// A handle for other threads.
    pub fn handle(&self) -> MachineHandle {
        todo!()
    }

    /// Stops the machine as if its power cord were pulled; [`Self::wait`] gives [`Outcome::Stopped`].
    pub fn stop(&self) {
        todo!()
    }

    /// Presses the ACPI power button, which asks the guest to shut down.
    pub fn power_button(&self) {
        todo!()
    }

    /// Stands the machine still, its clock too, until the guard is dropped.
    pub fn pause(&self) -> Pause<'_> {
        todo!()
    }

    /// The engine, and why it was taken.
    pub fn engine(&self) -> &Choice {
        todo!()
    }

    /// The way into the kernel that was taken.
    pub fn protocol(&self) -> Protocol {
        todo!()
    }

    /// What the kernel calls itself, if it says so where it can be found without running it.
    pub fn kernel_version(&self) -> Option<&str> {
        todo!()
    }

    /// The terminal, if [`Hooks::terminal`] was given.
    pub fn terminal(&self) -> Option<PortHandle> {
        todo!()
    }

    /// The port of this name.
    pub fn port(&self, _name: &str) -> Option<PortHandle> {
        todo!()
    }

    /// COM1's input.
    pub fn serial(&self) -> SerialHandle {
        todo!()
    }

    /// What it did until now.
    pub fn counters(&self) -> Counters {
        todo!()
    }
}

/// The machine stands still as long as this lives. Several may; the last one to go lets it run.
pub struct Pause<'a> {
    _machine: &'a Machine,
}

impl Pause<'_> {
    /// The state of each processor.
    pub fn processors(&self) -> Vec<CpuState> {
        todo!()
    }

    /// What the machine did until now, exactly.
    pub fn counters(&self) -> Counters {
        todo!()
    }
}
