//! A sparse extent: grains behind a grain directory and grain tables (`KDMV` and `COWD`).
//!
//! Which header rules is decided once, when the extent is opened: that of the footer, where there is one and it
//! holds, else the one at the start of the file.
//!
//! Lock order: `state` alone; metadata is read and written under it, guest data never.
//!
//! Source: *Virtual Disk Format 5.0*, "Hosted Sparse Extents", "ESXi Host Sparse Extents",
//! "Stream-Optimized Compressed Sparse Extents".

use std::mem::offset_of;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard};

use zerocopy::{FromBytes, IntoBytes};

use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::storage::{Preallocation, Storage};

use super::layout::*;
use super::stream::{Stream, directory_marker, tail};
use super::tables::{ExtentFile, Grain, GrainShape, VmdkState, read_entries};

/// One sparse extent.
#[derive(Debug)]
pub struct Sparse {
    file: ExtentFile,
    /// Whether it is a hosted one.
    pub hosted: bool,
    state: Mutex<VmdkState>,
}

impl Deref for Sparse {
    type Target = ExtentFile;

    fn deref(&self) -> &ExtentFile {
        &self.file
    }
}

impl Sparse {
    /// Reads the header and the directories of the file that begins with `head`.
    pub fn open(name: &str, storage: Arc<dyn Storage>, head: &[u8]) -> Result<Self> {
        if head.starts_with(COWD_MAGIC) {
            let (header, _) =
                CowdHeader::read_from_prefix(head).map_err(|_| Error::corrupt("Truncated COWD header"))?;
            Self::open_cowd(name, storage, header)
        } else if head.starts_with(MAGIC) {
            let header = SparseHeader::parse(head).ok_or_else(|| Error::corrupt("Truncated VMDK header"))?;
            Self::open_hosted(name, storage, header)
        } else {
            Err(Error::corrupt("Image not in VMDK format").in_field(offset_of!(SparseHeader, magic)))
        }
    }

    fn open_hosted(name: &str, storage: Arc<dyn Storage>, first: SparseHeader) -> Result<Self> {
        let length = storage.len().context("Could not get the length of the extent")?;
        let streamed = first.gd_at.get() == GD_AT_END || is_stream(&*storage, name, length, &first)?;
        let (header, at) = if streamed { ruling(&*storage, name, length, first)? } else { (first, 0) };
        check(&header, at)?;
        let (grain_sectors, overhead) = (header.grain_sectors.get(), header.overhead.get());
        let least = overhead.bytes();
        if length < least && !storage.facts().fixed_len {
            let error = Error::corrupt(format!("File truncated, expecting at least {least} bytes"));
            return Err(error.in_file_at(at + offset_of!(SparseHeader, overhead) as u64));
        }
        let shape = GrainShape {
            grain: grain_sectors.bytes(),
            gtes: header.gtes.get().into(),
            zeroed: header.has(FLAG_ZERO_GRAIN),
            compressed: header.compressed(),
            markers: header.has(FLAG_MARKERS),
        };
        let tables = tables_of(&header);
        let gd = read_directory(&*storage, name, header.gd_at.get(), tables)?;
        let redundant = header.has(FLAG_REDUNDANT) && header.rgd_at.get() != Sectors(0);
        let rgd = if redundant { Some(read_directory(&*storage, name, header.rgd_at.get(), tables)?) } else { None };
        let stream = if shape.compressed && streamed {
            Some(Stream::resume(&*storage, name, header.gd_at.get())?)
        } else {
            None
        };
        let next = match &stream {
            Some(stream) => stream.tail_at,
            None => {
                let end = Sectors::holding(length);
                let end = if shape.compressed { end } else { end.next_multiple_of(grain_sectors) };
                end.max(overhead.min(Sectors::holding(length)))
            }
        };
        let mut state = VmdkState::new(header.capacity.get(), gd, next);
        (state.header, state.rgd, state.stream) = (Some(header), rgd, stream);
        let file = ExtentFile { name: name.to_owned(), storage, shape };
        Ok(Self { file, hosted: true, state: Mutex::new(state) })
    }

    fn open_cowd(name: &str, storage: Arc<dyn Storage>, header: CowdHeader) -> Result<Self> {
        let grain_sectors = Sectors::from(header.grain_sectors.get());
        check_grain(grain_sectors)?;
        let shape = GrainShape {
            grain: grain_sectors.bytes(),
            gtes: COWD_GTES.into(),
            zeroed: false,
            compressed: false,
            markers: false,
        };
        let capacity = Sectors::from(header.capacity.get());
        let tables = capacity.0.div_ceil((grain_sectors * shape.gtes).0).min(header.gd_entries.get().into());
        let gd = read_directory(&*storage, name, header.gd_at.get().into(), tables)?;
        let end = Sectors::holding(storage.len().context("Could not get the length of the extent")?);
        let file = ExtentFile { name: name.to_owned(), storage, shape };
        Ok(Self { file, hosted: false, state: Mutex::new(VmdkState::new(capacity, gd, end)) })
    }

