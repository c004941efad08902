//! A bounded cache over the tables of an image: block maps, BATs, L1 and L2 tables.
//!
//! Invariants: memory depends on what is touched, never on a number in a header. A page that was changed stays
//! until it is written out; only the bytes that were changed (four at a time) are written, so a page may overlap
//! what is not a table. No lock of its own: it lives inside the driver's.

use std::collections::HashMap;

use crate::block::error::{Context, Operation, Place};
use crate::block::{Result, metadata};
use crate::storage::{Event, Preallocation, Storage};

/// Bytes of one cached page.
pub const PAGE: usize = 4096;
/// Bytes of one unit of change.
const GRAIN: usize = 4;

/// Cached pages of one file's tables.
#[derive(Debug)]
pub struct TableCache {
    pages: HashMap<u64, Page>,
    limit: usize,
    changed: usize,
    clock: u64,
    /// What is announced before a page is read.
    reading: Option<Event>,
    /// The file's name and the tables', for errors.
    file: String,
    table: &'static str,
}

#[derive(Debug)]
struct Page {
    bytes: Box<[u8; PAGE]>,
    /// One bit for each [`GRAIN`] bytes that differ from the file.
    changed: [u64; PAGE / GRAIN / 64],
    used: u64,
}

impl Page {
    fn is_changed(&self) -> bool {
        self.changed.iter().any(|word| *word != 0)
    }

    fn grain_changed(&self, grain: usize) -> bool {
        self.changed.get(grain / 64).is_some_and(|word| word >> (grain % 64) & 1 == 1)
    }
}

impl TableCache {
    /// An empty cache of at most `bytes` (pages that wait to be written apart) over what is called `table` in `file`.
    pub fn new(bytes: usize, file: &str, table: &'static str) -> Self {
        let (limit, file) = ((bytes / PAGE).max(2), file.to_owned());
        Self { pages: HashMap::new(), limit, changed: 0, clock: 0, reading: None, file, table }
    }

    /// The same; the event is announced before each read of the file.
    pub fn announcing(self, reading: Event) -> Self {
        Self { reading: Some(reading), ..self }
    }

    /// The name of the file.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The bytes from `at` to the end of its page, at most `max`. At least one.
    pub fn slice(&mut self, storage: &dyn Storage, at: u64, max: usize) -> Result<&[u8]> {
        let start = (at % PAGE as u64) as usize;
        let page = self.page(storage, at / PAGE as u64)?;
        Ok(&page.bytes[start..PAGE.min(start.saturating_add(max.max(1)))])
    }

