//! The PCI transport (virtio 1.2, 4.1): a PCI function in front of a [`Device`].

mod saved;

use std::sync::Arc;

pub(crate) use saved::NotifierState;
use trapgate_memory::GuestMemory;
use trapgate_pci::{
    BarKind, ConfigSpace, Function, Identity, InterruptLine, MessageSink, SavedFunction,
    StateError, Window, register,
};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::queue::Rings;
use crate::{Activation, Device, Notifier, ProtocolError, Virtqueue};

/// Features of the ring and of the transport, which every device here has.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

const VENDOR: u16 = 0x1af4;
/// Device ids are this much above the device types (virtio 1.2, 4.1.2.1).
const DEVICE: u16 = 0x1040;
/// Capabilities of virtio are vendor-specific ones.
const CAPABILITY_VENDOR: u8 = 0x09;

const STATUS_NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const STATUS_DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const STATUS_FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;

/// The one memory window, and what lies where in it.
const BAR: u8 = 0;
const BAR_LENGTH: u64 = 0x8000;
const COMMON: Region = Region::new(0x0000, 0x40);
const ISR: Region = Region::new(0x1000, 0x04);
const DEVICE_CONFIG: Region = Region::new(0x2000, 0x1000);
const DOORBELLS: Region = Region::new(0x3000, 0x1000);
const MSIX_TABLE: Region = Region::new(0x4000, 0x1000);
const MSIX_PBA: Region = Region::new(0x5000, 0x1000);
/// Bytes between the doorbells of two queues.
const DOORBELL_STRIDE: u32 = 4;

#[derive(Clone, Copy)]
struct Region {
    start: u64,
    length: u64,
}

impl Region {
    const fn new(start: u64, length: u64) -> Self {
        Self { start, length }
    }

    /// The offset in the region, of an offset in the window.
    fn offset(self, offset: u64) -> Option<u64> {
        offset
            .checked_sub(self.start)
            .filter(|offset| *offset < self.length)
    }
}

/// What a virtio capability points to (virtio 1.2, 4.1.4).
#[derive(Clone, Copy)]
#[repr(u8)]
enum Structure {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    PciAccess = 5,
}

#[derive(Clone, Copy)]
struct QueueRegisters {
    max_size: u16,
    rings: Rings,
    enabled: bool,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            rings: Rings {
                size: max_size,
                descriptors: 0,
                available: 0,
                used: 0,
            },
            enabled: false,
        }
    }
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    device: Box<dyn Device>,
    memory: Arc<GuestMemory>,
    notifier: Arc<Notifier>,
    space: ConfigSpace,
    /// Offset of the MSI-X capability.
    msix: u16,
    /// Offset of the capability that gives access to the window through configuration space.
    access: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    /// Between DRIVER_OK and reset.
    active: bool,
}

