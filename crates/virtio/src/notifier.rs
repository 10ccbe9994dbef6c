//! How a device reaches its driver: queue and configuration interrupts, and the status bit that
//! asks for a reset.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use trapgate_pci::{InterruptLine, Message, MessageSink, Msix, StateError};
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};

use crate::transport::NotifierState;
use crate::{ProtocolError, lock};

/// The vector that stands for none (virtio 1.2, 4.1.5.1.2).
pub(crate) const NO_VECTOR: u16 = 0xffff;

/// Bits of the ISR status register (virtio 1.2, 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

struct Wiring {
    msix: Msix,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
    /// INTx disable in the command register.
    intx_disabled: bool,
    /// The level last put on the line.
    level: bool,
    failure: Option<ProtocolError>,
}

/// How a device reaches its driver. Shared by the transport and the device's threads.
pub struct Notifier {
    wiring: Mutex<Wiring>,
    status: AtomicU8,
    generation: AtomicU8,
    sink: Arc<dyn MessageSink>,
    line: Arc<dyn InterruptLine>,
}

impl Notifier {
    pub(crate) fn new(
        queues: usize,
        sink: Arc<dyn MessageSink>,
        line: Arc<dyn InterruptLine>,
    ) -> Self {
        // One vector for each queue, and one for configuration changes.
        let vectors = (queues as u16 + 1).min(256);
        Self {
            wiring: Mutex::new(Wiring {
                msix: Msix::new(vectors),
                config_vector: NO_VECTOR,
                queue_vectors: vec![NO_VECTOR; queues],
                isr: 0,
                intx_disabled: false,
                level: false,
                failure: None,
            }),
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            sink,
            line,
        }
    }

    /// Tells the driver that a queue has used buffers. [`Virtqueue::signal`](crate::Virtqueue)
    /// calls this where the driver wants to hear of them.
    pub fn queue_used(&self, queue: u16) {
        let mut wiring = lock(&self.wiring);
        let vector = wiring.queue_vectors.get(usize::from(queue)).copied();
        self.interrupt(&mut wiring, ISR_QUEUE, vector.unwrap_or(NO_VECTOR));
    }

