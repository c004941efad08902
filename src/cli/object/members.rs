//! The properties of an object as they were given: as a list of `key=value`, or as JSON.
//!
//! Invariant: text that may be a secret, or a part of one, is shown nowhere, and wiped when it is dropped. What has no
//! comma doubled leaves a part of a secret as a word of its own: errors tell words by where they stand.

use std::fmt;

use serde_json::Value;
use zeroize::Zeroizing;

use super::types::{PropertyKind, TYPES};
use crate::block::keys::{self, Dialect, Item};
use crate::block::{jsonish, number};
use crate::cli::Complaint;

#[derive(Clone, PartialEq)]
pub(super) enum PropertyValue {
    /// As it stood in a list.
    Text(Zeroizing<String>),
    /// A string of JSON.
    JsonText(Zeroizing<String>),
    /// Anything else of JSON.
    Typed(Value),
    Help,
}

impl fmt::Debug for PropertyValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PropertyValue")
    }
}

impl From<Value> for PropertyValue {
    fn from(value: Value) -> Self {
        match value {
            Value::String(text) => Self::JsonText(text.into()),
            other => Self::Typed(other),
        }
    }
}

impl PropertyValue {
    pub fn text(&self, name: &str) -> Result<&str, Complaint> {
        match self {
            Self::Text(text) | Self::JsonText(text) => Ok(text),
            _ => Err(wrong_type(name, "string")),
        }
    }

    pub fn integer(&self, name: &str) -> Result<i64, Complaint> {
        let number = match self {
            Self::Text(text) => {
                let (negative, number) = number::plain(text).unwrap_or((false, u64::MAX));
                let value = i128::from(number) * if negative { -1 } else { 1 };
                let integer = i64::try_from(value);
                return integer.map_err(|_| Complaint::value(format!("Parameter '{name}' expects integer")));
            }
            Self::Typed(value) => value.as_i64(),
            Self::JsonText(_) | Self::Help => None,
        };
        number.ok_or_else(|| wrong_type(name, "integer"))
    }

    pub fn switch(&self, name: &str) -> Result<(), Complaint> {
        match self {
            Self::Text(text) if matches!(text.as_str(), "on" | "off") => Ok(()),
            Self::Text(_) => Err(Complaint::value(format!("Parameter '{name}' expects 'on' or 'off'"))),
            Self::Typed(Value::Bool(_)) => Ok(()),
            _ => Err(wrong_type(name, "boolean")),
        }
    }

    /// Whether it is a switch that is on.
    pub fn is_on(&self) -> bool {
        matches!(self, Self::Text(text) if text.as_str() == "on") || *self == Self::Typed(Value::Bool(true))
    }

    pub fn choice(&self, name: &str, choices: &[&str]) -> Result<(), Complaint> {
        let text = self.text(name)?;
        if choices.contains(&text) { Ok(()) } else { Err(does_not_accept(name, text, &choices.join(", "))) }
    }
}

/// The properties of an object in their order, among them `qom-type` and `id`.
pub(super) type Members = Vec<(String, PropertyValue)>;

pub(super) fn json(text: &str) -> Result<Members, Complaint> {
    let faulty = |fault: jsonish::JsonFault| {
        let told = fault.to_string();
        // The text that does not fit stands in quotes, or is an escape.
        match told.contains(['\'', '\\']) {
            true => Complaint::withheld("The JSON of an object does not parse", told),
            false => Complaint::value(told),
        }
    };
    match jsonish::parse(text).map_err(faulty)? {
        Value::Object(members) => {
            let mut flat = Members::new();
            for (key, value) in members {
                let nested = |kind| matches!(kind, PropertyKind::Numbers | PropertyKind::Limits | PropertyKind::Rules);
                let mut all = TYPES.iter().flat_map(|row| row.properties);
                match all.any(|property| property.name == key && nested(property.kind)) {
                    true => flatten(key, value, &mut flat),
                    false => flat.push((key, value.into())),
                }
            }
            Ok(flat)
        }
        _ => Err(Complaint::value("Invalid JSON object given")),
    }
}

/// What a property holds of others, by the names that they have in the other form. It is as deep as the parser lets it.
fn flatten(key: String, value: Value, flat: &mut Members) {
    match value {
        Value::Object(members) => {
            members.into_iter().for_each(|(name, value)| flatten(format!("{key}.{name}"), value, flat));
        }
        Value::Array(values) => {
            values.into_iter().enumerate().for_each(|(n, value)| flatten(format!("{key}.{n}"), value, flat));
        }
        value => flat.push((key, value.into())),
    }
}

/// `key=value` pairs; the first may be the type alone.
pub(super) fn list(text: &str) -> Result<Members, Complaint> {
    let mut members = Members::new();
    for (n, item) in keys::items(text, Dialect::Words).into_iter().enumerate() {
        let member = match item {
            Item::Pair(key, value) => {
                let value = PropertyValue::Text(value.into());
                if !is_key(&key) {
                    let text = format!("Part {} of an object does not begin with the name of a property", n + 1);
                    return Err(Complaint::withheld(text, format!("Invalid parameter '{key}'")));
                }
                (key, value)
            }
            Item::Word(word) if keys::is_help(&word) => (word, PropertyValue::Help),
            Item::Word(word) if members.is_empty() && !word.is_empty() => {
                ("qom-type".to_owned(), PropertyValue::Text(word.into()))
            }
            Item::Word(word) => {
                let word = Zeroizing::new(word);
                let text = format!("Part {} of an object has no '=': a comma in a value is written twice", n + 1);
                let reference = match is_key(&word) {
                    true => format!("Expected '=' after parameter '{}'", *word),
                    false => format!("Invalid parameter '{}'", *word),
                };
                return Err(Complaint::withheld(text, reference));
            }
        };
        members.push(member);
    }
    Ok(members)
}

/// Whether it can be a key: words that begin with a letter, or behind a dot numbers too.
fn is_key(key: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let is_word = |(n, word): (usize, &str)| {
        // Vendors' words are `__VENDOR_WORD`.
        let bare = word.strip_prefix("__").and_then(|rest| rest.split_once('_')).map_or(word, |(_, rest)| rest);
        let number = n > 0 && bare.starts_with(|c: char| c.is_ascii_digit());
        number || bare.starts_with(|c: char| c.is_ascii_alphabetic())
    };
    key.chars().all(known) && key.split('.').enumerate().all(is_word)
}

pub(super) fn wrong_type(name: &str, expected: &str) -> Complaint {
    Complaint::value(format!("Invalid parameter type for '{name}', expected: {expected}"))
}

pub(super) fn unexpected(name: &str) -> Complaint {
    Complaint::value(format!("Parameter '{name}' is unexpected"))
}

/// `choices` says what it accepts.
pub(super) fn does_not_accept(name: &str, value: &str, choices: &str) -> Complaint {
    Complaint::withheld(
        format!("Parameter '{name}' does not accept what it was given: it takes {choices}"),
        format!("Parameter '{name}' does not accept value '{value}'"),
    )
}
