//! The block device (virtio 1.2, 5.2): a disk with one queue.

mod disk;
mod request;

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use trapgate_pci::StateError;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};

pub use disk::{Disk, DiskError, SECTOR};
use request::Requests;

use crate::worker::{Job, Worker};
use crate::{
    Activation, Chain, Device, DeviceState, DeviceType, Notifier, ProtocolError, SavedDevice,
    Virtqueue,
};

const QUEUE_SIZE: u16 = 256;
/// Data buffers of a request: what a chain may have, less header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Ranges of one discard or write-zeroes request.
const RANGES: u32 = 16;
/// Sectors of one range to be zeroed: 32 MiB, so that a host whose file system cannot do it at
/// once, and has to be given zeros, still comes back soon.
const ZERO_SECTORS: u32 = 1 << 16;

struct Active {
    queue: Virtqueue,
    requests: Requests,
    notifier: Arc<Notifier>,
}

/// What the worker works on.
struct Drive {
    disk: Disk,
    serial: [u8; 20],
    active: Option<Active>,
    chain: Chain,
}

impl Drive {
    /// Serves one request, if there is one.
    fn serve(&mut self) -> Result<bool, ProtocolError> {
        let Some(active) = &mut self.active else {
            return Ok(false);
        };
        if !active.queue.pop(&mut self.chain)? {
            return Ok(false);
        }
        let written = active
            .requests
            .serve(&self.disk, &self.serial, &self.chain)?;
        active.queue.push(self.chain.head, written)?;
        active.queue.signal()?;
        Ok(true)
    }
}

impl Job for Drive {
    type Outside = ();

    fn step(&mut self, (): &mut ()) -> bool {
        self.serve().unwrap_or_else(|error| {
            if let Some(active) = self.active.take() {
                active.notifier.fail(error);
            }
            false
        })
    }
}

/// What a disk has besides its queue. Its contents are not in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockState {
    /// Its size.
    pub sectors: u64,
    /// Whether the guest could not write to it.
    pub read_only: bool,
}

/// A disk as a virtio device.
pub struct Block {
    features: u64,
    config: [u8; 64],
    worker: Worker<Drive>,
}

impl Block {
    /// A device for `disk`, with its thread (the error is that of starting it). The guest sees the
    /// first 20 bytes of `serial`, under Linux in `/dev/disk/by-id`.
    pub fn new(disk: Disk, serial: &str) -> io::Result<Self> {
        let mut features =
            1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        features |= if disk.read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        let config = configuration(disk.sectors());
        let mut padded = [0; 20];
        let length = serial.len().min(padded.len());
        padded[..length].copy_from_slice(&serial.as_bytes()[..length]);
        let drive = Drive {
            disk,
            serial: padded,
            active: None,
            chain: Chain::default(),
        };
        Ok(Self {
            features,
            config,
            worker: Worker::start("disk", drive, ())?,
        })
    }
}

/// `struct virtio_blk_config` (virtio 1.2, 5.2.4), as far as it is used.
fn configuration(sectors: u64) -> [u8; 64] {
    let mut config = [0; 64];
    let mut set = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, &sectors.to_le_bytes());
    set(12, &SEGMENTS.to_le_bytes());
    set(20, &(SECTOR as u32).to_le_bytes());
    // Discard: sectors and ranges of a request, and the alignment that helps the host.
    set(36, &(1_u32 << 22).to_le_bytes());
    set(40, &RANGES.to_le_bytes());
    set(44, &8_u32.to_le_bytes());
    // Write zeroes: the same, and that the host may free the space.
    set(48, &ZERO_SECTORS.to_le_bytes());
    set(52, &RANGES.to_le_bytes());
    set(56, &[1]);
    config
}

impl Device for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            *byte = self.config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) {
        let Activation {
            features,
            memory,
            notifier,
            queues,
        } = activation;
        let queue = queues.into_iter().next().flatten();
        self.worker.visit(|drive| {
            drive.active = queue.map(|queue| Active {
                requests: Requests {
                    memory,
                    // A driver that knows no flush wants its writes to be safe when they are
                    // done (5.2.6.2).
                    write_through: features & 1 << VIRTIO_BLK_F_FLUSH == 0,
                    queue: queue.index(),
                },
                queue,
                notifier,
            });
        });
        self.worker.kick();
    }

    fn notify(&mut self, _queue: u16) {
        self.worker.kick();
    }

    fn reset(&mut self) {
        self.worker.visit(|drive| drive.active = None);
    }

    fn pause(&mut self) {
        self.worker.pause();
    }

    fn resume(&mut self) {
        self.worker.resume();
    }

    fn save(&mut self) -> SavedDevice {
        self.worker.visit(|drive| {
            let Drive {
                disk,
                // The machine's configuration says it.
                serial: _,
                active,
                // Empty between two requests.
                chain: _,
            } = drive;
            SavedDevice {
                queues: vec![active.as_ref().map(|active| active.queue.position())],
                state: DeviceState::Block(BlockState {
                    sectors: disk.sectors(),
                    read_only: disk.read_only(),
                }),
            }
        })
    }

    fn restore(
        &mut self,
        state: &DeviceState,
        activation: Option<Activation>,
    ) -> Result<(), StateError> {
        let DeviceState::Block(BlockState { sectors, read_only }) = state else {
            return Err(state.of_another("block"));
        };
        self.worker.pause();
        let (present, present_read_only) = self
            .worker
            .visit(|drive| (drive.disk.sectors(), drive.disk.read_only()));
        if *sectors != present {
            return Err(StateError::Environment {
                kind: "virtio-block",
                reason: format!(
                    "the disk has {present} sectors of {SECTOR} bytes, and had {sectors} when it was saved"
                ),
            });
        }
        if *read_only != present_read_only {
            let access = |read_only| if read_only { "read-only" } else { "writable" };
            return Err(StateError::Environment {
                kind: "virtio-block",
                reason: format!(
                    "the disk is {}, and was {} when it was saved",
                    access(present_read_only),
                    access(*read_only)
                ),
            });
        }
        if let Some(activation) = activation {
            self.activate(activation);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
