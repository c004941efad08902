//! The block allocation table of a dynamic disk, its bitmaps, and where the next block goes.

use std::ops::Range;

use super::layout::{
    BITMAP, BLOCK_SIZE_AT, DynamicHeader, ENTRIES_AT, FOOTER, FOOTER_BYTES, Footer, MAX_OFFSET, MAX_TABLE, SECTOR,
    Sectors, TABLE, TABLE_AT, UNALLOCATED,
};
use crate::block::error::{Context, Operation, Place};
use crate::block::{Child, Error, HostOffset, Purpose, Result, metadata};
use crate::formats::one_file::Tables;
use crate::formats::runs::Runs;
use crate::formats::table::TableCache;
use crate::storage::{Preallocation, Storage};

/// Working set of the table: more than the table of the largest disk with the usual block size.
const CACHE: usize = 8 << 20;
/// The most entries that are looked at for one answer.
const STEPS: u64 = 1 << 20;
/// The most bytes of a bitmap that are looked at for one answer.
const BITMAP_PIECE: u64 = 4096;

/// What changes while the image is open.
#[derive(Debug)]
pub struct VpcState {
    /// As it shall be at both ends of the file.
    pub footer: Footer,
    /// As it shall be in the file.
    pub header: DynamicHeader,
    table: TableCache,
    /// Blocks whose sectors are known to be written, all of them.
    full: Vec<u64>,
    /// Where the next block goes, and the footer until then.
    pub free: HostOffset,
    /// Bytes of the file from here on were never given out and read as zeros.
    fresh: HostOffset,
    /// Whether a footer has to be written at [`VpcState::free`].
    footer_moved: bool,
    /// Whether the table was found fit to be written to.
    prepared: bool,
    /// Other parts of the file that are in use: where the parent is told.
    locators: Vec<Range<u64>>,
}

impl Tables for VpcState {
    /// Writes what waits: the last footer, then the table.
    fn write_tables(&mut self, storage: &dyn Storage) -> Result<()> {
        if self.footer_moved {
            metadata::write(storage, self.table.file(), FOOTER, self.free.get(), self.footer.bytes())?;
            let end = self.free + FOOTER_BYTES as u64;
            self.fresh = self.fresh.max(end);
            let length = storage.len().context("Could not get the size of the file")?;
            if length > end.get() && !storage.facts().fixed_len {
                // Nothing that is named lies behind: the footer has to be the last thing in the file.
                storage.set_len(end.get(), Preallocation::Off).context("Could not shorten the file")?;
            }
            // What is given out next starts with a bitmap where this footer is; behind it there is nothing.
            if storage.facts().new_reads_zero {
                self.fresh = end;
            }
            self.footer_moved = false;
        }
        if self.table.is_changed() {
            storage.flush().context("Could not flush")?;
            self.table.write_out(storage)?;
        }
        Ok(())
    }
}

impl VpcState {
    /// Checks header and table of an image of that virtual size; where it is opened to be checked, blocks past the end
    /// of the file are for that to find.
    pub fn open(
        file: &Child,
        footer: Footer,
        header: DynamicHeader,
        locators: Vec<Range<u64>>,
        size: u64,
        purpose: Purpose,
    ) -> Result<Self> {
        let (storage, file) = (&*file.storage, &file.name);
        let length = storage.len().context("Could not get the size of the file")?;
        let block = header.block_size();
        let field = |at: u64| footer.data_offset().saturating_add(at);
        if !block.is_power_of_two() || u64::from(block) < SECTOR {
            return Err(Error::corrupt(format!("Invalid block size {block}")).in_file_at(field(BLOCK_SIZE_AT)));
        }
        let entries = header.entries();
        if entries > u32::MAX / 8 {
            let error = Error::corrupt(format!("Max Table Entries too large ({})", entries.cast_signed()));
            return Err(error.in_file_at(field(ENTRIES_AT)));
        }
        if u64::from(entries) < size.div_ceil(u64::from(block)) {
            return Err(Error::corrupt("Page table too small").in_file_at(field(ENTRIES_AT)));
        }
        let bytes = u64::from(entries) * 4;
        // The last sector may be cut short.
        let length = length.next_multiple_of(SECTOR);
        let end = header.table().checked_add(bytes).filter(|end| *end <= MAX_OFFSET);
        let beyond = || Error::corrupt("Error reading pagetable").in_file_at(field(TABLE_AT));
        let end = end.ok_or_else(beyond)?.next_multiple_of(SECTOR);
        let truncated = "block-vpc: free_data_block_offset points after the end of file. The image has been truncated.";
        if end > length {
            return Err(Error::corrupt(truncated).in_file_at(field(TABLE_AT)));
        }
        if bytes > MAX_TABLE {
            return Err(Error::unsupported(format!("block allocation table of {bytes} bytes is too long")));
        }
        let fresh = HostOffset(if storage.facts().new_reads_zero { length } else { u64::MAX });
        let free = HostOffset(end);
        let mut state = Self {
            footer,
            header,
            table: TableCache::new(CACHE, file, TABLE),
            full: Vec::new(),
            free,
            fresh,
            footer_moved: false,
            prepared: false,
            locators,
        };
        let (stride, mut last) = (state.stride(), free);
        state.each(storage, |_, at| last = last.max(at + stride))?;
        state.free = last;
        if state.free.get() > length && !purpose.checks() {
            return Err(Error::corrupt(truncated));
        }
        let others = state.locators.iter().map(|range| range.end).chain([state.header_range().end]);
        let end = others.max().unwrap_or(0).checked_next_multiple_of(SECTOR);
        state.free = state.free.max(HostOffset(end.unwrap_or(u64::MAX)));
        Ok(state)
    }

