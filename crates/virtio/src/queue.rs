//! A split virtqueue (virtio 1.2, 2.7) and the chains of buffers in it.
//!
//! `virtio-queue` keeps the rings. Chains are walked here: its iterator ends a chain silently at
//! whatever is wrong with it, while a device must refuse such a chain as a whole.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use trapgate_memory::{GuestMemory, GuestSpace};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::Notifier;

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

/// What a driver did that the standard forbids. The device then needs a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// A queue's size is no power of two, or above the device's maximum.
    #[error("queue {queue} has size {size}, which is no power of two or too large")]
    QueueSize {
        /// Which queue.
        queue: u16,
        /// The size that the driver set.
        size: u16,
    },
    /// A queue's rings are not aligned, or not in RAM.
    #[error("the rings of queue {queue} are unaligned or not all in RAM")]
    Rings {
        /// Which queue.
        queue: u16,
    },
    /// The available index ran ahead by more than the queue's size.
    #[error("queue {queue} claims more available buffers than it has entries")]
    AvailableIndex {
        /// Which queue.
        queue: u16,
    },
    /// A descriptor index beyond its table.
    #[error("queue {queue} refers to descriptor {index}, beyond its table")]
    DescriptorIndex {
        /// Which queue.
        queue: u16,
        /// The index.
        index: u16,
    },
    /// A chain loops, or has more descriptors or bytes than allowed.
    #[error("queue {queue} has a chain that loops or is too long")]
    ChainLength {
        /// Which queue.
        queue: u16,
    },
    /// A buffer that the device is to read follows one that it is to write.
    #[error("queue {queue} has a readable buffer after a writable one")]
    ChainOrder {
        /// Which queue.
        queue: u16,
    },
    /// An indirect table inside another, with a successor, of odd size, or not negotiated.
    #[error("queue {queue} has a malformed indirect descriptor")]
    Indirect {
        /// Which queue.
        queue: u16,
    },
    /// A buffer or table that is not all RAM.
    #[error("queue {queue} refers to {length:#x} bytes at {gpa:#x}, which are not all RAM")]
    NotRam {
        /// Which queue.
        queue: u16,
        /// Guest-physical start.
        gpa: u64,
        /// Bytes.
        length: u32,
    },
    /// A request's buffers are too small for its kind.
    #[error("queue {queue} has a request whose buffers are too small")]
    ShortRequest {
        /// Which queue.
        queue: u16,
    },
    /// `DRIVER_OK` without the steps that come before it.
    #[error("the driver set DRIVER_OK before FEATURES_OK")]
    Initialization,
}

/// A piece of guest memory, all of it RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical start.
    pub gpa: u64,
    /// Bytes, not 0.
    pub length: u32,
}

/// A request: the buffers of one descriptor chain. Made once and refilled, so that taking a
/// request allocates nothing.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// What [`Virtqueue::push`] wants back.
    pub head: u16,
    /// What the device may read, in order.
    pub readable: Vec<Buffer>,
    /// What the device may write, in order.
    pub writable: Vec<Buffer>,
}

/// Bytes in a list of buffers.
pub(crate) fn length(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.length)).sum()
}

/// The part of a list of buffers that starts `skip` bytes into it and has `take` bytes at most.
pub(crate) fn part(buffers: &[Buffer], skip: u64, take: u64) -> impl Iterator<Item = Buffer> {
    let mut skip = skip;
    let mut take = take;
    buffers.iter().filter_map(move |buffer| {
        let length = u64::from(buffer.length);
        let skipped = skip.min(length);
        let taken = take.min(length - skipped);
        skip -= skipped;
        take -= taken;
        (taken > 0).then_some(Buffer {
            gpa: buffer.gpa + skipped,
            length: taken as u32,
        })
    })
}

