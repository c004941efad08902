//! Giving out clusters, and taking them back.
//!
//! Invariants: clusters are counted as used before anything points to them. Those that nothing points to any more wait
//! in `Allocator::freed` until that is in the file (see `flush.rs`); so whatever stops in between leaves leaks at
//! worst.

use crate::block::Result;
use crate::storage::Event;

use super::Qcow2Driver;
use super::counts::Counts;
use super::dirty::Dirty;
use super::entry::L2Entry;
use super::geometry::ClusterIndex;
use super::space::Cursor;

/// What is known of free space. Its lock is held by whoever changes tables.
#[derive(Debug, Default)]
pub struct Allocator {
    pub(super) cursor: Cursor,
    /// Where the next compressed cluster may continue, inside a cluster that has room left.
    pub(super) packed: Option<u64>,
    /// Whether compressed clusters were stored, so that the file may have to be filled up to a sector.
    pub(super) compressed: bool,
    /// Clusters (first, number, whether to punch) that lose a reference once the tables are in the file.
    pub(super) freed: Vec<(ClusterIndex, u64, bool)>,
    /// Whether it was looked up where metadata is.
    pub(super) learned: bool,
    /// What bitmaps still have to be told.
    pub(super) dirty: Dirty,
}

impl Allocator {
    /// The file ends at a whole sector, as it does after every compressed cluster of the reference.
    pub(super) fn will_compress(&mut self) {
        self.compressed = true;
    }
}

impl Qcow2Driver {
    /// `n` contiguous clusters, counted as used once.
    pub(super) fn allocate(&self, alloc: &mut Allocator, n: u64) -> Result<ClusterIndex> {
        self.file().storage.announce(Event::CLUSTER_ALLOC);
        alloc.cursor.allocate(&mut Counts(self), n)
    }

    /// Room for bytes, right after the last ones if the clusters follow each other.
    pub(super) fn pack(&self, alloc: &mut Allocator, bytes: u64) -> Result<u64> {
        self.file().storage.announce(Event::CLUSTER_ALLOC_BYTES);
        let (geometry, cluster) = (self.geometry, self.geometry.cluster_size());
        let mut host = None;
        if let Some(at) = alloc.packed {
            let room = cluster - self.geometry.in_cluster(at);
            let shared = geometry.cluster_of(at);
            let can = self.refcount(shared)? < self.geometry.refcount_max();
            if can && bytes <= room {
                self.raise(shared)?;
                host = Some(at);
            } else if can {
                let next = self.allocate(alloc, (bytes - room).div_ceil(cluster))?;
                if next == shared + 1 {
                    self.raise(shared)?;
                    host = Some(at);
                } else {
                    host = Some(geometry.offset_of(next));
                }
            }
        }
        let host = match host {
            Some(host) => host,
            None => geometry.offset_of(self.allocate(alloc, bytes.div_ceil(cluster))?),
        };
        let end = host + bytes;
        alloc.packed = (self.geometry.in_cluster(end) != 0).then_some(end);
        Ok(host)
    }

    /// Refuses an entry that points at a table.
    pub(super) fn check_entry(&self, entry: L2Entry) -> Result<()> {
        if self.external {
            Ok(())
        } else if entry.is_compressed() {
            let (at, len) = self.geometry.compressed(entry.0);
            self.check_data(at, len)
        } else {
            entry.host().map_or(Ok(()), |host| self.check_data(host.get(), self.geometry.cluster_size()))
        }
    }

    /// What an entry points to loses a reference, later.
    pub(super) fn free_entry(&self, alloc: &mut Allocator, entry: L2Entry, punch: bool) -> Result<()> {
        let geometry = self.geometry;
        if self.external {
            return Ok(());
        }
        self.check_entry(entry)?;
        if entry.is_compressed() {
            let (at, len) = self.geometry.compressed(entry.0);
            let first = geometry.cluster_of(at);
            let last = geometry.cluster_of(at.saturating_add(len).saturating_sub(1));
            alloc.freed.push((first, last.since(first) + 1, punch));
        } else if let Some(host) = entry.host() {
            let cluster = geometry.cluster_of(host.get());
            match alloc.freed.last_mut() {
                Some((first, n, p)) if *p == punch && *first + *n == cluster => *n += 1,
                _ => alloc.freed.push((cluster, 1, punch)),
            }
        }
        Ok(())
    }

    /// What became free may be given out again; compressed clusters do not continue there.
    pub(super) fn freed(&self, alloc: &mut Allocator, first: ClusterIndex, count: u64) {
        alloc.cursor.freed(first);
        if alloc.packed.is_some_and(|at| (first..first + count).contains(&self.geometry.cluster_of(at))) {
            alloc.packed = None;
        }
    }
}
