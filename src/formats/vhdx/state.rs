//! The tables of an open image: BAT, sector bitmaps, headers, and what of the file is in use.

use super::headers::Headers;
use super::layout::{BlockState, ENTRY, MIB};
use super::regions::{Metadata, Region, RegionTable, Shape};
use super::space::{Room, VhdxSpace};
use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::formats::one_file::Tables;
use crate::formats::table::TableCache;
use crate::storage::{Preallocation, Storage, Zeroing};

/// Working set of the BAT: of the usual blocks of 32 MiB, 32 MiB map 128 TiB.
const CACHE: usize = 32 << 20;
/// The most entries that are looked at for one answer.
const STEPS: u64 = 1 << 20;

/// What changes while the image is open.
#[derive(Debug)]
pub struct VhdxState {
    /// The header that counts.
    pub headers: Headers,
    /// What kind of disk it is.
    pub metadata: Metadata,
    /// Where the BAT is.
    pub bat: Region,
    table: TableCache,
    bitmaps: TableCache,
    space: Option<VhdxSpace>,
    /// Blocks that nothing names any more once the BAT is written.
    freed: Vec<u64>,
    /// Whether the headers say that the file has changed.
    marked: bool,
}

impl Tables for VhdxState {
    /// Writes what waits: length of the file, sector bitmaps, BAT, in this order. Then what has become free is.
    fn write_tables(&mut self, storage: &dyn Storage) -> Result<()> {
        if self.table.is_changed() || self.bitmaps.is_changed() {
            if let Some(space) = &self.space {
                let (end, fixed) = (space.top * MIB, storage.facts().fixed_len);
                if !fixed && storage.len().context("Could not get the size of the file")? < end {
                    storage.set_len(end, Preallocation::Off).context("Could not extend the file")?;
                }
            }
            storage.flush().context("Could not flush")?;
            if self.bitmaps.is_changed() {
                self.bitmaps.write_out(storage)?;
                storage.flush().context("Could not flush")?;
            }
            self.table.write_out(storage)?;
        }
        if self.freed.is_empty() { Ok(()) } else { self.release(storage) }
    }
}

impl VhdxState {
    /// Nothing read yet.
    pub fn new(headers: Headers, metadata: Metadata, bat: Region, file: &str) -> Self {
        let table = TableCache::new(CACHE, file, "block allocation table");
        let bitmaps = TableCache::new(CACHE, file, "sector bitmap");
        Self { headers, metadata, bat, table, bitmaps, space: None, freed: Vec::new(), marked: false }
    }

    /// The file's name.
    pub fn file(&self) -> &str {
        self.table.file()
    }

    /// What kind of disk it is.
    pub fn shape(&self) -> Shape {
        self.metadata.shape
    }

    /// Mebibytes of a block.
    pub fn unit(&self) -> u64 {
        self.shape().block / MIB
    }

    /// Where in the file the entry at that index of the BAT is.
    fn place_of(&self, index: u64) -> u64 {
        self.bat.offset.saturating_add(index.saturating_mul(ENTRY))
    }

