//! Bitmaps that follow what is written, and bitmaps that are added.
//!
//! Invariants: before the first change every bitmap that follows is marked as in use in the directory, so that
//! whatever stops us leaves one that nobody trusts; the mark is taken back at the end, when all bits are in the file.
//! Meanwhile what was written is kept as runs of the disk, a bounded number of them. Bits are only ever set. A
//! cluster for bits is counted and filled before a table points to it.
//!
//! Source: specification, section "Bitmaps". `alloc` is held throughout; the list of bitmaps is a leaf.

use std::sync::PoisonError;

use crate::block::driver::{BitmapInfo, Bitmaps, WantedBitmap};
use crate::block::error::Context;
use crate::block::{Error, Result};

use super::Qcow2Driver;
use super::alloc::Allocator;
use super::bitmap::{self, ALL_SET, BITMAP, BITMAP_TABLE, Bitmap, DIRECTORY};
use super::dirty::{Dirty, MOST_RUNS};
use super::layout::{self, BITMAP_ENTRY, BitmapFields, BitmapsExtension, ENTRY, OFFSET_MASK};

fn follows(bitmap: &Bitmap) -> bool {
    bitmap.fields.flags & (layout::BITMAP_AUTO | layout::BITMAP_IN_USE) == layout::BITMAP_AUTO
}

impl Qcow2Driver {
    /// The bitmaps, as they will be when the image is closed.
    pub(super) fn bitmap_list(&self) -> Vec<Bitmap> {
        self.bitmaps.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_bitmap_list(&self, list: Vec<Bitmap>) {
        *self.bitmaps.write().unwrap_or_else(PoisonError::into_inner) = list;
    }

    /// Before the first change: bitmaps that follow are marked as in use.
    pub(super) fn begin_bitmaps(&self, dirty: &mut Dirty) -> Result<()> {
        if dirty.begun {
            return Ok(());
        }
        let list = self.bitmap_list();
        dirty.grain = list.iter().filter(|bitmap| follows(bitmap)).map(|bitmap| bitmap.fields.granularity_bits).min();
        if dirty.grain.is_some() {
            self.write_flags(&list, layout::BITMAP_IN_USE)?;
        }
        dirty.begun = true;
        Ok(())
    }

    /// A range of the disk was written, or is going to be.
    pub(super) fn touch(&self, alloc: &mut Allocator, at: u64, len: u64) -> Result<()> {
        let Some(grain) = alloc.dirty.grain else { return Ok(()) };
        let unit = 1u64 << grain;
        let end = at.saturating_add(len).min(self.header().fields.size);
        if at < end {
            alloc.dirty.add(at - at % unit, end.checked_next_multiple_of(unit).unwrap_or(end));
        }
        if alloc.dirty.runs.len() >= MOST_RUNS { self.enter_runs(alloc) } else { Ok(()) }
    }

    /// Enters the runs in the bitmaps that follow.
    fn enter_runs(&self, alloc: &mut Allocator) -> Result<()> {
        let runs = std::mem::take(&mut alloc.dirty.runs);
        let size = self.header().fields.size;
        for bitmap in self.bitmap_list().iter().filter(|bitmap| follows(bitmap)) {
            let grain = bitmap.fields.granularity_bits;
            for (start, end) in &runs {
                let (first, last) = (start >> grain, (end.min(&size) - 1) >> grain);
                self.set_run(alloc, &bitmap.fields, first, last)?;
            }
        }
        Ok(())
    }

    /// Sets the bits from `first` to `last`.
    fn set_run(&self, alloc: &mut Allocator, fields: &BitmapFields, first: u64, last: u64) -> Result<()> {
        let per_cluster = self.geometry.cluster_size() * 8;
        let mut from = first;
        while from <= last {
            let to = last.min(from - from % per_cluster + (per_cluster - 1));
            let len = usize::try_from(to / 8 - from / 8 + 1).map_err(|_| too_long())?;
            let mut bits = vec![0xff; len];
            if let Some(byte) = bits.first_mut() {
                *byte &= 0xff << (from % 8);
            }
            if let Some(byte) = bits.last_mut() {
                *byte &= 0xff >> (7 - to % 8);
            }
            self.set_bits(alloc, fields, from / 8, &bits)?;
            from = to + 1;
        }
        Ok(())
    }

    /// Sets the bits that are set in `bits`, which stands for the bitmap's bytes from `at` on.
    fn set_bits(&self, alloc: &mut Allocator, fields: &BitmapFields, at: u64, bits: &[u8]) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let (mut at, mut rest) = (at, bits);
        while !rest.is_empty() {
            let room = usize::try_from(cluster - at % cluster).unwrap_or(rest.len());
            let (part, others) = rest.split_at(room.min(rest.len()));
            if part.iter().any(|byte| *byte != 0) {
                self.set_in_cluster(alloc, fields, at, part)?;
            }
            at += part.len() as u64;
            rest = others;
        }
        Ok(())
    }

