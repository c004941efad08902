//! The virtual size of a VHD: grow and shrink, both kinds.
//!
//! A footer is written where it will be before the old one goes (a stop just then leaves the old one in the new
//! part of a fixed disk); a table grows only over blocks that were copied
//! away and named at their new place; the size in the copy at the start, which readers of a dynamic disk trust
//! first, changes last when it grows and first when it shrinks.

use std::sync::atomic::Ordering;

use super::dynamic::Dynamic;
use super::fixed::Fixed;
use super::geometry::{Geometry, SizeRule};
use super::layout::{FOOTER_BYTES, Footer, MAX_SIZE, MAX_TABLE, SECTOR};
use super::table::State;
use crate::block::error::Context;
use crate::block::{Error, Resize, Result};
use crate::formats::table;
use crate::storage::{Preallocation, Storage, Zeroing};

const LONG_FOOTER: u64 = FOOTER_BYTES as u64;

fn check_size(size: u64) -> Result<()> {
    if !size.is_multiple_of(SECTOR) {
        return Err(Error::invalid("The new size must be a multiple of 512"));
    }
    if size > MAX_SIZE {
        return Err(Error::unsupported("The image size is too large for file format 'vpc'"));
    }
    Ok(())
}

/// Writes a size into a footer so that readers come to exactly this size.
fn set_size(footer: &mut Footer, size: u64) {
    let sectors = size / SECTOR;
    if SizeRule::of(footer.creator()) == SizeRule::CurrentSize {
        let exact = footer.geometry() == Geometry::MAX;
        footer.set_size(size, if exact { Geometry::MAX } else { Geometry::of(sectors) });
        return;
    }
    let geometry = Geometry::at_least(sectors);
    if geometry == Geometry::MAX || geometry.count() == sectors {
        footer.set_size(size, geometry);
    } else {
        // No geometry tells this size, so the image must become one where the size itself does.
        footer.set_creator(b"qem2");
        footer.set_size(size, Geometry::MAX);
    }
}

impl Resize for Fixed {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        let _ = fill;
        check_size(size)?;
        if self.files[0].storage.facts().fixed_len && size > self.end.load(Ordering::Relaxed) {
            return Err(Error::unsupported("Cannot grow device files"));
        }
        Ok(())
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.check(size, fill)?;
        let storage = &*self.files[0].storage;
        let mut footer = self.footer();
        set_size(&mut footer, size);
        let (old, device) = (self.end.load(Ordering::Relaxed), storage.facts().fixed_len);
        let end = if device { old } else { size };
        let resizing = "Failed to resize underlying file";
        storage.flush().context("Could not flush")?;
        storage.write_at(end, footer.bytes()).context("Could not write the VHD footer")?;
        storage.flush().context("Could not flush")?;
        if end > old {
            let stale = LONG_FOOTER.min(end - old);
            storage.zero(old, stale, Zeroing::Write).context(resizing)?;
            match fill {
                Preallocation::Off | Preallocation::Metadata => {}
                Preallocation::Falloc => storage.zero(old, end - old, Zeroing::Allocate).context(resizing)?,
                Preallocation::Full => storage.zero(old, end - old, Zeroing::Write).context(resizing)?,
            }
        } else if !device {
            storage.set_len(end + LONG_FOOTER, Preallocation::Off).context(resizing)?;
        }
        self.end.store(end, Ordering::Relaxed);
        self.size.store(size, Ordering::Relaxed);
        storage.flush().context("Could not flush")
    }
}

impl Resize for Dynamic {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        check_size(size)?;
        if fill != Preallocation::Off {
            return Err(Error::unsupported(format!("Unsupported preallocation mode '{}'", fill.name())));
        }
        let mut state = self.state();
        if entries_for(&state, size)? > state.header.entries() {
            let (header, table) = (state.footer.data_offset(), state.header.table());
            if header > table {
                return Err(Error::unsupported("the block allocation table does not lie behind the header"));
            }
        }
        state.prepare(self.storage())
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.check(size, fill)?;
        let storage = self.storage();
        let mut state = self.state();
        state.write_tables(storage)?;
        let old = self.size.load(Ordering::Relaxed);
        if size < old {
            shrink(&mut state, storage, size)?;
        } else {
            grow(&mut state, storage, old, size)?;
        }
        self.size.store(size, Ordering::Relaxed);
        storage.flush().context("Could not flush")
    }
}

