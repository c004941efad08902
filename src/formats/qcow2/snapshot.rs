//! Internal snapshots: the layer as it was at one of them, and how they come, are applied and go (what changes over is
//! `state.rs`). Their table is `snapshot_table.rs`.
//!
//! Source: specification, section "Snapshots".

use std::sync::PoisonError;

use crate::block::driver::{NewSnapshot, SnapshotKey};
use crate::block::error::Context;
use crate::block::info::SnapshotInfo;
use crate::block::{BlockDriver, Error, ErrorKind, Result, Snapshots};

use super::Qcow2Driver;
use super::layout::{self, ENTRY, MAX_L1_BYTES, SnapshotFields};
use super::snapshot_table::Snapshot;
use super::state::NewState;

/// Longest name of a new one, in bytes: what the reference keeps of it.
const MAX_NAME: usize = 255;

impl Snapshots for Qcow2Driver {
    fn list(&self) -> Result<Vec<SnapshotInfo>> {
        Ok(self.snapshot_list().iter().map(Snapshot::info).collect())
    }

    fn create(&self, new: &NewSnapshot) -> Result<()> {
        let mut alloc = self.lock_alloc();
        if self.external {
            return Err(Error::unsupported("Operation not supported"));
        }
        if new.name.len() > MAX_NAME {
            return Err(Error::invalid(format!("the name is longer than {MAX_NAME} bytes")));
        }
        self.before_state(&mut alloc)?;
        let size = self.header().fields.size;
        let l1 = self.l1_words(self.l1().at, self.header().fields.l1_size)?;
        let mut snapshots = self.snapshot_list();
        let id = snapshots.iter().filter_map(|one| one.id.parse::<u64>().ok()).max().unwrap_or(0).saturating_add(1);
        let fields = SnapshotFields {
            l1_size: u32::try_from(l1.len()).unwrap_or(u32::MAX),
            date_sec: u32::try_from(new.date_sec).unwrap_or(u32::MAX),
            date_nsec: new.date_nsec,
            ..SnapshotFields::default()
        };
        // No state of a machine, the disk's size, no instruction yet.
        let extra = [0, size, 0].iter().flat_map(|word| word.to_be_bytes()).collect();
        snapshots.push(Snapshot { fields, extra, id: id.to_string(), name: new.name.clone() });
        let (gains, snapshots) = (Some(l1.clone()), Some(snapshots));
        self.change_state(&mut alloc, NewState { l1, size, snapshots, gains, loses: None, unused: Vec::new() })
    }

    fn apply(&self, key: &SnapshotKey) -> Result<()> {
        const LOAD: &str = "Failed to load snapshot";
        let mut alloc = self.lock_alloc();
        if !self.bitmap_list().is_empty() {
            return Err(Error::unsupported("Device has active dirty bitmaps"));
        }
        if self.external {
            return Err(Error::unsupported("Operation not supported")).context(LOAD);
        }
        let snapshot = self.find(key).ok_or_else(|| Error::new(ErrorKind::NotFound, "No such file or directory"));
        let snapshot = snapshot.context(LOAD)?;
        let size = self.size_then(&snapshot)?;
        self.before_state(&mut alloc)?;
        let mut l1 = self.l1_words(snapshot.fields.l1_table_offset, snapshot.fields.l1_size)?;
        let gains = Some(l1.clone());
        let entries = self.geometry.l1_entries_for(size);
        if entries > MAX_L1_BYTES / ENTRY {
            return Err(Error::corrupt("Snapshot disk size invalid"));
        }
        l1.resize(l1.len().max(usize::try_from(entries).unwrap_or(0)), 0);
        let loses = Some(self.l1_words(self.l1().at, self.header().fields.l1_size)?);
        self.change_state(&mut alloc, NewState { l1, size, snapshots: None, gains, loses, unused: Vec::new() })
    }

