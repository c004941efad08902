//! Putting right what an unclean end left behind: refcounts are made what the tables say.
//!
//! Memory is 4 bytes a cluster of the file. Raised first, lowered last: a stop in between leaves leaks at worst.

use crate::block::error::Context;
use crate::block::{Error, Result};

use super::Qcow2Driver;
use super::counts::Counts;
use super::layout::{self, COMPRESSED, ENTRY, OFFSET_MASK, REFCOUNT_OFFSET_MASK};
use super::space::Cursor;
use super::tables::{Kind, Table};

/// Most clusters of a file that are counted.
const MOST_CLUSTERS: u64 = 1 << 28;

/// References to each cluster of the file.
struct References<'a> {
    driver: &'a Qcow2Driver,
    counts: Vec<u32>,
}

impl References<'_> {
    /// Counts a run of bytes; what lies outside the file is not counted, for it has no cluster.
    fn add(&mut self, at: u64, len: u64) {
        if len == 0 {
            return;
        }
        let bits = self.driver.geometry.cluster_bits;
        let last = at.saturating_add(len - 1) >> bits;
        for cluster in at >> bits..=last.min(self.counts.len() as u64) {
            if let Some(count) = usize::try_from(cluster).ok().and_then(|cluster| self.counts.get_mut(cluster)) {
                *count = count.saturating_add(1);
            }
        }
    }

    fn add_tree(&mut self, l1: Table) -> Result<()> {
        self.add(l1.at, l1.len);
        let driver = self.driver;
        for index in 0..l1.len / ENTRY {
            let at = driver.tables.get(l1, index)? & OFFSET_MASK;
            if at == 0 {
                continue;
            }
            let cluster = driver.geometry.cluster_size();
            self.add(at, cluster);
            let table = driver.l2(at);
            for index in 0..driver.geometry.l2_entries() {
                let (entry, _) = driver.l2_entry(table, index)?;
                if driver.external {
                    continue;
                }
                if entry & COMPRESSED != 0 {
                    let (at, len) = driver.geometry.compressed(entry);
                    self.add(at, len);
                } else if entry & OFFSET_MASK != 0 {
                    self.add(entry & OFFSET_MASK, cluster);
                }
            }
        }
        Ok(())
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
    references.add_tree(driver.l1())?;
    for snapshot in &driver.snapshots {
        let len = u64::from(snapshot.fields.l1_size) * ENTRY;
        references.add_tree(Table { kind: Kind::L1, at: snapshot.fields.l1_table_offset, len })?;
    }
    if header.fields.nb_snapshots > 0 {
        references.add(header.fields.snapshots_offset, snapshot_table_len(driver));
    }
    if let Some((at, len)) = header.crypto {
        references.add(at, len);
    }
    if let Some(bitmaps) = &header.bitmaps {
        references.add(bitmaps.directory_offset, bitmaps.directory_size);
    }
    for bitmap in driver.bitmap_list() {
        let len = u64::from(bitmap.fields.table_size) * ENTRY;
        references.add(bitmap.fields.table_offset, len);
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

/// Length of the snapshot table, whose last entry may be followed by nothing.
fn snapshot_table_len(driver: &Qcow2Driver) -> u64 {
    let parts = driver.snapshots.iter().map(|one| {
        let names = u64::from(one.fields.id_size) + u64::from(one.fields.name_size);
        (layout::SNAPSHOT_ENTRY as u64 + u64::from(one.fields.extra_size) + names).next_multiple_of(8)
    });
    parts.sum::<u64>().saturating_sub(7)
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