impl VirtioPci {
    /// Puts a device behind PCI. Its interrupts go to `sink`, or to `line` while the driver does
    /// not use MSI-X. The lock order is in the documentation of [`trapgate_pci`].
    pub fn new(
        device: impl Device + 'static,
        memory: Arc<GuestMemory>,
        sink: Arc<dyn MessageSink>,
        line: Arc<dyn InterruptLine>,
    ) -> Self {
        let kind = device.device_type();
        let mut space = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: DEVICE + kind.id(),
            revision: 1,
            class: kind.pci_class(),
            subsystem_vendor: VENDOR,
            // "0x40 or above, so that legacy drivers do not match" (4.1.2.1).
            subsystem: 0x1100,
        });
        space.add_bar(BAR, BarKind::Memory32, BAR_LENGTH);
        space.use_interrupt_pin();
        let queues: Vec<_> = device
            .queue_sizes()
            .iter()
            .copied()
            .map(QueueRegisters::new)
            .collect();
        let notifier = Arc::new(Notifier::new(queues.len(), sink, line));
        let msix = notifier.msix().add_capability(
            &mut space,
            BAR,
            MSIX_TABLE.start as u32,
            MSIX_PBA.start as u32,
        );
        add_structure(&mut space, Structure::Common, COMMON, &[], &[]);
        add_structure(&mut space, Structure::Isr, ISR, &[], &[]);
        add_structure(&mut space, Structure::Device, DEVICE_CONFIG, &[], &[]);
        let stride = DOORBELL_STRIDE.to_le_bytes();
        add_structure(&mut space, Structure::Notify, DOORBELLS, &stride, &[]);
        // The driver sets bar, offset and length, and then uses the data field (4.1.4.9).
        let writable = [
            0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
            0xff,
        ];
        let access = add_structure(
            &mut space,
            Structure::PciAccess,
            Region::new(0, 0),
            &[0; 4],
            &writable,
        );
        Self {
            device: Box::new(device),
            memory,
            notifier,
            space,
            msix,
            access,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            active: false,
        }
    }

    /// The device's way to its driver; tells as well why it needs a reset, if it does.
    pub fn notifier(&self) -> &Arc<Notifier> {
        &self.notifier
    }

    fn offered(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn selected(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    /// The field of the common structure (virtio 1.2, 4.1.4.3) that byte `offset` belongs to:
    /// where it starts, its bytes, its value.
    fn common_field(&self, offset: u64) -> (u64, u64, u64) {
        let half = |select: u32, value: u64| match select {
            0 => value & 0xffff_ffff,
            1 => value >> 32,
            _ => 0,
        };
        let queue = self.queues.get(usize::from(self.queue_select));
        let rings = queue.map(|queue| queue.rings);
        let ring = |pick: fn(Rings) -> u64| rings.map_or(0, pick);
        match offset {
            0..4 => (0, 4, self.device_feature_select.into()),
            4..8 => (4, 4, half(self.device_feature_select, self.offered())),
            8..12 => (8, 4, self.driver_feature_select.into()),
            12..16 => (
                12,
                4,
                half(self.driver_feature_select, self.driver_features),
            ),
            16..18 => (16, 2, self.notifier.config_vector().into()),
            18..20 => (18, 2, self.queues.len() as u64),
            20 => (20, 1, self.notifier.status().into()),
            21 => (21, 1, self.notifier.generation().into()),
            22..24 => (22, 2, self.queue_select.into()),
            24..26 => (24, 2, ring(|rings| rings.size.into())),
            26..28 => (26, 2, self.notifier.queue_vector(self.queue_select).into()),
            28..30 => (28, 2, queue.map_or(0, |queue| queue.enabled.into())),
            30..32 => (30, 2, queue.map_or(0, |_| self.queue_select.into())),
            32..40 => (32, 8, ring(|rings| rings.descriptors)),
            40..48 => (40, 8, ring(|rings| rings.available)),
            48..56 => (48, 8, ring(|rings| rings.used)),
            // Notification data and queue reset are not offered.
            _ => (offset, 1, 0),
        }
    }

    fn set_common_field(&mut self, start: u64, value: u64) {
        // A driver sets a queue up before it enables it, and never after (4.1.4.3.2).
        let open = !self.active && self.selected().is_some_and(|queue| !queue.enabled);
        match start {
            0 => self.device_feature_select = value as u32,
            8 => self.driver_feature_select = value as u32,
            12 => self.set_driver_features(value as u32),
            16 => self.notifier.set_config_vector(value as u16),
            20 => self.set_status(value as u8),
            22 => self.queue_select = value as u16,
            26 => {
                self.notifier
                    .set_queue_vector(self.queue_select, value as u16);
            }
            24 | 28 | 32 | 40 | 48 if open => {
                let Some(queue) = self.selected() else { return };
                match start {
                    24 => queue.rings.size = value as u16,
                    28 => queue.enabled = value == 1,
                    32 => queue.rings.descriptors = value,
                    40 => queue.rings.available = value,
                    _ => queue.rings.used = value,
                }
            }
            _ => {}
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        // They are settled once the device has accepted them (3.1.1).
        if self.notifier.status() & STATUS_FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            // Bits beyond 63 are not offered; a driver that sets some is refused below.
            _ if value != 0 => self.driver_features |= 1 << 63,
            _ => {}
        }
    }

    fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset_device();
            return;
        }
        let old = self.notifier.status();
        // Only the device sets NEEDS_RESET; a driver never clears a bit, other than by a reset.
        let mut added = value & !old & !STATUS_NEEDS_RESET;
        let unknown = self.driver_features & !self.offered();
        let modern = self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if unknown != 0 || !modern {
            // The driver sees that the bit did not stick (3.1.1, step 6).
            added &= !STATUS_FEATURES_OK;
        }
        self.notifier.add_status(added);
        if added & STATUS_DRIVER_OK != 0 {
            self.activate();
        }
    }

    /// The queue of this index, as the driver has set it up.
    fn queue(&self, index: u16) -> Result<Virtqueue, ProtocolError> {
        let negotiated = |feature: u32| self.driver_features & 1 << feature != 0;
        let registers = self.queues[usize::from(index)];
        Virtqueue::new(
            index,
            registers.max_size,
            registers.rings,
            (
                negotiated(VIRTIO_RING_F_EVENT_IDX),
                negotiated(VIRTIO_RING_F_INDIRECT_DESC),
            ),
            Arc::clone(&self.memory),
            Arc::clone(&self.notifier),
        )
    }

    fn activate(&mut self) {
        if self.notifier.status() & STATUS_FEATURES_OK == 0 {
            self.notifier.fail(ProtocolError::Initialization);
            return;
        }
        let mut queues = Vec::new();
        for (index, registers) in (0..).zip(&self.queues) {
            if !registers.enabled {
                queues.push(None);
                continue;
            }
            match self.queue(index) {
                Ok(queue) => queues.push(Some(queue)),
                Err(error) => {
                    self.notifier.fail(error);
                    return;
                }
            }
        }
        self.active = true;
        self.device.activate(Activation {
            features: self.driver_features,
            memory: Arc::clone(&self.memory),
            notifier: Arc::clone(&self.notifier),
            queues,
        });
    }

    fn reset_device(&mut self) {
        if self.active {
            self.device.reset();
            self.active = false;
        }
        self.notifier.reset_device();
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max_size);
        }
    }

    fn common_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let (start, _, value) = self.common_field(at);
            *byte = (value >> (8 * (at - start))) as u8;
        }
    }

    /// Writes whole fields, and parts of fields with the rest as it was.
    fn common_write(&mut self, offset: u64, data: &[u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let (start, length, value) = self.common_field(at);
            let skip = (at - start) as usize;
            let taken = (length as usize - skip).min(rest.len());
            let mut bytes = value.to_le_bytes();
            bytes[skip..skip + taken].copy_from_slice(&rest[..taken]);
            self.set_common_field(start, u64::from_le_bytes(bytes));
            at += taken as u64;
            rest = &rest[taken..];
        }
    }

    fn ring_doorbell(&mut self, offset: u64) {
        let queue = (offset / u64::from(DOORBELL_STRIDE)) as u16;
        let broken = self.notifier.status() & STATUS_NEEDS_RESET != 0;
        if self.active && !broken && usize::from(queue) < self.queues.len() {
            self.device.notify(queue);
        }
    }

    /// The place in the window that the access capability points to, if it is a valid one.
    fn access_target(&self) -> Option<(u64, usize)> {
        let mut fields = [0; 16];
        self.space.read(self.access, &mut fields);
        let bar = fields[4];
        let field = |at: usize| {
            let bytes = [fields[at], fields[at + 1], fields[at + 2], fields[at + 3]];
            u32::from_le_bytes(bytes)
        };
        let (offset, length) = (u64::from(field(8)), field(12));
        let valid = bar == BAR
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(u64::from(length))
            && offset < BAR_LENGTH;
        valid.then_some((offset, length as usize))
    }

    fn follow_controls(&self) {
        let control = self.space.word(self.msix + 2);
        self.notifier
            .set_controls(self.space.intx_disabled(), control);
    }
}

