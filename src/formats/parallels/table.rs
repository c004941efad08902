//! The BAT in memory, the mark that the image is in use, and the end of what the BAT names, where space is taken.

use super::layout::{HEADER_BYTES, ParallelsHeader, SECTOR};
use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::formats::one_file::Tables;
use crate::formats::runs::Runs;
use crate::formats::table::{TableCache, extend};
use crate::storage::{Event, Preallocation, Storage};

/// Working set of the BAT: 32 MiB map 8 TiB in clusters of 1 MiB.
const CACHE: usize = 32 << 20;
/// The most entries that are looked at for one answer.
const STEPS: u64 = 1 << 20;

/// What changes while the image is open.
#[derive(Debug)]
pub struct ParallelsState {
    /// As it is in the file.
    pub header: ParallelsHeader,
    bat: TableCache,
    /// Whether the file was found to have all of the BAT.
    bat_is_there: bool,
    /// Where space is taken next. Known once the image was found fit to be written to.
    end: Option<u64>,
    /// Bytes of the file from here on were never given out and read as zeros.
    fresh: u64,
    /// Whether the mark that the image is in use is ours.
    marked: bool,
}

impl Tables for ParallelsState {
    /// Writes what waits: length of the file, then the BAT.
    fn write_tables(&mut self, storage: &dyn Storage) -> Result<()> {
        if !self.bat.is_changed() {
            return Ok(());
        }
        extend(self.end, storage)?;
        self.bat.write_out(storage)
    }
}

impl ParallelsState {
    /// Nothing read yet.
    pub fn new(header: ParallelsHeader, file: &str) -> Self {
        let bat = TableCache::new(CACHE, file, "BAT");
        Self { header, bat, bat_is_there: false, end: None, fresh: u64::MAX, marked: false }
    }

    fn entry_at(cluster: u64) -> u64 {
        HEADER_BYTES as u64 + cluster * 4
    }

    /// Refuses a BAT of which the file has only a part: the entries that are missing are no zeros.
    fn need_bat(&mut self, storage: &dyn Storage) -> Result<()> {
        if !self.bat_is_there {
            let length = storage.len().context("Could not get the size of the file")?;
            if self.header.bat_end() > length.checked_next_multiple_of(SECTOR).unwrap_or(length) {
                return Err(Error::truncated("the BAT", HEADER_BYTES as u64, length));
            }
            self.bat_is_there = true;
        }
        Ok(())
    }

    /// Where a cluster of the disk is (0: nowhere), and how many clusters (at most `max`) go on like it: one after the
    /// other in the file, or none of them there.
    pub fn run(&mut self, storage: &dyn Storage, index: u64, max: u64) -> Result<(u64, u64)> {
        let there = self.header.entries().saturating_sub(index).min(STEPS);
        if there == 0 {
            // What the BAT has no entry for is not there.
            return Ok((0, max.max(1)));
        }
        let (max, unit, cluster) = (max.min(there), self.header.entry_unit(), self.header.cluster());
        self.need_bat(storage)?;
        let (mut first, mut count) = (0, 0);
        while count < max {
            let wanted = usize::try_from((max - count) * 4).unwrap_or(usize::MAX);
            let part = self.bat.slice(storage, Self::entry_at(index + count), wanted)?;
            for entry in part.as_chunks().0.iter().map(|bytes| u64::from(u32::from_le_bytes(*bytes)) * unit) {
                let goes_on = match first {
                    _ if count == 0 => {
                        first = entry;
                        true
                    }
                    0 => entry == 0,
                    first => entry == first + count * cluster,
                };
                if !goes_on {
                    return Ok((first, count));
                }
                count += 1;
            }
        }
        Ok((first, count.max(1)))
    }

    /// Gives `see` every run of clusters that the BAT names, in its order, each with its first index, its place and how
    /// many they are, until it says that this is enough.
    pub fn each_run(&mut self, storage: &dyn Storage, mut see: impl FnMut(u64, u64, u64) -> bool) -> Result<()> {
        let (mut index, last) = (0, self.header.entries());
        while index < last {
            let (at, run) = self.run(storage, index, last - index)?;
            if at != 0 && !see(index, at, run) {
                break;
            }
            index += run;
        }
        Ok(())
    }

    /// Where the data starts in a file of that length, which lies in `storage`.
    pub fn data_start(&self, storage: &dyn Storage) -> Result<u64> {
        Ok(self.header.data_start(storage.len().context("Could not get the size of the file")?))
    }

