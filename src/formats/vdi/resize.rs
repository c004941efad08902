//! The virtual size of a VDI image: grow and shrink.
//!
//! The switch from old to new is one write of the header's sector. What the new header names is complete and
//! flushed before; what only the old one named is cleaned up after: until then the map is longer than the disk, so
//! that the counter of blocks stays right. A map that must grow over blocks is written
//! anew where the first blocks were, once these have been copied to the end.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::VdiDriver;
use super::layout::{HostBlock, MAX_BLOCKS, MAX_SIZE, MapEntry, VdiHeader, too_large};
use super::map::VdiState;
use crate::block::error::Context;
use crate::block::io::move_stored;
use crate::block::{Error, GuestOffset, HostPlace, Resize, Result, metadata};
use crate::formats::one_file::{Tables, clear_last_unit};
use crate::storage::{Preallocation, Storage, Zeroing};

/// Entries of the map that are read or written at once.
const AT_ONCE: u64 = 1 << 16;

/// How the map gets longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum VdiResizePlan {
    /// There is room behind it, up to the (perhaps new) start of the data.
    InPlace { data: u32 },
    /// It moves to where the first blocks of the data were.
    Over { first_blocks: u64, data: u32 },
}

impl Resize for VdiDriver {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        if !size.is_multiple_of(512) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        let blocks = self.blocks(size);
        if size > MAX_SIZE || blocks > u64::from(MAX_BLOCKS) {
            return Err(too_large(size));
        }
        if !self.fixed && !matches!(fill, Preallocation::Off | Preallocation::Metadata) {
            return Err(Error::unsupported(format!("Unsupported preallocation mode '{}'", fill.name())));
        }
        let mut state = self.state();
        state.space(self.storage())?;
        if blocks > u64::from(state.header.blocks()) {
            plan(&mut state, self.storage(), blocks)?;
        }
        Ok(())
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.check(size, fill)?;
        let storage = self.storage();
        let mut state = self.state();
        state.write_tables(storage)?;
        state.space(storage)?;
        if size < state.header.size() {
            shrink(&mut state, self, size)?;
        } else {
            // All that the map says of a static image, it says of what `metadata` adds: blocks that are there, and sparse.
            let all_there = match (self.fixed, fill) {
                (_, Preallocation::Metadata) => Some(Preallocation::Off),
                (true, fill) => Some(fill),
                (false, _) => None,
            };
            grow(&mut state, self, size, all_there)?;
        }
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }
}

fn plan(state: &mut VdiState, storage: &dyn Storage, blocks: u64) -> Result<VdiResizePlan> {
    let (map, data) = (u64::from(state.header.map_offset()), u64::from(state.header.data_offset()));
    if map >= data {
        return Err(Error::unsupported("the block map does not lie before the data"));
    }
    let block = u64::from(state.header.block_size());
    let top = state.space(storage)?.top;
    let narrow = |at: u64| u32::try_from(at).map_err(|_| Error::unsupported("the block map would be too long"));
    let end = (map + blocks * 4).next_multiple_of(512);
    if end <= data {
        return Ok(VdiResizePlan::InPlace { data: narrow(data)? });
    }
    if top == 0 {
        return Ok(VdiResizePlan::InPlace { data: narrow(end)? });
    }
    let first_blocks = (blocks * 4).div_ceil(block);
    Ok(VdiResizePlan::Over { first_blocks, data: narrow(data + first_blocks * block)? })
}

