//! Clusters that read as zeros by a mark in their entry, which version 2 does not have: they get zeros of their own, or, where
//! nothing below shows, no cluster at all. In snapshots too, whose tables may be the disk's.
//!
//! Invariants: zeros are in the file before an entry loses its mark; the disk and its snapshots read the same at every
//! moment. A cluster that others use as well keeps its content; it is given up in the end, together with the marks of
//! those that have it alone then (see `state.rs`): so that wherever it stops there are leaks at worst.
//!
//! Source: specification, section "Cluster mapping".

use std::collections::{BTreeMap, BTreeSet};

use crate::block::driver::AmendProgress;
use crate::block::error::Context;
use crate::block::io::clear_stored;
use crate::block::{Error, GuestOffset, HostPlace, Result};
use crate::storage::Zeroing;

use super::Qcow2Driver;
use super::alloc::Allocator;
use super::layout::{COMPRESSED, COPIED, ENTRY, L2_RESERVED, MAX_L1_BYTES, OFFSET_MASK, ZERO};
use super::state::NewState;
use super::tables::Table;

/// Most clusters that get a place at a time.
const MOST: u64 = 1024;

impl Qcow2Driver {
    /// Every L2 table of the disk and its snapshots, with the index of the L1 entry that names it.
    fn all_l2_tables(&self) -> Result<BTreeMap<u64, u64>> {
        let active = (self.header().fields.l1_table_offset, self.header().fields.l1_size);
        let snapshots = self.snapshot_list();
        let kept = snapshots.iter().map(|one| (one.fields.l1_table_offset, one.fields.l1_size));
        let places: BTreeSet<(u64, u32)> = std::iter::once(active).chain(kept).collect();
        // L1 tables that do not lie in each other's place are no longer than the file.
        let len: u64 = places.iter().map(|(_, entries)| u64::from(*entries) * ENTRY).sum();
        let file = self.file().storage.len().context("Could not get file size")?;
        if len > file.saturating_add(MAX_L1_BYTES) {
            return Err(Error::corrupt("The L1 tables of snapshots lie in each other's place"));
        }
        let mut tables = BTreeMap::new();
        for (at, size) in places {
            for (index, entry) in (0..).zip(self.l1_words(at, size)?) {
                let at = entry & OFFSET_MASK;
                if at != 0 && (self.geometry.in_cluster(at) != 0 || *tables.entry(at).or_insert(index) != index) {
                    return Err(self.corrupt(format!("L2 table offset {at:#x} is unaligned, or named twice")));
                }
            }
        }
        Ok(tables)
    }

