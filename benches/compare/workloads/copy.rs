//! The C library's memset and memcpy.

use std::hint::black_box;

use crate::random::mix;
use crate::{Setting, Work};

/// What is moved of each size.
const TOTAL: usize = 384 << 20;

pub(crate) fn run(setting: &Setting) -> Work {
    let total = TOTAL / setting.scale as usize;
    let mut from = vec![0_u8; 1 << 20];
    let mut to = vec![0_u8; 1 << 20];
    Box::new(move || {
        let mut check = 0;
        for size in [1 << 10, 8 << 10, 64 << 10, 1 << 20] {
            for pass in 0..total / size {
                let (from, to) = (&mut from[..black_box(size)], &mut to[..size]);
                from.fill(black_box(pass as u8));
                to.copy_from_slice(black_box(from));
                black_box(&to);
                check = mix(check, u64::from(to[size - 1 - pass % size]));
            }
        }
        Ok(check)
    })
}
