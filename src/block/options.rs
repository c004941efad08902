//! Creation options: what a format takes (`-o`), and what the user gave.
//!
//! A table of [`OptionSpec`] is the single list of a format's options: parsing, help, defaults and the
//! `Formatting` line all come from it.

use std::ffi::{OsStr, OsString};

use super::nearest::nearest;
use super::{Error, Result};

/// What an option's value looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionKind {
    /// Any text.
    Text,
    /// The name of a file, which need not be text.
    Name,
    /// Bytes, with an optional suffix k, M, G, T, P or E.
    Size,
    /// A number.
    Number,
    /// `on` or `off`.
    Switch,
}

impl OptionKind {
    /// How help shows it.
    pub fn shown(self) -> &'static str {
        match self {
            Self::Text | Self::Name => "<str>",
            Self::Size => "<size>",
            Self::Number => "<num>",
            Self::Switch => "<bool (on/off)>",
        }
    }
}

/// One option of a format.
#[derive(Debug, Clone, Copy)]
pub struct OptionSpec {
    /// Its key.
    pub name: &'static str,
    /// What its value looks like.
    pub kind: OptionKind,
    /// One line of help.
    pub help: &'static str,
    /// The value that is shown and used when none is given; `None` shows nothing.
    pub default: Option<&'static str>,
    /// Not one of the reference's: help shows it under our own name alone.
    pub own: bool,
    /// It says how data is encoded, and the image does not keep it.
    pub encoding: bool,
    /// It names a file that is made with the image.
    pub makes_file: bool,
    /// The values that there are; empty where they cannot be listed.
    pub choices: &'static [&'static str],
}

impl OptionSpec {
    /// An option without a shown default.
    pub const fn new(name: &'static str, kind: OptionKind, help: &'static str) -> Self {
        Self { name, kind, help, default: None, own: false, encoding: false, makes_file: false, choices: &[] }
    }

    /// The same with a default.
    pub const fn or(mut self, default: &'static str) -> Self {
        self.default = Some(default);
        self
    }

    /// The same with the values that there are.
    pub const fn among(mut self, choices: &'static [&'static str]) -> Self {
        self.choices = choices;
        self
    }

    /// The same as an option that the reference does not have.
    pub const fn own(mut self) -> Self {
        self.own = true;
        self
    }

    /// The same as one that names a file that is made with the image.
    pub const fn makes_file(mut self) -> Self {
        self.makes_file = true;
        self
    }

    /// The same as one of those that says how data is encoded.
    pub const fn encoding(mut self) -> Self {
        (self.own, self.encoding) = (true, true);
        self
    }
}

/// A value that was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OptionValue {
    /// Any text.
    Text(String),
    /// The name of a file.
    Name(OsString),
    /// Bytes.
    Size(u64),
    /// A number.
    Number(u64),
    /// On or off.
    Switch(bool),
}

/// The options of one image to be: the tables they may come from, and the values given.
#[derive(Debug, Clone, Default)]
pub struct CreateOptions {
    specs: Vec<OptionSpec>,
    given: Vec<Given>,
}

#[derive(Debug, Clone)]
struct Given {
    name: &'static str,
    value: OptionValue,
    /// As the user wrote it, where that is shown.
    typed: Option<String>,
}

impl CreateOptions {
    /// No values yet; `tables` in the order of the `Formatting` line. A name that stands in an earlier table is
    /// dropped from the later ones.
    pub fn new(tables: &[&[OptionSpec]]) -> Self {
        let mut specs: Vec<OptionSpec> = Vec::new();
        for spec in tables.iter().flat_map(|table| table.iter()) {
            if specs.iter().all(|known| known.name != spec.name) {
                specs.push(*spec);
            }
        }
        Self { specs, given: Vec::new() }
    }

    /// Every option there is, in the order of the `Formatting` line.
    pub fn specs(&self) -> &[OptionSpec] {
        &self.specs
    }

    /// The option with that name.
    pub fn spec(&self, name: &str) -> Option<&OptionSpec> {
        self.specs.iter().find(|spec| spec.name == name)
    }

    /// What is wrong with a name that is no option's.
    pub fn unknown(&self, name: &str) -> Error {
        let error = Error::invalid(format!("Invalid parameter '{name}'"));
        match nearest(name, self.specs.iter().map(|spec| spec.name)) {
            Some(meant) => error.advise(format!("did you mean '{meant}'?")),
            None => error.advise("'-o help' lists the options of the format"),
        }
    }

