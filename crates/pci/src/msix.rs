//! MSI-X: a table of messages in a memory window (PCI Local Bus 3.0, 6.8.2).

use crate::{ConfigSpace, Message, MsixState, StateError, VectorState};

const CAPABILITY: u8 = 0x11;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const CONTROL_ENABLE: u16 = 1 << 15;
/// Bytes of a table entry.
const ENTRY: u64 = 16;

#[derive(Clone, Copy, Debug)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

impl Entry {
    const RESET: Self = Self {
        address: 0,
        data: 0,
        masked: true,
        pending: false,
    };

    fn word(&self, index: u64) -> u32 {
        match index {
            0 => self.address as u32,
            1 => (self.address >> 32) as u32,
            2 => self.data,
            _ => u32::from(self.masked),
        }
    }

    fn set_word(&mut self, index: u64, value: u32) {
        match index {
            0 => self.address = self.address & !0xffff_ffff | u64::from(value & !3),
            1 => self.address = self.address & 0xffff_ffff | u64::from(value) << 32,
            2 => self.data = value,
            _ => self.masked = value & 1 != 0,
        }
    }

    fn message(&self) -> Message {
        Message {
            address: self.address,
            data: self.data,
        }
    }
}

/// The table, the pending bits, and what the capability's control register says.
#[derive(Clone, Debug)]
pub struct Msix {
    entries: Vec<Entry>,
    control: u16,
}

impl Msix {
    /// A table of `vectors` masked entries.
    ///
    /// # Panics
    /// If `vectors` is 0 or above 2048.
    pub fn new(vectors: u16) -> Self {
        assert!((1..=2048).contains(&vectors));
        Self {
            entries: vec![Entry::RESET; usize::from(vectors)],
            control: 0,
        }
    }

    /// How many vectors the table has.
    pub fn vectors(&self) -> u16 {
        self.entries.len() as u16
    }

    /// Bytes of the table.
    pub fn table_length(&self) -> u64 {
        self.entries.len() as u64 * ENTRY
    }

