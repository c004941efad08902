//! Reads and writes of what is no guest data: headers, tables, directories, texts. An error says which of them it was, in
//! which file and where.

use super::error::{Context, Operation, Place};
use super::{Child, Result};
use crate::storage::Storage;

/// Fills `buf` from `at` on with a part of what is called `what` in the file with that name.
pub fn read(storage: &dyn Storage, file: &str, what: &'static str, at: u64, buf: &mut [u8]) -> Result<()> {
    storage.read_at(at, buf).at(|| Place::of_table(Operation::Read, file, what, at))
}

/// Writes a part of what is called `what` in the file with that name.
pub fn write(storage: &dyn Storage, file: &str, what: &'static str, at: u64, bytes: &[u8]) -> Result<()> {
    storage.write_at(at, bytes).at(|| Place::of_table(Operation::Write, file, what, at))
}

impl Child {
    /// See [`read`].
    pub fn read_metadata(&self, what: &'static str, at: u64, buf: &mut [u8]) -> Result<()> {
        read(&*self.storage, &self.name, what, at, buf)
    }

    /// See [`write()`].
    pub fn write_metadata(&self, what: &'static str, at: u64, bytes: &[u8]) -> Result<()> {
        write(&*self.storage, &self.name, what, at, bytes)
    }
}
