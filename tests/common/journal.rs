//! Files in memory that remember each change and each flush, to see what a power cut could have left.

use std::sync::{Arc, Mutex};

use fastrand::Rng;
use vimg::storage::memory::Memory;
use vimg::storage::{Event, Facts, HostExtent, HostFile, Preallocation, Result, Storage, Zeroing};

use super::inside::{Files, bytes_of};

#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Zero(u64, u64, Zeroing),
    Discard(u64, u64),
    SetLen(u64),
    Flush,
}

/// What was done to the files of an image, in order.
#[derive(Debug, Default, Clone)]
pub struct Journal(Arc<Mutex<Vec<(String, Change)>>>);

impl Journal {
    /// Copies of the files whose changes are remembered.
    pub fn over(&self, files: &Files) -> Files {
        let copies = files.copy();
        let kept = Files::default();
        for name in copies.names() {
            let inner = copies.get(&name).expect("file");
            kept.put(&name, Arc::new(Journaled { name: name.clone(), inner, journal: self.clone() }));
        }
        kept
    }

    /// How many changes and flushes there were.
    pub fn len(&self) -> usize {
        self.0.lock().expect("journal").len()
    }

    /// The files as a power cut after so many steps could leave them: of each file all that was changed before its
    /// last flush is there, and any part of what came after.
    pub fn cut(&self, before: &Files, steps: usize, rng: &mut Rng) -> Files {
        let journal = self.0.lock().expect("journal");
        let done = &journal[..steps];
        let left = before.copy();
        for name in left.names() {
            let file = Memory::new(bytes_of(&*left.get(&name).expect("file")));
            let flushed = done.iter().rposition(|(of, change)| *of == name && matches!(change, Change::Flush));
            for (n, (_, change)) in done.iter().enumerate().filter(|(_, (of, _))| *of == name) {
                if flushed.is_none_or(|flushed| n > flushed) && rng.bool() {
                    continue;
                }
                match change {
                    Change::Write(at, bytes) => file.write_at(*at, bytes),
                    Change::Zero(at, len, how) => file.zero(*at, *len, *how),
                    Change::Discard(at, len) => file.discard(*at, *len),
                    Change::SetLen(len) => file.set_len(*len, Preallocation::Off),
                    Change::Flush => Ok(()),
                }
                .expect("memory");
            }
            left.put(&name, Arc::new(file));
        }
        left
    }
}

#[derive(Debug)]
struct Journaled {
    name: String,
    inner: Arc<dyn Storage>,
    journal: Journal,
}

impl Journaled {
    fn note(&self, change: Change) {
        self.journal.0.lock().expect("journal").push((self.name.clone(), change));
    }
}

impl Storage for Journaled {
    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.inner.read_at(at, buf)
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        self.note(Change::Write(at, buf.to_vec()));
        self.inner.write_at(at, buf)
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        self.inner.extent(at, max)
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        self.note(Change::Zero(at, len, how));
        self.inner.zero(at, len, how)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        self.note(Change::Discard(at, len));
        self.inner.discard(at, len)
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        self.note(Change::SetLen(len));
        self.inner.set_len(len, fill)
    }

    fn flush(&self) -> Result<()> {
        self.note(Change::Flush);
        self.inner.flush()
    }

    fn allocated(&self) -> Result<Option<u64>> {
        self.inner.allocated()
    }

    fn facts(&self) -> Facts {
        self.inner.facts()
    }

    fn host(&self) -> Option<&HostFile> {
        self.inner.host()
    }

    fn announce(&self, event: Event) {
        self.inner.announce(event);
    }
}
