//! Options that any node takes, whatever its driver, and what children inherit of them.

use crate::block::keys::{take_switch, take_text};
use crate::block::name::in_order;
use crate::block::node::WriteManner;
use crate::block::{Error, OptionTree, Purpose, Result};
use crate::storage::CacheMode;
use crate::storage::lock::Access;

/// What is settled for a node before its driver is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// What for.
    pub purpose: Purpose,
    /// Allow other writers.
    pub force_share: bool,
    direct: bool,
    no_flush: bool,
    write_through: bool,
    /// What `aio` is where it is not said.
    pub native_aio: bool,
    unmap: bool,
    /// Its own `discard` and `detect-zeroes`, which its children do not inherit.
    manner: WriteManner,
    /// Written to, though its own options say that it is not.
    refused: bool,
    /// A switch of a parent's that is neither on nor off: it is the child that says so.
    bad: Option<&'static str>,
}

impl Settings {
    /// What the command asks of the top node.
    pub fn new(purpose: Purpose, force_share: bool, cache: CacheMode) -> Self {
        Self {
            purpose,
            force_share,
            direct: cache.direct(),
            no_flush: !cache.flushes(),
            write_through: cache.write_through(),
            native_aio: false,
            unmap: false,
            manner: WriteManner::default(),
            refused: false,
            bad: None,
        }
    }

    /// With `aio=native` for files that do not say.
    pub fn with_native_aio(self, native_aio: bool) -> Self {
        Self { native_aio, ..self }
    }

    /// What a layer inherits that lies below one with these settings.
    pub fn below(self) -> Self {
        Self { purpose: self.purpose.below(), manner: WriteManner::default(), refused: false, bad: None, ..self }
    }

    /// What an image inherits that one with these settings lies in.
    pub fn inside(self) -> Self {
        Self { purpose: self.purpose.inside(), manner: WriteManner::default(), ..self }
    }

    /// How the user has the node written.
    pub fn manner(&self) -> WriteManner {
        self.manner
    }

    /// The permissions that a node with these settings takes, but for what is particular to its format.
    pub fn access(&self) -> Access {
        match (self.force_share, self.purpose) {
            (true, Purpose::Look) => Access::NONE,
            (true, _) => Access::SHARED,
            (false, Purpose::Write | Purpose::Repair | Purpose::Commit) => Access::WRITE,
            (false, Purpose::Look) => Access::LOOK,
            (false, Purpose::Read | Purpose::ReadBack | Purpose::Check) => Access::READ,
        }
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

    /// Takes a node's own options; what it does not say is as `self`, its parent's. What is wrong with them is
    /// told by [`Claims::settle`], because the file below is opened before.
    ///
    /// `auto-read-only` and `active` mean nothing to an image that is opened for one command; their values are checked
    /// all the same.
    pub fn take(self, options: &mut OptionTree) -> (Self, Claims) {
        let mut own = Self { refused: false, manner: WriteManner::default(), ..self };
        let given: Vec<String> = in_order(options).into_iter().map(|(key, _)| key.clone()).collect();
        let mut bad = None;
        let mut read_only = None;
        for key in given {
            let Some(key) = SWITCHES.iter().copied().find(|switch| **switch == key) else { continue };
            if own.bad == Some(key) {
                own.bad = None;
            }
            match (key, take_switch(options, key)) {
                (_, Err(_)) => bad = bad.or(Some(key)),
                (_, Ok(None)) => {}
                ("read-only", Ok(on)) => read_only = on,
                ("force-share", Ok(Some(on))) => own.force_share = on,
                ("cache.direct", Ok(Some(on))) => own.direct = on,
                ("cache.no-flush", Ok(Some(on))) => own.no_flush = on,
                _ => {}
            }
        }
        own.bad = bad.or(own.bad);
        own.refused = own.purpose.writes() && read_only == Some(true);
        let discard = take_text(options, "discard");
        match discard.as_deref() {
            Some("unmap" | "on") => own.unmap = true,
            Some("ignore" | "off") => (own.unmap, own.manner.keep_space) = (false, true),
            _ => {}
        }
        let detect_zeroes = take_text(options, "detect-zeroes");
        own.manner.detect_zeroes = match detect_zeroes.as_deref() {
            Some("on") => Some(false),
            Some("unmap") => Some(true),
            _ => None,
        };
        let claims = Claims {
            bad: own.bad,
            shared: own.force_share && (own.purpose.writes() || read_only == Some(false)),
            discard,
            detect_zeroes,
            unmap: own.unmap,
            name: take_text(options, "node-name"),
        };
        if own.bad == Some("active") {
            // The one that children do not inherit.
            own.bad = None;
        }
        (own, claims)
    }

    /// Refuses what shall be written to and may not.
    pub fn may_write(&self) -> Result<()> {
        if self.refused { Err(Error::invalid("Block node is read-only")) } else { Ok(()) }
    }
}

/// Options that are on or off.
const SWITCHES: [&str; 6] = ["read-only", "auto-read-only", "active", "force-share", "cache.direct", "cache.no-flush"];

/// What a node's options say, not yet judged.
#[derive(Debug)]
pub struct Claims {
    bad: Option<&'static str>,
    shared: bool,
    discard: Option<String>,
    detect_zeroes: Option<String>,
    unmap: bool,
    name: Option<String>,
}

impl Claims {
    /// Refuses what is wrong with them, and takes the node's name, which it gives.
    pub fn settle(self, names: &mut Names) -> Result<Option<String>> {
        if let Some(key) = self.bad {
            return Err(Error::invalid(format!("Parameter '{key}' expects 'on' or 'off'")));
        }
        if self.shared {
            return Err(Error::invalid("force-share=on can only be used with read-only images"));
        }
        if !matches!(self.discard.as_deref(), None | Some("unmap" | "on" | "ignore" | "off")) {
            return Err(Error::invalid("Invalid discard option"));
        }
        match self.detect_zeroes.as_deref() {
            None | Some("off" | "on") => {}
            Some("unmap") if self.unmap => {}
            Some("unmap") => {
                return Err(Error::invalid(
                    "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
                ));
            }
            Some(other) => return Err(Error::invalid(format!("invalid parameter value: {other}"))),
        }
        self.name.map(|name| names.add(name)).transpose()
    }
}

/// The names given to nodes.
#[derive(Debug, Default)]
pub struct Names(Vec<String>);

impl Names {
    fn add(&mut self, name: String) -> Result<String> {
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
        self.0.push(name.clone());
        Ok(name)
    }
}
