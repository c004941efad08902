//! The bounded cache of an image's tables: L1, L2, refcount table, refcount blocks.
//!
//! Tables are cached in slices, so a 2 MiB L2 table costs no more than what is used of it, and memory is bounded
//! whatever the image's size. What is changed stays here until [`Tables::write_back`], which writes in the one
//! order that leaves the image consistent (leaks at worst) wherever it stops:
//!
//! refcount blocks → refcount table → L2 → L1, with a flush of the file between two kinds that both had changes.
//!
//! New tables, of whatever kind, come before all of these, for nothing in the file points to them yet; and so does the
//! space of old ones that are a hole. Where there is no space, nothing has been counted as used yet either.
//!
//! Rules for those who change tables (all of them hold the allocator's lock meanwhile, see `mod.rs`):
//! * raise a refcount before the entry that needs it is set, fill a new table before it is pointed to;
//! * lower refcounts only after `write_back` has written the entries that no longer point there, and give the
//!   cluster out again only after that;
//! * a table that is given up is [`Tables::forget`]-ed before its place is used for anything else;
//! * call `write_back` when [`Tables::is_full`]: dirty slices are never evicted.
//!
//! This is not the cache of the other formats (`formats/table.rs`), and cannot be. Many threads look tables up here at
//! once, without the allocator's lock, so it is sharded and each slice has a lock of its own; there one lock holds the
//! driver's whole state, cache and all. What is changed here is whole tables, of four kinds with an order between them;
//! there it is single entries, in pages which guest data may share.
//!
//! Lock order: allocator (the caller's) → shard → nothing; slice → nothing. A slice's lock is never taken while
//! a shard is locked; a slice is read from the file under its own lock alone.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};

use crate::block::error::{Context, Operation, Place};
use crate::block::io::zeroed;
use crate::block::{Error, FileEnd, Result};
use crate::storage::{Event, HostKind, Storage, Zeroing};

use super::geometry::Geometry;
use super::layout::word;

/// What kind of table: in the order in which changes reach the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TableKind {
    /// A refcount block.
    RefcountBlock,
    /// The refcount table.
    RefcountTable,
    /// An L2 table.
    L2,
    /// An L1 table.
    L1,
}

impl TableKind {
    const ALL: [TableKind; 4] = [TableKind::RefcountBlock, TableKind::RefcountTable, TableKind::L2, TableKind::L1];

    /// What errors call it.
    pub fn name(self) -> &'static str {
        match self {
            TableKind::RefcountBlock => "refcount block",
            TableKind::RefcountTable => "refcount table",
            TableKind::L2 => "L2 table",
            TableKind::L1 => "L1 table",
        }
    }

    /// What is announced before a part of it is read; the reference reads L1 tables unannounced.
    fn reading(self) -> Option<Event> {
        match self {
            TableKind::RefcountBlock => Some(Event::REFBLOCK_LOAD),
            TableKind::RefcountTable => Some(Event::REFTABLE_LOAD),
            TableKind::L2 => Some(Event::L2_LOAD),
            TableKind::L1 => None,
        }
    }

    /// What is announced before a part of it is written.
    fn writing(self) -> Event {
        match self {
            TableKind::RefcountBlock => Event::REFBLOCK_UPDATE_PART,
            TableKind::RefcountTable => Event::REFTABLE_UPDATE,
            TableKind::L2 => Event::L2_UPDATE,
            TableKind::L1 => Event::L1_UPDATE,
        }
    }
}

/// A table in the image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Table {
    /// What it is.
    pub kind: TableKind,
    /// Where it starts, in bytes.
    pub at: u64,
    /// How long it is, in bytes.
    pub len: u64,
}

/// Most bytes of one slice.
const SLICE: u64 = 16 << 10;
/// Shards of the index, so that threads seldom wait for each other.
const SHARDS: usize = 8;
/// What a slice costs beside its bytes, about.
const OVERHEAD: u64 = 128;
/// What the cache holds if nobody says otherwise: the L2 tables of 64 GiB in clusters of 64 KiB, of 1 GiB in the
/// smallest ones.
pub fn default_bytes(geometry: &Geometry) -> u64 {
    if geometry.cluster_bits < 12 { 16 << 20 } else { 8 << 20 }
}
/// The least that works.
const LEAST_BYTES: u64 = 1 << 20;

