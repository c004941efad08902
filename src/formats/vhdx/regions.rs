//! The region tables and the metadata: where everything is, and what kind of disk it is ([MS-VHDX], sections 2.2.3, 2.6).

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use zerocopy::{FromBytes, IntoBytes};

use super::headers::Headers;
use super::layout::{
    BAT, BITMAP_SECTORS, ENTRY, FILE_PARAMETERS, Guid, HAS_PARENT, IS_REQUIRED, IS_USER, LEAVE_BLOCKS_ALLOCATED,
    LOGICAL_SECTOR, MAX_BLOCK, MAX_SIZE, METADATA, MIB, MIN_BLOCK, MOST_ENTRIES, MetadataEntry, MetadataTableHeader,
    PARENT_LOCATOR, PHYSICAL_SECTOR, REGION_TABLES, RegionEntry, RegionTableHeader, TABLE, VIRTUAL_DISK_ID,
    VIRTUAL_DISK_SIZE, is_sound, seal,
};
use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::formats::runs::{ByteRun, Runs};
use crate::storage::Storage;

/// A region: where it is, and its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Where it starts.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
}

impl Region {
    /// Start and end.
    pub fn run(self) -> ByteRun {
        (self.offset, self.offset.saturating_add(self.length))
    }
}

/// A region table, whole.
#[derive(Debug, Clone)]
pub struct RegionTable {
    bytes: Vec<u8>,
}

impl RegionTable {
    /// Of a new file.
    pub fn new(regions: &[(Guid, Region)]) -> Self {
        let mut bytes = vec![0; TABLE];
        let header = RegionTableHeader {
            signature: *b"regi",
            checksum: 0.into(),
            count: u32::try_from(regions.len()).unwrap_or(0).into(),
            reserved: 0.into(),
        };
        bytes[..size_of::<RegionTableHeader>()].copy_from_slice(header.as_bytes());
        let mut table = Self { bytes };
        for (n, (guid, region)) in regions.iter().enumerate() {
            table.put(n, *guid, *region);
        }
        table
    }

    fn put(&mut self, n: usize, guid: Guid, region: Region) {
        let length = u32::try_from(region.length).unwrap_or(u32::MAX).into();
        let entry = RegionEntry { guid, offset: region.offset.into(), length, required: 1.into() };
        let at = size_of::<RegionTableHeader>() + n * size_of::<RegionEntry>();
        self.bytes[at..at + size_of::<RegionEntry>()].copy_from_slice(entry.as_bytes());
        seal(&mut self.bytes);
    }

    /// All of it, as it is written.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// One of the two, if it is whole.
    pub fn read(storage: &dyn Storage, which: usize) -> Result<Option<Self>> {
        let mut bytes = vec![0; TABLE];
        storage.read_at(REGION_TABLES[which], &mut bytes).context("Could not read the VHDX region table")?;
        Ok((bytes.starts_with(b"regi") && is_sound(&bytes)).then_some(Self { bytes }))
    }

    /// The first that is whole.
    pub fn find(storage: &dyn Storage) -> Result<Self> {
        let none = || Error::corrupt("No valid VHDX region table found").in_file_at(REGION_TABLES[0]);
        match Self::read(storage, 0)? {
            Some(table) => Ok(table),
            None => Self::read(storage, 1)?.ok_or_else(none),
        }
    }

    /// Writes it as one of the two, between two flushes.
    pub fn write(&self, storage: &dyn Storage, which: usize) -> Result<()> {
        storage.flush().context("Could not flush")?;
        storage.write_at(REGION_TABLES[which], &self.bytes).context("Could not write the VHDX region table")?;
        storage.flush().context("Could not flush")
    }

    fn entries(&self) -> Result<Vec<RegionEntry>> {
        let (header, rest) =
            RegionTableHeader::read_from_prefix(&self.bytes).map_err(|_| Error::corrupt("no region table"))?;
        let count = usize::try_from(header.count.get()).unwrap_or(usize::MAX);
        let entries = <[RegionEntry]>::ref_from_bytes(&rest[..rest.len() / 32 * 32]).unwrap_or_default();
        let found = entries.get(..count).filter(|_| count <= MOST_ENTRIES);
        found.map(<[_]>::to_vec).ok_or_else(|| Error::corrupt(format!("region table with {count} entries")))
    }

