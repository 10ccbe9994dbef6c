//! The console device (virtio 1.2, 5.3): a console, or a set of named ports.
//!
//! A device whose only port is a console does without `VIRTIO_CONSOLE_F_MULTIPORT`: the guest then
//! reads the window's size from the configuration space. With multiport it comes in a message of
//! which Linux before 6.15 swaps columns and rows, so a console with named ports beside it is best
//! made of two devices.

mod input;
mod output;
mod saved;

use std::io;
use std::sync::{Arc, Condvar};
use std::time::{Duration, Instant};

use input::{Input, Port};
pub use output::InHand;
use output::{Host, Output};
pub use saved::{ConsoleState, MessageState, PortState};
use trapgate_pci::StateError;

use crate::worker::{Shared, Worker};
use crate::{Activation, Device, DeviceState, DeviceType, SavedDevice};

/// `VIRTIO_CONSOLE_F_SIZE` and `VIRTIO_CONSOLE_F_MULTIPORT` (virtio 1.2, 5.3.3), as bits.
const FEATURE_SIZE: u64 = 1 << 0;
const FEATURE_MULTIPORT: u64 = 1 << 1;

const DATA_QUEUE: u16 = 128;
const CONTROL_QUEUE: u16 = 32;
/// The control queues' places: after those of the first port.
const CONTROL_IN: usize = 2;
const CONTROL_OUT: usize = 3;

/// Takes what the guest writes to a port. Called on the port's own thread, so it may wait for the
/// host; until it returns the guest can write only as much as its queue holds.
pub trait PortOutput: Send + 'static {
    /// All of `data`, which is not empty. What the host does not take (a closed pipe) is for the
    /// implementation to drop.
    fn write(&mut self, data: &[u8]);

    /// The guest opened or closed the port. Closing comes after all that was written before. A
    /// guest that does both again and again may be told of only some of it, but the order stays.
    fn guest_open(&mut self, _open: bool) {}
}

/// Output that nobody wants.
impl PortOutput for () {
    fn write(&mut self, _data: &[u8]) {}
}

/// A port to be.
pub struct PortConfig {
    /// What the guest sees, under Linux in `/sys/class/virtio-ports/*/name`.
    pub name: String,
    /// Whether the guest is to use it as a terminal (under Linux `/dev/hvc0`).
    pub is_console: bool,
    /// Where output goes.
    pub output: Box<dyn PortOutput>,
}

/// A console device.
pub struct Console {
    queues: Vec<u16>,
    multiport: bool,
    input: Worker<Input>,
    outputs: Vec<Worker<Output>>,
    room: Arc<Condvar>,
}

impl Console {
    /// A device with these ports, and a thread for each; the error is that of starting one.
    ///
    /// # Panics
    /// If there is no port, or more than 31.
    pub fn new(ports: Vec<PortConfig>) -> io::Result<Self> {
        assert!((1..=31).contains(&ports.len()));
        let multiport = ports.len() > 1 || !ports[0].is_console;
        let mut queues = vec![DATA_QUEUE; 2 * ports.len()];
        if multiport {
            queues.splice(2..2, [CONTROL_QUEUE; 2]);
        }
        let mut outputs = Vec::new();
        let mut inputs = Vec::new();
        for (index, port) in ports.into_iter().enumerate() {
            let PortConfig {
                name,
                is_console,
                output,
            } = port;
            let thread = format!("console-out-{index}");
            let worker = Worker::start(&thread, Output::default(), Host::new(output))?;
            inputs.push(Port::new(name, is_console, Arc::clone(worker.shared())));
            outputs.push(worker);
        }
        let room = Arc::new(Condvar::new());
        let input = Input::new(inputs, Arc::clone(&room));
        Ok(Self {
            queues,
            multiport,
            input: Worker::start("console-in", input, ())?,
            outputs,
            room,
        })
    }

    /// The host's side of the device.
    pub fn handle(&self) -> ConsoleHandle {
        let outputs = self
            .outputs
            .iter()
            .map(|output| Arc::clone(output.shared()));
        ConsoleHandle {
            input: Arc::clone(self.input.shared()),
            outputs: outputs.collect(),
            room: Arc::clone(&self.room),
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Handles outlive the device; what they still call must not reach the guest.
        self.input.visit(|input| {
            input.reset();
            input.gone = true;
        });
        for output in &self.outputs {
            output.visit(Output::forget);
        }
        self.room.notify_all();
    }
}

impl Device for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        let multiport = if self.multiport { FEATURE_MULTIPORT } else { 0 };
        FEATURE_SIZE | multiport
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queues
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        // Columns, rows, number of ports.
        let (columns, rows) = self.input.visit(|input| input.size);
        let mut config = [0; 8];
        config[..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4..].copy_from_slice(&(self.outputs.len() as u32).to_le_bytes());
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) {
        self.attach(activation, Input::activate);
        self.input.kick();
        for output in &self.outputs {
            output.kick();
        }
    }

    fn notify(&mut self, queue: u16) {
        let queue = usize::from(queue);
        let port = match queue {
            0 | 1 => 0,
            CONTROL_IN | CONTROL_OUT => usize::MAX,
            _ => queue / 2 - 1,
        };
        match self.outputs.get(port) {
            Some(output) if queue % 2 == 1 => output.kick(),
            _ => self.input.kick(),
        }
    }

    fn reset(&mut self) {
        self.input.visit(Input::reset);
        for output in &self.outputs {
            output.visit(Output::reset);
            output.kick();
        }
    }

    fn pause(&mut self) {
        self.input.visit(|input| input.paused = true);
        self.input.pause();
        for output in &self.outputs {
            output.pause();
        }
    }

    fn resume(&mut self) {
        self.input.visit(|input| input.paused = false);
        self.input.resume();
        for output in &self.outputs {
            output.resume();
        }
    }

    fn save(&mut self) -> SavedDevice {
        self.saved()
    }

    fn restore(
        &mut self,
        state: &DeviceState,
        activation: Option<Activation>,
    ) -> Result<(), StateError> {
        self.pause();
        let DeviceState::Console(state) = state else {
            return Err(state.of_another("console"));
        };
        self.take_state(state, activation)
    }
}

