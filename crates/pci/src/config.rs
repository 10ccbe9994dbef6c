//! The configuration space of a function with a type 0 header (PCI Local Bus 3.0, chapter 6).

use crate::{ConfigSpaceState, StateError, Window};

/// Offsets of header registers (PCI 3.0, 6.1).
pub mod register {
    /// Command, 16 bits.
    pub const COMMAND: u16 = 0x04;
    /// Status, 16 bits.
    pub const STATUS: u16 = 0x06;
    /// First base address register, 32 bits each.
    pub const BAR0: u16 = 0x10;
    /// Capabilities pointer, 8 bits.
    pub const CAPABILITIES: u16 = 0x34;
    /// Interrupt line, 8 bits: a note from firmware to drivers.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// Interrupt pin, 8 bits: 0 for none, 1 for INTA#.
    pub const INTERRUPT_PIN: u16 = 0x3d;
}

/// Bytes of conventional configuration space.
const SIZE: usize = 256;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Memory space, bus master, parity response, SERR#, INTx disable: what software may write.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | 1 << 2 | 1 << 6 | 1 << 8 | COMMAND_INTX_DISABLE;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// What a function says it is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface, as in `0x06_00_00` for a host bridge.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// The type of a memory base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Anywhere below 4 GiB.
    Memory32,
    /// Anywhere; takes two registers.
    Memory64,
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    index: u8,
    kind: BarKind,
    length: u64,
}

/// Configuration space: every byte with the mask of the bits that software may write.
///
/// Base address registers need no code of their own: the address bits below a window's size are
/// read-only zeros, which is what the sizing protocol (PCI 3.0, 6.2.5.1) looks for.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    /// The bytes after a reset.
    initial: [u8; SIZE],
    bars: Vec<Bar>,
    last_capability: u8,
    free: u8,
}