    /// The BAT and the metadata.
    pub fn regions(&self, headers: &Headers) -> Result<(Region, Region)> {
        let (mut known, mut runs) = (HashMap::new(), Runs::default());
        runs.add(0, MIB);
        let (log, log_length) = headers.log();
        runs.add(log, log_length);
        for entry in self.entries()? {
            let region = Region { offset: entry.offset.get(), length: entry.length.get().into() };
            let guid = entry.guid;
            let whole = region.offset.is_multiple_of(MIB) && region.length.is_multiple_of(MIB);
            if !whole || region.offset < MIB || region.length == 0 {
                let (offset, length) = (region.offset, region.length);
                return Err(Error::corrupt(format!("region {guid} of {length} bytes at {offset}")));
            }
            if guid != BAT && guid != METADATA && entry.required.get() & 1 != 0 {
                return Err(Error::unsupported(format!("unknown region {guid}, which has to be known")));
            }
            runs.add(region.offset, region.length);
            if known.insert(guid.0, region).is_some() {
                return Err(Error::corrupt(format!("two regions {guid}")));
            }
        }
        if runs.disjoint().is_none() {
            return Err(Error::corrupt("header, log and regions of the image overlap"));
        }
        let find = |guid: Guid, what: &str| {
            known.get(&guid.0).copied().ok_or_else(|| Error::corrupt(format!("the image has no {what} region")))
        };
        Ok((find(BAT, "BAT")?, find(METADATA, "metadata")?))
    }

    /// Every region there is, known or not.
    pub fn all(&self) -> Result<Vec<Region>> {
        let region = |entry: &RegionEntry| Region { offset: entry.offset.get(), length: entry.length.get().into() };
        Ok(self.entries()?.iter().map(region).collect())
    }

    /// Names another place for the BAT.
    pub fn move_bat(&mut self, to: Region) -> Result<()> {
        let index = self.entries()?.iter().position(|entry| entry.guid == BAT);
        self.put(index.ok_or_else(|| Error::corrupt("the image has no BAT region"))?, BAT, to);
        Ok(())
    }
}

/// Where a metadata item is in the file, and its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Item {
    /// Where it starts.
    pub at: u64,
    length: u64,
}

/// What the metadata tells.
#[derive(Debug, Clone, Copy)]
pub struct Metadata {
    /// What kind of disk it is.
    pub shape: Shape,
    /// Where its size stands.
    pub size: Item,
    /// Where its parent is told.
    pub locator: Option<Item>,
}

/// What kind of disk it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The virtual size in bytes.
    pub size: u64,
    /// Bytes of a payload block.
    pub block: u64,
    /// Bytes of a logical sector.
    pub sector: u64,
    /// All blocks are there, and stay.
    pub fixed: bool,
    /// What is not there is the parent's.
    pub has_parent: bool,
}

impl Shape {
    /// Payload blocks whose bits are in one sector bitmap block (section 2.4).
    pub fn chunk(&self) -> u64 {
        (BITMAP_SECTORS * self.sector / self.block).max(1)
    }

    /// Payload blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(self.block)
    }

    /// Where the entry of a payload block is in the BAT, counted in entries: behind those of every chunk is one for
    /// the chunk's sector bitmap.
    pub fn entry_of(&self, block: u64) -> u64 {
        block + block / self.chunk()
    }

    /// The same for the sector bitmap of the block's chunk.
    pub fn bitmap_entry_of(&self, block: u64) -> u64 {
        let chunk = block / self.chunk();
        (chunk + 1) * self.chunk() + chunk
    }

    /// Entries that the BAT needs (section 2.5).
    pub fn entries(&self) -> u64 {
        match self.blocks().checked_sub(1) {
            None => 0,
            Some(last) if self.has_parent => self.bitmap_entry_of(last) + 1,
            Some(last) => self.entry_of(last) + 1,
        }
    }

    /// Bytes of a region that holds them.
    pub fn bat_bytes(&self) -> u64 {
        (self.entries() * ENTRY).next_multiple_of(MIB).max(MIB)
    }
}