    /// Bytes of a block's data.
    pub fn block(&self) -> u64 {
        u64::from(self.header.block_size())
    }

    /// Bytes of a block's bitmap: a bit for each sector, to whole sectors.
    pub fn bitmap(&self) -> u64 {
        (self.block() / SECTOR).div_ceil(8).next_multiple_of(SECTOR)
    }

    /// Bytes of a block with its bitmap.
    pub fn stride(&self) -> u64 {
        self.block() + self.bitmap()
    }

    /// Where the dynamic header is.
    pub fn header_range(&self) -> Range<u64> {
        let at = self.footer.data_offset();
        at..at.saturating_add(self.header.bytes().len() as u64)
    }

    /// What of the file is neither a block nor the last footer.
    pub fn metadata(&self) -> Vec<Range<u64>> {
        let tables = [0..FOOTER_BYTES as u64, self.header_range(), self.header.table()..self.table_end()];
        tables.into_iter().chain(self.locators.iter().cloned()).collect()
    }

    /// Where the sectors of the table end.
    pub fn table_end(&self) -> u64 {
        self.table_end_with(self.header.entries())
    }

    /// The same of a table with that many entries.
    pub fn table_end_with(&self, entries: u32) -> u64 {
        self.header.table().saturating_add(u64::from(entries) * 4).next_multiple_of(SECTOR)
    }

    /// Where the entry of a block is.
    fn entry_at(&self, block: u64) -> u64 {
        self.header.table().saturating_add(block * 4)
    }

    /// Every block that is there, with the place of its bitmap.
    pub fn blocks(&mut self, storage: &dyn Storage) -> Result<Vec<(u64, HostOffset)>> {
        let mut found = Vec::new();
        self.each(storage, |block, at| found.push((block, at)))?;
        Ok(found)
    }

    /// Gives `see` every block that is there, with the place of its bitmap.
    pub fn each(&mut self, storage: &dyn Storage, mut see: impl FnMut(u64, HostOffset)) -> Result<()> {
        let (mut block, entries) = (0, u64::from(self.header.entries()));
        while block < entries {
            match self.run(storage, block, entries - block)? {
                (None, run) => block += run,
                (Some(at), _) => {
                    see(block, at);
                    block += 1;
                }
            }
        }
        Ok(())
    }

    /// Where a block's bitmap is; or how many blocks (at most `max`) from it on are not there.
    pub fn run(&mut self, storage: &dyn Storage, block: u64, max: u64) -> Result<(Option<HostOffset>, u64)> {
        let max = max.min(u64::from(self.header.entries()).saturating_sub(block)).min(STEPS);
        if max == 0 {
            return Err(Error::corrupt(format!("the block allocation table has no entry {block}")));
        }
        if !self.header.table().is_multiple_of(4) {
            let mut entry = [0; 4];
            self.table.read(storage, self.entry_at(block), &mut entry)?;
            return Ok((named(u32::from_be_bytes(entry)), 1));
        }
        let mut count = 0;
        while count < max {
            let wanted = usize::try_from((max - count) * 4).unwrap_or(usize::MAX);
            let at = self.entry_at(block + count);
            let part = self.table.slice(storage, at, wanted)?;
            for entry in part.as_chunks().0.iter().copied().map(u32::from_be_bytes) {
                if let Some(at) = named(entry) {
                    return Ok(if count == 0 { (Some(at), 1) } else { (None, count) });
                }
                count += 1;
            }
        }
        Ok((None, count))
    }

