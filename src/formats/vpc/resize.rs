//! The virtual size of a VHD: grow and shrink, both kinds.
//!
//! However a resize ends, the image is the old disk or the new one. Of a fixed disk one write of a footer decides:
//! the one that ends the file. As long as the file is longer than the disk that footer carries a mark, without which
//! nobody could tell the image from a raw one. Of a dynamic one the copy at the start does, which readers trust first: it changes
//! last when the disk grows and first when it shrinks. A table grows only over blocks that were copied away and named
//! at their new place; where a parent locator or the header is in its way, it is written anew at the end of the file.

use std::ops::Range;
use std::sync::atomic::Ordering;

use super::dynamic::Dynamic;
use super::fixed::Fixed;
use super::geometry::{ChsGeometry, SizeRule};
use super::layout::{BITMAP, FOOTER, FOOTER_BYTES, Footer, HEADER, MAX_SIZE, MAX_TABLE, SECTOR, Sectors, TABLE};
use super::table::{VpcState, can_name, overlap};
use crate::block::error::Context;
use crate::block::io::move_stored;
use crate::block::{Child, Error, GuestOffset, HostOffset, HostPlace, Resize, ResizeFiles, Result};
use crate::formats::one_file::{Tables, clear_last_unit};
use crate::formats::table;
use crate::storage::{Preallocation, Zeroing};

const LONG_FOOTER: u64 = FOOTER_BYTES as u64;
const RESIZING: &str = "Failed to resize underlying file";

fn check_size(size: u64) -> Result<()> {
    if !size.is_multiple_of(SECTOR) {
        return Err(Error::invalid("The new size must be a multiple of 512"));
    }
    if size > MAX_SIZE {
        return Err(Error::unsupported("The image size is too large for file format 'vpc'"));
    }
    Ok(())
}

fn unsupported(fill: Preallocation) -> Error {
    Error::unsupported(format!("Unsupported preallocation mode '{}'", fill.name()))
}

/// Writes a size into a footer so that readers come to exactly this size.
fn set_size(footer: &mut Footer, size: u64) {
    let sectors = size / SECTOR;
    if SizeRule::of(footer.creator()) == SizeRule::CurrentSize {
        let exact = footer.geometry() == ChsGeometry::MAX;
        footer.set_size(size, if exact { ChsGeometry::MAX } else { ChsGeometry::of(sectors) });
        return;
    }
    let geometry = ChsGeometry::at_least(sectors);
    if geometry == ChsGeometry::MAX || geometry.count() == sectors {
        footer.set_size(size, geometry);
    } else {
        // No geometry tells this size, so the image must become one where the size itself does.
        footer.set_creator(b"qem2");
        footer.set_size(size, ChsGeometry::MAX);
    }
}

impl Resize for Fixed {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        check_size(size)?;
        if fill == Preallocation::Metadata {
            return Err(unsupported(fill));
        }
        let end = self.end.load(Ordering::Relaxed);
        if self.size.load(Ordering::Relaxed) > end {
            return Err(self.too_short());
        }
        if self.files[0].storage.facts().fixed_len && size > end {
            return Err(Error::unsupported("Cannot grow device files"));
        }
        Ok(())
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.check(size, fill)?;
        let file = FixedFile {
            file: &self.files[0],
            old: self.size.load(Ordering::Relaxed),
            end: self.end.load(Ordering::Relaxed),
        };
        let mut footer = self.footer();
        let mut new = footer.clone();
        set_size(&mut new, size);
        new.set_unfinished(false);
        let end = if size > file.old { file.grow(size, fill, &footer, &new)? } else { file.decide(size, &new)? };
        *footer = new;
        self.end.store(end, Ordering::Relaxed);
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }
}

/// A fixed disk on its way to another size. What a reader goes by is the footer that ends the file, so it alone
/// makes the old disk the new one, by the write of its sector; before that it says the old size wherever it is.
struct FixedFile<'a> {
    file: &'a Child,
    /// The virtual size.
    old: u64,
    /// Where the footer is: at the virtual size, or (on a device, or after a resize was stopped) behind it.
    end: u64,
}

