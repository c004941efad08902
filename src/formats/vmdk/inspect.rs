//! Looks at the grain directories and tables of one sparse extent, and mends those that are there twice.
//!
//! A directory is judged as a whole, with its tables and the grains that these name: all of it lies in the file and over
//! nothing else. The first one is what readers go by; what is wrong with it is told, and where the redundant one says
//! something else. Mended is one from the other: the redundant one where nothing is wrong with the first, the first one
//! where something is and nothing is wrong with the redundant one. Tables are written where they are, or, where their
//! place is not their own, behind the end of the file before the directory names them: every write brings one
//! directory closer to the other, which stays as it is.
//!
//! Where a directory is, the header alone says. Nothing is mended where that is not in the file, or over something else,
//! or where one directory has tables of which the other knows nothing: then the header's word may be what is wrong.
//!
//! Source: *Virtual Disk Format 5.0*, "Hosted Sparse Extents", "Grain Directory", "Grain Table", "Stream-Optimized
//! Compressed Sparse Extents".

use zerocopy::{FromBytes, IntoBytes};

use crate::block::check::Tally;
use crate::block::error::Context;
use crate::block::{Error, Result, metadata};
use crate::formats::claims::Claims;
use crate::storage::Preallocation;

use super::grain;
use super::layout::*;
use super::sparse::{Sparse, read_directory};
use super::stream::directory_marker;
use super::tables::{Grain, read_entries};

/// A table as a directory names it.
enum TableCopy {
    /// Not at all.
    None,
    /// Past the end of the file.
    Lost,
    /// There.
    Entries(Vec<u32>),
}

/// What came of a look at an extent.
#[derive(Debug, Default)]
pub struct Verdict {
    /// What is wrong with the first directory.
    first: u64,
    /// Tables of which the two do not say the same.
    differing: u64,
    /// What is wrong apart from that.
    other: u64,
}

/// A sparse extent as it is in its file now.
#[derive(Debug)]
pub struct InspectedExtent<'a> {
    sparse: &'a Sparse,
    /// Its first sector on the guest's disk.
    start: Sectors,
    /// Bytes of the file.
    length: u64,
    /// Pieces of metadata that are there once, in bytes: place and length. The first directory is one of them,
    fixed: Vec<(u64, u64)>,
    /// the redundant one is not.
    redundant_at: Option<(u64, u64)>,
    /// The place of the first directory in bytes.
    first_at: u64,
    first: Vec<u32>,
    redundant: Option<Vec<u32>>,
    header: Option<SparseHeader>,
    streamed: bool,
}

impl<'a> InspectedExtent<'a> {
    /// Reads its directories. `text` is where a descriptor lies in the same file, and how long it may get, in bytes.
    pub fn read(sparse: &'a Sparse, start: Sectors, text: Option<(u64, u64)>) -> Result<Self> {
        let failed = || format!("{}: could not read the header", sparse.name);
        let storage = &*sparse.storage;
        let length = storage.len().with_context(failed)?;
        let (header, tables) = {
            let state = sparse.state();
            (state.header, state.gd.len() as u64)
        };
        let mut fixed = vec![(0, SECTOR)];
        fixed.extend(text);
        let directory_bytes = (tables * 4).next_multiple_of(SECTOR);
        let (mut redundant, mut redundant_at) = (None, None);
        let mut streamed = false;
        let gd_at = match header {
            Some(header) => {
                let head: SparseHeader = read(storage, &sparse.name, "the header", 0)?;
                streamed = head.gd_at.get() == GD_AT_END;
                if header.has(FLAG_REDUNDANT) && header.rgd_at.get() != Sectors(0) {
                    redundant = Some(read_directory(storage, &sparse.name, header.rgd_at.get(), tables)?);
                    redundant_at = Some((header.rgd_at.get().bytes(), directory_bytes));
                }
                header.gd_at.get()
            }
            None => {
                let mut head = [0; SECTOR as usize];
                metadata::read(storage, &sparse.name, "the header", 0, &mut head)?;
                let head = CowdHeader::read_from_prefix(&head);
                head.map_err(|_| Error::corrupt("Truncated COWD header"))?.0.gd_at.get().into()
            }
        };
        let first = read_directory(storage, &sparse.name, gd_at, tables)?;
        let at = gd_at.bytes();
        if streamed {
            // Marker, directory, marker, footer, end of stream.
            fixed.push((at.saturating_sub(SECTOR), directory_bytes + 4 * SECTOR));
        } else {
            fixed.push((at, directory_bytes));
        }
        Ok(Self { sparse, start, length, fixed, redundant_at, first_at: at, first, redundant, header, streamed })
    }

