//! Options as text: lists `key=value,...` in the dialects of the command line, and values taken out of an
//! [`OptionTree`] as what they must be.

use serde_json::{Map, Value};

use super::{Result, number};

/// Options of a node: dotted keys, values as the user gave them (`--image-opts` gives text alone).
pub type OptionTree = Map<String, Value>;

/// How a list of options is written. In each of them `,,` in a value is a comma.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// `--image-opts`, `-l`, `--trace`: `,,` in a word alone is a comma too, and a first word alone is the value of
    /// this key.
    Options {
        /// The key.
        implied: Option<&'static str>,
    },
    /// `-o`, `--object`: a word alone ends at its first comma.
    Words,
}

/// A part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// `key=value`.
    Pair(String, String),
    /// A word alone.
    Word(String),
}

/// The parts of a list, in the order typed.
pub fn items(text: &str, dialect: Dialect) -> Vec<Item> {
    let mut items = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(['=', ',']).unwrap_or(rest.len());
        let (head, tail) = rest.split_at(end);
        let (item, after) = match (tail.strip_prefix('='), dialect) {
            (Some(tail), _) => {
                let (value, after) = value(tail);
                (Item::Pair(head.to_owned(), value), after)
            }
            (None, Dialect::Options { implied }) => {
                let (word, after) = value(rest);
                match implied.filter(|_| items.is_empty()) {
                    Some(key) => (Item::Pair(key.to_owned(), word), after),
                    None => (Item::Word(word), after),
                }
            }
            (None, Dialect::Words) => (Item::Word(head.to_owned()), tail.strip_prefix(',').unwrap_or(tail)),
        };
        items.push(item);
        rest = after;
    }
    items
}

/// A value up to a comma that stands alone, and what follows that comma.
fn value(text: &str) -> (String, &str) {
    let mut end = 0;
    while let Some(comma) = text[end..].find(',') {
        end += comma;
        if !text[end + 1..].starts_with(',') {
            return (single(&text[..end]), &text[end + 1..]);
        }
        end += 2;
    }
    (single(text), "")
}

/// The text with a comma for two. It may be a secret, and what grows leaves copies behind: it does not.
fn single(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once(",,") {
        out.push_str(before);
        out.push(',');
        rest = after;
    }
    out.push_str(rest);
    out
}

/// A word alone as a switch: `key` is `key=on`, `nokey` is `key=off`.
pub fn switch(word: &str) -> (&str, &'static str) {
    match word.strip_prefix("no") {
        Some(key) => (key, "off"),
        None => (word, "on"),
    }
}

/// Whether a word alone asks for help.
pub fn is_help(word: &str) -> bool {
    matches!(word, "help" | "?")
}

/// A list of options as typed, words alone as switches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct List {
    /// Keys and values, in the order typed.
    pub pairs: Vec<(String, String)>,
    /// What the user should write instead: a warning, and the line below it.
    pub warnings: Vec<(String, String)>,
}

/// Reads a list of [`Dialect::Options`].
pub fn parse_list(text: &str, implied: Option<&'static str>) -> List {
    let mut list = List::default();
    for item in items(text, Dialect::Options { implied }) {
        let word = match item {
            Item::Pair(key, value) => {
                list.pairs.push((key, value));
                continue;
            }
            Item::Word(word) => word,
        };
        let (key, on) = switch(&word);
        if !is_help(&word) {
            list.warnings.push((
                format!("short-form boolean option '{word}' deprecated"),
                format!("Please use {key}={on} instead"),
            ));
        }
        list.pairs.push((key.to_owned(), on.to_owned()));
    }
    list
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
        assert_eq!(all("a,,b,no", None), "a,b=on =off");
    }
}
