//! The i8042 keyboard controller with a keyboard and a PS/2 mouse (IBM PS/2 Hardware Interface
//! Technical Reference, keyboard and auxiliary device controller), and system control port A.

mod saved;

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

pub use saved::{DeviceState, I8042State};

/// Bytes a device holds for the controller. What comes when it is full is dropped, as a keyboard does.
const QUEUE: usize = 32;

const STATUS_OUTPUT: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;
const STATUS_AUX: u8 = 0x20;

const CONTROL_KEYBOARD_INTERRUPT: u8 = 0x01;
const CONTROL_AUX_INTERRUPT: u8 = 0x02;
const CONTROL_SYSTEM: u8 = 0x04;
const CONTROL_KEYBOARD_OFF: u8 = 0x10;
const CONTROL_AUX_OFF: u8 = 0x20;
const CONTROL_TRANSLATE: u8 = 0x40;

const ACKNOWLEDGE: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;

/// Output port: bit 0 is the reset line (active low), bit 1 is A20, 4 and 5 the interrupt lines.
const OUTPUT_NOT_RESET: u8 = 0x01;
const OUTPUT_A20: u8 = 0x02;

/// Set 2 make codes to set 1, for codes 0 to 0x7f. 0xff has no key.
const TRANSLATION: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59,
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b,
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d,
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f,
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61,
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76,
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f,
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];

/// Set 2's code for F7 lies outside of the table.
const SET_2_F7: u8 = 0x83;
const SET_1_F7: u8 = 0x41;
/// And so does that of Alt+SysRq.
const SET_2_SYSRQ: u8 = 0x84;
const SET_1_SYSRQ: u8 = 0x54;

fn translate(code: u8) -> u8 {
    match code {
        SET_2_F7 => SET_1_F7,
        SET_2_SYSRQ => SET_1_SYSRQ,
        _ => TRANSLATION.get(usize::from(code)).copied().unwrap_or(code),
    }
}

/// The set 2 code of a set 1 make code.
fn set_2_of(code: u8) -> Option<u8> {
    match code {
        SET_1_F7 => Some(SET_2_F7),
        SET_1_SYSRQ => Some(SET_2_SYSRQ),
        _ => TRANSLATION
            .iter()
            .position(|&set_1| set_1 == code && code < 0x80)
            .map(|set_2| set_2 as u8),
    }
}

/// Where the byte in the output buffer comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Keyboard or controller.
    Keyboard,
    /// Mouse.
    Aux,
}

/// A device that waits for the second byte of a command.
#[derive(Clone, Debug, Default)]
struct Device {
    queue: VecDeque<u8>,
    parameter_of: Option<u8>,
    reporting: bool,
}

impl Device {
    fn send(&mut self, bytes: &[u8]) {
        if self.queue.len() + bytes.len() <= QUEUE {
            self.queue.extend(bytes);
        }
    }
}

/// The controller and its two devices.
#[derive(Clone, Debug)]
pub struct I8042 {
    control: u8,
    memory: [u8; 32],
    output_port: u8,
    output: Option<(u8, Source)>,
    /// Bytes the controller itself answers with.
    answers: VecDeque<(u8, Source)>,
    /// A controller command that waits for its data byte.
    command: Option<u8>,
    last_was_command: bool,
    keyboard: Device,
    scan_set: u8,
    /// The keyboard's last byte was a break prefix, to be translated with the next.
    breaking: bool,
    leds: u8,
    mouse: Device,
    mouse_resolution: u8,
    mouse_rate: u8,
    mouse_scaled: bool,
}

impl Default for I8042 {
    fn default() -> Self {
        Self::new()
    }
}

impl I8042 {
    /// As firmware leaves it: keyboard interrupt on, translated to set 1, mouse off, A20 on.
    pub fn new() -> Self {
        Self {
            control: CONTROL_KEYBOARD_INTERRUPT
                | CONTROL_SYSTEM
                | CONTROL_TRANSLATE
                | CONTROL_AUX_OFF,
            memory: [0; 32],
            output_port: 0xcc | OUTPUT_NOT_RESET | OUTPUT_A20,
            output: None,
            answers: VecDeque::new(),
            command: None,
            last_was_command: false,
            keyboard: Device {
                reporting: true,
                ..Device::default()
            },
            scan_set: 2,
            breaking: false,
            leds: 0,
            mouse: Device::default(),
            mouse_resolution: 2,
            mouse_rate: 100,
            mouse_scaled: false,
        }
    }

