//! Sizes of memory as people write them.

/// Units, and the power of two that each stands for.
const UNITS: &[(&str, u32)] = &[("k", 10), ("m", 20), ("g", 30), ("t", 40)];

/// Bytes from a text such as `256M`, `1G` or `512MiB`. Units are powers of 1024, in either case.
///
/// # Errors
/// A text for a person that says what is wrong and how to write it.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err("it does not start with a number; write for example 512M or 1G".to_owned());
    }
    let unit = unit.trim_start().to_ascii_lowercase();
    if unit.starts_with(['.', ',']) {
        return Err(
            "only whole numbers are understood; write for example 1536M for one and a half GiB"
                .to_owned(),
        );
    }
    if unit.is_empty() {
        return Err(format!(
            "a unit is missing; did you mean {number}M, or {number}G?"
        ));
    }
    let letter = unit
        .strip_suffix("ib")
        .or_else(|| unit.strip_suffix('b'))
        .unwrap_or(&unit);
    let shift = UNITS
        .iter()
        .find(|(name, _)| *name == letter)
        .map(|(_, shift)| *shift)
        .ok_or_else(|| format!("`{unit}` is no unit; units are K, M, G and T"))?;
    let number: u64 = number.parse().map_err(|_| TOO_LARGE.to_owned())?;
    if number == 0 {
        return Err("a machine needs some memory; write for example 512M".to_owned());
    }
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| TOO_LARGE.to_owned())
}

const TOO_LARGE: &str = "that is more than any computer can address";

/// A size for people, in the largest unit that leaves a whole number.
pub(crate) fn show(bytes: u64) -> String {
    let (name, shift) = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)]
        .into_iter()
        .find(|(_, shift)| bytes > 0 && bytes.trailing_zeros() >= *shift)
        .unwrap_or(("bytes", 0));
    format!("{} {name}", bytes >> shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_understood_as_people_write_them() {
        for (text, bytes) in [
            ("256M", 256 << 20),
            ("1G", 1 << 30),
            ("512MiB", 512 << 20),
            ("512mb", 512 << 20),
            ("4096k", 4 << 20),
            ("2 GiB", 2 << 30),
            ("1T", 1 << 40),
            (" 8m ", 8 << 20),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_explained() {
        for (text, complaint) in [
            ("", "number"),
            ("M", "number"),
            ("-1M", "number"),
            ("512", "512M"),
            ("1.5G", "1536M"),
            ("10Q", "no unit"),
            ("10MM", "no unit"),
            ("0M", "some memory"),
            ("99999999999999999999G", "more than"),
            ("99999999999T", "more than"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(complaint), "{text}: {error}");
        }
    }

    #[test]
    fn sizes_are_shown_in_whole_units() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (512, "512 bytes"),
            (1 << 10, "1 KiB"),
            (1536 << 20, "1536 MiB"),
            (2 << 30, "2 GiB"),
        ] {
            assert_eq!(show(bytes), text);
        }
    }
}
