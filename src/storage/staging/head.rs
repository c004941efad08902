//! A file that is written in place gets its first bytes last.
//!
//! Every format but raw is known by what stands at its beginning. As long as that is missing, what lies behind it is
//! not taken for an image: a kill half-way leaves a file that no program opens as one.
//!
//! Invariants: through this storage the bytes are there; in the file they are zeros until [`HeadLast::finish`]. The
//! lock is a leaf and is not held across I/O.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::storage::file::HostFile;
use crate::storage::{Facts, HostExtent, Preallocation, Result, Storage, Zeroing};

/// Bytes that are kept back: a sector, which holds the signature of every format.
const HEAD: usize = 512;

/// The file, but for its first bytes.
#[derive(Debug)]
pub(super) struct HeadLast {
    file: Arc<HostFile>,
    head: Mutex<[u8; HEAD]>,
}

/// How many of `len` bytes from `at` are kept back.
fn kept_back(at: u64, len: u64) -> usize {
    let left = (HEAD as u64).saturating_sub(at);
    usize::try_from(left.min(len)).unwrap_or(HEAD)
}

impl HeadLast {
    /// For an empty file.
    pub(super) fn new(file: Arc<HostFile>) -> Self {
        Self { file, head: Mutex::new([0; HEAD]) }
    }

    fn head(&self) -> MutexGuard<'_, [u8; HEAD]> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes what was kept back.
    pub(super) fn finish(&self) -> Result<()> {
        let head = *self.head();
        let len = kept_back(0, self.file.len()?);
        self.file.write_at(0, head.get(..len).unwrap_or(&head))
    }
}

impl Storage for HeadLast {
    fn len(&self) -> Result<u64> {
        self.file.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_at(at, buf)?;
        let from = usize::try_from(at).unwrap_or(HEAD).min(HEAD);
        for (to, byte) in buf.iter_mut().zip(self.head().iter().skip(from)) {
            *to = *byte;
        }
        Ok(())
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        let (head, rest) = buf.split_at(kept_back(at, buf.len() as u64));
        if head.is_empty() {
            return self.file.write_at(at, buf);
        }
        let from = usize::try_from(at).unwrap_or(HEAD);
        for (to, byte) in self.head().iter_mut().skip(from).zip(head) {
            *to = *byte;
        }
        let end = at.saturating_add(head.len() as u64);
        match rest.is_empty() {
            true => self.file.grow(end),
            false => self.file.write_at(end, rest),
        }
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        match kept_back(at, max) {
            0 => self.file.extent(at, max),
            len if at < self.file.len()? => Ok(HostExtent::data(len as u64)),
            _ => self.file.extent(at, max),
        }
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        let (from, kept) = (usize::try_from(at).unwrap_or(HEAD), kept_back(at, len));
        self.head().iter_mut().skip(from).take(kept).for_each(|byte| *byte = 0);
        // There it is zeros already; but it may have to be longer, or allocated.
        self.file.zero(at, len, how)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        let kept = kept_back(at, len) as u64;
        self.file.discard(at.saturating_add(kept), len - kept)
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        self.file.set_len(len, fill)?;
        self.head().iter_mut().skip(kept_back(0, len)).for_each(|byte| *byte = 0);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.file.flush()
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.file.allocated()
    }

    fn facts(&self) -> Facts {
        Facts { offload: false, ..self.file.facts() }
    }

    fn host(&self) -> Option<&HostFile> {
        Some(&self.file)
    }
}
