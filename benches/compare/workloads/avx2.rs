//! Vectors of 256 bits: a product of matrices (FMA) and a count of bits (AVX2), where the processor has both.

use std::arch::x86_64::{
    _mm256_add_epi8, _mm256_add_epi64, _mm256_and_si256, _mm256_broadcast_ss, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_sad_epu8, _mm256_set1_epi8, _mm256_setr_epi8,
    _mm256_setzero_ps, _mm256_setzero_si256, _mm256_shuffle_epi8, _mm256_srli_epi16,
    _mm256_storeu_ps, _mm256_storeu_si256,
};
use std::hint::black_box;

use crate::random::{Random, mix};
use crate::{NotRun, Setting, Work};

/// Columns, and rows of the right matrix.
const SIZE: usize = 256;
/// Rows of the left matrix. Few: without hardware for it a fused product takes hundreds of times as long.
const ROWS: usize = 32;
/// Vectors of bits.
const VECTORS: usize = 8192;

type Matrix = Vec<[f32; SIZE]>;
/// 32 bytes.
type Bits = [u64; 4];

pub(crate) fn run(setting: &Setting) -> Result<Work, NotRun> {
    if !(std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma")) {
        return Err(NotRun::Lacks("the processor has no AVX2 and FMA"));
    }
    let passes = 1600 / setting.scale;
    let mut random = Random(5);
    let mut matrix = |rows| -> Matrix {
        let mut number = || (random.next() >> 40) as f32 / (1 << 24) as f32 - 0.5;
        (0..rows).map(|_| [(); SIZE].map(|()| number())).collect()
    };
    let (left, right) = (matrix(ROWS), matrix(SIZE));
    let mut product = vec![[0.0; SIZE]; ROWS];
    let bits: Vec<Bits> = (0..VECTORS)
        .map(|_| [(); 4].map(|()| random.next()))
        .collect();
    Ok(Box::new(move || {
        // SAFETY: the processor was asked for AVX2 and FMA above.
        unsafe { multiply(black_box(&left), black_box(&right), &mut product) };
        let diagonal = (0..ROWS).map(|index| u64::from(product[index][index].to_bits()));
        let mut check = diagonal.fold(0, mix);
        for _ in 0..passes {
            // SAFETY: as above.
            check = mix(check, unsafe { ones(black_box(&bits)) });
        }
        Ok(check)
    }))
}

#[target_feature(enable = "avx2,fma")]
fn multiply(left: &Matrix, right: &Matrix, product: &mut Matrix) {
    for (left, product) in left.chunks_exact(4).zip(product.chunks_exact_mut(4)) {
        for column in (0..SIZE).step_by(16) {
            let mut sums = [[_mm256_setzero_ps(); 2]; 4];
            for (index, row) in right.iter().enumerate() {
                // SAFETY: 16 numbers from `column` on are in the row: it is a multiple of 16 below 256.
                let (low, high) = unsafe {
                    let at = row.as_ptr().add(column);
                    (_mm256_loadu_ps(at), _mm256_loadu_ps(at.add(8)))
                };
                for (sums, left) in sums.iter_mut().zip(left) {
                    let factor = _mm256_broadcast_ss(&left[index]);
                    sums[0] = _mm256_fmadd_ps(factor, low, sums[0]);
                    sums[1] = _mm256_fmadd_ps(factor, high, sums[1]);
                }
            }
            for (sums, row) in sums.iter().zip(product.iter_mut()) {
                // SAFETY: as above.
                unsafe {
                    let at = row.as_mut_ptr().add(column);
                    _mm256_storeu_ps(at, sums[0]);
                    _mm256_storeu_ps(at.add(8), sums[1]);
                }
            }
        }
    }
}

/// How many bits are set, by looking up each half of a byte (Muła, Kurz, Lemire 2016).
#[target_feature(enable = "avx2,fma")]
fn ones(vectors: &[Bits]) -> u64 {
    let half = _mm256_set1_epi8(15);
    let table = _mm256_setr_epi8(
        0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3,
        3, 4,
    );
    let mut sum = _mm256_setzero_si256();
    for vector in vectors {
        // SAFETY: a vector has 32 bytes.
        let bits = unsafe { _mm256_loadu_si256(vector.as_ptr().cast()) };
        let low = _mm256_shuffle_epi8(table, _mm256_and_si256(bits, half));
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(bits), half);
        let both = _mm256_add_epi8(low, _mm256_shuffle_epi8(table, high));
        sum = _mm256_add_epi64(sum, _mm256_sad_epu8(both, _mm256_setzero_si256()));
    }
    let mut sums = [0_u64; 4];
    // SAFETY: four times 8 bytes.
    unsafe { _mm256_storeu_si256(sums.as_mut_ptr().cast(), sum) };
    sums.iter().sum()
}
