//! Integer expressions: `+ - * /`, a sign, parentheses, decimal and 0x numbers.
//!
//! Needs no allocation: the parser is one recursive function per level of precedence.

/// Why an expression has no value. `at` counts bytes from the start of the text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ExpressionError {
    /// Something other than what may stand here.
    Unexpected {
        at: usize,
    },
    /// The result, or a part of it, does not fit into 64 bits.
    TooLarge {
        at: usize,
    },
    DivisionByZero {
        at: usize,
    },
    /// More parentheses and signs inside each other than the stack is meant to hold.
    TooDeep {
        at: usize,
    },
}

const MAX_DEPTH: u32 = 64;

/// The value of the expression in `text`.
pub(crate) fn evaluate(text: &str) -> Result<i64, ExpressionError> {
    let mut parser = Parser {
        text: text.as_bytes(),
        at: 0,
        depth: 0,
    };
    let value = parser.sum()?;
    match parser.peek() {
        None => Ok(value),
        Some(_) => Err(ExpressionError::Unexpected { at: parser.at }),
    }
}

struct Parser<'a> {
    text: &'a [u8],
    at: usize,
    depth: u32,
}

impl Parser<'_> {
    fn sum(&mut self) -> Result<i64, ExpressionError> {
        let mut value = self.product()?;
        while let Some(operator @ (b'+' | b'-')) = self.peek() {
            let at = self.at;
            self.at += 1;
            let right = self.product()?;
            let result = if operator == b'+' {
                value.checked_add(right)
            } else {
                value.checked_sub(right)
            };
            value = result.ok_or(ExpressionError::TooLarge { at })?;
        }
        Ok(value)
    }

    fn product(&mut self) -> Result<i64, ExpressionError> {
        let mut value = self.signed()?;
        while let Some(operator @ (b'*' | b'/')) = self.peek() {
            let at = self.at;
            self.at += 1;
            let right = self.signed()?;
            let result = match (operator, right) {
                (b'*', _) => value.checked_mul(right),
                (_, 0) => return Err(ExpressionError::DivisionByZero { at }),
                _ => value.checked_div(right),
            };
            value = result.ok_or(ExpressionError::TooLarge { at })?;
        }
        Ok(value)
    }

    fn signed(&mut self) -> Result<i64, ExpressionError> {
        if self.depth == MAX_DEPTH {
            return Err(ExpressionError::TooDeep { at: self.at });
        }
        self.depth += 1;
        let value = match self.peek() {
            Some(b'-') => {
                let at = self.at;
                self.at += 1;
                self.signed()?
                    .checked_neg()
                    .ok_or(ExpressionError::TooLarge { at })
            }
            Some(b'(') => {
                self.at += 1;
                let value = self.sum()?;
                if self.peek() != Some(b')') {
                    return Err(ExpressionError::Unexpected { at: self.at });
                }
                self.at += 1;
                Ok(value)
            }
            _ => self.number(),
        };
        self.depth -= 1;
        value
    }

    fn number(&mut self) -> Result<i64, ExpressionError> {
        let start = self.at;
        let base = if self.text[start..].starts_with(b"0x") {
            self.at += 2;
            16
        } else {
            10
        };
        let first_digit = self.at;
        let mut value = 0i64;
        while let Some(digit) = self
            .text
            .get(self.at)
            .and_then(|&byte| char::from(byte).to_digit(base))
        {
            value = value
                .checked_mul(i64::from(base))
                .and_then(|value| value.checked_add(i64::from(digit)))
                .ok_or(ExpressionError::TooLarge { at: start })?;
            self.at += 1;
        }
        if self.at == first_digit {
            Err(ExpressionError::Unexpected { at: self.at })
        } else {
            Ok(value)
        }
    }

    /// The next byte that is not a space, without taking it.
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at) == Some(&b' ') {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precedence_signs_and_parentheses_are_obeyed() {
        for (text, value) in [
            ("42", 42),
            ("2+3*4", 14),
            ("(2+3)*4", 20),
            (" 10 - 4 - 3 ", 3),
            ("100/7/2", 7),
            ("-(-3)--2", 5),
            ("-7/2", -3),
            ("0x10*2", 32),
            ("9223372036854775807", i64::MAX),
            ("-9223372036854775807-1", i64::MIN),
        ] {
            assert_eq!(evaluate(text), Ok(value), "{text}");
        }
    }

    #[test]
    fn what_has_no_value_is_refused_with_its_place() {
        use ExpressionError::*;
        for (text, error) in [
            ("", Unexpected { at: 0 }),
            ("2+", Unexpected { at: 2 }),
            ("(1", Unexpected { at: 2 }),
            ("1 2", Unexpected { at: 2 }),
            ("0x", Unexpected { at: 2 }),
            ("7/(3-3)", DivisionByZero { at: 1 }),
            ("9223372036854775808", TooLarge { at: 0 }),
            ("9223372036854775807+1", TooLarge { at: 19 }),
            ("(-9223372036854775807-1)/-1", TooLarge { at: 24 }),
        ] {
            assert_eq!(evaluate(text), Err(error), "{text}");
        }
    }

    #[test]
    fn deep_nesting_is_refused_before_the_stack_is_full() {
        let text = "(".repeat(100_000);
        assert_eq!(evaluate(&text), Err(ExpressionError::TooDeep { at: 64 }));
    }
}
