//! Sorting.

use crate::random::{Random, mix};
use crate::{Setting, Work};

pub(crate) fn sort(setting: &Setting) -> Work {
    let mut random = Random(2);
    let unsorted: Vec<u64> = (0..2_000_000 / setting.scale)
        .map(|_| random.next())
        .collect();
    let mut numbers = unsorted.clone();
    Box::new(move || {
        numbers.copy_from_slice(&unsorted);
        quicksort(&mut numbers);
        if !numbers.is_sorted() {
            return Err("the numbers are not in order".to_owned());
        }
        let step = numbers.len() / 64;
        Ok(numbers.iter().step_by(step).copied().fold(0, mix))
    })
}

/// Hoare's, with the median of three and insertion at the end: what a textbook has, with branches on the data.
fn quicksort(mut part: &mut [u64]) {
    while part.len() > 16 {
        let (middle, last) = (part.len() / 2, part.len() - 1);
        for (a, b) in [(0, middle), (middle, last), (0, middle)] {
            if part[a] > part[b] {
                part.swap(a, b);
            }
        }
        let pivot = part[middle];
        let (mut left, mut right) = (0, last);
        loop {
            while part[left] < pivot {
                left += 1;
            }
            while part[right] > pivot {
                right -= 1;
            }
            if left >= right {
                break;
            }
            part.swap(left, right);
            left += 1;
            right -= 1;
        }
        let (low, high) = part.split_at_mut(left);
        if low.len() < high.len() {
            quicksort(low);
            part = high;
        } else {
            quicksort(high);
            part = low;
        }
    }
    for index in 1..part.len() {
        let number = part[index];
        let mut at = index;
        while at > 0 && part[at - 1] > number {
            part[at] = part[at - 1];
            at -= 1;
        }
        part[at] = number;
    }
}
