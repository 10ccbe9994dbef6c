//! The saved state of a console.

use serde::{Deserialize, Serialize};
use trapgate_pci::StateError;

use super::input::{Active, BUFFER, Input, Message, Port};
use super::output::InHand;
use super::{CONTROL_IN, CONTROL_OUT, Console};
use crate::{Activation, DeviceState, QueuePosition, SavedDevice};

const KIND: &str = "virtio-console";
/// Messages that may wait for the guest: more than ever do, as each port has few to say at a time.
const MOST_MESSAGES: usize = 1024;
/// Bytes after a message's header: more than any name has.
const LONGEST_MESSAGE: usize = 4096;

/// A control message that waits for the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MessageState {
    /// The port that it is about.
    pub port: u32,
    /// What happened (virtio 1.2, 5.3.6.2).
    pub event: u16,
    /// To which effect.
    pub value: u16,
    /// What follows: a name or a size.
    #[serde(with = "hex::serde")]
    pub tail: Vec<u8>,
}

/// A port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortState {
    /// Its name.
    pub name: String,
    /// Whether it is a terminal.
    pub is_console: bool,
    /// Input that the guest has not taken.
    #[serde(with = "hex::serde")]
    pub buffered: Vec<u8>,
    /// The host has no more input.
    pub closed: bool,
    /// The guest has set the port up.
    pub ready: bool,
    /// The guest has it open.
    pub open: bool,
    /// The guest was told that the host closed it.
    pub end_told: bool,
    /// Output of which the host has taken a part.
    pub in_hand: Option<InHand>,
}

/// A console, without its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleState {
    /// Columns and rows; 0 while not known.
    pub size: (u16, u16),
    /// The ports.
    pub ports: Vec<PortState>,
    /// Control messages that wait for the guest.
    pub messages: Vec<MessageState>,
}

impl Message {
    fn save(&self) -> MessageState {
        let Self {
            port,
            event,
            value,
            tail,
        } = self;
        MessageState {
            port: *port,
            event: *event,
            value: *value,
            tail: tail.clone(),
        }
    }

    fn restore(state: &MessageState) -> Result<Self, StateError> {
        let MessageState {
            port,
            event,
            value,
            tail,
        } = state;
        let length = tail.len();
        StateError::check(
            length <= LONGEST_MESSAGE,
            KIND,
            "a message's length",
            length as u64,
        )?;
        Ok(Self {
            port: *port,
            event: *event,
            value: *value,
            tail: tail.clone(),
        })
    }
}

impl Port {
    /// Its state, and that of its two queues.
    fn save(&self) -> (PortState, [Option<QueuePosition>; 2]) {
        let Self {
            name,
            is_console,
            buffered,
            closed,
            queue,
            output,
            ready,
            open,
            end_told,
        } = self;
        let (transmit, in_hand) = output.visit(|output| output.save());
        let state = PortState {
            name: name.clone(),
            is_console: *is_console,
            buffered: buffered.iter().copied().collect(),
            closed: *closed,
            ready: *ready,
            open: *open,
            end_told: *end_told,
            in_hand,
        };
        (
            state,
            [queue.as_ref().map(|queue| queue.position()), transmit],
        )
    }

    fn restore(&mut self, state: &PortState, has_queues: bool) -> Result<(), StateError> {
        let PortState {
            name,
            is_console,
            buffered,
            closed,
            ready,
            open,
            end_told,
            in_hand,
        } = state;
        if *name != self.name || *is_console != self.is_console {
            return Err(StateError::Environment {
                kind: KIND,
                reason: format!("it had a port `{name}` where it has a port `{}`", self.name),
            });
        }
        let waiting = buffered.len();
        StateError::check(
            waiting <= BUFFER,
            KIND,
            "bytes of input that wait",
            waiting as u64,
        )?;
        self.buffered = buffered.iter().copied().collect();
        self.closed = *closed;
        self.ready = *ready;
        self.end_told = *end_told;
        // Whoever takes the output from now on hears that it is open.
        self.set_open(*open);
        if has_queues {
            self.output.visit(|output| output.restore(*in_hand))?;
        }
        Ok(())
    }
}

impl Console {
    pub(super) fn saved(&mut self) -> SavedDevice {
        let mut queues = vec![None; self.queues.len()];
        let state = self.input.visit(|input| {
            let Input {
                ports,
                active,
                size,
                // Of the machine that is saved.
                paused: _,
                gone: _,
                room: _,
                messages,
                // Empty between two steps.
                chain: _,
            } = input;
            if let Some(Active {
                memory: _,
                notifier: _,
                // Negotiated, which the transport knows.
                multiport: _,
                control_in,
                control_out,
            }) = active
            {
                for (index, queue) in [(CONTROL_IN, control_in), (CONTROL_OUT, control_out)] {
                    if let Some(queue) = queue {
                        queues[index] = Some(queue.position());
                    }
                }
            }
            let mut port_states = Vec::new();
            for (index, port) in ports.iter().enumerate() {
                let (state, positions) = port.save();
                let first = if index == 0 { 0 } else { 2 * index + 2 };
                queues[first..first + 2].copy_from_slice(&positions);
                port_states.push(state);
            }
            ConsoleState {
                size: *size,
                ports: port_states,
                messages: messages.iter().map(Message::save).collect(),
            }
        });
        SavedDevice {
            queues,
            state: DeviceState::Console(state),
        }
    }

    pub(super) fn take_state(
        &mut self,
        state: &ConsoleState,
        activation: Option<Activation>,
    ) -> Result<(), StateError> {
        let ConsoleState {
            size,
            ports,
            messages,
        } = state;
        let count = messages.len();
        StateError::check(
            count <= MOST_MESSAGES,
            KIND,
            "messages that wait",
            count as u64,
        )?;
        let messages = messages.iter().map(Message::restore);
        let messages = messages.collect::<Result<_, _>>()?;
        let is_active = activation.is_some();
        if let Some(activation) = activation {
            // Nothing is said to the driver, which has heard it.
            self.attach(activation, |input, active| input.active = Some(active));
        }
        self.input.visit(|input| {
            let count = ports.len();
            let what = "the number of ports";
            StateError::check(count == input.ports.len(), KIND, what, count as u64)?;
            input.size = *size;
            input.messages = messages;
            for (port, state) in input.ports.iter_mut().zip(ports) {
                port.restore(state, is_active)?;
            }
            Ok(())
        })
    }
}
