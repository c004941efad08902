//! Options as text: lists `key=value,...`, and values taken out of an [`OptionTree`] as what they must be.

use serde_json::Value;

use super::{Error, OptionTree, Result};

/// A list of options as typed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct List {
    /// Keys and values, in the order typed.
    pub pairs: Vec<(String, String)>,
    /// What the user should write instead: a warning, and the line below it.
    pub warnings: Vec<(String, String)>,
}

/// Reads `key=value,...`: `,,` in a value is a comma; `key` alone is `key=on`, `nokey` is `key=off`; a first word
/// alone is the value of `implied`.
pub fn parse_list(text: &str, implied: Option<&str>) -> List {
    let mut list = List::default();
    let mut rest = text;
    let mut first = true;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (head, tail) = rest.split_at(end);
        if let Some(tail) = tail.strip_prefix('=') {
            let (value, after) = value(tail);
            list.pairs.push((head.to_owned(), value));
            rest = after;
        } else if let (true, Some(key)) = (first, implied) {
            let (value, after) = value(rest);
            list.pairs.push((key.to_owned(), value));
            rest = after;
        } else {
            let (word, after) = value(rest);
            let (key, on) = match word.strip_prefix("no") {
                Some(key) if !key.is_empty() => (key, "off"),
                _ => (word.as_str(), "on"),
            };
            if !matches!(word.as_str(), "help" | "?") {
                list.warnings.push((
                    format!("short-form boolean option '{word}' deprecated"),
                    format!("Please use {key}={on} instead"),
                ));
            }
            list.pairs.push((key.to_owned(), on.to_owned()));
            rest = after;
        }
        first = false;
    }
    list
}

/// A value up to a comma that stands alone, and what follows that comma.
fn value(text: &str) -> (String, &str) {
    let mut out = String::new();
    let mut rest = text;
    loop {
        match rest.split_once(',') {
            None => {
                out.push_str(rest);
                return (out, "");
            }
            Some((before, after)) => {
                out.push_str(before);
                match after.strip_prefix(',') {
                    Some(after) => {
                        out.push(',');
                        rest = after;
                    }
                    None => return (out, after),
                }
            }
        }
    }
}

/// A scalar as the reference sees it: text, whichever way it was typed. Nothing for `null` and what is no scalar.
pub fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(on) => Some(if *on { "on" } else { "off" }.to_owned()),
        _ => None,
    }
}

/// Takes a text.
pub fn take_text(tree: &mut OptionTree, key: &str) -> Option<String> {
    tree.shift_remove(key).as_ref().and_then(as_text)
}

/// Takes a switch: `on` or `off`, `true` or `false` in JSON.
pub fn take_switch(tree: &mut OptionTree, key: &str) -> Result<Option<bool>> {
    match take_text(tree, key).as_deref() {
        None => Ok(None),
        Some("on" | "true" | "yes" | "y") => Ok(Some(true)),
        Some("off" | "false" | "no" | "n") => Ok(Some(false)),
        Some(_) => Err(Error::invalid(format!("Parameter '{key}' expects 'on' or 'off'"))),
    }
}

/// Takes a plain number.
pub fn take_number(tree: &mut OptionTree, key: &str) -> Result<Option<u64>> {
    let Some(text) = take_text(tree, key) else { return Ok(None) };
    let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    number.map(Some).map_err(|_| Error::invalid(format!("Parameter '{key}' expects a number")))
}

/// Takes a size: bytes, perhaps with a suffix.
pub fn take_size(tree: &mut OptionTree, key: &str) -> Result<Option<u64>> {
    take_text(tree, key).map(|text| size(key, &text)).transpose()
}

/// Reads a size: decimal digits, perhaps a fraction, perhaps a suffix; or hexadecimal digits alone.
pub fn size(key: &str, text: &str) -> Result<u64> {
    let bad = || {
        Error::invalid(format!("Parameter '{key}' expects a non-negative number below 2^64"))
            .hint("Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-")
            .hint("and exabytes, respectively.")
    };
    let range = || Error::invalid(format!("Value '{text}' is out of range for parameter '{key}'"));
    let trimmed = text.trim_start();
    let plain = trimmed.strip_prefix('+').unwrap_or(trimmed);
    if let Some(hex) = plain.strip_prefix("0x").or_else(|| plain.strip_prefix("0X")) {
        if hex.is_empty() || !hex.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad());
        }
        return u64::from_str_radix(hex, 16).map_err(|_| range());
    }
    if let Some(negative) = plain.strip_prefix('-') {
        let number = !negative.is_empty() && negative.bytes().all(|byte| byte.is_ascii_digit());
        return Err(if number { range() } else { bad() });
    }
    let digits = plain.find(|c: char| !c.is_ascii_digit()).unwrap_or(plain.len());
    let (whole, rest) = plain.split_at(digits);
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(bad());
    }
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return Err(bad()),
    };
    let some_fraction = fraction.bytes().any(|byte| byte != b'0');
    if some_fraction && shift == 0 {
        return Err(bad());
    }
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| range())? };
    let bytes = u128::from(whole) << shift;
    // Nineteen digits are more than 2^60 can tell apart.
    let fraction = fraction.get(..fraction.len().min(19)).unwrap_or_default();
    let parts: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| bad())? };
    let scale = 10_u128.pow(u32::try_from(fraction.len()).unwrap_or(0));
    let more = ((parts << shift) + scale / 2) / scale;
    u64::try_from(bytes + more).map_err(|_| range())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        let pairs = |text: &str, implied| parse_list(text, implied).pairs.into_iter().map(|(a, b)| format!("{a}={b}"));
        let all = |text: &str, implied| pairs(text, implied).collect::<Vec<_>>().join(" ");
        assert_eq!(all("a=1,b=x,,y,c=", None), "a=1 b=x,y c=");
        assert_eq!(all("a.qcow2,x=1", Some("file")), "file=a.qcow2 x=1");
        assert_eq!(all("x=1,a,nob", Some("file")), "x=1 a=on b=off");
        assert_eq!(all(",", Some("file")), "file=");
        assert_eq!(all("driver=raw,,file.driver=file,x=2,", None), "driver=raw,file.driver=file x=2");
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("1k", 1024),
            (".5M", 1 << 19),
            ("1.5M", 3 << 19),
            ("0x400", 1024),
            ("0x1b", 27),
            ("010", 10),
            (" +1", 1),
            ("1e", 1 << 60),
            ("1.", 1),
            ("15.5E", 31 << 59),
        ] {
            assert_eq!(size("size", text).unwrap(), bytes, "{text}");
        }
        let message = |text: &str| size("size", text).unwrap_err().message();
        for text in ["", "x", "1kk", "1KiB", "1e3", "1.5", "-x", "0x", "0x1k"] {
            assert_eq!(message(text), "Parameter 'size' expects a non-negative number below 2^64", "{text}");
        }
        assert_eq!(message("20E"), "Value '20E' is out of range for parameter 'size'");
        assert_eq!(message("-1"), "Value '-1' is out of range for parameter 'size'");
    }
}
