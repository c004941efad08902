//! Changing the virtual size.
//!
//! Growing: a longer L1 table in a new place; what lies past the old end cleared (see `tail.rs`); the new part's
//! clusters if they are wanted ahead; then the size. Shrinking: the size first; then entries beyond the new end are
//! taken back, what they pointed to is freed and punched, refcount blocks that count nothing are freed, the file is cut
//! after its last used cluster. Wherever it stops the disk is the old one or the new one, and the image consistent,
//! with leaks at worst. What cannot be done is refused before the first write.

use crate::block::error::Context;
use crate::block::io::clear_stored;
use crate::block::{Error, GuestOffset, HostOffset, HostPlace, Resize, ResizeFiles, Result};
use crate::storage::{Preallocation, Zeroing};

use super::Qcow2Driver;
use super::alloc::Allocator;
use super::counts::Counts;
use super::entry::L2Entry;
use super::geometry::ClusterIndex;
use super::layout::{self, ENTRY, MAX_L1_BYTES, REFCOUNT_OFFSET_MASK};
use super::prealloc::PIECE;
use super::refcount;
use super::space::ClusterSpace;
use super::tables::{Table, TableKind};
use super::tail::Tail;

impl Resize for Qcow2Driver {
    fn check(&self, size: u64, fill: Preallocation) -> Result<()> {
        if !self.write {
            return Err(Error::unsupported("Block node is read-only"));
        }
        let old = self.header().fields.size;
        if !size.is_multiple_of(layout::SECTOR) {
            return Err(Error::invalid("The new size must be a multiple of 512"));
        }
        if !self.snapshot_list().is_empty() && self.geometry.version < 3 {
            return Err(Error::unsupported("Can't resize a v2 image which has snapshots"));
        }
        let bitmaps = self.bitmap_list();
        if let Some(lost) = bitmaps.iter().find(|b| b.fields.flags & layout::BITMAP_IN_USE != 0) {
            let text = format!("Bitmap '{}' is inconsistent and cannot be used", lost.name);
            return Err(Error::unsupported(text).hint("Try block-dirty-bitmap-remove to delete this bitmap from disk"));
        }
        if size == 0 && !bitmaps.is_empty() {
            return Err(Error::unsupported("Bitmaps cannot be kept in an image without a size"));
        }
        if size < old && fill != Preallocation::Off {
            return Err(Error::invalid("Preallocation can't be used for shrinking an image"));
        }
        if self.geometry.l1_entries_for(size) > MAX_L1_BYTES / ENTRY {
            return Err(Error::invalid("Failed to grow the L1 table: File too large"));
        }
        Ok(())
    }

    fn check_over(&self, size: u64, fill: Preallocation, _covered: u64) -> Result<()> {
        self.check(size, fill)?;
        self.before_resize(&mut self.lock_alloc())?;
        self.data_apart()
    }

    fn resize(&self, size: u64, fill: Preallocation) -> Result<()> {
        self.resize_over(size, fill, 0)
    }

    fn resize_with(&self, size: u64, fill: Preallocation, files: &dyn ResizeFiles) -> Result<()> {
        self.resize_over(size, fill, files.covered())
    }
}

impl Qcow2Driver {
    /// The backing file covers the first `covered` bytes.
    fn resize_over(&self, size: u64, fill: Preallocation, covered: u64) -> Result<()> {
        self.check(size, fill)?;
        let mut alloc = self.lock_alloc();
        self.before_resize(&mut alloc)?;
        self.data_apart()?;
        let old = self.header().fields.size;
        if size < old {
            return self.shrink(&mut alloc, size);
        }
        self.grow(&mut alloc, old, size, fill, covered.min(size))
    }

