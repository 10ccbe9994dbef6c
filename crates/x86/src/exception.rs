//! Exceptions and their vectors (SDM vol. 3A, 7.3 and 7.15).

use serde::{Deserialize, Serialize};

use crate::hexadecimal;

/// Vector numbers of the architecture's exceptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Vector(pub u8);

#[allow(missing_docs)] // The names are the manuals'.
impl Vector {
    pub const DE: Self = Self(0);
    pub const DB: Self = Self(1);
    pub const NMI: Self = Self(2);
    pub const BP: Self = Self(3);
    pub const OF: Self = Self(4);
    pub const BR: Self = Self(5);
    pub const UD: Self = Self(6);
    pub const NM: Self = Self(7);
    pub const DF: Self = Self(8);
    pub const TS: Self = Self(10);
    pub const NP: Self = Self(11);
    pub const SS: Self = Self(12);
    pub const GP: Self = Self(13);
    pub const PF: Self = Self(14);
    pub const MF: Self = Self(16);
    pub const AC: Self = Self(17);
    pub const MC: Self = Self(18);
    pub const XM: Self = Self(19);
}

/// An exception that an instruction raised, not yet delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exception {
    /// Which one.
    pub vector: Vector,
    /// What is pushed on the handler's stack, for those that push something.
    pub error_code: Option<u32>,
    /// For #PF: the linear address for CR2.
    #[serde(with = "hexadecimal")]
    pub address: u64,
}

impl Exception {
    /// An exception without an error code.
    pub const fn plain(vector: Vector) -> Self {
        Self {
            vector,
            error_code: None,
            address: 0,
        }
    }

    /// An exception with an error code.
    pub const fn with_code(vector: Vector, error_code: u32) -> Self {
        Self {
            vector,
            error_code: Some(error_code),
            address: 0,
        }
    }

    /// #GP with a selector or zero.
    pub const fn gp(error_code: u32) -> Self {
        Self::with_code(Vector::GP, error_code)
    }

    /// #SS with a selector or zero.
    pub const fn ss(error_code: u32) -> Self {
        Self::with_code(Vector::SS, error_code)
    }

    /// #UD.
    pub const UD: Self = Self::plain(Vector::UD);
    /// #NM.
    pub const NM: Self = Self::plain(Vector::NM);

    /// #PF at a linear address.
    pub const fn page_fault(address: u64, error_code: u32) -> Self {
        Self {
            vector: Vector::PF,
            error_code: Some(error_code),
            address,
        }
    }
}

/// How an exception combines with one raised during its delivery (SDM vol. 3A, table 7-4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// Handled one after the other.
    Benign,
    /// Two of them make a double fault.
    Contributory,
    /// #PF: a contributory one or another #PF after it makes a double fault.
    PageFault,
}

impl Vector {
    /// The exception's class for double faults.
    pub const fn severity(self) -> Severity {
        match self.0 {
            0 | 10..=13 => Severity::Contributory,
            14 => Severity::PageFault,
            _ => Severity::Benign,
        }
    }

    /// Whether `second`, raised while this one was being delivered, makes a double fault.
    pub const fn doubles_with(self, second: Self) -> bool {
        match self.severity() {
            Severity::Benign => false,
            Severity::Contributory => matches!(second.severity(), Severity::Contributory),
            Severity::PageFault => !matches!(second.severity(), Severity::Benign),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn double_faults_are_those_of_table_7_4() {
        let cases = [
            (Vector::GP, Vector::NP, true),
            (Vector::GP, Vector::PF, false),
            (Vector::PF, Vector::PF, true),
            (Vector::PF, Vector::GP, true),
            (Vector::PF, Vector::UD, false),
            (Vector::UD, Vector::GP, false),
            (Vector::DE, Vector::TS, true),
        ];
        for (first, second, double) in cases {
            assert_eq!(first.doubles_with(second), double, "{first:?} {second:?}");
        }
    }
}
