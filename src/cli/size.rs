//! Sizes and numbers that are options or operands of their own, and what is said of bad ones.

use std::ops::RangeInclusive;

use super::Complaint;
use crate::block::number::{Bad, bytes, meant, plain};

/// The largest size there is: what a file offset can hold.
pub const MAX: u64 = i64::MAX as u64;

fn outside(what: &str, range: &RangeInclusive<u64>) -> Complaint {
    Complaint::value(format!("Invalid {what} specified. Must be between {} and {}.", range.start(), range.end()))
}

fn complaint(what: &str, text: &str, range: &RangeInclusive<u64>, bad: Bad) -> Complaint {
    match bad {
        Bad::Syntax => Complaint::value(format!("Invalid {what} specified: '{text}'")),
        Bad::Range => outside(what, range),
    }
}

/// A size that is an option or operand of its own; `what` names it in messages.
pub fn size(what: &str, text: &str) -> Result<u64, Complaint> {
    size_within(what, text, 0..=MAX)
}

/// The same within bounds.
pub fn size_within(what: &str, text: &str, range: RangeInclusive<u64>) -> Result<u64, Complaint> {
    let value = bytes(text).map_err(|bad| match (bad, meant(text)) {
        (Bad::Syntax, Some(meant)) => Complaint::misspelt(complaint(what, text, &range, bad).to_string(), Some(meant)),
        _ => complaint(what, text, &range, bad),
    })?;
    if range.contains(&value) { Ok(value) } else { Err(outside(what, &range)) }
}

/// A plain number within bounds.
pub fn number_within(what: &str, text: &str, range: RangeInclusive<u64>) -> Result<u64, Complaint> {
    match plain(text) {
        Ok((false, value)) if range.contains(&value) => Ok(value),
        Ok((true, 0)) if range.contains(&0) => Ok(0),
        Ok(_) => Err(outside(what, &range)),
        Err(bad) => Err(complaint(what, text, &range, bad)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(
            size("image size", "8E").unwrap_err().to_string(),
            "Invalid image size specified. Must be between 0 and 9223372036854775807."
        );
    }

    #[test]
    fn numbers() {
        let take = |text: &str| number_within("number of coroutines", text, 1..=16).map_err(|bad| bad.to_string());
        for (text, value) in [("1", 1), ("0x10", 16), ("010", 8), (" 8", 8), ("+8", 8)] {
            assert_eq!(take(text), Ok(value), "{text}");
        }
        for text in ["1k", "x", "", "8 ", "1.5"] {
            assert_eq!(take(text), Err(format!("Invalid number of coroutines specified: '{text}'")));
        }
        for text in ["0", "17", "-1", "99999999999999999999"] {
            assert_eq!(take(text), Err("Invalid number of coroutines specified. Must be between 1 and 16.".into()));
        }
    }
}
