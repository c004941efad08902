//! An image that is being laid out in memory, to be written in one go: its free clusters and refcount structures.
//!
//! Memory is 8 bytes a refcount block and 16 a run of free clusters, whatever the disk's size. Every cluster in use
//! has a refcount of one.

use std::sync::Arc;

use crate::block::error::Context;
use crate::block::io::zeroed;
use crate::block::{Error, Result};
use crate::storage::Storage;

use super::geometry::{ClusterIndex, Geometry};
use super::layout::{ENTRY, MAX_REFCOUNT_TABLE_BYTES};
use super::refcount;
use super::space::{ClusterSpace, Cursor, Freed, Growth};

/// See the module.
#[derive(Debug)]
pub struct ImagePlan {
    geometry: Geometry,
    out: Batch,
    /// Free runs in ascending order, as first and end; the last has no end.
    free: Vec<(ClusterIndex, ClusterIndex)>,
    /// The cluster of each refcount block; 0 for none.
    blocks: Vec<ClusterIndex>,
    table: ClusterIndex,
    table_clusters: u64,
}

impl ImagePlan {
    /// An image whose first `used` clusters are in use, with its refcount table in cluster 1 and the first refcount
    /// block in cluster 2.
    pub fn new(geometry: Geometry, file: Arc<dyn Storage>, used: ClusterIndex) -> Self {
        Self {
            geometry,
            out: Batch::new(file),
            free: vec![(used, ClusterIndex::MAX)],
            blocks: vec![ClusterIndex(2)],
            table: ClusterIndex(1),
            table_clusters: 1,
        }
    }

    /// Where bytes go.
    pub fn out(&mut self) -> &mut Batch {
        &mut self.out
    }

    /// First cluster and length in clusters of the refcount table.
    pub fn table(&self) -> (ClusterIndex, u64) {
        (self.table, self.table_clusters)
    }

    /// The end of what is in use, in clusters.
    pub fn end(&self) -> ClusterIndex {
        self.free.last().map_or(ClusterIndex(0), |(first, _)| *first)
    }

    /// Writes the refcount table and all refcount blocks.
    pub fn write_refcounts(&mut self) -> Result<()> {
        let geometry = self.geometry;
        let mut block = zeroed(geometry.cluster_size())?;
        let per_block = geometry.refcounts_per_block();
        let mut run = 0;
        for (index, cluster) in self.blocks.iter().enumerate() {
            if *cluster == ClusterIndex(0) {
                continue;
            }
            let first = geometry.first_counted(index as u64);
            let end = first + per_block;
            refcount::fill_with_ones(geometry.refcount_order, &mut block);
            while self.free.get(run).is_some_and(|(_, free_end)| *free_end <= first) {
                run += 1;
            }
            for (free, free_end) in self.free.get(run..).unwrap_or(&[]) {
                if *free >= end {
                    break;
                }
                for slot in free.since(first)..(*free_end).min(end).since(first) {
                    refcount::set(geometry.refcount_order, &mut block, bytes(slot)?, 0);
                }
            }
            self.out.put(geometry.offset_of(*cluster), &block)?;
        }
        self.write_table()
    }

    /// The table, filled up to its clusters' end.
    fn write_table(&mut self) -> Result<()> {
        let mut table = zeroed(self.table_clusters * self.geometry.cluster_size())?;
        for (entry, cluster) in table.chunks_exact_mut(8).zip(&self.blocks) {
            entry.copy_from_slice(&self.geometry.offset_of(*cluster).to_be_bytes());
        }
        self.out.put(self.geometry.offset_of(self.table), &table)
    }

    fn set_free(&mut self, start: ClusterIndex, n: u64) {
        let at = self.free.partition_point(|(first, _)| *first < start);
        self.free.insert(at, (start, start + n));
        for at in [at, at.saturating_sub(1)] {
            if let (Some((_, end)), Some((first, last))) = (self.free.get(at).copied(), self.free.get(at + 1).copied())
                && end == first
            {
                self.free.remove(at + 1);
                if let Some(run) = self.free.get_mut(at) {
                    run.1 = last;
                }
            }
        }
    }
}

impl ClusterSpace for ImagePlan {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn find_free(&mut self, from: ClusterIndex, n: u64) -> Result<ClusterIndex> {
        let at = self.free.partition_point(|(_, end)| *end <= from);
        let runs = self.free.get(at..).unwrap_or(&[]).iter();
        let mut starts = runs.map(|(first, end)| ((*first).max(from), *end));
        let found = starts.find(|(start, end)| end.since(*start) >= n).map(|(start, _)| start);
        found.ok_or_else(|| Error::invalid("No space left in the image"))
    }

