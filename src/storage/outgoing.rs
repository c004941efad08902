//! What takes a file from front to back, once, and shows it when it is complete: a pipe, an object of a store.
//!
//! Invariant: what is dropped before [`Outgoing::complete`] shows no file where one would be taken for whole; a pipe
//! alone cannot take anything back.

use std::fs::File;
use std::io::Write;

use super::Result;

/// See the module.
pub trait Outgoing: Send {
    /// Takes the next bytes.
    fn put(&mut self, bytes: &[u8]) -> Result<()>;

    /// There are no more: the file is there when this returns.
    fn complete(&mut self) -> Result<()>;
}

impl Outgoing for File {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.write_all(bytes)?)
    }

    fn complete(&mut self) -> Result<()> {
        Ok(self.flush()?)
    }
}
