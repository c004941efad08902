//! Putting right what an unclean end left behind: refcounts are made what the tables say.
//!
//! Everything is looked at, and what is going to be done is decided, before the first write. Refcount blocks and their
//! table are changed where they are if nothing else is there: raised first, lowered last, so that a stop in between
//! leaves leaks at worst. Else new ones are written where nothing is, and the header changes over to them; nothing is
//! written where the old ones were. Where tables of other kinds share a place nothing is changed at all.
//!
//! Memory is a bit for each cluster that is referred to, four bytes where snapshots share them, and a few words for
//! each L2 table.

use std::collections::BTreeMap;

use crate::block::error::Context;
use crate::block::{Error, Result};

use super::Qcow2Driver;
use super::geometry::ClusterIndex;
use super::guard::Survey;
use super::layout::{COPIED, ENTRY, MAX_REFCOUNT_TABLE_BYTES};
use super::refcount;
use super::references::References;
use super::tables::Table;
use super::walk::{Found, MetadataPart, Visitor};

/// Refcounts are compared and changed in pieces of that many bytes, which lie in one slice of the cache.
const PIECE: u64 = 512;

/// What is going to be done about the refcounts.
#[derive(Debug, PartialEq, Eq)]
enum RepairPlan {
    /// The blocks that there are, are all that is needed, and lie where nothing else does.
    InPlace,
    /// Blocks with these indices, and a table behind them, from a cluster on.
    Elsewhere { start: ClusterIndex, blocks: Vec<u64>, table_clusters: u64 },
}

/// Refuses an image whose tables share places, or refer to more than can be counted. Changes nothing.
pub fn refuse_what_cannot_be_repaired(driver: &Qcow2Driver) -> Result<()> {
    count(driver).map(drop)
}

/// What is referred to, and how often, but for the refcount structures.
fn count(driver: &Qcow2Driver) -> Result<(Survey<'_>, References)> {
    driver.bitmaps_apart()?;
    let file = driver.file().storage.len().context("Could not get file size")?;
    let mut count = Count {
        survey: Survey::new(driver, u64::MAX)?,
        references: References::new(ClusterIndex::MAX, u64::from(u32::MAX)),
        end: ClusterIndex(file.div_ceil(driver.geometry.cluster_size())),
        beyond: 0,
    };
    driver.walk(&mut count)?;
    let Count { survey, references, .. } = count;
    if let Some(what) = survey.clash {
        return Err(Error::corrupt(format!(
            "The image was not closed cleanly and cannot be repaired: tables overlap with {what}"
        )));
    }
    // Wherever new refcounts went, what is written next would go behind the end.
    if let Some(missing) = survey.lacking() {
        return Err(missing);
    }
    let most = driver.geometry.refcount_max();
    if let Some((cluster, count)) = references.all().find(|(_, count)| u64::from(*count) > most) {
        return Err(Error::unsupported(format!(
            "The image was not closed cleanly and cannot be repaired: cluster {cluster} needs a refcount of {count}"
        )));
    }
    Ok((survey, references))
}

/// Makes the refcounts of an image whose dirty bit is set what its tables say, and the marks of entries whose cluster
/// is theirs alone what the refcounts say. The dirty bit is the caller's.
pub fn rebuild(driver: &Qcow2Driver) -> Result<()> {
    let (survey, mut references) = count(driver)?;
    let plan = plan(driver, &survey, &mut references)?;
    drop(survey);
    match plan {
        RepairPlan::InPlace => in_place(driver, &references)?,
        RepairPlan::Elsewhere { start, blocks, table_clusters } => {
            elsewhere(driver, &references, start, &blocks, table_clusters)?;
        }
    }
    driver.walk(&mut Marks { driver, references: &references })?;
    driver.tables.write_back()?;
    driver.file().storage.flush().context("Could not flush")
}

/// Counts references; those of the refcount structures apart, for they may be given up.
struct Count<'a> {
    survey: Survey<'a>,
    references: References,
    /// Of the file: the cluster behind its last one.
    end: ClusterIndex,
    /// References to clusters past the end of the file so far.
    beyond: u64,
}

/// Most references to clusters past the end of the file, each of which may take a page of counts.
const MOST_BEYOND: u64 = 1 << 16;