    fn has_block(&mut self, index: u64) -> Result<bool> {
        Ok(self.blocks.get(bytes(index)?).is_some_and(|cluster| *cluster != ClusterIndex(0)))
    }

    fn table_entries(&self) -> u64 {
        self.table_clusters * self.geometry.cluster_size() / ENTRY
    }

    fn take(&mut self, start: ClusterIndex, n: u64) -> Result<()> {
        let at = self.free.partition_point(|(_, end)| *end <= start);
        let Some((first, end)) = self.free.get(at).copied().filter(|run| run.0 <= start && start + n <= run.1) else {
            return Err(Error::corrupt("clusters were given out twice"));
        };
        self.free.remove(at);
        if start + n < end {
            self.free.insert(at, (start + n, end));
        }
        if first < start {
            self.free.insert(at, (first, start));
        }
        Ok(())
    }

    fn put_block(&mut self, index: u64, cluster: ClusterIndex) -> Result<()> {
        if index >= MAX_REFCOUNT_TABLE_BYTES / ENTRY {
            return Err(Error::invalid("No space left: the refcount table would be too large"));
        }
        let index = bytes(index)?;
        if self.blocks.len() <= index {
            self.blocks.resize(index + 1, ClusterIndex(0));
        }
        if let Some(slot) = self.blocks.get_mut(index) {
            *slot = cluster;
        }
        Ok(())
    }

    fn replace_table(&mut self, growth: &Growth) -> Result<Freed> {
        // The reference leaves the old table's bytes where they were.
        self.write_table()?;
        for (index, cluster) in &growth.blocks {
            self.put_block(*index, *cluster)?;
        }
        for (start, n) in &growth.taken {
            self.take(*start, *n)?;
        }
        let (old, clusters) = (self.table, self.table_clusters);
        (self.table, self.table_clusters) = (growth.table, growth.clusters);
        self.set_free(old, clusters);
        Ok(Freed(old))
    }
}

/// Gives out clusters of a plan.
#[derive(Debug)]
pub struct Planner {
    /// What is laid out so far.
    pub plan: ImagePlan,
    /// The clusters of the L2 tables, in order.
    pub l1: Vec<ClusterIndex>,
    cursor: Cursor,
}

impl Planner {
    /// Starts at the first cluster.
    pub fn new(plan: ImagePlan) -> Self {
        Self { plan, l1: Vec::new(), cursor: Cursor::default() }
    }

    /// `n` contiguous clusters.
    pub fn allocate(&mut self, n: u64) -> Result<ClusterIndex> {
        self.cursor.allocate(&mut self.plan, n)
    }

    /// Counts clusters as used that have refcount blocks already.
    pub fn take(&mut self, start: ClusterIndex, n: u64) -> Result<()> {
        self.plan.take(start, n)
    }

    /// See [`Cursor::reserve_area`].
    pub fn reserve_area(&mut self, start: ClusterIndex, extra: u64) -> Result<ClusterIndex> {
        self.cursor.reserve_area(&mut self.plan, start, extra)
    }
}

/// Writes that follow each other are put together.
#[derive(Debug)]
pub struct Batch {
    file: Arc<dyn Storage>,
    at: u64,
    held: Vec<u8>,
}

impl Batch {
    const MOST: usize = 1 << 20;

    /// Nothing is held.
    pub fn new(file: Arc<dyn Storage>) -> Self {
        Self { file, at: 0, held: Vec::new() }
    }

    /// Bytes for a place in the file.
    pub fn put(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        if at != self.at + self.held.len() as u64 || self.held.len() >= Self::MOST {
            self.finish()?;
            self.at = at;
        }
        if self.held.is_empty() && bytes.len() >= Self::MOST {
            return self.file.write_at(at, bytes).with_context(|| format!("error while writing at byte {at}"));
        }
        self.held.extend_from_slice(bytes);
        Ok(())
    }

    /// Writes what is held.
    pub fn finish(&mut self) -> Result<()> {
        if !self.held.is_empty() {
            let at = self.at;
            self.file.write_at(at, &self.held).with_context(|| format!("error while writing at byte {at}"))?;
            self.held.clear();
        }
        Ok(())
    }
}

fn bytes(n: u64) -> Result<usize> {
    usize::try_from(n).map_err(|_| Error::invalid("a table is too large"))
}