    /// Names the place of a block's bitmap, or takes the name away.
    pub fn set(&mut self, storage: &dyn Storage, block: u64, at: Option<HostOffset>) -> Result<()> {
        let entry = match at {
            Some(at) => {
                u32::try_from(Sectors::within(at.get()).0).map_err(|_| Error::corrupt("block offset too large"))?
            }
            None => UNALLOCATED,
        };
        let place = self.entry_at(block);
        self.table.write(storage, place, &entry.to_be_bytes())
    }

    fn is_full(&self, block: u64) -> bool {
        usize::try_from(block / 64).ok().and_then(|n| self.full.get(n)).is_some_and(|w| w >> (block % 64) & 1 == 1)
    }

    /// Notes that all sectors of a block are written.
    fn mark_full(&mut self, block: u64) {
        let Ok(word) = usize::try_from(block / 64) else { return };
        if word >= self.full.len() {
            self.full.resize(word + 1, 0);
        }
        self.full[word] |= 1 << (block % 64);
    }

    /// Forgets the table after it was written to by other ways.
    pub fn forget_table(&mut self) {
        self.table.forget();
    }

    /// Forgets what is known of the bitmaps, after blocks were renamed or moved.
    pub fn forget_bitmaps(&mut self) {
        self.full.clear();
    }

    /// Whether the sectors of a block from `sector` on are written, and how many (at least one) are alike.
    pub fn sectors(
        &mut self,
        storage: &dyn Storage,
        block: u64,
        at: HostOffset,
        sector: Sectors,
    ) -> Result<(bool, Sectors)> {
        let (Sectors(all), Sectors(sector)) = (Sectors::within(self.block()), sector);
        if self.is_full(block) {
            return Ok((true, Sectors(all.saturating_sub(sector))));
        }
        let first = sector / 8;
        let mut bytes = vec![0; usize::try_from(all.div_ceil(8).saturating_sub(first).min(BITMAP_PIECE)).unwrap_or(0)];
        let place = (at + first).get();
        storage.read_at(place, &mut bytes).at(|| self.in_bitmap(Operation::Read, place))?;
        let (written, run) = run_of_bits(&bytes, sector % 8);
        let run = run.min(all.saturating_sub(sector)).max(1);
        if written && sector == 0 && run == all {
            self.mark_full(block);
        }
        Ok((written, Sectors(run)))
    }

    fn in_bitmap(&self, operation: Operation, at: u64) -> Place {
        Place::of_table(operation, self.table.file(), BITMAP, at)
    }

    /// Notes in the file that sectors of a block are written.
    pub fn mark_sectors(
        &mut self,
        storage: &dyn Storage,
        block: u64,
        at: HostOffset,
        sectors: Range<Sectors>,
    ) -> Result<()> {
        let Range { start: Sectors(from), end: Sectors(to) } = sectors;
        if self.is_full(block) || to <= from {
            return Ok(());
        }
        let (first, last) = (from / 8, (to - 1) / 8);
        let mut bytes = vec![0; usize::try_from(last - first + 1).unwrap_or(0)];
        let place = (at + first).get();
        storage.read_at(place, &mut bytes).at(|| self.in_bitmap(Operation::Read, place))?;
        let mut changed = false;
        for sector in from..to {
            if let Some(byte) = usize::try_from(sector / 8 - first).ok().and_then(|n| bytes.get_mut(n)) {
                let bit = 0x80 >> (sector % 8);
                changed |= *byte & bit == 0;
                *byte |= bit;
            }
        }
        if changed {
            storage.write_at(place, &bytes).at(|| self.in_bitmap(Operation::Write, place))?;
        }
        Ok(())
    }

    /// Writes the bitmap of a new block, whose sectors are all written.
    pub fn write_bitmap(&mut self, storage: &dyn Storage, block: u64, at: HostOffset) -> Result<()> {
        let bytes = vec![0xff; usize::try_from(self.bitmap()).unwrap_or(0)];
        storage.write_at(at.get(), &bytes).at(|| self.in_bitmap(Operation::Write, at.get()))?;
        self.mark_full(block);
        Ok(())
    }

