//! Medians, spread, means.

/// The middle one, or between the two middle ones; `None` of nothing.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    quantile(values, 0.5)
}

/// The value below which `share` of the values lie, in a line between those that are nearest.
fn quantile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let at = share * last as f64;
    let (below, above) = (sorted[at as usize], sorted[(at as usize + 1).min(last)]);
    Some(below + (above - below) * at.fract())
}

/// How far the middle half of the values is spread, as a part of the median.
pub(crate) fn spread(values: &[f64]) -> Option<f64> {
    let width = quantile(values, 0.75)? - quantile(values, 0.25)?;
    Some(width / median(values)?)
}

/// The geometric mean; `None` of nothing.
pub(crate) fn geometric_mean(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0_u32);
    for value in values {
        sum += value.ln();
        count += 1;
    }
    (count > 0).then(|| (sum / f64::from(count)).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_in_the_middle_whatever_the_order() {
        assert_eq!(median(&[3.0, 1.0, 100.0]), Some(3.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 100.0]), Some(3.0));
        assert_eq!(median(&[7.0]), Some(7.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn spread_does_not_see_one_that_is_far_off() {
        assert_eq!(spread(&[1.0, 1.0, 1.0, 1.0, 50.0]), Some(0.0));
        assert_eq!(spread(&[8.0, 9.0, 10.0, 11.0, 12.0]), Some(0.2));
        assert_eq!(spread(&[2.0]), Some(0.0));
        assert_eq!(spread(&[]), None);
    }

    #[test]
    fn geometric_mean_of_a_ratio_and_its_reciprocal_is_one() {
        let close = |a: Option<f64>, b: f64| (a.unwrap() - b).abs() < 1e-12;
        assert!(close(geometric_mean([8.0, 0.125]), 1.0));
        assert!(close(geometric_mean([2.0, 8.0]), 4.0));
        assert!(close(geometric_mean([5.0]), 5.0));
        assert_eq!(geometric_mean([]), None);
    }
}
