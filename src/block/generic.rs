//! Options that any node takes, whatever its driver, and what children inherit of them.

use super::keys::{take_switch, take_text};
use super::{Error, OptionTree, Result};
use crate::storage::CacheMode;

/// What is settled for a node before its driver is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// For reading and writing.
    pub write: bool,
    /// Bear others that write meanwhile.
    pub force_share: bool,
    direct: bool,
    no_flush: bool,
    write_through: bool,
    unmap: bool,
}

impl Settings {
    /// What the command asks of the top node.
    pub fn new(write: bool, force_share: bool, cache: CacheMode) -> Self {
        Self {
            write,
            force_share,
            direct: cache.direct(),
            no_flush: !cache.flushes(),
            write_through: cache.write_through(),
            unmap: false,
        }
    }

    /// The same, for reading alone.
    pub fn for_reading(self) -> Self {
        Self { write: false, ..self }
    }

    /// The cache mode that comes out.
    pub fn cache(&self) -> CacheMode {
        match (self.direct, self.write_through, self.no_flush) {
            (true, true, _) => CacheMode::Directsync,
            (true, false, _) => CacheMode::None,
            (false, true, _) => CacheMode::Writethrough,
            (false, false, true) => CacheMode::Unsafe,
            (false, false, false) => CacheMode::Writeback,
        }
    }

    /// Whether the page cache is passed by.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// Takes a node's own options; what it does not say is as `self`, its parent's.
    ///
    /// `auto-read-only`, `active`, `discard` and `detect-zeroes` mean nothing to an image that is opened for one
    /// command, which says itself what it writes; their values are checked all the same.
    pub fn take(self, options: &mut OptionTree, names: &mut Names) -> Result<Self> {
        let mut own = self;
        if let Some(name) = take_text(options, "node-name") {
            names.add(name)?;
        }
        let read_only = take_switch(options, "read-only")?;
        take_switch(options, "auto-read-only")?;
        take_switch(options, "active")?;
        own.force_share = take_switch(options, "force-share")?.unwrap_or(self.force_share);
        own.direct = take_switch(options, "cache.direct")?.unwrap_or(self.direct);
        own.no_flush = take_switch(options, "cache.no-flush")?.unwrap_or(self.no_flush);
        match take_text(options, "discard").as_deref() {
            None => {}
            Some("unmap" | "on") => own.unmap = true,
            Some("ignore" | "off") => own.unmap = false,
            Some(_) => return Err(Error::invalid("Invalid discard option")),
        }
        match take_text(options, "detect-zeroes").as_deref() {
            None | Some("off" | "on") => {}
            Some("unmap") if own.unmap => {}
            Some("unmap") => {
                return Err(Error::invalid(
                    "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
                ));
            }
            Some(other) => return Err(Error::invalid(format!("invalid parameter value: {other}"))),
        }
        if own.force_share && (self.write || read_only == Some(false)) {
            return Err(Error::invalid("force-share=on can only be used with read-only images"));
        }
        if self.write && read_only == Some(true) {
            return Err(Error::invalid("Block node is read-only"));
        }
        Ok(own)
    }
}

/// The names given to nodes.
#[derive(Debug, Default)]
pub struct Names(Vec<String>);

impl Names {
    fn add(&mut self, name: String) -> Result<()> {
        let good = name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'));
        if !good {
            return Err(Error::invalid(format!("Invalid node-name: '{name}'")));
        }
        if self.0.contains(&name) {
            return Err(Error::invalid(format!("Duplicate nodes with node-name='{name}'")));
        }
        if name.len() > 31 {
            return Err(Error::invalid("Node name too long"));
        }
        self.0.push(name);
        Ok(())
    }
}