    /// Fills `buf` from `at`.
    pub fn read(&mut self, storage: &dyn Storage, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let part = self.slice(storage, at.saturating_add(done as u64), buf.len() - done)?;
            let n = part.len();
            buf[done..done + n].copy_from_slice(part);
            done += n;
        }
        Ok(())
    }

    /// Whether the bit `first` of the bitmap at `at` is set (bit 0 is the lowest of the first byte), and how many from it
    /// on, `most` at most, are like it.
    pub fn bit_run(&mut self, storage: &dyn Storage, at: u64, first: u64, most: u64) -> Result<(bool, u64)> {
        let end = first.saturating_add(most);
        let (mut found, mut bit) = (None, first);
        while bit < end {
            let max = usize::try_from(end.div_ceil(8) - bit / 8).unwrap_or(PAGE);
            for byte in self.slice(storage, at.saturating_add(bit / 8), max)? {
                let set = *found.get_or_insert(byte >> (bit % 8) & 1 == 1);
                let like = if set { *byte } else { !*byte };
                // Those below `bit` do not count.
                let run = u64::from((like | !(0xff << (bit % 8))).trailing_ones()) - bit % 8;
                bit += run;
                if bit >= end || bit % 8 != 0 || run == 0 {
                    return Ok((set, bit.min(end) - first));
                }
            }
        }
        Ok((found.unwrap_or(false), end - first))
    }

    /// Changes bytes; the file learns of it at [`TableCache::write_out`].
    pub fn write(&mut self, storage: &dyn Storage, at: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let here = at.saturating_add(done as u64);
            let start = (here % PAGE as u64) as usize;
            let n = (PAGE - start).min(bytes.len() - done);
            let page = self.page(storage, here / PAGE as u64)?;
            let was = page.is_changed();
            page.bytes[start..start + n].copy_from_slice(&bytes[done..done + n]);
            for grain in start / GRAIN..=(start + n - 1) / GRAIN {
                page.changed[grain / 64] |= 1 << (grain % 64);
            }
            self.changed += usize::from(!was);
            done += n;
        }
        Ok(())
    }

    /// Whether anything waits to be written.
    pub fn is_changed(&self) -> bool {
        self.changed != 0
    }

    /// Whether so much waits that it should be written now.
    pub fn is_full(&self) -> bool {
        self.changed >= self.limit
    }

    /// Writes what changed in the file's first page, in one write: from the first change to the last, so nothing else
    /// may write what lies between them. Returns whether there was any.
    pub fn write_first(&mut self, storage: &dyn Storage) -> Result<bool> {
        let Some(page) = self.pages.get_mut(&0).filter(|page| page.is_changed()) else { return Ok(false) };
        let mut changed = (0..PAGE / GRAIN).filter(|grain| page.grain_changed(*grain));
        let first = changed.next().unwrap_or(0);
        let last = changed.next_back().unwrap_or(first);
        let (from, to) = (first * GRAIN, (last + 1) * GRAIN);
        let place = || Place::of_table(Operation::Write, &self.file, self.table, from as u64);
        storage.write_at(from as u64, &page.bytes[from..to]).at(place)?;
        page.changed = Default::default();
        self.changed = self.changed.saturating_sub(1);
        Ok(true)
    }

    /// Writes every change, in the order of the file.
    pub fn write_out(&mut self, storage: &dyn Storage) -> Result<()> {
        let mut numbers: Vec<u64> =
            self.pages.iter().filter(|(_, page)| page.is_changed()).map(|(number, _)| *number).collect();
        numbers.sort_unstable();
        for number in numbers {
            let Some(page) = self.pages.get_mut(&number) else { continue };
            let mut grain = 0;
            while grain < PAGE / GRAIN {
                let first = grain;
                while grain < PAGE / GRAIN && page.grain_changed(grain) {
                    grain += 1;
                }
                if grain > first {
                    let (from, to) = (first * GRAIN, grain * GRAIN);
                    let at = number * PAGE as u64 + from as u64;
                    let place = || Place::of_table(Operation::Write, &self.file, self.table, at);
                    storage.write_at(at, &page.bytes[from..to]).at(place)?;
                } else {
                    grain += 1;
                }
            }
            page.changed = Default::default();
            self.changed = self.changed.saturating_sub(1);
        }
        Ok(())
    }

    /// Forgets everything, changes too.
    pub fn forget(&mut self) {
        self.pages.clear();
        self.changed = 0;
    }

    fn page(&mut self, storage: &dyn Storage, number: u64) -> Result<&mut Page> {
        self.clock += 1;
        if !self.pages.contains_key(&number) {
            self.make_room();
            let mut bytes = Box::new([0; PAGE]);
            if let Some(event) = self.reading {
                storage.announce(event);
            }
            let at = number * PAGE as u64;
            let place = || Place::of_table(Operation::Read, &self.file, self.table, at);
            storage.read_at(at, &mut bytes[..]).at(place)?;
            self.pages.insert(number, Page { bytes, changed: Default::default(), used: 0 });
        }
        let clock = self.clock;
        let page = self.pages.entry(number).or_insert_with(|| Page {
            bytes: Box::new([0; PAGE]),
            changed: Default::default(),
            used: 0,
        });
        page.used = clock;
        Ok(page)
    }

    /// Drops the older half of the unchanged pages when the cache is full.
    fn make_room(&mut self) {
        if self.pages.len() < self.limit + self.changed {
            return;
        }
        let mut ages: Vec<u64> = self.pages.values().filter(|page| !page.is_changed()).map(|page| page.used).collect();
        let middle = ages.len() / 2;
        if let Some((_, age, _)) = (!ages.is_empty()).then(|| ages.select_nth_unstable(middle)) {
            let age = *age;
            self.pages.retain(|_, page| page.is_changed() || page.used > age);
        }
    }
}

/// Copies what is called `what` within a file (the ranges do not overlap), with a small buffer.
pub fn copy(storage: &dyn Storage, file: &str, what: &'static str, from: u64, to: u64, len: u64) -> Result<()> {
    let mut buffer = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(1 << 20)];
    let mut done = 0;
    while done < len {
        let n = usize::try_from(len - done).unwrap_or(usize::MAX).min(buffer.len());
        metadata::read(storage, file, what, from.saturating_add(done), &mut buffer[..n])?;
        metadata::write(storage, file, what, to.saturating_add(done), &buffer[..n])?;
        done += n as u64;
    }
    Ok(())
}