    /// Adds the capability, with the table and the pending bits at these offsets (multiples of 8)
    /// in the window of `bar`. Gives the capability's offset; its control register is 2 further.
    pub fn add_capability(&self, space: &mut ConfigSpace, bar: u8, table: u32, pba: u32) -> u16 {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.vectors() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pba | u32::from(bar)).to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        space.add_capability(CAPABILITY, &body, &writable)
    }

    /// Whether software switched MSI-X on (so INTA# is not to be used).
    pub fn enabled(&self) -> bool {
        self.control & CONTROL_ENABLE != 0
    }

    /// Takes over the capability's control register; `send` gets the messages that it releases.
    pub fn set_control(&mut self, control: u16, send: impl FnMut(Message)) {
        self.control = control;
        self.release(send);
    }

    fn open(&self) -> bool {
        self.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE
    }

    fn release(&mut self, mut send: impl FnMut(Message)) {
        if !self.open() {
            return;
        }
        for entry in &mut self.entries {
            if entry.pending && !entry.masked {
                entry.pending = false;
                send(entry.message());
            }
        }
    }

    /// Signals a vector: gives the message to send, or keeps it pending while it is masked. A
    /// vector that is not in the table, or any while MSI-X is off, goes nowhere.
    pub fn signal(&mut self, vector: u16) -> Option<Message> {
        let open = self.open();
        let enabled = self.enabled();
        let entry = self.entries.get_mut(usize::from(vector))?;
        if !enabled {
            return None;
        }
        if open && !entry.masked {
            return Some(entry.message());
        }
        entry.pending = true;
        None
    }

    /// Reads table bytes; beyond the table there are zeros.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.entries.get((at / ENTRY) as usize).map_or(0, |entry| {
                let word = entry.word(at % ENTRY / 4).to_le_bytes();
                word[(at % 4) as usize]
            });
        }
    }

    /// Writes table bytes; `send` gets the message that an unmasked entry releases.
    pub fn table_write(&mut self, offset: u64, data: &[u8], mut send: impl FnMut(Message)) {
        let open = self.open();
        let mut at = offset;
        let mut rest = data;
        // Word by word, so that a 64-bit write that unmasks takes effect after its data.
        while !rest.is_empty() {
            let length = (4 - at as usize % 4).min(rest.len());
            let (piece, tail) = rest.split_at(length);
            if let Some(entry) = self.entries.get_mut((at / ENTRY) as usize) {
                let index = at % ENTRY / 4;
                let mut word = entry.word(index).to_le_bytes();
                let start = at as usize % 4;
                word[start..start + length].copy_from_slice(piece);
                entry.set_word(index, u32::from_le_bytes(word));
                if open && entry.pending && !entry.masked {
                    entry.pending = false;
                    send(entry.message());
                }
            }
            at += length as u64;
            rest = tail;
        }
    }

    /// Reads bytes of the pending bit array.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset as usize..).zip(data) {
            let bits = self.entries.iter().skip(at.saturating_mul(8)).take(8);
            *byte = bits.enumerate().fold(0, |byte, (bit, entry)| {
                byte | u8::from(entry.pending) << bit
            });
        }
    }

    /// Its state.
    pub fn save(&self) -> MsixState {
        let Self { entries, control } = self;
        let vector = |entry: &Entry| {
            let Entry {
                address,
                data,
                masked,
                pending,
            } = *entry;
            VectorState {
                address,
                data,
                masked,
                pending,
            }
        };
        MsixState {
            vectors: entries.iter().map(vector).collect(),
            control: *control,
        }
    }

    /// A table of as many vectors as this one in a state; `kind` names the function in errors.
    ///
    /// # Errors
    /// For a state of another table, or one that a table can't be in.
    pub fn restored(&self, state: &MsixState, kind: &'static str) -> Result<Self, StateError> {
        let MsixState { vectors, control } = state;
        let count = vectors.len();
        let what = "the number of MSI-X vectors";
        StateError::check(count == self.entries.len(), kind, what, count as u64)?;
        let entry = |vector: &VectorState| {
            let VectorState {
                address,
                data,
                masked,
                pending,
            } = *vector;
            StateError::check(address & 3 == 0, kind, "a message address", address)?;
            Ok(Entry {
                address,
                data,
                masked,
                pending,
            })
        };
        Ok(Self {
            entries: vectors.iter().map(entry).collect::<Result<_, _>>()?,
            control: *control,
        })
    }

    /// Back to the state after power-on: off, all masked, nothing pending.
    pub fn reset(&mut self) {
        self.control = 0;
        self.entries.fill(Entry::RESET);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(msix: &mut Msix, vector: u64, data: u32) {
        let at = vector * ENTRY;
        msix.table_write(at, &0xfee0_0000_u64.to_le_bytes(), |_| unreachable!());
        msix.table_write(at + 8, &data.to_le_bytes(), |_| unreachable!());
    }

    fn unmask(msix: &mut Msix, vector: u64) -> Vec<Message> {
        let mut sent = Vec::new();
        msix.table_write(vector * ENTRY + 12, &[0; 4], |message| sent.push(message));
        sent
    }

    const fn message(data: u32) -> Message {
        Message {
            address: 0xfee0_0000,
            data,
        }
    }

    #[test]
    fn a_restored_table_is_as_it_was_and_sends_what_is_pending_when_unmasked() {
        let mut msix = Msix::new(2);
        program(&mut msix, 1, 0x32);
        msix.set_control(CONTROL_ENABLE, |_| panic!("nothing is pending"));
        assert_eq!(msix.signal(1), None, "it is masked");
        let state = msix.save();

        let mut restored = Msix::new(2).restored(&state, "test").unwrap();

        assert_eq!(restored.save(), state);
        assert_eq!(unmask(&mut restored, 1), [message(0x32)]);
        assert!(Msix::new(3).restored(&state, "test").is_err());
    }

    #[test]
    fn nothing_is_sent_or_kept_while_msix_is_off() {
        let mut msix = Msix::new(2);
        program(&mut msix, 0, 0x31);
        unmask(&mut msix, 0);
        assert_eq!(msix.signal(0), None);
        msix.set_control(CONTROL_ENABLE, |_| panic!("nothing is pending"));
        assert_eq!(msix.signal(0), Some(message(0x31)));
    }

    #[test]
    fn masked_vector_is_pending_until_it_is_unmasked() {
        let mut msix = Msix::new(70);
        msix.set_control(CONTROL_ENABLE, |_| ());
        program(&mut msix, 69, 0x45);
        assert_eq!(msix.signal(69), None);
        assert_eq!(msix.signal(69), None);
        let mut bits = [0; 8];
        msix.pba_read(8, &mut bits);
        assert_eq!(u64::from_le_bytes(bits), 1 << 5);

        assert_eq!(unmask(&mut msix, 69), [message(0x45)]);
        msix.pba_read(8, &mut bits);
        assert_eq!(bits, [0; 8]);
        assert_eq!(unmask(&mut msix, 69), []);
    }

    #[test]
    fn function_mask_holds_every_vector_back() {
        let mut msix = Msix::new(2);
        for vector in 0..2 {
            program(&mut msix, vector, 0x50 + vector as u32);
            unmask(&mut msix, vector);
        }
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK, |_| unreachable!());
        assert_eq!((msix.signal(0), msix.signal(1)), (None, None));

        let mut sent = Vec::new();
        msix.set_control(CONTROL_ENABLE, |message| sent.push(message));
        assert_eq!(sent, [message(0x50), message(0x51)]);
    }

    #[test]
    fn table_reads_back_what_was_written_and_zeros_beyond() {
        let mut msix = Msix::new(1);
        program(&mut msix, 0, 0x1234_5678);
        let mut bytes = [0xff; 8];
        msix.table_read(8, &mut bytes);
        assert_eq!(bytes, [0x78, 0x56, 0x34, 0x12, 1, 0, 0, 0]);
        msix.table_read(16, &mut bytes);
        assert_eq!(bytes, [0; 8]);
        assert_eq!(msix.signal(1), None);
    }
}
