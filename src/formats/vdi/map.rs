//! The block map in memory, and which blocks of the file are in use.

use super::layout::{ALLOCATED_AT, HEADER, HEADER_BYTES, HostBlock, MapEntry, VdiHeader};
use crate::block::error::Context;
use crate::block::{Error, HostOffset, Result, metadata};
use crate::formats::one_file::Tables;
use crate::formats::table::{PAGE, TableCache};
use crate::storage::{Preallocation, Storage};

/// Working set of the map: 32 MiB map 8 TiB of disk.
const CACHE: usize = 32 << 20;
/// The most entries that are looked at for one answer.
const STEPS: u64 = 1 << 20;

/// What changes while the image is open.
#[derive(Debug)]
pub struct VdiState {
    /// As it shall be in the file.
    pub header: VdiHeader,
    /// The map, and the header's counter of blocks.
    map: TableCache,
    /// Whether the file was found to have all of the map.
    map_is_there: bool,
    /// What was never written is a parent's, and no zeros.
    layered: bool,
    space: Option<VdiSpace>,
}

/// The most blocks of a file that are kept track of: 256 TiB of the usual ones, in 32 MiB of bits.
const MOST_BLOCKS: u64 = 1 << 28;

/// Which blocks of the file are in use.
#[derive(Debug, Default)]
pub struct VdiSpace {
    used: Vec<u64>,
    /// No block below this is free.
    hint: HostBlock,
    /// One more than the highest block in use.
    pub top: u64,
    /// Bytes of the file from here on were never given out and read as zeros.
    fresh: HostOffset,
}

impl VdiSpace {
    /// Whether a block is in use.
    pub fn is_used(&self, HostBlock(index): HostBlock) -> bool {
        usize::try_from(index / 64)
            .ok()
            .and_then(|word| self.used.get(word))
            .is_some_and(|w| w >> (index % 64) & 1 == 1)
    }

    /// Marks a block; false if it was marked before.
    pub fn mark(&mut self, HostBlock(index): HostBlock) -> bool {
        let Ok(word) = usize::try_from(index / 64) else { return false };
        if word >= self.used.len() {
            self.used.resize(word + 1, 0);
        }
        let bit = 1 << (index % 64);
        let new = self.used[word] & bit == 0;
        self.used[word] |= bit;
        self.top = self.top.max(index + 1);
        new
    }

    fn clear(&mut self, block: HostBlock) {
        let HostBlock(index) = block;
        if let Some(word) = usize::try_from(index / 64).ok().and_then(|word| self.used.get_mut(word)) {
            *word &= !(1 << (index % 64));
        }
        self.hint = self.hint.min(block);
        while self.top > 0 && !self.is_used(HostBlock(self.top - 1)) {
            self.top -= 1;
        }
    }

    /// The lowest free block, at `from` or above.
    pub fn free_from(&self, HostBlock(from): HostBlock) -> HostBlock {
        let mut index = from;
        while index < self.top && self.is_used(HostBlock(index)) {
            let word = usize::try_from(index / 64).ok().and_then(|word| self.used.get(word));
            index = if word == Some(&u64::MAX) { (index / 64 + 1) * 64 } else { index + 1 };
        }
        HostBlock(index)
    }
}

impl Tables for VdiState {
    /// Writes what waits: length of the file, the header's counter and the entries that are beside it, the rest of the
    /// map, in this order.
    fn write_tables(&mut self, storage: &dyn Storage) -> Result<()> {
        if !self.map.is_changed() {
            return Ok(());
        }
        if let Some(space) = &self.space {
            let (top, end) = (space.top, self.host(HostBlock(space.top)).get());
            let top = u32::try_from(top).unwrap_or(u32::MAX);
            if self.header.allocated() != top {
                self.header.set_allocated(top);
                self.map.write(storage, ALLOCATED_AT as u64, &top.to_le_bytes())?;
            }
            if !storage.facts().fixed_len && storage.len().context("Could not get the size of the file")? < end {
                storage.set_len(end, Preallocation::Off).context("Could not extend the file")?;
            }
        }
        storage.flush().context("Could not flush")?;
        if self.map.write_first(storage)? && self.map.is_changed() {
            storage.flush().context("Could not flush")?;
        }
        self.map.write_out(storage)
    }
}

