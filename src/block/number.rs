//! Sizes, numbers and switches as they are typed, and what is said of bad ones.
//!
//! A size is decimal digits with or without a fraction and a one-letter suffix, or hexadecimal digits alone. A
//! plain number is what C takes: decimal, `0x`, or octal behind a `0`.

use super::{Error, Result};

/// What is wrong with a size or number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bad {
    /// It is none.
    Syntax,
    /// It is one, but does not fit.
    Range,
}

/// A size in bytes, up to 2^64 - 1.
pub fn bytes(text: &str) -> std::result::Result<u64, Bad> {
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '\u{b}');
    if let Some(text) = text.strip_prefix('-') {
        let digits = text.strip_prefix('.').unwrap_or(text);
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        return Err(if plain { Bad::Range } else { Bad::Syntax });
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return digits(hex, 16);
    }
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (whole_text, rest) = text.split_at(end);
    let (fraction_text, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())),
        None => ("", rest),
    };
    if whole_text.is_empty() && fraction_text.is_empty() {
        return Err(Bad::Syntax);
    }
    let whole = match whole_text {
        "" => 0,
        digits => digits.parse::<u64>().map_err(|_| if rest.is_empty() { Bad::Range } else { Bad::Syntax })?,
    };
    let unit: u64 = match suffix {
        "" | "b" | "B" => 1,
        "k" | "K" => 1 << 10,
        "m" | "M" => 1 << 20,
        "g" | "G" => 1 << 30,
        "t" | "T" => 1 << 40,
        "p" | "P" => 1 << 50,
        "e" | "E" => 1 << 60,
        _ => return Err(Bad::Syntax),
    };
    let fraction = match fraction_text {
        "" => 0.0,
        digits => format!("0.{digits}").parse::<f64>().map_err(|_| Bad::Syntax)?,
    };
    if fraction != 0.0 && unit == 1 {
        return Err(Bad::Syntax);
    }
    // At most 2^60, and rounded half up as the reference rounds.
    let part = (fraction * unit as f64 + 0.5) as u64;
    whole.checked_mul(unit).and_then(|n| n.checked_add(part)).ok_or(Bad::Range)
}

fn digits(text: &str, radix: u32) -> std::result::Result<u64, Bad> {
    if text.is_empty() || !text.chars().all(|c| c.is_digit(radix)) {
        return Err(Bad::Syntax);
    }
    u64::from_str_radix(text, radix).map_err(|_| Bad::Range)
}

/// The size that was probably meant by what is none: `10GB`, `10 GiB` and `10,5G` in other places' way of writing.
pub fn meant(text: &str) -> Option<String> {
    let text: String = text.chars().filter(|c| !c.is_whitespace()).collect::<String>().replace(',', ".");
    let lower = text.to_ascii_lowercase();
    let letters = ["ibytes", "bytes", "ib", "b", ""].into_iter().find(|end| lower.ends_with(end))?.len();
    let shorter = text.get(..text.len() - letters)?;
    bytes(shorter).is_ok().then(|| shorter.to_owned())
}

/// A plain number: its sign, and what follows it.
pub fn plain(text: &str) -> std::result::Result<(bool, u64), Bad> {
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '\u{b}');
    let (negative, text) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let value = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => digits(hex, 16)?,
        None => match text.strip_prefix('0').filter(|octal| !octal.is_empty()) {
            Some(octal) => digits(octal, 8)?,
            None => digits(text, 10)?,
        },
    };
    Ok((negative, value))
}

/// A size that is the value of a key.
pub fn key_size(key: &str, text: &str) -> Result<u64> {
    key_size_behind("", key, text)
}

/// The same behind a sign.
pub fn key_size_behind(sign: &str, key: &str, text: &str) -> Result<u64> {
    bytes(text).map_err(|bad| match bad {
        Bad::Syntax => {
            let error = Error::invalid(format!("Parameter '{key}' expects a non-negative number below 2^64"))
                .hint("Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-")
                .hint("and exabytes, respectively.");
            match meant(text) {
                Some(size) => error.advise(format!("did you mean '{sign}{size}'?")),
                None => error,
            }
        }
        Bad::Range => Error::invalid(format!("Value '{text}' is out of range for parameter '{key}'")),
    })
}

