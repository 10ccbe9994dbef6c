//! The saved state of the keyboard controller.

use serde::{Deserialize, Serialize};

use super::{Device, I8042, QUEUE, Source};
use crate::saved::{Check, StateError};

/// Keyboard or mouse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// Bytes for the controller.
    pub queue: Vec<u8>,
    /// The command that waits for its second byte.
    pub parameter_of: Option<u8>,
    /// Keys or movements are reported.
    pub reporting: bool,
}

/// The controller and its devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct I8042State {
    /// Control register (the first byte of memory).
    pub control: u8,
    /// The rest of memory, from index 1.
    #[serde(with = "hex::serde")]
    pub memory: [u8; 32],
    /// Output port.
    pub output_port: u8,
    /// The output buffer.
    pub output: Option<(u8, Source)>,
    /// Bytes the controller itself answers with.
    pub answers: Vec<(u8, Source)>,
    /// A controller command that waits for its data byte.
    pub command: Option<u8>,
    /// The last byte came through the command port.
    pub last_was_command: bool,
    /// The keyboard.
    pub keyboard: DeviceState,
    /// Its scan code set, 1 or 2.
    pub scan_set: u8,
    /// Its last byte was a break prefix.
    pub breaking: bool,
    /// Its LEDs: scroll lock, num lock, caps lock from bit 0.
    pub leds: u8,
    /// The mouse.
    pub mouse: DeviceState,
    /// Its resolution, as set.
    pub mouse_resolution: u8,
    /// Its sampling rate, as set.
    pub mouse_rate: u8,
    /// Its movements are scaled.
    pub mouse_scaled: bool,
}

impl Device {
    fn save(&self) -> DeviceState {
        let Self {
            queue,
            parameter_of,
            reporting,
        } = self;
        DeviceState {
            queue: queue.iter().copied().collect(),
            parameter_of: *parameter_of,
            reporting: *reporting,
        }
    }

    fn restore(state: &DeviceState) -> Result<Self, StateError> {
        let DeviceState {
            queue,
            parameter_of,
            reporting,
        } = state;
        let (length, limit) = (queue.len(), QUEUE);
        Check("i8042").length("a device's queue", length, limit, "32 at most")?;
        Ok(Self {
            queue: queue.iter().copied().collect(),
            parameter_of: *parameter_of,
            reporting: *reporting,
        })
    }
}

impl I8042 {
    /// Its state.
    pub fn save(&self) -> I8042State {
        let Self {
            control,
            memory,
            output_port,
            output,
            answers,
            command,
            last_was_command,
            keyboard,
            scan_set,
            breaking,
            leds,
            mouse,
            mouse_resolution,
            mouse_rate,
            mouse_scaled,
        } = self;
        I8042State {
            control: *control,
            memory: *memory,
            output_port: *output_port,
            output: *output,
            answers: answers.iter().copied().collect(),
            command: *command,
            last_was_command: *last_was_command,
            keyboard: keyboard.save(),
            scan_set: *scan_set,
            breaking: *breaking,
            leds: *leds,
            mouse: mouse.save(),
            mouse_resolution: *mouse_resolution,
            mouse_rate: *mouse_rate,
            mouse_scaled: *mouse_scaled,
        }
    }

    /// The controller in a state.
    ///
    /// # Errors
    /// For a state that it can't be in.
    pub fn restore(state: &I8042State) -> Result<Self, StateError> {
        let I8042State {
            control,
            memory,
            output_port,
            output,
            answers,
            command,
            last_was_command,
            keyboard,
            scan_set,
            breaking,
            leds,
            mouse,
            mouse_resolution,
            mouse_rate,
            mouse_scaled,
        } = state;
        let check = Check("i8042");
        check.bits("control", *control, 0x77u8)?;
        check.that(matches!(scan_set, 1 | 2), "scan_set", *scan_set)?;
        check.bits("leds", *leds, 7u8)?;
        check.length("answers", answers.len(), QUEUE, "32 at most")?;
        Ok(Self {
            control: *control,
            memory: *memory,
            output_port: *output_port,
            output: *output,
            answers: answers.iter().copied().collect(),
            command: *command,
            last_was_command: *last_was_command,
            keyboard: Device::restore(keyboard)?,
            scan_set: *scan_set,
            breaking: *breaking,
            leds: *leds,
            mouse: Device::restore(mouse)?,
            mouse_resolution: *mouse_resolution,
            mouse_rate: *mouse_rate,
            mouse_scaled: *mouse_scaled,
        })
    }
}