    fn grow(&self, alloc: &mut Allocator, old: u64, size: u64, fill: Preallocation, covered: u64) -> Result<()> {
        // What was written so far may still be in memory, past the end of the file.
        self.settle(alloc)?;
        self.check_beyond(old)?;
        let entries = self.geometry.l1_entries_for(size);
        if entries > self.l1().len / ENTRY {
            self.grow_l1(alloc, entries)?;
        }
        if size > old {
            self.drop_beyond(alloc, old)?;
            let tail = match fill {
                Preallocation::Falloc if !self.external => Tail::Reserve,
                Preallocation::Full if !self.external => Tail::Write,
                _ => Tail::Clear,
            };
            self.clear_tail(alloc, old, tail)?;
        }
        let raw = self.header().fields.autoclear & layout::DATA_FILE_RAW != 0;
        let tables = if raw && fill == Preallocation::Off { Preallocation::Metadata } else { fill };
        if tables != Preallocation::Off {
            self.preallocate(alloc, old, size, tables)?;
        }
        if self.external
            && let Some(data) = self.files.get(self.data_file())
        {
            let how = if fill == Preallocation::Metadata { Preallocation::Off } else { fill };
            let unit = self.geometry.subcluster_size();
            let end = if tables == Preallocation::Off { size } else { size.next_multiple_of(unit) };
            let stale = data.storage.len().context("Could not get file size")?.min(end).saturating_sub(old);
            if tables != Preallocation::Off && stale > 0 {
                let place = HostPlace { file: self.data_file(), at: HostOffset(old) };
                clear_stored(self, place, GuestOffset(old), stale, Zeroing::Punch)
                    .context("Could not clear the end of the data file")?;
            }
            if data.storage.len().context("Could not get file size")? < end {
                data.storage.set_len(end, how).context("Failed to resize underlying file")?;
            }
        }
        if covered > old && self.backing.is_some() {
            self.hide_backing(alloc, GuestOffset(old), GuestOffset(covered))?;
        }
        self.set_size(alloc, size)
    }

    /// The size in the header, and with it bitmaps of that size.
    fn set_size(&self, alloc: &mut Allocator, size: u64) -> Result<()> {
        let bitmaps = self.fit_bitmaps(alloc, size)?;
        let waiting = std::mem::take(&mut alloc.freed);
        self.settle(alloc)?;
        self.file().storage.flush().context("Could not flush")?;
        self.update_header(|header| {
            header.fields.size = size;
            header.bitmaps = bitmaps.or(header.bitmaps);
        })?;
        alloc.freed = waiting;
        self.settle(alloc)
    }

    /// A longer L1 table in a new place.
    fn grow_l1(&self, alloc: &mut Allocator, entries: u64) -> Result<()> {
        let geometry = self.geometry;
        let old = self.l1();
        let len = entries * ENTRY;
        let cluster = self.allocate(alloc, len.div_ceil(self.geometry.cluster_size()))?;
        let new = Table { kind: TableKind::L1, at: geometry.offset_of(cluster), len };
        self.tables.fresh(new)?;
        for index in 0..old.len / ENTRY {
            let entry = self.tables.get(old, index)?;
            if entry != 0 {
                self.tables.set(new, index, entry)?;
            }
        }
        self.tables.write_back()?;
        self.file().storage.flush().context("Failed to grow the L1 table")?;
        let entries = u32::try_from(entries).map_err(|_| Error::invalid("Failed to grow the L1 table"))?;
        self.update_header(|header| {
            header.fields.l1_table_offset = new.at;
            header.fields.l1_size = entries;
        })?;
        if old.len > 0 {
            self.tables.forget(old.at, old.len);
            alloc.freed.push((geometry.cluster_of(old.at), old.len.div_ceil(geometry.cluster_size()), false));
            self.settle(alloc)?;
        }
        Ok(())
    }

