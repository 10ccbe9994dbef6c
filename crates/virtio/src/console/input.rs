//! From the host to the guest, and the control messages between the two (virtio 1.2, 5.3.6).

use std::collections::VecDeque;
use std::sync::{Arc, Condvar};

use trapgate_memory::GuestMemory;

use super::output::Output;
use crate::queue::{copy_in, copy_out, length};
use crate::worker::{Job, Shared};
use crate::{Chain, Notifier, ProtocolError, Virtqueue};

/// Bytes of input that a port keeps for the guest.
pub(super) const BUFFER: usize = 64 << 10;
/// While this many control messages wait for the guest to take them, its own are not read.
const MESSAGES: usize = 64;
/// The guest's control messages that are read in one step.
const STEP: usize = 64;

/// The events of control messages (virtio 1.2, 5.3.6.2).
mod event {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const PORT_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const RESIZE: u16 = 5;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

/// A control message for the guest, with the bytes that follow it.
pub(super) struct Message {
    pub(super) port: u32,
    pub(super) event: u16,
    pub(super) value: u16,
    pub(super) tail: Vec<u8>,
}

impl Message {
    fn new(port: usize, event: u16, value: u16) -> Self {
        Self {
            port: port as u32,
            event,
            value,
            tail: Vec::new(),
        }
    }

    fn header(&self) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&self.port.to_le_bytes());
        bytes[4..6].copy_from_slice(&self.event.to_le_bytes());
        bytes[6..].copy_from_slice(&self.value.to_le_bytes());
        bytes
    }
}

/// One port.
pub(super) struct Port {
    pub(super) name: String,
    pub(super) is_console: bool,
    /// What the guest has not taken yet.
    pub(super) buffered: VecDeque<u8>,
    /// The host has no more input.
    pub(super) closed: bool,
    pub(super) queue: Option<Virtqueue>,
    pub(super) output: Arc<Shared<Output>>,
    /// The guest said that it has set the port up.
    pub(super) ready: bool,
    /// The guest has it open.
    pub(super) open: bool,
    /// The guest was told that the host closed it.
    pub(super) end_told: bool,
}

impl Port {
    pub(super) fn new(name: String, is_console: bool, output: Arc<Shared<Output>>) -> Self {
        Self {
            name,
            is_console,
            buffered: VecDeque::new(),
            closed: false,
            queue: None,
            output,
            ready: false,
            open: false,
            end_told: false,
        }
    }

    pub(super) fn set_open(&mut self, open: bool) {
        if self.open != open {
            self.open = open;
            self.output.visit(|output| output.set_opened(open));
            self.output.kick();
        }
    }

    /// Moves input into the guest's buffers; whether any was moved.
    fn deliver(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, ProtocolError> {
        let Some(queue) = &mut self.queue else {
            return Ok(false);
        };
        // Linux throws away what comes for a port that no program has open.
        if !self.open || self.buffered.is_empty() {
            return Ok(false);
        }
        let mut moved = false;
        while !self.buffered.is_empty() && queue.pop(chain)? {
            let room = length(&chain.writable);
            if room == 0 {
                return Err(ProtocolError::ShortRequest {
                    queue: queue.index(),
                });
            }
            let (first, second) = self.buffered.as_slices();
            let mut written = copy_in(memory, &chain.writable, 0, first);
            if written == first.len() {
                written += copy_in(memory, &chain.writable, written as u64, second);
            }
            self.buffered.drain(..written);
            queue.push(chain.head, written as u32)?;
            moved = true;
        }
        if moved {
            queue.signal()?;
        }
        Ok(moved)
    }
}

/// What an active device has.
pub(super) struct Active {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) notifier: Arc<Notifier>,
    /// Whether the driver knows more than one port, and control messages.
    pub(super) multiport: bool,
    pub(super) control_in: Option<Virtqueue>,
    pub(super) control_out: Option<Virtqueue>,
}

/// All of the device but the transmit queues.
pub(super) struct Input {
    pub(super) ports: Vec<Port>,
    pub(super) active: Option<Active>,
    /// Columns and rows; 0 while not known.
    pub(super) size: (u16, u16),
    pub(super) paused: bool,
    /// The device has been dropped.
    pub(super) gone: bool,
    /// Told when a port has room again, or will never have.
    pub(super) room: Arc<Condvar>,
    pub(super) messages: VecDeque<Message>,
    pub(super) chain: Chain,
}

impl Input {
    pub(super) fn new(ports: Vec<Port>, room: Arc<Condvar>) -> Self {
        Self {
            ports,
            active: None,
            size: (0, 0),
            paused: false,
            gone: false,
            room,
            messages: VecDeque::new(),
            chain: Chain::default(),
        }
    }

    /// Starts with the queues in place.
    pub(super) fn activate(&mut self, active: Active) {
        if !active.multiport {
            // A driver that knows only one port has it open as long as it runs, and learns the
            // size from a change of the configuration.
            if let Some(port) = self.ports.first_mut() {
                port.set_open(true);
            }
            if self.size != (0, 0) {
                active.notifier.config_changed();
            }
        }
        self.active = Some(active);
    }

    /// Forgets the guest; input that it did not take stays for the next.
    pub(super) fn reset(&mut self) {
        self.active = None;
        self.messages.clear();
        for port in &mut self.ports {
            port.queue = None;
            port.ready = false;
            port.end_told = false;
            port.set_open(false);
        }
    }

