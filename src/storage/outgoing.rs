//! What takes a file from front to back, once, and shows it when it is complete: a pipe, an object of a store.
//!
//! Invariant: what is dropped before [`Outgoing::complete`] shows no file where one would be taken for whole; a pipe
//! alone cannot take anything back.

use std::fs::File;
use std::io::Write;

use super::Result;

/// Zeros that are put at once.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// See the module.
pub trait Outgoing: Send {
    /// Takes the next bytes.
    fn put(&mut self, bytes: &[u8]) -> Result<()>;

    /// So many zeros are next.
    fn put_zeros(&mut self, len: u64) -> Result<()> {
        let mut left = len;
        while left > 0 {
            let n = usize::try_from(left).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            self.put(&ZEROS[..n])?;
            left -= n as u64;
        }
        Ok(())
    }

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

/// For unit tests: keeps what was put, and whether it was completed.
#[cfg(test)]
#[derive(Debug, Default, Clone)]
pub struct Taken(pub std::sync::Arc<std::sync::Mutex<(Vec<u8>, bool)>>);

#[cfg(test)]
impl Outgoing for Taken {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.lock().unwrap().0.extend_from_slice(bytes);
        Ok(())
    }

    fn complete(&mut self) -> Result<()> {
        self.0.lock().unwrap().1 = true;
        Ok(())
    }
}
