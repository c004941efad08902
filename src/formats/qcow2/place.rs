//! Guest data: where it may go, and what entries say once it is there.
//!
//! Invariants: what a placement covers is counted as used from `place` on, but no L2 entry points there before
//! `publish`. An L2 table for a guest range is made by `place`, before the data clusters, as the reference does.

use crate::block::error::Context;
use crate::block::{
    Action, Compress, Error, GuestOffset, HostOffset, HostPlace, Placed, Result, Store, Ticket, Write, ZeroedRoom,
};

use super::Qcow2Driver;
use super::alloc::Allocator;
use super::entry::{L1Entry, L2Entry};
use super::geometry::ClusterIndex;
use super::guard;
use super::layout::{self, ENTRY, SUBCLUSTERS};
use super::tables::Table;

/// What hosts give back at least, in bytes.
const HOST_BLOCK: u64 = 4096;

/// How a cluster can be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Class {
    /// It has room of its own at this host offset and is all data.
    InPlace(HostOffset),
    /// It has room of its own, but its marks have to change, and it may have to be filled around the range.
    Reuse(HostOffset),
    /// It needs room; nothing of what it holds is lost if only the written part is filled.
    New,
    /// It needs room and its whole content.
    Copy,
}

impl Qcow2Driver {
    /// The table in which a guest offset's L2 entry is, made or copied if it cannot be written to.
    pub(super) fn writable_l2(&self, alloc: &mut Allocator, at: GuestOffset) -> Result<Table> {
        let (l1, index) = (self.l1(), self.geometry.l1_index(at));
        if index >= l1.len / ENTRY {
            return Err(self.corrupt(format!("L1 table has no entry for guest offset {at}")));
        }
        let entry = self.l1_entry(l1, index)?;
        let old = entry.table().map(HostOffset::get);
        if let Some(old) = old.filter(|old| self.geometry.in_cluster(*old) != 0) {
            return Err(self.corrupt(format!("L2 table offset {old:#x} unaligned (L1 index: {index:#x})")));
        }
        if let Some(old) = old.filter(|_| entry.is_own()) {
            return Ok(self.l2(old));
        }
        let new = self.geometry.offset_of(self.allocate(alloc, 1)?);
        let table = self.l2(new);
        self.tables.fresh(table)?;
        if let Some(old) = old {
            let from = self.l2(old);
            for n in 0..table.len / ENTRY {
                let word = self.tables.get(from, n)?;
                if word != 0 {
                    self.tables.set(table, n, word)?;
                }
            }
            alloc.freed.push((self.geometry.cluster_of(old), 1, false));
        }
        self.tables.set(l1, index, L1Entry::own(HostOffset(new)).0)?;
        self.add_metadata(new, guard::L2);
        Ok(table)
    }

    fn classify(&self, entry: L2Entry, bitmap: u64, guest: GuestOffset) -> Class {
        if entry.is_compressed() {
            return Class::Copy;
        }
        if self.external {
            // Room in an external data file is the guest's own offset, and never shared.
            let data = if self.geometry.extended { bitmap as u32 == u32::MAX } else { !entry.reads_zero() };
            return match self.is_there(entry) {
                true if data => Class::InPlace(HostOffset(guest.get())),
                true => Class::Reuse(HostOffset(guest.get())),
                false => Class::New,
            };
        }
        match (entry.host(), entry.is_own()) {
            (None, _) => Class::New,
            (Some(_), false) if self.geometry.extended || !entry.reads_zero() => Class::Copy,
            (Some(_), false) => Class::New,
            (Some(host), true) if self.geometry.extended && bitmap as u32 != u32::MAX => Class::Reuse(host),
            (Some(host), true) if !self.geometry.extended && entry.reads_zero() => Class::Reuse(host),
            (Some(host), true) => Class::InPlace(host),
        }
    }