/// Copies out of a list of buffers, from `skip` bytes into it. Gives how many bytes there were.
pub(crate) fn copy_out(
    memory: &GuestMemory,
    buffers: &[Buffer],
    skip: u64,
    data: &mut [u8],
) -> usize {
    let mut done = 0;
    for buffer in part(buffers, skip, data.len() as u64) {
        let piece = &mut data[done..done + buffer.length as usize];
        // The buffer was found to be RAM, and RAM does not go away.
        if memory.read(buffer.gpa, piece).is_err() {
            break;
        }
        done += piece.len();
    }
    done
}

/// Copies into a list of buffers, from `skip` bytes into it. Gives how many bytes found room.
pub(crate) fn copy_in(memory: &GuestMemory, buffers: &[Buffer], skip: u64, data: &[u8]) -> usize {
    let mut done = 0;
    for buffer in part(buffers, skip, data.len() as u64) {
        let piece = &data[done..done + buffer.length as usize];
        if memory.write(buffer.gpa, piece).is_err() {
            break;
        }
        done += piece.len();
    }
    done
}

/// A queue that the driver has set up.
pub struct Virtqueue {
    queue: Queue,
    index: u16,
    /// Descriptors that a chain may have: the device's maximum, even where the driver chose a
    /// smaller ring, since Linux sizes its indirect chains by what the device says.
    longest: u16,
    indirect: bool,
    /// Whether doorbells are switched off because the device is looking anyway.
    quiet: bool,
    memory: Arc<GuestMemory>,
    notifier: Arc<Notifier>,
}

/// The registers of a queue, as the driver sets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rings {
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
}

/// How far a device has come in a queue: the saved state of a [`Virtqueue`], whose rings are in guest
/// memory and whose registers are the transport's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueuePosition {
    /// Index of the next entry of the available ring.
    pub next_available: u16,
    /// Index of the next entry of the used ring.
    pub next_used: u16,
    /// Doorbells are switched off because the device is looking anyway.
    pub quiet: bool,
}

impl Virtqueue {
    pub(crate) fn new(
        index: u16,
        max_size: u16,
        rings: Rings,
        (event_index, indirect): (bool, bool),
        memory: Arc<GuestMemory>,
        notifier: Arc<Notifier>,
    ) -> Result<Self, ProtocolError> {
        let bad_size = ProtocolError::QueueSize {
            queue: index,
            size: rings.size,
        };
        let bad_rings = ProtocolError::Rings { queue: index };
        let mut queue = Queue::new(max_size).map_err(|_| bad_size)?;
        queue.try_set_size(rings.size).map_err(|_| bad_size)?;
        queue
            .try_set_desc_table_address(GuestAddress(rings.descriptors))
            .and_then(|()| queue.try_set_avail_ring_address(GuestAddress(rings.available)))
            .and_then(|()| queue.try_set_used_ring_address(GuestAddress(rings.used)))
            .map_err(|_| bad_rings)?;
        queue.set_event_idx(event_index);
        queue.set_ready(true);
        if rings.available == 0 || !queue.is_valid(memory.space()) {
            return Err(bad_rings);
        }
        Ok(Self {
            queue,
            index,
            longest: max_size,
            indirect,
            quiet: false,
            memory,
            notifier,
        })
    }

    /// How far it has come. Whatever was pushed has been signalled.
    pub fn position(&self) -> QueuePosition {
        let Self {
            queue,
            quiet,
            // The transport's and the machine's.
            index: _,
            longest: _,
            indirect: _,
            memory: _,
            notifier: _,
        } = self;
        QueuePosition {
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
            quiet: *quiet,
        }
    }

    /// The queue, which was just made, from a position on.
    pub(crate) fn at(mut self, position: QueuePosition) -> Self {
        let QueuePosition {
            next_available,
            next_used,
            quiet,
        } = position;
        self.queue.set_next_avail(next_available);
        self.queue.set_next_used(next_used);
        self.quiet = quiet;
        self
    }

    /// Takes a request that was popped before into `chain` again.
    pub(crate) fn pop_again(&self, head: u16, chain: &mut Chain) -> Result<(), ProtocolError> {
        self.walk(head, chain)
    }

