//! L1 and L2 tables in memory, and the end of the file, where space is taken.

use std::collections::HashMap;

use super::layout::{HEADER_BYTES, QcowEntry, QcowHeader};
use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::formats::one_file::Tables;
use crate::formats::runs::Runs;
use crate::formats::table::{TableCache, write_levels};
use crate::storage::{Event, Storage};

/// Working set of the L2 tables: 32 MiB map 16 GiB in clusters of 4 KiB.
const L2_CACHE: usize = 32 << 20;
/// Working set of the L1 table.
const L1_CACHE: usize = 4 << 20;
/// The most tables and pieces of tables that are looked at for one answer.
const STEPS: u64 = 1 << 16;

/// What changes while the image is open.
#[derive(Debug)]
pub struct QcowState {
    /// As it is in the file.
    pub header: QcowHeader,
    pub(super) l1: TableCache,
    pub(super) l2: TableCache,
    /// L2 tables that have their place, but no L1 entry yet, by L1 index.
    pending: HashMap<u64, u64>,
    /// Where space is taken next; known from the first time on.
    end: Option<u64>,
    /// Bytes of the file from here on were never given out and read as zeros.
    fresh: u64,
    /// The file was found to be as long as this, at least.
    length: u64,
    /// Whether the image was found fit to be written to.
    prepared: bool,
}

/// What a walk of the tables finds.
#[derive(Debug, Clone, Copy)]
enum Found {
    Table,
    /// Clusters from that one on.
    Clusters(u64),
    Compressed,
}

impl Tables for QcowState {
    fn write_tables(&mut self, storage: &dyn Storage) -> Result<()> {
        write_levels(&mut self.l1, &mut self.l2, self.end, storage)
    }
}

impl QcowState {
    /// Nothing read yet.
    pub fn new(header: QcowHeader, file: &str) -> Self {
        let l1 = TableCache::new(L1_CACHE, file, "L1 table");
        let l2 = TableCache::new(L2_CACHE, file, "L2 table").announcing(Event::L2_LOAD);
        let (pending, end, prepared) = (HashMap::new(), None, false);
        Self { header, l1, l2, pending, end, fresh: u64::MAX, length: 0, prepared }
    }

    fn cluster(&self) -> u64 {
        1 << self.header.cluster_bits()
    }

    /// Entries of an L2 table.
    pub fn table_entries(&self) -> u64 {
        1 << self.header.l2_bits()
    }

    /// Entries of the L1 table.
    pub fn l1_entries(&self) -> u64 {
        self.header.l1_entries(self.header.size()).unwrap_or(0)
    }

    /// How many clusters from this one on share its L2 table.
    pub fn left_in_table(&self, index: u64) -> u64 {
        self.table_entries() - index % self.table_entries()
    }

    /// Refuses a table of which the file has only a part: the entries that are missing are no zeros. What was
    /// appended and is not written yet counts as there.
    fn need(&mut self, storage: &dyn Storage, what: &str, at: u64, entries: u64) -> Result<()> {
        let end = at.saturating_add(entries.saturating_mul(8));
        if end > self.length {
            let length = storage.len().context("Could not get the size of the file")?;
            self.length = length.max(self.end.unwrap_or(0));
        }
        if end > self.length {
            let length = self.length;
            return Err(Error::truncated(what, at, length));
        }
        Ok(())
    }

    /// Where the L2 table with that number is; 0 if it is not there.
    pub fn l2_table(&mut self, storage: &dyn Storage, number: u64) -> Result<u64> {
        self.need(storage, "the L1 table", self.header.l1_offset(), self.l1_entries())?;
        let mut entry = [0; 8];
        let at = self.header.l1_offset().saturating_add(number * 8);
        self.l1.read(storage, at, &mut entry)?;
        Ok(u64::from_be_bytes(entry))
    }

