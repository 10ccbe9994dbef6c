//! The saved state of a virtio function: the transport's registers, and the device's state.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use trapgate_pci::{ConfigSpaceState, MsixState, SavedFunction, StateError};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::{QueueRegisters, STATUS_DRIVER_OK, STATUS_FEATURES_OK, STATUS_NEEDS_RESET, VirtioPci};
use crate::queue::Rings;
use crate::{Activation, DeviceState, QueuePosition, SavedDevice};

/// Version of [`FunctionState`] and of the states of devices.
const VERSION: u32 = 1;

/// A queue's registers, and how far the device has come in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueState {
    rings: Rings,
    enabled: bool,
    position: Option<QueuePosition>,
}

/// How the device reaches its driver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NotifierState {
    pub(crate) msix: MsixState,
    pub(crate) config_vector: u16,
    pub(crate) queue_vectors: Vec<u16>,
    pub(crate) isr: u8,
    pub(crate) status: u8,
    pub(crate) generation: u8,
}

/// All of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FunctionState {
    config: ConfigSpaceState,
    notifier: NotifierState,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueState>,
    active: bool,
    device: DeviceState,
}

impl VirtioPci {
    fn kind(&self) -> &'static str {
        self.device.device_type().name()
    }

    pub(super) fn saved(&mut self) -> SavedFunction {
        let kind = self.kind();
        // The status register is brought up to date when it is read.
        self.space
            .set_interrupt_status(self.notifier.intx_pending());
        let Self {
            device,
            // The machine's.
            memory: _,
            notifier,
            space,
            // Where capabilities lie, which is always the same.
            msix: _,
            access: _,
            device_feature_select,
            driver_feature_select,
            driver_features,
            queue_select,
            queues,
            active,
        } = self;
        let SavedDevice {
            queues: mut positions,
            state: device,
        } = device.save();
        let notifier = notifier.save();
        if notifier.status & STATUS_NEEDS_RESET != 0 {
            // What is left of its queues is of no use before the driver has reset it.
            positions.fill(None);
        }
        let queue = |(registers, position): (&QueueRegisters, Option<QueuePosition>)| {
            let QueueRegisters {
                max_size: _,
                rings,
                enabled,
            } = *registers;
            QueueState {
                rings,
                enabled,
                position,
            }
        };
        let state = FunctionState {
            config: space.save(),
            notifier,
            device_feature_select: *device_feature_select,
            driver_feature_select: *driver_feature_select,
            driver_features: *driver_features,
            queue_select: *queue_select,
            queues: queues.iter().zip(positions).map(queue).collect(),
            active: *active,
            device,
        };
        SavedFunction::new(kind, VERSION, &state)
    }

    pub(super) fn take_state(&mut self, saved: &SavedFunction) -> Result<(), StateError> {
        let kind = self.kind();
        let FunctionState {
            config,
            notifier,
            device_feature_select,
            driver_feature_select,
            driver_features,
            queue_select,
            queues,
            active,
            device,
        } = saved.read(kind, VERSION)?;
        let status = notifier.status;
        let count = queues.len();
        let what = "the number of queues";
        StateError::check(count == self.queues.len(), kind, what, count as u64)?;
        let running = STATUS_FEATURES_OK | STATUS_DRIVER_OK;
        let what = "the status of an active device";
        StateError::check(!active || status & running == running, kind, what, status)?;

        self.space = self.space.restored(&config, kind)?;
        self.device_feature_select = device_feature_select;
        self.driver_feature_select = driver_feature_select;
        self.driver_features = driver_features;
        self.queue_select = queue_select;
        self.active = active;
        let usable = active && status & STATUS_NEEDS_RESET == 0;
        let mut positioned = Vec::new();
        for (index, (registers, queue)) in (0u16..).zip(self.queues.iter_mut().zip(queues)) {
            let QueueState {
                rings,
                enabled,
                position,
            } = queue;
            registers.rings = rings;
            registers.enabled = enabled;
            let what = "a queue that works although it is off";
            StateError::check(position.is_none() || usable && enabled, kind, what, index)?;
            positioned.push(position);
        }
        let mut queues = Vec::new();
        for (index, position) in (0..).zip(positioned) {
            let queue = position.map(|position| {
                let queue = self.queue(index).map_err(|error| StateError::Environment {
                    kind,
                    reason: error.to_string(),
                })?;
                Ok::<_, StateError>(queue.at(position))
            });
            queues.push(queue.transpose()?);
        }
        let activation = usable.then(|| Activation {
            features: driver_features,
            memory: Arc::clone(&self.memory),
            notifier: Arc::clone(&self.notifier),
            queues,
        });
        self.device.restore(&device, activation)?;
        // After the device has said what is different about it, which people understand better.
        let accepted = driver_features & !self.offered() == 0
            && driver_features >> VIRTIO_F_VERSION_1 & 1 != 0;
        let settled = status & STATUS_FEATURES_OK != 0;
        let what = "the features that the driver took";
        StateError::check(accepted || !settled, kind, what, driver_features)?;
        self.notifier.restore(&notifier, kind)?;
        self.follow_controls();
        Ok(())
    }
}
