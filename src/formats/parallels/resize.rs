//! The virtual size of a Parallels image: grow and shrink, which the reference cannot.
//!
//! The switch is one write of the header. A BAT that must be longer than the room before the data takes that of the first
//! clusters, which are copied behind the last one before. What a shrunk disk no longer has is forgotten after.

use std::sync::atomic::Ordering;

use super::ParallelsDriver;
use super::create::too_large;
use super::layout::{MOST_ENTRIES, ParallelsHeader, SECTOR};
use super::table::ParallelsState;
use crate::block::error::Context;
use crate::block::io::move_stored;
use crate::block::{Error, GuestOffset, HostPlace, Resize, Result};
use crate::formats::one_file::{Tables, clear_last_unit};
use crate::storage::{Preallocation, Zeroing};

impl Resize for ParallelsDriver {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        if fill != Preallocation::Off {
            return Err(Error::unsupported(format!("Unsupported preallocation mode '{}'", fill.name())));
        }
        if !size.is_multiple_of(SECTOR) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        let mut state = self.state();
        if size / SECTOR > state.header.most_sectors() || size.div_ceil(self.cluster) > MOST_ENTRIES {
            return Err(too_large());
        }
        state.prepare(self.storage())
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        Resize::check(self, size, fill)?;
        let (storage, old) = (self.storage(), self.virtual_size());
        let mut state = self.state();
        state.write_tables(storage)?;
        state.mark(storage)?;
        let mut header = state.header.clone();
        header.set_size(size / SECTOR);
        if size < old {
            header.set_entries(header.entries().min(size.div_ceil(self.cluster)));
            self.shrink(&mut state, header, size)?;
        } else {
            self.clear_tail(&mut state, old)?;
            header.set_entries(header.entries().max(size.div_ceil(self.cluster)));
            self.grow(&mut state, header, old)?;
        }
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }
}

impl ParallelsDriver {
    /// Makes the rest of the last cluster read as zeros: it lies past `size`, and may come into view.
    fn clear_tail(&self, state: &mut ParallelsState, size: u64) -> Result<()> {
        clear_last_unit(self, size, self.cluster, Zeroing::Allocate, |index| {
            Ok(Some(state.run(self.storage(), index, 1)?.0).filter(|at| *at != 0))
        })
    }

    /// Forgets the clusters from that one on.
    fn forget_from(&self, state: &mut ParallelsState, first: u64) -> Result<()> {
        let (storage, last) = (self.storage(), state.header.entries());
        let mut next = first;
        while next < last {
            let (at, run) = state.run(storage, next, last - next)?;
            if at != 0 {
                state.set(storage, next, run, 0)?;
            }
            next += run;
        }
        state.write_tables(storage)
    }

    fn shrink(&self, state: &mut ParallelsState, header: ParallelsHeader, size: u64) -> Result<()> {
        let storage = self.storage();
        // With all its entries, so that those that go can be forgotten.
        let mut first = header.clone();
        first.set_entries(state.header.entries());
        state.replace_header(storage, first)?;
        self.clear_tail(state, size)?;
        self.forget_from(state, size.div_ceil(self.cluster))?;
        state.replace_header(storage, header)?;
        // What lies behind the last cluster now goes when the image is closed.
        state.forget();
        state.prepare(storage)
    }

    fn grow(&self, state: &mut ParallelsState, mut header: ParallelsHeader, old: u64) -> Result<()> {
        let storage = self.storage();
        // What no disk of that size can have left there must not come into view.
        self.forget_from(state, old.div_ceil(self.cluster))?;
        let start = state.data_start(storage)?;
        let (had, end) = (state.header.entries(), header.bat_end());
        if end > start {
            let new_start = start + (end - start).div_ceil(self.cluster) * self.cluster;
            header.set_data_offset(new_start / SECTOR);
            self.make_way(state, start, new_start)?;
            if !storage.facts().fixed_len && storage.len().context("Could not get the size of the file")? < new_start {
                storage.set_len(new_start, Preallocation::Off).context("Could not extend the file")?;
            }
        } else if header.data_offset() == 0 {
            header.set_data_offset(start / SECTOR);
        }
        state.clear_entries(storage, had, header.entries())?;
        state.replace_header(storage, header)?;
        state.forget();
        state.prepare(storage)
    }

    /// Copies the clusters that lie between two places behind the last one, and names the copies.
    fn make_way(&self, state: &mut ParallelsState, from: u64, to: u64) -> Result<()> {
        let storage = self.storage();
        state.keep_clear_of(to);
        let (mut index, last) = (0, state.header.entries());
        while index < last {
            let (first, run) = state.run(storage, index, last - index)?;
            for n in 0..run {
                let at = first + n * self.cluster;
                if first == 0 || at < from || at >= to {
                    continue;
                }
                let (place, _) = state.take(storage, 1)?;
                let end = place + self.cluster;
                if !storage.facts().fixed_len && storage.len().context("Could not get the size of the file")? < end {
                    storage.set_len(end, Preallocation::Off).context("Could not extend the file")?;
                }
                let guest = GuestOffset((index + n) * self.cluster);
                move_stored(self, HostPlace::main(at), HostPlace::main(place), guest, self.cluster)
                    .context("Could not move a cluster")?;
                state.set(storage, index + n, 1, place)?;
            }
            index += run;
        }
        state.write_tables(storage)?;
        storage.flush().context("Could not flush")
    }
}
