//! PCI functions as their bus sees them.

use crate::{SavedFunction, StateError};

/// Bytes of the write that rings a doorbell (virtio 1.2, 4.1.5.2).
pub const DOORBELL_BYTES: usize = 2;

/// A memory window that a base address register opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Which base address register, 0 to 5 (the lower one of a 64-bit pair).
    pub bar: u8,
    /// Guest-physical start.
    pub base: u64,
    /// Bytes, a power of two.
    pub length: u64,
}

/// A PCI function as the bus sees it (PCI Local Bus 3.0, chapter 6).
pub trait Function: Send {
    /// Reads 1 to 4 bytes of configuration space at `offset` (below 4096), all in one aligned
    /// doubleword.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);
    /// Writes 1 to 4 bytes of configuration space at `offset` (below 4096), all in one aligned
    /// doubleword. Only a write to the header (below 0x40) may change [`Self::windows`].
    fn config_write(&mut self, offset: u16, data: &[u8]);
    /// The memory windows that are open now (memory space enabled in the command register).
    fn windows(&self) -> Vec<Window>;
    /// Reads 1 to 8 bytes at `offset` in a window; `data` is zeroed before.
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes 1 to 8 bytes at `offset` in a window.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]);
    /// Whether there is a doorbell at `offset` in a window: a write of [`DOORBELL_BYTES`] there, whatever they are, only
    /// tells the function to look for work, and may come as late as the bus likes. Always the same answer.
    fn is_doorbell(&self, _bar: u8, _offset: u64) -> bool {
        false
    }
    /// Puts the function into its state after power-on (a reset of the machine).
    fn reset(&mut self);
    /// Stops what the function does on its own threads; when this returns it touches guest memory
    /// no more until [`Self::resume`].
    fn pause(&mut self) {}
    /// Goes on after [`Self::pause`].
    fn resume(&mut self) {}
    /// Its state, after [`Self::pause`].
    fn save(&mut self) -> SavedFunction;
    /// Takes a state in the place of that after power-on, before anything else is done with the
    /// function. After an error it is not to be used.
    ///
    /// # Errors
    /// For a state of another function, and one that this function can't be in.
    fn restore(&mut self, saved: &SavedFunction) -> Result<(), StateError>;
}