    /// Entries of all directories.
    pub fn directory_entries(&self) -> u64 {
        let state = self.state();
        (state.gd.len() + state.rgd.as_ref().map_or(0, Vec::len)) as u64
    }

    /// The tables, for the caller alone.
    pub fn state(&self) -> MutexGuard<'_, VmdkState> {
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
                    !self.shape.compressed && a + self.shape.grain_sectors() * (end / grain - at / grain) == b
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
        state.write_tail(self)
    }
}

/// Refuses numbers that cannot be, in the header that is at that byte of the file.
fn check(header: &SparseHeader, at: u64) -> Result<()> {
    let wrong = |error: Error, field: usize| Err(error.in_file_at(at + field as u64));
    let (version, grain_sectors, gtes) = (header.version.get(), header.grain_sectors.get(), header.gtes.get());
    if version > 3 {
        let error = Error::unsupported(format!("Unsupported VMDK version {version}"));
        return wrong(error, offset_of!(SparseHeader, version));
    }
    if gtes == 0 || grain_sectors == Sectors(0) || grain_sectors > Sectors::from(u32::MAX) {
        let field = if gtes == 0 { offset_of!(SparseHeader, gtes) } else { offset_of!(SparseHeader, grain_sectors) };
        return wrong(Error::corrupt("L1 entry size is invalid"), field);
    }
    if gtes > HOSTED_GTES {
        return wrong(Error::corrupt("L2 table size too big"), offset_of!(SparseHeader, gtes));
    }
    check_grain(grain_sectors).or_else(|error| wrong(error, offset_of!(SparseHeader, grain_sectors)))?;
    if header.compression.get() > COMPRESSION_DEFLATE {
        let error = Error::unsupported(format!("Unknown compression algorithm {}", header.compression.get()));
        return wrong(error, offset_of!(SparseHeader, compression));
    }
    Ok(())
}

fn check_grain(sectors: Sectors) -> Result<()> {
    if !sectors.0.is_power_of_two() || sectors > MAX_GRAIN_SECTORS {
        return Err(Error::corrupt(format!("Invalid granularity, image may be corrupt: {sectors} sectors a grain")));
    }
    Ok(())
}

/// Grain tables of an extent whose header was checked.
fn tables_of(header: &SparseHeader) -> u64 {
    header.capacity.get().0.div_ceil((header.grain_sectors.get() * u64::from(header.gtes.get())).0)
}

/// The header of an extent whose first header says that its directory is found through the footer: all fields are
/// the footer's, because what was not known when the stream began is only there. Where the footer is the damaged one
/// of the two, it is the first header with the footer's directory. With it comes where it is in the file.
fn ruling(storage: &dyn Storage, file: &str, length: u64, first: SparseHeader) -> Result<(SparseHeader, u64)> {
    // The footer is the last but one sector; the last is the end-of-stream marker.
    let at = length.checked_sub(2 * SECTOR).ok_or_else(|| Error::corrupt("No footer: the file is too short"))?;
    let footer: SparseHeader = read(storage, file, "the footer", at)?;
    if footer.magic != *MAGIC || footer.gd_at.get() == GD_AT_END {
        // The file was cut off, or never completely written.
        return Err(Error::corrupt("Invalid footer").in_file_at(at));
    }
    let repaired = SparseHeader { gd_at: footer.gd_at, ..first };
    for (header, place) in [(footer, at), (repaired, 0)] {
        if holds(storage, file, at, &header)? {
            return Ok((header, place));
        }
    }
    Ok((footer, at))
}

/// Whether a file is a stream though its header places the directory elsewhere: it ends as one does, with a footer that
/// holds and names the directory before it.
fn is_stream(storage: &dyn Storage, file: &str, length: u64, first: &SparseHeader) -> Result<bool> {
    let (true, Some(at)) = (first.compressed() || first.has(FLAG_MARKERS), length.checked_sub(3 * SECTOR)) else {
        return Ok(false);
    };
    let before: Marker = read(storage, file, "the marker of the footer", at)?;
    if before.kind.get() != MARKER_FOOTER || before.bytes.get() != 0 {
        return Ok(false);
    }
    let footer: SparseHeader = read(storage, file, "the footer", at + SECTOR)?;
    let gd_at = footer.gd_at.get();
    let sound = footer.magic == *MAGIC && gd_at != GD_AT_END && gd_at != first.gd_at.get();
    let sound = sound && footer.compressed() && holds(storage, file, at + SECTOR, &footer)?;
    Ok(sound && directory_marker(storage, file, gd_at)?.is_some())
}