    /// Buffers input, as much as there is room for.
    pub(super) fn accept(&mut self, port: usize, data: &[u8]) -> usize {
        let Some(port) = self.ports.get_mut(port) else {
            return 0;
        };
        if port.closed || self.gone {
            return 0;
        }
        let taken = data.len().min(BUFFER - port.buffered.len());
        port.buffered.extend(&data[..taken]);
        taken
    }

    pub(super) fn resize(&mut self, columns: u16, rows: u16) {
        if self.size == (columns, rows) {
            return;
        }
        self.size = (columns, rows);
        match &self.active {
            Some(active) if !active.multiport => active.notifier.config_changed(),
            Some(_) => self.tell_size(),
            None => {}
        }
    }

    fn tell_size(&mut self) {
        let consoles = self.ports.iter().enumerate();
        let ready: Vec<_> = consoles
            .filter(|(_, port)| port.is_console && port.ready)
            .map(|(index, _)| index)
            .collect();
        for index in ready {
            self.tell_size_of(index);
        }
    }

    /// The order is the standard's; Linux before 6.15 took the two the other way round. Without
    /// multiport the size is in the configuration space, where all agree.
    fn tell_size_of(&mut self, port: usize) {
        // Only the newest size matters, and the guest may be slow to take messages.
        self.messages
            .retain(|message| message.event != event::RESIZE || message.port != port as u32);
        let mut message = Message::new(port, event::RESIZE, 0);
        message.tail.extend(self.size.0.to_le_bytes());
        message.tail.extend(self.size.1.to_le_bytes());
        self.messages.push_back(message);
    }

    /// Moves whatever can be moved; whether there may be more.
    pub(super) fn advance(&mut self) -> bool {
        if self.paused {
            return false;
        }
        self.try_advance().unwrap_or_else(|error| {
            if let Some(active) = self.active.take() {
                active.notifier.fail(error);
            }
            false
        })
    }

    fn try_advance(&mut self) -> Result<bool, ProtocolError> {
        let more = self.read_messages()?;
        let Some(active) = &mut self.active else {
            return Ok(false);
        };
        for (index, port) in self.ports.iter_mut().enumerate() {
            if port.deliver(&active.memory, &mut self.chain)? {
                self.room.notify_all();
            }
            // The end comes after all input: a reader empties its buffers before it sees it.
            let ended = port.closed && port.buffered.is_empty();
            if active.multiport && port.ready && ended && !port.end_told {
                port.end_told = true;
                self.messages
                    .push_back(Message::new(index, event::PORT_OPEN, 0));
            }
        }
        self.send_messages()?;
        // Where there was no room for replies, there is now; or the guest's next buffer makes
        // some, and rings.
        Ok(more && self.messages.len() < MESSAGES)
    }

    fn read_messages(&mut self) -> Result<bool, ProtocolError> {
        for _ in 0..STEP {
            let Some(active) = &mut self.active else {
                return Ok(false);
            };
            if self.messages.len() >= MESSAGES {
                return Ok(true);
            }
            let Some(queue) = &mut active.control_out else {
                return Ok(false);
            };
            if !queue.pop(&mut self.chain)? {
                return Ok(false);
            }
            let mut bytes = [0; 8];
            if copy_out(&active.memory, &self.chain.readable, 0, &mut bytes) < bytes.len() {
                return Err(ProtocolError::ShortRequest {
                    queue: queue.index(),
                });
            }
            queue.push(self.chain.head, 0)?;
            queue.signal()?;
            let [a, b, c, d, e, f, g, h] = bytes;
            let port = u32::from_le_bytes([a, b, c, d]) as usize;
            self.obey(port, u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
        }
        Ok(true)
    }

    fn obey(&mut self, index: usize, event: u16, value: u16) {
        if event == event::DEVICE_READY {
            if value == 1 {
                let added = |port| Message::new(port, event::PORT_ADD, 1);
                self.messages.extend((0..self.ports.len()).map(added));
            }
            return;
        }
        let Some(port) = self.ports.get_mut(index) else {
            return;
        };
        match event {
            event::PORT_READY if value == 1 => {
                port.ready = true;
                port.end_told = false;
                let console = port.is_console;
                let mut name = Message::new(index, event::PORT_NAME, 1);
                name.tail.extend(port.name.as_bytes());
                if console {
                    self.messages
                        .push_back(Message::new(index, event::CONSOLE_PORT, 1));
                    if self.size != (0, 0) {
                        self.tell_size_of(index);
                    }
                }
                // Open before its name: programs find it by name, and one that read it before it
                // is open would take that for the end of input.
                self.messages
                    .push_back(Message::new(index, event::PORT_OPEN, 1));
                self.messages.push_back(name);
            }
            event::PORT_OPEN => port.set_open(value != 0),
            _ => {}
        }
    }

    fn send_messages(&mut self) -> Result<(), ProtocolError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        let Some(queue) = &mut active.control_in else {
            return Ok(());
        };
        let mut pushed = false;
        while let Some(message) = self.messages.front() {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            let header = message.header();
            let size = header.len() + message.tail.len();
            if length(&self.chain.writable) < size as u64 {
                return Err(ProtocolError::ShortRequest {
                    queue: queue.index(),
                });
            }
            let buffers = &self.chain.writable;
            copy_in(&active.memory, buffers, 0, &header);
            copy_in(&active.memory, buffers, header.len() as u64, &message.tail);
            queue.push(self.chain.head, size as u32)?;
            pushed = true;
            self.messages.pop_front();
        }
        if pushed {
            queue.signal()?;
        }
        Ok(())
    }
}

impl Job for Input {
    type Outside = ();

    fn step(&mut self, (): &mut ()) -> bool {
        self.advance()
    }
}
