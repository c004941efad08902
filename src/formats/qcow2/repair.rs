//! Putting right what an unclean end left behind: refcounts are made what the tables say.
//!
//! Memory is 4 bytes a cluster of the file, and a few words for each of its L2 tables. Raised first, lowered last: a stop in between leaves leaks at worst.

use std::collections::BTreeMap;

use crate::block::error::Context;
use crate::block::{Error, Result};

use super::Qcow2Driver;
use super::counts::Counts;
use super::layout::{COMPRESSED, ENTRY, OFFSET_MASK, REFCOUNT_OFFSET_MASK};
use super::snapshot::Snapshot;
use super::space::Cursor;
use super::tables::{Kind, Table};

/// Most clusters of a file that are counted.
const MOST_CLUSTERS: u64 = 1 << 28;
/// Most entries of L1 tables that are gone through.
const MOST_ENTRIES: u64 = 1 << 28;

/// References to each cluster of the file.
struct References<'a> {
    driver: &'a Qcow2Driver,
    counts: Vec<u32>,
}

impl References<'_> {
    /// Counts a run of bytes; what lies outside the file is not counted, for it has no cluster.
    fn add(&mut self, at: u64, len: u64) {
        self.add_times(at, len, 1);
    }

    fn add_times(&mut self, at: u64, len: u64, times: u32) {
        if len == 0 {
            return;
        }
        let bits = self.driver.geometry.cluster_bits;
        let last = at.saturating_add(len - 1) >> bits;
        for cluster in at >> bits..=last.min(self.counts.len() as u64) {
            if let Some(count) = usize::try_from(cluster).ok().and_then(|cluster| self.counts.get_mut(cluster)) {
                *count = count.saturating_add(times);
            }
        }
    }

    /// Counts all that is below L1 tables. Snapshots share most of their tables: each is read once.
    fn add_trees(&mut self, l1s: impl Iterator<Item = Table>) -> Result<()> {
        let mut times: BTreeMap<(u64, u64), u32> = BTreeMap::new();
        for l1 in l1s {
            *times.entry((l1.at, l1.len)).or_default() += 1;
        }
        if times.keys().map(|(_, len)| len / ENTRY).fold(0, u64::saturating_add) > MOST_ENTRIES {
            return Err(Error::unsupported(
                "The image was not closed cleanly and has too many snapshots to be repaired",
            ));
        }
        let (driver, cluster) = (self.driver, self.driver.geometry.cluster_size());
        let mut tables: BTreeMap<u64, u32> = BTreeMap::new();
        for ((at, len), times) in times {
            self.add_times(at, len, times);
            if self.is_hole(at, len)? {
                continue;
            }
            let l1 = Table { kind: Kind::L1, at, len };
            for index in 0..len / ENTRY {
                let at = driver.tables.get(l1, index)? & OFFSET_MASK;
                if driver.geometry.in_cluster(at) != 0 {
                    return Err(Error::corrupt(format!("L2 table offset {at:#x} unaligned (L1 index: {index:#x})")));
                }
                if at != 0 {
                    let count = tables.entry(at).or_default();
                    *count = count.saturating_add(times);
                }
            }
        }
        for (at, times) in tables {
            self.add_times(at, cluster, times);
            if !driver.external && !self.is_hole(at, cluster)? {
                self.add_table(at, times)?;
            }
        }
        Ok(())
    }

    fn add_table(&mut self, at: u64, times: u32) -> Result<()> {
        let driver = self.driver;
        let table = driver.l2(at);
        for index in 0..driver.geometry.l2_entries() {
            let (entry, _) = driver.l2_entry(table, index)?;
            if entry & COMPRESSED != 0 {
                let (at, len) = driver.geometry.compressed(entry);
                self.add_times(at, len, times);
            } else if entry & OFFSET_MASK != 0 {
                self.add_times(entry & OFFSET_MASK, driver.geometry.cluster_size(), times);
            }
        }
        Ok(())
    }

    /// Whether a table is nothing but zeros by the host's word.
    fn is_hole(&self, at: u64, len: u64) -> Result<bool> {
        let extent = self.driver.file().storage.extent(at, len.max(1)).context("Could not get block status")?;
        Ok(extent.is_zero() && extent.len >= len)
    }
}

/// Makes the refcounts of an image whose dirty bit is set what its tables say.
pub fn rebuild(driver: &Qcow2Driver) -> Result<()> {
    let cluster = driver.geometry.cluster_size();
    let file = driver.file().storage.len().context("Could not get file size")?;
    let clusters = file.div_ceil(cluster);
    if clusters > MOST_CLUSTERS {
        return Err(Error::unsupported("The image was not closed cleanly and its file is too long to be repaired"));
    }
    let counts = vec![0; usize::try_from(clusters).map_err(|_| Error::unsupported("file too long"))?];
    let mut references = References { driver, counts };
    let header = driver.header().clone();
    references.add(0, cluster);
    let inactive = driver.snapshots.iter().map(|snapshot| {
        let len = u64::from(snapshot.fields.l1_size) * ENTRY;
        Table { kind: Kind::L1, at: snapshot.fields.l1_table_offset, len }
    });
    references.add_trees(inactive.chain([driver.l1()]))?;
    if header.fields.nb_snapshots > 0 {
        // Its last entry may be followed by nothing.
        let len: u64 = driver.snapshots.iter().map(Snapshot::bytes).sum();
        references.add(header.fields.snapshots_offset, len.saturating_sub(7));
    }
    if let Some((at, len)) = header.crypto {
        references.add(at, len);
    }
    if let Some(bitmaps) = &header.bitmaps {
        references.add(bitmaps.directory_offset, bitmaps.directory_size);
    }
    driver.bitmaps_apart()?;
    for bitmap in driver.bitmap_list() {
        let len = u64::from(bitmap.fields.table_size) * ENTRY;
        references.add(bitmap.fields.table_offset, len);
        if references.is_hole(bitmap.fields.table_offset, len)? {
            continue;
        }
        let table = Table { kind: Kind::L1, at: bitmap.fields.table_offset, len };
        for index in 0..len / ENTRY {
            let at = driver.tables.get(table, index)? & OFFSET_MASK;
            if at != 0 {
                references.add(at, cluster);
            }
        }
    }
    let table = driver.refcount_table();
    references.add(table.at, table.len);
    for index in 0..table.len / ENTRY {
        let at = driver.tables.get(table, index)? & REFCOUNT_OFFSET_MASK;
        if at != 0 {
            references.add(at, cluster);
        }
    }
    settle(driver, &references.counts, clusters)
}

fn settle(driver: &Qcow2Driver, counts: &[u32], clusters: u64) -> Result<()> {
    // New refcount blocks go past everything.
    let mut cursor = Cursor::at(clusters);
    let numbered = || (0u64..).zip(counts.iter().map(|count| u64::from(*count)));
    for (cluster, count) in numbered().filter(|(_, count)| *count > 0) {
        cursor.ensure(&mut Counts(driver), cluster)?;
        if driver.refcount(cluster)? < count {
            driver.change_refcounts(cluster, 1, |_| Ok(count))?;
        }
    }
    driver.tables.write_back()?;
    for (cluster, count) in numbered() {
        if driver.refcount(cluster)? > count {
            driver.change_refcounts(cluster, 1, |_| Ok(count))?;
        }
    }
    driver.tables.write_back()?;
    driver.file().storage.flush().context("Could not flush")
}