fn entries_for(state: &State, size: u64) -> Result<u32> {
    let entries = size.div_ceil(state.block());
    if entries * 4 > MAX_TABLE {
        return Err(Error::unsupported("the block allocation table would be too long"));
    }
    u32::try_from(entries).map_err(|_| Error::unsupported("the block allocation table would be too long"))
}

fn write_header(state: &State, storage: &dyn Storage) -> Result<()> {
    storage.flush().context("Could not flush")?;
    let at = state.footer.data_offset();
    storage.write_at(at, state.header.bytes()).context("Could not write the dynamic disk header")?;
    storage.flush().context("Could not flush")
}

fn grow(state: &mut State, storage: &dyn Storage, old: u64, size: u64) -> Result<()> {
    clear_tail(state, storage, old)?;
    let wanted = entries_for(state, size)?;
    let had = state.header.entries();
    let first = u32::try_from(old.div_ceil(state.block())).unwrap_or(had).min(had);
    if wanted > had {
        let table_end = (state.header.table() + u64::from(wanted) * 4).next_multiple_of(SECTOR);
        make_way(state, storage, table_end)?;
        // Entries that the header does not count yet, and the rest of their sector.
        let from = state.header.table() + u64::from(had) * 4;
        let bytes = vec![0xff; usize::try_from(table_end - from).unwrap_or(0)];
        storage.write_at(from, &bytes).context("Could not write the block allocation table")?;
        state.forget_table();
    }
    for block in first..had.min(wanted) {
        state.set(storage, u64::from(block), None)?;
    }
    state.write_tables(storage)?;
    if wanted > had {
        state.header.set_entries(wanted);
        write_header(state, storage)?;
    }
    set_size(&mut state.footer, size);
    state.write_front(storage)?;
    let free = state.free;
    state.move_footer(free);
    state.write_tables(storage)
}

/// Copies blocks away that begin before `end`, and names the copies.
fn make_way(state: &mut State, storage: &dyn Storage, end: u64) -> Result<()> {
    let stride = state.stride();
    for (block, at) in state.blocks(storage)?.into_iter().filter(|(_, at)| *at < end) {
        if state.free < end {
            state.move_footer(end);
        }
        let (to, _) = state.take(storage)?;
        table::copy(storage, at, to, stride).context("Could not move a block")?;
        state.set(storage, block, Some(to))?;
    }
    if state.free < end {
        state.move_footer(end);
    }
    state.write_tables(storage)?;
    storage.flush().context("Could not flush")
}

/// Makes the rest of the last block read as zeros: it lies past `size`, and may come into view.
fn clear_tail(state: &mut State, storage: &dyn Storage, size: u64) -> Result<()> {
    let within = size % state.block();
    if within == 0 {
        return Ok(());
    }
    if let (Some(at), _) = state.run(storage, size / state.block(), 1)? {
        let from = at + state.bitmap() + within;
        storage.zero(from, state.block() - within, Zeroing::Allocate).context("Could not clear the last block")?;
    }
    Ok(())
}

fn shrink(state: &mut State, storage: &dyn Storage, size: u64) -> Result<()> {
    set_size(&mut state.footer, size);
    state.write_front(storage)?;
    let free = state.free;
    state.move_footer(free);
    state.write_tables(storage)?;
    clear_tail(state, storage, size)?;

    let wanted = entries_for(state, size)?;
    let stride = state.stride();
    let (mut kept, mut holes) = (Vec::new(), Vec::new());
    for (block, at) in state.blocks(storage)? {
        if block < u64::from(wanted) {
            kept.push((at, block));
        } else {
            holes.push(at);
            state.set(storage, block, None)?;
        }
    }
    state.write_tables(storage)?;
    state.header.set_entries(wanted);
    write_header(state, storage)?;

    // Close the gaps from the end.
    kept.sort_unstable();
    holes.sort_unstable();
    let mut holes = holes.into_iter();
    let mut end = (state.header.table() + u64::from(wanted) * 4).next_multiple_of(SECTOR);
    while let Some((at, block)) = kept.pop() {
        match holes.next().filter(|hole| *hole < at) {
            Some(hole) => {
                table::copy(storage, at, hole, stride).context("Could not move a block")?;
                state.set(storage, block, Some(hole))?;
                end = end.max(hole + stride);
            }
            None => {
                end = end.max(at + stride);
                break;
            }
        }
    }
    state.forget_bitmaps();
    state.write_tables(storage)?;
    storage.flush().context("Could not flush")?;
    state.move_footer(end);
    state.write_tables(storage)
}
