//! Which cluster comes next: the one rule by which clusters are given out.
//!
//! The rule is the reference's, measured: the first run of free clusters at or after a cursor; the cursor moves past
//! what was given out and back to what was freed. A refcount block that is missing for a run is put in the first
//! free cluster after that run (where that cluster has no block itself, its own comes first; a block may cover
//! itself), and then the run is looked for again. A refcount table that is too short is replaced by one that lies,
//! with the blocks for itself, just after what the block covers that found no entry.
//!
//! The rule is written over [`ClusterSpace`], so that new images are planned in memory and open images are changed through
//! their tables with the same outcome.

use super::geometry::{ClusterIndex, Geometry};
use super::layout::{ENTRY, MAX_REFCOUNT_TABLE_BYTES};
use crate::block::{Error, Result};

/// Where refcounts are kept.
pub trait ClusterSpace {
    /// Widths and sizes.
    fn geometry(&self) -> Geometry;

    /// The first run of `n` free clusters at or after the cluster `from`.
    fn find_free(&mut self, from: ClusterIndex, n: u64) -> Result<ClusterIndex>;

    /// Whether the refcount block with that index exists.
    fn has_block(&mut self, index: u64) -> Result<bool>;

    /// Entries in the refcount table.
    fn table_entries(&self) -> u64;

    /// Counts free clusters, whose blocks exist, as used once.
    fn take(&mut self, start: ClusterIndex, n: u64) -> Result<()>;

    /// Makes an empty refcount block in a cluster and enters it in the table.
    fn put_block(&mut self, index: u64, cluster: ClusterIndex) -> Result<()>;

    /// Replaces the refcount table by a longer one at a cluster. `blocks` are new, empty refcount blocks (index,
    /// cluster); all of [`Growth::taken`] is counted as used. The old table's clusters are freed.
    fn replace_table(&mut self, growth: &Growth) -> Result<Freed>;
}

/// Clusters that were freed: the cursor goes back to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freed(pub ClusterIndex);

/// A new place for the refcount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Growth {
    /// New blocks: index, cluster.
    pub blocks: Vec<(u64, ClusterIndex)>,
    /// First cluster of the new table.
    pub table: ClusterIndex,
    /// Its length in clusters.
    pub clusters: u64,
    /// Clusters to be counted as used: first, number.
    pub taken: Vec<(ClusterIndex, u64)>,
}

/// Host offsets have 56 bits.
const MAX_HOST: u64 = 1 << 56;

/// Gives out clusters of a [`ClusterSpace`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cursor {
    next: ClusterIndex,
}

impl Cursor {
    /// Searches start at that cluster.
    pub fn at(cluster: ClusterIndex) -> Self {
        Self { next: cluster }
    }

    /// Where the next search starts.
    pub fn position(self) -> ClusterIndex {
        self.next
    }

    /// A cluster became free.
    pub fn freed(&mut self, cluster: ClusterIndex) {
        self.next = self.next.min(cluster);
    }

    /// Gives out `n` contiguous clusters; they are counted as used once.
    pub fn allocate(&mut self, space: &mut dyn ClusterSpace, n: u64) -> Result<ClusterIndex> {
        let geometry = space.geometry();
        loop {
            let start = space.find_free(self.next, n)?;
            let end = start + n;
            if end > geometry.cluster_of(MAX_HOST) {
                return Err(too_large());
            }
            self.next = end;
            if self.cover(space, start, end)? {
                space.take(start, n)?;
                return Ok(start);
            }
            self.freed(start);
        }
    }

    /// Makes the first block that is missing for a run; true if none was.
    fn cover(&mut self, space: &mut dyn ClusterSpace, start: ClusterIndex, end: ClusterIndex) -> Result<bool> {
        let per_block = space.geometry().refcounts_per_block();
        for index in start.0 / per_block..=(end.0 - 1) / per_block {
            if !space.has_block(index)? {
                self.add_block(space, index)?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn add_block(&mut self, space: &mut dyn ClusterSpace, index: u64) -> Result<()> {
        let cluster = space.find_free(self.next, 1)?;
        self.next = cluster + 1;
        let (own, _) = space.geometry().refcount_of(cluster);
        if own != index && !space.has_block(own)? {
            // Whoever wanted this block asks again.
            self.add_block(space, own)?;
            self.freed(cluster);
            return Ok(());
        }
        if index >= space.table_entries() {
            let mut growth =
                plan_growth(space.geometry(), space.geometry().first_counted(index.max(own) + 1), 0, false)?;
            growth.blocks.insert(0, (index, cluster));
            growth.taken.insert(0, (cluster, 1));
            let Freed(old) = space.replace_table(&growth)?;
            self.freed(old);
            return Ok(());
        }
        space.put_block(index, cluster)?;
        space.take(cluster, 1)
    }

    /// Makes refcounts for everything up to `extra` clusters after `start`, an unused cluster with nothing used after
    /// it, by putting the missing blocks and a new table there. Gives the first cluster after these.
    pub fn reserve_area(
        &mut self,
        space: &mut dyn ClusterSpace,
        start: ClusterIndex,
        extra: u64,
    ) -> Result<ClusterIndex> {
        let mut growth = plan_growth(space.geometry(), start, extra, true)?;
        let mut at = start;
        let mut blocks = Vec::new();
        let last = growth.blocks.last().map_or(0, |(index, _)| *index);
        for index in space.geometry().refcount_of(start).0..=last {
            if !space.has_block(index)? {
                blocks.push((index, at));
                at = at + 1;
            }
        }
        growth.blocks = blocks;
        growth.table = at;
        growth.taken = vec![(start, (at + growth.clusters).since(start))];
        let Freed(old) = space.replace_table(&growth)?;
        self.freed(old);
        Ok(at + growth.clusters)
    }
}

fn too_large() -> Error {
    Error::invalid("No space left: a cluster offset needs more than 56 bits")
}

/// A refcount table, with the blocks it needs, that starts at a cluster and covers itself and `extra` clusters more.
/// All blocks of the image are counted in, as the reference does; a table that is not `exact` is half as long again.
fn plan_growth(geometry: Geometry, start: ClusterIndex, extra: u64, exact: bool) -> Result<Growth> {
    let per_block = geometry.refcounts_per_block();
    let per_table = geometry.cluster_size() / ENTRY;
    let (mut blocks, mut clusters) = (0u64, 0u64);
    loop {
        let total = start.0.checked_add(extra).and_then(|n| n.checked_add(blocks + clusters)).ok_or_else(too_large)?;
        let need = total.div_ceil(per_block);
        let entries = if exact { need } else { need + need.div_ceil(2) };
        let table = entries.div_ceil(per_table);
        if (need, table) == (blocks, clusters) {
            break;
        }
        (blocks, clusters) = (need, table);
    }
    if clusters.saturating_mul(geometry.cluster_size()) > MAX_REFCOUNT_TABLE_BYTES {
        return Err(Error::invalid("No space left: the refcount table would be too large"));
    }
    let (first, _) = geometry.refcount_of(start);
    let new: Vec<(u64, ClusterIndex)> =
        (first..blocks).enumerate().map(|(n, index)| (index, start + n as u64)).collect();
    let count = new.len() as u64;
    Ok(Growth { blocks: new, table: start + count, clusters, taken: vec![(start, count + clusters)] })
}
