//! Grain directory and grain tables of a sparse extent, read when they are needed and written in runs.
//!
//! Invariants: an entry of a grain table on disk points at a grain that was written before it; both directories
//! always say the same. Tables are kept in memory up to [`MAX_CACHED_ENTRIES`].
//!
//! Source: *Virtual Disk Format 5.0*, "Grain Directory", "Grain Table".

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::block::error::{Context, Operation, Place};
use crate::block::{Error, FileEnd, Result, metadata};
use crate::storage::Storage;

use super::layout::*;
use super::stream::Stream;

/// Entries of cached tables: 8 MiB of memory, 128 GiB of guest disk.
const MAX_CACHED_ENTRIES: usize = 1 << 20;

/// What a grain table says of a grain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grain {
    /// Nothing: ask the parent.
    Unallocated,
    /// Zeros.
    Zeroed,
    /// It starts at that sector of the file.
    At(Sectors),
}

/// What does not change while an extent is open.
#[derive(Debug, Clone, Copy)]
pub struct GrainShape {
    /// Bytes in a grain.
    pub grain: u64,
    /// Entries in a grain table.
    pub gtes: u64,
    /// Whether an entry of 1 is a zeroed grain.
    pub zeroed: bool,
    /// Whether grains are compressed.
    pub compressed: bool,
    /// Whether compressed grains carry a marker with their length.
    pub markers: bool,
}

impl GrainShape {
    /// Sectors of a grain table.
    pub fn table_sectors(&self) -> Sectors {
        Sectors::holding(self.gtes * 4)
    }

    /// Sectors of a grain.
    pub fn grain_sectors(&self) -> Sectors {
        Sectors::within(self.grain)
    }

    /// Guest bytes behind one table.
    pub fn span(&self) -> u64 {
        self.grain * self.gtes
    }

    /// What an entry says.
    pub fn grain_of(&self, entry: u32) -> Grain {
        match entry {
            0 => Grain::Unallocated,
            GTE_ZEROED if self.zeroed => Grain::Zeroed,
            at => Grain::At(at.into()),
        }
    }
}

/// The file of a sparse extent. Does not change while it is open.
#[derive(Debug)]
pub struct ExtentFile {
    /// Its name, for messages.
    pub name: String,
    /// Its bytes.
    pub storage: Arc<dyn Storage>,
    /// How it is laid out.
    pub shape: GrainShape,
}

impl ExtentFile {
    /// Writes a part of what is called `what`.
    pub fn write(&self, what: &'static str, at: u64, bytes: &[u8]) -> Result<()> {
        metadata::write(&*self.storage, &self.name, what, at, bytes)
    }
}

/// The tables, and where the next grain goes.
#[derive(Debug)]
pub struct VmdkState {
    /// The length of the guest's disk, as the header has it.
    pub capacity: Sectors,
    /// The header, where it is a hosted one.
    pub header: Option<SparseHeader>,
    /// The first sectors of the grain tables, 0 where there is none.
    pub gd: Vec<u32>,
    /// The same of the redundant directory, if there is one.
    pub rgd: Option<Vec<u32>>,
    /// Where the next grain goes.
    pub next: Sectors,
    /// The open end of a stream-optimized extent.
    pub stream: Option<Stream>,
    /// Whether all that the tables named was found to lie in the file.
    pub whole: bool,
    tables: BTreeMap<u64, CachedTable>,
    directory_dirty: bool,
}

#[derive(Debug)]
struct CachedTable {
    entries: Vec<u32>,
    dirty: bool,
}

/// `entries` 32-bit numbers from `at`; the number of entries is capped by the caller.
pub fn read_entries(storage: &dyn Storage, file: &str, what: &'static str, at: u64, entries: u64) -> Result<Vec<u32>> {
    let entries = usize::try_from(entries).map_err(|_| Error::corrupt("table too long"))?;
    let mut bytes = vec![0; entries * 4];
    metadata::read(storage, file, what, at, &mut bytes)?;
    Ok(bytes.as_chunks().0.iter().map(|entry| u32::from_le_bytes(*entry)).collect())
}