    /// The level of the keyboard's interrupt line.
    pub fn keyboard_interrupt(&self) -> bool {
        self.control & CONTROL_KEYBOARD_INTERRUPT != 0
            && matches!(self.output, Some((_, Source::Keyboard)))
    }

    /// The level of the mouse's interrupt line.
    pub fn mouse_interrupt(&self) -> bool {
        self.control & CONTROL_AUX_INTERRUPT != 0 && matches!(self.output, Some((_, Source::Aux)))
    }

    /// Keyboard LEDs as last set: scroll lock, num lock, caps lock from bit 0.
    pub fn leds(&self) -> u8 {
        self.leds
    }

    /// Whether A20 is passed. Nothing masks it here whatever the guest says; x86-64 has no use for
    /// the wrap at 1 MiB.
    pub fn a20(&self) -> bool {
        self.output_port & OUTPUT_A20 != 0
    }

    /// Presses or releases a key by its set 1 make code, 0xe0xx for extended keys. Codes no keyboard
    /// has are dropped, and so is all while the guest told the keyboard to be silent.
    pub fn key(&mut self, scancode: u16, pressed: bool) {
        let code = scancode as u8;
        let Some(set_2) = set_2_of(code).filter(|_| self.keyboard.reporting) else {
            return;
        };
        let mut bytes = Vec::with_capacity(3);
        if scancode >> 8 == 0xe0 {
            bytes.push(0xe0);
        }
        match (self.scan_set, pressed) {
            (1, true) => bytes.push(code),
            (1, false) => bytes.push(code | 0x80),
            (_, true) => bytes.push(set_2),
            (_, false) => bytes.extend([0xf0, set_2]),
        }
        self.keyboard.send(&bytes);
        self.fill();
    }

    /// Moves the next byte into the output buffer if that is empty.
    fn fill(&mut self) {
        if self.output.is_some() {
            return;
        }
        if let Some(answer) = self.answers.pop_front() {
            self.output = Some(answer);
            return;
        }
        if self.control & CONTROL_KEYBOARD_OFF == 0 {
            while let Some(byte) = self.keyboard.queue.pop_front() {
                if let Some(byte) = self.translated(byte) {
                    self.output = Some((byte, Source::Keyboard));
                    return;
                }
            }
        }
        if self.control & CONTROL_AUX_OFF == 0
            && let Some(byte) = self.mouse.queue.pop_front()
        {
            self.output = Some((byte, Source::Aux));
        }
    }

    /// Translates a byte of the keyboard, or keeps it for the next.
    fn translated(&mut self, byte: u8) -> Option<u8> {
        if self.control & CONTROL_TRANSLATE == 0 {
            return Some(byte);
        }
        if byte == 0xf0 {
            self.breaking = true;
            return None;
        }
        let released = if std::mem::take(&mut self.breaking) {
            0x80
        } else {
            0
        };
        Some(translate(byte) | released)
    }

    fn answer(&mut self, byte: u8, source: Source) {
        if self.answers.len() < QUEUE {
            self.answers.push_back((byte, source));
        }
    }

    /// Reads port 0x60. The interrupt lines fall with it and may rise again for the next byte.
    pub fn read_data(&mut self) -> u8 {
        let byte = self.output.take().map_or(0, |(byte, _)| byte);
        self.fill();
        byte
    }

    /// Reads port 0x64.
    pub fn read_status(&self) -> u8 {
        let output = match self.output {
            None => 0,
            Some((_, Source::Keyboard)) => STATUS_OUTPUT,
            Some((_, Source::Aux)) => STATUS_OUTPUT | STATUS_AUX,
        };
        let command = if self.last_was_command {
            STATUS_COMMAND
        } else {
            0
        };
        let system = if self.control & CONTROL_SYSTEM != 0 {
            STATUS_SYSTEM
        } else {
            0
        };
        output | command | system | STATUS_UNLOCKED
    }

