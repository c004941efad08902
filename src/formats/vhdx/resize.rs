//! The virtual size of a VHDX image: grow and shrink.
//!
//! The switch from old to new is one write, of the size in the metadata. What it makes visible is in place and flushed
//! before: the entries of new blocks, zeros where the parent has something, and a BAT that has room for them. What it hides is cleared after.
//!
//! A BAT that must be longer is written anew at the end of the file, and both region tables are made to name it, one
//! after the other; until the second does, the old one stays as it is.

use std::sync::atomic::Ordering;

use super::VhdxDriver;
use super::layout::{BlockState, ENTRY, MAX_SIZE, MIB};
use super::regions::{Region, RegionTable, Shape};
use super::state::VhdxState;
use crate::block::error::Context;
use crate::block::{Error, Resize, ResizeFiles, Result};
use crate::formats::one_file::{Tables, clear_last_unit};
use crate::formats::table::copy;
use crate::storage::{Preallocation, Storage, Zeroing};

impl Resize for VhdxDriver {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        if !size.is_multiple_of(self.sector) {
            return Err(Error::invalid(format!("The new size must be a multiple of {}", self.sector)));
        }
        if size > MAX_SIZE {
            return Err(Error::unsupported("Image size too large; max of 64TB"));
        }
        if !self.fixed && !matches!(fill, Preallocation::Off | Preallocation::Metadata) {
            return Err(Error::unsupported(format!("Unsupported preallocation mode '{}'", fill.name())));
        }
        if self.parent.is_some() && fill == Preallocation::Metadata {
            return Err(Error::unsupported(format!("Unsupported preallocation mode '{}'", fill.name())));
        }
        self.state().space(self.storage()).map(drop)
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.resize_over(size, fill, 0)
    }

    fn resize_with(&self, size: u64, fill: Preallocation, files: &dyn ResizeFiles) -> Result<()> {
        self.resize_over(size, fill, files.covered())
    }
}

impl VhdxDriver {
    /// The parent covers the first `covered` bytes.
    fn resize_over(&self, size: u64, fill: Preallocation, covered: u64) -> Result<()> {
        Resize::check(self, size, fill)?;
        let storage = self.storage();
        let mut state = self.state();
        state.write_tables(storage)?;
        state.prepare(storage)?;
        let shape = state.shape();
        let old = shape.size;
        if size < old {
            set_size(&mut state, storage, size)?;
            clear_tail(&mut state, self, size)?;
            drop_blocks(&mut state, storage, shape)?;
        } else {
            let covered = if self.parent.is_some() { covered.min(size) } else { 0 };
            if covered > old {
                own_the_tail(&mut state, storage, old)?;
            }
            // The guest sees whole blocks again.
            clear_tail(&mut state, self, old)?;
            let all_there = match (self.fixed, fill) {
                (_, Preallocation::Metadata) => Some(Preallocation::Off),
                (true, fill) => Some(fill),
                (false, _) => None,
            };
            grow(&mut state, storage, Shape { size, ..shape }, covered, all_there)?;
        }
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }
}

/// Writes the size, between two flushes.
fn set_size(state: &mut VhdxState, storage: &dyn Storage, size: u64) -> Result<()> {
    let at = state.metadata.size.at;
    storage.flush().context("Could not flush")?;
    storage.write_at(at, &size.to_le_bytes()).context("Could not write the VHDX metadata")?;
    storage.flush().context("Could not flush")?;
    state.metadata.shape.size = size;
    state.forget();
    Ok(())
}

/// Gives the block in which a disk of `size` bytes ends, if all of it is the parent's, a place of its own: that can be
/// cleared.
fn own_the_tail(state: &mut VhdxState, storage: &dyn Storage, size: u64) -> Result<()> {
    let shape = state.shape();
    let last = size / shape.block;
    if size.is_multiple_of(shape.block) || state.sound_run(storage, last, 1)?.0 != BlockState::NotPresent {
        return Ok(());
    }
    state.need_bitmap(storage, last)?;
    let (first, _) = state.take(storage, 1)?;
    state.mark_sectors(storage, last, 0..shape.block / shape.sector, false)?;
    state.set(storage, last, BlockState::Partial(first))
}

/// Makes the rest of the last block read as zeros: it lies past `size`, and may come into view.
fn clear_tail(state: &mut VhdxState, image: &VhdxDriver, size: u64) -> Result<()> {
    let storage = image.storage();
    clear_last_unit(image, size, image.block, Zeroing::Allocate, |block| {
        let all = image.block / image.sector;
        let first = size % image.block / image.sector;
        Ok(match state.sound_run(storage, block, 1)?.0 {
            BlockState::Full(at) => Some(at * MIB),
            BlockState::Partial(at) => {
                // Cleared before it is said to be there.
                let place = at * MIB + first * image.sector;
                let rest = (all - first) * image.sector;
                storage.zero(place, rest, Zeroing::Allocate).context("Could not clear the end of the disk")?;
                state.mark_sectors(storage, block, first..all, true)?;
                state.write_tables(storage)?;
                None
            }
            _ => None,
        })
    })
}