    fn set_in_cluster(&self, alloc: &mut Allocator, fields: &BitmapFields, at: u64, bits: &[u8]) -> Result<()> {
        let file = self.file();
        let cluster = self.geometry.cluster_size();
        let (index, within) = (at / cluster, at % cluster);
        if index >= u64::from(fields.table_size) {
            return Err(self.corrupt(format!("Bitmap table has no entry {index}")));
        }
        let place = fields.table_offset + index * ENTRY;
        let mut entry = [0; ENTRY as usize];
        file.read_metadata(BITMAP_TABLE, place, &mut entry)?;
        let entry = u64::from_be_bytes(entry);
        let host = entry & OFFSET_MASK;
        if host == 0 && entry & ALL_SET != 0 {
            return Ok(());
        }
        if host == 0 {
            let entry = if bits.len() as u64 == cluster && bits.iter().all(|byte| *byte == 0xff) {
                ALL_SET
            } else {
                let mut whole = vec![0; usize::try_from(within).map_err(|_| too_long())?];
                whole.extend_from_slice(bits);
                let host = self.put(alloc, BITMAP, &whole)?;
                self.tables.write_back()?;
                file.flush()?;
                host
            };
            return file.write_metadata(BITMAP_TABLE, place, &entry.to_be_bytes());
        }
        self.check_data(host, cluster)?;
        if self.geometry.in_cluster(host) != 0 || self.refcount(self.geometry.cluster_of(host))? != 1 {
            return Err(self.corrupt(format!("Bitmap data offset {host:#x} is wrong (table index: {index:#x})")));
        }
        let mut now = vec![0; bits.len()];
        file.read_metadata(BITMAP, host + within, &mut now)?;
        for (byte, more) in now.iter_mut().zip(bits) {
            *byte |= more;
        }
        file.write_metadata(BITMAP, host + within, &now)
    }

    /// At the end: all bits in the file, then the marks taken back, or a new directory with what was added.
    pub(super) fn finish_bitmaps(&self, alloc: &mut Allocator) -> Result<()> {
        let follow = alloc.dirty.grain.is_some();
        if !follow && !alloc.dirty.added {
            return Ok(());
        }
        self.enter_runs(alloc)?;
        self.settle(alloc)?;
        self.file().storage.flush().context("Could not flush")?;
        if alloc.dirty.added {
            self.new_directory(alloc)?
        } else {
            self.write_flags(&self.bitmap_list(), 0)?
        }
        alloc.dirty = Dirty::default();
        Ok(())
    }

    /// Writes the flags of the bitmaps that follow, with `more`, where they are in the directory.
    fn write_flags(&self, list: &[Bitmap], more: u32) -> Result<()> {
        let Some(place) = self.header().bitmaps else { return Ok(()) };
        let mut at = place.directory_offset;
        for bitmap in list {
            if follows(bitmap) {
                self.file().write_metadata(DIRECTORY, at + 12, &(bitmap.fields.flags | more).to_be_bytes())?;
            }
            at += (BITMAP_ENTRY as u64 + u64::from(bitmap.fields.name_size)).next_multiple_of(8);
        }
        self.file().storage.flush().context("Could not update bitmap directory")
    }

    /// A directory of all bitmaps in a new place.
    fn new_directory(&self, alloc: &mut Allocator) -> Result<()> {
        let list = self.bitmap_list();
        let bytes = bitmap::directory(&list)?;
        let old = self.header().bitmaps.filter(|_| self.header().fields.autoclear & layout::BITMAPS != 0);
        let directory_offset = self.put_bytes(alloc, DIRECTORY, &bytes)?;
        self.settle(alloc)?;
        self.file().storage.flush().context("Could not flush")?;
        let count = u32::try_from(list.len()).unwrap_or(u32::MAX);
        let directory_size = bytes.len() as u64;
        self.update_header(|header| {
            header.bitmaps = Some(BitmapsExtension { count, reserved: 0, directory_size, directory_offset });
            header.fields.autoclear |= layout::BITMAPS;
        })?;
        if let Some(old) = old {
            self.free_bytes(alloc, old.directory_offset, old.directory_size);
        }
        self.settle(alloc)
    }

