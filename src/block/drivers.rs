//! The table of drivers: what names, options and `-o help` mean is looked up here and nowhere else.
//!
//! Invariant: names are unique; the last format takes any bytes (raw), the last protocol any plain name (file).

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::name;
use super::protocol::{Protocol, Spelt};
use super::{Error, Format, Result};

/// Every driver there is.
#[derive(Debug)]
pub struct Drivers {
    /// Image formats; raw last.
    pub formats: &'static [&'static dyn Format],
    /// Ways to bytes; file last.
    pub protocols: &'static [&'static dyn Protocol],
}

/// A driver of the table.
#[derive(Debug, Clone, Copy)]
pub enum Driver {
    /// An image format.
    Format(&'static dyn Format),
    /// A way to bytes.
    Protocol(&'static dyn Protocol),
}

impl Drivers {
    /// The driver with that name.
    pub fn find(&self, name: &str) -> Option<Driver> {
        let format = || self.format(name).map(Driver::Format);
        format().or_else(|| self.protocol(name).map(Driver::Protocol))
    }

    /// The format with that name.
    pub fn format(&self, name: &str) -> Option<&'static dyn Format> {
        self.formats.iter().copied().find(|format| format.name() == name)
    }

    /// The protocol with that name.
    pub fn protocol(&self, name: &str) -> Option<&'static dyn Protocol> {
        self.protocols.iter().copied().find(|protocol| protocol.name() == name)
    }

    /// Every name, sorted.
    pub fn names(&self) -> Vec<&'static str> {
        let formats = self.formats.iter().map(|format| format.name());
        let mut names: Vec<_> = formats.chain(self.protocols.iter().map(|protocol| protocol.name())).collect();
        names.sort_unstable();
        names
    }

    /// The protocol for what lies under a plain path.
    pub fn of_path(&self, path: &OsStr) -> Result<&'static dyn Protocol> {
        let path = Path::new(path);
        let found = self.protocols.iter().copied().find(|protocol| protocol.takes(path));
        found.ok_or_else(|| Error::invalid(format!("No protocol for '{}'", path.display())))
    }

    /// The protocol that a name means, and what the name says to it.
    pub fn of_name(&self, name: &OsStr) -> Result<(&'static dyn Protocol, Spelt)> {
        let Some((prefix, _)) = name::protocol(name) else {
            return Ok((self.of_path(name)?, Spelt::path(name.to_owned())));
        };
        let protocol = self
            .protocol(&prefix.to_string_lossy())
            .ok_or_else(|| Error::invalid(format!("Unknown protocol '{}'", prefix.to_string_lossy())))?;
        Ok((protocol, self.spelt(protocol, name)?))
    }

    /// What a name says to that protocol, of which it may start with the name.
    pub fn spelt(&self, protocol: &'static dyn Protocol, name: &OsStr) -> Result<Spelt> {
        match name::protocol(name) {
            Some((prefix, rest)) if prefix == protocol.name() => protocol.spelt(rest),
            _ => protocol.plain(name),
        }
    }
}

/// A path that is not taken for a protocol when it is seen again.
pub fn plain_path(path: &OsStr) -> OsString {
    let mut plain = OsString::new();
    if name::protocol(path).is_some() {
        plain.push("./");
    }
    plain.push(path);
    plain
}