    /// Whether each cluster of the disk is data that can be written where it is. (Subclusters are not looked at: those
    /// of a new image hold nothing.)
    fn is_preallocated(&self) -> Result<bool> {
        let (geometry, l1) = (self.geometry, self.l1());
        let mut left = self.header().fields.size.div_ceil(geometry.cluster_size());
        if geometry.extended || left == 0 {
            return Ok(false);
        }
        let own = |word: u64| {
            let entry = L2Entry(word);
            entry.is_own() && !entry.reads_zero() && self.is_there(entry)
        };
        for index in 0..geometry.l1_entries_for(self.header().fields.size) {
            let entry = self.l1_entry(l1, index)?;
            let table = entry.table().map(HostOffset::get).filter(|at| entry.is_own() && geometry.in_cluster(*at) == 0);
            let Some(at) = table else { return Ok(false) };
            let (table, entries) = (self.l2(at), left.min(geometry.l2_entries()));
            let mut from = 0;
            while from < entries * ENTRY {
                let seen = self.tables.view(table, from, |bytes| {
                    let words = layout::words(bytes);
                    let count = usize::try_from(entries - from / ENTRY).unwrap_or(usize::MAX);
                    words.take(count).all(own).then_some(bytes.len() as u64)
                })?;
                let Some(seen) = seen else { return Ok(false) };
                from += seen.max(ENTRY);
            }
            left -= entries;
        }
        Ok(true)
    }

    fn place_data(&self, alloc: &mut Allocator, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_size();
        let table = self.writable_l2(alloc, at)?;
        let index = geometry.l2_index(at);
        let (first, within) = geometry.within(at);
        let most = (geometry.l2_entries() - index).min((within.saturating_add(len)).div_ceil(cluster));
        let class_of = |n: u64| -> Result<Class> {
            let (entry, bitmap) = self.l2_entry(table, index + n)?;
            Ok(self.classify(entry, bitmap, first + n * cluster))
        };
        let class = class_of(0)?;
        let follows = |n: u64, next: Class| match (class, next) {
            (Class::InPlace(a), Class::InPlace(b)) | (Class::Reuse(a), Class::Reuse(b)) => a + n * cluster == b,
            (a, b) => a == b,
        };
        let mut n = 1;
        while n < most && follows(n, class_of(n)?) {
            n += 1;
        }
        let len = len.min(n * cluster - within);
        if let (Class::InPlace(host) | Class::Reuse(host), false) = (class, self.external) {
            self.check_data(host.get(), n * cluster)?;
        }
        let host = match class {
            Class::InPlace(host) | Class::Reuse(host) => host.get(),
            Class::New | Class::Copy if self.external => first.get(),
            Class::New | Class::Copy => geometry.offset_of(self.allocate(alloc, n)?),
        };
        let unit = geometry.guest_cluster(first);
        let ticket = match class {
            Class::InPlace(_) => Ticket::Nothing,
            Class::Reuse(_) => Ticket::Marks { unit, entry: host },
            Class::New => Ticket::New { unit, count: n, entry: host },
            Class::Copy => Ticket::Whole { unit, count: n, entry: host },
        };
        let (before, after) = self.fill(table, index, at, len, n, class)?;
        let place = HostPlace { file: self.data_file(), at: HostOffset(host + within) };
        Ok(Placed { start: at, len, store, action: Action::Write { place, before, after }, ticket })
    }

    /// Bytes before and after a range that have to be filled with what they read as.
    fn fill(&self, table: Table, index: u64, at: GuestOffset, len: u64, n: u64, class: Class) -> Result<(u64, u64)> {
        let unit = match class {
            Class::InPlace(_) => return Ok((0, 0)),
            Class::Copy => self.geometry.cluster_size(),
            _ => self.geometry.subcluster_size(),
        };
        let end = (at + len).get();
        let (mut before, mut after) = (at.get() % unit, end.next_multiple_of(unit) - end);
        if matches!(class, Class::Reuse(_)) && self.geometry.extended {
            // A subcluster that is there already needs no filling.
            let there = |index: u64, guest: u64| -> Result<bool> {
                let (_, bitmap) = self.l2_entry(table, index)?;
                Ok(bitmap >> (self.geometry.in_cluster(guest) / unit) & 1 != 0)
            };
            if before > 0 && there(index, at.get())? {
                before = 0;
            }
            if after > 0 && there(index + n - 1, end - 1)? {
                after = 0;
            }
        }
        Ok((before, after))
    }