impl ConfigSpace {
    /// A header with no windows, interrupts or capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            initial: [0; SIZE],
            bars: Vec::new(),
            last_capability: 0,
            free: 0x40,
        };
        space.set(0x00, &identity.vendor.to_le_bytes());
        space.set(0x02, &identity.device.to_le_bytes());
        space.set(
            0x08,
            &(identity.class << 8 | u32::from(identity.revision)).to_le_bytes(),
        );
        space.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.set(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(register::COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Cache line size: of no meaning here, but drivers write and read it back.
        space.allow(0x0c, &[0xff]);
        space.allow(register::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Sets bytes as they are after a reset.
    fn set(&mut self, offset: u16, data: &[u8]) {
        let range = usize::from(offset)..usize::from(offset) + data.len();
        self.bytes[range.clone()].copy_from_slice(data);
        self.initial[range].copy_from_slice(data);
    }

    fn allow(&mut self, offset: u16, mask: &[u8]) {
        let start = usize::from(offset);
        self.writable[start..start + mask.len()].copy_from_slice(mask);
    }

    /// Adds a memory window.
    ///
    /// # Panics
    /// Where the device's author is wrong: `length` is no power of two of at least 16, does not
    /// fit its kind, or the register is taken or out of range.
    pub fn add_bar(&mut self, index: u8, kind: BarKind, length: u64) {
        assert!(length.is_power_of_two() && length >= 16);
        let registers = if kind == BarKind::Memory64 { 2 } else { 1 };
        assert!(index + registers <= 6 && (registers == 2 || length <= 1 << 31));
        let taken = |bar: &Bar| {
            let end = bar.index + if bar.kind == BarKind::Memory64 { 2 } else { 1 };
            index < end && bar.index < index + registers
        };
        assert!(!self.bars.iter().any(taken));

        let at = register::BAR0 + 4 * u16::from(index);
        let mask = (!(length - 1)).to_le_bytes();
        match kind {
            BarKind::Memory32 => self.allow(at, &mask[..4]),
            BarKind::Memory64 => {
                self.allow(at, &mask);
                self.set(at, &[0b100]);
            }
        }
        self.bars.push(Bar {
            index,
            kind,
            length,
        });
    }

    /// Says that the function uses INTA#.
    pub fn use_interrupt_pin(&mut self) {
        self.set(register::INTERRUPT_PIN, &[1]);
    }

    /// Adds a capability; `body` is what follows its id and next pointer, `writable` the mask of
    /// its bits that software may write (shorter than the body: the rest is read-only). Gives the
    /// capability's offset.
    ///
    /// # Panics
    /// Where the capabilities do not fit.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.free;
        let end = usize::from(at) + 2 + body.len();
        assert!(end <= SIZE && writable.len() <= body.len());
        let link = if self.last_capability == 0 {
            register::CAPABILITIES
        } else {
            u16::from(self.last_capability) + 1
        };
        self.set(link, &[at]);
        self.set(u16::from(at), &[id, 0]);
        self.set(u16::from(at) + 2, body);
        self.allow(u16::from(at) + 2, writable);
        let status = self.bytes[usize::from(register::STATUS)] | STATUS_CAPABILITIES;
        self.set(register::STATUS, &[status]);
        self.last_capability = at;
        self.free = end.next_multiple_of(4).min(SIZE - 4) as u8;
        u16::from(at)
    }

    /// Reads bytes; beyond the 256 conventional ones there are zeros (no extended capabilities).
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes those bits that software may write.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, &byte) in (usize::from(offset)..).zip(data) {
            if let Some(old) = self.bytes.get_mut(at) {
                let mask = self.writable[at];
                *old = *old & !mask | byte & mask;
            }
        }
    }

    /// Back to the state after power-on.
    pub fn reset(&mut self) {
        self.bytes = self.initial;
    }

    /// A 16-bit register.
    pub fn word(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    fn dword(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Whether software forbade the use of INTA#.
    pub fn intx_disabled(&self) -> bool {
        self.word(register::COMMAND) & COMMAND_INTX_DISABLE != 0
    }

    /// Shows in the status register whether the function wants INTA# asserted.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let status = &mut self.bytes[usize::from(register::STATUS)];
        *status = *status & !STATUS_INTERRUPT | if pending { STATUS_INTERRUPT } else { 0 };
    }

    /// Its state.
    pub fn save(&self) -> ConfigSpaceState {
        let Self {
            bytes,
            // What the function is.
            writable: _,
            initial: _,
            bars: _,
            last_capability: _,
            free: _,
        } = self;
        ConfigSpaceState { bytes: *bytes }
    }

    /// This space in a state; `kind` names the function in errors.
    ///
    /// # Errors
    /// For a state of another function's space: what software can't write is different.
    pub fn restored(
        &self,
        state: &ConfigSpaceState,
        kind: &'static str,
    ) -> Result<Self, StateError> {
        let ConfigSpaceState { bytes } = state;
        let mut expected = self.initial;
        // The one bit that the function itself changes.
        let status = usize::from(register::STATUS);
        expected[status] |= bytes[status] & STATUS_INTERRUPT;
        for (at, &byte) in bytes.iter().enumerate() {
            let fixed = !self.writable[at];
            let what = "a read-only byte of configuration space";
            StateError::check(byte & fixed == expected[at] & fixed, kind, what, byte)?;
        }
        Ok(Self {
            bytes: *bytes,
            ..self.clone()
        })
    }

    /// The windows that are open: none while memory space is disabled in the command register.
    pub fn windows(&self) -> Vec<Window> {
        if self.word(register::COMMAND) & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        let window = |bar: &Bar| {
            let at = register::BAR0 + 4 * u16::from(bar.index);
            let high = match bar.kind {
                BarKind::Memory32 => 0,
                BarKind::Memory64 => self.dword(at + 4),
            };
            let base = u64::from(high) << 32 | u64::from(self.dword(at) & !0xf);
            Window {
                bar: bar.index,
                base,
                length: bar.length,
            }
        };
        self.bars.iter().map(window).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        space.add_bar(0, BarKind::Memory32, 0x8000);
        space.add_bar(2, BarKind::Memory64, 1 << 33);
        space
    }

    fn dword(space: &ConfigSpace, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        space.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn header_says_who_the_device_is() {
        let space = device();
        assert_eq!(dword(&space, 0), 0x1042_1af4);
        assert_eq!(dword(&space, 8), 0x0180_0001);
        assert_eq!(dword(&space, 0x2c), 0x0040_1af4);
        assert_eq!(dword(&space, 0x100), 0);
        assert_eq!(dword(&space, 0xffc), 0);
    }

    #[test]
    fn sizing_shows_the_length_of_each_window() {
        let mut space = device();
        for bar in 0..4 {
            space.write(0x10 + 4 * bar, &[0xff; 4]);
        }
        let found: Vec<_> = (0..4).map(|bar| dword(&space, 0x10 + 4 * bar)).collect();
        assert_eq!(found, [0xffff_8000, 0, 0x0000_0004, 0xffff_fffe]);
    }

    #[test]
    fn windows_open_with_the_command_register_where_the_registers_say() {
        let mut space = device();
        space.write(0x10, &0xc123_4567_u32.to_le_bytes());
        // Byte by byte, as some firmware does.
        space.write(0x1b, &[0]);
        space.write(0x1c, &[0x02]);
        assert_eq!(space.windows(), []);
        space.write(4, &[0x02, 0]);
        assert_eq!(
            space.windows(),
            [
                Window {
                    bar: 0,
                    base: 0xc123_0000,
                    length: 0x8000
                },
                Window {
                    bar: 2,
                    base: 0x2_0000_0000,
                    length: 1 << 33
                },
            ]
        );
    }

    #[test]
    fn capabilities_form_a_list_and_only_their_writable_bits_change() {
        let mut space = device();
        assert_eq!(space.word(register::STATUS), 0);
        let first = space.add_capability(0x11, &[1, 2, 3, 4], &[0x0f]);
        let second = space.add_capability(0x09, &[5], &[]);
        assert_eq!(space.word(register::STATUS), 0x10);
        assert_eq!(dword(&space, 0x34) as u16, first);
        assert_eq!(space.word(first), u16::from(second as u8) << 8 | 0x11);
        assert_eq!(space.word(second), 0x0009);

        space.write(first, &[0xff; 4]);
        assert_eq!(dword(&space, first) >> 16, 0x020f);
        space.reset();
        assert_eq!(dword(&space, first) >> 16, 0x0201);
    }

    #[test]
    fn read_only_registers_ignore_writes() {
        let mut space = device();
        let before = space.bytes;
        for offset in (0..0x1000).step_by(4) {
            space.write(offset, &[0xff; 4]);
        }
        let changed: Vec<_> = (0..SIZE)
            .filter(|&at| space.bytes[at] != before[at])
            .collect();
        assert_eq!(
            changed,
            [
                0x04, 0x05, 0x0c, 0x11, 0x12, 0x13, 0x1c, 0x1d, 0x1e, 0x1f, 0x3c
            ]
        );
    }
}