impl Visitor for Count<'_> {
    fn found(&mut self, found: &Found) -> Result<()> {
        self.survey.found(found)?;
        let geometry = self.survey.geometry();
        let aligned = geometry.in_cluster(found.at) == 0;
        match found.part {
            MetadataPart::RefcountTable | MetadataPart::RefcountBlock => return Ok(()),
            MetadataPart::ActiveL2 | MetadataPart::InactiveL2 | MetadataPart::BitmapData if !aligned => {
                let (at, what) = (found.at, found.part.name());
                return Err(Error::corrupt(format!("{what} offset {at:#x} unaligned")));
            }
            _ => {}
        }
        let last = geometry.cluster_of(found.at.saturating_add(found.len - 1));
        let first = geometry.cluster_of(found.at);
        self.beyond = self.beyond.saturating_add((last + 1).since(first.max(self.end)));
        if self.beyond > MOST_BEYOND {
            return Err(Error::corrupt(
                "The image was not closed cleanly and cannot be repaired: too much of it lies past the end of the file",
            ));
        }
        self.references.add(first, last, found.times);
        Ok(())
    }

    fn contents(&self, tables: u64) -> bool {
        self.survey.contents(tables)
    }

    fn too_many(&self) -> Result<()> {
        Err(Error::unsupported("The image was not closed cleanly and has too many snapshots to be repaired"))
    }
}

/// Refcounts that say what `references` does, written anew in room to which it has no reference; then the header changes
/// over to them. The old ones stay what and where they are, counted as `references` has them.
///
/// FreeRoom is taken as the reference takes it: the first there is, for one block after the other, then for the table; but
/// none that `cut` refers to, and all of it below `end`, the first cluster that the file lacks: it must not grow over
/// that, or nobody could tell any more that something is missing. Whether there was room; if not, nothing has changed.
pub(super) fn renew(
    driver: &Qcow2Driver,
    references: &mut References,
    cut: &References,
    end: ClusterIndex,
) -> Result<bool> {
    references.lift_limit();
    let mut blocks = BTreeMap::new();
    let mut room = FreeRoom { references, cut, from: ClusterIndex(0), end };
    let Some((table, clusters)) = room.place(driver, &mut blocks)? else {
        blocks.values().for_each(|block| references.clear(*block, *block));
        return Ok(false);
    };
    let blocks: Vec<(u64, ClusterIndex)> = blocks.into_iter().collect();
    write_elsewhere(driver, references, &blocks, table, clusters).map(|()| true)
}

/// Where new refcounts can go.
struct FreeRoom<'a> {
    references: &'a mut References,
    /// Other clusters that are in use.
    cut: &'a References,
    /// There is none before.
    from: ClusterIndex,
    /// Nor from here on.
    end: ClusterIndex,
}

impl FreeRoom<'_> {
    /// Takes room for the blocks, then for the table: where it is, and its clusters. `None` if there is not enough, with
    /// nothing taken but what `blocks` names.
    fn place(
        &mut self,
        driver: &Qcow2Driver,
        blocks: &mut BTreeMap<u64, ClusterIndex>,
    ) -> Result<Option<(ClusterIndex, u64)>> {
        let per_block = driver.geometry.refcounts_per_block();
        loop {
            let missing = self.without_block(per_block, blocks);
            if !missing.is_empty() {
                if !self.place_blocks(&missing, blocks) {
                    return Ok(None);
                }
                continue;
            }
            let entries = blocks.keys().next_back().map_or(1, |last| last + 1);
            let clusters = table_clusters(driver, entries)?;
            let Some(table) = self.take(ClusterIndex(0), clusters) else { return Ok(None) };
            let missing = self.without_block(per_block, blocks);
            if missing.is_empty() {
                return Ok(Some((table, clusters)));
            }
            // The table needs more blocks itself: once more, with them.
            self.references.clear(table, table + (clusters - 1));
            if !self.place_blocks(&missing, blocks) {
                return Ok(None);
            }
        }
    }

    /// The blocks (by index) that are needed and are not there.
    fn without_block(&self, per_block: u64, blocks: &BTreeMap<u64, ClusterIndex>) -> Vec<u64> {
        self.references.units(per_block).into_iter().filter(|index| !blocks.contains_key(index)).collect()
    }

    /// Whether there was room for all of them.
    fn place_blocks(&mut self, missing: &[u64], blocks: &mut BTreeMap<u64, ClusterIndex>) -> bool {
        for index in missing {
            let Some(cluster) = self.take(self.from, 1) else { return false };
            self.from = cluster;
            blocks.insert(*index, cluster);
        }
        true
    }

    /// Takes `n` clusters in a row, from `from` on.
    fn take(&mut self, from: ClusterIndex, n: u64) -> Option<ClusterIndex> {
        let mut start = from;
        loop {
            start = self.references.free_run(start, n);
            match self.cut.range(start, start + n).last() {
                Some((used, _)) => start = used + 1,
                None => break,
            }
        }
        if start + n > self.end {
            return None;
        }
        self.references.add(start, start + (n - 1), 1);
        Some(start)
    }
}

