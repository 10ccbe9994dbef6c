//! Doorbells that can be rung without the bus: an engine may be able to notice a write by itself.

/// Where a write of [`crate::DOORBELL_BYTES`] rings a function's doorbell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doorbell {
    /// Guest-physical address.
    pub gpa: u64,
    /// Whose it is.
    pub slot: u8,
    /// The window that it is in.
    pub bar: u8,
    /// Where in the window.
    pub offset: u64,
}

/// Hears of doorbells, and may take it upon itself to hear them ring and to tell the bus
/// ([`crate::Bus::ring`]). Called with the bus's configuration held, so windows do not move meanwhile.
pub trait DoorbellListener: Send + Sync {
    /// This one rang through the bus.
    fn rung(&self, doorbell: Doorbell);

    /// Windows may have moved: a doorbell for which `stays` is false is no longer where it was, or
    /// hidden by another window.
    fn moved(&self, stays: &dyn Fn(Doorbell) -> bool);
}