#[derive(Debug)]
struct Slice {
    kind: TableKind,
    at: u64,
    len: u64,
    dirty: AtomicBool,
    /// Nothing in the file points to it, and it was never written.
    fresh: AtomicBool,
    used: AtomicU64,
    /// `None` until it has been read.
    bytes: RwLock<Option<Box<[u8]>>>,
}

#[derive(Debug, Default)]
struct Shard {
    slices: HashMap<u64, Arc<Slice>>,
    held: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Tables {
    storage: Arc<dyn Storage>,
    /// The file's name, for errors.
    file: String,
    shards: [Mutex<Shard>; SHARDS],
    limit: u64,
    clock: AtomicU64,
    dirty: AtomicU64,
    end: FileEnd,
}

impl Tables {
    /// An empty cache of that many bytes over an image file.
    pub fn new(storage: Arc<dyn Storage>, file: &str, bytes: u64) -> Self {
        Self {
            storage,
            file: file.to_owned(),
            shards: Default::default(),
            limit: bytes.max(LEAST_BYTES),
            clock: AtomicU64::new(0),
            dirty: AtomicU64::new(0),
            end: FileEnd::default(),
        }
    }

    /// Refuses a table that lies past the end of the file. Not for an image that is written to: there it may be new.
    pub fn require(&self, table: Table) -> Result<()> {
        self.end.require(&*self.storage, table.kind.name(), table.at, table.len)
    }

    /// Gives `look` the table's bytes from `from` on, to the end of a slice (at least 1 byte if `from` lies in
    /// the table, none otherwise).
    pub fn view<R>(&self, table: Table, from: u64, look: impl FnOnce(&[u8]) -> R) -> Result<R> {
        if from >= table.len {
            return Ok(look(&[]));
        }
        let slice = self.slice(table, from);
        let skip = index(from % SLICE)?;
        let bytes = slice.bytes.read().unwrap_or_else(|e| e.into_inner());
        if let Some(bytes) = &*bytes {
            return Ok(look(bytes.get(skip..).unwrap_or(&[])));
        }
        drop(bytes);
        let mut bytes = slice.bytes.write().unwrap_or_else(|e| e.into_inner());
        let bytes = self.load(&slice, &mut bytes)?;
        Ok(look(bytes.get(skip..).unwrap_or(&[])))
    }

    /// Whether the table's byte `from` has been read.
    pub fn holds(&self, table: Table, from: u64) -> bool {
        let at = table.at.saturating_add(from - from % SLICE);
        let slice = lock(&self.shards[shard_of(at)]).slices.get(&at).map(Arc::clone);
        slice.is_some_and(|slice| slice.bytes.try_read().is_ok_and(|bytes| bytes.is_some()))
    }

    /// Gives `change` the table's `len` bytes from `from` on, which must lie in one slice (any aligned unit up to
    /// 512 bytes does); they are dirty afterwards.
    pub fn change<R>(&self, table: Table, from: u64, len: u64, change: impl FnOnce(&mut [u8]) -> R) -> Result<R> {
        let outside = || Error::corrupt(format!("{} at {:#x}: no entry at byte {from}", table.kind.name(), table.at));
        if from.checked_add(len).is_none_or(|end| end > table.len) || from % SLICE + len > SLICE {
            return Err(outside());
        }
        let slice = self.slice(table, from);
        let mut bytes = slice.bytes.write().unwrap_or_else(|e| e.into_inner());
        let bytes = self.load(&slice, &mut bytes)?;
        let (start, len) = (index(from % SLICE)?, index(len)?);
        let part = bytes.get_mut(start..start + len).ok_or_else(outside)?;
        self.mark_dirty(&slice);
        Ok(change(part))
    }

    /// The 8-byte entry with that index.
    pub fn get(&self, table: Table, entry: u64) -> Result<u64> {
        let from = entry.saturating_mul(8);
        let value = self.view(table, from, |bytes| word(bytes, 0))?;
        value.ok_or_else(|| Error::corrupt(format!("{} at {:#x}: no entry {entry}", table.kind.name(), table.at)))
    }

