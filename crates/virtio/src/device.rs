//! What a virtio device is to its transport.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use trapgate_memory::GuestMemory;
use trapgate_pci::StateError;

use crate::block::BlockState;
use crate::console::ConsoleState;
use crate::{Notifier, QueuePosition, Virtqueue};

/// The kinds of device there are (virtio 1.2, chapter 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceType {
    /// Network card.
    Net,
    /// Disk.
    Block,
    /// Console.
    Console,
    /// Entropy source.
    Entropy,
    /// Memory balloon.
    Balloon,
    /// Socket.
    Socket,
    /// File system.
    FileSystem,
}

impl DeviceType {
    /// The number in the standard.
    pub fn id(self) -> u16 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
            Self::Console => 3,
            Self::Entropy => 4,
            Self::Balloon => 5,
            Self::Socket => 19,
            Self::FileSystem => 26,
        }
    }

    /// What a saved state calls it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Net => "virtio-net",
            Self::Block => "virtio-block",
            Self::Console => "virtio-console",
            Self::Entropy => "virtio-entropy",
            Self::Balloon => "virtio-balloon",
            Self::Socket => "virtio-socket",
            Self::FileSystem => "virtio-fs",
        }
    }

    /// PCI class, subclass and programming interface.
    pub(crate) fn pci_class(self) -> u32 {
        match self {
            Self::Net => 0x02_00_00,
            Self::Block => 0x01_80_00,
            Self::Console => 0x07_80_00,
            // "Does not fit in any defined class" (PCI Code and ID Assignment 1.11, 1.1).
            Self::Entropy | Self::Balloon | Self::Socket | Self::FileSystem => 0xff_00_00,
        }
    }
}

/// What a device gets when its driver says `DRIVER_OK`.
pub struct Activation {
    /// The features that were negotiated.
    pub features: u64,
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// How to reach the driver.
    pub notifier: Arc<Notifier>,
    /// The queues, in the order of [`Device::queue_sizes`]; `None` where the driver enabled none.
    pub queues: Vec<Option<Virtqueue>>,
}

/// A virtio device without its transport. The transport calls it with its own lock held, on the
/// processors' threads, so nothing here may wait for the host for long.
pub trait Device: Send {
    /// What it is.
    fn device_type(&self) -> DeviceType;

    /// The features it offers, without those of ring and transport, which the transport adds.
    fn features(&self) -> u64;

    /// The largest size of each of its queues: powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads device configuration; bytes beyond it are zeros. `data` is zeroed before.
    fn config_read(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration.
    fn config_write(&mut self, _offset: u64, _data: &[u8]) {}

    /// Starts, with the queues that the driver has set up.
    fn activate(&mut self, activation: Activation);

    /// The driver rang a queue's doorbell. Only between `activate` and `reset`.
    fn notify(&mut self, queue: u16);

    /// Stops, and forgets the queues. When this returns the device touches guest memory no more.
    fn reset(&mut self);

    /// Stops, and keeps the queues. When this returns the device touches guest memory no more.
    fn pause(&mut self);

    /// Goes on after `pause`, with whatever the queues then hold.
    fn resume(&mut self);

    /// Its state, between `pause` and `resume`.
    fn save(&mut self) -> SavedDevice;

    /// Takes a state, before anything else is done with the device. `activation` is there if it was
    /// active; its queues, which stand where they stood, are those of [`SavedDevice::queues`]. It is
    /// paused until `resume`, and touches guest memory only to read it.
    ///
    /// # Errors
    /// For a state that it can't be in.
    fn restore(
        &mut self,
        state: &DeviceState,
        activation: Option<Activation>,
    ) -> Result<(), StateError>;
}

/// The saved state of a device, with the queues that it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedDevice {
    /// How far each queue has come; `None` for one that the driver did not enable, or that the device
    /// gave up because the driver broke the protocol.
    pub queues: Vec<Option<QueuePosition>>,
    /// The rest.
    pub state: DeviceState,
}

/// What a device has besides its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceState {
    /// Of a disk.
    Block(BlockState),
    /// Of a console.
    Console(ConsoleState),
    /// An entropy source has nothing.
    Entropy,
}

impl DeviceState {
    /// The error for a state of another kind.
    pub(crate) fn of_another(&self, kind: &'static str) -> StateError {
        let saved = match self {
            Self::Block(_) => "block",
            Self::Console(_) => "console",
            Self::Entropy => "entropy",
        };
        StateError::Kind {
            saved: saved.to_owned(),
            present: kind,
        }
    }
}
