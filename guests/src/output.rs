//! Comparing what a guest printed with what it had to print.

use std::fmt;

use crate::Program;

/// The first line in which a guest's output is not what it had to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// Counted from 1, in the guest's output.
    pub line: usize,
    /// What had to stand there. `None`: nothing, the output had to end.
    pub expected: Option<String>,
    /// What stands there. `None`: the output ends before.
    pub printed: Option<String>,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = "(end of output)";
        write!(
            formatter,
            "the guest's output differs in line {}\n  expected: {}\n  printed:  {}",
            self.line,
            self.expected.as_deref().unwrap_or(end),
            self.printed.as_deref().unwrap_or(end),
        )
    }
}

impl std::error::Error for Mismatch {}

/// Compares the serial `output` of `program` with what every correct CPU prints, line by line.
/// Carriage returns and lines that begin with `note:` or `bench ` (timings) do not count. `Ok` for a program whose
/// output is not always the same.
///
/// # Errors
/// The first difference.
pub fn check(program: &Program, output: &str) -> Result<(), Mismatch> {
    match program.expected {
        Some(expected) => compare(expected, output),
        None => Ok(()),
    }
}

/// As [`check`], with a text.
///
/// # Errors
/// The first difference.
pub fn compare(expected: &str, output: &str) -> Result<(), Mismatch> {
    let mut wanted = expected.lines();
    let mut printed = output
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.starts_with("note:") && !line.starts_with("bench "));
    let mut last = 0;
    loop {
        let (line, printed) = match printed.next() {
            Some((index, text)) => (index + 1, Some(text.trim_end_matches('\r'))),
            None => (last + 1, None),
        };
        last = line;
        match (wanted.next(), printed) {
            (None, None) => return Ok(()),
            (wanted, printed) if wanted == printed => {}
            (wanted, printed) => {
                return Err(Mismatch {
                    line,
                    expected: wanted.map(str::to_owned),
                    printed: printed.map(str::to_owned),
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carriage_returns_notes_and_timings_do_not_count() {
        assert_eq!(
            compare(
                "a\nb\n",
                "a\r\nnote: on this machine\r\nbench x ns=7\r\nb\r\n"
            ),
            Ok(())
        );
    }

    #[test]
    fn the_first_difference_is_named_with_its_line() {
        let mismatch = |line, expected: Option<&str>, printed: Option<&str>| {
            Err(Mismatch {
                line,
                expected: expected.map(str::to_owned),
                printed: printed.map(str::to_owned),
            })
        };
        assert_eq!(
            compare("a\nb\nc\n", "a\nx\ny\n"),
            mismatch(2, Some("b"), Some("x"))
        );
        assert_eq!(compare("a\nb\n", "a\n"), mismatch(2, Some("b"), None));
        assert_eq!(compare("a\n", "a\nb\n"), mismatch(2, None, Some("b")));
        assert_eq!(
            compare("a\n", "note: 1\nb\n"),
            mismatch(2, Some("a"), Some("b"))
        );
    }
}
