//! What guards the tables of an image that is not what it says: guest data is never written, and room never given
//! out or given back, where, whatever refcounts and entries say, the header or a table lies.
//!
//! Invariants: from the first change on ([`Qcow2Driver::learn_metadata`]) the places of every active L2 table and
//! refcount block are known, and of what else does not move with the header: the snapshots' table and L1 tables, the
//! bitmaps' tables. What moves adds its new place before it writes there. The lock is a leaf.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{MutexGuard, PoisonError};

use crate::block::{Error, Result};

use super::Qcow2Driver;
use super::layout::{self, ENTRY, OFFSET_MASK, REFCOUNT_OFFSET_MASK};

/// Marks an L2 table's offset.
pub const L2: u64 = 0;
/// Marks a refcount block's offset (whose low bits are always clear).
pub const BLOCK: u64 = 1;

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
        self.clusters.remove(&(at | L2));
        self.clusters.remove(&(at | BLOCK));
        let end = at.saturating_add(len);
        if let Some((start, (until, what))) = self.run(at, end) {
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
        Some(if known & BLOCK != 0 { "refcount block" } else { "active L2 table" })
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
    pub(super) fn took(&self, cluster: u64) {
        let mut places = self.places();
        if let Some(at) = places.block.take_if(|at| *at >> self.geometry.cluster_bits == cluster) {
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

    /// Looks up where tables are, once, before the first change. Refuses an image in which a table that is going to
    /// be changed lies in the place of another kind: a change to one would be a change to the other.
    pub(super) fn learn_metadata(&self) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let fixed = self.fixed();
        self.bitmaps_apart()?;
        self.names_are_text()?;
        let mut found = Places::default();
        let mut still = |at: u64, len: u64, what: &'static str| {
            let start = at - self.geometry.in_cluster(at);
            if len > 0 && at > 0 {
                found.add_run(start, self.whole(at, len), what);
            }
        };
        still(self.header().fields.snapshots_offset, self.snapshots.iter().map(|s| s.bytes()).sum(), "snapshot table");
        for snapshot in &self.snapshots {
            let fields = snapshot.fields;
            still(fields.l1_table_offset, u64::from(fields.l1_size) * ENTRY, "inactive L1 table");
        }
        for bitmap in self.bitmap_list() {
            still(bitmap.fields.table_offset, u64::from(bitmap.fields.table_size) * ENTRY, "bitmap table");
        }
        for (n, (at, len, what)) in fixed.iter().enumerate() {
            let other = fixed.iter().skip(n + 1).find(|other| overlap((*at, *len), (other.0, other.1)));
            let run = found.run(*at, at.saturating_add(*len)).map(|(_, (_, name))| name);
            if let Some(what) = other.map(|part| part.2).or(if *at == 0 { run.and(Some(*what)) } else { run }) {
                return Err(self.overlaps(what));
            }
        }
        let tables = [(self.l1(), OFFSET_MASK, L2), (self.refcount_table(), REFCOUNT_OFFSET_MASK, BLOCK)];
        for (table, mask, mark) in tables {
            for index in 0..table.len / ENTRY {
                let at = self.tables.get(table, index)? & mask;
                if at == 0 {
                    continue;
                }
                let run = found.run(at, at.saturating_add(cluster)).map(|(_, (_, what))| what);
                let part = fixed.iter().find(|other| overlap((at, cluster), (other.0, other.1))).map(|part| part.2);
                if let Some(what) = part.or(run) {
                    return Err(self.overlaps(what));
                }
                if mark == BLOCK && found.clusters.contains(&(at | L2)) {
                    return Err(self.overlaps("active L2 table"));
                }
                found.clusters.insert(at | mark);
            }
        }
        *self.places() = found;
        Ok(())
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
            (0, 1, "qcow2_header"),
            (fields.l1_table_offset, u64::from(fields.l1_size) * ENTRY, "active L1 table"),
            (fields.refcount_table_offset, table, "refcount table"),
            (directory, len, "bitmap directory"),
        ]
    }

    /// Where the last cluster of a run of bytes ends.
    fn whole(&self, at: u64, len: u64) -> u64 {
        at.saturating_add(len).checked_next_multiple_of(self.geometry.cluster_size()).unwrap_or(u64::MAX)
    }

    fn occupied(&self, first: u64, end: u64) -> Option<&'static str> {
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
    pub(super) fn guard(&self, start: u64, n: u64) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let first = start << bits;
        match self.occupied(first, start.saturating_add(n) << bits) {
            Some(what) => Err(self.corrupt(format!("Preventing invalid allocation of {what} at offset {first:#x}"))),
            None => Ok(()),
        }
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
