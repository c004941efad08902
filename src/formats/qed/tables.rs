//! L1 and L2 tables in memory, the mark that they need a check, and the end of the file, where space is taken.

use std::collections::HashMap;

use super::layout::{HEADER_BYTES, QedEntry, QedHeader, ZERO};
use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::formats::one_file::Tables;
use crate::formats::runs::Runs;
use crate::formats::table::{TableCache, write_levels};
use crate::storage::{Event, Preallocation, Storage, Zeroing};

/// Working set of the L2 tables: 32 MiB map 256 GiB in clusters of 64 KiB.
const L2_CACHE: usize = 32 << 20;
/// Working set of the L1 table.
const L1_CACHE: usize = 4 << 20;
/// The most tables and pieces of tables that are looked at for one answer.
const STEPS: u64 = 1 << 16;

/// An L2 table that has its place, but no L1 entry yet.
#[derive(Debug)]
struct Pending {
    at: u64,
    /// Placements in it that are neither published nor withdrawn.
    waiting: u64,
}

/// What changes while the image is open.
#[derive(Debug)]
pub struct QedState {
    /// As it is in the file.
    pub header: QedHeader,
    l1: TableCache,
    l2: TableCache,
    /// By L1 index.
    pending: HashMap<u64, Pending>,
    /// Where space is taken next; known from the first time on.
    end: Option<u64>,
    /// Bytes of the file from here on were never given out and read as zeros.
    fresh: u64,
    /// The file was found to be as long as this, at least.
    length: u64,
    /// Whether the image was found fit to be written to.
    prepared: bool,
    /// Whether the mark that the tables need a check is ours.
    marked: bool,
    /// Room that was given back and lies before the end: where it starts and ends.
    holes: Vec<(u64, u64)>,
    /// Whether room at the end was given back that the file may have already.
    gave_back: bool,
}

impl Tables for QedState {
    fn write_tables(&mut self, storage: &dyn Storage) -> Result<()> {
        self.cut(storage)?;
        write_levels(&mut self.l1, &mut self.l2, self.end, storage)
    }
}

impl QedState {
    /// Nothing read yet.
    pub fn new(header: QedHeader, file: &str) -> Self {
        Self {
            header,
            l1: TableCache::new(L1_CACHE, file, "L1 table"),
            l2: TableCache::new(L2_CACHE, file, "L2 table").announcing(Event::L2_LOAD),
            pending: HashMap::new(),
            end: None,
            fresh: u64::MAX,
            length: 0,
            prepared: false,
            marked: false,
            holes: Vec::new(),
            gave_back: false,
        }
    }

    /// Entries of a table.
    pub fn entries(&self) -> u64 {
        self.header.table_bytes() / 8
    }

    /// How many clusters from this one on share its L2 table.
    pub fn left_in_table(&self, index: u64) -> u64 {
        self.entries() - index % self.entries()
    }

    /// Refuses an L2 table that cannot be one, or of which the file has only a part: entries that are missing are no
    /// zeros. What was appended and is not written yet counts as there.
    fn need(&mut self, storage: &dyn Storage, at: u64) -> Result<()> {
        if !self.header.is_place(at) {
            return Err(Error::corrupt(format!("no L2 table can be at offset {at}")));
        }
        let end = at.saturating_add(self.header.table_bytes());
        if end > self.length {
            let length = storage.len().context("Could not get the size of the file")?;
            let length = length.checked_next_multiple_of(512).unwrap_or(length);
            self.length = length.max(self.end.unwrap_or(0));
        }
        if end > self.length {
            return Err(Error::truncated("an L2 table", at, self.length));
        }
        Ok(())
    }

    /// Bytes of the L2 table with that number that stand for anything of the disk: what follows need not be there.
    pub fn used_table(&self, number: u64) -> u64 {
        let (entries, clusters) = (self.entries(), self.header.size().div_ceil(self.header.cluster()));
        clusters.saturating_sub(number.saturating_mul(entries)).min(entries) * 8
    }

    /// Where the L2 table with that number is; 0 if it is not there.
    pub fn l2_table(&mut self, storage: &dyn Storage, number: u64) -> Result<u64> {
        let mut entry = [0; 8];
        self.l1.read(storage, self.header.l1_offset().saturating_add(number * 8), &mut entry)?;
        Ok(u64::from_le_bytes(entry))
    }