impl VdiState {
    /// Nothing read yet.
    pub fn new(header: VdiHeader, file: &str) -> Self {
        let layered = header.link().is_some();
        Self { header, map: TableCache::new(CACHE, file, "block map"), map_is_there: false, layered, space: None }
    }

    /// The file's name.
    pub fn file(&self) -> &str {
        self.map.file()
    }

    fn block(&self) -> u64 {
        u64::from(self.header.block_size())
    }

    /// Where a block of the file starts.
    pub fn host(&self, HostBlock(index): HostBlock) -> HostOffset {
        HostOffset(self.header.data_offset().into()) + index.saturating_mul(self.block())
    }

    /// Where the entry of a guest block is.
    fn entry_at(&self, block: u64) -> u64 {
        u64::from(self.header.map_offset()) + block * 4
    }

    /// Where the map ends.
    pub fn map_end(&self) -> u64 {
        self.entry_at(u64::from(self.header.blocks()))
    }

    /// Refuses a map of which the file has only a part: the entries that are missing are no zeros.
    fn need_map(&mut self, storage: &dyn Storage) -> Result<()> {
        if !self.map_is_there {
            let length = storage.len().context("Could not get the size of the file")?;
            let end = self.map_end();
            if end > length {
                return Err(Error::truncated("the block map", self.entry_at(0), length));
            }
            self.map_is_there = true;
        }
        Ok(())
    }

    /// The entry of a guest block, and how many blocks (at most `max`) go on like it: one after the other in
    /// the file, or none of them there.
    pub fn run(&mut self, storage: &dyn Storage, block: u64, max: u64) -> Result<(MapEntry, u64)> {
        let max = max.min(u64::from(self.header.blocks()).saturating_sub(block)).min(STEPS);
        if max == 0 {
            return Err(Error::corrupt(format!("the block map has no entry {block}")));
        }
        self.need_map(storage)?;
        let (mut first, mut count) = (MapEntry::Unallocated, 0u64);
        while count < max {
            let at = self.entry_at(block + count);
            let wanted = usize::try_from((max - count) * 4).unwrap_or(usize::MAX);
            let part = self.map.slice(storage, at, wanted)?;
            for entry in part.as_chunks().0.iter().copied().map(u32::from_le_bytes).map(MapEntry::parse) {
                let goes_on = match (first, entry) {
                    _ if count == 0 => true,
                    (MapEntry::At(first), MapEntry::At(block)) => block == first + count,
                    (MapEntry::At(_), _) | (_, MapEntry::At(_)) => false,
                    (first, entry) => !self.layered || entry == first,
                };
                if !goes_on {
                    return Ok((first, count));
                }
                if count == 0 {
                    first = entry;
                }
                count += 1;
            }
        }
        Ok((first, count))
    }

    /// What is in use, found out at the first call. An image where that is not clear must not be written to.
    pub fn space(&mut self, storage: &dyn Storage) -> Result<&mut VdiSpace> {
        if self.space.is_none() {
            let (map, data) = (u64::from(self.header.map_offset()), u64::from(self.header.data_offset()));
            if map < HEADER_BYTES as u64 || self.entry_at(u64::from(self.header.blocks())) > data {
                return Err(Error::corrupt("header, block map and blocks of the image overlap"));
            }
            self.space = Some(self.scan(storage, u64::from(self.header.blocks()))?);
        }
        self.space.as_mut().ok_or_else(|| Error::corrupt("no free space"))
    }

