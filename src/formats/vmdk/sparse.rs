//! A sparse extent: grains behind a grain directory and grain tables (`KDMV` and `COWD`).
//!
//! Invariants: an entry of a grain table on disk points at a grain that was written before it; both directories
//! always say the same. Tables are kept in memory up to [`MAX_CACHED_ENTRIES`] and written in runs.
//!
//! Lock order: `state` alone; metadata is read and written under it, guest data never.
//!
//! Source: *Virtual Disk Format 5.0*, "Hosted Sparse Extents", "ESXi Host Sparse Extents".

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use byteorder::{ByteOrder, LittleEndian as LE};

use crate::block::error::Context;
use crate::block::{Error, FileEnd, Result};
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
    At(u64),
}

/// What does not change while an extent is open.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
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

impl Shape {
    /// Sectors of a grain table.
    pub fn table_sectors(&self) -> u64 {
        (self.gtes * 4).div_ceil(SECTOR)
    }

    /// Sectors of a grain.
    pub fn grain_sectors(&self) -> u64 {
        self.grain / SECTOR
    }

    /// Guest bytes behind one table.
    pub fn span(&self) -> u64 {
        self.grain * self.gtes
    }

    fn grain_of(&self, entry: u32) -> Grain {
        match entry {
            0 => Grain::Unallocated,
            GTE_ZEROED if self.zeroed => Grain::Zeroed,
            at => Grain::At(at.into()),
        }
    }
}

/// One sparse extent.
#[derive(Debug)]
pub struct Sparse {
    /// Its file.
    pub storage: Arc<dyn Storage>,
    /// Its shape.
    pub shape: Shape,
    /// Whether it is a hosted one.
    pub hosted: bool,
    state: Mutex<State>,
}

/// The tables, and where the next grain goes.
#[derive(Debug)]
pub struct State {
    /// Sectors of the guest's disk, as the header has it.
    pub capacity: u64,
    /// The header, where it is a hosted one.
    pub header: Option<SparseHeader>,
    /// Sectors of the grain tables, 0 where there is none.
    pub gd: Vec<u32>,
    /// The same of the redundant directory, if there is one.
    pub rgd: Option<Vec<u32>>,
    /// The sector of the next grain.
    pub next: u64,
    /// The open end of a stream-optimized extent.
    pub stream: Option<Stream>,
    tables: BTreeMap<u64, Table>,
    directory_dirty: bool,
}

#[derive(Debug)]
struct Table {
    entries: Vec<u32>,
    dirty: bool,
}

impl Sparse {
    /// Reads the header and the directories.
    pub fn open(storage: Arc<dyn Storage>, head: &[u8]) -> Result<Self> {
        if head.starts_with(COWD_MAGIC) {
            let header = CowdHeader::parse(head).ok_or_else(|| Error::corrupt("Truncated COWD header"))?;
            Self::open_cowd(storage, header)
        } else if head.starts_with(MAGIC) {
            let header = SparseHeader::parse(head).ok_or_else(|| Error::corrupt("Truncated VMDK header"))?;
            Self::open_hosted(storage, header)
        } else {
            Err(Error::corrupt("Image not in VMDK format"))
        }
    }

