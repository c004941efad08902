//! Internal snapshots: their table, the layer as it was at one of them, and how they come, are applied and go (what
//! changes over is `state.rs`).
//!
//! Source: specification, section "Snapshots".

use std::sync::PoisonError;

use crate::block::driver::{NewSnapshot, SnapshotKey};
use crate::block::error::Context;
use crate::block::info::SnapshotInfo;
use crate::block::{BlockDriver, Child, Error, ErrorKind, Result, Snapshots};

use super::Qcow2Driver;
use super::header::{Qcow2Header, c_string};
use super::layout::{
    self, ENTRY, MAX_L1_BYTES, MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS, SNAPSHOT_ENTRY,
    SNAPSHOT_EXTRA, SnapshotFields, word,
};
use super::state::NewState;
use super::window::Window;

/// An entry of the snapshot table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The fixed fields.
    pub fields: SnapshotFields,
    /// Extra data, known fields and all.
    pub extra: Vec<u8>,
    /// Unique id.
    pub id: String,
    /// Name.
    pub name: String,
}

impl Snapshot {
    fn extra_word(&self, at: usize) -> Option<u64> {
        word(&self.extra, at)
    }

    /// How long the entry is in the table, padding and all.
    pub fn bytes(&self) -> u64 {
        let len = SNAPSHOT_ENTRY as u64
            + u64::from(self.fields.extra_size)
            + u64::from(self.fields.id_size)
            + u64::from(self.fields.name_size);
        len.next_multiple_of(8)
    }

    /// Size of the saved machine state in bytes.
    pub fn vm_state_size(&self) -> u64 {
        self.extra_word(0).unwrap_or(u64::from(self.fields.vm_state_size))
    }

    /// The disk's size at that time, if it was recorded.
    pub fn disk_size(&self) -> Option<u64> {
        self.extra_word(8)
    }

    /// With what it does not say and version 3 asks for: the state's size as its field has it, the disk's as it is, no
    /// instruction count; and with the lengths of what it has.
    pub(super) fn completed(&self, disk: u64) -> Result<Self> {
        let mut extra = self.extra.clone();
        if extra.len() < SNAPSHOT_EXTRA {
            let known = [self.vm_state_size(), self.disk_size().unwrap_or(disk), u64::MAX];
            let known: Vec<u8> = known.iter().flat_map(|word| word.to_be_bytes()).collect();
            extra.truncate(extra.len() / 8 * 8);
            extra.extend_from_slice(known.get(extra.len()..).unwrap_or(&[]));
        }
        let short = |len: usize| u16::try_from(len).map_err(|_| Error::corrupt("a snapshot's name is too long"));
        let fields = SnapshotFields {
            extra_size: u32::try_from(extra.len()).unwrap_or(0),
            id_size: short(self.id.len())?,
            name_size: short(self.name.len())?,
            ..self.fields
        };
        Ok(Self { fields, extra, id: self.id.clone(), name: self.name.clone() })
    }

    /// Writes its entry, completed, behind the others (which end at a multiple of 8), without what fills it up.
    pub(super) fn append(&self, bytes: &mut Vec<u8>, disk: u64) -> Result<()> {
        let Self { fields, extra, id, name } = self.completed(disk)?;
        bytes.extend_from_slice(&fields.to_bytes());
        bytes.extend_from_slice(&extra);
        bytes.extend_from_slice(id.as_bytes());
        bytes.extend_from_slice(name.as_bytes());
        Ok(())
    }

    fn info(&self) -> SnapshotInfo {
        SnapshotInfo {
            id: self.id.clone(),
            name: self.name.clone(),
            vm_state_size: self.vm_state_size(),
            date_sec: u64::from(self.fields.date_sec),
            date_nsec: self.fields.date_nsec,
            vm_clock_nsec: self.fields.vm_clock_nsec,
            icount: self.extra_word(16).filter(|count| *count != u64::MAX),
        }
    }
}

/// What errors call the table.
pub(super) const SNAPSHOT_TABLE: &str = "the snapshot table";

/// Reads the table that the header names (whose count it has checked).
pub fn read_table(file: &Child, header: &Qcow2Header) -> Result<Vec<Snapshot>> {
    let fields = &header.fields;
    let mut window = Window::new(file, SNAPSHOT_TABLE, fields.snapshots_offset);
    let mut found = Vec::new();
    let mut total = 0u64;
    for n in 0..fields.nb_snapshots {
        let fixed: [u8; SNAPSHOT_ENTRY] = window
            .take(SNAPSHOT_ENTRY as u64)?
            .try_into()
            .map_err(|_| Error::corrupt("Failed to read snapshot table"))?;
        let entry = SnapshotFields::read(&fixed);
        if entry.extra_size > MAX_SNAPSHOT_EXTRA {
            return Err(Error::corrupt(format!("Too much extra metadata in snapshot table entry {n}"))
                .hint("You can force-remove this extra metadata with qemu-img check -r all"));
        }
        let extra = window.take(u64::from(entry.extra_size))?.to_vec();
        let id = c_string(window.take(u64::from(entry.id_size))?);
        let name = c_string(window.take(u64::from(entry.name_size))?);
        let len =
            SNAPSHOT_ENTRY as u64 + u64::from(entry.extra_size) + u64::from(entry.id_size) + u64::from(entry.name_size);
        window.take(len.next_multiple_of(8) - len)?;
        total += len.next_multiple_of(8);
        if total > MAX_SNAPSHOT_TABLE_BYTES {
            let rest = fields.nb_snapshots - n;
            return Err(Error::corrupt("Snapshot table is too big")
                .hint(format!("You can force-remove all {rest} overhanging snapshots with qemu-img check -r all")));
        }
        found.push(Snapshot { fields: entry, extra, id, name });
    }
    Ok(found)
}

/// A table of them, for a disk of `disk` bytes.
pub(super) fn table_bytes(snapshots: &[Snapshot], disk: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for snapshot in snapshots {
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        snapshot.append(&mut bytes, disk)?;
    }
    if snapshots.len() > MAX_SNAPSHOTS as usize || bytes.len() as u64 > MAX_SNAPSHOT_TABLE_BYTES {
        return Err(Error::invalid("File too large"));
    }
    Ok(bytes)
}

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
