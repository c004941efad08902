//! Where an image goes that is written from front to back: a pipe, or what a protocol takes so.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::block::protocol::SendFile;
use crate::block::{Drivers, Named, OptionTree, Result};
use crate::storage::outgoing::Outgoing;
use crate::storage::pipe;

/// See the module.
#[derive(Debug)]
pub enum WayOut {
    /// A pipe of the host.
    Pipe(PathBuf),
    /// A file that a protocol takes, and what its name says.
    Sent(&'static dyn SendFile, OptionTree),
}

impl WayOut {
    /// The one that a name leads to; nothing for what is written in any order, or where a protocol is named in the place
    /// of the format: that says how it is written.
    pub fn find(drivers: &Drivers, format: &str, name: &OsStr) -> Option<Self> {
        if drivers.protocol(format).is_some() {
            return None;
        }
        let path = Path::new(name);
        if pipe::is_pipe(path) {
            return Some(Self::Pipe(path.to_owned()));
        }
        match drivers.of_name(name).ok()? {
            Named::Protocol(protocol, spelt) => Some(Self::Sent(protocol.sending()?, spelt.options)),
            Named::Filter(..) => None,
        }
    }

    /// Ready to take so many bytes.
    pub fn open(&self, len: u64) -> Result<Box<dyn Outgoing>> {
        match self {
            Self::Pipe(path) => Ok(Box::new(pipe::open_sink(path)?)),
            Self::Sent(send, options) => send.send(options, len),
        }
    }

    /// Whether it is a pipe.
    pub fn is_pipe(&self) -> bool {
        matches!(self, Self::Pipe(_))
    }
}