impl Metadata {
    /// Reads what the region says.
    pub fn read(storage: &dyn Storage, region: Region) -> Result<Self> {
        let reading = "Could not read the VHDX metadata";
        let mut bytes = vec![0; TABLE];
        storage.read_at(region.offset, &mut bytes).context(reading)?;
        let items = items(&bytes, region)?;
        let find = |guid: Guid| items.get(&guid.0).copied();
        let need = |guid: Guid, length: u64, what: &str| -> Result<(Item, [u8; 8])> {
            let missing = || Error::corrupt(format!("the metadata of the image has no {what}"));
            let item = find(guid).filter(|item| item.length >= length).ok_or_else(missing)?;
            let mut value = [0; 8];
            storage.read_at(item.at, &mut value[..usize::try_from(length).unwrap_or(8)]).context(reading)?;
            Ok((item, value))
        };
        let (parameters_item, parameters) = need(FILE_PARAMETERS, 8, "file parameters")?;
        let (size_item, size) = need(VIRTUAL_DISK_SIZE, 8, "virtual disk size")?;
        let (sector_item, sector) = need(LOGICAL_SECTOR, 4, "logical sector size")?;
        let parameters = u64::from_le_bytes(parameters);
        let flags = u32::try_from(parameters >> 32).unwrap_or(0);
        let has_parent = flags & HAS_PARENT != 0;
        let shape = Shape {
            size: u64::from_le_bytes(size),
            block: parameters & u64::from(u32::MAX),
            sector: u64::from_le_bytes(sector),
            fixed: flags & LEAVE_BLOCKS_ALLOCATED != 0 && !has_parent,
            has_parent,
        };
        let Shape { size, block, sector, .. } = shape;
        if !matches!(sector, 512 | 4096) {
            let error = Error::unsupported(format!("logical sectors of {sector} bytes"));
            return Err(error.in_file_at(sector_item.at));
        }
        if !block.is_power_of_two() || !(MIN_BLOCK..=MAX_BLOCK).contains(&block) {
            return Err(Error::corrupt(format!("blocks of {block} bytes")).in_file_at(parameters_item.at));
        }
        if size > MAX_SIZE {
            let error = Error::unsupported(format!("a disk of {size} bytes is too large; max of 64TB"));
            return Err(error.in_file_at(size_item.at));
        }
        if !size.is_multiple_of(sector) {
            let error = Error::corrupt(format!("a disk of {size} bytes has no whole number of sectors"));
            return Err(error.in_file_at(size_item.at));
        }
        let locator = find(PARENT_LOCATOR);
        if has_parent && locator.is_none() {
            return Err(Error::corrupt("a differencing disk without a parent locator"));
        }
        Ok(Self { shape, size: size_item, locator: locator.filter(|_| has_parent) })
    }
}

/// Where the items are. What is not known and has to be is refused.
fn items(bytes: &[u8], region: Region) -> Result<HashMap<[u8; 16], Item>> {
    let no_table = || Error::corrupt("no VHDX metadata table").in_file_at(region.offset);
    let (header, rest) = MetadataTableHeader::read_from_prefix(bytes).map_err(|_| no_table())?;
    let count = usize::from(header.count.get());
    if &header.signature != b"metadata" || count > MOST_ENTRIES {
        return Err(no_table());
    }
    let entries = <[MetadataEntry]>::ref_from_bytes(&rest[..rest.len() / 32 * 32]).unwrap_or_default();
    let mut items = HashMap::new();
    const KNOWN: [Guid; 6] =
        [FILE_PARAMETERS, VIRTUAL_DISK_SIZE, VIRTUAL_DISK_ID, LOGICAL_SECTOR, PHYSICAL_SECTOR, PARENT_LOCATOR];
    for entry in entries.iter().take(count) {
        let (item, flags) = (entry.item, entry.flags.get());
        let (offset, length) = (u64::from(entry.offset.get()), u64::from(entry.length.get()));
        let known = flags & IS_USER == 0 && KNOWN.contains(&item);
        if !known && flags & IS_REQUIRED != 0 {
            return Err(Error::unsupported(format!("unknown metadata {item}, which has to be known")));
        }
        if !known {
            continue;
        }
        if offset < TABLE as u64 || length > MIB || offset + length > region.length {
            return Err(Error::corrupt(format!("metadata {item} of {length} bytes at {offset}")));
        }
        match items.entry(item.0) {
            Entry::Occupied(_) => return Err(Error::corrupt(format!("metadata {item} is there twice"))),
            Entry::Vacant(place) => place.insert(Item { at: region.offset + offset, length }),
        };
    }
    Ok(items)
}

impl Item {
    /// All of it.
    pub fn bytes(self, storage: &dyn Storage) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(self.length.min(MIB)).unwrap_or(0)];
        storage.read_at(self.at, &mut bytes).context("Could not read the VHDX metadata")?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmap_entries_stand_between_chunks() {
        let shape = Shape { size: 10 << 40, block: 32 << 20, sector: 512, fixed: false, has_parent: false };
        assert_eq!((shape.chunk(), shape.blocks()), (128, 327_680));
        assert_eq!([0, 127, 128, 256].map(|n| shape.entry_of(n)), [0, 127, 129, 258]);
        assert_eq!([0, 127, 128].map(|n| shape.bitmap_entry_of(n)), [128, 128, 257]);
        assert_eq!(shape.entries(), 327_680 + 2559);
        assert_eq!(shape.bat_bytes(), 3 << 20);
        let child = Shape { has_parent: true, size: 5 << 20, ..shape };
        assert_eq!((child.entries(), child.blocks()), (129, 1));
        assert_eq!(Shape { size: 0, ..child }.entries(), 0);
        let wide = Shape { block: 256 << 20, sector: 4096, ..shape };
        assert_eq!(wide.chunk(), 128);
    }
}