    /// Writes port 0x64; whether that resets the machine.
    pub fn write_command(&mut self, command: u8) -> bool {
        self.last_was_command = true;
        self.command = None;
        match command {
            0x20 => self.answer(self.control, Source::Keyboard),
            0x21..=0x3f => self.answer(self.memory[usize::from(command & 0x1f)], Source::Keyboard),
            0x60..=0x7f | 0xd1..=0xd4 => self.command = Some(command),
            0xa7 => self.control |= CONTROL_AUX_OFF,
            0xa8 => self.control &= !CONTROL_AUX_OFF,
            // Interface tests: nothing is stuck.
            0xa9 | 0xab => self.answer(0x00, Source::Keyboard),
            0xaa => {
                self.control |= CONTROL_SYSTEM;
                self.answer(0x55, Source::Keyboard);
            }
            0xad => self.control |= CONTROL_KEYBOARD_OFF,
            0xae => self.control &= !CONTROL_KEYBOARD_OFF,
            // Input port: keyboard not locked, no manufacturing jumper.
            0xc0 => self.answer(0xbf, Source::Keyboard),
            0xd0 => self.answer(self.output_port, Source::Keyboard),
            // Pulses the output port's bits that are zero; bit 0 is reset.
            0xf0..=0xff => return command & OUTPUT_NOT_RESET == 0,
            _ => {}
        }
        self.fill();
        false
    }

    /// Writes port 0x60; whether that resets the machine.
    pub fn write_data(&mut self, value: u8) -> bool {
        self.last_was_command = false;
        let mut reset = false;
        match self.command.take() {
            Some(0x60) => self.control = value & 0x77,
            Some(command @ 0x61..=0x7f) => self.memory[usize::from(command & 0x1f)] = value,
            Some(0xd1) => {
                reset = value & OUTPUT_NOT_RESET == 0;
                self.output_port = value | OUTPUT_NOT_RESET;
            }
            Some(0xd2) => self.answer(value, Source::Keyboard),
            Some(0xd3) => self.answer(value, Source::Aux),
            Some(0xd4) => {
                self.control &= !CONTROL_AUX_OFF;
                self.command_mouse(value);
            }
            _ => {
                // A byte for the keyboard turns its interface on.
                self.control &= !CONTROL_KEYBOARD_OFF;
                self.command_keyboard(value);
            }
        }
        self.fill();
        reset
    }

    fn command_keyboard(&mut self, value: u8) {
        match (self.keyboard.parameter_of.take(), value) {
            (Some(0xed), _) => {
                self.leds = value & 7;
                self.keyboard.send(&[ACKNOWLEDGE]);
            }
            (Some(0xf0), 0) => self.keyboard.send(&[ACKNOWLEDGE, self.scan_set]),
            (Some(0xf0), 1 | 2) => {
                self.scan_set = value;
                self.keyboard.send(&[ACKNOWLEDGE]);
            }
            (Some(0xf0), _) => self.keyboard.send(&[RESEND]),
            (Some(_), _) => self.keyboard.send(&[ACKNOWLEDGE]),
            (None, 0xed | 0xf0 | 0xf3) => {
                self.keyboard.parameter_of = Some(value);
                self.keyboard.send(&[ACKNOWLEDGE]);
            }
            (None, 0xee) => self.keyboard.send(&[0xee]),
            (None, 0xf2) => self.keyboard.send(&[ACKNOWLEDGE, 0xab, 0x83]),
            (None, 0xf4) => {
                self.keyboard.reporting = true;
                self.keyboard.send(&[ACKNOWLEDGE]);
            }
            (None, 0xf5) => {
                self.keyboard.queue.clear();
                self.keyboard.reporting = false;
                self.scan_set = 2;
                self.keyboard.send(&[ACKNOWLEDGE]);
            }
            (None, 0xf6) => {
                self.scan_set = 2;
                self.keyboard.send(&[ACKNOWLEDGE]);
            }
            (None, 0xf7..=0xfd) => self.keyboard.send(&[ACKNOWLEDGE]),
            (None, 0xff) => {
                self.keyboard.queue.clear();
                self.keyboard.reporting = true;
                self.scan_set = 2;
                self.leds = 0;
                self.keyboard.send(&[ACKNOWLEDGE, SELF_TEST_PASSED]);
            }
            (None, _) => self.keyboard.send(&[RESEND]),
        }
    }

