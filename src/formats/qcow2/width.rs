//! Refcounts of another width: a table and blocks that are written anew, with the old ones free by their count.
//!
//! They are written to free clusters, which the old ones do not count, and flushed; then the header, which has the width
//! and the table's place in one sector, changes over; then the old ones are given back to the host. An image that stops at
//! any write has the old refcounts or the new ones, whole, and nothing is lost.
//!
//! Source: specification, section "Host cluster management".

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;

use crate::block::driver::AmendProgress;
use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::storage::Event;

use super::Qcow2Driver;
use super::alloc::Allocator;
use super::counts::Counts;
use super::geometry::{ClusterIndex, Geometry};
use super::header::Qcow2Header;
use super::layout::{ENTRY, MAX_REFCOUNT_TABLE_BYTES};
use super::refcount;
use super::space::ClusterSpace;

/// Where the new refcounts go.
struct NewRefcounts<'a> {
    driver: &'a Qcow2Driver,
    new: Geometry,
    /// Blocks: index, cluster.
    blocks: BTreeMap<u64, ClusterIndex>,
    /// First cluster of the table, and how many it has.
    table: (ClusterIndex, u64),
    /// Clusters of the old ones.
    old: BTreeSet<ClusterIndex>,
    /// Where the next search for free clusters starts.
    next: ClusterIndex,
}

/// How often the reference goes through the entries of the refcount table, which is what its progress counts.
const PASSES: u64 = 3;

impl NewRefcounts<'_> {
    /// The clusters of the old table and blocks.
    fn find_old(&mut self) -> Result<()> {
        let (driver, geometry) = (self.driver, self.new);
        let table = driver.refcount_table();
        self.old.extend(geometry.cluster_of(table.at).run(table.len / geometry.cluster_size()));
        for index in 0..table.len / ENTRY {
            if let Some(block) = driver.block_of(index)? {
                self.old.insert(geometry.cluster_of(block.at));
            }
        }
        match self
            .old
            .iter()
            .map(|cluster| driver.refcount(*cluster).map(|count| (*cluster, count)))
            .find(|found| !matches!(found, Ok((_, 1))))
        {
            None => Ok(()),
            Some(Err(error)) => Err(error),
            Some(Ok((cluster, count))) => Err(driver
                .corrupt(format!("Refcounts at offset {:#x} have a refcount of {count}", geometry.offset_of(cluster)))),
        }
    }

    /// Looks at every count that there is. What is left is the blocks that have something to count.
    fn find_needed(&self, progress: AmendProgress<'_>) -> Result<BTreeSet<u64>> {
        let (driver, order, most) = (self.driver, self.driver.geometry.refcount_order, self.new.refcount_max());
        let old = driver.geometry;
        let entries = driver.refcount_table().len / ENTRY;
        let mut needed = BTreeSet::new();
        for index in 0..entries {
            progress(index, entries * PASSES)?;
            let Some(bytes) = self.old_block(index)? else { continue };
            for (slot, cluster) in (0..).zip(old.first_counted(index).run(old.refcounts_per_block())) {
                let count = refcount::get(order, &bytes, slot);
                if count > most {
                    let (bits, at) = (self.new.refcount_bits(), self.new.offset_of(cluster));
                    return Err(Error::invalid(format!(
                        "Cannot decrease refcount entry width to {bits} bits: Cluster at offset {at:#x} has a refcount \
                         of {count}"
                    )));
                }
                if count > 0 && !self.old.contains(&cluster) {
                    needed.insert(self.new.refcount_of(cluster).0);
                }
            }
        }
        Ok(needed)
    }

    fn old_block(&self, index: u64) -> Result<Option<Vec<u8>>> {
        let Some(block) = self.driver.block_of(index)? else { return Ok(None) };
        let mut bytes = Vec::with_capacity(usize::try_from(block.len).unwrap_or(0));
        self.driver.each_piece(block, |_, piece| bytes.extend_from_slice(piece))?;
        Ok(Some(bytes))
    }

    /// Free clusters, by the old refcounts.
    fn take(&mut self, n: u64) -> Result<ClusterIndex> {
        let start = Counts(self.driver).find_free(self.next, n)?;
        let most = self.new.cluster_of(1 << 56);
        self.next = Some(start + n).filter(|end| *end <= most).ok_or_else(|| Error::invalid("File too large"))?;
        self.driver.guard(start, n)?;
        Ok(start)
    }

    /// Finds a place for the blocks that are needed, for those that count these, and for the table.
    fn place(&mut self, mut needed: BTreeSet<u64>) -> Result<()> {
        let cluster = self.new.cluster_size();
        loop {
            while let Some(index) = needed.pop_first() {
                if !self.blocks.contains_key(&index) {
                    let at = self.take(1)?;
                    self.blocks.insert(index, at);
                    needed.insert(self.new.refcount_of(at).0);
                }
            }
            let entries = self.blocks.keys().next_back().map_or(0, |last| last + 1);
            let clusters = (entries * ENTRY).div_ceil(cluster).max(1);
            if clusters * cluster > MAX_REFCOUNT_TABLE_BYTES {
                return Err(Error::invalid("The refcount table would be too large"));
            }
            let (start, n) = self.table;
            if n >= clusters {
                return Ok(());
            }
            let start = if n > 0 && self.next == start + n { start } else { self.next };
            self.next = start;
            self.table = (self.take(clusters)?, clusters);
            let (first, last) = (self.table.0, self.table.0 + (clusters - 1));
            needed.extend(self.new.refcount_of(first).0..=self.new.refcount_of(last).0);
        }
    }

    /// A new block, without what the new ones themselves use.
    fn counts_of(&self, index: u64, from: &mut Option<(u64, Vec<u8>)>) -> Result<Vec<u8>> {
        let (old_geometry, per) = (self.driver.geometry, self.new.refcounts_per_block());
        let mut bytes = vec![0; usize::try_from(self.new.cluster_size()).unwrap_or(0)];
        for (slot, cluster) in (0..).zip(self.new.first_counted(index).run(per)) {
            let (block, old_slot) = old_geometry.refcount_of(cluster);
            if from.as_ref().is_none_or(|(is, _)| *is != block) {
                *from = Some((block, self.old_block(block)?.unwrap_or_default()));
            }
            let Some((_, old)) = from.as_ref().filter(|(_, old)| !old.is_empty()) else { continue };
            let old_slot = usize::try_from(old_slot).unwrap_or(usize::MAX);
            let count = refcount::get(old_geometry.refcount_order, old, old_slot);
            if count > 0 && !self.old.contains(&cluster) {
                refcount::set(self.new.refcount_order, &mut bytes, slot, count);
            }
        }
        Ok(bytes)
    }

    /// Writes all of it, and flushes. Gives what there is left to tell of its progress.
    fn write(&self, progress: AmendProgress<'_>) -> Result<RangeInclusive<u64>> {
        let storage = &self.driver.file().storage;
        let (new, per) = (self.new, self.new.refcounts_per_block());
        let own: BTreeSet<ClusterIndex> = self.blocks.values().copied().chain(self.table.0.run(self.table.1)).collect();
        let bytes = self.table.1.saturating_mul(new.cluster_size());
        let (mut from, mut table) = (None, vec![0; usize::try_from(bytes).unwrap_or(0)]);
        let (total, entries) = (self.blocks.len() as u64, self.driver.refcount_table().len / ENTRY);
        let mut told = entries;
        for (n, (index, at)) in (0..).zip(&self.blocks) {
            // They stand for all passes but the first.
            let done = entries + entries.saturating_mul(PASSES - 1).saturating_mul(n) / total;
            (told..=done).try_for_each(|done| progress(done, entries * PASSES))?;
            told = done + 1;
            let mut bytes = self.counts_of(*index, &mut from)?;
            let first = new.first_counted(*index);
            for cluster in own.range(first..first + per) {
                let slot = usize::try_from(cluster.since(first)).unwrap_or(usize::MAX);
                refcount::set(self.new.refcount_order, &mut bytes, slot, 1);
            }
            storage.announce(Event::REFBLOCK_UPDATE_PART);
            self.driver.file().write_metadata("refcount block", new.offset_of(*at), &bytes)?;
            let entry = usize::try_from(index * ENTRY).unwrap_or(usize::MAX);
            if let Some(entry) = table.get_mut(entry..).and_then(|rest| rest.first_chunk_mut()) {
                *entry = new.offset_of(*at).to_be_bytes();
            }
        }
        storage.announce(Event::REFTABLE_UPDATE);
        self.driver.file().write_metadata("refcount table", new.offset_of(self.table.0), &table)?;
        storage.flush().context("Could not flush")?;
        Ok(told..=entries * PASSES)
    }
}

