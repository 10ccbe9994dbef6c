//! The ports, and the devices that are nowhere else: serial ports, keyboard, buttons.

use super::{Chipset, source};
use crate::effects::{PowerRequest, ResetCause};
use crate::map;

const RESET_CPU: u8 = 1 << 2;

impl Chipset {
    fn reset_if(&mut self, reset: bool, cause: ResetCause) {
        if reset {
            self.request_power(PowerRequest::Reset(cause));
        }
    }

    /// Reads `size` (1, 2 or 4) bytes from ports; `None` where nothing answers (all ones, then).
    /// Every device is a byte wide: a wider access is split as the ISA bus does.
    pub fn port_read(&mut self, port: u16, size: u8, now: u64) -> Option<u32> {
        let now = self.clock(now);
        if is_pci_configuration(port, size) {
            return None;
        }
        let mut claimed = false;
        let mut value = 0;
        for byte in 0..size.min(4) {
            let read = self.read_byte(port.wrapping_add(byte.into()), now);
            claimed |= read.is_some();
            value |= u32::from(read.unwrap_or(0xff)) << (8 * byte);
        }
        claimed.then_some(value)
    }

    /// Writes `size` (1, 2 or 4) bytes to ports; whether something took it.
    pub fn port_write(&mut self, port: u16, size: u8, value: u32, now: u64) -> bool {
        let now = self.clock(now);
        if is_pci_configuration(port, size) {
            return false;
        }
        if port == map::DEBUG_EXIT_PORT {
            self.request_power(PowerRequest::Exit(value << 1 | 1));
            return true;
        }
        let mut claimed = false;
        for byte in 0..size.min(4) {
            claimed |= self.write_byte(
                port.wrapping_add(byte.into()),
                (value >> (8 * byte)) as u8,
                now,
            );
        }
        claimed
    }

    /// The serial port at `port`, and the register.
    fn serial_at(&self, port: u16) -> Option<(usize, u8)> {
        let index = map::SERIAL_PORTS
            .iter()
            .position(|&first| port & !7 == first)?;
        (index == 0 || self.config.com2).then_some((index, (port & 7) as u8))
    }

    fn read_byte(&mut self, port: u16, now: u64) -> Option<u8> {
        Some(match port {
            0x20 | 0x21 | 0xa0 | 0xa1 => {
                self.settle_timers(now);
                let value = self.pic.read(port);
                // A poll acknowledges.
                self.pic_output_changed();
                value
            }
            0x4d0 | 0x4d1 => self.pic.read_elcr(port),
            0x40..=0x43 => {
                self.settle_pit(now);
                self.pit.read(port, now)
            }
            map::SYSTEM_CONTROL_B_PORT => {
                self.settle_pit(now);
                self.pit.read_control_b(now)
            }
            0x70 | 0x71 => {
                let value = self.rtc.read(port, now);
                self.settle_rtc(now);
                value
            }
            map::I8042_DATA_PORT => {
                let value = self.i8042.read_data();
                self.set_share(map::KEYBOARD_GSI, source::DEVICE, false);
                self.set_share(map::MOUSE_GSI, source::DEVICE, false);
                self.settle_i8042();
                value
            }
            map::I8042_COMMAND_PORT => self.i8042.read_status(),
            map::SYSTEM_CONTROL_A_PORT => self.i8042.read_control_a(),
            map::PM_BASE..map::PM_END => {
                let value = self.pm.read(port - map::PM_BASE, now);
                self.settle_pm(now);
                value
            }
            map::RESET_PORT => self.reset_control,
            map::POST_PORT => self.post_code,
            map::DEBUG_CONSOLE_PORT => map::DEBUG_CONSOLE_PORT as u8,
            map::DEBUG_EXIT_PORT => 0,
            _ => {
                let (index, register) = self.serial_at(port)?;
                let value = self.serial[index].read(register);
                if self.serial[index].take_room() {
                    self.effects.serial_room[index] = true;
                    self.has_effects = true;
                }
                self.settle_serial(index);
                value
            }
        })
    }

