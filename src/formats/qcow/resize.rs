//! The virtual size of a qcow image: grow and shrink.
//!
//! The switch is one write of the header. An L1 table that must be longer is written anew at the end of the file
//! before; what no longer belongs to the disk is cleared after. What a longer backing file holds past the old end is
//! covered by clusters of zeros before the switch.

use std::sync::atomic::Ordering;

use super::QcowDriver;
use super::layout::{MAX_L1, QcowEntry, too_large};
use super::tables::QcowState;
use crate::block::error::Context;
use crate::block::io::{clear_stored, read_unit, write_stored};
use crate::block::{BlockDriver, CompressedUnit, Error, GuestOffset, HostPlace, Resize, ResizeFiles, Result};
use crate::formats::one_file::{Tables, clear_last_unit};
use crate::storage::{Preallocation, Storage, Zeroing};

impl Resize for QcowDriver {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        if fill != Preallocation::Off {
            return Err(Error::unsupported(format!("Unsupported preallocation mode '{}'", fill.name())));
        }
        if !size.is_multiple_of(512) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        if size == 0 {
            return Err(Error::invalid("Image size is too small, cannot be zero length"));
        }
        let mut state = self.state();
        if state.header.l1_entries(size).is_none_or(|entries| entries > MAX_L1) {
            return Err(too_large());
        }
        state.prepare(self.storage())
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.resize_over(size, fill, 0)
    }

    fn resize_with(&self, size: u64, fill: Preallocation, files: &dyn ResizeFiles) -> Result<()> {
        self.resize_over(size, fill, files.covered())
    }
}

/// Writes the L1 table anew, long enough for that size, and returns its place.
fn move_l1(state: &mut QcowState, storage: &dyn Storage, size: u64) -> Result<u64> {
    state.write_tables(storage)?;
    let had = state.l1_entries() * 8;
    let bytes = state.header.l1_entries(size).unwrap_or(0) * 8;
    let (at, fresh) = state.append(storage, bytes.next_multiple_of(512), 512)?;
    crate::formats::table::copy(storage, state.l1.file(), "L1 table", state.header.l1_offset(), at, had)?;
    let rest = bytes.next_multiple_of(512) - had;
    if fresh {
        storage.set_len(at + had + rest, Preallocation::Off).context("Could not extend the file")?;
    } else {
        storage.zero(at + had, rest, Zeroing::Write).context("Could not clear the L1 table")?;
    }
    Ok(at)
}

/// Cuts off the end of the file that nothing names.
fn shorten(state: &mut QcowState, storage: &dyn Storage) -> Result<()> {
    if storage.facts().fixed_len {
        return Ok(());
    }
    storage.flush().context("Could not flush")?;
    let end = state.used_end(storage)?;
    if end < storage.len().context("Could not get the size of the file")? {
        storage.set_len(end, Preallocation::Off).context("Failed to resize underlying file")?;
    }
    state.forget_end();
    Ok(())
}

impl QcowDriver {
    /// The backing file covers the first `covered` bytes.
    fn resize_over(&self, size: u64, fill: Preallocation, covered: u64) -> Result<()> {
        self.check(size, fill)?;
        let storage = self.storage();
        let mut state = self.state();
        state.write_tables(storage)?;
        let old = self.virtual_size();
        if size < old {
            let mut header = state.header.clone();
            header.set_size(size);
            state.replace_header(storage, header)?;
            self.clear_past(&mut state, size)?;
            state.write_tables(storage)?;
            shorten(&mut state, storage)?;
        } else {
            self.clear_past(&mut state, old)?;
            let covered = covered.min(size);
            let mut header = state.header.clone();
            if header.l1_entries(size) != header.l1_entries(header.size()) {
                header.set_l1_offset(move_l1(&mut state, storage, size)?);
            }
            if covered > old && self.backing.is_some() {
                // A table that is longer than the disk needs is none the worse.
                state.replace_header(storage, header.clone())?;
                self.hide_backing(&mut state, old, covered)?;
            }
            header.set_size(size);
            state.replace_header(storage, header)?;
        }
        self.size.store(size, Ordering::Relaxed);
        storage.flush().context("Could not flush")
    }

    /// Gives the clusters from `from` to `to`, which have no place, one that reads as zeros. The L1 table may be
    /// longer than the header's size tells.
    fn hide_backing(&self, state: &mut QcowState, from: u64, to: u64) -> Result<()> {
        let storage = self.storage();
        let (mut index, end) = (from.div_ceil(self.cluster), to.div_ceil(self.cluster));
        while index < end {
            let count = (end - index).min(state.left_in_table(index));
            let (host, fresh) = state.take(storage, index, count * self.cluster, self.cluster)?;
            if !fresh || self.cipher.is_some() {
                let (place, guest) = (HostPlace::main(host), GuestOffset(index * self.cluster));
                clear_stored(self, place, guest, count * self.cluster, Zeroing::Allocate)
                    .context("Could not write zeros")?;
            }
            for n in 0..count {
                state.set(storage, index + n, host + n * self.cluster)?;
            }
            index += count;
            if state.wants_writing() {
                state.write_tables(storage)?;
            }
        }
        state.write_tables(storage)
    }

    /// Makes all that lies past `size` in the tables, and in the last cluster, read as nothing: it was cut off, or
    /// is about to come into view.
    fn clear_past(&self, state: &mut QcowState, size: u64) -> Result<()> {
        let storage = self.storage();
        let (index, within) = (size / self.cluster, size % self.cluster);
        let entries = state.l1_entries().saturating_mul(state.table_entries());
        if within != 0 && index < entries {
            self.clear_tail(state, index, within)?;
        }
        let mut next = size.div_ceil(self.cluster);
        let last = next.next_multiple_of(state.table_entries()).min(entries);
        while next < last {
            let (entry, run) = state.run(storage, next, last - next)?;
            if entry != QcowEntry::Unallocated {
                for index in next..next + run {
                    state.set(storage, index, 0)?;
                }
            }
            next += run;
        }
        Ok(())
    }

    fn clear_tail(&self, state: &mut QcowState, index: u64, within: u64) -> Result<()> {
        let storage = self.storage();
        let clearing = "Could not clear the last cluster";
        match state.run(storage, index, 1)?.0 {
            QcowEntry::Unallocated => Ok(()),
            QcowEntry::Plain(at) => {
                let size = index * self.cluster + within;
                clear_last_unit(self, size, self.cluster, Zeroing::Write, |_| Ok(Some(at)))
            }
            QcowEntry::Compressed(at, bytes) => {
                let place = HostPlace::main(at);
                let start = GuestOffset(index * self.cluster);
                let unit = CompressedUnit { start, len: self.cluster, place, host_len: bytes };
                let mut plain = read_unit(self, &unit).context(clearing)?;
                let (_, tail) = plain.split_at_mut(usize::try_from(within).unwrap_or(0));
                if tail.iter().all(|byte| *byte == 0) {
                    return Ok(());
                }
                tail.fill(0);
                let (new, _) = state.take(storage, index, self.cluster, self.cluster)?;
                write_stored(self, HostPlace::main(new), start, &mut plain).context(clearing)?;
                state.set(storage, index, new)?;
                state.write_tables(storage)
            }
        }
    }
}