    /// The entry at that index of the BAT.
    fn entry(&mut self, storage: &dyn Storage, index: u64) -> Result<u64> {
        let mut bytes = [0; ENTRY as usize];
        self.table.read(storage, self.bat.offset + index * ENTRY, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn set_entry(&mut self, storage: &dyn Storage, index: u64, entry: u64) -> Result<()> {
        self.table.write(storage, self.bat.offset + index * ENTRY, &entry.to_le_bytes())
    }

    /// What the BAT says of a payload block, and how many blocks (at most `max`) go on like it: one after the other in
    /// the file, or none of them there. Wrong entries are given as they are.
    pub fn run(&mut self, storage: &dyn Storage, block: u64, max: u64) -> Result<(BlockState, u64)> {
        let (shape, unit) = (self.shape(), self.unit());
        let max = max.min(shape.blocks().saturating_sub(block)).min(STEPS);
        if max == 0 {
            return Err(Error::corrupt(format!("the block allocation table has no block {block}")));
        }
        let chunk = shape.chunk();
        let (mut first, mut count) = (BlockState::NotPresent, 0);
        while count < max {
            let here = block + count;
            let wanted = (max - count).min(chunk - here % chunk);
            let at = self.bat.offset + shape.entry_of(here) * ENTRY;
            let part = self.table.slice(storage, at, usize::try_from(wanted * ENTRY).unwrap_or(usize::MAX))?;
            for entry in part.as_chunks().0.iter().copied().map(u64::from_le_bytes) {
                let state = match BlockState::of(entry) {
                    BlockState::NotPresent if !shape.has_parent => BlockState::Zero,
                    state => state,
                };
                let goes_on = match (first, state) {
                    _ if count == 0 => true,
                    (BlockState::Full(first), BlockState::Full(next)) => next == first + count * unit,
                    (BlockState::Partial(_) | BlockState::Invalid(_), _) => false,
                    (first, next) => first == next,
                };
                if !goes_on {
                    return Ok((first, count));
                }
                if count == 0 {
                    first = state;
                }
                count += 1;
            }
        }
        Ok((first, count))
    }

    /// The same where wrong entries are errors.
    pub fn sound_run(&mut self, storage: &dyn Storage, block: u64, max: u64) -> Result<(BlockState, u64)> {
        let found = self.run(storage, block, max)?;
        let wrong = match found.0 {
            BlockState::Invalid(state) => Some(format!("block {block} is in the unknown state {state}")),
            BlockState::Full(0) | BlockState::Partial(0) => Some(format!("block {block} lies over the header")),
            BlockState::Partial(_) if !self.shape().has_parent => {
                Some(format!("block {block} is partly in a parent that the image does not have"))
            }
            _ => None,
        };
        wrong
            .map_or(Ok(found), |text| Err(Error::corrupt(text).in_file_at(self.place_of(self.shape().entry_of(block)))))
    }

    /// Says what becomes of a payload block.
    pub fn set(&mut self, storage: &dyn Storage, block: u64, state: BlockState) -> Result<()> {
        let index = self.shape().entry_of(block);
        self.set_entry(storage, index, state.entry())
    }

    /// Says that payload blocks read as zeros; the room that they have is free once the BAT is written.
    pub fn zero_blocks(&mut self, storage: &dyn Storage, block: u64, count: u64) -> Result<()> {
        let (mut at, end) = (block, block.saturating_add(count));
        while at < end {
            let (state, run) = self.run(storage, at, end - at)?;
            for n in (0..run).take_while(|_| state != BlockState::Zero) {
                if let BlockState::Full(first) | BlockState::Partial(first) = state {
                    self.freed.push(first + n * self.unit());
                }
                self.set(storage, at + n, BlockState::Zero)?;
            }
            at += run;
        }
        Ok(())
    }

    /// Gives what nothing names any more back to the host, and to who asks for room.
    fn release(&mut self, storage: &dyn Storage) -> Result<()> {
        storage.flush().context("Could not flush")?;
        let unit = self.unit();
        for at in std::mem::take(&mut self.freed) {
            storage.zero(at * MIB, unit * MIB, Zeroing::Punch).context("Could not give back a block")?;
            if let Some(space) = &mut self.space {
                space.clear(at, unit);
            }
        }
        if let Some(space) = &mut self.space
            && !storage.facts().fixed_len
            && storage.len().context("Could not get the size of the file")? > space.top * MIB
        {
            storage.set_len(space.top * MIB, Preallocation::Off).context("Could not shorten the file")?;
            space.was_cut();
        }
        Ok(())
    }

    /// What the BAT says of the sector bitmap block of a payload block's chunk: its mebibyte, if it is there.
    pub fn bitmap(&mut self, storage: &dyn Storage, block: u64) -> Result<Option<u64>> {
        let index = self.shape().bitmap_entry_of(block);
        match BlockState::of(self.entry(storage, index)?) {
            BlockState::Full(0) => {
                let text = format!("the sector bitmap of block {block} lies over the header");
                Err(Error::corrupt(text).in_file_at(self.place_of(index)))
            }
            BlockState::Full(at) => Ok(Some(at)),
            BlockState::NotPresent => Ok(None),
            _ => {
                let text = format!("the sector bitmap of block {block} is in an unknown state");
                Err(Error::corrupt(text).in_file_at(self.place_of(index)))
            }
        }
    }

    /// The same with what is wrong in it: an entry that is there and can not be is `Some(None)`.
    pub fn raw_bitmap(&mut self, storage: &dyn Storage, block: u64) -> Result<Option<Option<u64>>> {
        let index = self.shape().bitmap_entry_of(block);
        Ok(match BlockState::of(self.entry(storage, index)?) {
            BlockState::NotPresent => None,
            BlockState::Full(at) => Some(Some(at)),
            _ => Some(None),
        })
    }

    /// Where the bit of a block's sector is: the byte in the file, and which bit of it, from the lowest.
    fn bit(&mut self, storage: &dyn Storage, block: u64, sector: u64) -> Result<(u64, u64)> {
        let missing = || Error::corrupt(format!("block {block} is partly there, but has no sector bitmap"));
        let at = self.bitmap(storage, block)?.ok_or_else(missing)?;
        let shape = self.shape();
        let bit = block % shape.chunk() * (shape.block / shape.sector) + sector;
        Ok((at * MIB + bit / 8, bit % 8))
    }

    /// Whether the sectors of a partly present block from `sector` on are in this file, and how many (at least one) are
    /// alike.
    pub fn sectors(&mut self, storage: &dyn Storage, block: u64, sector: u64) -> Result<(bool, u64)> {
        let all = (self.shape().block / self.shape().sector).saturating_sub(sector);
        let (at, bit) = self.bit(storage, block, sector)?;
        let part = self.bitmaps.slice(storage, at, usize::try_from(all.div_ceil(8) + 1).unwrap_or(usize::MAX))?;
        let (present, run) = run_of_bits(part, bit);
        Ok((present, run.min(all).max(1)))
    }

    /// Says of sectors of a block whether they are in this file.
    pub fn mark_sectors(
        &mut self,
        storage: &dyn Storage,
        block: u64,
        sectors: std::ops::Range<u64>,
        present: bool,
    ) -> Result<()> {
        let Some(count) = sectors.end.checked_sub(sectors.start).filter(|count| *count > 0) else { return Ok(()) };
        let (at, first) = self.bit(storage, block, sectors.start)?;
        let mut bytes = vec![0; usize::try_from((first + count).div_ceil(8)).unwrap_or(0)];
        self.bitmaps.read(storage, at, &mut bytes)?;
        for bit in first..first + count {
            if let Some(byte) = usize::try_from(bit / 8).ok().and_then(|n| bytes.get_mut(n)) {
                let mask = 1 << (bit % 8);
                *byte = if present { *byte | mask } else { *byte & !mask };
            }
        }
        self.bitmaps.write(storage, at, &bytes)
    }

    /// Makes sure that a payload block's chunk has a sector bitmap, in the file.
    pub fn need_bitmap(&mut self, storage: &dyn Storage, block: u64) -> Result<()> {
        if self.bitmap(storage, block)?.is_some() {
            return Ok(());
        }
        let room = self.space(storage)?.append(1, 1);
        let at = clear(storage, room)?.first;
        let index = self.shape().bitmap_entry_of(block);
        self.set_entry(storage, index, BlockState::Full(at).entry())?;
        // Before any entry of a block that needs it.
        self.write_tables(storage)
    }

    /// What is in use, found out at the first call. An image where that is not clear must not be written to.
    pub fn space(&mut self, storage: &dyn Storage) -> Result<&mut VhdxSpace> {
        if self.space.is_none() {
            self.space = Some(self.scan(storage)?);
        }
        self.space.as_mut().ok_or_else(|| Error::corrupt("no free space"))
    }

    fn scan(&mut self, storage: &dyn Storage) -> Result<VhdxSpace> {
        let length = storage.len().context("Could not get the size of the file")?;
        let mut space = VhdxSpace::new(if storage.facts().new_reads_zero { length } else { u64::MAX });
        let (log, log_length) = self.headers.log();
        let mut fixed = vec![(0, MIB), (log, log_length)];
        fixed.extend(RegionTable::find(storage)?.all()?.iter().map(|region| (region.offset, region.length)));
        for (at, len) in fixed {
            take(&mut space, at / MIB, len / MIB, || "a table".to_owned())?;
        }
        let (shape, unit) = (self.shape(), self.unit());
        let (mut block, mut lowest) = (0, u64::MAX);
        while block < shape.blocks() {
            let (state, count) = self.sound_run(storage, block, shape.blocks() - block)?;
            if let BlockState::Full(at) | BlockState::Partial(at) = state {
                // What lies past the end of the disk need not be there.
                let wanted = (count * shape.block).min(shape.size - block * shape.block);
                if at.saturating_mul(MIB).saturating_add(wanted) > length.next_multiple_of(512) {
                    let text = format!("block {block} lies past the end of the file");
                    return Err(Error::corrupt(text).in_file_at(self.place_of(shape.entry_of(block))));
                }
                take(&mut space, at, count * unit, || format!("block {block}"))?;
                lowest = lowest.min(at);
            }
            if shape.has_parent && block.is_multiple_of(shape.chunk()) {
                if let Some(at) = self.bitmap(storage, block)? {
                    if at.saturating_add(1).saturating_mul(MIB) > length {
                        let text = format!("the sector bitmap of block {block} lies past the end of the file");
                        return Err(Error::corrupt(text).in_file_at(self.place_of(shape.bitmap_entry_of(block))));
                    }
                    take(&mut space, at, 1, || format!("the sector bitmap of block {block}"))?;
                    lowest = lowest.min(at);
                }
                block += count.min(shape.chunk());
            } else if shape.has_parent {
                block += count.min(shape.chunk() - block % shape.chunk());
            } else {
                block += count;
            }
        }
        space.start_at(if lowest == u64::MAX { space.top.max(length.div_ceil(MIB)) } else { lowest });
        Ok(space)
    }

    /// Makes sure, once, before the first change, that the image can be written to without harm, and says in its
    /// header that it is not what it was.
    pub fn prepare(&mut self, storage: &dyn Storage) -> Result<()> {
        if !self.marked {
            self.space(storage)?;
            let table = RegionTable::find(storage)?;
            if RegionTable::read(storage, 1)?.is_none_or(|second| second.bytes() != table.bytes()) {
                // It may name a BAT that has moved since, and is not kept up to date.
                table.write(storage, 1)?;
            }
            self.headers.mark_changed(storage)?;
            self.marked = true;
        }
        Ok(())
    }

    /// Room for blocks one after the other, at most `count`, which reads as zeros: its first mebibyte, and how many.
    pub fn take(&mut self, storage: &dyn Storage, count: u64) -> Result<(u64, u64)> {
        let unit = self.unit();
        let room = self.space(storage)?.take(unit, count);
        let room = clear(storage, room)?;
        Ok((room.first, room.count))
    }

    /// Takes back what [`VhdxState::take`] gave.
    pub fn give_back(&mut self, first: u64, count: u64) {
        let unit = self.unit();
        if let Some(space) = &mut self.space {
            space.clear(first, count * unit);
        }
    }

    /// Whether so much waits that it should be written now.
    pub fn is_full(&self) -> bool {
        self.table.is_full() || self.bitmaps.is_full()
    }

    /// Forgets what was read of the tables, after they were written to by other ways, and what is in use.
    pub fn forget(&mut self) {
        self.table.forget();
        self.bitmaps.forget();
        self.space = None;
    }
}

/// Takes what an image says it uses.
fn take(space: &mut VhdxSpace, at: u64, count: u64, what: impl Fn() -> String) -> Result<()> {
    match space.mark(at, count) {
        Some(true) => Ok(()),
        Some(false) => Err(Error::corrupt(format!("{} of the image overlaps what else is there", what()))),
        None => Err(Error::unsupported(format!("{} lies too far behind to be written to", what()))),
    }
}

/// Makes room read as zeros.
fn clear(storage: &dyn Storage, room: Option<Room>) -> Result<Room> {
    let room = room.ok_or_else(|| Error::unsupported("the file has no room for another block"))?;
    if let Some((start, end)) = room.stale {
        storage.zero(start, end - start, Zeroing::Punch).context("Could not clear a new block")?;
    }
    Ok(room)
}

/// The bit at `start`, counted from the lowest, and how many from it on are like it.
fn run_of_bits(bytes: &[u8], start: u64) -> (bool, u64) {
    let bit = |n: u64| usize::try_from(n / 8).ok().and_then(|i| bytes.get(i)).map(|byte| byte >> (n % 8) & 1 == 1);
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
    fn bits_run_from_the_lowest() {
        assert_eq!(run_of_bits(&[0xff, 0xff, 0x01], 3), (true, 14));
        assert_eq!(run_of_bits(&[0xf0, 0xff], 0), (false, 4));
        assert_eq!(run_of_bits(&[0xf0, 0xff], 4), (true, 12));
        assert_eq!(run_of_bits(&[0x00, 0x80], 2), (false, 13));
        assert_eq!(run_of_bits(&[], 0), (false, 0));
    }
}