impl FixedFile<'_> {
    /// A footer for the end of a file in which other bytes come behind the disk.
    fn marked(&self, footer: &Footer) -> Footer {
        let mut footer = footer.clone();
        // On a device there always are some.
        footer.set_unfinished(!self.file.storage.facts().fixed_len);
        footer
    }

    fn write_footer(&self, at: u64, footer: &Footer) -> Result<()> {
        self.file.storage.flush().context("Could not flush")?;
        self.file.write_metadata(FOOTER, at, footer.bytes())?;
        self.file.storage.flush().context("Could not flush")
    }

    /// Gives the disk its new size; returns where the footer is then.
    fn grow(&self, size: u64, fill: Preallocation, old: &Footer, new: &Footer) -> Result<u64> {
        if size <= self.end {
            // There is room before the footer. Nobody knows what lies in it.
            self.clear(size, Zeroing::Write)?;
            return self.decide(size, new);
        }
        let done = self.extend(size, fill, old).and_then(|()| self.write_footer(size, new));
        match done {
            Ok(()) => Ok(size),
            Err(error) => {
                // The old footer comes back to its place first, then to the file's end. Where that fails too, the
                // one behind it says the same.
                let _ = self.write_footer(self.end, old).and_then(|()| self.set_end(self.end));
                Err(error)
            }
        }
    }

    /// Makes a longer file of it, of which the disk is still the old one.
    fn extend(&self, size: u64, fill: Preallocation, old: &Footer) -> Result<()> {
        self.write_footer(size, &self.marked(old))?;
        match fill {
            Preallocation::Off | Preallocation::Metadata => {
                self.clear(size.min(self.end + LONG_FOOTER), Zeroing::Write)
            }
            Preallocation::Falloc => self.clear(size, Zeroing::Allocate),
            Preallocation::Full => self.clear(size, Zeroing::Write),
        }
    }

    /// Makes all from the old disk's end to `end` zeros, but for what is new in the file and so reads as zeros.
    fn clear(&self, end: u64, how: Zeroing) -> Result<()> {
        let len = end.saturating_sub(self.old);
        self.file.storage.zero(self.old, len, how).context(RESIZING)
    }

    /// Gives a disk its new size that ends where the footer is, or before it.
    fn decide(&self, size: u64, new: &Footer) -> Result<u64> {
        match size == self.end {
            true => self.write_footer(self.end, new)?,
            false => self.write_footer(self.end, &self.marked(new))?,
        }
        self.cut(size, new)
    }

    /// Cuts off what lies behind the new disk, once the footer at the file's end tells its size.
    fn cut(&self, size: u64, new: &Footer) -> Result<u64> {
        // Where the two would overlap, a stop between would leave none that is whole.
        if self.file.storage.facts().fixed_len || size.saturating_add(LONG_FOOTER) > self.end {
            return Ok(self.end);
        }
        self.write_footer(size, new)?;
        self.set_end(size)?;
        Ok(size)
    }

    /// Makes a footer at that place the last thing in the file.
    fn set_end(&self, footer: u64) -> Result<()> {
        self.file.storage.set_len(footer + LONG_FOOTER, Preallocation::Off).context(RESIZING)?;
        self.file.storage.flush().context("Could not flush")
    }
}

impl Resize for Dynamic {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        check_size(size)?;
        if fill != Preallocation::Off {
            return Err(unsupported(fill));
        }
        let mut state = self.state();
        entries_for(&state, size)?;
        state.check_apart(self.storage())
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.resize_over(size, fill, 0)
    }

    fn resize_with(&self, size: u64, fill: Preallocation, files: &dyn ResizeFiles) -> Result<()> {
        self.resize_over(size, fill, files.covered())
    }
}