    fn open_hosted(storage: Arc<dyn Storage>, header: SparseHeader) -> Result<Self> {
        let length = storage.len().context("Could not get the length of the extent")?;
        let mut header = header;
        if header.gd_at == GD_AT_END {
            // The footer is the last but one sector; the last is the end-of-stream marker.
            let mut footer = [0; SparseHeader::SIZE];
            let at =
                length.checked_sub(2 * SECTOR).ok_or_else(|| Error::corrupt("No footer: the file is too short"))?;
            storage.read_at(at, &mut footer).context("Could not read the footer")?;
            let found = SparseHeader::parse(&footer).filter(|_| footer.starts_with(MAGIC));
            let footer = found.filter(|footer| footer.gd_at != GD_AT_END).ok_or_else(|| {
                // The file was cut off, or never completely written.
                Error::corrupt("Invalid footer")
            })?;
            header = SparseHeader { gd_at: footer.gd_at, ..header };
        }
        if header.version > 3 {
            return Err(Error::unsupported(format!("Unsupported VMDK version {}", header.version)));
        }
        if header.gtes == 0 || header.grain_sectors == 0 || header.grain_sectors > u64::from(u32::MAX) {
            return Err(Error::corrupt("L1 entry size is invalid"));
        }
        if header.gtes > HOSTED_GTES {
            return Err(Error::corrupt("L2 table size too big"));
        }
        check_grain(header.grain_sectors)?;
        if header.compression > COMPRESSION_DEFLATE {
            return Err(Error::unsupported(format!("Unknown compression algorithm {}", header.compression)));
        }
        let least = header.overhead.saturating_mul(SECTOR);
        if length < least && !storage.facts().fixed_len {
            return Err(Error::corrupt(format!("File truncated, expecting at least {least} bytes")));
        }
        let shape = Shape {
            grain: header.grain_sectors * SECTOR,
            gtes: header.gtes.into(),
            zeroed: header.flags & FLAG_ZERO_GRAIN != 0,
            compressed: header.compressed(),
            markers: header.flags & FLAG_MARKERS != 0,
        };
        let tables = header.capacity.div_ceil(header.grain_sectors * shape.gtes);
        let gd = read_directory(&*storage, header.gd_at, tables)?;
        let redundant = header.flags & FLAG_REDUNDANT != 0 && header.rgd_at != 0;
        let rgd = if redundant { Some(read_directory(&*storage, header.rgd_at, tables)?) } else { None };
        let stream = if shape.compressed && SparseHeader::parse_at_end(&*storage)? {
            Some(Stream::resume(&*storage, header.gd_at)?)
        } else {
            None
        };
        let next = match &stream {
            Some(stream) => stream.tail_at,
            None => {
                let end = length.div_ceil(SECTOR);
                let end = if shape.compressed { end } else { end.next_multiple_of(header.grain_sectors) };
                end.max(header.overhead.min(length.div_ceil(SECTOR)))
            }
        };
        let (capacity, tables) = (header.capacity, BTreeMap::new());
        let state = State { capacity, header: Some(header), gd, rgd, next, stream, tables, directory_dirty: false };
        Ok(Self { storage, shape, hosted: true, state: Mutex::new(state) })
    }

    fn open_cowd(storage: Arc<dyn Storage>, header: CowdHeader) -> Result<Self> {
        check_grain(header.grain_sectors.into())?;
        let shape = Shape {
            grain: u64::from(header.grain_sectors) * SECTOR,
            gtes: COWD_GTES.into(),
            zeroed: false,
            compressed: false,
            markers: false,
        };
        let tables = u64::from(header.capacity).div_ceil(u64::from(header.grain_sectors) * shape.gtes);
        let gd = read_directory(&*storage, header.gd_at.into(), tables.min(header.gd_entries.into()))?;
        let end = storage.len().context("Could not get the length of the extent")?.div_ceil(SECTOR);
        let state = State {
            capacity: header.capacity.into(),
            header: None,
            gd,
            rgd: None,
            next: end,
            stream: None,
            tables: BTreeMap::new(),
            directory_dirty: false,
        };
        Ok(Self { storage, shape, hosted: false, state: Mutex::new(state) })
    }

    /// Entries of all directories.
    pub fn directory_entries(&self) -> u64 {
        let state = self.state();
        (state.gd.len() + state.rgd.as_ref().map_or(0, Vec::len)) as u64
    }

