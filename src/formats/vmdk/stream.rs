//! The open end of a stream-optimized extent, which is written front to back, never seeking back.
//!
//! Layout: header and descriptor, then for each grain table's span its compressed grains followed by the table
//! itself, then the grain directory, the footer (the header again, with the directory's place) and the
//! end-of-stream marker; each of these behind a marker. A table is written as soon as a grain of a later one is
//! placed; the tail (directory, footer, end) is written by flush and overwritten by the next grain.
//!
//! Source: *Virtual Disk Format 5.0*, "Stream-Optimized Compressed Sparse Extents".

use std::collections::BTreeMap;

use zerocopy::IntoBytes;

use crate::block::{Error, Result};
use crate::storage::Storage;

use super::layout::*;

/// Tables whose grains are still being written.
#[derive(Debug)]
pub struct Stream {
    /// The sector where the tail starts: everything before it stays.
    pub tail_at: Sectors,
    /// Whether the tail on disk does not say what it should.
    pub dirty: bool,
    open: BTreeMap<u64, Vec<u32>>,
}

impl Stream {
    /// The state of a complete extent: its tail starts with the marker of the grain directory.
    pub fn resume(storage: &dyn Storage, file: &str, gd_at: Sectors) -> Result<Self> {
        let marked = directory_marker(storage, file, gd_at)?.is_some();
        let tail_at = if marked { gd_at.before().unwrap_or_default() } else { gd_at };
        Ok(Self { tail_at, open: BTreeMap::new(), dirty: false })
    }

    /// An entry of a table that is not written yet.
    pub fn entry(&self, table: u64, entry: u64) -> Option<u32> {
        self.open.get(&table)?.get(usize::try_from(entry).ok()?).copied()
    }

    /// Sets an entry of a table that is not written yet.
    pub fn set(&mut self, table: u64, entry: u64, value: u32) {
        let entries = self.open.get_mut(&table);
        if let Some(slot) = entries.and_then(|entries| entries.get_mut(usize::try_from(entry).ok()?)) {
            *slot = value;
        }
    }

    /// Whether a table is not written yet.
    pub fn is_open(&self, table: u64) -> bool {
        self.open.contains_key(&table)
    }

    /// Begins a table.
    pub fn begin(&mut self, table: u64, entries: Vec<u32>) {
        self.open.insert(table, entries);
    }

    /// Takes out the open tables before `until`, to be written.
    pub fn finish(&mut self, until: u64) -> BTreeMap<u64, Vec<u32>> {
        let rest = self.open.split_off(&until);
        std::mem::replace(&mut self.open, rest)
    }
}

/// How many sectors the marker before a grain directory says that this has; `None` where there is no such marker.
pub fn directory_marker(storage: &dyn Storage, file: &str, gd_at: Sectors) -> Result<Option<Sectors>> {
    let Some(before) = gd_at.before() else { return Ok(None) };
    let at = before.checked_bytes().ok_or_else(|| Error::corrupt("The grain directory lies past every end"))?;
    let marker: Marker = read(storage, file, "the marker of the grain directory", at)?;
    let known = marker.bytes.get() == 0 && marker.kind.get() == MARKER_DIRECTORY;
    Ok(known.then_some(marker.sectors.get()))
}

/// Grain directory, footer and end-of-stream marker, to stand at sector `at`.
pub fn tail(header: &SparseHeader, at: Sectors, gd: &[u32]) -> Vec<u8> {
    let mut directory = entry_bytes(gd);
    directory.resize(directory.len().next_multiple_of(512), 0);
    let sectors = Sectors::holding(directory.len() as u64);
    let footer = SparseHeader { gd_at: (at + Sectors(1)).into(), ..*header };
    let mut bytes = Marker::new(MARKER_DIRECTORY, sectors).as_bytes().to_vec();
    bytes.extend_from_slice(&directory);
    bytes.extend_from_slice(Marker::new(MARKER_FOOTER, Sectors(1)).as_bytes());
    bytes.extend_from_slice(footer.as_bytes());
    bytes.extend_from_slice(Marker::new(MARKER_END, Sectors(0)).as_bytes());
    bytes
}
