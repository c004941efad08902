//! What becomes of an overlay: another backing file in its header, or nothing stored over the one that it has.
//!
//! A new name goes to the end of the file, the header that points there is written last. Emptying clears the L1 table
//! where it is: whichever entries are cleared when it stops, what they named is below as well.

use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering;

use super::QcowDriver;
use super::layout::MAX_BACKING_NAME;
use crate::block::error::Context;
use crate::block::{BackingChange, BackingRef, BlockDriver, Emptying, Error, Result};
use crate::formats::one_file::Tables;
use crate::storage::{Preallocation, Zeroing};

impl BackingChange for QcowDriver {
    fn check(&self, new: Option<&BackingRef>, _below: Option<&dyn BlockDriver>) -> Result<()> {
        if new.is_some_and(|new| new.name.len() as u64 > MAX_BACKING_NAME.into()) {
            return Err(Error::invalid("Backing file name too long"));
        }
        self.state().prepare(self.storage())
    }

    fn begin(&self) {
        self.keeps_zeros.store(true, Ordering::Relaxed);
    }

    fn change(&self, new: Option<&BackingRef>, _below: Option<&dyn BlockDriver>) -> Result<()> {
        let storage = self.storage();
        let mut state = self.state();
        state.write_tables(storage)?;
        let mut header = state.header.clone();
        header.set_backing(None);
        if let Some(new) = new {
            let name = new.name.as_bytes();
            let (at, _) = state.append(storage, name.len() as u64, 512)?;
            storage.write_at(at, name).context("Could not write the backing file's name")?;
            header.set_backing(Some((at, u32::try_from(name.len()).unwrap_or(u32::MAX))));
        }
        state.replace_header(storage, header)
    }
}

impl Emptying for QcowDriver {
    fn make_empty(&self) -> Result<()> {
        let storage = self.storage();
        let mut state = self.state();
        state.prepare(storage)?;
        state.write_tables(storage)?;
        storage.flush().context("Could not flush")?;
        let (at, len) = (state.header.l1_offset(), state.l1_entries() * 8);
        storage.zero(at, len, Zeroing::Write).context("Could not clear the L1 table")?;
        storage.flush().context("Could not flush")?;
        state.forget_tables();
        if storage.facts().fixed_len {
            return Ok(());
        }
        let end = state.used_end(storage)?;
        if end < storage.len().context("Could not get the size of the file")? {
            storage.set_len(end, Preallocation::Off).context("Failed to resize underlying file")?;
        }
        state.forget_end();
        Ok(())
    }
}