    fn bitmap(&self, index: usize) -> Result<BitmapFields> {
        let list = self.bitmaps.read().unwrap_or_else(PoisonError::into_inner);
        list.get(index).map(|bitmap| bitmap.fields).ok_or_else(|| Error::invalid("There is no such bitmap"))
    }
}

fn too_long() -> Error {
    Error::unsupported("The bitmap would be too long")
}

impl Bitmaps for Qcow2Driver {
    fn list(&self) -> Vec<BitmapInfo> {
        let cluster = self.geometry.cluster_size();
        let info = |bitmap: &Bitmap| BitmapInfo {
            name: bitmap.name.clone(),
            granularity_bits: bitmap.fields.granularity_bits,
            enabled: bitmap.fields.flags & layout::BITMAP_AUTO != 0,
            consistent: bitmap.fields.flags & layout::BITMAP_IN_USE == 0,
            disk: bitmap.disk,
            stored: (u64::from(bitmap.fields.table_size) * ENTRY).next_multiple_of(cluster),
        };
        self.bitmap_list().iter().map(info).collect()
    }

    fn read(&self, index: usize, at: u64, bits: &mut [u8]) -> Result<u64> {
        let fields = self.bitmap(index)?;
        let cluster = self.geometry.cluster_size();
        let first = at / cluster;
        let entries = at.saturating_add(bits.len() as u64).div_ceil(cluster).saturating_sub(first);
        let mut table = vec![0; usize::try_from(entries * ENTRY).map_err(|_| too_long())?];
        if first + entries > u64::from(fields.table_size) {
            return Err(Error::corrupt("A bitmap's table is too short"));
        }
        self.file().read_metadata(BITMAP_TABLE, fields.table_offset + first * ENTRY, &mut table)?;
        let (mut within, mut rest, mut read) = (at % cluster, bits, 0);
        for entry in layout::words(&table) {
            let room = usize::try_from(cluster - within).unwrap_or(rest.len());
            let (part, others) = rest.split_at_mut(room.min(rest.len()));
            match (entry & OFFSET_MASK, entry & ALL_SET) {
                (0, ALL_SET) => part.fill(0xff),
                (0, _) => part.fill(0),
                (host, _) => {
                    self.file().read_metadata(BITMAP, host.saturating_add(within), part)?;
                    read += part.len() as u64;
                }
            }
            (within, rest) = (0, others);
        }
        Ok(read)
    }

    fn add(&self, new: &[BitmapInfo]) -> Result<usize> {
        let cluster = self.geometry.cluster_size();
        let mut alloc = self.lock_alloc();
        self.before_first_change(&mut alloc)?;
        // What was written until now is nothing to those that are new.
        self.enter_runs(&mut alloc)?;
        let mut list = self.bitmap_list();
        let first = list.len();
        let disk = self.header().fields.size;
        for info in new {
            let bytes = disk.div_ceil(1 << info.granularity_bits).div_ceil(8);
            let name_size = u16::try_from(info.name.len()).unwrap_or(u16::MAX);
            let table_size = u32::try_from(bytes.div_ceil(cluster)).map_err(|_| too_long())?;
            let mut fields = BitmapFields {
                table_size,
                flags: if info.enabled { layout::BITMAP_AUTO } else { 0 },
                kind: layout::BITMAP_DIRTY_TRACKING,
                granularity_bits: info.granularity_bits,
                name_size,
                // Not known yet.
                table_offset: cluster,
                extra_size: 0,
            };
            bitmap::check(&fields, &info.name, &self.geometry, disk)?;
            let table = vec![0; usize::try_from(u64::from(table_size) * ENTRY).map_err(|_| too_long())?];
            fields.table_offset = self.put(&mut alloc, BITMAP_TABLE, &table)?;
            self.add_bitmap_table(fields.table_offset, table.len() as u64);
            list.push(Bitmap { fields, name: info.name.clone(), disk });
        }
        // Everything that can be wrong with it is found out now.
        bitmap::directory(&list)?;
        self.set_bitmap_list(list);
        alloc.dirty.added |= !new.is_empty();
        Ok(first)
    }

    fn set(&self, index: usize, at: u64, bits: &[u8]) -> Result<()> {
        let fields = self.bitmap(index)?;
        let mut alloc = self.lock_alloc();
        self.set_bits(&mut alloc, &fields, at, bits)?;
        self.settle_if_due(&mut alloc)
    }

    fn check_new(&self, name: &str, granularity_bits: u8, others: usize) -> Result<()> {
        self.check_new_bitmap(name, granularity_bits, others)
    }

    fn arrange(&self, wanted: &[WantedBitmap<'_>]) -> Result<()> {
        self.arrange_bitmaps(wanted)
    }
}