    fn place_packed(&self, alloc: &mut Allocator, at: GuestOffset, bytes: u64) -> Result<Placed> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_size();
        if self.external {
            return Err(Error::unsupported("Operation not supported"));
        }
        if geometry.within(at).1 != 0 || bytes == 0 || bytes > cluster {
            return Err(Error::invalid("a compressed cluster is written as a whole"));
        }
        self.writable_l2(alloc, at)?;
        let host = self.pack(alloc, bytes)?;
        let entry = geometry.compressed_entry(host, bytes).ok_or_else(|| Error::invalid("File too large"))?;
        let place = HostPlace { file: 0, at: HostOffset(host) };
        Ok(Placed {
            start: at,
            len: cluster.min(self.header().fields.size.saturating_sub(at.get())).max(1),
            store: Store::Compressed { bytes },
            action: Action::Write { place, before: 0, after: 0 },
            ticket: Ticket::Packed { unit: geometry.guest_cluster(at), entry },
        })
    }

    /// The bytes of free clusters, with those around them that are free too up to whole blocks of the host: it gives back
    /// no less. Where they start, and how many they are.
    fn free_around(&self, first: ClusterIndex, count: u64) -> (u64, u64) {
        let per_block = HOST_BLOCK.div_ceil(self.geometry.cluster_size());
        let all_free = |from: u64, to: u64| {
            (from..to).all(|cluster| self.refcount(ClusterIndex(cluster)).is_ok_and(|count| count == 0))
        };
        let (first, end) = (first.0, (first + count).0);
        let (from, to) = (first / per_block * per_block, end.next_multiple_of(per_block));
        let from = if all_free(from, first) { from } else { first };
        let to = if all_free(end, to) { to } else { end };
        (self.geometry.offset_of(ClusterIndex(from)), (to - from) << self.geometry.cluster_bits)
    }

    /// The marks of the subclusters of guest cluster `first` that a range covers.
    fn marks(&self, first: GuestOffset, start: u64, end: u64) -> u64 {
        let unit = self.geometry.subcluster_size();
        let from = start.saturating_sub(first.get()) / unit;
        let to = end.saturating_sub(first.get()).div_ceil(unit).min(u64::from(SUBCLUSTERS));
        let below = |n: u64| (1u64 << n.min(32)) - 1;
        below(to) & !below(from)
    }

    fn publish_entries(&self, alloc: &mut Allocator, placed: &Placed) -> Result<()> {
        let geometry = self.geometry;
        let (cluster, start) = (geometry.cluster_size(), placed.start.get());
        let (mut from, mut to) = (start, start + placed.len);
        if let Action::Write { before, after, .. } = placed.action {
            from = from.saturating_sub(before);
            to = to.saturating_add(after);
        }
        let (first, within) = geometry.within(placed.start);
        let table = self.writable_l2(alloc, placed.start)?;
        let clusters = (within + placed.len).div_ceil(cluster);
        for n in 0..clusters {
            let guest = first + n * cluster;
            let index = geometry.l2_index(placed.start) + n;
            let (old, bitmap) = self.l2_entry(table, index)?;
            let room = |host: u64| L2Entry::own(HostOffset(host) + n * cluster);
            let marks = if geometry.extended { self.marks(guest, from, to) } else { 0 };
            let all = if geometry.extended { u64::from(u32::MAX) } else { 0 };
            let (entry, bits) = match placed.ticket {
                Ticket::Nothing => (old, bitmap),
                Ticket::New { entry, .. } => (room(entry), (bitmap & !(marks << 32) & !u64::from(u32::MAX)) | marks),
                Ticket::Whole { entry, .. } => (room(entry), all),
                Ticket::Marks { .. } if geometry.extended => (old, (bitmap & !(marks << 32)) | marks),
                Ticket::Marks { .. } => (old.with_zero(false), 0),
                Ticket::Packed { entry, .. } => (L2Entry(entry), 0),
                Ticket::Zeros { room, .. } => self.zeroed(old, bitmap, marks, room),
            };
            if (entry, bits) == (old, bitmap) {
                continue;
            }
            self.set_l2_entry(table, index, entry, bits)?;
            if !entry.is_where(old) {
                let gives_up = |room| matches!(room, ZeroedRoom::GiveUp | ZeroedRoom::Forget);
                let punch = matches!(placed.ticket, Ticket::Zeros { room, .. } if gives_up(room));
                self.free_entry(alloc, old, punch)?;
            }
        }
        Ok(())
    }

    /// An entry and its bitmap once the marked subclusters (or the cluster) read as zeros.
    fn zeroed(&self, old: L2Entry, bitmap: u64, marks: u64, room: ZeroedRoom) -> (L2Entry, u64) {
        if room == ZeroedRoom::Forget {
            return (L2Entry::NOTHING, 0);
        }
        let all = u64::from(u32::MAX);
        let keeps = old.is_own() && room == ZeroedRoom::Keep;
        if self.geometry.extended {
            let partial = marks != all;
            let (entry, rest) = if partial || keeps { (old, bitmap) } else { (L2Entry::NOTHING, 0) };
            return (entry, (rest & !marks) | (marks << 32));
        }
        if keeps { (old.with_zero(true), 0) } else { (L2Entry::ZEROS, 0) }
    }

    fn place_zero(
        &self,
        alloc: &mut Allocator,
        at: GuestOffset,
        len: u64,
        unmap: bool,
        store: Store,
    ) -> Result<Placed> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_size();
        let end_of_disk = (at + len).get() >= self.header().fields.size;
        let unit = geometry.subcluster_size();
        let whole = if end_of_disk { len.div_ceil(unit) * unit } else { len / unit * unit };
        if !at.get().is_multiple_of(unit) || whole == 0 {
            return self.place_data(alloc, at, len, store);
        }
        let table = self.writable_l2(alloc, at)?;
        let (index, within) = (geometry.l2_index(at), geometry.within(at).1);
        let raw = self.external && self.header().fields.autoclear & layout::DATA_FILE_RAW != 0;
        let done = |len: u64, count: u64, room: ZeroedRoom| Placed {
            start: at,
            len,
            store,
            // A raw data file must read as zeros by itself.
            action: if raw {
                Action::Zero { place: HostPlace { file: self.data_file(), at: HostOffset(at.get()) } }
            } else {
                Action::Nothing
            },
            ticket: Ticket::Zeros { unit: geometry.guest_cluster(at), count, room },
        };
        let room = if unmap { ZeroedRoom::GiveUp } else { ZeroedRoom::Keep };
        if geometry.version < 3 {
            if self.shows_below() {
                return self.place_data(alloc, at, len, store);
            }
            let n = (whole / cluster).min(geometry.l2_entries() - index);
            return Ok(done(len.min(n * cluster), n, ZeroedRoom::Forget));
        }
        if within == 0 && whole >= cluster {
            let n = (whole / cluster).min(geometry.l2_entries() - index);
            return Ok(done(len.min(n * cluster), n, room));
        }
        // A part of one cluster: its subclusters, if they can be told apart and are nobody else's.
        let (entry, _) = self.l2_entry(table, index)?;
        let len = len.min(cluster - within);
        let shared = entry.host().is_some() && !entry.is_own() && !self.external;
        if entry.is_compressed() || shared {
            return self.place_data(alloc, at, len, store);
        }
        Ok(done(len, 1, ZeroedRoom::Keep))
    }
}