/// A number that is the value of a key; a negative one is taken modulo 2^64.
pub fn key_number(key: &str, text: &str) -> Result<u64> {
    match plain(text) {
        Ok((true, value)) => Ok(value.wrapping_neg()),
        Ok((false, value)) => Ok(value),
        Err(Bad::Syntax) => Err(Error::invalid(format!("Parameter '{key}' expects a number"))),
        Err(Bad::Range) => Err(Error::invalid(format!("Value '{text}' is too large for parameter '{key}'"))),
    }
}

/// A switch that is the value of a key.
pub fn key_switch(key: &str, text: &str) -> Result<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Ok(true),
        "off" | "no" | "false" | "n" => Ok(false),
        _ => Err(Error::invalid(format!("Parameter '{key}' expects 'on' or 'off'"))),
    }
}

/// A number as the reference shows it with a prefix, which it leaves out before zero.
pub fn prefixed(number: u64) -> String {
    if number == 0 { "0".to_owned() } else { format!("{number:#x}") }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What qemu-img 10.0.2 answered to `create -f qcow2 FILE SIZE`.
    #[test]
    fn sizes() {
        let good: &[(&str, u64)] = &[
            ("1", 1),
            ("513", 513),
            ("1k", 1024),
            ("0x400", 1024),
            ("0x1b", 27),
            (" 0x10", 16),
            ("+0x10", 16),
            ("010", 10),
            ("1.5k", 1536),
            (".5M", 1 << 19),
            ("1.k", 1024),
            ("5.", 5),
            (".0", 0),
            ("1.0", 1),
            ("1.0b", 1),
            (" 1k", 1024),
            ("\t2k", 2048),
            ("+1k", 1024),
            ("1B", 1),
            ("1e", 1 << 60),
            ("0e", 0),
            ("0.0005k", 1),
            ("1.0005k", 1025),
            ("1.00146484375k", 1026),
            ("0.00048828125k", 1),
            ("0.00048828124k", 0),
            ("0.1e", 115_292_150_460_684_704),
            ("0.3e", 345_876_451_382_054_080),
            ("1.7976931348623157P", 2_024_022_533_073_106),
            ("0.333333333333333333333P", 375_299_968_947_541),
            ("1.123456789012345678901234567890E", 1_295_257_491_548_890_608),
            ("1.99999999999k", 2048),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, value) in good {
            assert_eq!(bytes(text), Ok(*value), "{text}");
        }
        for text in [
            "",
            "-1k",
            "1kk",
            "0x400k",
            "0x1.8",
            "1.5",
            "1.5b",
            ".",
            ".k",
            "1 ",
            "1k ",
            "1e3",
            "k",
            "--1",
            "- 1",
            "inf",
            "nan",
            "0x",
            "1,5k",
            "1KiB",
            "0.5",
            "-.5k",
            "-1.5",
            "-0x1",
            "-0.0",
            "-1.",
            "-.",
            "1..k",
            "00x10",
            "1e-3k",
            "99999999999999999999x",
            "99999999999999999999.5k",
            "99999999999999999999k",
            "1Pb",
            "+-1",
        ] {
            assert_eq!(bytes(text), Err(Bad::Syntax), "{text}");
        }
        for text in ["-1", "-0", "-.5", "-.0", "16E", "99999999999999999999", "16777216T", "0x10000000000000000"] {
            assert_eq!(bytes(text), Err(Bad::Range), "{text}");
        }
    }

    #[test]
    fn values_of_keys() {
        let message = |text: &str| key_size("size", text).unwrap_err().message();
        assert_eq!(message("1kk"), "Parameter 'size' expects a non-negative number below 2^64");
        assert_eq!(message("20E"), "Value '20E' is out of range for parameter 'size'");
        assert_eq!(key_number("n", "-1").unwrap(), u64::MAX);
        assert_eq!(key_number("n", "08").unwrap_err().message(), "Parameter 'n' expects a number");
        assert_eq!(
            key_number("n", "18446744073709551616").unwrap_err().message(),
            "Value '18446744073709551616' is too large for parameter 'n'"
        );
        assert_eq!(key_number("n", "0").unwrap(), 0);
    }
}
