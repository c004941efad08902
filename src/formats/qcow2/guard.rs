//! What guards the tables of an image that is not what it says: guest data is never written, and room never given
//! out or given back, where, whatever refcounts and entries say, the header or an active table lies.
//!
//! Invariants: every active L2 table is known from the first change on ([`Qcow2Driver::learn_metadata`]), and every
//! refcount block that was there then. The lock is a leaf.

use std::collections::BTreeSet;
use std::sync::{MutexGuard, PoisonError};

use crate::block::{Error, Result};

use super::Qcow2Driver;
use super::layout::{ENTRY, OFFSET_MASK, REFCOUNT_OFFSET_MASK};

/// Marks an L2 table's offset.
pub const L2: u64 = 0;
/// Marks a refcount block's offset (whose low bits are always clear).
pub const BLOCK: u64 = 1;

impl Qcow2Driver {
    /// Where active L2 tables and refcount blocks are.
    pub(super) fn metadata(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.metadata.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A table that was given up.
    pub(super) fn forget_metadata(&self, at: u64) {
        let mut known = self.metadata();
        known.remove(&(at | L2));
        known.remove(&(at | BLOCK));
    }

    /// Looks up where active L2 tables and refcount blocks are, once, before the first change. Refuses an image in
    /// which two kinds of tables lie in one place: a change to one would be a change to the other.
    pub(super) fn learn_metadata(&self) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let fixed = self.fixed();
        for (n, (at, len, _)) in fixed.iter().enumerate() {
            if let Some((_, _, what)) = fixed.iter().skip(n + 1).find(|other| overlap((*at, *len), (other.0, other.1)))
            {
                return Err(self.overlaps(what));
            }
        }
        let mut found = BTreeSet::new();
        let tables = [(self.l1(), OFFSET_MASK, L2), (self.refcount_table(), REFCOUNT_OFFSET_MASK, BLOCK)];
        for (table, mask, mark) in tables {
            for index in 0..table.len / ENTRY {
                let at = self.tables.get(table, index)? & mask;
                if at == 0 {
                    continue;
                }
                if let Some((_, _, what)) = fixed.iter().find(|other| overlap((at, cluster), (other.0, other.1))) {
                    return Err(self.overlaps(what));
                }
                if mark == BLOCK && found.contains(&(at | L2)) {
                    return Err(self.overlaps("active L2 table"));
                }
                found.insert(at | mark);
            }
        }
        *self.metadata() = found;
        Ok(())
    }

    /// What is in one piece: offset, length, name.
    fn fixed(&self) -> [(u64, u64, &'static str); 4] {
        let fields = self.header().fields;
        let table = u64::from(fields.refcount_table_clusters) << self.geometry.cluster_bits;
        [
            (0, 1, "qcow2_header"),
            (fields.l1_table_offset, u64::from(fields.l1_size) * ENTRY, "active L1 table"),
            (fields.refcount_table_offset, table, "refcount table"),
            (fields.snapshots_offset, self.snapshots.iter().map(|s| s.bytes()).sum(), "snapshot table"),
        ]
    }

    fn occupied(&self, first: u64, end: u64) -> Option<&'static str> {
        let hit = |part: &&(u64, u64, &'static str)| overlap((first, end.saturating_sub(first)), (part.0, part.1));
        if let Some((_, _, what)) = self.fixed().iter().find(hit) {
            return Some(what);
        }
        let known = self.metadata().range(first..end).next().copied()?;
        Some(if known & BLOCK != 0 { "refcount block" } else { "active L2 table" })
    }

    fn overlaps(&self, what: &str) -> Error {
        self.corrupt(format!("Preventing invalid write on metadata (overlaps with {what})"))
    }

    /// Refuses to touch a range of the image file as guest data if a table lies there.
    pub(super) fn check_data(&self, at: u64, len: u64) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let end = at.saturating_add(len).checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
        self.occupied(at - self.geometry.in_cluster(at), end).map_or(Ok(()), |what| Err(self.overlaps(what)))
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