    fn name(&self) -> &str {
        &self.sparse.name
    }

    /// Tells what is wrong.
    pub fn look(&self, tally: &mut Tally<'_>) -> Result<Verdict> {
        let mut verdict = Verdict::default();
        if self.streamed {
            self.look_at_stream(&mut |text| {
                verdict.other += 1;
                tally.wrong(text);
            })?;
        }
        let name = self.name();
        let mut misplaced = 0;
        for (which, at) in [("", Some(self.first_at)), ("redundant ", self.redundant_at.map(|(at, _)| at))] {
            if at.is_some_and(|at| !self.holds_directory(at)) {
                misplaced += 1;
                tally.wrong(format!("{name}: {which}grain directory lies past the end of the file"));
            }
        }
        verdict.other += misplaced;
        self.walk(&self.first, self.redundant_at, &mut |_| {}, &mut |text| {
            verdict.first += 1;
            tally.wrong(text);
        })?;
        if let Some(redundant) = self.redundant.as_ref().filter(|_| misplaced == 0) {
            for (table, sectors) in self.first.iter().copied().zip(redundant.iter().copied()).enumerate() {
                if let Some(how) = self.difference(sectors)? {
                    verdict.differing += 1;
                    tally.wrong(format!("{}: redundant grain table {table} {how}", self.name()));
                }
            }
        }
        Ok(verdict)
    }

