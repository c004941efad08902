//! What guards the tables of an image that is not what it says: guest data is never written, and room never given
//! out or given back, where, whatever refcounts and entries say, the header or a table lies.
//!
//! Invariants: from the first change on (`Qcow2Driver::learn_metadata`) the places of every active L2 table and
//! refcount block are known, and of what else does not move with the header: the snapshots' table and L1 tables, the
//! bitmaps' tables, the LUKS header. What moves adds its new place before it writes there. The lock is a leaf.

mod missing;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{MutexGuard, PoisonError};

use crate::block::error::Context;
use crate::block::{Error, Result, number};

use super::Qcow2Driver;
use super::geometry::{ClusterIndex, Geometry};
use super::layout::{self, ENTRY};
use super::walk::{Found, MetadataPart, Visitor};

pub use missing::MOST_DECODED;

/// Marks an L2 table's offset.
pub const L2: u64 = 0;
/// Marks a refcount block's offset (whose low bits are always clear).
pub const BLOCK: u64 = 1;
/// Marks the offset of an L2 table of snapshots alone.
const INACTIVE: u64 = 2;
const MARKS: u64 = BLOCK | INACTIVE;

/// Where tables are, beside those that the header places.
#[derive(Debug, Default)]
pub struct Places {
    /// Active L2 tables and refcount blocks: a cluster's offset with its mark.
    clusters: BTreeSet<u64>,
    /// What is longer: where it starts, where it ends, what it is. In whole clusters; none overlaps another.
    runs: BTreeMap<u64, (u64, &'static str)>,
    /// A refcount block whose own cluster is not counted yet.
    block: Option<u64>,
}

impl Places {
    fn add_run(&mut self, start: u64, end: u64, what: &'static str) {
        let (mut start, mut end, mut what) = (start, end, what);
        // Forged images have tables in one place. They are not written to, so one name for both will do.
        while let Some((at, (until, name))) = self.run(start, end) {
            self.runs.remove(&at);
            (start, end, what) = (start.min(at), end.max(until), name);
        }
        self.runs.insert(start, (end, what));
    }

    /// The last run that shares a byte with a range.
    fn run(&self, start: u64, end: u64) -> Option<(u64, (u64, &'static str))> {
        let (at, run) = self.runs.range(..end).next_back()?;
        (run.0 > start && start < end).then_some((*at, *run))
    }

    /// A cluster is no table's any more.
    fn forget(&mut self, at: u64, len: u64) {
        for mark in [L2, BLOCK, INACTIVE] {
            self.clusters.remove(&(at | mark));
        }
        let end = at.saturating_add(len);
        while let Some((start, (until, what))) = self.run(at, end) {
            self.runs.remove(&start);
            if start < at {
                self.runs.insert(start, (at, what));
            }
            if end < until {
                self.runs.insert(end, (until, what));
            }
        }
    }

    fn at(&self, start: u64, end: u64) -> Option<&'static str> {
        if let Some((_, (_, what))) = self.run(start, end) {
            return Some(what);
        }
        let known = self.clusters.range(start..end).next()?;
        Some(match known & MARKS {
            L2 => MetadataPart::ActiveL2.name(),
            BLOCK => MetadataPart::RefcountBlock.name(),
            _ => MetadataPart::InactiveL2.name(),
        })
    }
}

impl Qcow2Driver {
    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new L2 table or refcount block.
    pub(super) fn add_metadata(&self, at: u64, mark: u64) {
        self.places().clusters.insert(at | mark);
    }

    /// A new refcount block, whose cluster will be taken next.
    pub(super) fn new_block(&self, at: u64) {
        self.places().block = Some(at);
    }

    /// A cluster was taken.
    pub(super) fn took(&self, cluster: ClusterIndex) {
        let mut places = self.places();
        if let Some(at) = places.block.take_if(|at| self.geometry.cluster_of(*at) == cluster) {
            places.clusters.insert(at | BLOCK);
        }
    }

    /// A new bitmap table.
    pub(super) fn add_bitmap_table(&self, at: u64, len: u64) {
        self.places().add_run(at, self.whole(at, len), "bitmap table");
    }

