//! From one state of the image to another in a single write: what snapshots need, for they change the refcounts of
//! everything, and with them the mark in every entry that its cluster has a refcount of one. The two lie in different
//! places, so that no order of writes in place keeps them right together.
//!
//! Whatever changes (refcount blocks, their table, L2 tables whose marks change, L1 tables, the snapshot table) is
//! written to free clusters, and flushed; then the header, whose fields for all of this and for the disk's size lie in
//! one sector, changes over; then what is not used any more is given back to the host.
//!
//! Invariants: until the header is written nothing that the old state uses or counts is touched, from then on it is the
//! new state: an image that stops at any write is one of the two, whole. `alloc` is held throughout, and no table in the
//! cache is dirty.
//!
//! Source: specification, sections "Snapshots", "Host cluster management", "Cluster mapping".

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::storage::Event;

use super::Qcow2Driver;
use super::alloc::Allocator;
use super::counts::Counts;
use super::geometry::{ClusterIndex, Geometry};
use super::layout::{COMPRESSED, COPIED, ENTRY, MAX_REFCOUNT_TABLE_BYTES, OFFSET_MASK};
use super::refcount;
use super::references::References;
use super::snapshot_table::{SNAPSHOT_TABLE, Snapshot, table_bytes};
use super::space::ClusterSpace;
use super::tables::{Table, TableKind};

/// Most bytes of refcount blocks that are looked at together.
const LOOKED_AT: usize = 16 << 20;
/// Host offsets have 56 bits.
const HOST_BITS: u32 = 56;

/// The state that is wanted.
pub(super) struct NewState {
    /// The disk's L1 table. Marks do not matter.
    pub l1: Vec<u64>,
    /// The disk's size in bytes.
    pub size: u64,
    /// All snapshots, if they change; the L1 table of one whose offset is 0 is a copy of `l1`.
    pub snapshots: Option<Vec<Snapshot>>,
    /// An L1 table that refers to things from now on, or once more.
    pub gains: Option<Vec<u64>>,
    /// One that does so no more.
    pub loses: Option<Vec<u64>>,
    /// What is not used any more beside that: offset and length in bytes.
    pub unused: Vec<(u64, u64)>,
}

/// References that come and go. What is new is one that comes.
struct Change<'a> {
    driver: &'a Qcow2Driver,
    more: References,
    fewer: References,
    /// Refcount blocks that were looked at, by their index.
    seen: HashMap<u64, Vec<u8>>,
    /// Where the next search for free clusters starts.
    next: ClusterIndex,
}

