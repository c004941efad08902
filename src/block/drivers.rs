//! The table of drivers: what names, options and `-o help` mean is looked up here and nowhere else.
//!
//! Invariant: names are unique; the last format takes any bytes (raw), the last protocol any plain name (file).

use std::ffi::{OsStr, OsString};
use std::path::Path;

use super::bytes::Bytes;
use super::filter::{Filter, Lower, Wrapped};
use super::nearest::nearest;
use super::protocol::{Protocol, Spelt};
use super::{Error, Format, OptionTree, Result};
use super::{format, name};

/// Every driver there is.
#[derive(Debug)]
pub struct Drivers {
    /// Image formats; raw last.
    pub formats: &'static [&'static dyn Format],
    /// Ways to bytes; file last.
    pub protocols: &'static [&'static dyn Protocol],
    /// The same as formats, in the place of one that is made.
    pub bytes: &'static [Bytes],
    /// What stands between a format and its file, or over an image.
    pub filters: &'static [&'static dyn Filter],
}

/// A driver of the table.
#[derive(Debug, Clone, Copy)]
pub enum Driver {
    /// An image format.
    Format(&'static dyn Format),
    /// A way to bytes.
    Protocol(&'static dyn Protocol),
    /// What stands before bytes.
    Filter(&'static dyn Filter),
}

/// What a name leads to.
#[derive(Debug, Clone)]
pub enum Named {
    /// Bytes.
    Protocol(&'static dyn Protocol, Spelt),
    /// A filter before them.
    Filter(&'static dyn Filter, Wrapped),
}

/// Protocols that are none here, and what else leads to what they lead to.
const ELSEWHERE: &[(&[&str], &str)] = &[
    (&["ssh", "sftp"], "mount the folder with sshfs, or serve the image there over nbd"),
    (&["rbd"], "make it a block device with 'rbd map'"),
    (&["iscsi"], "log in to the target with iscsiadm: it is a block device then"),
    (&["nfs", "gluster", "gluster+tcp", "gluster+unix"], "mount the volume"),
];

impl Drivers {
    /// The driver with that name.
    pub fn find(&self, name: &str) -> Option<Driver> {
        let format = || self.format(name).map(Driver::Format);
        let protocol = || self.protocol(name).map(Driver::Protocol);
        format().or_else(protocol).or_else(|| self.filter(name).map(Driver::Filter))
    }

    /// The format with that name.
    pub fn format(&self, name: &str) -> Option<&'static dyn Format> {
        self.formats.iter().copied().find(|format| format.name() == name)
    }

    /// The protocol with that name.
    pub fn protocol(&self, name: &str) -> Option<&'static dyn Protocol> {
        self.protocols.iter().copied().find(|protocol| protocol.name() == name)
    }

    /// The protocol with that name, as the format of what it makes.
    pub fn bytes(&self, name: &str) -> Option<&'static dyn Format> {
        self.bytes.iter().find(|bytes| bytes.name() == name).map(|bytes| bytes as &dyn Format)
    }

    /// The filter with that name.
    pub fn filter(&self, name: &str) -> Option<&'static dyn Filter> {
        self.filters.iter().copied().find(|filter| filter.name() == name)
    }

    /// The driver that was probably meant by a name that is none.
    pub fn meant(&self, name: &str) -> Option<&'static str> {
        format::meant(self.formats, name).or_else(|| nearest(name, self.names()))
    }

    /// The format that files of that name usually have, by what follows the last dot.
    pub fn usual(&self, name: &OsStr) -> Option<&'static dyn Format> {
        let extension = Path::new(name).extension()?.to_str()?.to_lowercase();
        let known = |format: &&'static dyn Format| {
            format.name() == extension || format.also_called().contains(&extension.as_str())
        };
        self.formats.iter().copied().find(known)
    }

    /// Every name, sorted.
    pub fn names(&self) -> Vec<&'static str> {
        let formats = self.formats.iter().map(|format| format.name());
        let protocols = self.protocols.iter().map(|protocol| protocol.name());
        let mut names: Vec<_> =
            formats.chain(protocols).chain(self.filters.iter().map(|filter| filter.name())).collect();
        names.sort_unstable();
        names
    }

    /// The protocol for what lies under a plain path.
    pub fn of_path(&self, path: &OsStr) -> Result<&'static dyn Protocol> {
        let path = Path::new(path);
        let found = self.protocols.iter().copied().find(|protocol| protocol.takes(path));
        found.ok_or_else(|| Error::invalid(format!("No protocol for '{}'", path.display())))
    }

    /// What a name leads to, and what it says to that.
    pub fn of_name(&self, name: &OsStr) -> Result<Named> {
        let Some((prefix, rest)) = name::protocol(name) else {
            return Ok(Named::Protocol(self.of_path(name)?, Spelt::path(name.to_owned())));
        };
        let prefix = prefix.to_string_lossy();
        if let Some(filter) = self.filter(&prefix).filter(|filter| filter.has_prefix()) {
            return Ok(Named::Filter(filter, filter.spelt(rest)?));
        }
        let named = |protocol: &&dyn Protocol| protocol.prefix() == prefix || protocol.schemes().contains(&&*prefix);
        let protocol = self.protocols.iter().copied().find(named);
        let protocol = protocol.ok_or_else(|| {
            let plain = plain_path(name);
            let error = Error::invalid(format!("Unknown protocol '{prefix}'"));
            let known = ELSEWHERE.iter().find(|(names, _)| names.contains(&&*prefix));
            error.advise(match known {
                Some((_, way)) => (*way).to_owned(),
                None => format!("a file of that name is written '{}'", plain.display()),
            })
        })?;
        Ok(Named::Protocol(protocol, self.spelt(protocol, name)?))
    }

    /// What a name says to that protocol, of which it may start with the name.
    pub fn spelt(&self, protocol: &'static dyn Protocol, name: &OsStr) -> Result<Spelt> {
        match name::protocol(name) {
            Some((prefix, rest)) if prefix == protocol.prefix() => protocol.spelt(rest),
            _ => protocol.plain(name),
        }
    }

    /// What a name says to that filter: all of it is the name of what lies below, unless it starts with the filter's.
    pub fn wrapped(&self, filter: &'static dyn Filter, name: &OsStr) -> Result<Wrapped> {
        match name::protocol(name) {
            Some((prefix, rest)) if prefix == filter.name() && filter.has_prefix() => filter.spelt(rest),
            _ => {
                // A name is that of an image, if there is one below.
                let by_kind = |wanted: bool| {
                    let mut all = filter.children().iter();
                    all.find_map(|child| match child {
                        Lower::Image(role) if wanted => Some(*role),
                        Lower::Bytes(role) if !wanted => Some(*role),
                        _ => None,
                    })
                };
                let role = by_kind(true).or_else(|| by_kind(false));
                let below = role.map(|role| (role, name.to_owned())).into_iter().collect();
                Ok(Wrapped { below, options: OptionTree::new() })
            }
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
