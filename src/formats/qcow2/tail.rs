//! What lies past the end of the disk: nothing of it may ever show.
//!
//! The last cluster goes on past the end of a disk that does not end with it, and a resize that was stopped, or that
//! another program did, can leave entries there. When the disk grows these parts become the guest's: they are made to
//! read as zeros before the header has the new size, and once more after it has a smaller one, for programs that do
//! not look when they grow an image.

use crate::block::error::{Context, Operation, Place, PlacePart};
use crate::block::io::{clear_stored, read_stored, read_unit, write_stored};
use crate::block::{BlockDriver, CompressedUnit, Error, GuestOffset, HostOffset, HostPlace, Result};
use crate::storage::Zeroing;

use super::Qcow2Driver;
use super::alloc::Allocator;
use super::entry::L2Entry;
use super::layout::{self, ENTRY};

const FAILED: &str = "Could not clear the end of the last cluster";

/// Whether space that reads as zeros already is reserved too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tail {
    /// Only what does not read as zeros is written.
    Clear,
    /// Room is reserved.
    Reserve,
    /// Zeros are written.
    Write,
}

impl Qcow2Driver {
    /// Makes the last cluster read as zeros from the end of a disk of `size` bytes on. Nothing before it changes.
    pub(super) fn clear_tail(&self, alloc: &mut Allocator, size: u64, tail: Tail) -> Result<()> {
        let geometry = self.geometry;
        let ((first, within), l1) = (geometry.within(GuestOffset(size)), self.l1());
        if within == 0 || geometry.l1_index(first) >= l1.len / ENTRY {
            return Ok(());
        }
        let Some(at) = self.l1_entry(l1, geometry.l1_index(first))?.table() else { return Ok(()) };
        let index = geometry.l2_index(first);
        let (entry, bitmap) = self.l2_entry(self.l2(at.get()), index)?;
        if entry.is_compressed() {
            return self.clear_compressed(alloc, first, within, entry);
        }
        let host = entry.host().unwrap_or_default().get();
        let there = self.is_there(entry);
        // Which bytes hold data there, and what the entry becomes.
        let (end, marks) = if geometry.extended {
            let unit = geometry.subcluster_size();
            let (part, whole) = (within / unit, within.div_ceil(unit));
            let beyond = u64::from(u32::MAX) & !((1u64 << whole) - 1);
            let data = bitmap >> part & 1 != 0 && whole > part;
            let shown = bitmap & beyond != 0;
            let marks = if shown { (bitmap & !beyond) | (beyond << 32) } else { bitmap };
            (if data { whole * unit } else { within }, marks)
        } else {
            (if entry.reads_zero() { within } else { geometry.cluster_size() }, bitmap)
        };
        let own = self.external || entry.is_own();
        if there && own {
            let place = if self.external { first.get() } else { host };
            if !self.external {
                self.check_data(host, geometry.cluster_size())?;
            }
            let place = HostPlace { file: self.data_file(), at: HostOffset(place + within) };
            self.clear(place, GuestOffset(size), end - within, Tail::Clear)?;
            self.clear(place, GuestOffset(size), geometry.cluster_size() - within, tail)?;
        } else if there && end > within {
            let mut bytes = self.bytes(geometry.cluster_size())?;
            self.check_data(host, geometry.cluster_size())?;
            read_stored(self, HostPlace::main(host), first, &mut bytes).context(FAILED)?;
            return self.replace(alloc, first, bytes, within, end, marks);
        }
        if marks != bitmap {
            let table = self.writable_l2(alloc, first)?;
            self.set_l2_entry(table, index, entry, marks)?;
        }
        Ok(())
    }