    fn write_byte(&mut self, port: u16, value: u8, now: u64) -> bool {
        match port {
            0x20 | 0x21 | 0xa0 | 0xa1 | 0x4d0 | 0x4d1 => {
                // An edge on a masked input is kept, so it must be there when the mask goes.
                self.settle_timers(now);
                if port < 0x4d0 {
                    self.pic.write(port, value);
                } else {
                    self.pic.write_elcr(port, value);
                }
                self.pic_output_changed();
            }
            0x40..=0x43 => {
                self.settle_pit(now);
                self.pit.write(port, value, now);
                self.settle_pit(now);
            }
            map::SYSTEM_CONTROL_B_PORT => {
                self.settle_pit(now);
                self.pit.write_control_b(value, now);
            }
            0x70 | 0x71 => {
                self.rtc.write(port, value, now);
                self.settle_rtc(now);
            }
            map::I8042_DATA_PORT | map::I8042_COMMAND_PORT => {
                let reset = if port == map::I8042_DATA_PORT {
                    self.i8042.write_data(value)
                } else {
                    self.i8042.write_command(value)
                };
                self.reset_if(reset, ResetCause::KeyboardController);
                self.settle_i8042();
            }
            map::SYSTEM_CONTROL_A_PORT => {
                let reset = self.i8042.write_control_a(value);
                self.reset_if(reset, ResetCause::FastReset);
            }
            map::PM_BASE..map::PM_END => {
                if self.pm.write(port - map::PM_BASE, value, now) {
                    self.request_power(PowerRequest::Off);
                }
                self.settle_pm(now);
            }
            map::RESET_PORT => {
                let rose = value & !self.reset_control & RESET_CPU != 0;
                self.reset_control = value & 0x0e;
                self.reset_if(rose, ResetCause::ResetControl);
            }
            map::POST_PORT => self.post_code = value,
            map::DEBUG_CONSOLE_PORT => {
                self.effects.debug.push(value);
                self.has_effects = true;
            }
            _ => {
                let Some((index, register)) = self.serial_at(port) else {
                    return false;
                };
                self.write_serial(index, register, value);
            }
        }
        true
    }

    // Serial ports, keyboard, buttons

    fn write_serial(&mut self, index: usize, register: u8, value: u8) {
        let written = self.serial[index].write(register, value);
        if let Some(byte) = written.sent {
            self.effects.serial[index].push(byte);
            self.has_effects = true;
        }
        if written.pulsed {
            self.set_share(map::SERIAL_IRQS[index], source::DEVICE, false);
        }
        self.settle_serial(index);
    }

    fn settle_serial(&mut self, index: usize) {
        self.set_share(
            map::SERIAL_IRQS[index],
            source::DEVICE,
            self.serial[index].interrupt(),
        );
    }

    /// Hands bytes to a serial port's receiver (0: COM1); how many it took. After fewer than all,
    /// [`Effects::serial_room`](crate::Effects::serial_room) says when to try again.
    pub fn serial_receive(&mut self, port: usize, bytes: &[u8], now: u64) -> usize {
        self.clock(now);
        let Some(serial) = self.serial.get_mut(port) else {
            return 0;
        };
        let taken = serial.receive(bytes);
        self.settle_serial(port);
        taken
    }

    fn settle_i8042(&mut self) {
        self.set_share(
            map::KEYBOARD_GSI,
            source::DEVICE,
            self.i8042.keyboard_interrupt(),
        );
        self.set_share(map::MOUSE_GSI, source::DEVICE, self.i8042.mouse_interrupt());
    }

    /// Presses or releases a key by its set 1 make code (0x01 to 0x7f), 0xe0xx for extended keys.
    pub fn key(&mut self, scancode: u16, pressed: bool, now: u64) {
        self.clock(now);
        self.i8042.key(scancode, pressed);
        self.settle_i8042();
    }

    /// Presses the ACPI power button.
    pub fn press_power_button(&mut self, now: u64) {
        let now = self.clock(now);
        self.pm.press_power_button();
        self.settle_pm(now);
    }
}

/// PCI's configuration address is a 32-bit register at 0xcf8, in which the reset control register at
/// 0xcf9 hides from all but byte accesses; the data port follows.
fn is_pci_configuration(port: u16, size: u8) -> bool {
    (0xcf8..0xd00).contains(&port) && size != 1
}