    /// Which of the device's queues it is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Takes the next request into `chain`. `false` when there is none: the driver rings when
    /// there is again.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, ProtocolError> {
        let bad_rings = ProtocolError::Rings { queue: self.index };
        let space = self.memory.space();
        for _ in 0..2 {
            let next = self
                .queue
                .iter(space)
                .map_err(|_| ProtocolError::AvailableIndex { queue: self.index })?
                .next()
                .map(|chain| chain.head_index());
            if let Some(head) = next {
                if !self.quiet {
                    self.queue
                        .disable_notification(space)
                        .map_err(|_| bad_rings)?;
                    self.quiet = true;
                }
                self.walk(head, chain)?;
                return Ok(true);
            }
            self.quiet = false;
            // A request may have come before the doorbell was switched on: then look again.
            if !self
                .queue
                .enable_notification(space)
                .map_err(|_| bad_rings)?
            {
                return Ok(false);
            }
        }
        Ok(false)
    }

    fn walk(&self, head: u16, chain: &mut Chain) -> Result<(), ProtocolError> {
        let queue = self.index;
        let space = self.memory.space();
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();

        let mut table = self.queue.desc_table();
        let mut entries = u32::from(self.queue.size());
        let mut index = head;
        let mut inside = false;
        let mut bytes = 0_u64;
        let mut left = self.longest;
        loop {
            if u32::from(index) >= entries {
                return Err(ProtocolError::DescriptorIndex { queue, index });
            }
            let descriptor = read_descriptor(space, table + u64::from(index) * DESCRIPTOR).ok_or(
                ProtocolError::NotRam {
                    queue,
                    gpa: table,
                    length: entries * DESCRIPTOR as u32,
                },
            )?;
            let (gpa, length) = (descriptor.addr().0, descriptor.len());
            let in_ram = length == 0 || space.check_range(GuestAddress(gpa), length as usize);
            if !in_ram {
                return Err(ProtocolError::NotRam { queue, gpa, length });
            }

            if descriptor.refers_to_indirect_table() {
                let odd = length == 0 || !u64::from(length).is_multiple_of(DESCRIPTOR);
                if inside || !self.indirect || odd || descriptor.has_next() {
                    return Err(ProtocolError::Indirect { queue });
                }
                inside = true;
                table = gpa;
                entries = length / DESCRIPTOR as u32;
                index = 0;
                continue;
            }

            if left == 0 {
                return Err(ProtocolError::ChainLength { queue });
            }
            left -= 1;
            bytes += u64::from(length);
            if bytes > u64::from(u32::MAX) {
                return Err(ProtocolError::ChainLength { queue });
            }
            let buffer = Buffer { gpa, length };
            match (descriptor.is_write_only(), chain.writable.is_empty()) {
                _ if length == 0 => {}
                (true, _) => chain.writable.push(buffer),
                (false, true) => chain.readable.push(buffer),
                (false, false) => return Err(ProtocolError::ChainOrder { queue }),
            }
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    /// Gives a request back, of which the device wrote `written` bytes. The driver hears of it
    /// with [`Self::signal`].
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), ProtocolError> {
        self.queue
            .add_used(self.memory.space(), head, written)
            .map_err(|_| ProtocolError::DescriptorIndex {
                queue: self.index,
                index: head,
            })
    }

    /// Interrupts the driver, if it wants to hear of what was pushed.
    pub fn signal(&mut self) -> Result<(), ProtocolError> {
        let bad_rings = ProtocolError::Rings { queue: self.index };
        let space = self.memory.space();
        let mut wanted = self
            .queue
            .needs_notification(space)
            .map_err(|_| bad_rings)?;
        if !self.queue.event_idx_enabled() {
            // `virtio-queue` knows only the event index.
            let flags: u16 = space
                .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
                .map_err(|_| bad_rings)?;
            wanted = u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0;
        }
        if wanted {
            self.notifier.queue_used(self.index);
        }
        Ok(())
    }
}

fn read_descriptor(space: &GuestSpace, gpa: u64) -> Option<Descriptor> {
    space.read_obj(GuestAddress(gpa)).ok()
}