    /// Whether any cluster is compressed.
    pub(super) fn has_compressed(&self) -> Result<bool> {
        for at in self.all_l2_tables()?.into_keys() {
            let mut found = false;
            self.each_word(self.l2(at), |_, word| {
                found |= word & COMPRESSED != 0;
                Ok(())
            })?;
            if found {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// See the module. Not for images with subclusters or a data file. Ended early, it has done some of the tables.
    pub(super) fn expand_zeros(&self, alloc: &mut Allocator, progress: AmendProgress<'_>) -> Result<()> {
        self.before_state(alloc)?;
        let tables = self.all_l2_tables()?;
        let (mut unused, mut wanted) = (Vec::new(), Ok(()));
        // The reference's progress counts the entries of all L1 tables.
        let snapshots = self.snapshot_list();
        let entries = snapshots.iter().map(|one| u64::from(one.fields.l1_size)).sum::<u64>();
        let entries = entries + u64::from(self.header().fields.l1_size);
        let mut told = 0;
        for (n, (at, index)) in (1..).zip(&tables) {
            self.expand_table(alloc, *at, *index, &mut unused)?;
            let done = entries.saturating_mul(n) / tables.len() as u64;
            wanted = (told + 1..=done).try_for_each(|done| progress(done, entries));
            told = done;
            if wanted.is_err() {
                break;
            }
        }
        if wanted.is_ok() {
            wanted = (told + 1..=entries).try_for_each(|done| progress(done, entries));
        }
        if unused.is_empty() {
            self.settle(alloc)?;
            return wanted;
        }
        let fields = self.header().fields;
        let l1 = self.l1_words(fields.l1_table_offset, fields.l1_size)?;
        let size = fields.size;
        self.change_state(alloc, NewState { l1, size, snapshots: None, gains: None, loses: None, unused })?;
        wanted
    }

    /// What is not to be used by it any more is added to `unused`, once for each reference.
    fn expand_table(&self, alloc: &mut Allocator, at: u64, l1_index: u64, unused: &mut Vec<(u64, u64)>) -> Result<()> {
        let (geometry, cluster) = (self.geometry, self.geometry.cluster_size());
        let table = self.l2(at);
        // Whatever its entries name has a reference for each of those that it has itself.
        let times = self.refcount(geometry.cluster_of(at))?;
        if times == 0 {
            return Err(self.corrupt(format!("L2 table at {at:#x} has a refcount of 0")));
        }
        let mark = if times == 1 { COPIED } else { 0 };
        let mut zeros: Vec<(u64, u64)> = Vec::new();
        self.each_word(table, |index, word| {
            if word & COMPRESSED == 0 && word & ZERO != 0 {
                zeros.push((index, word));
            }
            Ok(())
        })?;
        // Entries that need a cluster: the first, and how many follow each other.
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut new: Vec<(u64, u64)> = Vec::new();
        for (index, word) in zeros {
            let host = word & OFFSET_MASK;
            if word & L2_RESERVED & !ZERO != 0 || self.geometry.in_cluster(host) != 0 {
                return Err(self.corrupt(format!("Data cluster offset {host:#x} unaligned (L2 offset: {at:#x})")));
            }
            if host != 0 {
                self.check_data(host, cluster)?;
                let count = self.refcount(geometry.cluster_of(host))?;
                if count < times {
                    return Err(self.corrupt(format!("Data cluster offset {host:#x} has a refcount of {count}")));
                }
                if count == times {
                    let guest = self.guest_of(l1_index, index);
                    clear_stored(self, HostPlace::main(host), guest, cluster, Zeroing::Allocate)
                        .context("Could not write zeros")?;
                    new.push((index, host | mark));
                    continue;
                }
                (0..times).for_each(|_| unused.push((host, cluster)));
            }
            match runs.last_mut() {
                _ if self.backing.is_none() => new.push((index, 0)),
                Some((first, n)) if *first + *n == index && *n < MOST => *n += 1,
                _ => runs.push((index, 1)),
            }
        }
        for (first, n) in runs {
            let host = self.allocate(alloc, n)?;
            self.change_refcounts(host, n, |count| count.checked_add(times - 1).ok_or("refcount above all"))?;
            let host = geometry.offset_of(host);
            clear_stored(self, HostPlace::main(host), self.guest_of(l1_index, first), n * cluster, Zeroing::Punch)
                .context("Could not write zeros")?;
            new.extend((0..n).map(|step| (first + step, (host + step * cluster) | mark)));
        }
        self.change_entries(table, &new)
    }

    fn guest_of(&self, l1_index: u64, index: u64) -> GuestOffset {
        GuestOffset(l1_index * self.geometry.l1_covers() + (index << self.geometry.cluster_bits))
    }

    /// Changes entries of an L2 table, when all that they need is in the file.
    fn change_entries(&self, table: Table, new: &[(u64, u64)]) -> Result<()> {
        if new.is_empty() {
            return Ok(());
        }
        self.tables.write_back()?;
        self.file().storage.flush().context("Could not flush")?;
        new.iter().try_for_each(|(index, entry)| self.tables.set(table, *index, *entry))?;
        self.tables.write_back()
    }
}