/// How long a refcount table with that many entries is, in clusters.
fn table_clusters(driver: &Qcow2Driver, entries: u64) -> Result<u64> {
    let bytes = entries.saturating_mul(ENTRY);
    if bytes > MAX_REFCOUNT_TABLE_BYTES {
        return Err(Error::corrupt("The refcount table would be too large"));
    }
    Ok(bytes.div_ceil(driver.geometry.cluster_size()))
}

/// Decides, and counts the references of the refcount structures that there will be.
fn plan(driver: &Qcow2Driver, survey: &Survey<'_>, references: &mut References) -> Result<RepairPlan> {
    let geometry = driver.geometry;
    let per_block = geometry.refcounts_per_block();
    if survey.refcounts_sound() {
        let table = driver.refcount_table();
        let own = (geometry.cluster_of(table.at), geometry.cluster_of(table.at + table.len - 1));
        let blocks: Vec<ClusterIndex> = survey.blocks().map(|at| geometry.cluster_of(at)).collect();
        let mut needed = references.units(per_block);
        needed.extend(blocks.iter().chain([&own.0, &own.1]).map(|cluster| geometry.refcount_of(*cluster).0));
        needed.dedup();
        let there = |index: &u64| driver.block_of(*index).map(|block| block.is_some());
        if needed.iter().map(there).try_fold(true, |all, one| one.map(|one| all && one))? {
            references.add(own.0, own.1, 1);
            blocks.iter().for_each(|cluster| references.add(*cluster, *cluster, 1));
            return Ok(RepairPlan::InPlace);
        }
    }
    let file = driver.file().storage.len().context("Could not get file size")?;
    let needed = references.units(per_block);
    let mut start = ClusterIndex(file.div_ceil(geometry.cluster_size()));
    loop {
        let (blocks, table_clusters) = room(driver, &needed, start)?;
        let end = start + (blocks.len() as u64 + table_clusters);
        match references.range(start, end).last() {
            Some((used, _)) => start = used + 1,
            None => {
                references.add(start, ClusterIndex(end.0 - 1), 1);
                return Ok(RepairPlan::Elsewhere { start, blocks, table_clusters });
            }
        }
    }
}

/// The indices of the blocks that are needed if these and their table lie from `start` on, and the table's clusters.
fn room(driver: &Qcow2Driver, needed: &[u64], start: ClusterIndex) -> Result<(Vec<u64>, u64)> {
    let geometry = driver.geometry;
    let (mut blocks, mut table) = (needed.to_vec(), 1);
    loop {
        let last = start + (blocks.len() as u64 + table - 1);
        let own = geometry.refcount_of(start).0..=geometry.refcount_of(last).0;
        let mut next: Vec<u64> = needed.iter().copied().chain(own).collect();
        next.sort_unstable();
        next.dedup();
        let entries = next.last().map_or(0, |last| last + 1);
        let bytes = entries.saturating_mul(ENTRY);
        if bytes > MAX_REFCOUNT_TABLE_BYTES {
            return Err(Error::corrupt(
                "The image was not closed cleanly and cannot be repaired: the refcount table would be too large",
            ));
        }
        let clusters = bytes.div_ceil(geometry.cluster_size());
        if next.len() == blocks.len() && clusters == table {
            return Ok((next, clusters));
        }
        (blocks, table) = (next, clusters);
    }
}

fn elsewhere(
    driver: &Qcow2Driver,
    references: &References,
    start: ClusterIndex,
    blocks: &[u64],
    table_clusters: u64,
) -> Result<()> {
    let table = start + blocks.len() as u64;
    let blocks: Vec<(u64, ClusterIndex)> = blocks.iter().copied().zip(start.run(blocks.len() as u64)).collect();
    write_elsewhere(driver, references, &blocks, table, table_clusters)
}