    /// Refuses an image that cannot be written to without harm. Changes nothing.
    pub fn check_apart(&mut self, storage: &dyn Storage) -> Result<()> {
        if !self.header.table().is_multiple_of(SECTOR) {
            return Err(Error::unsupported("the block allocation table does not start at a sector"));
        }
        let mut runs = Runs::default();
        for range in self.metadata() {
            runs.add(range.start, range.end.saturating_sub(range.start));
        }
        let Some(fixed) = runs.disjoint() else {
            return Err(Error::corrupt("header and block allocation table of the image overlap"));
        };
        let (mut blocks, stride) = (Runs::default(), self.stride());
        fixed.iter().for_each(|(start, end)| blocks.add(*start, end - start));
        self.each(storage, |_, at| blocks.add(at.get(), stride))?;
        if blocks.disjoint().is_none() {
            return Err(Error::corrupt("blocks of the image overlap"));
        }
        Ok(())
    }

    /// Makes sure, once, before the first change, that the image can be written to without harm.
    pub fn prepare(&mut self, storage: &dyn Storage) -> Result<()> {
        if self.prepared {
            return Ok(());
        }
        self.check_apart(storage)?;
        // The last footer is about to be overwritten: the copy has to be whole.
        let mut front = [0; FOOTER_BYTES];
        metadata::read(storage, self.table.file(), FOOTER, 0, &mut front)?;
        if front != *self.footer.bytes() {
            self.write_front(storage)?;
        }
        self.prepared = true;
        Ok(())
    }

    /// Writes the footer's copy at the start, between two flushes.
    pub fn write_front(&self, storage: &dyn Storage) -> Result<()> {
        storage.flush().context("Could not flush")?;
        metadata::write(storage, self.table.file(), FOOTER, 0, self.footer.bytes())?;
        storage.flush().context("Could not flush")
    }

    /// Room for a block: the place of its bitmap, and whether its data reads as zeros now.
    pub fn take(&mut self, storage: &dyn Storage) -> Result<(HostOffset, bool)> {
        self.prepare(storage)?;
        let at = self.free;
        if !can_name(at) {
            return Err(Error::unsupported("the file has no room for another block"));
        }
        let fresh = at + self.bitmap() >= self.fresh;
        self.free = at + self.stride();
        self.fresh = self.fresh.max(self.free);
        self.footer_moved = true;
        Ok((at, fresh))
    }

    /// Takes back what [`VpcState::take`] gave, if nothing was given since.
    pub fn give_back(&mut self, at: HostOffset) {
        if at + self.stride() == self.free {
            self.free = at;
        }
    }

    /// Whether so much waits that it should be written now.
    pub fn wants_writing(&self) -> bool {
        self.table.is_full()
    }

    /// Has the footer written again at the end.
    pub fn move_footer(&mut self, free: HostOffset) {
        self.free = free;
        self.footer_moved = true;
    }
}

/// The place that an entry of the table names, if it does.
fn named(entry: u32) -> Option<HostOffset> {
    (entry != UNALLOCATED).then(|| HostOffset(Sectors::from(entry).bytes()))
}

/// Whether an entry of the table can name a place.
pub fn can_name(at: HostOffset) -> bool {
    Sectors::within(at.get()) < Sectors::from(UNALLOCATED)
}

/// Whether two ranges have bytes in common.
pub fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// The first bit from `start` on, and how many are like it.
fn run_of_bits(bytes: &[u8], start: u64) -> (bool, u64) {
    let bit = |n: u64| usize::try_from(n / 8).ok().and_then(|i| bytes.get(i)).map(|byte| byte >> (7 - n % 8) & 1 == 1);
    let Some(first) = bit(start) else { return (false, 0) };
    let whole = if first { 0xff } else { 0 };
    let mut n = start;
    loop {
        let is_whole = usize::try_from(n / 8).ok().and_then(|i| bytes.get(i)) == Some(&whole);
        if n.is_multiple_of(8) && is_whole {
            n += 8;
        } else if bit(n) == Some(first) {
            n += 1;
        } else {
            return (first, n - start);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_run_from_the_highest() {
        assert_eq!(run_of_bits(&[0xff, 0xff, 0x80], 3), (true, 14));
        assert_eq!(run_of_bits(&[0x0f, 0xff], 0), (false, 4));
        assert_eq!(run_of_bits(&[0x0f, 0xff], 4), (true, 12));
        assert_eq!(run_of_bits(&[0x00, 0x01], 2), (false, 13));
        assert_eq!(run_of_bits(&[], 0), (false, 0));
    }
}