impl VmdkState {
    /// The state of an extent that was just opened.
    pub fn new(capacity: Sectors, gd: Vec<u32>, next: Sectors) -> Self {
        Self {
            capacity,
            header: None,
            gd,
            rgd: None,
            next,
            stream: None,
            whole: false,
            tables: BTreeMap::new(),
            directory_dirty: false,
        }
    }

    /// Where a table is; 0 where there is none.
    fn table_sector(&self, table: u64) -> Sectors {
        usize::try_from(table).ok().and_then(|i| self.gd.get(i)).copied().unwrap_or(0).into()
    }

    /// What the tables say of grain `grain` (counted from the extent's start).
    pub fn grain(&mut self, extent: &ExtentFile, grain: u64) -> Result<Grain> {
        let (table, entry) = (grain / extent.shape.gtes, grain % extent.shape.gtes);
        if let Some(open) = self.stream.as_ref().and_then(|stream| stream.entry(table, entry)) {
            return Ok(extent.shape.grain_of(open));
        }
        if self.table_sector(table) == Sectors(0) && !self.tables.contains_key(&table) {
            return Ok(Grain::Unallocated);
        }
        let entries = &self.load(extent, table)?.entries;
        let entry = usize::try_from(entry).ok().and_then(|i| entries.get(i)).copied().unwrap_or(0);
        Ok(extent.shape.grain_of(entry))
    }

    fn load(&mut self, extent: &ExtentFile, table: u64) -> Result<&mut CachedTable> {
        if !self.tables.contains_key(&table) {
            if self.tables.len() as u64 * extent.shape.gtes >= MAX_CACHED_ENTRIES as u64 {
                self.write_tables(extent)?;
                self.tables.clear();
            }
            let at = self.table_sector(table).bytes();
            let entries = match at {
                0 => vec![0; usize::try_from(extent.shape.gtes).unwrap_or(0)],
                at => {
                    FileEnd::default().require(&*extent.storage, "a grain table", at, extent.shape.gtes * 4)?;
                    read_entries(&*extent.storage, &extent.name, "a grain table", at, extent.shape.gtes)?
                }
            };
            self.tables.insert(table, CachedTable { entries, dirty: false });
        }
        self.tables.get_mut(&table).ok_or_else(|| Error::corrupt("grain table lost"))
    }

    /// How many tables from `first` on (at most `max`) say nothing at all, as far as is seen without reading
    /// them: there is none, or it lies in a hole of the file.
    pub fn empty_tables(&self, extent: &ExtentFile, first: u64, max: u64) -> Result<u64> {
        let bytes = extent.shape.table_sectors().bytes();
        let mut empty = 0;
        let mut hole_end = 0;
        while empty < max {
            let table = first + empty;
            if self.tables.contains_key(&table) || self.stream.as_ref().is_some_and(|s| s.is_open(table)) {
                break;
            }
            let Some(sector) = usize::try_from(table).ok().and_then(|i| self.gd.get(i)).copied() else {
                // Past the directory there is nothing, however long that is.
                return Ok(max);
            };
            if sector != 0 {
                let at = Sectors::from(sector).bytes();
                if at < hole_end.min(u64::MAX - bytes) && at + bytes <= hole_end {
                    empty += 1;
                    continue;
                }
                let host = extent
                    .storage
                    .extent(at, u64::MAX / 2 - at)
                    .at(|| Place::of_table(Operation::Status, &extent.name, "a grain table", at))?;
                if !host.is_zero() || host.len < bytes {
                    break;
                }
                hole_end = at + host.len;
            }
            empty += 1;
        }
        Ok(empty)
    }