    /// The tables, for the caller alone.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// What is at `at` (bytes from the extent's start) and for how many bytes that goes on, at most `max`.
    /// A run of [`Grain::At`] is contiguous in the file.
    pub fn map(&self, at: u64, max: u64) -> Result<(Grain, u64)> {
        let (grain, span) = (self.shape.grain, self.shape.span());
        let mut state = self.state();
        let first = state.grain(self, at / grain)?;
        let mut end = (at / grain + 1) * grain;
        while end - at < max {
            if matches!(first, Grain::Unallocated) && end.is_multiple_of(span) {
                let empty = state.empty_tables(self, end / span, (max - (end - at)).div_ceil(span))?;
                if empty > 0 {
                    end += empty * span;
                    continue;
                }
            }
            // An error is for those who ask for what comes next.
            let Ok(next) = state.grain(self, end / grain) else { break };
            let goes_on = match (first, next) {
                (Grain::At(a), Grain::At(b)) => {
                    !self.shape.compressed && a + (end / grain - at / grain) * self.shape.grain_sectors() == b
                }
                (a, b) => a == b,
            };
            if !goes_on || (self.shape.compressed && matches!(first, Grain::At(_))) {
                break;
            }
            end += grain;
        }
        Ok((first, (end - at).min(max)))
    }

    /// Writes out what is dirty: tables, then directories.
    pub fn flush(&self) -> Result<()> {
        let mut state = self.state();
        state.write_tables(self)?;
        if state.stream.is_some() {
            state.write_tail(self)?;
        }
        Ok(())
    }
}

fn check_grain(sectors: u64) -> Result<()> {
    if sectors == 0 || !sectors.is_power_of_two() || sectors > MAX_GRAIN_SECTORS {
        return Err(Error::corrupt(format!("Invalid granularity, image may be corrupt: {sectors} sectors a grain")));
    }
    Ok(())
}

fn read_directory(storage: &dyn Storage, sector: u64, entries: u64) -> Result<Vec<u32>> {
    if entries > MAX_TABLES {
        return Err(Error::corrupt("L1 size too big"));
    }
    let at = sector.checked_mul(SECTOR).ok_or_else(|| Error::corrupt("The grain directory lies past every end"))?;
    read_entries(storage, at, entries).context("Could not read the grain directory")
}

/// `entries` 32-bit numbers from `at`; the number of entries is capped by the caller.
fn read_entries(storage: &dyn Storage, at: u64, entries: u64) -> Result<Vec<u32>> {
    let entries = usize::try_from(entries).map_err(|_| Error::corrupt("table too long"))?;
    let mut bytes = vec![0; entries * 4];
    storage.read_at(at, &mut bytes).context("read error")?;
    let mut table = vec![0; entries];
    LE::read_u32_into(&bytes, &mut table);
    Ok(table)
}

/// The bytes of a table.
pub fn entry_bytes(entries: &[u32]) -> Vec<u8> {
    let mut bytes = vec![0; entries.len() * 4];
    LE::write_u32_into(entries, &mut bytes);
    bytes
}

impl State {
    fn table_sector(&self, table: u64) -> u32 {
        usize::try_from(table).ok().and_then(|i| self.gd.get(i)).copied().unwrap_or(0)
    }

    /// What the tables say of grain `grain` (counted from the extent's start).
    pub fn grain(&mut self, extent: &Sparse, grain: u64) -> Result<Grain> {
        let (table, entry) = (grain / extent.shape.gtes, grain % extent.shape.gtes);
        if let Some(open) = self.stream.as_ref().and_then(|stream| stream.entry(table, entry)) {
            return Ok(extent.shape.grain_of(open));
        }
        if self.table_sector(table) == 0 && !self.tables.contains_key(&table) {
            return Ok(Grain::Unallocated);
        }
        let entries = &self.load(extent, table)?.entries;
        let entry = usize::try_from(entry).ok().and_then(|i| entries.get(i)).copied().unwrap_or(0);
        Ok(extent.shape.grain_of(entry))
    }