/// Has the file be as long as what was given out of it, `end`, if that is known; what was written is flushed.
pub fn extend(end: Option<u64>, storage: &dyn Storage) -> Result<()> {
    if let Some(end) = end
        && !storage.facts().fixed_len
        && storage.len().context("Could not get the size of the file")? < end
    {
        storage.set_len(end, Preallocation::Off).context("Could not extend the file")?;
    }
    storage.flush().context("Could not flush")
}

/// Writes what waits: length of the file, as in [`extend`], L2 tables, L1 table, in this order.
pub fn write_levels(l1: &mut TableCache, l2: &mut TableCache, end: Option<u64>, storage: &dyn Storage) -> Result<()> {
    if !l2.is_changed() && !l1.is_changed() {
        return Ok(());
    }
    extend(end, storage)?;
    storage.announce(Event::L2_UPDATE);
    l2.write_out(storage)?;
    if l1.is_changed() {
        storage.flush().context("Could not flush")?;
        storage.announce(Event::L1_UPDATE);
        l1.write_out(storage)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::storage::memory::Memory;

    #[test]
    fn only_what_changed_is_written() {
        let file = Memory::new(vec![7; 3 * PAGE]);
        let mut cache = TableCache::new(1 << 16, "a", "the table");
        let mut word = [0; 4];
        cache.read(&file, PAGE as u64 - 2, &mut word).unwrap();
        assert_eq!(word, [7; 4]);
        cache.write(&file, 8, &[1, 2, 3, 4]).unwrap();
        // Somebody else writes beside it.
        file.write_at(12, &[9; 4]).unwrap();
        file.write_at(4, &[9; 4]).unwrap();
        assert!(cache.is_changed());
        cache.write_out(&file).unwrap();
        assert!(!cache.is_changed());
        assert_eq!(file.to_vec()[..20], [7, 7, 7, 7, 9, 9, 9, 9, 1, 2, 3, 4, 9, 9, 9, 9, 7, 7, 7, 7]);
    }

    #[test]
    fn the_first_page_is_written_at_once() {
        let file = Memory::new(vec![7; 2 * PAGE]);
        let mut cache = TableCache::new(1 << 16, "a", "the table");
        for at in [8, 16, PAGE as u64] {
            cache.write(&file, at, &[1; 4]).unwrap();
        }
        // What lies between two changes is written again.
        file.write_at(12, &[9; 4]).unwrap();
        assert!(cache.write_first(&file).unwrap() && !cache.write_first(&file).unwrap());
        assert_eq!(file.to_vec()[4..24], [7, 7, 7, 7, 1, 1, 1, 1, 7, 7, 7, 7, 1, 1, 1, 1, 7, 7, 7, 7]);
        assert_eq!(file.to_vec()[PAGE], 7);
        cache.write_out(&file).unwrap();
        assert_eq!(file.to_vec()[PAGE], 1);
    }

    #[test]
    fn it_stays_small() {
        let file = Memory::new(vec![0; 100 * PAGE]);
        let mut cache = TableCache::new(4 * PAGE, "a", "the table");
        for page in 0..100 {
            cache.slice(&file, page * PAGE as u64, 8).unwrap();
            assert!(cache.pages.len() <= 4);
        }
        cache.write(&file, 0, &[1; 8]).unwrap();
        for page in 1..100 {
            cache.slice(&file, page * PAGE as u64, 8).unwrap();
        }
        let mut word = [0; 8];
        cache.read(&file, 0, &mut word).unwrap();
        assert_eq!(word, [1; 8]);
    }

    #[test]
    fn runs_of_bits_are_found_across_bytes_and_pages() {
        let mut bytes = vec![0xff; 3 * PAGE];
        bytes[1] = 0b0000_1100;
        bytes[2 * PAGE] = 0b1011_1111;
        let file = Memory::new(bytes);
        let mut cache = TableCache::new(1 << 16, "a", "the table");
        let bits = (8 * PAGE) as u64;
        for (first, most, expected) in [
            (0, 100, (true, 8)),
            (3, 100, (true, 5)),
            (3, 4, (true, 4)),
            (8, 100, (false, 2)),
            (10, 1, (true, 1)),
            (11, 100, (true, 1)),
            (12, 100, (false, 4)),
            (16, u64::MAX, (true, 2 * bits + 6 - 16)),
            (2 * bits + 6, 100, (false, 1)),
            (2 * bits + 7, 20, (true, 20)),
        ] {
            assert_eq!(cache.bit_run(&file, 0, first, most).unwrap(), expected, "{first} {most}");
        }
    }
}