    /// The entries of a table, to be changed.
    pub fn change(&mut self, extent: &ExtentFile, grain: u64, value: u32) -> Result<()> {
        let (table, entry) = (grain / extent.shape.gtes, grain % extent.shape.gtes);
        let table = self.load(extent, table)?;
        if let Some(slot) = usize::try_from(entry).ok().and_then(|i| table.entries.get_mut(i)) {
            *slot = value;
            table.dirty = true;
        }
        Ok(())
    }

    /// Makes sure that the table of a grain has its place in the file, and the same in the redundant directory.
    pub fn ensure_table(&mut self, extent: &ExtentFile, grain: u64) -> Result<()> {
        let table = grain / extent.shape.gtes;
        if self.table_sector(table) != Sectors(0) {
            return Ok(());
        }
        let index = usize::try_from(table).map_err(|_| Error::corrupt("grain beyond the directory"))?;
        let sectors = extent.shape.table_sectors();
        let mut put = |directory: &mut Vec<u32>| -> Result<()> {
            let slot = directory.get_mut(index).ok_or_else(|| Error::corrupt("grain beyond the directory"))?;
            *slot = sector32(self.next)?;
            self.next += sectors;
            Ok(())
        };
        put(&mut self.gd)?;
        if let Some(rgd) = &mut self.rgd {
            put(rgd)?;
        }
        self.directory_dirty = true;
        self.load(extent, table)?.dirty = true;
        Ok(())
    }

    /// Forgets what was read, after the tables were written by other ways.
    pub fn forget_tables(&mut self) {
        self.tables.clear();
    }

    /// Writes dirty tables, in runs that are contiguous in the file, then dirty directories.
    pub fn write_tables(&mut self, extent: &ExtentFile) -> Result<()> {
        let dirty: Vec<u64> = self.tables.iter().filter(|(_, t)| t.dirty).map(|(i, _)| *i).collect();
        if dirty.is_empty() && !self.directory_dirty {
            return Ok(());
        }
        let table_bytes = extent.shape.table_sectors().bytes();
        for directory in [Some(&self.gd), self.rgd.as_ref()].into_iter().flatten() {
            let mut run: Option<(u64, Vec<u8>)> = None;
            for index in &dirty {
                let Some(table) = self.tables.get(index) else { continue };
                let place = usize::try_from(*index).ok().and_then(|i| directory.get(i)).copied().unwrap_or(0);
                if place == 0 {
                    continue;
                }
                let at = Sectors::from(place).bytes();
                let mut bytes = entry_bytes(&table.entries);
                bytes.resize(usize::try_from(table_bytes).unwrap_or(bytes.len()), 0);
                match &mut run {
                    Some((start, run)) if *start + run.len() as u64 == at && run.len() < 1 << 20 => {
                        run.append(&mut bytes)
                    }
                    _ => {
                        write_run(extent, run.take())?;
                        run = Some((at, bytes));
                    }
                }
            }
            write_run(extent, run)?;
        }
        if self.directory_dirty
            && let Some(header) = self.header
        {
            write_run(extent, Some((header.gd_at.get().bytes(), entry_bytes(&self.gd))))?;
            if let Some(rgd) = &self.rgd {
                let (at, bytes) = (header.rgd_at.get().bytes(), entry_bytes(rgd));
                let length = extent.storage.len().with_context(|| format!("{}: no length", extent.name))?;
                // To write there would be to make the file as long as a damaged header says.
                if at.checked_add(bytes.len() as u64).is_none_or(|end| end > length) {
                    let what = "the redundant grain directory lies past the end of the file";
                    return Err(Error::corrupt(format!("{}: {what}", extent.name)));
                }
                write_run(extent, Some((at, bytes)))?;
            }
            self.directory_dirty = false;
        }
        for table in self.tables.values_mut() {
            table.dirty = false;
        }
        Ok(())
    }
}

fn write_run(extent: &ExtentFile, run: Option<(u64, Vec<u8>)>) -> Result<()> {
    match run {
        Some((at, bytes)) => extent.write("grain tables", at, &bytes),
        None => Ok(()),
    }
}