    /// A cluster of a table that was given up.
    pub(super) fn forget_metadata(&self, at: u64) {
        self.places().forget(at, self.geometry.cluster_size());
    }

    /// Behind the end of the file there is no table, however long one says that it is.
    pub(super) fn forget_behind(&self, end: u64) {
        self.places().forget(end, u64::MAX - end);
    }

    /// Looks up where tables are, once, before the first change. Refuses an image in which a table that is going to
    /// be changed lies in the place of another kind: a change to one would be a change to the other; one whose refcount
    /// blocks cannot be what they are said to be; and one of whose file something is missing (`guard/missing.rs`).
    pub(super) fn learn_metadata(&self) -> Result<()> {
        self.learn(Survey::new(self, DEEP)?)?.map_or(Ok(()), Err)
    }

    /// The same, before the snapshot table of `len` bytes is written anew: it may be said to lie where another table is,
    /// which is not changed then. Nothing is given out where it lies.
    pub(super) fn learn_metadata_but_snapshots(&self, at: u64, len: u64) -> Result<Option<Error>> {
        let missing = self.learn(Survey { snapshots_go: true, ..Survey::new(self, DEEP)? })?;
        if len > 0 {
            self.places().add_run(
                at - self.geometry.in_cluster(at),
                self.whole(at, len),
                MetadataPart::SnapshotTable.name(),
            );
        }
        Ok(missing)
    }

    /// Gives the error where clusters are missing: for who places nothing behind the end then.
    fn learn(&self, mut survey: Survey<'_>) -> Result<Option<Error>> {
        self.bitmaps_apart()?;
        self.walk(&mut survey)?;
        if let Some(what) = survey.clash.or(survey.refcounts_clash) {
            return Err(self.overlaps(what));
        }
        if let Some(text) = survey.refcounts_wrong {
            return Err(self.corrupt(text));
        }
        for at in survey.blocks() {
            let count = self.refcount(self.geometry.cluster_of(at))?;
            if count != 1 {
                return Err(self.corrupt(format!("Refblock at offset {at:#x} has a refcount of {count}")));
            }
        }
        let mut missing = survey.lacking();
        let file = survey.file;
        *self.places() = survey.places;
        if missing.is_none() && survey.deep < u64::MAX && self.counts_past(file)? {
            // Perhaps clusters of a disk with more tables than were looked into; perhaps they leaked.
            let mut all = Survey::new(self, u64::MAX)?;
            self.walk(&mut all)?;
            missing = all.lacking();
        }
        if missing.is_none() {
            missing = self.data_file_lacks()?;
        }
        Ok(missing)
    }

    /// Refuses to resize an image whose guest data, by an entry of an L2 table, lies where a table does: the size cannot
    /// change without that table, and which of the two is wrong cannot be told.
    pub(super) fn data_apart(&self) -> Result<()> {
        let mut survey = Survey::new(self, u64::MAX)?;
        self.walk(&mut survey)?;
        survey.data_clash.map_or(Ok(()), |what| Err(self.overlaps(what)))
    }

