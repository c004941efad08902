//! The refcounts of an open image: read and changed through the table cache.
//!
//! Invariants: a refcount is raised before an entry that needs it is set, and lowered only after the entries that no
//! longer point there are in the file (`alloc.rs` keeps what waits for that). The caller holds the allocator.

use crate::block::error::Context;
use crate::block::{Error, Result, number};

use super::Qcow2Driver;
use super::geometry::{ClusterIndex, Geometry};
use super::guard;
use super::layout::{self, REFCOUNT_OFFSET_MASK};
use super::refcount;
use super::space::{ClusterSpace, Freed, Growth};
use super::tables::{Table, TableKind};

/// Refcounts are changed in pieces of at most that many bytes; a piece lies in one slice of the cache.
const PIECE: u64 = 512;

impl Qcow2Driver {
    /// The block that has a cluster's refcount, if it exists.
    pub(super) fn block_of(&self, index: u64) -> Result<Option<Table>> {
        let table = self.refcount_table();
        if index >= table.len / layout::ENTRY {
            return Ok(None);
        }
        let at = self.tables.get(table, index)? & REFCOUNT_OFFSET_MASK;
        if self.geometry.in_cluster(at) != 0 {
            return Err(self
                .corrupt(format!("Refblock offset {at:#x} unaligned (reftable index: {})", number::prefixed(index))));
        }
        Ok((at != 0).then(|| self.refcount_block(at)))
    }

    /// An image that cannot be written to safely is marked as corrupt, as the reference does.
    pub(super) fn corrupt(&self, what: String) -> Error {
        if self.geometry.version >= 3 && self.header().fields.incompatible & layout::CORRUPT == 0 {
            // The mark is a courtesy: what is wrong is said in any case.
            let _ = self.update_header(|header| header.fields.incompatible |= layout::CORRUPT);
        }
        Error::corrupt(format!("qcow2: {what}; image marked as corrupt"))
    }

    /// A cluster's refcount.
    pub(super) fn refcount(&self, cluster: ClusterIndex) -> Result<u64> {
        let (block, index) = self.geometry.refcount_of(cluster);
        let Some(block) = self.block_of(block)? else { return Ok(0) };
        let order = self.geometry.refcount_order;
        let (from, first) = byte_of(order, index);
        self.tables.view(block, from, |bytes| refcount::get(order, bytes, first))
    }

    /// Changes the refcounts of clusters whose blocks exist; `change` gives the new one or what is wrong.
    pub(super) fn change_refcounts(
        &self,
        start: ClusterIndex,
        n: u64,
        change: impl Fn(u64) -> std::result::Result<u64, &'static str>,
    ) -> Result<()> {
        let (order, per_block) = (self.geometry.refcount_order, self.geometry.refcounts_per_block());
        let per_piece = (PIECE * 8) >> order;
        let end = start + n;
        let mut cluster = start;
        while cluster < end {
            let (block, index) = self.geometry.refcount_of(cluster);
            let block = self.block_of(block)?;
            let block = block.ok_or_else(|| self.corrupt(format!("no refcount block for cluster {cluster}")))?;
            let first = index % per_piece;
            let count = (per_piece - first).min(end.since(cluster)).min(per_block - index);
            let from = (index - first) * u64::from(self.geometry.refcount_bits()) / 8;
            let len = PIECE.min(block.len - from);
            let wrong = self.tables.change(block, from, len, |bytes| {
                for index in first..first + count {
                    let index = index as usize;
                    match change(refcount::get(order, bytes, index)) {
                        Ok(value) => refcount::set(order, bytes, index, value),
                        Err(text) => return Some(text),
                    }
                }
                None
            })?;
            if let Some(text) = wrong {
                return Err(self.corrupt(format!("{text} near cluster {cluster}")));
            }
            cluster = cluster + count;
        }
        Ok(())
    }

    /// One reference more; false if the width has no room for it.
    pub(super) fn raise(&self, cluster: ClusterIndex) -> Result<bool> {
        if self.refcount(cluster)? >= self.geometry.refcount_max() {
            return Ok(false);
        }
        self.change_refcounts(cluster, 1, |count| Ok(count + 1))?;
        Ok(true)
    }

    /// One reference less for each; gives those that became free, as runs.
    pub(super) fn lower(&self, start: ClusterIndex, n: u64) -> Result<Vec<(ClusterIndex, u64)>> {
        self.change_refcounts(start, n, |count| count.checked_sub(1).ok_or("refcount below zero"))?;
        let mut free: Vec<(ClusterIndex, u64)> = Vec::new();
        for cluster in start.run(n) {
            if self.refcount(cluster)? == 0 {
                match free.last_mut() {
                    Some((first, count)) if *first + *count == cluster => *count += 1,
                    _ => free.push((cluster, 1)),
                }
            }
        }
        Ok(free)
    }
}

