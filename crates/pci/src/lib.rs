#![forbid(unsafe_code)]
//! PCI functions as their bus sees them.

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
    /// Reads 1, 2 or 4 bytes of configuration space at `offset` (below 4096).
    fn config_read(&mut self, offset: u16, data: &mut [u8]);
    /// Writes 1, 2 or 4 bytes of configuration space at `offset` (below 4096).
    fn config_write(&mut self, offset: u16, data: &[u8]);
    /// The memory windows that are open now (memory space enabled in the command register).
    fn windows(&self) -> Vec<Window>;
    /// Reads 1 to 8 bytes at `offset` in a window.
    fn bar_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes 1 to 8 bytes at `offset` in a window.
    fn bar_write(&mut self, bar: u8, offset: u64, data: &[u8]);
}

/// A message-signalled interrupt: a write of `data` to `address` (PCI 3.0, 6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Guest-physical, 0xfeex_xxxx on x86.
    pub address: u64,
    /// Vector, delivery and trigger mode.
    pub data: u32,
}