impl Change<'_> {
    fn geometry(&self) -> Geometry {
        self.driver.geometry
    }

    /// A refcount as it is.
    fn old_count(&mut self, cluster: ClusterIndex) -> Result<u64> {
        let order = self.geometry().refcount_order;
        let (block, index) = self.geometry().refcount_of(cluster);
        let index = usize::try_from(index).unwrap_or(usize::MAX);
        if let Some(bytes) = self.seen.get(&block) {
            return Ok(refcount::get(order, bytes, index));
        }
        let bytes = self.old_block(block)?;
        let count = refcount::get(order, &bytes, index);
        if (self.seen.len() + 1).saturating_mul(bytes.len()) > LOOKED_AT {
            self.seen.clear();
        }
        self.seen.insert(block, bytes);
        Ok(count)
    }

    fn old_block(&self, index: u64) -> Result<Vec<u8>> {
        let len = usize::try_from(self.geometry().cluster_size()).unwrap_or(0);
        let Some(block) = self.driver.block_of(index)? else { return Ok(vec![0; len]) };
        let mut bytes = Vec::with_capacity(len);
        self.driver.each_piece(block, |_, piece| bytes.extend_from_slice(piece))?;
        Ok(bytes)
    }

    /// A refcount as it will be.
    fn new_count(&mut self, cluster: ClusterIndex) -> Result<u64> {
        let (more, fewer) = (u64::from(self.more.get(cluster)), u64::from(self.fewer.get(cluster)));
        let count = self.old_count(cluster)?.checked_add(more).and_then(|count| count.checked_sub(fewer));
        count.ok_or_else(|| self.driver.corrupt(format!("refcount below zero near cluster {cluster}")))
    }

    /// What an L1 table and the L2 tables that it names refer to, once more or once less.
    fn count(&mut self, l1: &[u64], gained: bool) -> Result<()> {
        let geometry = self.geometry();
        let known = geometry.first_counted(self.driver.refcount_table().len / ENTRY);
        let mut tables = BTreeSet::new();
        for at in l1.iter().map(|entry| entry & OFFSET_MASK).filter(|at| *at != 0) {
            if geometry.in_cluster(at) != 0 || !tables.insert(at) {
                return Err(self.driver.corrupt(format!("L2 table offset {at:#x} is unaligned, or named twice")));
            }
            let mut runs = vec![(geometry.cluster_of(at), geometry.cluster_of(at))];
            let mut wrong = None;
            each_entry(self.driver, at, |_, word| {
                let (at, len) = match word & COMPRESSED {
                    _ if self.driver.external => return,
                    0 if word & OFFSET_MASK == 0 => return,
                    0 => (word & OFFSET_MASK, 1),
                    _ => geometry.compressed(word),
                };
                if word & COMPRESSED == 0 && geometry.in_cluster(at) != 0 {
                    wrong.get_or_insert(at);
                }
                let (first, last) = (geometry.cluster_of(at), geometry.cluster_of(at.saturating_add(len - 1)));
                match runs.last_mut() {
                    Some(run) if run.1 + 1 == first => run.1 = last,
                    _ => runs.push((first, last)),
                }
            })?;
            if let Some(at) = wrong {
                return Err(self.driver.corrupt(format!("Data cluster offset {at:#x} unaligned")));
            }
            for (first, last) in runs {
                if last >= known {
                    return Err(self.driver.corrupt(format!("cluster {last} is in use and has no refcount")));
                }
                if gained { self.more.add(first, last, 1) } else { self.fewer.add(first, last, 1) }
            }
        }
        Ok(())
    }

    /// Refuses what is referred to and has no count. Before anything new is counted.
    fn check_old(&mut self) -> Result<()> {
        let gained: Vec<ClusterIndex> = self.more.all().map(|(cluster, _)| cluster).collect();
        for cluster in gained {
            if self.old_count(cluster)? == 0 {
                return Err(self.driver.corrupt(format!("cluster {cluster} is in use and has a refcount of 0")));
            }
        }
        Ok(())
    }

    /// Refuses counts that there is no room for, or that would be below zero.
    fn check_new(&mut self) -> Result<()> {
        let most = self.geometry().refcount_max();
        let gained: Vec<ClusterIndex> = self.more.all().map(|(cluster, _)| cluster).collect();
        for cluster in gained {
            if self.new_count(cluster)? > most {
                return Err(Error::invalid("Invalid argument"));
            }
        }
        let lost: Vec<ClusterIndex> = self.fewer.all().map(|(cluster, _)| cluster).collect();
        lost.into_iter().try_for_each(|cluster| self.new_count(cluster).map(|_| ()))
    }

    /// Free clusters, used `times` from now on; gives their offset.
    fn take(&mut self, n: u64, times: u32) -> Result<u64> {
        let start = Counts(self.driver).find_free(self.next, n)?;
        let end = Some(start + n).filter(|end| *end <= self.geometry().cluster_of(1 << HOST_BITS));
        self.next = end.ok_or_else(|| Error::invalid("File too large"))?;
        self.driver.guard(start, n)?;
        if n > 0 {
            self.more.add(start, start + (n - 1), times);
        }
        Ok(self.geometry().offset_of(start))
    }

    /// Room for bytes; no bytes need none.
    fn take_bytes(&mut self, len: u64) -> Result<u64> {
        if len == 0 { Ok(0) } else { self.take(len.div_ceil(self.geometry().cluster_size()), 1) }
    }

    fn give(&mut self, at: u64, len: u64, times: u32) {
        if len > 0 {
            let geometry = self.geometry();
            self.fewer.add(geometry.cluster_of(at), geometry.cluster_of(at.saturating_add(len - 1)), times);
        }
    }

    /// An entry of an L2 table with the mark that it will have.
    fn marked(&mut self, word: u64) -> Result<u64> {
        let host = word & OFFSET_MASK;
        if self.driver.external || word & COMPRESSED != 0 || host == 0 {
            return Ok(word);
        }
        let own = self.new_count(self.geometry().cluster_of(host))? == 1;
        Ok(if own { word | COPIED } else { word & !COPIED })
    }

    /// Whether a mark in an L2 table changes.
    fn changes(&mut self, at: u64) -> Result<bool> {
        let mut words = Vec::new();
        each_entry(self.driver, at, |_, word| words.push(word))?;
        for word in words {
            if self.marked(word)? != word {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// An L2 table with the marks that it will have.
    fn l2_bytes(&mut self, at: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.driver.each_piece(self.driver.l2(at), |_, piece| bytes.extend_from_slice(piece))?;
        let step = usize::try_from(self.geometry().l2_entry()).unwrap_or(usize::MAX);
        for entry in bytes.chunks_exact_mut(step) {
            if let Some(word) = entry.first_chunk_mut() {
                *word = self.marked(u64::from_be_bytes(*word))?.to_be_bytes();
            }
        }
        Ok(bytes)
    }

    /// Where the refcount blocks that change go, and the refcount table: offset and length in clusters.
    fn place_counts(&mut self) -> Result<(BTreeMap<u64, u64>, (u64, u64))> {
        let (geometry, old) = (self.geometry(), self.driver.refcount_table());
        let per_block = geometry.refcounts_per_block();
        self.give(old.at, old.len, 1);
        let mut blocks: BTreeMap<u64, u64> = BTreeMap::new();
        let mut table: Option<(u64, u64)> = None;
        loop {
            let mut touched: BTreeSet<u64> = self.more.units(per_block).into_iter().collect();
            touched.extend(self.fewer.units(per_block));
            touched.retain(|index| !blocks.contains_key(index));
            for index in &touched {
                let at = self.take(1, 1)?;
                blocks.insert(*index, at);
                if let Some(old) = self.driver.block_of(*index)? {
                    self.give(old.at, old.len, 1);
                }
            }
            let entries = blocks.keys().next_back().map_or(0, |last| last + 1);
            let clusters = (entries * ENTRY).max(old.len).div_ceil(geometry.cluster_size());
            match table {
                Some((at, n)) if touched.is_empty() && n >= clusters => return Ok((blocks, (at, n))),
                Some((_, n)) if n >= clusters => {}
                _ if !touched.is_empty() && table.is_none() => {}
                _ => {
                    if clusters * geometry.cluster_size() > MAX_REFCOUNT_TABLE_BYTES.max(old.len) {
                        return Err(Error::invalid("File too large"));
                    }
                    if let Some((at, n)) = table {
                        let first = geometry.cluster_of(at);
                        self.more.clear(first, first + (n - 1));
                    }
                    table = Some((self.take(clusters, 1)?, clusters));
                }
            }
        }
    }

    /// A refcount block as it will be.
    fn block_bytes(&self, index: u64) -> Result<Vec<u8>> {
        let (order, per_block) = (self.geometry().refcount_order, self.geometry().refcounts_per_block());
        let first = self.geometry().first_counted(index);
        let mut bytes = self.old_block(index)?;
        let more = self.more.range(first, first + per_block);
        let fewer = self.fewer.range(first, first + per_block).filter(|(cluster, _)| self.more.get(*cluster) == 0);
        for (cluster, _) in more.chain(fewer) {
            let slot = usize::try_from(cluster.since(first)).unwrap_or(usize::MAX);
            let (more, fewer) = (u64::from(self.more.get(cluster)), u64::from(self.fewer.get(cluster)));
            let count = refcount::get(order, &bytes, slot).saturating_add(more).saturating_sub(fewer);
            refcount::set(order, &mut bytes, slot, count);
        }
        Ok(bytes)
    }
}

impl Qcow2Driver {
    /// See the module. What cannot be is refused before anything is written.
    pub(super) fn change_state(&self, alloc: &mut Allocator, state: NewState) -> Result<()> {
        self.settle(alloc)?;
        let (geometry, cluster) = (self.geometry, self.geometry.cluster_size());
        let storage = &self.file().storage;
        let counted = || References::new(geometry.cluster_of(1 << HOST_BITS), u64::from(u32::MAX));
        let mut change = Change {
            driver: self,
            more: counted(),
            fewer: counted(),
            seen: HashMap::new(),
            next: alloc.cursor.position(),
        };
        if let Some(l1) = &state.gains {
            change.count(l1, true)?;
        }
        if let Some(l1) = &state.loses {
            change.count(l1, false)?;
        }
        for (at, len) in &state.unused {
            change.give(*at, *len, 1);
        }
        change.check_old()?;
        change.check_new()?;

        // From here on to the header only free clusters are written to.
        let mut snapshots = state.snapshots;
        let copy = snapshots.iter_mut().flatten().find(|one| one.fields.l1_table_offset == 0 && one.fields.l1_size > 0);
        let tables = if copy.is_some() { 2 } else { 1 };
        let mut moved: BTreeMap<u64, u64> = BTreeMap::new();
        for at in state.l1.iter().map(|entry| entry & OFFSET_MASK).filter(|at| *at != 0) {
            if change.changes(at)? {
                let new = change.take(1, tables)?;
                change.give(at, cluster, tables);
                moved.insert(at, new);
            }
        }
        let mut l1 = Vec::with_capacity(state.l1.len());
        for at in state.l1.iter().map(|entry| entry & OFFSET_MASK) {
            let at = moved.get(&at).copied().unwrap_or(at);
            let own = at != 0 && change.new_count(geometry.cluster_of(at))? == 1;
            l1.push(if own { at | COPIED } else { at });
        }
        let l1 = bytes_of(&l1);
        let mut writes: Vec<(&'static str, u64, Vec<u8>)> = Vec::new();
        if let Some(snapshot) = copy {
            let at = change.take_bytes(l1.len() as u64)?;
            snapshot.fields.l1_table_offset = at;
            // What its entries refer to is the disk's as well: they have no marks either.
            writes.push(("L1 table", at, l1.clone()));
        }
        let old = self.l1();
        change.give(old.at, old.len, 1);
        let l1_at = change.take_bytes(l1.len() as u64)?;
        let l1_size = u32::try_from(l1.len() as u64 / ENTRY).map_err(|_| Error::invalid("File too large"))?;
        writes.push(("L1 table", l1_at, l1));
        let mut directory = None;
        if let Some(snapshots) = &mut snapshots {
            for one in snapshots.iter_mut() {
                *one = one.completed(state.size)?;
            }
            let fields = self.header().fields;
            let old: u64 = self.snapshot_list().iter().map(Snapshot::bytes).sum();
            // Its last entry may be followed by nothing.
            change.give(fields.snapshots_offset, old.saturating_sub(7), 1);
            let bytes = table_bytes(snapshots, state.size)?;
            let at = change.take_bytes(bytes.len() as u64)?;
            let count = u32::try_from(snapshots.len()).map_err(|_| Error::invalid("File too large"))?;
            directory = Some((at, count));
            writes.push((SNAPSHOT_TABLE, at, bytes));
        }
        let (blocks, (table_at, table_clusters)) = change.place_counts()?;
        let table_clusters = u32::try_from(table_clusters).map_err(|_| Error::invalid("File too large"))?;
        change.check_new()?;

        for (old, new) in &moved {
            let bytes = change.l2_bytes(*old)?;
            storage.announce(Event::L2_UPDATE);
            self.file().write_metadata("L2 table", *new, &bytes)?;
        }
        for (index, at) in &blocks {
            let bytes = change.block_bytes(*index)?;
            storage.announce(Event::REFBLOCK_UPDATE_PART);
            self.file().write_metadata("refcount block", *at, &bytes)?;
        }
        let old = self.refcount_table();
        let entries = u64::from(table_clusters) * cluster / ENTRY;
        let mut table = Vec::new();
        for index in 0..entries {
            table.push(match blocks.get(&index) {
                Some(at) => *at,
                None if index < old.len / ENTRY => self.tables.get(old, index)?,
                None => 0,
            });
        }
        writes.push(("refcount table", table_at, bytes_of(&table)));
        for (what, at, mut bytes) in writes.into_iter().filter(|(_, _, bytes)| !bytes.is_empty()) {
            bytes.resize(bytes.len().next_multiple_of(usize::try_from(cluster).unwrap_or(1)), 0);
            self.file().write_metadata(what, at, &bytes)?;
        }
        storage.flush().context("Could not flush")?;
        self.update_header(|header| {
            let fields = &mut header.fields;
            (fields.l1_table_offset, fields.l1_size) =
                (if l1_size == 0 { fields.l1_table_offset } else { l1_at }, l1_size);
            (fields.refcount_table_offset, fields.refcount_table_clusters) = (table_at, table_clusters);
            (fields.snapshots_offset, fields.nb_snapshots) =
                directory.unwrap_or((fields.snapshots_offset, fields.nb_snapshots));
            fields.size = state.size;
        })?;
        // What is known of the old state is nothing to the new one.
        self.tables.forget(0, u64::MAX);
        alloc.learned = false;
        alloc.packed = None;
        if let Some(snapshots) = snapshots {
            self.set_snapshot_list(snapshots);
        }
        storage.flush().context("Could not write qcow2 header")?;
        storage.announce(Event::CLUSTER_FREE);
        self.give_back(alloc, &change.fewer)
    }

    /// Gives the host back what is free now.
    fn give_back(&self, alloc: &mut Allocator, fewer: &References) -> Result<()> {
        let geometry = self.geometry;
        let mut run: Option<(ClusterIndex, ClusterIndex)> = None;
        let mut free = Vec::new();
        for (cluster, _) in fewer.all() {
            if self.refcount(cluster)? != 0 {
                continue;
            }
            match &mut run {
                Some((_, end)) if *end == cluster => *end = cluster + 1,
                _ => free.extend(run.replace((cluster, cluster + 1))),
            }
        }
        free.extend(run);
        if let Some((first, _)) = free.first() {
            alloc.cursor.freed(*first);
        }
        for (first, end) in free {
            let storage = &self.file().storage;
            let len = end.since(first) * geometry.cluster_size();
            // An offer, which the host need not take.
            let _ = storage.discard(geometry.offset_of(first), len);
        }
        Ok(())
    }
}

/// The words of an L2 table that are entries and not zero, with their index.
fn each_entry(driver: &Qcow2Driver, at: u64, mut look: impl FnMut(u64, u64)) -> Result<()> {
    let step = driver.geometry.l2_entry() / ENTRY;
    driver.each_word(Table { kind: TableKind::L2, at, len: driver.geometry.cluster_size() }, |index, word| {
        if index.is_multiple_of(step) {
            look(index / step, word);
        }
        Ok(())
    })
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}
