//! The open end of a stream-optimized extent: written front to back, never seeking back.
//!
//! Layout: header and descriptor, then for each grain table's span its compressed grains followed by the table
//! itself, then the grain directory, the footer (the header again, with the directory's place) and the
//! end-of-stream marker; each of these behind a marker. A table is written as soon as a grain of a later one is
//! placed; the tail (directory, footer, end) is written by flush and overwritten by the next grain.
//!
//! Source: *Virtual Disk Format 5.0*, "Stream-Optimized Compressed Sparse Extents".

use std::collections::BTreeMap;

use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::storage::{Preallocation, Storage};

use super::layout::*;
use super::sparse::{Sparse, State, entry_bytes, sector32};

/// Tables whose grains are still being written.
#[derive(Debug)]
pub struct Stream {
    /// The sector where the tail starts: everything before it stays.
    pub tail_at: u64,
    open: BTreeMap<u64, Vec<u32>>,
    dirty: bool,
}

impl SparseHeader {
    /// Whether the header at the start of the file sends us to the footer.
    pub fn parse_at_end(storage: &dyn Storage) -> Result<bool> {
        let mut head = [0; Self::SIZE];
        storage.read_at(0, &mut head).context("Could not read the header")?;
        Ok(Self::parse(&head).is_some_and(|header| header.gd_at == GD_AT_END))
    }
}

impl Stream {
    /// The state of a complete extent: its tail starts with the marker of the grain directory.
    pub fn resume(storage: &dyn Storage, gd_at: u64) -> Result<Self> {
        let mut marker = [0; 512];
        let before = gd_at.saturating_sub(1);
        let at = before.checked_mul(SECTOR).ok_or_else(|| Error::corrupt("The grain directory lies past every end"))?;
        storage.read_at(at, &mut marker).context("Could not read a marker")?;
        let is_marker = marker[8..16] == Marker::GrainDirectory.to_bytes(0)[8..16];
        Ok(Self { tail_at: if is_marker { before } else { gd_at }, open: BTreeMap::new(), dirty: false })
    }

    /// An entry of a table that is not written yet.
    pub fn entry(&self, table: u64, entry: u64) -> Option<u32> {
        self.open.get(&table)?.get(usize::try_from(entry).ok()?).copied()
    }

    /// Whether a table is not written yet.
    pub fn is_open(&self, table: u64) -> bool {
        self.open.contains_key(&table)
    }
}

impl State {
    /// Room for an encoded grain; its table is opened, and those before it are written.
    pub fn place_encoded(&mut self, extent: &Sparse, grain: u64, bytes: u64) -> Result<u64> {
        let (table, entry) = (grain / extent.shape.gtes, grain % extent.shape.gtes);
        let is_open = self.stream.as_ref().is_some_and(|stream| stream.is_open(table));
        if !is_open {
            let mut entries = Vec::new();
            for grain in table * extent.shape.gtes..(table + 1) * extent.shape.gtes {
                entries.push(match self.grain(extent, grain)? {
                    super::sparse::Grain::At(sector) => sector32(sector)?,
                    _ => 0,
                });
            }
            self.write_open(extent, table)?;
            if let Some(stream) = &mut self.stream {
                stream.open.insert(table, entries);
            }
        }
        let sector = self.next;
        self.next += bytes.div_ceil(SECTOR);
        let value = sector32(sector)?;
        if let Some(stream) = &mut self.stream {
            stream.dirty = true;
            let slot = stream.open.get_mut(&table).and_then(|entries| entries.get_mut(usize::try_from(entry).ok()?));
            if let Some(slot) = slot {
                *slot = value;
            }
        }
        Ok(sector)
    }

    /// Takes a grain back that will not be written.
    pub fn forget(&mut self, extent: &Sparse, grain: u64) {
        let (table, entry) = (grain / extent.shape.gtes, grain % extent.shape.gtes);
        let entries = self.stream.as_mut().and_then(|stream| stream.open.get_mut(&table));
        if let Some(slot) = entries.and_then(|entries| entries.get_mut(usize::try_from(entry).ok()?)) {
            *slot = 0;
        }
    }

    /// Writes the open tables before `until`, each behind its marker.
    fn write_open(&mut self, extent: &Sparse, until: u64) -> Result<()> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        let rest = stream.open.split_off(&until);
        let done = std::mem::replace(&mut stream.open, rest);
        for (table, entries) in done {
            let sectors = extent.shape.table_sectors();
            let mut bytes = Marker::GrainTable.to_bytes(sectors).to_vec();
            bytes.extend_from_slice(&entry_bytes(&entries));
            extent.storage.write_at(self.next * SECTOR, &bytes).context("Could not write a grain table")?;
            let slot = usize::try_from(table).ok().and_then(|i| self.gd.get_mut(i));
            *slot.ok_or_else(|| Error::corrupt("grain beyond the directory"))? = sector32(self.next + 1)?;
            self.next += 1 + sectors;
        }
        Ok(())
    }

    /// Writes the open tables and the tail, and cuts the file there.
    pub fn write_tail(&mut self, extent: &Sparse) -> Result<()> {
        if !self.stream.as_ref().is_some_and(|stream| stream.dirty) {
            return Ok(());
        }
        let Some(header) = self.header else { return Ok(()) };
        self.write_open(extent, u64::MAX)?;
        let tail = tail(&header, self.next, &self.gd)?;
        let at = self.next * SECTOR;
        extent.storage.write_at(at, &tail).context("Could not write the footer")?;
        extent.storage.set_len(at + tail.len() as u64, Preallocation::Off).context("Could not set the length")?;
        if let Some(stream) = &mut self.stream {
            stream.tail_at = self.next;
            stream.dirty = false;
        }
        Ok(())
    }
}

/// Grain directory, footer and end-of-stream marker, to stand at sector `at`.
pub fn tail(header: &SparseHeader, at: u64, gd: &[u32]) -> Result<Vec<u8>> {
    let mut directory = entry_bytes(gd);
    directory.resize(directory.len().next_multiple_of(512), 0);
    let sectors = directory.len() as u64 / SECTOR;
    let footer = SparseHeader { gd_at: at + 1, ..*header };
    let mut bytes = Marker::GrainDirectory.to_bytes(sectors).to_vec();
    bytes.extend_from_slice(&directory);
    bytes.extend_from_slice(&Marker::Footer.to_bytes(1));
    bytes.extend_from_slice(&footer.to_bytes());
    bytes.extend_from_slice(&Marker::EndOfStream.to_bytes(0));
    Ok(bytes)
}