/// Grows; `fixed` is how the new space is treated where all new blocks are there.
fn grow(state: &mut VdiState, image: &VdiDriver, size: u64, fixed: Option<Preallocation>) -> Result<()> {
    let storage = image.storage();
    // The guest sees whole sectors of a disk whose size is none.
    clear_tail(state, image, state.header.size().next_multiple_of(512))?;
    let block = u64::from(state.header.block_size());
    let there = state.header.size().div_ceil(block);
    if there < u64::from(state.header.blocks()) {
        // What a stopped shrink has left in the map must not come into view.
        cut(state, image, there)?;
        state.space(storage)?;
    }
    let old = u64::from(state.header.blocks());
    let new = size.div_ceil(block).max(old);
    let mut header = state.header.clone();
    header.set_size(size);
    if new > old {
        let plan = plan(state, storage, new)?;
        if let VdiResizePlan::Over { first_blocks, .. } = plan {
            make_way(state, image, first_blocks)?;
        }
        let top = state.space(storage)?.top;
        let (skip, data) = match plan {
            VdiResizePlan::InPlace { data } => (0, data),
            VdiResizePlan::Over { first_blocks, data } => (first_blocks, data),
        };
        let map = if skip > 0 { state.header.data_offset() } else { state.header.map_offset() };
        // In place the entries that are there stay as they are.
        let from = if skip > 0 { 0 } else { old };
        let top = top.max(skip) - skip;
        // What is new reads as zeros, whatever a parent has there.
        let blank = if image.parent.is_some() { MapEntry::Discarded } else { MapEntry::Unallocated };
        let added = fixed.map_or(blank, |_| MapEntry::At(HostBlock(top)));
        write_map(state, storage, u64::from(map), from..new, skip, added)?;
        let end_of_used = u64::from(data) + top * block;
        let top = if fixed.is_some() { top + (new - old) } else { top };
        let end = u64::from(data) + top * block;
        let length = storage.len().context("Could not get the size of the file")?;
        if fixed.is_some() && end_of_used < length {
            // What a block that nothing names any more has left where new ones are going to be.
            let stale = end.min(length).saturating_sub(end_of_used);
            storage.zero(end_of_used, stale, Zeroing::Allocate).context("Could not clear the new blocks")?;
        }
        if fixed.is_some() && end > length {
            storage.set_len(end, fixed.unwrap_or_default()).context("Failed to resize underlying file")?;
        }
        header.set_map_offset(map);
        header.set_data_offset(data);
        header.set_blocks(narrow(new)?);
        header.set_allocated(narrow(top)?);
    }
    state.replace_header(storage, header)
}

fn narrow(value: u64) -> Result<u32> {
    u32::try_from(value).map_err(|_| Error::corrupt("block index too large"))
}

/// Copies a guest block from one block of the file to another, and names the copy.
fn move_block(state: &mut VdiState, image: &VdiDriver, guest: u64, from: HostBlock, to: HostBlock) -> Result<()> {
    let block = u64::from(state.header.block_size());
    let places = [from, to].map(|index| HostPlace { file: 0, at: state.host(index) });
    move_stored(image, places[0], places[1], GuestOffset(guest.saturating_mul(block)), block)
        .context("Could not move a block")?;
    state.set(image.storage(), guest, MapEntry::At(to))
}

/// Copies what lies in the first `count` blocks of the file to its end, and names the copies in the old map.
fn make_way(state: &mut VdiState, image: &VdiDriver, count: u64) -> Result<()> {
    let storage = image.storage();
    let mut moves = Vec::new();
    let old = u64::from(state.header.blocks());
    each(state, storage, 0..old, |guest, host| {
        if host < HostBlock(count) {
            moves.push((guest, host));
        }
    })?;
    let mut free = HostBlock(count);
    for (guest, host) in moves {
        let space = state.space(storage)?;
        free = space.free_from(free);
        space.mark(free);
        move_block(state, image, guest, host, free)?;
    }
    state.write_tables(storage)?;
    storage.flush().context("Could not flush")
}