impl Dynamic {
    /// The parent covers the first `covered` bytes.
    fn resize_over(&self, size: u64, fill: Preallocation, covered: u64) -> Result<()> {
        Resize::check(self, size, fill)?;
        let storage = self.storage();
        let mut state = self.state();
        state.prepare(storage)?;
        state.write_tables(storage)?;
        let old = self.size.load(Ordering::Relaxed);
        if size < old {
            shrink(&mut state, self, size)?;
        } else {
            grow(&mut state, self, old, size, covered)?;
        }
        self.size.store(size, Ordering::Relaxed);
        storage.flush().context("Could not flush")
    }
}

fn entries_for(state: &VpcState, size: u64) -> Result<u32> {
    let entries = size.div_ceil(state.block());
    if entries * 4 > MAX_TABLE {
        return Err(Error::unsupported("the block allocation table would be too long"));
    }
    u32::try_from(entries).map_err(|_| Error::unsupported("the block allocation table would be too long"))
}

fn write_header(state: &VpcState, file: &Child) -> Result<()> {
    let storage = &file.storage;
    storage.flush().context("Could not flush")?;
    let at = state.footer.data_offset();
    file.write_metadata(HEADER, at, state.header.bytes())?;
    storage.flush().context("Could not flush")
}

fn grow(state: &mut VpcState, image: &Dynamic, old: u64, size: u64, covered: u64) -> Result<()> {
    let storage = image.storage();
    clear_tail(state, image, old)?;
    let wanted = entries_for(state, size)?;
    let had = state.header.entries();
    let first = u32::try_from(old.div_ceil(state.block())).unwrap_or(had).min(had);
    let elsewhere = wanted > had && !can_grow_in_place(state, wanted);
    if wanted > had && !elsewhere {
        let table_end = state.table_end_with(wanted);
        make_way(state, image, table_end)?;
        // Entries that the header does not count yet, and the rest of their sector.
        let from = state.header.table() + u64::from(had) * 4;
        let bytes = vec![0xff; usize::try_from(table_end - from).unwrap_or(0)];
        image.files[0].write_metadata(TABLE, from, &bytes)?;
        state.forget_table();
    }
    for block in first..had.min(wanted) {
        state.set(storage, u64::from(block), None)?;
    }
    state.write_tables(storage)?;
    if elsewhere {
        move_table(state, image, wanted)?;
    } else if wanted > had {
        state.header.set_entries(wanted);
        write_header(state, &image.files[0])?;
    }
    if image.has_parent() {
        hide_parent(state, image, old..covered.min(size))?;
    }
    set_size(&mut state.footer, size);
    state.write_front(storage)?;
    let free = state.free;
    state.move_footer(free);
    state.write_tables(storage)
}

/// Makes part of the disk, which ends before it yet, the image's own: zeros, whatever the parent has there. Where a block
/// is, it reads as zeros already if its sectors are marked.
fn hide_parent(state: &mut VpcState, image: &Dynamic, range: Range<u64>) -> Result<()> {
    let (storage, unit, bitmap) = (image.storage(), state.block(), state.bitmap());
    let mut from = range.start;
    while from < range.end {
        let (block, within) = (from / unit, from % unit);
        let own = Sectors::within(within)..Sectors::within(unit);
        match state.run(storage, block, 1)?.0 {
            Some(at) => state.mark_sectors(storage, block, at, own)?,
            None => {
                let (at, fresh) = state.take(storage)?;
                if !fresh {
                    let start = (at + bitmap + within).get();
                    storage.zero(start, unit - within, Zeroing::Allocate).context("Could not clear a new block")?;
                }
                image.files[0].write_metadata(BITMAP, at.get(), &vec![0; usize::try_from(bitmap).unwrap_or(0)])?;
                state.mark_sectors(storage, block, at, own)?;
                state.set(storage, block, Some(at))?;
            }
        }
        from += unit - within;
    }
    state.write_tables(storage)?;
    storage.flush().context("Could not flush")
}

/// Whether nothing but blocks, which can be moved, lies where a table with that many entries would end.
fn can_grow_in_place(state: &VpcState, entries: u32) -> bool {
    let grown = state.table_end()..state.table_end_with(entries);
    !state.metadata().iter().any(|range| overlap(range, &grown))
}