impl Console {
    /// Gives the queues to whom they are for, and then lets `start` have the rest.
    fn attach(&mut self, activation: Activation, start: impl FnOnce(&mut Input, input::Active)) {
        let Activation {
            features,
            memory,
            notifier,
            mut queues,
        } = activation;
        let multiport = features & FEATURE_MULTIPORT != 0;
        let mut take = |index: usize| queues.get_mut(index).and_then(Option::take);
        let (control_in, control_out) = if multiport {
            (take(CONTROL_IN), take(CONTROL_OUT))
        } else {
            (None, None)
        };
        let ports = if multiport { self.outputs.len() } else { 1 };
        self.input.visit(|input| {
            for (index, port) in input.ports.iter_mut().enumerate().take(ports) {
                let first = self.first_queue(index);
                port.queue = take(first);
                let transmit = take(first + 1);
                port.output.visit(|output| {
                    output.active = transmit.map(|queue| output::Active {
                        queue,
                        memory: Arc::clone(&memory),
                        notifier: Arc::clone(&notifier),
                    });
                });
            }
            let active = input::Active {
                memory,
                notifier,
                multiport,
                control_in,
                control_out,
            };
            start(input, active);
        });
    }

    /// The receive queue of a port; its transmit queue is the next (virtio 1.2, 5.3.2).
    fn first_queue(&self, port: usize) -> usize {
        if port == 0 { 0 } else { 2 * port + 2 }
    }
}

/// The host's side of a [`Console`]. Ports are numbered in the order of their configuration; one
/// that does not exist accepts nothing.
#[derive(Clone)]
pub struct ConsoleHandle {
    input: Arc<Shared<Input>>,
    outputs: Vec<Arc<Shared<Output>>>,
    room: Arc<Condvar>,
}

impl ConsoleHandle {
    /// Gives input to the guest; tells how many bytes of it were accepted. The guest gets them
    /// when it has the port open and buffers ready.
    pub fn input(&self, port: usize, data: &[u8]) -> usize {
        self.input.visit(|input| {
            let accepted = input.accept(port, data);
            input.advance();
            accepted
        })
    }

    /// Waits until a port can take input; `false` if it never will again, since it or the device
    /// is closed.
    pub fn wait_for_room(&self, port: usize) -> bool {
        self.input.wait(&self.room, |input| {
            let port = input.ports.get(port).filter(|port| !port.closed);
            match port {
                Some(port) if !input.gone => (port.buffered.len() < input::BUFFER).then_some(true),
                _ => Some(false),
            }
        })
    }

    /// Gives all of `data` to the guest, and waits as often as need be; `false` if the port or the
    /// device was closed before.
    pub fn input_all(&self, port: usize, mut data: &[u8]) -> bool {
        while !data.is_empty() {
            if !self.wait_for_room(port) {
                return false;
            }
            data = &data[self.input(port, data)..];
        }
        true
    }

    /// There will be no more input for a port. Once the guest has read what there is, it sees the
    /// end (not on a console without named ports, which has no end).
    pub fn close_input(&self, port: usize) {
        self.input.visit(|input| {
            if let Some(port) = input.ports.get_mut(port) {
                port.closed = true;
            }
            input.advance();
        });
        self.room.notify_all();
    }

    /// Tells the guest the size of the terminal, in characters.
    pub fn resize(&self, columns: u16, rows: u16) {
        self.input.visit(|input| {
            input.resize(columns, rows);
            input.advance();
        });
    }

    /// Waits until everything that the guest has written so far has been given to the outputs;
    /// `false` if that takes longer than `timeout`. For the end of a machine, when its processors
    /// have stopped.
    pub fn drain(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        // The control messages first: they may close ports.
        let mut drained = self.input.drain(timeout);
        for output in &self.outputs {
            drained &= output.drain(deadline.saturating_duration_since(Instant::now()));
        }
        drained
    }
}

#[cfg(test)]
mod tests;