    /// The entry of a cluster, and how many (at most `max`) go on like it: one after the other in the file, or
    /// none of them there.
    pub fn run(&mut self, storage: &dyn Storage, index: u64, max: u64) -> Result<(QcowEntry, u64)> {
        let (bits, cluster) = (self.header.cluster_bits(), self.cluster());
        let clusters = self.l1_entries().saturating_mul(self.table_entries());
        let max = max.min(clusters.saturating_sub(index));
        if max == 0 {
            return Err(Error::corrupt(format!("the L1 table has no entry for cluster {index}")));
        }
        let (mut first, mut count, mut steps) = (QcowEntry::Unallocated, 0, 0);
        while count < max && steps < STEPS {
            steps += 1;
            let number = (index + count) / self.table_entries();
            let left = self.left_in_table(index + count).min(max - count);
            let table = self.l2_table(storage, number)?;
            if table == 0 {
                if count > 0 && first != QcowEntry::Unallocated {
                    break;
                }
                count += left;
                continue;
            }
            match self.need(storage, "an L2 table", table, self.table_entries()) {
                Err(error) if count == 0 => return Err(error),
                // Those who ask for what comes next will hear of it.
                Err(_) => break,
                Ok(()) => {}
            }
            let at = table.saturating_add((index + count) % self.table_entries() * 8);
            let mut one = [0; 8];
            let wanted = usize::try_from(left * 8).unwrap_or(usize::MAX);
            // A table that does not start at a multiple of its entries has some that cross pages.
            let entries = if table.is_multiple_of(8) {
                self.l2.slice(storage, at, wanted)?
            } else {
                self.l2.read(storage, at, &mut one)?;
                &one
            };
            for entry in entries.as_chunks().0.iter().map(|bytes| QcowEntry::decode(u64::from_be_bytes(*bytes), bits)) {
                let goes_on = match (first, entry) {
                    _ if count == 0 => {
                        first = entry;
                        true
                    }
                    (QcowEntry::Unallocated, QcowEntry::Unallocated) => true,
                    (QcowEntry::Plain(start), QcowEntry::Plain(at)) => start.checked_add(count * cluster) == Some(at),
                    _ => false,
                };
                if !goes_on {
                    return Ok((first, count));
                }
                count += 1;
            }
        }
        Ok((first, count.max(1)))
    }

    /// The end of what is in use.
    pub fn end(&mut self, storage: &dyn Storage) -> Result<u64> {
        if let Some(end) = self.end {
            return Ok(end);
        }
        let end = if !storage.facts().new_reads_zero {
            self.used_end(storage)?
        } else {
            let length = storage.len().context("Could not get the size of the file")?;
            self.fresh = length;
            length
        };
        self.end = Some(end);
        Ok(end)
    }

    /// Has the end looked up again, after the file was cut.
    pub fn forget_end(&mut self) {
        self.end = None;
        self.length = 0;
        self.fresh = u64::MAX;
    }

    /// Gives `see` every L2 table and every run of clusters that are there, each with its place and its length, until it says that
    /// this is enough.
    fn each(&mut self, storage: &dyn Storage, mut see: impl FnMut(Found, u64, u64) -> bool) -> Result<()> {
        for number in 0..self.l1_entries() {
            let table = self.l2_table(storage, number)?;
            if table == 0 {
                continue;
            }
            let mut goes_on = see(Found::Table, table, self.table_entries() * 8);
            let (mut index, last) = (number * self.table_entries(), (number + 1) * self.table_entries());
            while index < last && goes_on {
                let (entry, run) = self.run(storage, index, last - index)?;
                goes_on = match entry {
                    QcowEntry::Unallocated => true,
                    QcowEntry::Plain(at) => see(Found::Clusters(index), at, run.saturating_mul(self.cluster())),
                    QcowEntry::Compressed(at, bytes) => see(Found::Compressed, at, bytes),
                };
                index += run;
            }
            if !goes_on {
                break;
            }
        }
        Ok(())
    }

    /// The end of the highest thing that anything names.
    pub fn used_end(&mut self, storage: &dyn Storage) -> Result<u64> {
        let mut end = self.header.l1_offset() + self.l1_entries() * 8;
        if let Some((at, length)) = self.header.backing() {
            end = end.max(at.saturating_add(length.into()));
        }
        self.each(storage, |_, at, len| {
            end = end.max(at.saturating_add(len));
            true
        })?;
        Ok(end)
    }