    fn command_mouse(&mut self, value: u8) {
        match (self.mouse.parameter_of.take(), value) {
            (Some(0xe8), _) => {
                self.mouse_resolution = value;
                self.mouse.send(&[ACKNOWLEDGE]);
            }
            (Some(_), _) => {
                self.mouse_rate = value;
                self.mouse.send(&[ACKNOWLEDGE]);
            }
            (None, 0xe8 | 0xf3) => {
                self.mouse.parameter_of = Some(value);
                self.mouse.send(&[ACKNOWLEDGE]);
            }
            (None, 0xe6 | 0xe7) => {
                self.mouse_scaled = value == 0xe7;
                self.mouse.send(&[ACKNOWLEDGE]);
            }
            (None, 0xe9) => {
                let status = u8::from(self.mouse.reporting) << 5 | u8::from(self.mouse_scaled) << 4;
                self.mouse
                    .send(&[ACKNOWLEDGE, status, self.mouse_resolution, self.mouse_rate]);
            }
            // Remote read: it does not move.
            (None, 0xeb) => self.mouse.send(&[ACKNOWLEDGE, 0x08, 0, 0]),
            (None, 0xf2) => self.mouse.send(&[ACKNOWLEDGE, 0x00]),
            (None, 0xea | 0xec | 0xee | 0xf0) => self.mouse.send(&[ACKNOWLEDGE]),
            (None, 0xf4 | 0xf5) => {
                self.mouse.reporting = value == 0xf4;
                self.mouse.send(&[ACKNOWLEDGE]);
            }
            (None, 0xf6 | 0xff) => {
                self.mouse.queue.clear();
                self.mouse.reporting = false;
                self.mouse_resolution = 2;
                self.mouse_rate = 100;
                self.mouse_scaled = false;
                self.mouse.send(if value == 0xff {
                    &[ACKNOWLEDGE, SELF_TEST_PASSED, 0x00]
                } else {
                    &[ACKNOWLEDGE]
                });
            }
            (None, _) => self.mouse.send(&[RESEND]),
        }
    }

    /// Reads port 0x92.
    pub fn read_control_a(&self) -> u8 {
        self.output_port & OUTPUT_A20
    }

