//! SHA-256 (FIPS 180-4) and CRC-32 (ISO 3309) in plain integer code, without the instructions that some processors
//! have for them.

use std::hint::black_box;

use crate::random::Random;
use crate::{Setting, Work};

/// The buffer that is hashed again and again.
const BUFFER: usize = 1 << 20;

fn buffer() -> Vec<u8> {
    let mut random = Random(1);
    (0..BUFFER / 8)
        .flat_map(|_| random.next().to_le_bytes())
        .collect()
}

pub(crate) fn sha256(setting: &Setting) -> Work {
    let passes = 64 / setting.scale;
    let bytes = buffer();
    let (first, round) = constants();
    Box::new(move || {
        let mut state = first;
        for _ in 0..passes {
            for block in black_box(&bytes).as_chunks::<64>().0 {
                compress(&mut state, block, &round);
            }
        }
        Ok(u64::from(state[0]) << 32 | u64::from(state[7]))
    })
}

/// The first 32 bits of the fractions of the square roots of the first 8 primes, and of the cube roots of the
/// first 64 (FIPS 180-4, 4.2.2, 5.3.3).
fn constants() -> ([u32; 8], [u32; 64]) {
    let primes: Vec<u128> = (2..312_u128)
        .filter(|n| (2..*n).all(|d| n % d != 0))
        .collect();
    // The largest r with rⁿ ≤ p·2³²ⁿ, whose low 32 bits are the fraction.
    let root = |prime: u128, n: u32| {
        let (mut low, mut high) = (0_u128, 1 << 37);
        while high - low > 1 {
            let middle = (low + high) / 2;
            let below = if n == 2 {
                middle * middle <= prime << 64
            } else {
                middle * middle * middle <= prime << 96
            };
            if below { low = middle } else { high = middle }
        }
        low as u32
    };
    (
        std::array::from_fn(|index| root(primes[index], 2)),
        std::array::from_fn(|index| root(primes[index], 3)),
    )
}

fn compress(state: &mut [u32; 8], block: &[u8; 64], round: &[u32; 64]) {
    let mut words = [0_u32; 64];
    for (word, bytes) in words.iter_mut().zip(block.as_chunks::<4>().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    for t in 16..64 {
        let (a, b) = (words[t - 15], words[t - 2]);
        let small0 = a.rotate_right(7) ^ a.rotate_right(18) ^ (a >> 3);
        let small1 = b.rotate_right(17) ^ b.rotate_right(19) ^ (b >> 10);
        words[t] = words[t - 16]
            .wrapping_add(small0)
            .wrapping_add(words[t - 7])
            .wrapping_add(small1);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for t in 0..64 {
        let big1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let choice = (e & f) ^ (!e & g);
        let one = h
            .wrapping_add(big1)
            .wrapping_add(choice)
            .wrapping_add(round[t])
            .wrapping_add(words[t]);
        let big0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let majority = (a & b) ^ (a & c) ^ (b & c);
        let two = big0.wrapping_add(majority);
        (h, g, f, e) = (g, f, e, d.wrapping_add(one));
        (d, c, b, a) = (c, b, a, one.wrapping_add(two));
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(add);
    }
}

pub(crate) fn crc(setting: &Setting) -> Work {
    let passes = 64 / setting.scale;
    let bytes = buffer();
    let table: [u32; 256] = std::array::from_fn(|byte| {
        (0..8).fold(byte as u32, |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 }
        })
    });
    Box::new(move || {
        let mut crc = !0_u32;
        for _ in 0..passes {
            for byte in black_box(&bytes) {
                crc = table[usize::from(crc as u8 ^ byte)] ^ (crc >> 8);
            }
        }
        Ok(u64::from(!crc))
    })
}