/// The byte from which a refcount is read, and its index from there.
fn byte_of(order: u32, index: u64) -> (u64, usize) {
    if order < 3 {
        let per_byte = 8 >> order;
        (index / per_byte, (index % per_byte) as usize)
    } else {
        (index << (order - 3), 0)
    }
}

/// The refcounts as a [`ClusterSpace`].
pub struct Counts<'a>(pub &'a Qcow2Driver);

impl ClusterSpace for Counts<'_> {
    fn geometry(&self) -> Geometry {
        self.0.geometry
    }

    fn find_free(&mut self, ClusterIndex(from): ClusterIndex, n: u64) -> Result<ClusterIndex> {
        let (driver, order) = (self.0, self.0.geometry.refcount_order);
        let per_block = driver.geometry.refcounts_per_block();
        let blocks = self.table_entries();
        let (mut start, mut cluster) = (from, from);
        while cluster - start < n {
            let index = cluster / per_block;
            if index >= blocks {
                break;
            }
            let next = (index + 1).saturating_mul(per_block);
            let Some(block) = driver.block_of(index)? else {
                cluster = next;
                continue;
            };
            let (byte, skip) = byte_of(order, cluster % per_block);
            (start, cluster) = driver.tables.view(block, byte, |bytes| {
                let count = ((bytes.len() as u64 * 8) >> order).min(next - cluster + skip as u64);
                let (mut start, mut cluster) = (start, cluster);
                for index in skip..usize::try_from(count).unwrap_or(skip) {
                    cluster += 1;
                    if refcount::get(order, bytes, index) != 0 {
                        start = cluster;
                    } else if cluster - start >= n {
                        break;
                    }
                }
                (start, cluster)
            })?;
        }
        Ok(ClusterIndex(start))
    }

    fn has_block(&mut self, index: u64) -> Result<bool> {
        Ok(self.0.block_of(index)?.is_some())
    }

    fn table_entries(&self) -> u64 {
        self.0.refcount_table().len / layout::ENTRY
    }

    fn take(&mut self, start: ClusterIndex, n: u64) -> Result<()> {
        self.0.guard(start, n)?;
        self.0.took(start);
        self.0.change_refcounts(start, n, |count| if count == 0 { Ok(1) } else { Err("cluster given out twice") })
    }

    fn put_block(&mut self, index: u64, cluster: ClusterIndex) -> Result<()> {
        let driver = self.0;
        driver.guard(cluster, 1)?;
        let at = driver.geometry.offset_of(cluster);
        driver.tables.fresh(driver.refcount_block(at))?;
        driver.new_block(at);
        driver.tables.set(driver.refcount_table(), index, at)
    }

    fn replace_table(&mut self, growth: &Growth) -> Result<Freed> {
        let driver = self.0;
        let geometry = driver.geometry;
        let old = driver.refcount_table();
        for (start, n) in &growth.taken {
            driver.guard(*start, *n)?;
        }
        driver.tables.write_back()?;
        let new = Table {
            kind: TableKind::RefcountTable,
            at: geometry.offset_of(growth.table),
            len: growth.clusters * geometry.cluster_size(),
        };
        driver.tables.fresh(new)?;
        for index in 0..(old.len / layout::ENTRY).min(new.len / layout::ENTRY) {
            let entry = driver.tables.get(old, index)?;
            if entry != 0 {
                driver.tables.set(new, index, entry)?;
            }
        }
        for (index, cluster) in &growth.blocks {
            let at = geometry.offset_of(*cluster);
            driver.tables.fresh(driver.refcount_block(at))?;
            driver.tables.set(new, *index, at)?;
            driver.add_metadata(at, guard::BLOCK);
        }
        // The new blocks are found through the new table alone; nothing of it is in the header yet.
        driver.swap_refcount_table(new.at, growth.clusters);
        let counted = growth.taken.iter().try_for_each(|(start, n)| {
            driver.change_refcounts(*start, *n, |count| if count == 0 { Ok(1) } else { Err("cluster in use") })
        });
        let written = counted.and_then(|()| driver.tables.write_back()).and_then(|()| {
            driver.file().storage.flush().context("Could not write refcount table")?;
            driver.update_header(|_| ())?;
            driver.file().storage.flush().context("Could not write qcow2 header")
        });
        if let Err(error) = written {
            driver.swap_refcount_table(old.at, old.len / geometry.cluster_size());
            return Err(error);
        }
        driver.tables.forget(old.at, old.len);
        let first = geometry.cluster_of(old.at);
        driver.lower(first, old.len / geometry.cluster_size())?;
        Ok(Freed(first))
    }
}

impl Qcow2Driver {
    /// Changes where the refcount table is, in memory alone.
    fn swap_refcount_table(&self, at: u64, clusters: u64) {
        let mut header = self.header.write().unwrap_or_else(|e| e.into_inner());
        header.fields.refcount_table_offset = at;
        header.fields.refcount_table_clusters = u32::try_from(clusters).unwrap_or(u32::MAX);
    }
}