    /// Writes port 0x92; whether that resets the machine.
    pub fn write_control_a(&mut self, value: u8) -> bool {
        self.output_port = self.output_port & !OUTPUT_A20 | value & OUTPUT_A20;
        value & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(controller: &mut I8042) -> Vec<u8> {
        let mut bytes = Vec::new();
        while controller.read_status() & STATUS_OUTPUT != 0 {
            bytes.push(controller.read_data());
        }
        bytes
    }

    fn command(controller: &mut I8042, command: u8) -> Vec<u8> {
        controller.write_command(command);
        drain(controller)
    }

    fn keyboard(controller: &mut I8042, byte: u8) -> Vec<u8> {
        controller.write_data(byte);
        drain(controller)
    }

    fn mouse(controller: &mut I8042, byte: u8) -> Vec<u8> {
        controller.write_command(0xd4);
        controller.write_data(byte);
        drain(controller)
    }

    #[test]
    fn self_test_and_interface_tests_pass() {
        let mut controller = I8042::new();
        assert_eq!(command(&mut controller, 0xaa), [0x55]);
        assert_eq!(command(&mut controller, 0xab), [0x00]);
        assert_eq!(command(&mut controller, 0xa9), [0x00]);
    }

    #[test]
    fn control_byte_reads_back() {
        let mut controller = I8042::new();
        controller.write_command(0x60);
        controller.write_data(0x47);
        assert_eq!(command(&mut controller, 0x20), [0x47]);
    }

    /// Linux finds out so whether there is a mouse port (i8042_check_aux).
    #[test]
    fn aux_loopback_byte_comes_back_marked_as_the_mouses() {
        let mut controller = I8042::new();
        controller.write_command(0xd3);
        controller.write_data(0x5a);
        assert_eq!(
            controller.read_status() & (STATUS_AUX | STATUS_OUTPUT),
            STATUS_AUX | STATUS_OUTPUT
        );
        assert_eq!(drain(&mut controller), [0x5a]);
    }

    #[test]
    fn aux_off_and_on_show_in_the_control_byte() {
        let mut controller = I8042::new();
        controller.write_command(0xa8);
        assert_eq!(command(&mut controller, 0x20)[0] & 0x20, 0);
        controller.write_command(0xa7);
        assert_eq!(command(&mut controller, 0x20)[0] & 0x20, 0x20);
    }

    #[test]
    fn reset_line_is_pulsed_by_even_pulse_commands() {
        let mut controller = I8042::new();
        assert!(controller.write_command(0xfe));
        assert!(!controller.write_command(0xff));
    }

    #[test]
    fn output_port_bit_0_low_resets() {
        let mut controller = I8042::new();
        controller.write_command(0xd1);
        assert!(!controller.write_data(0xdf));
        controller.write_command(0xd1);
        assert!(controller.write_data(0xde));
    }

    #[test]
    fn keyboard_identifies_itself_in_the_controllers_translation() {
        let mut controller = I8042::new();
        assert_eq!(keyboard(&mut controller, 0xf2), [0xfa, 0xab, 0x41]);
        controller.write_command(0x60);
        controller.write_data(0x05);
        assert_eq!(keyboard(&mut controller, 0xf2), [0xfa, 0xab, 0x83]);
    }

    #[test]
    fn keyboard_reset_ends_with_the_self_test() {
        let mut controller = I8042::new();
        assert_eq!(keyboard(&mut controller, 0xff), [0xfa, 0xaa]);
        assert_eq!(keyboard(&mut controller, 0xee), [0xee]);
    }

    #[test]
    fn leds_take_a_parameter() {
        let mut controller = I8042::new();
        assert_eq!(keyboard(&mut controller, 0xed), [0xfa]);
        assert_eq!(keyboard(&mut controller, 0x02), [0xfa]);
        assert_eq!(controller.leds(), 2);
    }

    #[test]
    fn key_arrives_translated_to_set_1() {
        let mut controller = I8042::new();
        controller.key(0x1e, true);
        controller.key(0x1e, false);
        assert_eq!(drain(&mut controller), [0x1e, 0x9e]);
    }

    #[test]
    fn extended_key_keeps_its_prefix() {
        let mut controller = I8042::new();
        controller.key(0xe048, true);
        controller.key(0xe048, false);
        assert_eq!(drain(&mut controller), [0xe0, 0x48, 0xe0, 0xc8]);
    }

    #[test]
    fn key_arrives_in_set_2_without_translation() {
        let mut controller = I8042::new();
        controller.write_command(0x60);
        controller.write_data(0x05);
        controller.key(0x1e, true);
        controller.key(0x1e, false);
        controller.key(0x41, true);
        assert_eq!(drain(&mut controller), [0x1c, 0xf0, 0x1c, 0x83]);
    }

    #[test]
    fn key_arrives_in_set_1_when_the_keyboard_speaks_it() {
        let mut controller = I8042::new();
        controller.write_command(0x60);
        controller.write_data(0x05);
        keyboard(&mut controller, 0xf0);
        keyboard(&mut controller, 0x01);
        controller.key(0xe01d, true);
        controller.key(0xe01d, false);
        assert_eq!(drain(&mut controller), [0xe0, 0x1d, 0xe0, 0x9d]);
    }

    #[test]
    fn every_key_survives_the_way_through_set_2() {
        for code in (1..0x80u8).filter(|&code| code != 0x54) {
            let set_2 = set_2_of(code).unwrap();
            assert_eq!(translate(set_2), code);
        }
    }

    #[test]
    fn keyboard_interrupt_is_high_while_its_byte_waits() {
        let mut controller = I8042::new();
        assert!(!controller.keyboard_interrupt());
        controller.key(0x1e, true);
        assert!(controller.keyboard_interrupt() && !controller.mouse_interrupt());
        controller.read_data();
        assert!(!controller.keyboard_interrupt());
    }

    #[test]
    fn disabled_keyboard_keeps_its_bytes() {
        let mut controller = I8042::new();
        controller.write_command(0xad);
        controller.key(0x1e, true);
        assert_eq!(drain(&mut controller), []);
        controller.write_command(0xae);
        assert_eq!(drain(&mut controller), [0x1e]);
    }

    #[test]
    fn mouse_resets_and_identifies_itself() {
        let mut controller = I8042::new();
        controller.write_command(0xa8);
        assert_eq!(mouse(&mut controller, 0xff), [0xfa, 0xaa, 0x00]);
        assert_eq!(mouse(&mut controller, 0xf2), [0xfa, 0x00]);
        assert_eq!(mouse(&mut controller, 0xe9), [0xfa, 0x00, 0x02, 100]);
    }

    #[test]
    fn mouse_byte_raises_its_own_interrupt() {
        let mut controller = I8042::new();
        controller.write_command(0x60);
        controller.write_data(0x47);
        controller.write_command(0xd4);
        controller.write_data(0xf4);
        assert!(controller.mouse_interrupt() && !controller.keyboard_interrupt());
    }

    #[test]
    fn keys_nobody_reads_do_not_pile_up() {
        let mut controller = I8042::new();
        for _ in 0..1000 {
            controller.key(0x1e, true);
        }
        assert!(drain(&mut controller).len() <= QUEUE + 1);
    }

    #[test]
    fn port_a_switches_a20_and_resets() {
        let mut controller = I8042::new();
        assert!(!controller.write_control_a(0));
        assert_eq!(controller.read_control_a(), 0);
        assert!(!controller.a20());
        assert!(controller.write_control_a(3));
        assert!(controller.a20());
    }
}