    /// What is in one piece and moves with the header: offset, length, name.
    fn fixed(&self) -> [(u64, u64, &'static str); 4] {
        let header = self.header();
        let fields = &header.fields;
        let table = u64::from(fields.refcount_table_clusters) << self.geometry.cluster_bits;
        // Without the autoclear bit the directory is nothing.
        let bitmaps = header.bitmaps.filter(|_| fields.autoclear & layout::BITMAPS != 0);
        let (directory, len) = bitmaps.map_or((0, 0), |place| (place.directory_offset, place.directory_size));
        [
            (0, 1, MetadataPart::Qcow2Header.name()),
            (fields.l1_table_offset, u64::from(fields.l1_size) * ENTRY, MetadataPart::ActiveL1.name()),
            (fields.refcount_table_offset, table, MetadataPart::RefcountTable.name()),
            (directory, len, MetadataPart::BitmapDirectory.name()),
        ]
    }

    /// Where the last cluster of a run of bytes ends.
    fn whole(&self, at: u64, len: u64) -> u64 {
        at.saturating_add(len).checked_next_multiple_of(self.geometry.cluster_size()).unwrap_or(u64::MAX)
    }

    /// What lies in a run of bytes, if it is a table or the header.
    pub(super) fn occupied(&self, first: u64, end: u64) -> Option<&'static str> {
        let hit = |part: &&(u64, u64, &'static str)| overlap((first, end.saturating_sub(first)), (part.0, part.1));
        if let Some((_, _, what)) = self.fixed().iter().find(hit) {
            return Some(what);
        }
        self.places().at(first, end)
    }

    fn overlaps(&self, what: &str) -> Error {
        self.corrupt(format!("Preventing invalid write on metadata (overlaps with {what})"))
    }

    /// Refuses to touch a range of the image file as guest data if a table lies there.
    pub(super) fn check_data(&self, at: u64, len: u64) -> Result<()> {
        let first = at - self.geometry.in_cluster(at);
        self.occupied(first, self.whole(at, len)).map_or(Ok(()), |what| Err(self.overlaps(what)))
    }

    /// Refuses to give out clusters in which a table lies.
    pub(super) fn guard(&self, start: ClusterIndex, n: u64) -> Result<()> {
        let first = self.geometry.offset_of(start);
        match self.occupied(first, self.geometry.offset_of(start + n)) {
            Some(what) => Err(self.corrupt(format!("Preventing invalid allocation of {what} at offset {first:#x}"))),
            None => Ok(()),
        }
    }
}

/// The most L2 tables, in bytes, whose entries are looked at before the first change of an image that was closed
/// cleanly: those of 64 GiB in clusters of 64 KiB.
const DEEP: u64 = 8 << 20;

/// What a walk learns of where tables are, and of those that lie where they cannot.
pub(super) struct Survey<'a> {
    driver: &'a Qcow2Driver,
    fixed: [(u64, u64, &'static str); 4],
    file: u64,
    deep: u64,
    /// The snapshot table is given up.
    snapshots_go: bool,
    places: Places,
    /// Bits of bitmaps: tables of another kind as far as refcount blocks are concerned.
    bits: BTreeSet<u64>,
    /// A table, other than refcounts, that lies where another one does: the other one.
    pub clash: Option<&'static str>,
    /// What the refcount table, or a refcount block, lies in.
    pub refcounts_clash: Option<&'static str>,
    /// What else is wrong with where they are.
    pub refcounts_wrong: Option<String>,
    /// The table in which guest data lies.
    pub data_clash: Option<&'static str>,
    /// Something that lies past the end of the file: where, and what.
    missing: Option<(u64, &'static str)>,
    /// Compressed clusters that were decoded.
    decoded: u32,
    /// Bytes of the file, from the first to the second, in which nothing but guest data lies. Guest data is seen when
    /// all else has been, and most of it lies close together: few looks tell that it is apart.
    gap: (u64, u64),
}

impl<'a> Survey<'a> {
    /// Of an image whose L2 tables are looked into if they have at most `deep` bytes.
    pub fn new(driver: &'a Qcow2Driver, deep: u64) -> Result<Self> {
        let fixed = driver.fixed();
        let mut survey = Self {
            driver,
            fixed,
            file: driver.file().storage.len().context("Could not get file size")?,
            deep,
            snapshots_go: false,
            places: Places::default(),
            bits: BTreeSet::new(),
            clash: None,
            refcounts_clash: None,
            refcounts_wrong: None,
            data_clash: None,
            missing: None,
            decoded: 0,
            gap: (0, 0),
        };
        let table = MetadataPart::RefcountTable.name();
        for (n, (at, len, what)) in fixed.iter().enumerate() {
            for other in fixed.iter().skip(n + 1).filter(|other| overlap((*at, *len), (other.0, other.1))) {
                survey.clashes(table == *what || table == other.2, other.2);
            }
        }
        Ok(survey)
    }

    /// What lies in the clusters of a range beside L2 tables, if anything does.
    pub fn other_than_l2(&self, at: u64, len: u64) -> Option<&'static str> {
        let (at, end) = (at - self.driver.geometry.in_cluster(at), self.driver.whole(at, len));
        let run = || self.places.run(at, end).map(|(_, (_, what))| what);
        let block = || self.places.clusters.range(at..end).any(|known| known & BLOCK != 0);
        self.placed(at, end.saturating_sub(at))
            .or_else(run)
            .or_else(|| block().then(|| MetadataPart::RefcountBlock.name()))
    }

    /// The error where something is missing.
    pub fn lacking(&self) -> Option<Error> {
        self.missing.map(|(at, what)| Error::truncated(what, at, self.file))
    }

    /// Whether the refcounts can be changed where they are.
    pub fn refcounts_sound(&self) -> bool {
        self.refcounts_clash.is_none() && self.refcounts_wrong.is_none()
    }

    /// The image's.
    pub fn geometry(&self) -> Geometry {
        self.driver.geometry
    }

    /// The refcount blocks.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.places.clusters.iter().filter(|at| **at & BLOCK != 0).map(|at| at & !MARKS)
    }

    fn clashes(&mut self, refcounts: bool, what: &'static str) {
        let slot = if refcounts { &mut self.refcounts_clash } else { &mut self.clash };
        slot.get_or_insert(what);
    }

    /// The place of what the header places, if it shares a byte with a range.
    fn placed(&self, at: u64, len: u64) -> Option<&'static str> {
        self.fixed.iter().find(|part| overlap((at, len), (part.0, part.1))).map(|part| part.2)
    }

