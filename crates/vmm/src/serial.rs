//! The first serial port's two directions, apart from the chipset's lock.

/// The host's side of COM1's receiver.
#[derive(Clone)]
pub struct SerialHandle {}

impl SerialHandle {
    /// Gives input to the guest; tells how many bytes of it were accepted.
    pub fn input(&self, _data: &[u8]) -> usize {
        todo!()
    }

    /// Gives all of `data` to the guest, and waits as often as need be; `false` if the machine ended
    /// before.
    pub fn input_all(&self, _data: &[u8]) -> bool {
        todo!()
    }
}