/// Takes away the entries of blocks that the disk, which was of that shape, does not have any more, and what of the
/// file only they had.
fn drop_blocks(state: &mut VhdxState, storage: &dyn Storage, old: Shape) -> Result<()> {
    clear_entries(state, storage, old.entries())?;
    storage.flush().context("Could not flush")?;
    let end = state.space(storage)?.top * MIB;
    if !storage.facts().fixed_len && storage.len().context("Could not get the size of the file")? > end {
        storage.set_len(end, Preallocation::Off).context("Failed to resize underlying file")?;
    }
    state.forget();
    Ok(())
}

/// Makes the entries behind those that the disk needs, up to `end`, say nothing. The last sector bitmap's stays.
fn clear_entries(state: &mut VhdxState, storage: &dyn Storage, end: u64) -> Result<()> {
    let shape = state.shape();
    let kept = shape.blocks().checked_sub(1).map(|last| (shape.entry_of(last) + 1, shape.bitmap_entry_of(last)));
    let (from, bitmap) = kept.unwrap_or((0, u64::MAX));
    let bitmap = if shape.has_parent { bitmap } else { u64::MAX };
    for (from, to) in [(from, end.min(bitmap)), (bitmap.saturating_add(1).max(from), end)] {
        if to > from {
            let (at, len) = (state.bat.offset + from * ENTRY, (to - from) * ENTRY);
            storage.zero(at, len, Zeroing::Write).context("Could not clear the end of the VHDX BAT")?;
        }
    }
    state.forget();
    Ok(())
}

/// Grows to that shape, of which a parent covers so much; `all_there` says how the space of new blocks is treated where
/// they are all allocated.
fn grow(
    state: &mut VhdxState,
    storage: &dyn Storage,
    new: Shape,
    covered: u64,
    all_there: Option<Preallocation>,
) -> Result<()> {
    let old = state.shape();
    // What a stopped shrink has left must not come into view.
    clear_entries(state, storage, (state.bat.length / ENTRY).min(new.entries()))?;
    let mut top = state.space(storage)?.top;
    let needed = new.bat_bytes();
    let moved = needed > state.bat.length;
    let bat = match moved {
        true => Region { offset: top * MIB, length: needed },
        false => state.bat,
    };
    if moved {
        top += needed / MIB;
        extend(storage, top * MIB, Preallocation::Off)?;
        storage.zero(bat.offset, bat.length, Zeroing::Punch).context("Could not clear the new VHDX BAT")?;
        copy(storage, state.file(), "block allocation table", state.bat.offset, bat.offset, old.entries() * ENTRY)?;
    }
    if let Some(fill) = all_there {
        let unit = new.block / MIB;
        let blocks = old.blocks()..new.blocks();
        let (start, end) = (top * MIB, (top + (blocks.end - blocks.start) * unit) * MIB);
        let length = storage.len().context("Could not get the size of the file")?;
        if start < length && !storage.facts().fixed_len || !storage.facts().new_reads_zero {
            let stale = end.min(length).saturating_sub(start);
            storage.zero(start, stale, Zeroing::Allocate).context("Could not clear the new blocks")?;
        }
        extend(storage, end, fill)?;
        for (n, block) in (0..).zip(blocks) {
            let entry = BlockState::Full(top + n * unit).entry();
            let at = bat.offset + new.entry_of(block) * ENTRY;
            storage.write_at(at, &entry.to_le_bytes()).context("Could not write the VHDX BAT")?;
        }
    }
    // What is new reads as zeros, whatever the parent has there.
    let (mut block, end) = (old.blocks(), covered.div_ceil(new.block));
    while block < end {
        let count = (end - block).min(new.chunk() - block % new.chunk());
        let entries = BlockState::Zero.entry().to_le_bytes().repeat(usize::try_from(count).unwrap_or(0));
        let at = bat.offset + new.entry_of(block) * ENTRY;
        storage.write_at(at, &entries).context("Could not write the VHDX BAT")?;
        block += count;
    }
    if moved {
        name_bat(state, storage, bat)?;
    }
    set_size(state, storage, new.size)
}

/// Makes a file longer, where it is not.
fn extend(storage: &dyn Storage, end: u64, fill: Preallocation) -> Result<()> {
    if storage.len().context("Could not get the size of the file")? < end {
        storage.set_len(end, fill).context("Failed to resize underlying file")?;
    }
    Ok(())
}

/// Makes both region tables name another BAT, which is complete.
fn name_bat(state: &mut VhdxState, storage: &dyn Storage, bat: Region) -> Result<()> {
    let mut table = RegionTable::find(storage)?;
    table.move_bat(bat)?;
    // The one that counts is not touched before the other is whole.
    table.write(storage, 1)?;
    table.write(storage, 0)?;
    state.bat = bat;
    state.forget();
    Ok(())
}
