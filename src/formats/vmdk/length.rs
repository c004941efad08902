//! A sparse extent gets longer or shorter.
//!
//! One write, of the header, changes the length; all before it is unseen, and all after it is beyond the end or can be
//! missing. See `resize.rs` for the whole order.

use zerocopy::IntoBytes;

use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::codec::deflate::How;
use crate::storage::{Preallocation, Zeroing};

use super::grain;
use super::layout::*;
use super::sparse::Sparse;
use super::stream::tail;
use super::tables::{ExtentFile, Grain, VmdkState};

impl Sparse {
    /// Makes the extent `len` bytes long; what is new reads as nothing, or, up to `covered`, as zeros.
    pub fn grow(&self, len: u64, covered: u64) -> Result<()> {
        let mut guard = self.state();
        let state = &mut *guard;
        let Some(header) = state.header else { return Err(Error::unsupported("not a hosted sparse extent")) };
        // Whatever somebody left behind the end.
        let old_len = state.capacity.bytes();
        clear_beyond(self, state, old_len)?;
        if self.shape.compressed && state.stream.is_none() {
            complete_last(self, state, old_len)?;
        }
        let tables = usize::try_from(len.div_ceil(self.shape.span())).unwrap_or(usize::MAX);
        if state.stream.is_some() {
            return grow_stream(self, state, &header, len, tables);
        }
        let covered = covered.min(len);
        let longer = if tables > state.gd.len() {
            let new = Directories::new(self, state, &header, tables)?;
            new.write(self)?;
            Some(new)
        } else {
            None
        };
        if covered <= old_len {
            put_capacity(self, state, len, longer.as_ref())?;
            state.adopt(longer);
            return Ok(());
        }
        if longer.is_some() {
            // Directories that are longer than the extent needs are none the worse.
            put_capacity(self, state, old_len, longer.as_ref())?;
            state.adopt(longer);
        }
        hide_backing(self, state, old_len, covered)?;
        put_capacity(self, state, len, None)
    }

    /// Makes the extent `len` bytes long. What lies beyond is cleared, so that growing again shows zeros.
    pub fn shrink(&self, len: u64) -> Result<()> {
        let mut state = self.state();
        if self.shape.compressed {
            return Err(Error::unsupported("a stream-optimized image cannot shrink; convert it"));
        }
        put_capacity(self, &mut state, len, None)?;
        self.storage.flush().with_context(|| format!("{}: could not flush", self.name))?;
        clear_beyond(self, &mut state, len)
    }
}

impl VmdkState {
    fn adopt(&mut self, new: Option<Directories>) {
        if let Some(new) = new {
            (self.gd, self.rgd, self.next) = (new.gd, new.rgd, new.end);
        }
    }
}

/// Makes the grains from `from` to `to`, which are unallocated and have tables, read as zeros.
fn hide_backing(file: &ExtentFile, state: &mut VmdkState, from: u64, to: u64) -> Result<()> {
    let (shape, failed) = (file.shape, || format!("{}: could not write zeros", file.name));
    let (mut grain, end) = (from.div_ceil(shape.grain), to.div_ceil(shape.grain));
    while grain < end {
        let count = (end - grain).min(shape.gtes - grain % shape.gtes);
        state.ensure_table(file, grain)?;
        let first = state.next;
        if !shape.zeroed {
            state.next += shape.grain_sectors() * count;
            sector32(state.next)?;
            let (at, end) = (first.bytes(), state.next.bytes());
            file.storage
                .zero(at, end - at, Zeroing::Punch)
                .and_then(|()| file.storage.set_len(end, Preallocation::Off))
                .with_context(failed)?;
        }
        for n in 0..count {
            let entry = if shape.zeroed { GTE_ZEROED } else { sector32(first + shape.grain_sectors() * n)? };
            state.change(file, grain + n, entry)?;
        }
        grain += count;
    }
    file.storage.flush().with_context(failed)?;
    state.write_tables(file)?;
    file.storage.flush().with_context(failed)
}

/// Writes the header's sector with the new length, and the directories' new places if they moved.
fn put_capacity(file: &ExtentFile, state: &mut VmdkState, len: u64, moved: Option<&Directories>) -> Result<()> {
    let Some(mut header) = state.header else { return Err(Error::unsupported("not a hosted sparse extent")) };
    header.capacity = Sectors::within(len).into();
    if let Some(moved) = moved {
        (header.gd_at, header.rgd_at) = (moved.gd_at.into(), moved.rgd_at.into());
    }
    let mut first = header;
    if state.stream.is_some() {
        first.gd_at = GD_AT_END.into();
    }
    file.write("the header", 0, first.as_bytes())?;
    state.capacity = Sectors::within(len);
    state.header = Some(header);
    Ok(())
}

