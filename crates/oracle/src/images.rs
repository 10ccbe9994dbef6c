//! x87, SSE and AVX states to start from.

use crate::random::Random;
use crate::record::XSAVE_BYTES;

/// Images from which cases are made: to make one anew for each takes longer than to run it.
pub struct Images(Vec<[u8; XSAVE_BYTES]>);

impl Images {
    /// The same images each time. `avx`: with upper halves of the YMM registers.
    pub fn new(avx: bool) -> Self {
        let mut random = Random(0x7861_7665);
        Self((0..512).map(|_| image(&mut random, avx)).collect())
    }

    /// One of them.
    pub fn pick(&self, random: &mut Random) -> &[u8; XSAVE_BYTES] {
        &self.0[random.below(self.0.len() as u64) as usize]
    }
}

/// A random image in standard format (SDM vol. 1, 13.4).
fn image(random: &mut Random, avx: bool) -> [u8; XSAVE_BYTES] {
    let mut image = [0; XSAVE_BYTES];
    fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    let masks = random.next() as u16 & 0x3f;
    let control = 0x40
        | random.pick(&[0x3f, 0x3f, 0x3f, masks])
        | random.next() as u16 & 0xc00
        | random.pick(&[0x300, 0x300, 0x200, 0]);
    let all = random.next() as u16 & 0x7f;
    let flags = if random.one_in(10) {
        all
    } else {
        all & control & 0x3f
    };
    let status = flags | random.next() as u16 & 0x7f00;
    put(&mut image, 0, &control.to_le_bytes());
    put(&mut image, 2, &status.to_le_bytes());
    let tags = random.next() as u8;
    image[4] = random.pick(&[0xff, 0xff, 0xff, 0, tags, tags]);
    put(&mut image, 6, &(random.next() as u16 & 0x7ff).to_le_bytes());
    put(&mut image, 8, &(random.next() >> 17).to_le_bytes());
    put(&mut image, 16, &(random.next() >> 17).to_le_bytes());
    let mxcsr = random.next() as u32 & 0x3f
        | match random.below(4) {
            0 => random.next() as u32 & 0xffc0,
            1 => 0x1f80 | random.next() as u32 & 0xe040,
            _ => 0x1f80,
        };
    put(&mut image, 24, &mxcsr.to_le_bytes());
    put(&mut image, 28, &0xffff_u32.to_le_bytes());
    for register in 0..8 {
        put(&mut image, 32 + register * 16, &random.extended());
    }
    for at in (160..416).step_by(8) {
        put(&mut image, at, &random.lane().to_le_bytes());
    }
    let mut components = if random.one_in(12) {
        random.next() & 3
    } else {
        3
    };
    if avx {
        for at in (576..832).step_by(8) {
            put(&mut image, at, &random.lane().to_le_bytes());
        }
        components |= if random.one_in(12) { 0 } else { 4 };
    }
    put(&mut image, 512, &components.to_le_bytes());
    image
}