    /// Clusters for everything from `old` to `size` that has none.
    fn preallocate(&self, alloc: &mut Allocator, old: u64, size: u64, fill: Preallocation) -> Result<()> {
        let (geometry, bits) = (self.geometry, self.geometry.cluster_bits);
        let cluster = geometry.cluster_size();
        let storage = &self.file().storage;
        let end = size.next_multiple_of(cluster);
        // The cluster in which the disk ended may show the backing file, or have room already.
        let (last, _) = geometry.within(GuestOffset(old));
        let mut guest = match &self.backing {
            None if !self.has_room(last)? => last,
            _ => GuestOffset(old.next_multiple_of(cluster)),
        };
        let mut area = None;
        if !self.external && matches!(fill, Preallocation::Falloc | Preallocation::Full) {
            let count = (end - guest.get()) >> bits;
            let tables = count.div_ceil(geometry.l2_entries());
            let file = ClusterIndex(storage.len().context("Could not get file size")?.div_ceil(cluster));
            let used = file.max(self.last_used()? + 1);
            let first = alloc.cursor.reserve_area(&mut Counts(self), used, count + tables)?;
            // This may take long, and be stopped: nothing of it is counted yet, and nothing waits to be freed.
            self.settle(alloc)?;
            storage.set_len(geometry.offset_of(first), Preallocation::Off).context("Could not resize file")?;
            storage.set_len(geometry.offset_of(first + count), fill).context("Failed to resize underlying file")?;
            Counts(self).take(first, count)?;
            area = Some(geometry.offset_of(first));
        }
        let start = guest;
        let mut host_end = 0;
        while guest.get() < end {
            let table = self.writable_l2(alloc, guest)?;
            let index = geometry.l2_index(guest);
            let most = ((end - guest.get()) >> bits).min(geometry.l2_entries() - index).min(PIECE >> bits);
            let there = |n: u64| -> Result<bool> {
                let (entry, _) = self.l2_entry(table, index + n)?;
                Ok(self.is_there(entry))
            };
            let mut n = 0;
            while n < most && !there(n)? {
                n += 1;
            }
            if n == 0 {
                guest = guest + cluster;
                continue;
            }
            let host = match area {
                _ if self.external => guest.get(),
                Some(area) => area + (guest.get() - start.get()),
                None => {
                    let host = geometry.offset_of(self.allocate(alloc, n)?);
                    // Without a bitmap that says otherwise it is data at once: what was there must not show.
                    let (end, len) = (host + n * cluster, storage.len().context("Could not get file size")?);
                    let used = if !storage.facts().new_reads_zero { end } else { len.clamp(host, end) };
                    if !geometry.extended && used > host {
                        clear_stored(self, HostPlace::main(host), guest, used - host, Zeroing::Punch)
                            .context("Could not clear new clusters")?;
                    }
                    host
                }
            };
            let zeros = self.new_encrypted_reads_zero(HostOffset(host), guest, n)?;
            for step in 0..n {
                let (old, bitmap) = self.l2_entry(table, index + step)?;
                let zero = zeros || (!geometry.extended && old.reads_zero());
                let new = L2Entry::own(HostOffset(host) + step * cluster).with_zero(zero);
                self.set_l2_entry(table, index + step, new, bitmap)?;
            }
            guest = guest + n * cluster;
            let behind = if guest.get() == end { geometry.behind_last_subcluster(size) } else { 0 };
            host_end = host_end.max(host + n * cluster - behind);
            if self.tables.is_full() {
                self.settle(alloc)?;
            }
        }
        if !self.external && storage.len().context("Could not get file size")? < host_end {
            storage.set_len(host_end, Preallocation::Off).context("Could not resize file")?;
        }
        Ok(())
    }

    /// Zeros of the host are none in an encrypted image: whether entries get a mark to read as zeros; where there is no
    /// such mark zeros are written.
    fn new_encrypted_reads_zero(&self, host: HostOffset, guest: GuestOffset, n: u64) -> Result<bool> {
        let raw = self.header().fields.autoclear & layout::DATA_FILE_RAW != 0;
        if self.cipher.is_none() || self.geometry.extended {
            return Ok(false);
        }
        if self.geometry.version >= 3 && !raw {
            return Ok(true);
        }
        let (place, len) = (HostPlace { file: self.data_file(), at: host }, n << self.geometry.cluster_bits);
        clear_stored(self, place, guest, len, Zeroing::Write).context("Could not clear new clusters")?;
        Ok(false)
    }

    /// Whether a guest cluster has room in the file.
    fn has_room(&self, guest: GuestOffset) -> Result<bool> {
        let (l1, index) = (self.l1(), self.geometry.l1_index(guest));
        let table = if index < l1.len / ENTRY { self.l1_entry(l1, index)?.table() } else { None };
        let Some(at) = table else { return Ok(false) };
        let (entry, _) = self.l2_entry(self.l2(at.get()), self.geometry.l2_index(guest))?;
        Ok(self.is_there(entry))
    }

    /// The last cluster with a refcount.
    fn last_used(&self) -> Result<ClusterIndex> {
        let table = self.refcount_table();
        for index in (0..table.len / ENTRY).rev() {
            let at = self.tables.get(table, index)? & REFCOUNT_OFFSET_MASK;
            if at == 0 {
                continue;
            }
            let mut last = None;
            self.each_piece(self.refcount_block(at), |from, bytes| {
                if let Some(byte) = bytes.iter().rposition(|byte| *byte != 0) {
                    last = Some(from + byte as u64);
                }
            })?;
            if let Some(byte) = last {
                // The byte holds, or is in, a count that is not zero: the last such one.
                let bits = u64::from(self.geometry.refcount_bits());
                let (first, count) = (byte * 8 / bits, (8 / bits).max(1));
                for cluster in (first..first + count).rev().map(|n| self.geometry.first_counted(index) + n) {
                    if self.refcount(cluster)? != 0 {
                        return Ok(cluster);
                    }
                }
            }
        }
        Ok(ClusterIndex(0))
    }

