//! The blocks of an image, from all its tables.
//!
//! Invariant: they are in the order of the disk and share no sector. Between them there are zeros.

use zerocopy::FromBytes;

use super::layout::{ENTRY_BYTES, Entry, EntryKind, MISH_BYTES, Mish, SECTOR};
use crate::block::{Error, Result};

/// The longest block of a codec, and its longest encoding: it is decoded as a whole.
const LONGEST: u64 = 64 << 20;
/// The largest disk, in sectors: what a file's length can count.
const MOST_SECTORS: u64 = (i64::MAX.unsigned_abs()) / SECTOR;

/// Sectors that are stored in one way. Never [`EntryKind::None`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// The first.
    pub sector: u64,
    /// How many, at least one.
    pub sectors: u64,
    /// How.
    pub kind: EntryKind,
    /// Where in the file.
    pub at: u64,
    /// How many bytes.
    pub len: u64,
}

impl Block {
    /// The sector behind the last one.
    pub fn end(&self) -> u64 {
        self.sector.saturating_add(self.sectors)
    }
}

/// A partition, with what it says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its first sector.
    pub first: u64,
    /// How many it has.
    pub sectors: u64,
    /// The CRC-32 of its content, if it is told.
    pub crc: Option<u32>,
}

/// All that the tables say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Blocks {
    /// The blocks.
    pub all: Vec<Block>,
    /// The partitions, in the order of the tables.
    pub parts: Vec<Part>,
}

impl Blocks {
    /// Takes the tables apart. Offsets count from `data` on.
    pub fn parse(tables: &[Vec<u8>], data: u64) -> Result<Self> {
        let mut blocks = Self::default();
        for (number, table) in tables.iter().enumerate() {
            blocks.take(table, data).map_err(|error| error.context(format!("block table {number}")))?;
        }
        blocks.all.sort_by_key(|block| block.sector);
        for pair in blocks.all.windows(2) {
            if let [one, next] = pair
                && one.end() > next.sector
            {
                return Err(Error::corrupt(format!("two blocks of the dmg hold sector {}", next.sector)));
            }
        }
        Ok(blocks)
    }

    fn take(&mut self, table: &[u8], data: u64) -> Result<()> {
        let (head, entries) = table.split_at_checked(MISH_BYTES).ok_or_else(|| Error::corrupt("it ends too early"))?;
        let mish = Mish::read_from_bytes(head).map_err(|_| Error::corrupt("it ends too early"))?;
        if &mish.magic != b"mish" {
            return Err(Error::corrupt("it does not start with 'mish'"));
        }
        let count = usize::try_from(mish.entries.get()).unwrap_or(usize::MAX);
        if entries.len() / ENTRY_BYTES < count {
            return Err(Error::corrupt(format!("it has not the {count} entries that it tells of")));
        }
        self.parts.push(Part { first: mish.first.get(), sectors: mish.sectors.get(), crc: mish.checksum.crc() });
        for (number, bytes) in entries.chunks_exact(ENTRY_BYTES).take(count).enumerate() {
            let entry = Entry::read_from_bytes(bytes).map_err(|_| Error::corrupt("it ends too early"))?;
            let block = block(&mish, &entry, data).map_err(|error| error.context(format!("entry {number}")))?;
            self.all.extend(block);
        }
        Ok(())
    }

    /// The sector behind the last one.
    pub fn end(&self) -> u64 {
        self.all.last().map_or(0, Block::end)
    }
}

fn block(mish: &Mish, entry: &Entry, data: u64) -> Result<Option<Block>> {
    let kind = EntryKind::of(entry.kind.get())
        .ok_or_else(|| Error::unsupported(format!("its type {:#010x} is not known", entry.kind.get())))?;
    let (sectors, len) = (entry.sectors.get(), entry.len.get());
    if kind == EntryKind::None || sectors == 0 {
        return Ok(None);
    }
    let sector = mish.first.get().checked_add(entry.sector.get());
    let sector = sector.filter(|first| first.checked_add(sectors).is_some_and(|end| end <= MOST_SECTORS));
    let sector = sector.ok_or_else(|| Error::corrupt("it lies past the end of every disk"))?;
    let at = data.checked_add(mish.data_offset.get()).and_then(|at| at.checked_add(entry.at.get()));
    let at = at.filter(|at| at.checked_add(len).is_some_and(|end| end <= i64::MAX.unsigned_abs()));
    let at = at.ok_or_else(|| Error::corrupt("its data lies past the end of every file"))?;
    match kind {
        EntryKind::Packed(_) if sectors > LONGEST / SECTOR || len > LONGEST => {
            Err(Error::unsupported(format!("{sectors} sectors in {len} bytes are more than is decoded at a time")))
        }
        EntryKind::Raw if len < sectors * SECTOR => Err(Error::corrupt("it has more sectors than bytes")),
        _ => Ok(Some(Block { sector, sectors, kind, at, len })),
    }
}