    /// Makes sure, once, that the image can be written to without harm: all that is named lies in the file behind the BAT,
    /// and nothing over anything else. What lies past the end would be given out, and be somebody else's then.
    pub fn prepare(&mut self, storage: &dyn Storage) -> Result<()> {
        if self.end.is_some() {
            return Ok(());
        }
        self.need_bat(storage)?;
        let length = storage.len().context("Could not get the size of the file")?;
        let sectors = length.checked_next_multiple_of(SECTOR).unwrap_or(length);
        let (start, cluster) = (self.header.data_start(length), self.header.cluster());
        let (mut runs, mut end, mut lost) = (Runs::default(), start, false);
        self.each_run(storage, |_, at, run| {
            let run_end = at.saturating_add(run.saturating_mul(cluster));
            lost |= at < start || run_end > sectors;
            end = end.max(run_end);
            runs.add(at, run_end - at);
            !lost && !runs.is_overlapping()
        })?;
        if lost {
            return Err(Error::corrupt("the BAT names clusters that lie outside the image"));
        }
        if runs.disjoint().is_none() {
            return Err(Error::corrupt("clusters of the image overlap"));
        }
        self.fresh = if storage.facts().new_reads_zero { length } else { u64::MAX };
        self.end = Some(end);
        Ok(())
    }

    /// Has the end looked up again, after something else has changed the file.
    pub fn forget(&mut self) {
        self.bat.forget();
        self.bat_is_there = false;
        self.end = None;
        self.fresh = u64::MAX;
    }

    /// Says in the header that the image is in use, before anything else is changed.
    pub fn mark(&mut self, storage: &dyn Storage) -> Result<()> {
        if self.marked {
            return Ok(());
        }
        let mut header = self.header.clone();
        header.set_in_use(true);
        // It does not follow what is written from now on.
        header.drop_extension();
        if header != self.header {
            self.marked = !self.header.is_in_use();
            self.replace_header(storage, header)?;
        }
        Ok(())
    }

    /// Takes the mark back if it is ours, once all is written, and cuts off what lies behind all clusters.
    pub fn unmark(&mut self, storage: &dyn Storage) -> Result<()> {
        if !self.marked {
            return Ok(());
        }
        if let Some(end) = self.end
            && !storage.facts().fixed_len
            && storage.len().context("Could not get the size of the file")? > end
        {
            storage.set_len(end, Preallocation::Off).context("Could not shorten the file")?;
            self.fresh = self.fresh.min(end);
        }
        let mut header = self.header.clone();
        header.set_in_use(false);
        self.replace_header(storage, header)?;
        self.marked = false;
        Ok(())
    }

    /// Writes the header at once, between two flushes.
    pub fn replace_header(&mut self, storage: &dyn Storage, header: ParallelsHeader) -> Result<()> {
        storage.flush().context("Could not flush")?;
        storage.write_at(0, header.bytes()).context("Could not write the Parallels header")?;
        storage.flush().context("Could not flush")?;
        self.header = header;
        Ok(())
    }

    /// Room for clusters behind all others; whether it reads as zeros now.
    pub fn take(&mut self, storage: &dyn Storage, clusters: u64) -> Result<(u64, bool)> {
        self.prepare(storage)?;
        self.mark(storage)?;
        storage.announce(Event::CLUSTER_ALLOC);
        let at = self.end.unwrap_or(u64::MAX);
        let end = at.saturating_add(clusters.saturating_mul(self.header.cluster()));
        if end / self.header.entry_unit() > u64::from(u32::MAX) {
            return Err(Error::unsupported("the file has no room for another cluster"));
        }
        let fresh = at >= self.fresh;
        self.fresh = self.fresh.max(end);
        self.end = Some(end);
        Ok((at, fresh))
    }

    /// Gives no room out before that place.
    pub fn keep_clear_of(&mut self, at: u64) {
        self.end = self.end.map(|end| end.max(at));
    }

    /// Takes back what [`ParallelsState::take`] gave, if nothing was given since.
    pub fn give_back(&mut self, at: u64, clusters: u64) {
        if self.end == Some(at.saturating_add(clusters * self.header.cluster())) {
            self.end = Some(at);
        }
    }

    /// Sets where clusters of the disk are: one after the other from that place on, or, for 0, nowhere.
    pub fn set(&mut self, storage: &dyn Storage, index: u64, count: u64, at: u64) -> Result<()> {
        if index.saturating_add(count) > self.header.entries() {
            return Err(Error::corrupt(format!("the BAT has no entry for cluster {index}")));
        }
        let unit = self.header.entry_unit();
        let step = if at == 0 { 0 } else { self.header.cluster() / unit };
        let first = at / unit;
        let entries: Vec<u8> =
            (0..count).flat_map(|n| u32::try_from(first + n * step).unwrap_or(0).to_le_bytes()).collect();
        self.bat.write(storage, Self::entry_at(index), &entries)
    }

    /// The same for entries of which the header does not know yet.
    pub fn clear_entries(&mut self, storage: &dyn Storage, from: u64, to: u64) -> Result<()> {
        const AT_ONCE: u64 = 1 << 16;
        let mut next = from;
        while next < to {
            let count = (to - next).min(AT_ONCE);
            let zeros = vec![0; usize::try_from(count * 4).unwrap_or(0)];
            storage.write_at(Self::entry_at(next), &zeros).context("Could not clear the BAT")?;
            next += count;
        }
        Ok(())
    }

    /// Whether so much waits that it should be written now.
    pub fn wants_writing(&self) -> bool {
        self.bat.is_full()
    }
}