/// Writes the blocks (index, cluster) and the table, then the header.
fn write_elsewhere(
    driver: &Qcow2Driver,
    references: &References,
    blocks: &[(u64, ClusterIndex)],
    table_cluster: ClusterIndex,
    table_clusters: u64,
) -> Result<()> {
    const FAILED: &str = "Could not write new refcounts";
    let (geometry, storage) = (driver.geometry, &driver.file().storage);
    let (size, per_block) = (geometry.cluster_size(), geometry.refcounts_per_block());
    let too_large = |_| Error::unsupported("The refcount table would be too large");
    let mut table = vec![0; usize::try_from(table_clusters * size).map_err(too_large)?];
    let mut block = vec![0; usize::try_from(size).map_err(too_large)?];
    for (index, cluster) in blocks {
        block.fill(0);
        let first = geometry.first_counted(*index);
        for (used, count) in references.range(first, first + per_block) {
            let at = usize::try_from(used.since(first)).map_err(too_large)?;
            refcount::set(geometry.refcount_order, &mut block, at, u64::from(count));
        }
        let block_at = geometry.offset_of(*cluster);
        driver.file().write_metadata("refcount block", block_at, &block)?;
        let at = usize::try_from(index * ENTRY).map_err(too_large)?;
        if let Some(entry) = table.get_mut(at..at + 8) {
            entry.copy_from_slice(&block_at.to_be_bytes());
        }
    }
    let at = geometry.offset_of(table_cluster);
    driver.file().write_metadata("refcount table", at, &table)?;
    storage.flush().context(FAILED)?;
    let clusters = u32::try_from(table_clusters).map_err(too_large)?;
    driver.update_header(|header| {
        header.fields.refcount_table_offset = at;
        header.fields.refcount_table_clusters = clusters;
    })?;
    storage.flush().context(FAILED)?;
    // What was cached as a refcount block may be a table of another kind.
    driver.tables.forget(0, u64::MAX);
    Ok(())
}

fn in_place(driver: &Qcow2Driver, references: &References) -> Result<()> {
    let entries = driver.refcount_table().len / ENTRY;
    for lower in [false, true] {
        for index in 0..entries {
            if let Some(block) = driver.block_of(index)? {
                settle_block(driver, references, block, index, lower)?;
            }
            if driver.tables.is_full() {
                driver.tables.write_back()?;
            }
        }
        driver.tables.write_back()?;
        driver.file().storage.flush().context("Could not flush")?;
    }
    Ok(())
}

/// Raises the counts of a block that are too low, or lowers those that are too high.
fn settle_block(driver: &Qcow2Driver, references: &References, block: Table, index: u64, lower: bool) -> Result<()> {
    let geometry = driver.geometry;
    let order = geometry.refcount_order;
    let per_piece = (PIECE * 8) >> order;
    let pieces = geometry.refcounts_per_block() / per_piece;
    for piece in 0..pieces {
        let (first, from) = (geometry.first_counted(index) + piece * per_piece, piece * PIECE);
        let mut wanted = vec![0; PIECE as usize];
        for (cluster, count) in references.range(first, first + per_piece) {
            refcount::set(order, &mut wanted, cluster.since(first) as usize, u64::from(count));
        }
        let settle = |bytes: &mut [u8]| {
            for at in 0..per_piece as usize {
                let (is, should) = (refcount::get(order, bytes, at), refcount::get(order, &wanted, at));
                if if lower { is > should } else { is < should } {
                    refcount::set(order, bytes, at, should);
                }
            }
        };
        let same = driver.tables.view(block, from, |bytes| bytes.get(..PIECE as usize) == Some(&wanted[..]))?;
        if !same {
            driver.tables.change(block, from, PIECE, settle)?;
        }
    }
    Ok(())
}

/// Sets the mark of each active entry whose cluster has no other reference, and takes it from the others.
struct Marks<'a> {
    driver: &'a Qcow2Driver,
    references: &'a References,
}

impl Visitor for Marks<'_> {
    fn found(&mut self, found: &Found) -> Result<()> {
        let Some(entry) = found.entry.filter(|_| found.active) else { return Ok(()) };
        if !matches!(found.part, MetadataPart::ActiveL2 | MetadataPart::Data) {
            return Ok(());
        }
        let alone = self.references.get(self.driver.geometry.cluster_of(found.at)) == 1;
        let word = if alone { entry.word | COPIED } else { entry.word & !COPIED };
        if word == entry.word {
            return Ok(());
        }
        let tables = &self.driver.tables;
        if tables.is_full() {
            tables.write_back()?;
        }
        tables.set(entry.table, entry.word_index, word)
    }

    fn contents(&self, _tables: u64) -> bool {
        true
    }

    fn too_many(&self) -> Result<()> {
        Ok(())
    }
}