    /// Where in the file a cluster's entry is, if it has one.
    pub fn place_of(&mut self, storage: &dyn Storage, index: u64) -> Result<Option<u64>> {
        let entries = self.entries();
        let table = self.l2_table(storage, index / entries)?;
        Ok((table != 0).then(|| table.saturating_add(index % entries * 8)))
    }

    /// Sets where it is.
    pub fn set_l2_table(&mut self, storage: &dyn Storage, number: u64, at: u64) -> Result<()> {
        self.l1.write(storage, self.header.l1_offset().saturating_add(number * 8), &at.to_le_bytes())
    }

    /// The entry of a cluster, and how many (at most `max`) go on like it: one after the other in the file, or all of
    /// them not there, or all of them zeros.
    pub fn run(&mut self, storage: &dyn Storage, index: u64, max: u64) -> Result<(QedEntry, u64)> {
        let (cluster, entries) = (self.header.cluster(), self.entries());
        let max = max.min(entries.saturating_mul(entries).saturating_sub(index));
        if max == 0 {
            return Err(Error::corrupt(format!("the L1 table has no entry for cluster {index}")));
        }
        let (mut first, mut count, mut steps) = (QedEntry::Unallocated, 0, 0);
        while count < max && steps < STEPS {
            steps += 1;
            let left = self.left_in_table(index + count).min(max - count);
            let table = self.l2_table(storage, (index + count) / entries)?;
            if table == 0 {
                if count > 0 && first != QedEntry::Unallocated {
                    break;
                }
                count += left;
                continue;
            }
            match self.need(storage, table) {
                Err(error) if count == 0 => {
                    return Err(error.in_file_at(self.header.l1_offset().saturating_add(index / entries * 8)));
                }
                // Those who ask for what comes next will hear of it.
                Err(_) => break,
                Ok(()) => {}
            }
            let at = table.saturating_add((index + count) % entries * 8);
            let part = self.l2.slice(storage, at, usize::try_from(left * 8).unwrap_or(usize::MAX))?;
            for entry in part.as_chunks().0.iter().map(|bytes| QedEntry::decode(u64::from_le_bytes(*bytes))) {
                let goes_on = match (first, entry) {
                    _ if count == 0 => {
                        first = entry;
                        true
                    }
                    (QedEntry::Data(start), QedEntry::Data(at)) => start.checked_add(count * cluster) == Some(at),
                    (first, entry) => first == entry,
                };
                if !goes_on {
                    return Ok((first, count));
                }
                count += 1;
            }
        }
        Ok((first, count.max(1)))
    }

    /// Gives `see` every L2 table that is there, by its number, until it says that this is enough.
    pub fn each_table(
        &mut self,
        storage: &dyn Storage,
        mut see: impl FnMut(&mut Self, u64, u64) -> Result<bool>,
    ) -> Result<()> {
        for number in 0..self.entries() {
            let at = self.l2_table(storage, number)?;
            if at != 0 && !see(self, number, at)? {
                break;
            }
        }
        Ok(())
    }

    /// Gives `see` every run of clusters that an L2 table names, each with its first index, its place and how many they
    /// are, until it says that this is enough; whether it never did.
    pub fn each_run(
        &mut self,
        storage: &dyn Storage,
        number: u64,
        mut see: impl FnMut(u64, u64, u64) -> bool,
    ) -> Result<bool> {
        let (mut index, last) = (number * self.entries(), (number + 1) * self.entries());
        while index < last {
            let (entry, run) = self.run(storage, index, last - index)?;
            if let QedEntry::Data(at) = entry
                && !see(index, at, run)
            {
                return Ok(false);
            }
            index += run;
        }
        Ok(true)
    }

    /// The end of the highest thing that anything names.
    fn used_end(&mut self, storage: &dyn Storage) -> Result<u64> {
        let (cluster, table_bytes) = (self.header.cluster(), self.header.table_bytes());
        let mut end = self.header.l1_offset() + table_bytes;
        self.each_table(storage, |state, number, at| {
            end = end.max(at.saturating_add(table_bytes));
            state.each_run(storage, number, |_, at, run| {
                end = end.max(at.saturating_add(run.saturating_mul(cluster)));
                true
            })
        })?;
        Ok(end)
    }