    /// How the redundant copy of a table differs from the first one.
    fn difference(&self, (first, redundant): (u32, u32)) -> Result<Option<&'static str>> {
        Ok(match (self.table(first)?, self.table(redundant)?) {
            (TableCopy::None, TableCopy::None) => None,
            (_, TableCopy::None) => Some("is missing"),
            (_, TableCopy::Lost) => Some("lies past the end of the file"),
            (TableCopy::Entries(a), TableCopy::Entries(b)) if a == b => None,
            _ => Some("differs from the first one"),
        })
    }

    /// Whether the directory that begins at a byte of the file lies in it.
    fn holds_directory(&self, at: u64) -> bool {
        at.checked_add(self.first.len() as u64 * 4).is_some_and(|end| end <= self.length)
    }

    fn table_bytes(&self) -> u64 {
        self.sparse.shape.table_sectors().bytes()
    }

    fn table(&self, sector: u32) -> Result<TableCopy> {
        let at = Sectors::from(sector).bytes();
        if sector == 0 {
            return Ok(TableCopy::None);
        }
        let entries = self.sparse.shape.gtes;
        if self.length.next_multiple_of(SECTOR) < at.saturating_add(entries * 4) {
            return Ok(TableCopy::Lost);
        }
        let table = read_entries(&*self.sparse.storage, &self.sparse.name, "a grain table", at, entries)?;
        Ok(TableCopy::Entries(table))
    }

    /// Goes through a directory, its tables and their grains, which lie over no metadata and not over `and_over`.
    /// `tell` hears of what is wrong; `and_then` gets each window of the file, with all that is named in it taken.
    fn walk(
        &self,
        directory: &[u32],
        and_over: Option<(u64, u64)>,
        and_then: &mut dyn FnMut(&mut Claims),
        tell: &mut dyn FnMut(String),
    ) -> Result<()> {
        let name = self.name();
        let mut places: Vec<(u32, u32)> = Vec::new();
        for (index, sector) in (0u32..).zip(directory.iter().copied()) {
            match Sectors::from(sector).bytes() {
                0 => {}
                at if at.saturating_add(self.table_bytes()) > self.length.next_multiple_of(SECTOR) => {
                    tell(format!("{name}: grain table {index} lies past the end of the file"));
                }
                _ => places.push((sector, index)),
            }
        }
        places.sort_unstable();
        let mut end = Sectors(0);
        // A table is walked once.
        places.retain(|(sector, index)| {
            let apart = Sectors::from(*sector) >= end;
            if apart {
                end = Sectors::from(*sector) + self.sparse.shape.table_sectors();
            } else {
                tell(format!("{name}: grain table {index} overlaps another one"));
            }
            apart
        });
        places.sort_unstable_by_key(|(_, index)| *index);
        // No table can name what lies further.
        let reach = (Sectors::from(u32::MAX) + self.sparse.shape.grain_sectors()).bytes();
        for (window, mut claims) in Claims::windows(self.length.min(reach)).enumerate() {
            for (at, len) in self.fixed.iter().chain(&and_over) {
                if !claims.claim(*at, *len) {
                    tell(format!("{name}: metadata at offset {at} overlaps other metadata"));
                }
            }
            for (sector, index) in &places {
                if !claims.claim(Sectors::from(*sector).bytes(), self.table_bytes()) {
                    tell(format!("{name}: grain table {index} overlaps other metadata"));
                }
                let marked = || self.has_table_marker(*sector);
                if window == 0 && self.streamed && !marked()? {
                    tell(format!("{name}: no marker before grain table {index}"));
                }
            }
            for (sector, index) in &places {
                let TableCopy::Entries(entries) = self.table(*sector)? else { continue };
                self.walk_table(u64::from(*index), &entries, &mut |guest, found| match found {
                    Err(text) if window == 0 => tell(text),
                    Err(_) => {}
                    Ok((at, len)) => {
                        if !claims.claim(at, len) {
                            tell(format!("{name}: cluster for sector {guest} overlaps what else is there"));
                        }
                    }
                })?;
            }
            and_then(&mut claims);
        }
        Ok(())
    }

    /// Gives `see` every grain of a table: its first sector on the disk, and its place and length in the file, in bytes,
    /// or what is wrong with it.
    fn walk_table(
        &self,
        table: u64,
        entries: &[u32],
        see: &mut dyn FnMut(Sectors, std::result::Result<(u64, u64), String>),
    ) -> Result<()> {
        let shape = self.sparse.shape;
        let capacity = self.sparse.state().capacity;
        for (n, entry) in (table * shape.gtes..).zip(entries.iter().copied()) {
            let Grain::At(sector) = shape.grain_of(entry) else { continue };
            let inside = shape.grain_sectors() * n;
            let (guest, at) = (self.start + inside, sector.bytes());
            if at >= self.length {
                see(guest, Err(format!("cluster offset for sector {guest} points after EOF")));
            } else if shape.compressed && shape.markers {
                see(guest, self.compressed(inside, at)?);
            } else if shape.compressed {
                see(guest, Ok((at, 1)));
            } else {
                // What lies past the end of the disk need not be there.
                let wanted = shape.grain.min(capacity.bytes().saturating_sub(inside.bytes()));
                see(
                    guest,
                    match at.saturating_add(wanted) > self.length {
                        true => Err(format!("{}: cluster for sector {guest} is cut off by EOF", self.name())),
                        false => Ok((at, shape.grain)),
                    },
                );
            }
        }
        Ok(())
    }

    /// Place and length of a compressed grain that begins at that sector of the extent, by its marker, in bytes.
    fn compressed(&self, inside: Sectors, at: u64) -> Result<std::result::Result<(u64, u64), String>> {
        let (name, guest) = (self.name(), self.start + inside);
        let marker: GrainMarker = read(&*self.sparse.storage, &self.sparse.name, "a grain marker", at)?;
        let (bytes, head) = (u64::from(marker.bytes.get()), size_of::<GrainMarker>() as u64);
        Ok(if marker.sector.get() != inside {
            Err(format!("{name}: cluster for sector {guest} has the marker of another one"))
        } else if bytes == 0 || bytes > grain::longest(self.sparse.shape.grain) {
            Err(format!("{name}: cluster for sector {guest} has a compressed size of {bytes} bytes"))
        } else if at + head + bytes > self.length {
            Err(format!("{name}: cluster for sector {guest} is cut off by EOF"))
        } else {
            Ok((at, head + bytes))
        })
    }

    fn has_table_marker(&self, sector: u32) -> Result<bool> {
        let Some(before) = Sectors::from(sector).before() else { return Ok(false) };
        let file = &*self.sparse.storage;
        let marker: Marker = read(file, &self.sparse.name, "the marker of a grain table", before.bytes())?;
        let sectors = self.sparse.shape.table_sectors();
        Ok((marker.sectors.get(), marker.bytes.get(), marker.kind.get()) == (sectors, 0, MARKER_TABLE))
    }

    /// The end of a stream: markers, and the footer against the header.
    fn look_at_stream(&self, tell: &mut dyn FnMut(String)) -> Result<()> {
        let (name, storage) = (self.name(), &*self.sparse.storage);
        let file = &self.sparse.name;
        let Some(header) = self.header else { return Ok(()) };
        let sectors = Sectors::holding(self.first.len() as u64 * 4);
        if directory_marker(storage, file, header.gd_at.get())? != Some(sectors) {
            tell(format!("{name}: no marker before the grain directory"));
        }
        // The footer was found at the last sector but one.
        let at = |back: u64| self.length.saturating_sub(Sectors(back).bytes());
        let marker: Marker = read(storage, file, "the marker of the footer", at(3))?;
        if marker.kind.get() != MARKER_FOOTER || marker.bytes.get() != 0 {
            tell(format!("{name}: no marker before the footer"));
        }
        let marker: Marker = read(storage, file, "the marker of the end", at(1))?;
        if (marker.sectors.get(), marker.bytes.get(), marker.kind.get()) != (Sectors(0), 0, MARKER_END) {
            tell(format!("{name}: no marker at the end of the stream"));
        }
        let first: SparseHeader = read(storage, file, "the header", 0)?;
        let footer: SparseHeader = read(storage, file, "the footer", at(2))?;
        let fields = |header: &SparseHeader| {
            (
                (header.version, header.flags, header.grain_sectors, header.gtes, header.compression),
                (header.descriptor_at, header.descriptor_sectors),
            )
        };
        // What a writer learned last stands in the footer alone.
        let known = first.capacity.get() == Sectors(0) || first.capacity == footer.capacity;
        if fields(&first) != fields(&footer) || !known {
            tell(format!("{name}: header and footer differ"));
        }
        Ok(())
    }

    /// Whether a directory has a table with grains for which the other one has none at all.
    fn knows_more(&self, directory: &[u32], other: &[u32]) -> Result<bool> {
        for (sector, _) in directory.iter().zip(other).filter(|(_, other)| **other == 0) {
            if matches!(self.table(*sector)?, TableCopy::Entries(entries) if entries.iter().any(|entry| *entry != 0)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether the first directory, with which something is wrong, can be made what the redundant one is: nothing is
    /// wrong with that, and it is a directory, as far as the first one knows.
    fn can_follow(&self, redundant: &[u32]) -> Result<bool> {
        let mut clear = true;
        self.walk(redundant, self.redundant_at, &mut |_| {}, &mut |_| clear = false)?;
        if !clear || self.knows_more(&self.first, redundant)? {
            return Ok(false);
        }
        let mut apart = |claims: &mut Claims| {
            if let Some((at, len)) = self.redundant_at {
                clear &= claims.claim(at, len);
            }
        };
        self.walk(&self.first, None, &mut apart, &mut |_| {})?;
        Ok(clear)
    }

    /// Where the tables of a directory can be written: where they are, but for those whose place is not their own,
    /// given all that `other` names.
    fn own_places(&self, directory: &[u32], other: &[u32]) -> Result<Vec<u32>> {
        let mut own = directory.to_vec();
        let end = self.length.next_multiple_of(SECTOR);
        for sector in &mut own {
            if Sectors::from(*sector).bytes() + self.table_bytes() > end {
                *sector = 0;
            }
        }
        self.walk(
            other,
            self.redundant_at,
            &mut |claims| {
                for sector in &mut own {
                    if *sector != 0 && !claims.claim(Sectors::from(*sector).bytes(), self.table_bytes()) {
                        *sector = 0;
                    }
                }
            },
            &mut |_| {},
        )?;
        Ok(own)
    }

    /// Makes one directory say what the other one does.
    fn rebuild(&self, mended: &[u32], mended_at: Sectors, whole: &[u32]) -> Result<Vec<u32>> {
        let storage = &*self.sparse.storage;
        let failed = || format!("{}: could not write a grain table", self.name());
        let mut own = self.own_places(mended, whole)?;
        let mut end = Sectors::holding(self.length).next_multiple_of(self.sparse.shape.grain_sectors());
        // All of them can be named where they go.
        sector32(end + self.sparse.shape.table_sectors() * whole.len() as u64)?;
        for (index, (own, whole)) in own.iter_mut().zip(whole).enumerate() {
            let wanted = match self.table(*whole)? {
                TableCopy::Entries(entries) => entries,
                TableCopy::None => Vec::new(),
                TableCopy::Lost => continue,
            };
            if wanted.is_empty() && *own == 0 {
                // None is named, or none that could be written.
            } else if *own == 0 {
                let place = sector32(end)?;
                self.sparse.write("a grain table", end.bytes(), &entry_bytes(&wanted))?;
                end += self.sparse.shape.table_sectors();
                storage.set_len(end.bytes(), Preallocation::Off).with_context(failed)?;
                storage.flush().with_context(failed)?;
                *own = place;
            } else if !matches!(self.table(*own)?, TableCopy::Entries(entries) if entries == wanted) {
                let mut wanted = wanted;
                wanted.resize(usize::try_from(self.sparse.shape.gtes).unwrap_or(0), 0);
                self.sparse.write("a grain table", Sectors::from(*own).bytes(), &entry_bytes(&wanted))?;
            }
            if mended.get(index) != Some(&*own) {
                let at = mended_at.bytes() + index as u64 * 4;
                self.sparse.write("the grain directory", at, own.as_bytes())?;
            }
        }
        storage.flush().with_context(failed)?;
        Ok(own)
    }
}

/// Mends a directory from the other one.
pub fn mend(sparse: &Sparse, extent: &InspectedExtent<'_>, verdict: &Verdict, tally: &mut Tally<'_>) -> Result<()> {
    let (Some(redundant), Some(header)) = (&extent.redundant, extent.header) else { return Ok(()) };
    if verdict.other > 0 || extent.sparse.shape.compressed || verdict.first + verdict.differing == 0 {
        return Ok(());
    }
    let from_first = verdict.first == 0;
    let can = match from_first {
        true => !extent.knows_more(redundant, &extent.first)?,
        false => extent.can_follow(redundant)?,
    };
    if !can {
        return Ok(());
    }
    let mut state;
    if from_first {
        tally.repairing(format!("{}: redundant grain directory", extent.name()));
        let rebuilt = extent.rebuild(redundant, header.rgd_at.get(), &extent.first)?;
        state = sparse.state();
        state.rgd = Some(rebuilt);
    } else {
        tally.repairing(format!("{}: grain directory", extent.name()));
        let rebuilt = extent.rebuild(&extent.first, header.gd_at.get(), redundant)?;
        state = sparse.state();
        state.gd = rebuilt;
    }
    state.forget_tables();
    let end = sparse.storage.len().with_context(|| extent.name().to_owned())?;
    state.next = state.next.max(Sectors::holding(end));
    tally.mended(verdict.first + verdict.differing);
    Ok(())
}
