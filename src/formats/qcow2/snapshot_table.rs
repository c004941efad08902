//! The table of internal snapshots: its entries, as they are read and written.
//!
//! Source: specification, section "Snapshots".

use crate::block::info::SnapshotInfo;
use crate::block::{Child, Error, Result};

use super::header::{Qcow2Header, c_string};
use super::layout::{
    MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS, SNAPSHOT_ENTRY, SNAPSHOT_EXTRA, SnapshotFields, word,
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

    pub(super) fn info(&self) -> SnapshotInfo {
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
