//! Internal snapshots: their table, and the layer as it was at one of them.
//!
//! Source: specification, section "Snapshots".

use crate::block::driver::SnapshotKey;
use crate::block::info::SnapshotInfo;
use crate::block::{BlockDriver, Error, Result, Snapshots};
use crate::storage::Storage;

use super::Qcow2Driver;
use super::header::{Qcow2Header, c_string};
use super::layout::{
    ENTRY, MAX_L1_BYTES, MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE_BYTES, SNAPSHOT_ENTRY, SnapshotFields, word,
};
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

/// Reads the table that the header names (whose count it has checked).
pub fn read_table(storage: &dyn Storage, header: &Qcow2Header) -> Result<Vec<Snapshot>> {
    let fields = &header.fields;
    let mut window = Window::new(storage, fields.snapshots_offset);
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

impl Snapshots for Qcow2Driver {
    fn list(&self) -> Result<Vec<SnapshotInfo>> {
        Ok(self.snapshots.iter().map(Snapshot::info).collect())
    }

    fn open(&self, key: &SnapshotKey) -> Result<Box<dyn BlockDriver>> {
        let snapshot =
            self.find(key).ok_or_else(|| Error::new(crate::block::ErrorKind::NotFound, "Can't find snapshot"))?;
        let (at, entries) = (snapshot.fields.l1_table_offset, snapshot.fields.l1_size);
        if u64::from(entries) * ENTRY > MAX_L1_BYTES {
            return Err(Error::corrupt("Snapshot L1 table too large"));
        }
        if !self.geometry.places(at, u64::from(entries) * ENTRY) {
            return Err(Error::corrupt("Snapshot L1 table offset invalid"));
        }
        // Its tables are read from the file: what is changed here must be there.
        if self.write {
            self.flush()?;
        }
        let mut header = self.header().clone();
        let size = snapshot.disk_size().unwrap_or(header.fields.size);
        if i64::try_from(size).is_err() {
            return Err(Error::corrupt("Snapshot disk size invalid"));
        }
        header.fields.size = size;
        header.fields.l1_table_offset = at;
        header.fields.l1_size = entries;
        header.fields.nb_snapshots = 0;
        Ok(Box::new(self.view(header)))
    }
}

impl Qcow2Driver {
    fn find(&self, key: &SnapshotKey) -> Option<&Snapshot> {
        let all = &self.snapshots;
        match key {
            SnapshotKey::IdOrName(word) => {
                all.iter().find(|one| one.id == *word).or_else(|| all.iter().find(|one| one.name == *word))
            }
            SnapshotKey::Exact { id: None, name: None } => None,
            SnapshotKey::Exact { id, name } => all.iter().find(|one| {
                id.as_ref().is_none_or(|id| one.id == *id) && name.as_ref().is_none_or(|name| one.name == *name)
            }),
        }
    }
}