    /// Sets the 8-byte entry with that index.
    pub fn set(&self, table: Table, entry: u64, value: u64) -> Result<()> {
        self.change(table, entry.saturating_mul(8), 8, |bytes| bytes.copy_from_slice(&value.to_be_bytes()))
    }

    /// The two words of the 16-byte entry with that index.
    pub fn get_pair(&self, table: Table, entry: u64) -> Result<(u64, u64)> {
        let from = entry.saturating_mul(16);
        let value = self.view(table, from, |bytes| Some((word(bytes, 0)?, word(bytes, 8)?)))?;
        value.ok_or_else(|| Error::corrupt(format!("{} at {:#x}: no entry {entry}", table.kind.name(), table.at)))
    }

    /// Sets the two words of the 16-byte entry with that index.
    pub fn set_pair(&self, table: Table, entry: u64, value: (u64, u64)) -> Result<()> {
        self.change(table, entry.saturating_mul(16), 16, |bytes| {
            bytes[..8].copy_from_slice(&value.0.to_be_bytes());
            bytes[8..].copy_from_slice(&value.1.to_be_bytes());
        })
    }

    /// A new table, all zeros and dirty; whatever was cached for its place is replaced.
    pub fn fresh(&self, table: Table) -> Result<()> {
        self.forget(table.at, table.len);
        let mut from = 0;
        while from < table.len {
            let slice = self.slice(table, from);
            let mut bytes = slice.bytes.write().unwrap_or_else(|e| e.into_inner());
            *bytes = Some(zeroed(slice.len)?.into_boxed_slice());
            slice.fresh.store(true, Ordering::Release);
            self.mark_dirty(&slice);
            from += SLICE;
        }
        Ok(())
    }

    /// Drops what is cached for a range of the file, changes and all.
    pub fn forget(&self, at: u64, len: u64) {
        let end = at.saturating_add(len);
        for shard in &self.shards {
            let mut shard = lock(shard);
            let mut freed = 0;
            shard.slices.retain(|_, slice| {
                let keep = slice.at >= end || slice.at.saturating_add(slice.len) <= at;
                if !keep {
                    freed += slice.len + OVERHEAD;
                    if slice.dirty.swap(false, Ordering::AcqRel) {
                        self.dirty.fetch_sub(slice.len + OVERHEAD, Ordering::AcqRel);
                    }
                }
                keep
            });
            shard.held = shard.held.saturating_sub(freed);
        }
    }

    /// Whether so much is dirty that [`Tables::write_back`] is due.
    pub fn is_full(&self) -> bool {
        self.dirty.load(Ordering::Acquire) > self.limit / 2
    }