impl Write for Qcow2Driver {
    fn unit(&self) -> u64 {
        self.geometry.cluster_size()
    }

    fn fill_unit(&self) -> u64 {
        self.geometry.subcluster_size()
    }

    fn granule(&self) -> u64 {
        if self.is_preallocated().unwrap_or(false) { 1 } else { self.fill_unit() }
    }

    fn place(&self, at: GuestOffset, len: u64, store: Store) -> Result<Placed> {
        let mut alloc = self.lock_alloc();
        self.before_first_change(&mut alloc)?;
        self.settle_if_due(&mut alloc)?;
        let len = len.max(1);
        let placed = match store {
            Store::Data => self.place_data(&mut alloc, at, len, store),
            Store::Compressed { bytes } => self.place_packed(&mut alloc, at, bytes),
            Store::Zero { unmap } => self.place_zero(&mut alloc, at, len, unmap, store),
        }?;
        self.touch(&mut alloc, at.get(), placed.len)?;
        Ok(placed)
    }

    fn publish(&self, placed: &Placed) -> Result<()> {
        if placed.ticket == Ticket::Nothing {
            return Ok(());
        }
        let mut alloc = self.lock_alloc();
        self.publish_entries(&mut alloc, placed)?;
        self.settle_if_due(&mut alloc)
    }