    /// Shows a table piece by piece.
    pub(super) fn each_piece(&self, table: Table, mut look: impl FnMut(u64, &[u8])) -> Result<()> {
        let mut from = 0;
        while from < table.len {
            let len = self.tables.view(table, from, |bytes| {
                look(from, bytes);
                bytes.len() as u64
            })?;
            from += len.max(1);
        }
        Ok(())
    }

    /// Whether a refcount block counts nothing; and whether what it counts is at most that one cluster.
    fn counts_nothing(&self, block: Table, own: Option<u64>) -> Result<bool> {
        let bits = u64::from(self.geometry.refcount_bits());
        let order = self.geometry.refcount_order;
        let skip = own.map(|index| (index * bits / 8, (index * bits / 8) + (bits / 8).max(1)));
        let mut nothing = true;
        self.each_piece(block, |from, bytes| {
            let zero = |bytes: Option<&[u8]>| bytes.is_none_or(|bytes| bytes.iter().all(|byte| *byte == 0));
            nothing &= match skip {
                Some((start, end)) if start >= from && end <= from + bytes.len() as u64 => {
                    let (start, end) = ((start - from) as usize, (end - from) as usize);
                    // Narrow counts share a byte with their neighbours.
                    let first = from * 8 / bits;
                    let beside = (start as u64 * 8 / bits..(end as u64 * 8).div_ceil(bits))
                        .filter(|index| Some(first + index) != own)
                        .all(|index| refcount::get(order, bytes, index as usize) == 0);
                    beside && zero(bytes.get(..start)) && zero(bytes.get(end..))
                }
                _ => zero(Some(bytes)),
            };
        })?;
        Ok(nothing)
    }

    fn shrink(&self, alloc: &mut Allocator, size: u64) -> Result<()> {
        // The file is as long as its tables say only once they are in it.
        self.settle(alloc)?;
        self.check_beyond(size)?;
        self.set_size(alloc, size)?;
        self.drop_beyond(alloc, size)?;
        self.clear_tail(alloc, size, Tail::Clear)?;
        self.settle(alloc)?;
        if self.external
            && let Some(data) = self.files.get(self.data_file())
            && data.storage.len().context("Could not get file size")? > size
        {
            data.storage.set_len(size, Preallocation::Off).context("Failed to resize underlying file")?;
        }
        self.cut_unused(alloc)
    }

    /// Frees refcount blocks that count nothing, and cuts the file after its last used cluster. No table is dirty.
    pub(super) fn cut_unused(&self, alloc: &mut Allocator) -> Result<()> {
        self.shrink_refcounts(alloc)?;
        self.settle(alloc)?;
        let end = self.geometry.offset_of(self.last_used()? + 1);
        let storage = &self.file().storage;
        if !storage.facts().fixed_len && storage.len().context("Could not get file size")? > end {
            self.tables.forget(end, u64::MAX - end);
            storage.set_len(end, Preallocation::Off).context("Failed to resize underlying file")?;
        }
        Ok(())
    }

    /// Frees the refcount blocks that count nothing but themselves.
    fn shrink_refcounts(&self, alloc: &mut Allocator) -> Result<()> {
        let table = self.refcount_table();
        let (geometry, cluster) = (self.geometry, self.geometry.cluster_size());
        for index in 0..table.len / ENTRY {
            let at = self.tables.get(table, index)? & REFCOUNT_OFFSET_MASK;
            if at == 0 {
                continue;
            }
            let own = geometry.cluster_of(at);
            let (counted_by, slot) = geometry.refcount_of(own);
            let block = self.refcount_block(at);
            let free = self.counts_nothing(block, None)?;
            let alone =
                !free && counted_by == index && self.counts_nothing(block, Some(slot))? && self.refcount(own)? == 1;
            if !free && !alone {
                continue;
            }
            self.tables.set(table, index, 0)?;
            self.tables.write_back()?;
            if alone {
                self.tables.forget(at, cluster);
                self.forget_metadata(at);
                // An offer, which the host need not take.
                let _ = self.file().storage.discard(at, cluster);
            } else {
                alloc.freed.push((own, 1, true));
            }
        }
        Ok(())
    }
}