    /// What the first `blocks` guest blocks use.
    pub fn scan(&mut self, storage: &dyn Storage, blocks: u64) -> Result<VdiSpace> {
        let length = storage.len().context("Could not get the size of the file")?;
        let fresh = HostOffset(if storage.facts().new_reads_zero { length } else { u64::MAX });
        let mut space = VdiSpace { fresh, ..VdiSpace::default() };
        let mut block = 0;
        while block < blocks {
            let (entry, count) = self.run(storage, block, blocks - block)?;
            if let MapEntry::At(first) = entry {
                if self.host(first + count).get() > length {
                    return Err(Error::corrupt(format!("block {block} of the map lies past the end of the file")));
                }
                if first + count > HostBlock(MOST_BLOCKS) {
                    return Err(Error::unsupported("the file has too many blocks to be written to"));
                }
                for n in 0..count {
                    if !space.mark(first + n) {
                        let block = block + n;
                        return Err(Error::corrupt(format!("block {block} of the map shares its place with another")));
                    }
                }
            }
            block += count;
        }
        Ok(space)
    }

    /// Free blocks one after the other, at most `max`: the lowest ones, so that the file stays dense. Also
    /// whether they lie where the file reads as zeros.
    pub fn take(&mut self, storage: &dyn Storage, max: u64) -> Result<(HostBlock, u64, bool)> {
        let space = self.space(storage)?;
        let first = space.free_from(space.hint);
        let mut count = 0;
        while count < max && !space.is_used(first + count) {
            count += 1;
        }
        if first + count > HostBlock(MOST_BLOCKS) {
            return Err(Error::corrupt("the file has no room for another block"));
        }
        for n in 0..count {
            space.mark(first + n);
        }
        space.hint = first + count;
        let (start, end) = (self.host(first), self.host(first + count));
        let space = self.space(storage)?;
        let fresh = start >= space.fresh;
        space.fresh = space.fresh.max(end);
        Ok((first, count, fresh))
    }

    /// Takes back what [`VdiState::take`] gave.
    pub fn give_back(&mut self, first: HostBlock, count: u64) {
        if let Some(space) = &mut self.space {
            for n in (0..count).rev() {
                space.clear(first + n);
            }
        }
    }

    /// Makes the entry of a guest block say that.
    pub fn set(&mut self, storage: &dyn Storage, block: u64, entry: MapEntry) -> Result<()> {
        let entry = entry.stored()?;
        let at = self.entry_at(block);
        self.map.write(storage, at, &entry.to_le_bytes())
    }

    /// Writes the header's counter of blocks, between two flushes.
    pub fn write_counter(&mut self, storage: &dyn Storage, blocks: u64) -> Result<()> {
        let blocks = u32::try_from(blocks).map_err(|_| Error::corrupt("too many blocks"))?;
        storage.flush().context("Could not flush")?;
        metadata::write(storage, self.map.file(), HEADER, ALLOCATED_AT as u64, &blocks.to_le_bytes())?;
        self.header.set_allocated(blocks);
        self.map.forget();
        storage.flush().context("Could not flush")
    }

    /// Whether so much waits that it should be written now.
    pub fn is_full(&self) -> bool {
        self.map.is_full()
    }

    /// Whether the entries of that many blocks lie in one page of the file with the header's counter: they and it
    /// change in one write.
    pub fn is_beside_header(&self, blocks: u64) -> bool {
        self.entry_at(blocks) <= PAGE as u64
    }

    /// Writes the header at once, between two flushes, and forgets what was derived from the old one.
    pub fn replace_header(&mut self, storage: &dyn Storage, header: VdiHeader) -> Result<()> {
        self.write_tables(storage)?;
        storage.flush().context("Could not flush")?;
        metadata::write(storage, self.map.file(), HEADER, 0, header.bytes())?;
        storage.flush().context("Could not flush")?;
        self.header = header;
        self.map.forget();
        self.space = None;
        Ok(())
    }
}