/// Whether a header can be that of a stream whose footer is at `end`.
fn holds(storage: &dyn Storage, file: &str, end: u64, header: &SparseHeader) -> Result<bool> {
    if check(header, end).is_err() || header.compressed() != header.has(FLAG_COMPRESSED) {
        return Ok(false);
    }
    let tables = tables_of(header);
    if tables > MAX_TABLES {
        return Ok(false);
    }
    let bytes = tables * 4;
    let fits = |sector: Sectors, bytes: u64| {
        sector.checked_bytes().and_then(|at| at.checked_add(bytes)).is_some_and(|last| last <= end)
    };
    let inside =
        fits(header.gd_at.get(), bytes) && fits(header.overhead.get(), 0) && fits(header.descriptor_at.get(), 0);
    // The marker before the directory knows how long this is.
    let told = if inside { directory_marker(storage, file, header.gd_at.get())? } else { None };
    Ok(inside && told.is_none_or(|sectors| sectors == Sectors::holding(bytes)))
}

/// So many entries of a grain directory at that sector.
pub fn read_directory(storage: &dyn Storage, file: &str, sector: Sectors, entries: u64) -> Result<Vec<u32>> {
    if entries > MAX_TABLES {
        return Err(Error::corrupt("L1 size too big"));
    }
    let at = sector.checked_bytes().ok_or_else(|| Error::corrupt("The grain directory lies past every end"))?;
    read_entries(storage, file, "the grain directory", at, entries)
}

impl VmdkState {
    /// Room for an encoded grain; its table is opened, and those before it are written.
    pub fn place_encoded(&mut self, extent: &ExtentFile, grain: u64, bytes: u64) -> Result<Sectors> {
        let (table, entry) = (grain / extent.shape.gtes, grain % extent.shape.gtes);
        let is_open = self.stream.as_ref().is_some_and(|stream| stream.is_open(table));
        if !is_open {
            let mut entries = Vec::new();
            for grain in table * extent.shape.gtes..(table + 1) * extent.shape.gtes {
                entries.push(match self.grain(extent, grain)? {
                    Grain::At(sector) => sector32(sector)?,
                    _ => 0,
                });
            }
            self.write_open(extent, table)?;
            if let Some(stream) = &mut self.stream {
                stream.begin(table, entries);
            }
        }
        let sector = self.next;
        self.next += Sectors::holding(bytes);
        let value = sector32(sector)?;
        if let Some(stream) = &mut self.stream {
            stream.dirty = true;
            stream.set(table, entry, value);
        }
        Ok(sector)
    }

    /// Takes a grain back that will not be written.
    pub fn forget(&mut self, extent: &ExtentFile, grain: u64) {
        if let Some(stream) = &mut self.stream {
            stream.set(grain / extent.shape.gtes, grain % extent.shape.gtes, 0);
        }
    }

    /// Writes the open tables before `until`, each behind its marker.
    fn write_open(&mut self, extent: &ExtentFile, until: u64) -> Result<()> {
        let Some(stream) = &mut self.stream else { return Ok(()) };
        for (table, entries) in stream.finish(until) {
            let sectors = extent.shape.table_sectors();
            let mut bytes = Marker::new(MARKER_TABLE, sectors).as_bytes().to_vec();
            bytes.extend_from_slice(&entry_bytes(&entries));
            extent.write("a grain table", self.next.bytes(), &bytes)?;
            let slot = usize::try_from(table).ok().and_then(|i| self.gd.get_mut(i));
            *slot.ok_or_else(|| Error::corrupt("grain beyond the directory"))? = sector32(self.next + Sectors(1))?;
            self.next += Sectors(1) + sectors;
        }
        Ok(())
    }

    /// Writes the open tables and the tail, and cuts the file there, if that is not so already.
    pub fn write_tail(&mut self, extent: &ExtentFile) -> Result<()> {
        if !self.stream.as_ref().is_some_and(|stream| stream.dirty) {
            return Ok(());
        }
        let Some(header) = self.header else { return Ok(()) };
        self.write_open(extent, u64::MAX)?;
        let tail = tail(&header, self.next, &self.gd);
        let at = self.next.bytes();
        let failed = || format!("{}: could not write the footer", extent.name);
        extent.write("the grain directory and the footer", at, &tail)?;
        extent.storage.set_len(at + tail.len() as u64, Preallocation::Off).with_context(failed)?;
        if let Some(stream) = &mut self.stream {
            stream.tail_at = self.next;
            stream.dirty = false;
        }
        Ok(())
    }
}