/// Writes the entries `range` of a map at `at`: those of the old one, less `skip`, then new ones: `added` or, where that
/// has a place, from there on.
fn write_map(
    state: &mut VdiState,
    storage: &dyn Storage,
    at: u64,
    range: Range<u64>,
    skip: u64,
    added: MapEntry,
) -> Result<()> {
    let old = u64::from(state.header.blocks());
    let mut next = range.start;
    while next < range.end {
        let last = range.end.min(next + AT_ONCE);
        let mut bytes = Vec::new();
        let start = next;
        while next < last && next < old {
            let (entry, run) = state.run(storage, next, last.min(old) - next)?;
            for n in 0..run {
                let entry = match entry {
                    MapEntry::At(HostBlock(index)) => MapEntry::At(HostBlock(index + n - skip)),
                    none => none,
                };
                bytes.extend(entry.stored()?.to_le_bytes());
            }
            next += run;
        }
        while next < last {
            let entry = match added {
                MapEntry::At(first) => MapEntry::At(first + (next - old)),
                none => none,
            };
            bytes.extend(entry.stored()?.to_le_bytes());
            next += 1;
        }
        if last == range.end {
            // Only what lies before the data, or in blocks that were cleared away.
            let end = at + range.end * 4;
            bytes.resize(bytes.len() + usize::try_from(end.next_multiple_of(512) - end).unwrap_or(0), 0);
        }
        metadata::write(storage, state.file(), "block map", at + start * 4, &bytes)?;
    }
    Ok(())
}

/// Makes the rest of the last block read as zeros: it lies past `size`, and may come into view.
fn clear_tail(state: &mut VdiState, image: &VdiDriver, size: u64) -> Result<()> {
    let (storage, block) = (image.storage(), u64::from(state.header.block_size()));
    clear_last_unit(image, size, block, Zeroing::Allocate, |index| {
        let (entry, _) = state.run(storage, index, 1)?;
        Ok(if let MapEntry::At(host) = entry { Some(state.host(host).get()) } else { None })
    })
}

fn shrink(state: &mut VdiState, image: &VdiDriver, size: u64) -> Result<()> {
    let storage = image.storage();
    let mut header: VdiHeader = state.header.clone();
    header.set_size(size);
    state.replace_header(storage, header)?;
    clear_tail(state, image, size)?;
    cut(state, image, size.div_ceil(u64::from(state.header.block_size())))
}

/// Gives the guest blocks of a range that are there to `see`, each with its place.
fn each(
    state: &mut VdiState,
    storage: &dyn Storage,
    range: Range<u64>,
    mut see: impl FnMut(u64, HostBlock),
) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let (entry, run) = state.run(storage, at, range.end - at)?;
        if let MapEntry::At(first) = entry {
            (0..run).for_each(|n| see(at + n, first + n));
        }
        at += run;
    }
    Ok(())
}

/// Ends the map after the first `blocks` entries and closes the gaps in the file, so that the counter is both the
/// number of blocks and above all of them.
fn cut(state: &mut VdiState, image: &VdiDriver, blocks: u64) -> Result<()> {
    let storage = image.storage();
    if !state.is_beside_header(u64::from(state.header.blocks())) {
        // Two entries cannot change at once there: the counter is too high until the end.
        let mut header = state.header.clone();
        header.set_blocks(narrow(blocks)?);
        state.replace_header(storage, header)?;
    }
    let mut space = state.scan(storage, blocks)?;
    let (mut count, mut high, mut dropped) = (0, Vec::new(), HashMap::new());
    each(state, storage, 0..blocks, |_, _| count += 1)?;
    each(state, storage, 0..blocks, |guest, host| {
        if host >= HostBlock(count) {
            high.push((guest, host));
        }
    })?;
    let all = u64::from(state.header.blocks());
    each(state, storage, blocks..all, |guest, host| {
        // Only room below the counter is given out again.
        if host < HostBlock(count) {
            dropped.insert(host, guest);
        }
    })?;
    let mut free = HostBlock(0);
    for (guest, host) in high {
        free = space.free_from(free);
        space.mark(free);
        move_block(state, image, guest, host, free)?;
        if let Some(guest) = dropped.get(&free) {
            state.set(storage, *guest, MapEntry::At(host))?;
        }
    }
    let mut header = state.header.clone();
    header.set_blocks(narrow(blocks)?);
    header.set_allocated(narrow(count)?);
    state.replace_header(storage, header)?;
    let end = state.host(HostBlock(count)).get();
    let shorter = storage.len().context("Could not get the size of the file")? > end;
    if shorter && !storage.facts().fixed_len {
        storage.set_len(end, Preallocation::Off).context("Failed to resize underlying file")?;
    }
    Ok(())
}