    /// Tells the driver that the device's configuration space has changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.config_interrupt();
    }

    /// Stops the device until its driver resets it (virtio 1.2, 2.1.2), because the driver broke
    /// the protocol. Only the first error is kept.
    pub fn fail(&self, error: ProtocolError) {
        lock(&self.wiring).failure.get_or_insert(error);
        let needs_reset = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
        if self.status.fetch_or(needs_reset, Ordering::AcqRel) & needs_reset == 0 {
            self.config_interrupt();
        }
    }

    /// Why the device needs a reset, if it does.
    pub fn failure(&self) -> Option<ProtocolError> {
        lock(&self.wiring).failure
    }

    fn config_interrupt(&self) {
        // Before DRIVER_OK the device must not send any notification (virtio 1.2, 3.1.1).
        if self.status() & VIRTIO_CONFIG_S_DRIVER_OK as u8 == 0 {
            return;
        }
        let mut wiring = lock(&self.wiring);
        let vector = wiring.config_vector;
        self.interrupt(&mut wiring, ISR_CONFIG, vector);
    }

    // The lock is kept while the sink or the line is called, so that an interrupt never arrives
    // after the driver has masked it, and the line's edges stay in order.
    fn interrupt(&self, wiring: &mut Wiring, cause: u8, vector: u16) {
        if wiring.msix.enabled() {
            if let Some(message) = wiring.msix.signal(vector) {
                self.sink.send(message);
            }
            return;
        }
        wiring.isr |= cause;
        self.drive(wiring);
    }

    fn drive(&self, wiring: &mut Wiring) {
        let level = wiring.isr != 0 && !wiring.intx_disabled && !wiring.msix.enabled();
        if level != wiring.level {
            wiring.level = level;
            self.line.set(level);
        }
    }

    /// The device status register.
    pub(crate) fn status(&self) -> u8 {
        self.status.load(Ordering::Acquire)
    }

    /// Sets bits of the device status register.
    pub(crate) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::AcqRel);
    }

    pub(crate) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Acquire)
    }

    /// Reads the ISR status register, which clears it and releases the line.
    pub(crate) fn take_isr(&self) -> u8 {
        let mut wiring = lock(&self.wiring);
        let isr = std::mem::take(&mut wiring.isr);
        self.drive(&mut wiring);
        isr
    }

    /// Whether INTx is wanted, for the PCI status register.
    pub(crate) fn intx_pending(&self) -> bool {
        lock(&self.wiring).isr != 0
    }

    pub(crate) fn config_vector(&self) -> u16 {
        lock(&self.wiring).config_vector
    }

    pub(crate) fn queue_vector(&self, queue: u16) -> u16 {
        let wiring = lock(&self.wiring);
        let vector = wiring.queue_vectors.get(usize::from(queue));
        vector.copied().unwrap_or(NO_VECTOR)
    }

    /// A vector that the table does not have is refused, which the driver sees when it reads
    /// [`NO_VECTOR`] back (virtio 1.2, 4.1.5.1.2.1).
    pub(crate) fn set_config_vector(&self, vector: u16) {
        let mut wiring = lock(&self.wiring);
        wiring.config_vector = accepted(&wiring.msix, vector);
    }

    pub(crate) fn set_queue_vector(&self, queue: u16, vector: u16) {
        let mut wiring = lock(&self.wiring);
        let vector = accepted(&wiring.msix, vector);
        if let Some(slot) = wiring.queue_vectors.get_mut(usize::from(queue)) {
            *slot = vector;
        }
    }

    /// Follows the command register and MSI-X control.
    pub(crate) fn set_controls(&self, intx_disabled: bool, msix_control: u16) {
        let mut wiring = lock(&self.wiring);
        wiring.intx_disabled = intx_disabled;
        wiring.msix.set_control(msix_control, self.sender());
        self.drive(&mut wiring);
    }

    pub(crate) fn msix_write(&self, offset: u64, data: &[u8]) {
        let mut wiring = lock(&self.wiring);
        wiring.msix.table_write(offset, data, self.sender());
    }

    fn sender(&self) -> impl FnMut(Message) {
        |message| self.sink.send(message)
    }

    /// The MSI-X table, for reading.
    pub(crate) fn msix(&self) -> impl std::ops::Deref<Target = Msix> {
        struct Table<'a>(MutexGuard<'a, Wiring>);
        impl std::ops::Deref for Table<'_> {
            type Target = Msix;
            fn deref(&self) -> &Msix {
                &self.0.msix
            }
        }
        Table(lock(&self.wiring))
    }

    /// Its state.
    pub(crate) fn save(&self) -> NotifierState {
        let Self {
            wiring,
            status,
            generation,
            // The machine's.
            sink: _,
            line: _,
        } = self;
        let wiring = lock(wiring);
        let Wiring {
            msix,
            config_vector,
            queue_vectors,
            isr,
            // Follow from these and from the command register.
            intx_disabled: _,
            level: _,
            // For people; the driver sees it in the status.
            failure: _,
        } = &*wiring;
        NotifierState {
            msix: msix.save(),
            config_vector: *config_vector,
            queue_vectors: queue_vectors.clone(),
            isr: *isr,
            status: status.load(Ordering::Acquire),
            generation: generation.load(Ordering::Acquire),
        }
    }

    /// Takes a state; [`Self::set_controls`] is to come next.
    pub(crate) fn restore(
        &self,
        state: &NotifierState,
        kind: &'static str,
    ) -> Result<(), StateError> {
        let NotifierState {
            msix,
            config_vector,
            queue_vectors,
            isr,
            status,
            generation,
        } = state;
        let mut wiring = lock(&self.wiring);
        let count = queue_vectors.len();
        let what = "the number of queue vectors";
        StateError::check(
            count == wiring.queue_vectors.len(),
            kind,
            what,
            count as u64,
        )?;
        for &vector in queue_vectors.iter().chain([config_vector]) {
            let valid = vector == accepted(&wiring.msix, vector);
            StateError::check(valid, kind, "an interrupt vector", vector)?;
        }
        let valid = isr & !(ISR_QUEUE | ISR_CONFIG) == 0;
        StateError::check(valid, kind, "the ISR status", *isr)?;
        wiring.msix = wiring.msix.restored(msix, kind)?;
        wiring.config_vector = *config_vector;
        wiring.queue_vectors.clone_from(queue_vectors);
        wiring.isr = *isr;
        self.status.store(*status, Ordering::Release);
        self.generation.store(*generation, Ordering::Release);
        Ok(())
    }

    /// The virtio part of a reset; what belongs to PCI stays (virtio 1.2, 4.1.4.3.1).
    pub(crate) fn reset_device(&self) {
        let mut wiring = lock(&self.wiring);
        self.status.store(0, Ordering::Release);
        wiring.config_vector = NO_VECTOR;
        wiring.queue_vectors.fill(NO_VECTOR);
        wiring.isr = 0;
        wiring.failure = None;
        self.drive(&mut wiring);
    }

    /// The PCI part of a reset.
    pub(crate) fn reset_function(&self) {
        let mut wiring = lock(&self.wiring);
        wiring.msix.reset();
        wiring.intx_disabled = false;
        self.drive(&mut wiring);
    }
}

fn accepted(msix: &Msix, vector: u16) -> u16 {
    if vector < msix.vectors() {
        vector
    } else {
        NO_VECTOR
    }
}
