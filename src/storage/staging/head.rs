//! A file that is written in place gets its first bytes, and its right end, last.
//!
//! Every format but raw is known by what stands at its beginning, or (a footer) at its end. As long as the one is
//! missing and something lies behind the other, what is there is not taken for an image: a kill half-way leaves a file
//! that no program opens as one.
//!
//! Invariants: through this storage the bytes are there. In the file the first ones are zeros, and zeros follow the
//! last one, until [`HeadLast::finish`]. The older content stays until something is written ([`HeadLast::begin`]): what
//! is refused before that has changed nothing. Locks are leaves, and that of the bytes is not held across I/O.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::storage::file::HostFile;
use crate::storage::{Event, Facts, HostExtent, Preallocation, Result, Storage, Zeroing};

/// Bytes that are kept back: a sector, which holds the signature of every format.
const HEAD: usize = 512;
/// Bytes behind the end: more than a footer is away from it.
const BEHIND: u64 = 512;

/// The file, but for its first bytes.
#[derive(Debug)]
pub(super) struct HeadLast {
    file: Arc<HostFile>,
    head: Mutex<[u8; HEAD]>,
    /// How long it is for whoever writes it. The file is longer once something was written.
    len: AtomicU64,
    /// Whether the older content has gone.
    begun: Mutex<bool>,
}

/// How many of `len` bytes from `at` are kept back.
fn kept_back(at: u64, len: u64) -> usize {
    let left = (HEAD as u64).saturating_sub(at);
    usize::try_from(left.min(len)).unwrap_or(HEAD)
}

impl HeadLast {
    /// For a file that will be empty.
    pub(super) fn new(file: Arc<HostFile>) -> Self {
        Self { file, head: Mutex::new([0; HEAD]), len: AtomicU64::new(0), begun: Mutex::new(false) }
    }

    fn head(&self) -> MutexGuard<'_, [u8; HEAD]> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes away what the file held before, if it is still there.
    pub(super) fn begin(&self) -> Result<()> {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        if !*begun {
            self.file.set_len(0, Preallocation::Off)?;
            *begun = true;
        }
        Ok(())
    }

    /// Whether what the file held before has gone.
    pub(super) fn has_begun(&self) -> bool {
        *self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes it at least that long.
    fn reach(&self, len: u64) -> Result<()> {
        self.begin()?;
        if self.len.fetch_max(len, Ordering::SeqCst) < len {
            self.file.grow(len.saturating_add(BEHIND))
        } else {
            Ok(())
        }
    }

    /// Takes the room that [`HeadLast::finish`] needs, so that a full disk is found out while the failure of it leaves
    /// no more undone than any other.
    pub(super) fn reserve(&self) -> Result<()> {
        self.begin()?;
        match kept_back(0, self.len()?) {
            0 => Ok(()),
            kept => self.file.zero(0, kept as u64, Zeroing::Write),
        }
    }

    /// Writes what was kept back, and ends it where it ends.
    pub(super) fn finish(&self) -> Result<()> {
        self.begin()?;
        let (head, len) = (*self.head(), self.len()?);
        let head = head.get(..kept_back(0, len)).unwrap_or(&head);
        self.file.write_at(0, head)?;
        self.file.set_len(len, Preallocation::Off)
    }
}

impl Storage for HeadLast {
    fn len(&self) -> Result<u64> {
        Ok(self.len.load(Ordering::SeqCst))
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        match self.has_begun() {
            true => self.file.read_at(at, buf)?,
            false => buf.fill(0),
        }
        let from = usize::try_from(at).unwrap_or(HEAD).min(HEAD);
        for (to, byte) in buf.iter_mut().zip(self.head().iter().skip(from)) {
            *to = *byte;
        }
        Ok(())
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        self.reach(at.saturating_add(buf.len() as u64))?;
        let (head, rest) = buf.split_at(kept_back(at, buf.len() as u64));
        if head.is_empty() {
            return self.file.write_at(at, buf);
        }
        let from = usize::try_from(at).unwrap_or(HEAD);
        for (to, byte) in self.head().iter_mut().skip(from).zip(head) {
            *to = *byte;
        }
        if rest.is_empty() { Ok(()) } else { self.file.write_at(at.saturating_add(head.len() as u64), rest) }
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        let len = self.len()?;
        match (kept_back(at, max), len.checked_sub(at)) {
            (_, None | Some(0)) => Ok(HostExtent::hole(max)),
            (0, Some(left)) => self.file.extent(at, max.min(left)),
            (kept, _) => Ok(HostExtent::data(kept as u64)),
        }
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        self.reach(at.saturating_add(len))?;
        let (from, kept) = (usize::try_from(at).unwrap_or(HEAD), kept_back(at, len));
        self.head().iter_mut().skip(from).take(kept).for_each(|byte| *byte = 0);
        // There it is zeros already; but it may have to be allocated.
        self.file.zero(at, len, how)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        let kept = kept_back(at, len) as u64;
        if self.has_begun() { self.file.discard(at.saturating_add(kept), len - kept) } else { Ok(()) }
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        if !self.has_begun() && len == 0 {
            return Ok(());
        }
        self.begin()?;
        // What lies behind the end is not to be taken for a part that is filled.
        self.file.set_len(self.len()?, Preallocation::Off)?;
        self.file.set_len(len, fill)?;
        self.len.store(len, Ordering::SeqCst);
        self.head().iter_mut().skip(kept_back(0, len)).for_each(|byte| *byte = 0);
        self.file.grow(len.saturating_add(BEHIND))
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

    fn announce(&self, _event: Event) {}
}
