//! A directory of entries of various lengths, read a window at a time: the snapshot table, the bitmap directory.

use crate::block::{Child, Error, Result};

const WINDOW: u64 = 64 << 10;

/// A cursor over a range of a file that never holds more than one entry and a window of it.
#[derive(Debug)]
pub struct Window<'a> {
    file: &'a Child,
    /// What errors call it.
    what: &'static str,
    at: u64,
    /// What was read, from `from` on.
    bytes: Vec<u8>,
    from: u64,
}

impl<'a> Window<'a> {
    /// Starts at that byte of the file, with what is called `what`.
    pub fn new(file: &'a Child, what: &'static str, at: u64) -> Self {
        Self { file, what, at, bytes: Vec::new(), from: at }
    }

    /// Passes over `len` bytes.
    pub fn skip(&mut self, len: u64) -> Result<()> {
        self.at = self.at.checked_add(len).ok_or_else(|| Error::corrupt("a directory is too long"))?;
        Ok(())
    }

    /// The next `len` bytes (at most a few hundred KiB: the caller checks); past the end of the file, zeros.
    pub fn take(&mut self, len: u64) -> Result<&[u8]> {
        let end = self.at.checked_add(len).ok_or_else(|| Error::corrupt("a directory is too long"))?;
        if end > self.from.saturating_add(self.bytes.len() as u64) {
            let room = usize::try_from(len.max(WINDOW)).map_err(|_| Error::corrupt("a directory is too long"))?;
            self.bytes.resize(room, 0);
            self.from = self.at;
            self.file.read_metadata(self.what, self.at, &mut self.bytes)?;
        }
        let start = usize::try_from(self.at - self.from).unwrap_or(usize::MAX);
        self.at = end;
        let bytes = self.bytes.get(start..).and_then(|rest| rest.get(..usize::try_from(len).ok()?));
        bytes.ok_or_else(|| Error::corrupt("a directory is too long"))
    }
}