/// Writes the table anew, with that many entries, behind all that there is, and then names it in the header.
fn move_table(state: &mut VpcState, image: &Dynamic, entries: u32) -> Result<()> {
    let (storage, file) = (image.storage(), &image.files[0]);
    let (from, used) = (state.header.table(), u64::from(state.header.entries()) * 4);
    let at = state.free.get();
    let end = (at + u64::from(entries) * 4).next_multiple_of(SECTOR);
    // The last footer is where the table goes: some readers know no other.
    state.move_footer(HostOffset(end));
    state.write_tables(storage)?;
    storage.flush().context("Could not flush")?;
    table::copy(storage, &file.name, TABLE, from, at, used)?;
    let bytes = vec![0xff; usize::try_from(end - at - used).unwrap_or(0)];
    file.write_metadata(TABLE, at + used, &bytes)?;
    state.header.set_table(at, entries);
    state.forget_table();
    write_header(state, file)
}

/// Copies blocks away that lie where the table shall be, up to `end`, and names the copies.
///
/// The last footer goes behind all of them first: some readers know no other.
fn make_way(state: &mut VpcState, image: &Dynamic, end: u64) -> Result<()> {
    let storage = image.storage();
    let (table, stride) = (state.header.table(), state.stride());
    let mut moves = state.blocks(storage)?;
    moves.retain(|(_, at)| at.get() < end && (*at + stride).get() > table);
    let first = state.free.max(HostOffset(end));
    let last = first + stride.saturating_mul(moves.len() as u64);
    if !can_name(last) {
        return Err(Error::unsupported("the file has no room for another block"));
    }
    state.move_footer(last);
    state.write_tables(storage)?;
    storage.flush().context("Could not flush")?;
    for (n, (block, at)) in moves.into_iter().enumerate() {
        let to = first + stride * n as u64;
        move_block(state, image, block, at, to)?;
        state.set(storage, block, Some(to))?;
    }
    state.write_tables(storage)?;
    storage.flush().context("Could not flush")
}

/// Copies a block, its bitmap first, to where nothing is.
fn move_block(state: &VpcState, image: &Dynamic, block: u64, from: HostOffset, to: HostOffset) -> Result<()> {
    let bitmap = state.bitmap();
    table::copy(image.storage(), &image.files[0].name, BITMAP, from.get(), to.get(), bitmap)?;
    let [from, to] = [from, to].map(|at| HostPlace { file: 0, at: at + bitmap });
    let guest = GuestOffset(block.saturating_mul(state.block()));
    move_stored(image, from, to, guest, state.block()).context("Could not move a block")
}

/// Makes the rest of the last block read as zeros: it lies past `size`, and may come into view.
fn clear_tail(state: &mut VpcState, image: &Dynamic, size: u64) -> Result<()> {
    let (storage, bitmap) = (image.storage(), state.bitmap());
    clear_last_unit(image, size, state.block(), Zeroing::Allocate, |block| {
        Ok(state.run(storage, block, 1)?.0.map(|at| (at + bitmap).get()))
    })
}

fn shrink(state: &mut VpcState, image: &Dynamic, size: u64) -> Result<()> {
    let storage = image.storage();
    set_size(&mut state.footer, size);
    state.write_front(storage)?;
    let free = state.free;
    state.move_footer(free);
    state.write_tables(storage)?;
    clear_tail(state, image, size)?;

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
    write_header(state, &image.files[0])?;

    // Close the gaps from the end.
    kept.sort_unstable();
    holes.sort_unstable();
    let mut holes = holes.into_iter();
    let end = state.metadata().iter().map(|range| range.end).max().unwrap_or(0);
    let mut end = HostOffset(end.next_multiple_of(SECTOR));
    while let Some((at, block)) = kept.pop() {
        match holes.next().filter(|hole| *hole < at) {
            Some(hole) => {
                move_block(state, image, block, at, hole)?;
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