    fn clear_compressed(&self, alloc: &mut Allocator, first: GuestOffset, within: u64, entry: L2Entry) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let (at, host_len) = self.geometry.compressed(entry.0);
        self.check_data(at, host_len)?;
        let place = HostPlace { file: 0, at: HostOffset(at) };
        let unit = CompressedUnit { start: first, len: cluster, place, host_len };
        let bytes = read_unit(self, &unit).context(FAILED)?;
        let marks = if self.geometry.extended { u64::from(u32::MAX) } else { 0 };
        self.replace(alloc, first, bytes, within, cluster, marks)
    }

    /// Puts a cluster's bytes, cleared from `from` to `to`, in a new place, unless they are clear.
    fn replace(
        &self,
        alloc: &mut Allocator,
        guest: GuestOffset,
        mut bytes: Vec<u8>,
        from: u64,
        to: u64,
        marks: u64,
    ) -> Result<()> {
        let range = usize::try_from(from).ok().zip(usize::try_from(to).ok());
        let Some(part) = range.and_then(|(from, to)| bytes.get_mut(from..to)) else { return Ok(()) };
        if part.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        part.fill(0);
        let table = self.writable_l2(alloc, guest)?;
        let index = self.geometry.l2_index(guest);
        let (old, _) = self.l2_entry(table, index)?;
        let host = self.geometry.offset_of(self.allocate(alloc, 1)?);
        write_stored(self, HostPlace::main(host), guest, &mut bytes).context(FAILED)?;
        self.set_l2_entry(table, index, L2Entry::own(HostOffset(host)), marks)?;
        self.free_entry(alloc, old, false)
    }

    fn bytes(&self, len: u64) -> Result<Vec<u8>> {
        Ok(vec![0; usize::try_from(len).map_err(|_| Error::corrupt("a cluster is too large"))?])
    }

    /// Refuses entries past the end of a disk of `size` bytes that cannot be taken back. Changes nothing.
    pub(super) fn check_beyond(&self, size: u64) -> Result<()> {
        self.each_beyond(size, &mut |_, _, _| Ok(()))
    }

    /// Takes back all entries past the end of a disk of `size` bytes; what they refer to waits to be freed.
    pub(super) fn drop_beyond(&self, alloc: &mut Allocator, size: u64) -> Result<()> {
        let geometry = self.geometry;
        let (l1, keep) = (self.l1(), size.next_multiple_of(geometry.cluster_size()));
        self.each_beyond(size, &mut |l1_index, at, first| {
            let start = GuestOffset(l1_index * geometry.l1_covers());
            let whole = start.get() >= keep;
            let table = if whole { self.l2(at) } else { self.writable_l2(alloc, start)? };
            if whole {
                self.tables.set(l1, l1_index, 0)?;
                // A table is in the image itself, wherever the data is.
                alloc.freed.push((geometry.cluster_of(at), 1, true));
            }
            for index in first..geometry.l2_entries() {
                let (old, bitmap) = self.l2_entry(table, index)?;
                if (old, bitmap) == (L2Entry::NOTHING, 0) {
                    continue;
                }
                self.free_entry(alloc, old, true)?;
                if !whole {
                    self.set_l2_entry(table, index, L2Entry::NOTHING, 0)?;
                }
            }
            self.settle_if_due(alloc)
        })
    }

    /// Shows each L2 table that has entries past the end: L1 index, place, the first such entry. All of them are
    /// looked at before.
    fn each_beyond(&self, size: u64, act: &mut dyn FnMut(u64, u64, u64) -> Result<()>) -> Result<()> {
        let geometry = self.geometry;
        let (cluster, covers) = (geometry.cluster_size(), geometry.l1_covers());
        let keep = size.next_multiple_of(cluster);
        let file = self.file().storage.len().context("Could not get file size")?;
        let l1 = self.l1();
        for l1_index in keep / covers..l1.len / ENTRY {
            let Some(at) = self.l1_entry(l1, l1_index)?.table().map(HostOffset::get) else { continue };
            if geometry.in_cluster(at) != 0 || at >= file {
                return Err(self.corrupt(format!("L2 table offset {at:#x} is wrong (L1 index: {l1_index:#x})")));
            }
            let first = keep.saturating_sub(l1_index * covers) / cluster;
            let mut any = first == 0;
            for index in first..geometry.l2_entries() {
                let (entry, bitmap) = self.l2_entry(self.l2(at), index)?;
                any |= (entry, bitmap) != (L2Entry::NOTHING, 0);
                self.check_entry(entry)?;
            }
            if any {
                act(l1_index, at, first)?;
            }
        }
        Ok(())
    }

    /// Makes what has no data between two offsets (the first a multiple of the cluster, or of the subcluster) read as
    /// zeros, whatever the backing file holds there.
    pub(super) fn hide_backing(&self, alloc: &mut Allocator, from: GuestOffset, to: GuestOffset) -> Result<()> {
        let geometry = self.geometry;
        let cluster = geometry.cluster_size();
        let (mut guest, _) = geometry.within(from);
        while guest < to {
            let table = self.writable_l2(alloc, guest)?;
            let index = geometry.l2_index(guest);
            let (entry, bitmap) = self.l2_entry(table, index)?;
            if geometry.extended {
                let unit = geometry.subcluster_size();
                let part = from.get().saturating_sub(guest.get()).div_ceil(unit).min(u64::from(layout::SUBCLUSTERS));
                let beyond = u64::from(u32::MAX) & !((1u64 << part) - 1);
                // Those that hold data, and those that are zeros, stay so.
                let hidden = beyond & !bitmap & !(bitmap >> 32);
                self.set_l2_entry(table, index, entry, bitmap | (hidden << 32))?;
            } else if guest >= from && !entry.refers() && !entry.reads_zero() {
                let new = if geometry.version < 3 { self.zeros(alloc, guest)? } else { entry.with_zero(true) };
                self.set_l2_entry(table, index, new, 0)?;
            }
            guest = guest + cluster;
            self.settle_if_due(alloc)?;
        }
        Ok(())
    }

    /// The entry of a new cluster of zeros, which is that one of the guest's.
    fn zeros(&self, alloc: &mut Allocator, guest: GuestOffset) -> Result<L2Entry> {
        let host = self.geometry.offset_of(self.allocate(alloc, 1)?);
        let len = self.geometry.cluster_size();
        clear_stored(self, HostPlace::main(host), guest, len, Zeroing::Allocate).context("Could not write zeros")?;
        Ok(L2Entry::own(HostOffset(host)))
    }

    /// Makes a range that has its place read as zeros, as far as the file reaches.
    fn clear(&self, place: HostPlace, guest: GuestOffset, len: u64, how: Tail) -> Result<()> {
        let file = self.files.get(place.file).unwrap_or(self.file());
        let clear = |done: u64, run: u64, how| {
            let place = HostPlace { at: place.at + done, ..place };
            clear_stored(self, place, guest + done, run, how).context(FAILED)
        };
        match how {
            _ if len == 0 => return Ok(()),
            Tail::Write => return clear(0, len, Zeroing::Write),
            Tail::Reserve => return clear(0, len, Zeroing::Allocate),
            Tail::Clear => {}
        }
        let at = place.at.get();
        let end = file.storage.len().context("Could not get file size")?.min(at.saturating_add(len));
        let mut from = at;
        while from < end {
            let at_guest = PlacePart::Guest(guest + (from - at));
            let asking = || {
                let (file, host) = (file.name.clone(), Some(HostOffset(from)));
                Place { operation: Operation::Status, file, part: at_guest, host }
            };
            let extent = file.storage.extent(from, end - from).at(asking)?;
            let run = extent.len.clamp(1, end - from);
            // Zeros of the host are no zeros of an encrypted disk.
            if !extent.is_zero() || self.cipher().is_some() {
                clear(from - at, run, Zeroing::Allocate)?;
            }
            from += run;
        }
        Ok(())
    }
}
