//! Numbers from a seed, and the values that instructions stumble over.

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// 64 bits.
    #[allow(clippy::should_implement_trait)] // It has no end that an iterator could tell.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(limit)) >> 64) as u64
    }

    /// True once in `times`.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An integer, often one at the end of some range.
    pub fn integer(&mut self) -> u64 {
        const CORNERS: [u64; 24] = [
            0,
            1,
            2,
            3,
            7,
            8,
            15,
            16,
            31,
            32,
            33,
            63,
            64,
            65,
            0x7f,
            0x80,
            0xff,
            0x100,
            0x7fff,
            0x8000,
            0xffff,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
        ];
        let choice = self.next();
        let corner = CORNERS[(choice >> 8) as usize % CORNERS.len()];
        match choice & 15 {
            0..=2 => corner,
            3 => corner.wrapping_neg(),
            4 => 1 << (choice >> 16 & 63),
            5 => (1 << (choice >> 16 & 63)) - 1,
            6 => 1 << 63,
            7 => i64::MAX as u64,
            8 => (choice >> 32) as i8 as u64,
            9 => choice >> 32,
            _ => self.next(),
        }
    }

    /// Eight bytes that are interesting as integers, and as floating-point numbers of both sizes.
    pub fn lane(&mut self) -> u64 {
        match self.below(8) {
            0 => self.next(),
            1 => self.pick(&DOUBLES).to_bits(),
            2 => self.pick(&ODD_DOUBLES),
            3 | 4 => u64::from(self.single()) | u64::from(self.single()) << 32,
            5 => self.integer(),
            _ => ((self.next() % 2000) as f64 / 7.0 - 100.0).to_bits(),
        }
    }

    /// Four bytes that are interesting as a floating-point number.
    pub fn single(&mut self) -> u32 {
        const SINGLES: [f32; 12] = [
            0.0,
            -0.0,
            1.0,
            -1.5,
            3.0,
            f32::MAX,
            f32::MIN_POSITIVE,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            65504.0,
            1e-20,
        ];
        match self.below(4) {
            0 => self.pick(&SINGLES).to_bits(),
            // A signalling NaN, denormals, the smallest normal number.
            1 => self.pick(&[0x7f80_0001, 1, 0x807f_ffff, 0x0080_0001]),
            2 => ((self.next() % 4000) as f32 / 9.0 - 200.0).to_bits(),
            _ => self.next() as u32,
        }
    }

    /// A floating-point number of 80 bits.
    pub fn extended(&mut self) -> [u8; 10] {
        let (high, mantissa): (u16, u64) = match self.below(7) {
            0 => (0, 0),
            1 => (0x3fff, 1 << 63),
            2 => self.pick(&[
                // Infinity, a quiet and a signalling NaN, a denormal, a pseudo-denormal, an unnormal.
                (0x7fff, 1 << 63),
                (0x7fff, 3 << 62),
                (0x7fff, 1 << 63 | 1),
                (0, 5),
                (0, 1 << 63),
                (0x4000, 1 << 62),
                (0xffff, 3 << 62),
                (0x7ffe, u64::MAX),
                (1, 1 << 63),
            ]),
            3 => (0x3fff + self.below(64) as u16 - 8, self.next() | 1 << 63),
            4 => (0xbff0 + self.below(40) as u16, self.next() | 1 << 63),
            5 => {
                // A small whole number.
                let whole = self.below(2000) + 1;
                let shift = whole.leading_zeros();
                (
                    (0x403e - shift) as u16 | (self.next() as u16 & 0x8000),
                    whole << shift,
                )
            }
            _ => (self.next() as u16, self.next()),
        };
        let mut value = [0; 10];
        value[..8].copy_from_slice(&mantissa.to_le_bytes());
        value[8..].copy_from_slice(&high.to_le_bytes());
        value
    }
}

const DOUBLES: [f64; 14] = [
    0.0,
    -0.0,
    1.0,
    -2.5,
    3.0,
    f64::MAX,
    f64::MIN_POSITIVE,
    f64::INFINITY,
    f64::NEG_INFINITY,
    f64::NAN,
    1e300,
    1e-300,
    4_294_967_296.5,
    -9.3e18,
];

/// Signalling NaNs, denormals, and what rounds to them.
const ODD_DOUBLES: [u64; 6] = [
    0x7ff0_0000_0000_0001,
    0xfff4_0000_0000_0000,
    1,
    0x000f_ffff_ffff_ffff,
    0x800f_ffff_ffff_ffff,
    0x0010_0000_0000_0001,
];