    /// The end of what is in use.
    fn end(&mut self, storage: &dyn Storage) -> Result<u64> {
        if let Some(end) = self.end {
            return Ok(end);
        }
        let cluster = self.header.cluster();
        let end = if !storage.facts().new_reads_zero {
            self.used_end(storage)?
        } else {
            // What lies behind the last whole cluster is nobody's, but no zeros either.
            self.fresh = storage.len().context("Could not get the size of the file")?;
            // A cluster that ends within the last sector is there.
            self.fresh.checked_next_multiple_of(512).unwrap_or(self.fresh) / cluster * cluster
        };
        self.end = Some(end);
        Ok(end)
    }

    /// Makes sure, once, that the image can be written to without harm: all that is named lies in the file, and nothing
    /// over anything else. What lies past the end would be given out, and be somebody else's then.
    pub fn prepare(&mut self, storage: &dyn Storage) -> Result<()> {
        if self.prepared {
            return Ok(());
        }
        let there = storage.len().context("Could not get the size of the file")?;
        let length = there.checked_next_multiple_of(512).unwrap_or(there);
        let header = self.header.clone();
        let (cluster, table_bytes) = (header.cluster(), header.table_bytes());
        let mut runs = Runs::default();
        runs.add(0, header.end().max(HEADER_BYTES as u64));
        runs.add(header.l1_offset(), table_bytes);
        let mut lost = false;
        let mut add = |at: u64, bytes: u64, used: u64| {
            lost |= !header.is_place(at)
                || at.checked_add(bytes).is_none_or(|end| end > length)
                || at.saturating_add(used) > there;
            runs.add(at, bytes);
            !lost && !runs.is_overlapping()
        };
        self.each_table(storage, |state, number, at| {
            Ok(add(at, table_bytes, state.used_table(number))
                && state.each_run(storage, number, |index, at, run| {
                    let (whole, last) = ((run - 1).saturating_mul(cluster), index.saturating_add(run - 1));
                    add(at, run.saturating_mul(cluster), whole.saturating_add(header.used_cluster(last)))
                })?)
        })?;
        if lost {
            return Err(Error::corrupt("tables of the image name what lies in no cluster of the file"));
        }
        if runs.disjoint().is_none() {
            return Err(Error::corrupt("tables and clusters of the image overlap"));
        }
        self.prepared = true;
        Ok(())
    }

    /// Says in the header that the tables need a check, before anything is done that a stop could leave half done.
    fn mark(&mut self, storage: &dyn Storage) -> Result<()> {
        if !self.header.needs_check() {
            let mut header = self.header.clone();
            header.set_needs_check(true);
            self.replace_header(storage, header)?;
            self.marked = true;
        }
        Ok(())
    }

    /// Takes the mark back if it is ours, once all is written.
    pub fn unmark(&mut self, storage: &dyn Storage) -> Result<()> {
        self.cut(storage)?;
        if self.marked {
            let mut header = self.header.clone();
            header.set_needs_check(false);
            self.replace_header(storage, header)?;
            self.marked = false;
        }
        Ok(())
    }

    /// Takes room off the file that was given back: nothing names it, or is about to.
    fn cut(&mut self, storage: &dyn Storage) -> Result<()> {
        if std::mem::take(&mut self.gave_back)
            && let Some(end) = self.end
            && !storage.facts().fixed_len
            && storage.len().context("Could not get the size of the file")? > end
        {
            storage.set_len(end, Preallocation::Off).context("Could not shorten the file")?;
            self.length = self.length.min(end);
        }
        Ok(())
    }

    /// Writes the header at once, between two flushes.
    pub fn replace_header(&mut self, storage: &dyn Storage, header: QedHeader) -> Result<()> {
        storage.flush().context("Could not flush")?;
        storage.write_at(0, header.bytes()).context("Could not write the QED header")?;
        storage.flush().context("Could not flush")?;
        self.header = header;
        Ok(())
    }

