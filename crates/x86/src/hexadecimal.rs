//! Registers as text in saved states: hexadecimal, as people read them, and as programs whose numbers
//! are floating-point do not damage them.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of up to 64 bits that is written as `"0x1f"`.
struct Number(u64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("0x").filter(|digits| {
            // Parsing alone would let a sign in.
            digits.bytes().all(|digit| digit.is_ascii_hexdigit())
        });
        digits
            .and_then(|digits| u64::from_str_radix(digits, 16).ok())
            .map(Self)
            .ok_or_else(|| D::Error::custom(format!("`{text}` is no number such as 0x1f")))
    }
}

pub(crate) fn serialize<T, S>(value: &T, serializer: S) -> Result<S::Ok, S::Error>
where
    T: Copy + Into<u64>,
    S: Serializer,
{
    Number((*value).into()).serialize(serializer)
}

pub(crate) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: TryFrom<u64>,
    D: Deserializer<'de>,
{
    let Number(value) = Number::deserialize(deserializer)?;
    T::try_from(value).map_err(|_| D::Error::custom(format!("{value:#x} is too large")))
}

/// Arrays of registers.
pub(crate) mod array {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Number;

    pub(crate) fn serialize<const N: usize, S: Serializer>(
        values: &[u64; N],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.map(Number))
    }

    pub(crate) fn deserialize<'de, const N: usize, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<[u64; N], D::Error> {
        let values = Vec::<Number>::deserialize(deserializer)?;
        let values: Vec<u64> = values.into_iter().map(|Number(value)| value).collect();
        let length = values.len();
        values
            .try_into()
            .map_err(|_| D::Error::invalid_length(length, &"as many registers as there are"))
    }
}

/// Arrays of pairs of registers.
pub(crate) mod pairs {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    use super::Number;

    pub(crate) fn serialize<const N: usize, S: Serializer>(
        values: &[(u64, u64); N],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.map(|(a, b)| (Number(a), Number(b))))
    }

    pub(crate) fn deserialize<'de, const N: usize, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<[(u64, u64); N], D::Error> {
        let values = Vec::<(Number, Number)>::deserialize(deserializer)?;
        let values: Vec<_> = values.into_iter().map(|(a, b)| (a.0, b.0)).collect();
        let length = values.len();
        values
            .try_into()
            .map_err(|_| D::Error::invalid_length(length, &"as many registers as there are"))
    }
}