impl Qcow2Driver {
    fn new_refcounts(&self, order: u32) -> Result<NewRefcounts<'_>> {
        let new = Geometry { refcount_order: order, ..self.geometry };
        let (blocks, old) = (BTreeMap::new(), BTreeSet::new());
        let mut plan =
            NewRefcounts { driver: self, new, blocks, table: (ClusterIndex(0), 0), old, next: ClusterIndex(0) };
        plan.find_old()?;
        Ok(plan)
    }

    /// Refuses a width that a refcount does not fit in.
    pub(super) fn check_width(&self, order: u32) -> Result<()> {
        self.new_refcounts(order)?.find_needed(&|_, _| Ok(())).map(drop)
    }

    /// Writes refcounts of another width. `change` is what else the header changes at the same time, the width among it.
    /// The layer is not used any more then: it has the old one.
    pub(super) fn change_width(
        &self,
        alloc: &mut Allocator,
        order: u32,
        progress: AmendProgress<'_>,
        change: impl FnOnce(&mut Qcow2Header),
    ) -> Result<()> {
        self.before_resize(alloc)?;
        self.settle(alloc)?;
        let mut plan = self.new_refcounts(order)?;
        let new = plan.new;
        let needed = plan.find_needed(progress)?;
        plan.place(needed)?;
        let left = plan.write(progress)?;
        let clusters = u32::try_from(plan.table.1).map_err(|_| Error::invalid("File too large"))?;
        self.update_header(|header| {
            header.fields.refcount_table_offset = new.offset_of(plan.table.0);
            header.fields.refcount_table_clusters = clusters;
            change(header);
        })?;
        self.tables.forget(0, u64::MAX);
        let storage = &self.file().storage;
        storage.flush().context("Could not write qcow2 header")?;
        storage.announce(Event::CLUSTER_FREE);
        for cluster in &plan.old {
            // An offer, which the host need not take.
            let _ = storage.discard(new.offset_of(*cluster), new.cluster_size());
        }
        // It is done, whatever is wanted by now.
        let total = *left.end();
        for done in left {
            let _ = progress(done, total);
        }
        Ok(())
    }
}