    /// Room at the end of the file; whether it reads as zeros now.
    fn append(&mut self, storage: &dyn Storage, bytes: u64) -> Result<(u64, bool)> {
        let at = self.end(storage)?;
        let end = at.checked_add(bytes).filter(|end| i64::try_from(*end).is_ok());
        let end = end.ok_or_else(|| Error::unsupported("the file has no room for another cluster"))?;
        let fresh = at >= self.fresh;
        self.fresh = self.fresh.max(end);
        self.end = Some(end);
        Ok((at, fresh))
    }

    /// Room for clusters from that one on, which share an L2 table, and behind them for the table if there is none.
    /// Without room if they are none.
    pub fn take(&mut self, storage: &dyn Storage, index: u64, clusters: u64) -> Result<(u64, bool)> {
        self.mark(storage)?;
        storage.announce(Event::CLUSTER_ALLOC);
        let bytes = clusters * self.header.cluster();
        let (at, fresh) = self.append(storage, bytes)?;
        let table = self.take_table(storage, index / self.entries());
        if table.is_err() {
            self.shorten(at, bytes);
        }
        table.map(|()| (at, fresh))
    }

    /// Room for an L2 table if there is none. The file gets it at once: what the table will name is not to be lost
    /// because data took the last of the disk.
    fn take_table(&mut self, storage: &dyn Storage, number: u64) -> Result<()> {
        if let Some(pending) = self.pending.get_mut(&number) {
            pending.waiting += 1;
        } else if self.l2_table(storage, number)? == 0 {
            let bytes = self.header.table_bytes();
            let (at, _) = self.append(storage, bytes)?;
            let taken = storage.zero(at, bytes, Zeroing::Allocate).context("Could not take room for an L2 table");
            if taken.is_err() {
                self.shorten(at, bytes);
            }
            taken?;
            self.pending.insert(number, Pending { at, waiting: 1 });
        }
        Ok(())
    }

    /// Takes back what [`QedState::take`] gave.
    pub fn give_back(&mut self, index: u64, at: u64, clusters: u64) {
        let number = index / self.entries();
        if let Some(pending) = self.pending.get_mut(&number) {
            pending.waiting = pending.waiting.saturating_sub(1);
            if pending.waiting == 0 {
                let table = pending.at;
                self.pending.remove(&number);
                self.shorten(table, self.header.table_bytes());
            }
        }
        self.shorten(at, clusters * self.header.cluster());
    }

    /// Gives back room at the end, and what was given back just before it.
    fn shorten(&mut self, at: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        self.holes.push((at, at.saturating_add(bytes)));
        while let Some(last) = self.holes.iter().position(|(_, end)| self.end == Some(*end)) {
            self.end = Some(self.holes.swap_remove(last).0);
            self.gave_back = true;
        }
    }

    /// Sets the entries of clusters that share an L2 table: to `first` and what follows it, or all of them to zeros, or
    /// to nothing. What was placed is no longer waiting.
    pub fn set(&mut self, storage: &dyn Storage, index: u64, count: u64, first: u64) -> Result<()> {
        let number = index / self.entries();
        let mut table = self.l2_table(storage, number)?;
        if table == 0 {
            let pending = self.pending.remove(&number);
            let pending = pending.ok_or_else(|| Error::corrupt("a cluster has no L2 table"))?;
            table = pending.at;
            let zeros = vec![0; usize::try_from(self.header.table_bytes()).unwrap_or(0)];
            self.l2.write(storage, table, &zeros)?;
            self.set_l2_table(storage, number, table)?;
        }
        let step = if first > ZERO { self.header.cluster() } else { 0 };
        let entries: Vec<u8> = (0..count).flat_map(|n| (first + n * step).to_le_bytes()).collect();
        self.l2.write(storage, table.saturating_add(index % self.entries() * 8), &entries)
    }

    /// Whether so much waits that it should be written now.
    pub fn wants_writing(&self) -> bool {
        self.l2.is_full() || self.l1.is_full()
    }

    /// Forgets what was read, so that a check sees what is in the file.
    pub fn forget(&mut self) {
        self.l1.forget();
        self.l2.forget();
        self.length = 0;
        self.prepared = false;
    }
}
