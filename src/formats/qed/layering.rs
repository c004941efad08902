//! Another backing file in the header.
//!
//! The name lies in the header's clusters: a new one beside the old, where there is room for both, and the header that
//! points there is written last.

use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::Ordering;

use super::QedDriver;
use super::layout::{HEADER_BYTES, MOST_NAME, QedHeader};
use crate::block::error::Context;
use crate::block::{BackingChange, BackingRef, BlockDriver, Error, Result};
use crate::formats::one_file::Tables;

impl BackingChange for QedDriver {
    fn check(&self, new: Option<&BackingRef>, _below: Option<&dyn BlockDriver>) -> Result<()> {
        let length = new.map_or(0, |new| new.name.len());
        let room = self.state().header.end().saturating_sub(HEADER_BYTES as u64);
        if length > MOST_NAME || length as u64 > room {
            return Err(Error::invalid("No space left in the file header"));
        }
        Ok(())
    }

    fn begin(&self) {
        self.keeps_zeros.store(true, Ordering::Relaxed);
    }

    fn change(&self, new: Option<&BackingRef>, _below: Option<&dyn BlockDriver>) -> Result<()> {
        const FAILED: &str = "Could not write the backing file's name";
        let storage = self.storage();
        let mut state = self.state();
        state.write_tables(storage)?;
        let mut header = state.header.clone();
        header.set_backing(None, false);
        if let Some(new) = new {
            let name = new.name.as_bytes();
            let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
            let place = place_beside(&state.header, u64::from(length));
            let at = place.unwrap_or(HEADER_BYTES as u64);
            header.set_backing(Some((at, length)), new.format.as_deref() == Some("raw"));
            if place.is_none() {
                // Both together, over the old name.
                storage.flush().context(FAILED)?;
                storage.write_at(0, &[&header.bytes()[..], name].concat()).context(FAILED)?;
            } else {
                storage.write_at(at, name).context(FAILED)?;
            }
        }
        state.replace_header(storage, header)
    }
}

/// Where a name of that length has room beside the one that is there.
fn place_beside(header: &QedHeader, length: u64) -> Option<u64> {
    let first = HEADER_BYTES as u64;
    let (old, old_length) = header.backing().unwrap_or((first, 0));
    let old_end = old + u64::from(old_length);
    if first + length <= old || old_length == 0 {
        Some(first)
    } else {
        Some(old_end).filter(|at| *at >= first && at + length <= header.end())
    }
}