    /// Something that stays where it is.
    fn still(&mut self, found: &Found) {
        let start = found.at - self.driver.geometry.in_cluster(found.at);
        let end = self.driver.whole(found.at, found.len);
        if let Some(what) = self.placed(start, end.saturating_sub(start)) {
            let name = if what == MetadataPart::Qcow2Header.name() { what } else { found.part.name() };
            self.clashes(what == MetadataPart::RefcountTable.name(), name);
        }
        self.places.add_run(start, end, found.part.name());
    }

    fn l2(&mut self, found: &Found, mark: u64) {
        let (at, len) = (found.at, found.len);
        let end = at.saturating_add(len);
        let run = self.places.run(at, end).map(|(_, (_, what))| what);
        if let Some(what) = self.placed(at, len).or(run.filter(|_| found.active)) {
            self.clashes(what == MetadataPart::RefcountTable.name(), what);
        }
        if self.driver.geometry.in_cluster(at) == 0 {
            self.places.clusters.insert(at | mark);
        }
    }

    fn block(&mut self, found: &Found) {
        let (at, len) = (found.at, found.len);
        let end = at.saturating_add(len);
        let index = found.entry.map_or(0, |entry| entry.index);
        if self.driver.geometry.in_cluster(at) != 0 {
            let text = format!("Refblock offset {at:#x} unaligned (reftable index: {})", number::prefixed(index));
            self.refcounts_wrong.get_or_insert(text);
        } else if at >= self.file {
            let text = format!(
                "Refblock offset {at:#x} is past the end of the file (reftable index: {})",
                number::prefixed(index)
            );
            self.refcounts_wrong.get_or_insert(text);
        } else if let Some(what) = self.placed(at, len).or_else(|| self.places.at(at, end)) {
            self.clashes(true, what);
        } else if self.bits.range(at..end).next().is_some() {
            self.clashes(true, MetadataPart::BitmapData.name());
        } else if end > self.file {
            let text = format!("Refblock at offset {at:#x} is cut off by the end of the file");
            self.refcounts_wrong.get_or_insert(text);
        } else {
            self.places.clusters.insert(at | BLOCK);
        }
    }

    fn data(&mut self, found: &Found) {
        let start = found.at - self.driver.geometry.in_cluster(found.at);
        let end = self.driver.whole(found.at, found.len);
        if self.gap.0 <= start && end <= self.gap.1 {
            return;
        }
        let table = self.driver.refcount_table();
        // Which of the two is wrong cannot be told.
        if self.places.clusters.range(start..end).any(|known| known & BLOCK != 0) {
            self.clashes(true, MetadataPart::RefcountBlock.name());
        } else if overlap((start, end.saturating_sub(start)), (table.at, table.len)) {
            self.clashes(true, MetadataPart::RefcountTable.name());
        }
        if self.data_clash.is_none() {
            let bits = || self.bits.range(start..end).next().map(|_| MetadataPart::BitmapData.name());
            let tables = || self.placed(start, end.saturating_sub(start)).or_else(|| self.places.at(start, end));
            self.data_clash = tables().or_else(bits);
            if self.data_clash.is_none() {
                self.gap = self.gap_around(start, end);
            }
        }
    }