    /// Whether anything is dirty.
    pub fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire) > 0
    }

    /// Writes every change to the file, in the order of the module's head. Does not flush the file at the end.
    pub fn write_back(&self) -> Result<()> {
        let mut wrote = false;
        for kind in TableKind::ALL {
            let slices = self.dirty_slices(|slice| slice.kind == kind && slice.fresh.load(Ordering::Acquire));
            self.write_slices(&slices)?;
            wrote |= !slices.is_empty();
        }
        self.reserve(&self.dirty_slices(|slice| slice.kind != TableKind::L2))?;
        for kind in TableKind::ALL {
            let slices = self.dirty_slices(|slice| slice.kind == kind);
            if slices.is_empty() {
                continue;
            }
            // Refcounts can be in the file before or after new tables.
            if wrote && kind != TableKind::RefcountBlock {
                self.storage.flush().with_context(|| format!("flush before {}", kind.name()))?;
            }
            self.write_slices(&slices)?;
            wrote = true;
        }
        Ok(())
    }

    /// Those of the dirty ones that are wanted, in the order of the file.
    fn dirty_slices(&self, wanted: impl Fn(&Slice) -> bool) -> Vec<Arc<Slice>> {
        let mut found = Vec::new();
        for shard in &self.shards {
            let shard = lock(shard);
            let dirty = shard.slices.values().filter(|slice| slice.dirty.load(Ordering::Acquire) && wanted(slice));
            found.extend(dirty.map(Arc::clone));
        }
        found.sort_unstable_by_key(|slice| slice.at);
        found
    }

    /// Takes the space of tables that are holes of the file, as they are in a new image.
    fn reserve(&self, slices: &[Arc<Slice>]) -> Result<()> {
        for slice in slices {
            let place = || Place::of_table(Operation::Write, &self.file, slice.kind.name(), slice.at);
            let (mut at, end) = (slice.at, slice.at.saturating_add(slice.len));
            while at < end {
                let extent = self.storage.extent(at, end - at).at(place)?;
                let len = extent.len.clamp(1, end - at);
                if extent.kind == HostKind::Hole {
                    self.storage.zero(at, len, Zeroing::Allocate).at(place)?;
                }
                at += len;
            }
        }
        Ok(())
    }

    /// Writes neighbours in one go.
    fn write_slices(&self, slices: &[Arc<Slice>]) -> Result<()> {
        const BATCH: usize = 1 << 20;
        let mut batch: Vec<u8> = Vec::new();
        let mut first = 0;
        for (n, slice) in slices.iter().enumerate() {
            let bytes = slice.bytes.read().unwrap_or_else(|e| e.into_inner());
            batch.extend_from_slice(bytes.as_deref().unwrap_or(&[]));
            drop(bytes);
            let joins = slices.get(n + 1).is_some_and(|next| next.at == slice.at + slice.len);
            if joins && batch.len() < BATCH {
                continue;
            }
            let part = &slices[first..=n];
            let at = part.first().map_or(0, |slice| slice.at);
            self.storage.announce(slice.kind.writing());
            self.storage
                .write_at(at, &batch)
                .at(|| Place::of_table(Operation::Write, &self.file, slice.kind.name(), at))?;
            for slice in part {
                slice.fresh.store(false, Ordering::Release);
                if slice.dirty.swap(false, Ordering::AcqRel) {
                    self.dirty.fetch_sub(slice.len + OVERHEAD, Ordering::AcqRel);
                }
            }
            batch.clear();
            first = n + 1;
        }
        Ok(())
    }

    fn mark_dirty(&self, slice: &Slice) {
        if !slice.dirty.swap(true, Ordering::AcqRel) {
            self.dirty.fetch_add(slice.len + OVERHEAD, Ordering::AcqRel);
        }
    }

    fn load<'a>(&self, slice: &Slice, bytes: &'a mut Option<Box<[u8]>>) -> Result<&'a mut [u8]> {
        if bytes.is_none() {
            if slice.kind == TableKind::L2 {
                // What was new is here. What a file that was cut off has lost is not zeros.
                self.end.require(&*self.storage, slice.kind.name(), slice.at, slice.len)?;
            }
            let mut read = zeroed(slice.len)?.into_boxed_slice();
            if let Some(event) = slice.kind.reading() {
                self.storage.announce(event);
            }
            self.storage
                .read_at(slice.at, &mut read)
                .at(|| Place::of_table(Operation::Read, &self.file, slice.kind.name(), slice.at))?;
            *bytes = Some(read);
        }
        bytes.as_deref_mut().ok_or_else(|| Error::corrupt("a table slice vanished"))
    }

    /// The slice of `table` with the byte `from` in it, read or not.
    fn slice(&self, table: Table, from: u64) -> Arc<Slice> {
        let start = from - from % SLICE;
        let at = table.at.saturating_add(start);
        let len = SLICE.min(table.len - start);
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        let mut shard = lock(&self.shards[shard_of(at)]);
        let slice = match shard.slices.entry(at) {
            // A corrupt image can give one place two lengths; the one that is used now counts.
            Entry::Occupied(entry) if entry.get().len == len => {
                entry.get().used.store(now, Ordering::Relaxed);
                return Arc::clone(entry.get());
            }
            Entry::Occupied(mut entry) => {
                let slice = Arc::new(Slice::new(table.kind, at, len, now));
                let old = entry.insert(Arc::clone(&slice));
                if old.dirty.swap(false, Ordering::AcqRel) {
                    self.dirty.fetch_sub(old.len + OVERHEAD, Ordering::AcqRel);
                }
                shard.held = shard.held.saturating_sub(old.len + OVERHEAD);
                slice
            }
            Entry::Vacant(entry) => Arc::clone(entry.insert(Arc::new(Slice::new(table.kind, at, len, now)))),
        };
        shard.held += len + OVERHEAD;
        if shard.held > self.limit / SHARDS as u64 {
            shard.evict(self.limit / SHARDS as u64);
        }
        slice
    }
}

