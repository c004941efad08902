//! What becomes of an overlay: another backing file in its header, or nothing stored over the one that it has.
//!
//! Emptying takes back all entries of the L1 table first; what they referred to is freed when that is in the file, then
//! the file is cut. Snapshots, bitmaps and the size stay as they are: the disk shows the same before and after.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use super::Qcow2Driver;
use super::layout::{DATA_FILE_RAW, ENTRY, MAX_BACKING_NAME};
use crate::block::{BackingChange, BackingRef, BlockDriver, Emptying, Error, Result};

impl BackingChange for Qcow2Driver {
    fn check(&self, new: Option<&BackingRef>, _below: Option<&dyn BlockDriver>) -> Result<()> {
        let raw = self.header().fields.autoclear & DATA_FILE_RAW != 0;
        let longest = usize::try_from(MAX_BACKING_NAME).unwrap_or(usize::MAX);
        if new.is_some_and(|new| raw || new.name.len() > longest) {
            return Err(Error::invalid("Invalid argument"));
        }
        let mut header = self.header().clone();
        header.set_backing(new);
        header.to_bytes().map(drop).map_err(|_| Error::invalid("No space left in the file header"))
    }

    fn begin(&self) {
        self.keeps_zeros.store(true, Ordering::Relaxed);
    }

    fn change(&self, new: Option<&BackingRef>, _below: Option<&dyn BlockDriver>) -> Result<()> {
        self.flush_all(false)?;
        let alloc = self.lock_alloc();
        self.update_header(|header| header.set_backing(new))?;
        drop(alloc);
        self.file().flush()
    }
}

impl Emptying for Qcow2Driver {
    fn make_empty(&self) -> Result<()> {
        let mut alloc = self.lock_alloc();
        self.before_resize(&mut alloc)?;
        self.settle(&mut alloc)?;
        self.data_apart()?;
        self.tables_apart()?;
        self.check_beyond(0)?;
        self.drop_beyond(&mut alloc, 0)?;
        self.settle(&mut alloc)?;
        if self.external
            && let Some(data) = self.files.get(self.data_file())
        {
            self.file().flush()?;
            // An offer, which the host need not take.
            let _ = data.storage.discard(0, self.header().fields.size);
        }
        self.cut_unused(&mut alloc)
    }
}

impl Qcow2Driver {
    /// Refuses an L1 table that names an L2 table twice: it would be given up twice.
    fn tables_apart(&self) -> Result<()> {
        let (l1, mut tables) = (self.l1(), BTreeSet::new());
        for index in 0..l1.len / ENTRY {
            let table = self.l1_entry(l1, index)?.table();
            if let Some(at) = table.filter(|at| !tables.insert(*at)) {
                return Err(self.corrupt(format!("L2 table offset {at} is named twice (L1 index: {index:#x})")));
            }
        }
        Ok(())
    }

    /// Whether what lies below shows where nothing is stored, or will.
    pub(super) fn shows_below(&self) -> bool {
        self.backing.is_some() || self.keeps_zeros.load(Ordering::Relaxed)
    }
}
