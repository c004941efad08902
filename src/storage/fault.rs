//! A storage that records what is done to it and fails on purpose, for tests of what a crash leaves behind.
//!
//! Operations are counted from 0: `write_at`, `zero`, `discard`, `set_len` and `flush`, in the order in which they
//! begin. The count goes on after a fault, so a run without a fault tells how many points there are. What reads
//! (`read_at`, `extent`) is counted apart from that, and fails apart from that.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;

use super::{Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// That operation does nothing and fails (`EIO`, `ENOSPC`).
    Fail(Errno),
    /// That operation and all after it do nothing and fail: the disk is gone, or stays full.
    FailFrom(Errno),
    /// The first half of what was to be written is, then that operation fails with `EIO`.
    Shorten,
    /// That operation and all after it do nothing and succeed: as if the program had been killed just before.
    Stop,
}

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultyOperation {
    /// `write_at`.
    Write {
        /// Where.
        at: u64,
        /// How many bytes.
        len: u64,
    },
    /// `zero`.
    Zero {
        /// Where.
        at: u64,
        /// How many bytes.
        len: u64,
    },
    /// `discard`.
    Discard {
        /// Where.
        at: u64,
        /// How many bytes.
        len: u64,
    },
    /// `set_len`.
    SetLen(u64),
    /// `flush`.
    Flush,
}

/// See the module.
#[derive(Debug)]
pub struct Faulty {
    inner: Arc<dyn Storage>,
    fault: Option<(usize, Fault)>,
    log: Arc<Mutex<Vec<FaultyOperation>>>,
    /// The read that fails.
    bad_read: Option<usize>,
    reads: Arc<AtomicUsize>,
}

enum Verdict {
    Do,
    Skip,
    Half,
    Fail(Errno),
}

impl Faulty {
    /// Records and never fails.
    pub fn recording(inner: Arc<dyn Storage>) -> Self {
        Self { inner, fault: None, log: Arc::default(), bad_read: None, reads: Arc::default() }
    }

    /// Records; that read fails with `EIO`.
    pub fn failing_read(inner: Arc<dyn Storage>, at: usize) -> Self {
        Self { bad_read: Some(at), ..Self::recording(inner) }
    }

    /// Records, and fails in that way at that operation.
    pub fn new(inner: Arc<dyn Storage>, at: usize, fault: Fault) -> Self {
        Self { fault: Some((at, fault)), ..Self::recording(inner) }
    }

    /// Another storage of the same image: its operations count with this one's, and the fault is the same.
    pub fn beside(&self, inner: Arc<dyn Storage>) -> Self {
        let (log, reads) = (self.log.clone(), self.reads.clone());
        Self { inner, fault: self.fault, log, bad_read: self.bad_read, reads }
    }

    /// What was asked for so far.
    pub fn operations(&self) -> Vec<FaultyOperation> {
        self.log().clone()
    }

    /// How often there was a read so far.
    pub fn reads(&self) -> usize {
        self.reads.load(Ordering::Relaxed)
    }

    fn begin_read(&self) -> Result<()> {
        let number = self.reads.fetch_add(1, Ordering::Relaxed);
        if self.bad_read == Some(number) { Err(Errno::EIO.into()) } else { Ok(()) }
    }

    /// Whether the fault has come.
    pub fn tripped(&self) -> bool {
        self.fault.is_some_and(|(at, _)| self.log().len() > at)
    }

    /// What it wraps.
    pub fn inner(&self) -> &Arc<dyn Storage> {
        &self.inner
    }

    fn log(&self) -> MutexGuard<'_, Vec<FaultyOperation>> {
        self.log.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn begin(&self, operation: FaultyOperation) -> Verdict {
        let mut log = self.log();
        let number = log.len();
        log.push(operation);
        match self.fault {
            Some((at, Fault::Fail(errno))) if number == at => Verdict::Fail(errno),
            Some((at, Fault::FailFrom(errno))) if number >= at => Verdict::Fail(errno),
            Some((at, Fault::Shorten)) if number == at => Verdict::Half,
            Some((at, Fault::Stop)) if number >= at => Verdict::Skip,
            _ => Verdict::Do,
        }
    }

    /// Runs an operation as a whole, or half of it, or not at all.
    fn run(&self, operation: FaultyOperation, len: u64, work: impl Fn(u64) -> Result<()>) -> Result<()> {
        match self.begin(operation) {
            Verdict::Do => work(len),
            Verdict::Skip => Ok(()),
            Verdict::Fail(errno) => Err(errno.into()),
            Verdict::Half => {
                if len > 1 {
                    work(len / 2)?;
                }
                Err(Errno::EIO.into())
            }
        }
    }
}

impl Storage for Faulty {
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.begin_read()?;
        self.inner.read_at(at, buf)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        let len = buf.len() as u64;
        self.run(FaultyOperation::Write { at, len }, len, |n| {
            self.inner.write_at(at, buf.get(..usize::try_from(n).unwrap_or(usize::MAX)).unwrap_or(buf))
        })
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        self.begin_read()?;
        self.inner.extent(at, max)
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        self.run(FaultyOperation::Zero { at, len }, len, |n| self.inner.zero(at, n, how))
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.run(FaultyOperation::Discard { at, len }, len, |n| self.inner.discard(at, n))
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        // A length is set or not: nothing lies between.
        self.run(FaultyOperation::SetLen(len), 1, |_| self.inner.set_len(len, fill))
    }

    fn flush(&self) -> Result<()> {
        self.run(FaultyOperation::Flush, 1, |_| self.inner.flush())
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.inner.allocated()
    }

    fn facts(&self) -> Facts {
        Facts { offload: false, ..self.inner.facts() }
    }

    fn host(&self) -> Option<&HostFile> {
        self.inner.host()
    }

    fn announce(&self, event: Event) {
        self.inner.announce(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::memory::Memory;

    fn after(at: usize, fault: Fault) -> (Vec<u8>, usize) {
        let memory = Arc::new(Memory::default());
        let faulty = Faulty::new(memory.clone(), at, fault);
        let mut errors = 0;
        for i in 0..3 {
            errors += usize::from(faulty.write_at(i * 4, &[b'a' + i as u8; 4]).is_err());
        }
        errors += usize::from(faulty.flush().is_err());
        assert_eq!(faulty.operations().len(), 4);
        assert!(faulty.tripped());
        (memory.to_vec(), errors)
    }

    #[test]
    fn each_fault_does_what_it_says() {
        assert_eq!(after(1, Fault::Fail(Errno::EIO)), (b"aaaa\0\0\0\0cccc".to_vec(), 1));
        assert_eq!(after(1, Fault::FailFrom(Errno::ENOSPC)), (b"aaaa".to_vec(), 3));
        assert_eq!(after(2, Fault::Shorten), (b"aaaabbbbcc".to_vec(), 1));
        assert_eq!(after(1, Fault::Stop), (b"aaaa".to_vec(), 0));
        assert_eq!(after(3, Fault::Fail(Errno::EIO)).1, 1);
    }

    #[test]
    fn one_read_fails() {
        let faulty = Faulty::failing_read(Arc::new(Memory::new(vec![7; 4])), 1);
        let beside = faulty.beside(faulty.inner().clone());
        let mut buf = [0; 4];
        let read = [&faulty, &beside, &faulty].map(|storage| storage.read_at(0, &mut buf).is_ok());
        assert_eq!((read, faulty.reads(), buf), ([true, false, true], 3, [7; 4]));
        assert!(faulty.write_at(0, &buf).is_ok() && !faulty.tripped());
    }
}
