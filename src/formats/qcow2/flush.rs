//! Changes on their way to the file: what has to be known before the first, what is written when, and what is let go
//! of only then.

use crate::block::Result;
use crate::block::error::Context;
use crate::storage::Event;

use super::Qcow2Driver;
use super::alloc::Allocator;
use super::layout;

/// Most runs that wait to be freed before tables are written back.
const MOST_FREED: usize = 4096;

impl Qcow2Driver {
    /// Writes the tables back and lets go of what nothing points to any more.
    pub(super) fn settle(&self, alloc: &mut Allocator) -> Result<()> {
        self.tables.write_back()?;
        if alloc.freed.is_empty() {
            return Ok(());
        }
        let storage = &self.file().storage;
        storage.flush().context("Could not flush")?;
        let (geometry, size) = (self.geometry, self.geometry.cluster_size());
        storage.announce(Event::CLUSTER_FREE);
        for (start, n, punch) in std::mem::take(&mut alloc.freed) {
            for (first, count) in self.lower(start, n)? {
                self.freed(alloc, first, count);
                for at in first.run(count).map(|cluster| geometry.offset_of(cluster)) {
                    self.tables.forget(at, size);
                    self.forget_metadata(at);
                }
                if punch {
                    // An offer, which the host need not take.
                    let _ = storage.discard(geometry.offset_of(first), count * size);
                }
            }
        }
        self.tables.write_back()
    }

    pub(super) fn settle_if_due(&self, alloc: &mut Allocator) -> Result<()> {
        if self.tables.is_full() || alloc.freed.len() >= MOST_FREED { self.settle(alloc) } else { Ok(()) }
    }

    /// What has to be known and marked before the first change.
    pub(super) fn before_first_change(&self, alloc: &mut Allocator) -> Result<()> {
        self.before_resize(alloc)?;
        self.begin_bitmaps(&mut alloc.dirty)
    }

    /// The same where no guest data is written.
    pub(super) fn before_resize(&self, alloc: &mut Allocator) -> Result<()> {
        if !alloc.learned {
            self.learn_metadata()?;
            alloc.learned = true;
        }
        Ok(())
    }

    /// Everything in the files, and the end of compressed data filled up to a sector.
    pub(super) fn flush_all(&self, last: bool) -> Result<()> {
        self.file().storage.announce(Event::FLUSH_TO_OS);
        let mut alloc = self.lock_alloc();
        if self.write {
            self.settle(&mut alloc).with_context(|| format!("{}: could not flush", self.file().name))?;
            if last {
                self.finish_bitmaps(&mut alloc)?;
            }
            let storage = &self.file().storage;
            if last && std::mem::take(&mut alloc.compressed) && !storage.facts().fixed_len {
                let len = storage.len().context("Could not get file size")?;
                let full = len.next_multiple_of(layout::SECTOR);
                if full != len {
                    storage.set_len(full, crate::storage::Preallocation::Off).context("Could not resize file")?;
                }
            }
        }
        drop(alloc);
        for file in &self.files {
            file.flush()?;
        }
        Ok(())
    }
}