    /// What was refused, with what the user can do about it where a value is none of those that there are.
    pub fn advising(&self, error: Error) -> Error {
        let values = self.given.iter().filter_map(|given| match &given.value {
            OptionValue::Text(text) => Some((self.spec(given.name)?, text)),
            _ => None,
        });
        let mut unknown =
            values.filter(|(spec, text)| !spec.choices.is_empty() && !spec.choices.contains(&text.as_str()));
        match unknown.next() {
            Some((spec, text)) => error.advise(match nearest(text, spec.choices.iter().copied()) {
                Some(meant) => format!("did you mean '{}={meant}'?", spec.name),
                None => format!("'{}' is one of {}", spec.name, spec.choices.join(", ")),
            }),
            None => error,
        }
    }

    /// Gives an option its value; a later one replaces an earlier one.
    pub fn set(&mut self, name: &str, value: OptionValue) -> Result<()> {
        self.put(name, value, None)
    }

    /// The same for a value that the user typed: a switch is shown as it was written.
    pub fn set_typed(&mut self, name: &str, value: OptionValue, typed: &str) -> Result<()> {
        self.put(name, value, Some(typed.to_owned()))
    }

    fn put(&mut self, name: &str, value: OptionValue, typed: Option<String>) -> Result<()> {
        let name = self.spec(name).ok_or_else(|| self.unknown(name))?.name;
        let given = Given { name, value, typed };
        match self.given.iter_mut().find(|given| given.name == name) {
            Some(slot) => *slot = given,
            None => self.given.push(given),
        }
        Ok(())
    }

    /// What was given for that name (not the default).
    pub fn given(&self, name: &str) -> Option<&OptionValue> {
        self.given.iter().find(|given| given.name == name).map(|given| &given.value)
    }

    /// Every option that was given or has a default, in the order of the `Formatting` line, as that line shows it.
    pub fn shown(&self) -> Vec<(&'static str, String)> {
        let shown = |spec: &OptionSpec| match self.given.iter().find(|given| given.name == spec.name) {
            None => spec.default.map(str::to_owned),
            Some(Given { value: OptionValue::Switch(_), typed: Some(typed), .. }) => Some(typed.clone()),
            Some(Given { value: OptionValue::Switch(on), .. }) => Some(if *on { "on" } else { "off" }.to_owned()),
            Some(Given { value: OptionValue::Text(text), .. }) => Some(text.replace(',', ",,")),
            Some(Given { value: OptionValue::Name(name), .. }) => Some(name.to_string_lossy().replace(',', ",,")),
            // The reference shows them signed.
            Some(Given { value: OptionValue::Size(n) | OptionValue::Number(n), .. }) => {
                Some(n.cast_signed().to_string())
            }
        };
        self.specs.iter().filter_map(|spec| Some((spec.name, shown(spec)?))).collect()
    }

    /// The first option given that says how to encode; the reference has none of them.
    pub fn given_encoding(&self) -> Option<&'static str> {
        self.specs.iter().find(|spec| spec.encoding && self.given(spec.name).is_some()).map(|spec| spec.name)
    }

    /// Whether a file was named that is made with the image.
    pub fn makes_file(&self) -> bool {
        self.specs.iter().any(|spec| spec.makes_file && self.given(spec.name).is_some())
    }

    /// The text given, or the default.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.given(name) {
            Some(OptionValue::Text(text)) => Some(text),
            _ => self.spec(name)?.default,
        }
    }

    /// The file's name given.
    pub fn name(&self, name: &str) -> Option<&OsStr> {
        match self.given(name) {
            Some(OptionValue::Name(name)) => Some(name),
            _ => None,
        }
    }

    /// The size or number given, or the default.
    pub fn number(&self, name: &str) -> Option<u64> {
        match self.given(name) {
            Some(OptionValue::Size(n) | OptionValue::Number(n)) => Some(*n),
            _ => self.spec(name)?.default?.parse().ok(),
        }
    }

    /// Whether it is on, by what was given or by default.
    pub fn switch(&self, name: &str) -> bool {
        match self.given(name) {
            Some(OptionValue::Switch(on)) => *on,
            _ => self.spec(name).and_then(|spec| spec.default) == Some("on"),
        }
    }
}
