//! Options as text: lists `key=value,...`, and values taken out of an [`OptionTree`] as what they must be.

use serde_json::Value;

use super::{OptionTree, Result, number};

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
    take_text(tree, key).map(|text| number::key_switch(key, &text)).transpose()
}

/// Takes a plain number.
pub fn take_number(tree: &mut OptionTree, key: &str) -> Result<Option<u64>> {
    take_text(tree, key).map(|text| number::key_number(key, &text)).transpose()
}

/// Takes a size: bytes, perhaps with a suffix.
pub fn take_size(tree: &mut OptionTree, key: &str) -> Result<Option<u64>> {
    take_text(tree, key).map(|text| number::key_size(key, &text)).transpose()
}

#[cfg(test)]
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
}