impl Slice {
    fn new(kind: TableKind, at: u64, len: u64, now: u64) -> Self {
        let (dirty, fresh) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { kind, at, len, dirty, fresh, used: AtomicU64::new(now), bytes: RwLock::default() }
    }
}

impl Shard {
    /// Drops the clean slices that nobody holds and that were not used for longest, down to 7/8 of the limit.
    fn evict(&mut self, limit: u64) {
        let mut idle: Vec<(u64, u64)> = self
            .slices
            .values()
            // Handles are given out under this shard's lock alone, so a count of one cannot grow meanwhile.
            .filter(|slice| Arc::strong_count(slice) == 1 && !slice.dirty.load(Ordering::Acquire))
            .map(|slice| (slice.used.load(Ordering::Relaxed), slice.at))
            .collect();
        idle.sort_unstable();
        for (_, at) in idle {
            if self.held <= limit / 8 * 7 {
                break;
            }
            if let Some(slice) = self.slices.remove(&at) {
                self.held = self.held.saturating_sub(slice.len + OVERHEAD);
            }
        }
    }
}

/// Where the slice at that place is kept. Tables lie at multiples of the cluster size: the bits are mixed.
fn shard_of(at: u64) -> usize {
    ((at >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % SHARDS
}

fn lock(shard: &Mutex<Shard>) -> MutexGuard<'_, Shard> {
    shard.lock().unwrap_or_else(|e| e.into_inner())
}

fn index(value: u64) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::corrupt("a table is too large"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::storage::memory::Memory;

    fn l2(at: u64, len: u64) -> Table {
        Table { kind: TableKind::L2, at, len }
    }

    #[test]
    fn changes_reach_the_file_at_write_back_alone() {
        let file = Arc::new(Memory::new(vec![0; 1 << 17]));
        let tables = Tables::new(file.clone(), "a", 0);
        let table = l2(65536, 65536);
        tables.set(table, 8191, 7).unwrap();
        assert_eq!(tables.get(table, 8191).unwrap(), 7);
        assert!(file.to_vec().iter().all(|byte| *byte == 0));
        tables.write_back().unwrap();
        assert!(!tables.is_dirty());
        assert_eq!(file.to_vec()[(1 << 17) - 1], 7);
        assert!(tables.get(table, 8192).is_err());
        assert!(tables.set(table, 8192, 1).is_err());
    }

    #[test]
    fn memory_is_bounded_and_evicted_slices_come_back() {
        let mut content = vec![0; 8 << 20];
        for (n, entry) in content.chunks_exact_mut(8).enumerate() {
            entry.copy_from_slice(&(n as u64).to_be_bytes());
        }
        let tables = Tables::new(Arc::new(Memory::new(content)), "a", 1 << 20);
        for round in 0..2 {
            for at in (0..8 << 20).step_by(512) {
                let table = l2(at, 512);
                assert_eq!(tables.get(table, 3).unwrap(), at / 8 + 3, "round {round}");
            }
        }
        let held: u64 = tables.shards.iter().map(|shard| lock(shard).held).sum();
        assert!(held <= 1 << 20, "{held}");
    }

    #[test]
    fn forgotten_tables_are_not_written() {
        let file = Arc::new(Memory::new(vec![1; 4096]));
        let tables = Tables::new(file.clone(), "a", 0);
        tables.fresh(l2(512, 512)).unwrap();
        tables.fresh(l2(1024, 512)).unwrap();
        tables.forget(512, 512);
        tables.write_back().unwrap();
        let bytes = file.to_vec();
        assert!(bytes[512..1024].iter().all(|byte| *byte == 1));
        assert!(bytes[1024..1536].iter().all(|byte| *byte == 0));
    }
}