    fn delete(&self, index: usize) -> Result<()> {
        let mut alloc = self.lock_alloc();
        let mut snapshots = self.snapshot_list();
        if index >= snapshots.len() {
            return Err(Error::new(ErrorKind::NotFound, "snapshot not found"));
        }
        self.before_state(&mut alloc)?;
        let gone = snapshots.remove(index).fields;
        let loses = Some(self.l1_words(gone.l1_table_offset, gone.l1_size)?);
        let l1 = self.l1_words(self.l1().at, self.header().fields.l1_size)?;
        let size = self.header().fields.size;
        let unused = vec![(gone.l1_table_offset, u64::from(gone.l1_size) * ENTRY)];
        self.change_state(&mut alloc, NewState { l1, size, snapshots: Some(snapshots), gains: None, loses, unused })
    }

    fn open(&self, key: &SnapshotKey) -> Result<Box<dyn BlockDriver>> {
        let snapshot = self.find(key).ok_or_else(|| Error::new(ErrorKind::NotFound, "Can't find snapshot"))?;
        let (at, entries) = (snapshot.fields.l1_table_offset, snapshot.fields.l1_size);
        self.check_l1(at, entries)?;
        // Its tables are read from the file: what is changed here must be there.
        if self.write {
            self.flush()?;
        }
        let mut header = self.header().clone();
        header.fields.size = self.size_then(&snapshot)?;
        header.fields.l1_table_offset = at;
        header.fields.l1_size = entries;
        header.fields.nb_snapshots = 0;
        Ok(Box::new(self.view(header)))
    }
}

impl Qcow2Driver {
    /// The snapshots, in the order of their table.
    pub(super) fn snapshot_list(&self) -> Vec<Snapshot> {
        self.snapshots.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_snapshot_list(&self, list: Vec<Snapshot>) {
        *self.snapshots.write().unwrap_or_else(PoisonError::into_inner) = list;
    }

    fn find(&self, key: &SnapshotKey) -> Option<Snapshot> {
        let all = self.snapshot_list();
        let found = match key {
            SnapshotKey::IdOrName(word) => {
                all.iter().find(|one| one.id == *word).or_else(|| all.iter().find(|one| one.name == *word))
            }
            SnapshotKey::Exact { id: None, name: None } => None,
            SnapshotKey::Exact { id, name } => all.iter().find(|one| {
                id.as_ref().is_none_or(|id| one.id == *id) && name.as_ref().is_none_or(|name| one.name == *name)
            }),
        };
        found.cloned()
    }

    /// The disk's size at that time, in bytes; where it was not recorded, as it is now.
    fn size_then(&self, snapshot: &Snapshot) -> Result<u64> {
        let size = snapshot.disk_size().unwrap_or(self.header().fields.size);
        i64::try_from(size).map(|_| size).map_err(|_| Error::corrupt("Snapshot disk size invalid"))
    }

    fn check_l1(&self, at: u64, entries: u32) -> Result<()> {
        if u64::from(entries) * ENTRY > MAX_L1_BYTES {
            return Err(Error::corrupt("Snapshot L1 table too large"));
        }
        if !self.geometry.places(at, u64::from(entries) * ENTRY) {
            return Err(Error::corrupt("Snapshot L1 table offset invalid"));
        }
        Ok(())
    }

    /// What has to be known, and in the file, before the state changes.
    pub(super) fn before_state(&self, alloc: &mut super::alloc::Allocator) -> Result<()> {
        if !self.write {
            return Err(Error::unsupported("Block node is read-only"));
        }
        self.before_resize(alloc)?;
        self.settle(alloc)?;
        self.data_apart()
    }

    /// The entries of an L1 table, from the file: what was changed is there.
    pub(super) fn l1_words(&self, at: u64, entries: u32) -> Result<Vec<u64>> {
        self.check_l1(at, entries)?;
        let len = usize::try_from(u64::from(entries) * ENTRY).map_err(|_| Error::corrupt("L1 table too large"))?;
        let mut bytes = vec![0; len];
        self.file().read_metadata("L1 table", at, &mut bytes)?;
        Ok(layout::words(&bytes).collect())
    }
}