/// A second tail behind the first, then the header, then the tail in its place: at every moment the last two sectors
/// of the file are a footer and an end that hold.
fn grow_stream(file: &ExtentFile, state: &mut VmdkState, old: &SparseHeader, len: u64, tables: usize) -> Result<()> {
    state.gd.resize(tables, 0);
    let new = SparseHeader { capacity: Sectors::within(len).into(), ..*old };
    let first = state.next;
    let failed = || format!("{}: could not write the footer", file.name);
    let end = Sectors::holding(file.storage.len().with_context(failed)?);
    let size = tail(&new, Sectors(0), &state.gd).len() as u64;
    let behind = end.max(first + Sectors::holding(size));
    let directory = state.gd.clone();
    let put = |at: Sectors| -> Result<u64> {
        let tail = tail(&new, at, &directory);
        file.write("the grain directory and the footer", at.bytes(), &tail)?;
        file.storage.flush().with_context(failed)?;
        Ok(at.bytes() + tail.len() as u64)
    };
    put(behind)?;
    put_capacity(file, state, len, None)?;
    let end = put(first)?;
    file.storage.set_len(end, Preallocation::Off).with_context(failed)
}

/// Directories with more tables, and their places: at the end of the file new tables, and behind them both
/// directories. The old ones stay what they are until the header points at the new.
struct Directories {
    gd: Vec<u32>,
    rgd: Option<Vec<u32>>,
    gd_at: Sectors,
    rgd_at: Sectors,
    /// Where the new tables start.
    start: Sectors,
    /// Where all that ends.
    end: Sectors,
}

impl Directories {
    fn new(file: &ExtentFile, state: &VmdkState, header: &SparseHeader, tables: usize) -> Result<Self> {
        let table_sectors = file.shape.table_sectors();
        let gd_sectors = Sectors::holding(tables as u64 * 4);
        let copies = if state.rgd.is_some() { 2 } else { 1 };
        let start = state.next;
        let added = (tables - state.gd.len()) as u64;
        let directory = |old: &[u32], at: Sectors| -> Result<Vec<u32>> {
            let mut new = old.to_vec();
            for table in 0..added {
                new.push(sector32(at + table_sectors * table)?);
            }
            Ok(new)
        };
        let gd = directory(&state.gd, start)?;
        let rgd = match &state.rgd {
            Some(rgd) => Some(directory(rgd, start + table_sectors * added)?),
            None => None,
        };
        let gd_at = start + table_sectors * (copies * added);
        let rgd_at = if rgd.is_some() { gd_at + gd_sectors } else { header.rgd_at.get() };
        let end = (gd_at + gd_sectors * copies).next_multiple_of(file.shape.grain_sectors());
        sector32(end)?;
        Ok(Self { gd, rgd, gd_at, rgd_at, start, end })
    }

    /// Makes room, and writes both.
    fn write(&self, file: &ExtentFile) -> Result<()> {
        let storage = &file.storage;
        let (at, end) = (self.start.bytes(), self.end.bytes());
        storage
            .zero(at, end - at, Zeroing::Punch)
            .and_then(|()| storage.set_len(end, Preallocation::Off))
            .with_context(|| format!("{}: failed to resize underlying file", file.name))?;
        let failed = || format!("{}: could not write the grain directory", file.name);
        for (directory, at) in [(Some(&self.gd), self.gd_at), (self.rgd.as_ref(), self.rgd_at)] {
            if let Some(directory) = directory {
                file.write("the grain directory", at.bytes(), &entry_bytes(directory))?;
            }
        }
        storage.flush().with_context(failed)
    }
}

/// Stores the grain that the end cuts again, as a whole, if it is not. What was stored stays where it is.
fn complete_last(file: &ExtentFile, state: &mut VmdkState, len: u64) -> Result<()> {
    let Some(plain) = grain::short_last(file, state, len)? else { return Ok(()) };
    let (index, mut encoded) = (len / file.shape.grain, Vec::new());
    grain::encode(file.shape.grain_sectors() * index, &plain, How::VMDK, &mut encoded)?;
    let (at, sectors) = (state.next, Sectors::holding(encoded.len() as u64));
    let value = sector32(at)?;
    file.storage
        .write_at(at.bytes(), &encoded)
        .and_then(|()| file.storage.flush())
        .with_context(|| format!("{}: could not write the last grain", file.name))?;
    state.next += sectors;
    state.change(file, index, value)?;
    state.write_tables(file)
}

/// Makes all grains from `len` on unallocated, and the rest of the grain that `len` cuts zero. Compressed grains are
/// never written over: their rest is cut off where they are read.
fn clear_beyond(file: &ExtentFile, state: &mut VmdkState, len: u64) -> Result<()> {
    let shape = file.shape;
    if shape.compressed {
        return Ok(());
    }
    let (skip, failed) = (len % shape.grain, || format!("{}: could not clear what lies beyond the end", file.name));
    if skip != 0
        && let Grain::At(sector) = state.grain(file, len / shape.grain)?
    {
        file.storage.zero(sector.bytes() + skip, shape.grain - skip, Zeroing::Punch).with_context(failed)?;
    }
    let last = state.gd.len() as u64 * shape.gtes;
    let mut grain = len.div_ceil(shape.grain);
    while grain < last {
        if grain.is_multiple_of(shape.gtes) {
            let empty = state.empty_tables(file, grain / shape.gtes, (last - grain) / shape.gtes)?;
            if empty > 0 {
                grain += empty * shape.gtes;
                continue;
            }
        }
        match state.grain(file, grain)? {
            Grain::Unallocated => {}
            Grain::Zeroed => state.change(file, grain, 0)?,
            Grain::At(sector) => {
                file.storage.discard(sector.bytes(), shape.grain).with_context(failed)?;
                state.change(file, grain, 0)?;
            }
        }
        grain += 1;
    }
    state.write_tables(file)
}
