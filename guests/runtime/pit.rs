//! The 8254 interval timer: channel 0 is IRQ 0, channel 2 can be polled through port 0x61.

use crate::port;

/// Input clock in hertz.
pub const FREQUENCY: u64 = 1_193_182;

const CHANNEL_0: u16 = 0x40;
const CHANNEL_2: u16 = 0x42;
const COMMAND: u16 = 0x43;
const GATE: u16 = 0x61;

/// Raises IRQ 0 once, `ticks` of the input clock from now (mode 0).
pub fn interrupt_once(ticks: u16) {
    port::write8(COMMAND, 0x30);
    write_count(CHANNEL_0, ticks);
}

/// Raises IRQ 0 every `ticks` of the input clock (mode 2).
pub fn interrupt_every(ticks: u16) {
    port::write8(COMMAND, 0x34);
    write_count(CHANNEL_0, ticks);
}

/// Waits `ticks` of the input clock on channel 2, without an interrupt (mode 0).
pub fn wait(ticks: u16) {
    port::write8(GATE, (port::read8(GATE) & !0x02) | 0x01); // gate on, speaker off
    port::write8(COMMAND, 0xB0);
    write_count(CHANNEL_2, ticks);
    while port::read8(GATE) & 0x20 == 0 {}
}

fn write_count(channel: u16, ticks: u16) {
    let [low, high] = ticks.to_le_bytes();
    port::write8(channel, low);
    port::write8(channel, high);
}