    fn load(&mut self, extent: &Sparse, table: u64) -> Result<&mut Table> {
        if !self.tables.contains_key(&table) {
            if self.tables.len() as u64 * extent.shape.gtes >= MAX_CACHED_ENTRIES as u64 {
                self.write_tables(extent)?;
                self.tables.clear();
            }
            let at = u64::from(self.table_sector(table)) * SECTOR;
            let entries = match at {
                0 => vec![0; usize::try_from(extent.shape.gtes).unwrap_or(0)],
                at => {
                    FileEnd::default().require(&*extent.storage, "a grain table", at, extent.shape.gtes * 4)?;
                    read_entries(&*extent.storage, at, extent.shape.gtes).context("Could not read a grain table")?
                }
            };
            self.tables.insert(table, Table { entries, dirty: false });
        }
        self.tables.get_mut(&table).ok_or_else(|| Error::corrupt("grain table lost"))
    }

    /// How many tables from `first` on (at most `max`) say nothing at all, as far as is seen without reading
    /// them: there is none, or it lies in a hole of the file.
    pub fn empty_tables(&self, extent: &Sparse, first: u64, max: u64) -> Result<u64> {
        let sectors = extent.shape.table_sectors();
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
                let at = u64::from(sector) * SECTOR;
                let bytes = sectors * SECTOR;
                if at < hole_end.min(u64::MAX - bytes) && at + bytes <= hole_end {
                    empty += 1;
                    continue;
                }
                let host = extent.storage.extent(at, u64::MAX / 2 - at).context("Could not read a grain table")?;
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
    pub fn change(&mut self, extent: &Sparse, grain: u64, value: u32) -> Result<()> {
        let (table, entry) = (grain / extent.shape.gtes, grain % extent.shape.gtes);
        let table = self.load(extent, table)?;
        if let Some(slot) = usize::try_from(entry).ok().and_then(|i| table.entries.get_mut(i)) {
            *slot = value;
            table.dirty = true;
        }
        Ok(())
    }

    /// Makes sure that the table of a grain has its place in the file, and the same in the redundant directory.
    pub fn ensure_table(&mut self, extent: &Sparse, grain: u64) -> Result<()> {
        let table = grain / extent.shape.gtes;
        if self.table_sector(table) != 0 {
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

    /// Writes dirty tables, in runs that are contiguous in the file, then dirty directories.
    pub fn write_tables(&mut self, extent: &Sparse) -> Result<()> {
        let dirty: Vec<u64> = self.tables.iter().filter(|(_, t)| t.dirty).map(|(i, _)| *i).collect();
        if dirty.is_empty() && !self.directory_dirty {
            return Ok(());
        }
        let sectors = extent.shape.table_sectors();
        for directory in [Some(&self.gd), self.rgd.as_ref()].into_iter().flatten() {
            let mut run: Option<(u64, Vec<u8>)> = None;
            for index in &dirty {
                let Some(table) = self.tables.get(index) else { continue };
                let place = usize::try_from(*index).ok().and_then(|i| directory.get(i)).copied().unwrap_or(0);
                if place == 0 {
                    continue;
                }
                let at = u64::from(place) * SECTOR;
                let mut bytes = entry_bytes(&table.entries);
                bytes.resize(usize::try_from(sectors * SECTOR).unwrap_or(bytes.len()), 0);
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
            write_run(extent, Some((header.gd_at * SECTOR, entry_bytes(&self.gd))))?;
            if let Some(rgd) = &self.rgd {
                write_run(extent, Some((header.rgd_at * SECTOR, entry_bytes(rgd))))?;
            }
            self.directory_dirty = false;
        }
        for table in self.tables.values_mut() {
            table.dirty = false;
        }
        Ok(())
    }
}

fn write_run(extent: &Sparse, run: Option<(u64, Vec<u8>)>) -> Result<()> {
    match run {
        Some((at, bytes)) => extent.storage.write_at(at, &bytes).context("Could not write grain tables"),
        None => Ok(()),
    }
}

/// A sector number as tables hold it.
pub fn sector32(sector: u64) -> Result<u32> {
    u32::try_from(sector)
        .map_err(|_| Error::unsupported("The extent is full: a sparse VMDK file cannot be larger than 2 TiB"))
}
