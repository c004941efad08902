//! The properties of an object as they were given: as a list of `key=value`, or as JSON.

use serde_json::Value;

use super::types::{PropertyKind, TYPES};
use crate::block::keys::{self, Dialect, Item};
use crate::block::{jsonish, number};
use crate::cli::Complaint;

#[derive(Debug, Clone, PartialEq)]
pub(super) enum PropertyValue {
    Text(String),
    Typed(Value),
    Help,
}

impl PropertyValue {
    pub fn text(&self, name: &str) -> Result<String, Complaint> {
        match self {
            Self::Text(text) | Self::Typed(Value::String(text)) => Ok(text.clone()),
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
            Self::Help => None,
        };
        number.ok_or_else(|| wrong_type(name, "integer"))
    }

    pub fn switch(&self, name: &str) -> Result<(), Complaint> {
        match self {
            Self::Text(text) if text == "on" || text == "off" => Ok(()),
            Self::Text(_) => Err(Complaint::value(format!("Parameter '{name}' expects 'on' or 'off'"))),
            Self::Typed(Value::Bool(_)) => Ok(()),
            _ => Err(wrong_type(name, "boolean")),
        }
    }

    /// Whether it is a switch that is on.
    pub fn is_on(&self) -> bool {
        matches!(self, Self::Text(text) if text == "on") || *self == Self::Typed(Value::Bool(true))
    }

    pub fn choice(&self, name: &str, choices: &[&str]) -> Result<(), Complaint> {
        let text = self.text(name)?;
        if choices.contains(&text.as_str()) { Ok(()) } else { Err(does_not_accept(name, &text)) }
    }
}

/// The properties of an object in their order, among them `qom-type` and `id`.
pub(super) type Members = Vec<(String, PropertyValue)>;

pub(super) fn json(text: &str) -> Result<Members, Complaint> {
    match jsonish::parse(text).map_err(|fault| Complaint::value(fault.to_string()))? {
        Value::Object(members) => {
            let mut flat = Members::new();
            for (key, value) in members {
                let nested = |kind| matches!(kind, PropertyKind::Numbers | PropertyKind::Limits | PropertyKind::Rules);
                let mut all = TYPES.iter().flat_map(|row| row.properties);
                match all.any(|property| property.name == key && nested(property.kind)) {
                    true => flatten(key, value, &mut flat),
                    false => flat.push((key, PropertyValue::Typed(value))),
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
        value => flat.push((key, PropertyValue::Typed(value))),
    }
}

/// `key=value` pairs; the first may be the type alone.
pub(super) fn list(text: &str) -> Result<Members, Complaint> {
    let mut members = Members::new();
    for item in keys::items(text, Dialect::Words) {
        let member = match item {
            Item::Pair(key, value) => {
                check_key(&key)?;
                (key, PropertyValue::Text(value))
            }
            Item::Word(word) if keys::is_help(&word) => (word, PropertyValue::Help),
            Item::Word(word) if members.is_empty() && !word.is_empty() => {
                ("qom-type".to_owned(), PropertyValue::Text(word))
            }
            Item::Word(word) => {
                check_key(&word)?;
                return Err(Complaint::value(format!("Expected '=' after parameter '{word}'")));
            }
        };
        members.push(member);
    }
    Ok(members)
}

/// Refuses what is no key: words that begin with a letter, or behind a dot numbers too.
fn check_key(key: &str) -> Result<(), Complaint> {
    let invalid = || Complaint::value(format!("Invalid parameter '{key}'"));
    for (n, word) in key.split('.').enumerate() {
        // Vendors' words are `__VENDOR_WORD`.
        let bare = word.strip_prefix("__").and_then(|rest| rest.split_once('_')).map_or(word, |(_, rest)| rest);
        let number = n > 0 && bare.starts_with(|c: char| c.is_ascii_digit());
        if !number && !bare.starts_with(|c: char| c.is_ascii_alphabetic()) {
            return Err(invalid());
        }
    }
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if key.chars().all(known) { Ok(()) } else { Err(invalid()) }
}

pub(super) fn wrong_type(name: &str, expected: &str) -> Complaint {
    Complaint::value(format!("Invalid parameter type for '{name}', expected: {expected}"))
}

pub(super) fn unexpected(name: &str) -> Complaint {
    Complaint::value(format!("Parameter '{name}' is unexpected"))
}

pub(super) fn does_not_accept(name: &str, value: &str) -> Complaint {
    Complaint::value(format!("Parameter '{name}' does not accept value '{value}'"))
}