/// Adds a virtio capability (virtio 1.2, 4.1.4): type, window, place, and what comes after.
fn add_structure(
    space: &mut ConfigSpace,
    structure: Structure,
    region: Region,
    tail: &[u8],
    writable: &[u8],
) -> u16 {
    let mut body = vec![16 + tail.len() as u8, structure as u8, BAR, 0, 0, 0];
    body.extend((region.start as u32).to_le_bytes());
    body.extend((region.length as u32).to_le_bytes());
    body.extend(tail);
    space.add_capability(CAPABILITY_VENDOR, &body, writable)
}

impl Function for VirtioPci {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        let status = register::STATUS..register::STATUS + 2;
        let end = offset + data.len() as u16;
        if offset < status.end && end > status.start {
            self.space
                .set_interrupt_status(self.notifier.intx_pending());
        }
        let window = self.access + 16;
        if offset == window
            && let Some((at, length)) = self.access_target()
        {
            let mut bytes = [0; 4];
            self.bar_read(BAR, at, &mut bytes[..length]);
            self.space.write(window, &bytes);
        }
        self.space.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.space.write(offset, data);
        let window = self.access + 16;
        if offset == window
            && let Some((at, length)) = self.access_target()
        {
            let mut bytes = [0; 4];
            self.space.read(window, &mut bytes);
            self.bar_write(BAR, at, &bytes[..length]);
        }
        let control = self.msix + 2;
        if offset <= register::COMMAND + 1 || (control - 2..control + 2).contains(&offset) {
            self.follow_controls();
        }
    }

    fn windows(&self) -> Vec<Window> {
        self.space.windows()
    }

    fn bar_read(&mut self, _bar: u8, offset: u64, data: &mut [u8]) {
        if let Some(at) = COMMON.offset(offset) {
            self.common_read(at, data);
        } else if let Some(at) = ISR.offset(offset) {
            if at == 0
                && let Some(byte) = data.first_mut()
            {
                *byte = self.notifier.take_isr();
            }
        } else if let Some(at) = DEVICE_CONFIG.offset(offset) {
            self.device.config_read(at, data);
        } else if let Some(at) = MSIX_TABLE.offset(offset) {
            self.notifier.msix().table_read(at, data);
        } else if let Some(at) = MSIX_PBA.offset(offset) {
            self.notifier.msix().pba_read(at, data);
        }
    }

    fn bar_write(&mut self, _bar: u8, offset: u64, data: &[u8]) {
        if let Some(at) = DOORBELLS.offset(offset) {
            self.ring_doorbell(at);
        } else if let Some(at) = COMMON.offset(offset) {
            self.common_write(at, data);
        } else if let Some(at) = DEVICE_CONFIG.offset(offset) {
            self.device.config_write(at, data);
        } else if let Some(at) = MSIX_TABLE.offset(offset) {
            self.notifier.msix_write(at, data);
        }
    }

    fn is_doorbell(&self, _bar: u8, offset: u64) -> bool {
        DOORBELLS.offset(offset).is_some_and(|at| {
            at.is_multiple_of(DOORBELL_STRIDE.into())
                && at / u64::from(DOORBELL_STRIDE) < self.queues.len() as u64
        })
    }

    fn reset(&mut self) {
        self.reset_device();
        self.notifier.reset_function();
        self.space.reset();
    }

    fn pause(&mut self) {
        self.device.pause();
    }

    fn resume(&mut self) {
        self.device.resume();
    }

    fn save(&mut self) -> SavedFunction {
        self.saved()
    }

    fn restore(&mut self, saved: &SavedFunction) -> Result<(), StateError> {
        self.take_state(saved)
    }
}

#[cfg(test)]
mod tests;