    fn withdraw(&self, placed: &Placed) {
        let geometry = self.geometry;
        let (first, n) = match placed.ticket {
            Ticket::New { count, entry, .. } | Ticket::Whole { count, entry, .. } if !self.external => {
                (geometry.cluster_of(entry), count)
            }
            Ticket::Packed { entry, .. } => {
                let (at, len) = self.geometry.compressed(entry);
                let first = geometry.cluster_of(at);
                (first, geometry.cluster_of(at + len - 1).since(first) + 1)
            }
            _ => return,
        };
        let mut alloc = self.lock_alloc();
        // If this fails the clusters are leaked, no more.
        if let Ok(free) = self.lower(first, n) {
            for (first, count) in free {
                // On a disk that is full the tables may need that space.
                let (at, len) = self.free_around(first, count);
                let _ = self.file().storage.discard(at, len);
                self.freed(&mut alloc, first, count);
            }
        }
    }

    fn wrote_the_same(&self, at: GuestOffset, len: u64) -> Result<()> {
        let mut alloc = self.lock_alloc();
        self.before_first_change(&mut alloc)?;
        self.touch(&mut alloc, at.get(), len)
    }

    fn discard(&self, at: GuestOffset, len: u64) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let size = self.header().fields.size;
        let end = at.get().saturating_add(len).min(size);
        let end = if end == size { end.next_multiple_of(cluster) } else { end - end % cluster };
        let mut guest = GuestOffset(at.get().next_multiple_of(cluster));
        let mut alloc = self.lock_alloc();
        self.before_first_change(&mut alloc)?;
        self.touch(&mut alloc, at.get(), len)?;
        while guest.get() < end {
            let l1 = self.l1();
            if self.l1_entry(l1, self.geometry.l1_index(guest))?.table().is_none() && self.backing.is_none() {
                let next = self.geometry.l1_index(guest) + 1;
                guest = GuestOffset(next.saturating_mul(self.geometry.l1_covers()));
                continue;
            }
            let table = self.writable_l2(&mut alloc, guest)?;
            let index = self.geometry.l2_index(guest);
            let (old, bitmap) = self.l2_entry(table, index)?;
            let there = self.is_there(old);
            let new = match (self.geometry.version < 3, there || self.backing.is_some()) {
                (true, _) => (L2Entry::NOTHING, 0),
                (false, false) => (old, bitmap),
                (false, true) if self.geometry.extended => (L2Entry::NOTHING, u64::from(u32::MAX) << 32),
                (false, true) => (L2Entry::ZEROS, 0),
            };
            if new != (old, bitmap) {
                self.set_l2_entry(table, index, new.0, new.1)?;
                self.free_entry(&mut alloc, old, true)?;
                if self.external
                    && there
                    && let Some(data) = self.files.get(self.data_file())
                {
                    data.storage.discard(guest.get(), cluster).context("Could not discard clusters")?;
                }
            }
            guest = guest + cluster;
            self.settle_if_due(&mut alloc)?;
        }
        Ok(())
    }

    /// Not where data is encrypted: compressed clusters are not.
    fn compressing(&self) -> Option<&dyn Compress> {
        if self.external || self.encrypted { None } else { Some(self) }
    }
}
