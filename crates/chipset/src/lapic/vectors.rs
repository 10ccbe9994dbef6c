//! A set of interrupt vectors: the shape of IRR, ISR and TMR.

use serde::{Deserialize, Serialize};

/// 256 bits, one per vector. Saved as the list of its vectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<u8>", into = "Vec<u8>")]
pub struct VectorSet([u64; 4]);

impl VectorSet {
    /// Adds a vector.
    pub fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    /// Removes a vector.
    pub fn remove(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] &= !(1 << (vector & 63));
    }

    /// Whether it holds a vector.
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 6)] >> (vector & 63) & 1 != 0
    }

    /// The highest vector, which is the one of highest priority.
    pub fn highest(&self) -> Option<u8> {
        (0..4usize)
            .rev()
            .find(|&i| self.0[i] != 0)
            .map(|i| (i as u8) << 6 | (63 - self.0[i].leading_zeros()) as u8)
    }

    /// The `index`th (0 to 7) of the eight 32-bit registers the set is read through.
    pub fn register(&self, index: u8) -> u32 {
        (self.0[usize::from(index >> 1 & 3)] >> (32 * u32::from(index & 1))) as u32
    }
}

impl VectorSet {
    /// The set whose eight 32-bit registers these are, see [`Self::register`].
    pub fn from_registers(registers: [u32; 8]) -> Self {
        let pair =
            |word: usize| u64::from(registers[2 * word]) | u64::from(registers[2 * word + 1]) << 32;
        Self([pair(0), pair(1), pair(2), pair(3)])
    }

    /// Its vectors, ascending.
    pub fn vectors(&self) -> impl Iterator<Item = u8> + '_ {
        (0..=255).filter(|&vector| self.contains(vector))
    }
}

impl From<Vec<u8>> for VectorSet {
    fn from(vectors: Vec<u8>) -> Self {
        let mut set = Self::default();
        for vector in vectors {
            set.insert(vector);
        }
        set
    }
}

impl From<VectorSet> for Vec<u8> {
    fn from(set: VectorSet) -> Self {
        set.vectors().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_vector_is_found_across_words() {
        let mut set = VectorSet::default();
        assert_eq!(set.highest(), None);
        for vector in [16, 63, 64, 127, 128, 200, 255] {
            set.insert(vector);
            assert_eq!(set.highest(), Some(vector));
        }
        set.remove(255);
        assert_eq!(set.highest(), Some(200));
        assert!(set.contains(63) && !set.contains(255));
    }

    #[test]
    fn registers_hold_32_vectors_each() {
        let mut set = VectorSet::default();
        set.insert(0x21);
        set.insert(0xff);
        assert_eq!(set.register(1), 2);
        assert_eq!(set.register(7), 1 << 31);
        assert_eq!(set.register(6), 0);
    }

    #[test]
    fn a_set_is_made_of_its_registers_and_of_its_vectors() {
        let mut set = VectorSet::default();
        for vector in [0, 31, 32, 100, 255] {
            set.insert(vector);
        }
        let registers = std::array::from_fn(|index| set.register(index as u8));
        assert_eq!(VectorSet::from_registers(registers), set);
        assert_eq!(VectorSet::from(Vec::from(set)), set);
        assert_eq!(Vec::from(set), [0, 31, 32, 100, 255]);
    }
}