    /// Makes sure, once, that the image can be written to without harm: header, tables and clusters do not overlap, and
    /// the file has all of them. What it lacks would be given out, and be somebody else's then.
    pub fn prepare(&mut self, storage: &dyn Storage) -> Result<()> {
        if self.prepared {
            return Ok(());
        }
        let there = storage.len().context("Could not get the size of the file")?;
        let mut runs = Runs::default();
        runs.add(0, HEADER_BYTES as u64);
        if let Some((at, length)) = self.header.backing() {
            runs.add(at, length.into());
        }
        runs.add(self.header.l1_offset(), self.l1_entries() * 8);
        let (cluster, size, mut missing) = (self.cluster(), self.header.size(), None);
        self.each(storage, |found, at, len| {
            // Of the last cluster the file needs what the disk has of it.
            let (what, used) = match found {
                Found::Table => ("an L2 table", len),
                Found::Compressed => ("a compressed cluster", len),
                Found::Clusters(index) => ("a cluster", len.min(size.saturating_sub(index.saturating_mul(cluster)))),
            };
            if at.saturating_add(used) > there {
                missing = Some((what, at));
            }
            runs.add(at, len);
            missing.is_none() && !runs.is_overlapping()
        })?;
        if let Some((what, at)) = missing {
            return Err(Error::truncated(what, at, there).context(self.l1.file()));
        }
        if runs.disjoint().is_none() {
            return Err(Error::corrupt("tables and clusters of the image overlap"));
        }
        self.prepared = true;
        Ok(())
    }

    /// Room at the end of the file; whether it reads as zeros now.
    pub fn append(&mut self, storage: &dyn Storage, bytes: u64, align: u64) -> Result<(u64, bool)> {
        let end = self.end(storage)?;
        let full = || Error::unsupported("the file has no room for another cluster");
        let at =
            end.checked_next_multiple_of(512).and_then(|at| at.checked_next_multiple_of(align)).ok_or_else(full)?;
        let end = at.checked_add(bytes).filter(|end| i64::try_from(*end).is_ok()).ok_or_else(full)?;
        let fresh = at >= self.fresh;
        self.fresh = self.fresh.max(end);
        self.end = Some(end);
        Ok((at, fresh))
    }

    /// Room for a cluster, and before it for its L2 table if there is none.
    pub fn take(&mut self, storage: &dyn Storage, index: u64, bytes: u64, align: u64) -> Result<(u64, bool)> {
        storage.announce(Event::CLUSTER_ALLOC);
        let number = index / self.table_entries();
        if self.l2_table(storage, number)? == 0 && !self.pending.contains_key(&number) {
            let bytes = self.table_entries() * 8;
            let (table, _) = self.append(storage, bytes, self.cluster())?;
            let zeros = vec![0; usize::try_from(bytes).unwrap_or(0)];
            self.l2.write(storage, table, &zeros)?;
            self.pending.insert(number, table);
        }
        self.append(storage, bytes, align)
    }

    /// Takes back what [`QcowState::take`] gave, if nothing was given since.
    pub fn give_back(&mut self, at: u64, bytes: u64) {
        if self.end == Some(at.saturating_add(bytes)) {
            self.end = Some(at);
        }
    }

    /// Sets a cluster's entry.
    pub fn set(&mut self, storage: &dyn Storage, index: u64, entry: u64) -> Result<()> {
        let number = index / self.table_entries();
        let mut table = self.l2_table(storage, number)?;
        if table == 0 {
            table = self.pending.remove(&number).ok_or_else(|| Error::corrupt("a cluster has no L2 table"))?;
            let at = self.header.l1_offset().saturating_add(number * 8);
            self.l1.write(storage, at, &table.to_be_bytes())?;
        }
        let at = table.saturating_add(index % self.table_entries() * 8);
        self.l2.write(storage, at, &entry.to_be_bytes())
    }

    /// Whether so much waits that it should be written now.
    pub fn wants_writing(&self) -> bool {
        self.l2.is_full() || self.l1.is_full()
    }

    /// Writes the header at once, between two flushes, and forgets what was derived from the old one.
    pub fn replace_header(&mut self, storage: &dyn Storage, header: QcowHeader) -> Result<()> {
        self.write_tables(storage)?;
        storage.flush().context("Could not flush")?;
        storage.write_at(0, header.bytes()).context("Could not write the qcow header")?;
        storage.flush().context("Could not flush")?;
        self.header = header;
        self.forget_tables();
        self.forget_end();
        Ok(())
    }

    /// Has the tables read again.
    pub fn forget_tables(&mut self) {
        self.l1.forget();
        self.l2.forget();
        self.pending.clear();
    }
}