    /// Where the parts end and start again that are next to a range in which none of them lies.
    fn gap_around(&self, start: u64, end: u64) -> (u64, u64) {
        let cluster = self.driver.geometry.cluster_size();
        let (mut from, mut to) = (0, u64::MAX);
        let mut beside = |at: u64, until: u64| {
            if until <= start { from = from.max(until) } else { to = to.min(at) }
        };
        for (at, len, _) in self.fixed.iter().filter(|(_, len, _)| *len > 0) {
            beside(*at, at.saturating_add(*len));
        }
        for set in [&self.places.clusters, &self.bits] {
            for at in set.range(..start).next_back().into_iter().chain(set.range(end..).next()) {
                let at = at - self.driver.geometry.in_cluster(*at);
                beside(at, at.saturating_add(cluster));
            }
        }
        let runs = &self.places.runs;
        for (at, (until, _)) in runs.range(..start).next_back().into_iter().chain(runs.range(end..).next()) {
            beside(*at, *until);
        }
        (from, to)
    }
}

impl Visitor for Survey<'_> {
    fn found(&mut self, found: &Found) -> Result<()> {
        self.look_for_missing(found)?;
        match found.part {
            MetadataPart::RefcountTable if found.at.saturating_add(found.len) > self.file => {
                let text = format!("Refcount table at offset {:#x} is past the end of the file", found.at);
                self.refcounts_wrong.get_or_insert(text);
            }
            MetadataPart::Qcow2Header
            | MetadataPart::ActiveL1
            | MetadataPart::RefcountTable
            | MetadataPart::BitmapDirectory => {}
            MetadataPart::SnapshotTable if self.snapshots_go => {}
            MetadataPart::SnapshotTable
            | MetadataPart::LuksHeader
            | MetadataPart::InactiveL1
            | MetadataPart::BitmapTable => self.still(found),
            MetadataPart::BitmapData => {
                self.bits.insert(found.at);
            }
            MetadataPart::ActiveL2 => self.l2(found, L2),
            MetadataPart::InactiveL2 => self.l2(found, INACTIVE),
            MetadataPart::RefcountBlock => self.block(found),
            MetadataPart::Data | MetadataPart::Compressed => self.data(found),
        }
        Ok(())
    }

    fn contents(&self, tables: u64) -> bool {
        self.clash.is_none() && tables.saturating_mul(self.driver.geometry.cluster_size()) <= self.deep
    }

    fn too_many(&self) -> Result<()> {
        Ok(())
    }
}

/// Whether two runs (offset, length) share a byte.
fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    a.1 > 0 && b.1 > 0 && a.0 < b.0.saturating_add(b.1) && b.0 < a.0.saturating_add(a.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_joined_and_cut() {
        let mut places = Places::default();
        places.add_run(0x4000, 0x8000, "a");
        places.add_run(0x1000, 0x2000, "b");
        places.add_run(0x7000, 0x9000, "c");
        assert_eq!(places.runs.len(), 2);
        assert_eq!(places.at(0x8fff, 0x9000), Some("a"));
        assert_eq!((places.at(0x9000, 0xa000), places.at(0x2000, 0x4000)), (None, None));
        places.forget(0x5000, 0x1000);
        assert_eq!((places.at(0x4000, 0x5000), places.at(0x5000, 0x6000)), (Some("a"), None));
        assert_eq!(places.at(0x5000, 0x6001), Some("a"));
        places.clusters.insert(0xa000 | BLOCK);
        assert_eq!(places.at(0x9000, 0xb000), Some("refcount block"));
        places.forget(0xa000, 0x1000);
        assert_eq!(places.at(0x9000, 0xb000), None);
    }
}
