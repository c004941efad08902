//! The snapshot table, read entry by entry whatever is wrong with it, and written anew.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::block::{Child, Error, Result};

use super::super::counts::Counts;
use super::super::geometry::{ClusterIndex, Geometry};
use super::super::header::{Qcow2Header, c_string};
use super::super::layout::{
    MAX_SNAPSHOT_EXTRA, MAX_SNAPSHOT_TABLE_BYTES, MAX_SNAPSHOTS, SNAPSHOT_ENTRY, SnapshotFields,
};
use super::super::snapshot_table::{SNAPSHOT_TABLE, Snapshot};
use super::super::space::{ClusterSpace as _, Cursor};
use super::super::window::Window;
use super::Checker;

/// The extra data that version 3 asks for, in bytes.
const LEAST_EXTRA: u32 = 16;

/// The table as it is in the file, less what has to go.
#[derive(Debug, Default)]
pub(super) struct SnapshotTable {
    /// Where it is.
    pub at: u64,
    /// Its length, without what fills up the last entry.
    pub bytes: u64,
    pub entries: Vec<Snapshot>,
    /// It is going to be written anew; so many findings are mended by that.
    mended: u64,
    /// Findings that stay.
    pub wrong: u64,
    /// Clusters of it that have more references than a refcount can tell.
    pub crowded: BTreeSet<ClusterIndex>,
}

impl SnapshotTable {
    /// The clusters that it uses.
    pub fn clusters(&self, geometry: &Geometry) -> Range<ClusterIndex> {
        let first = geometry.cluster_of(self.at);
        first..first + self.bytes.div_ceil(geometry.cluster_size())
    }
}

/// An entry that starts at `start`, the length of its extra data in the table, and where it ends.
fn read_entry(window: &mut Window<'_>, start: u64) -> Result<(Snapshot, u32, u64)> {
    let fixed: [u8; SNAPSHOT_ENTRY] =
        window.take(SNAPSHOT_ENTRY as u64)?.try_into().map_err(|_| Error::corrupt("Failed to read snapshot table"))?;
    let mut fields = SnapshotFields::read(&fixed);
    let stored = fields.extra_size;
    fields.extra_size = stored.min(MAX_SNAPSHOT_EXTRA);
    let extra = window.take(u64::from(fields.extra_size))?.to_vec();
    window.skip(u64::from(stored - fields.extra_size))?;
    let id = c_string(window.take(u64::from(fields.id_size))?);
    let name = c_string(window.take(u64::from(fields.name_size))?);
    let len = SNAPSHOT_ENTRY as u64 + u64::from(stored) + u64::from(fields.id_size) + u64::from(fields.name_size);
    window.skip(len.next_multiple_of(8) - len)?;
    Ok((Snapshot { fields, extra, id, name }, stored, start + len))
}

/// The snapshots of an image that may be damaged, as far as they can be read.
pub fn readable(file: &Child, header: &Qcow2Header) -> Vec<Snapshot> {
    let mut window = Window::new(file, SNAPSHOT_TABLE, header.fields.snapshots_offset);
    let (mut found, mut at) = (Vec::new(), 0u64);
    for _ in 0..header.fields.nb_snapshots.min(MAX_SNAPSHOTS) {
        match read_entry(&mut window, at.next_multiple_of(8)) {
            Ok((entry, _, end)) if end <= MAX_SNAPSHOT_TABLE_BYTES => {
                found.push(entry);
                at = end;
            }
            _ => break,
        }
    }
    found
}

impl Checker<'_> {
    pub(super) fn read_snapshots(&mut self) -> Result<()> {
        let fields = self.driver.header().fields;
        let mend = self.fix.corruptions();
        self.snapshots = SnapshotTable { at: fields.snapshots_offset, ..SnapshotTable::default() };
        let mut count = fields.nb_snapshots;
        if let Some(rest) = count.checked_sub(MAX_SNAPSHOTS).filter(|rest| *rest > 0) {
            if !mend {
                return Err(self.refuse(
                    "ERROR snapshot table too large",
                    Some(format!("You can force-remove all {rest} overhanging snapshots with qemu-img check -r all")),
                    "File too large",
                ));
            }
            self.mended_later(u64::from(rest), &format!("Discarding {rest} overhanging snapshots"));
            count = MAX_SNAPSHOTS;
        }
        if !self.geometry.places(fields.snapshots_offset, u64::from(count) * SNAPSHOT_ENTRY as u64) {
            return Err(self.refuse("ERROR snapshot table offset invalid", None, "Invalid argument"));
        }
        let mut window = Window::new(self.driver.file(), SNAPSHOT_TABLE, fields.snapshots_offset);
        for n in 0..count {
            let start = self.snapshots.bytes.next_multiple_of(8);
            let (entry, stored, end) = read_entry(&mut window, start)?;
            if stored > MAX_SNAPSHOT_EXTRA {
                if !mend {
                    return Err(self.refuse(
                        &format!(
                            "ERROR failed to read the snapshot table: Too much extra metadata in snapshot table entry \
                             {n}"
                        ),
                        Some("You can force-remove this extra metadata with qemu-img check -r all".to_owned()),
                        "File too large",
                    ));
                }
                self.mended_later(
                    1,
                    &format!(
                        "Discarding too much extra metadata in snapshot table entry {n} ({stored} > \
                         {MAX_SNAPSHOT_EXTRA})"
                    ),
                );
            }
            if end > MAX_SNAPSHOT_TABLE_BYTES {
                self.too_long(count - n, mend)?;
                break;
            }
            self.snapshots.entries.push(entry);
            self.snapshots.bytes = end;
        }
        self.find_incomplete(mend);
        Ok(())
    }

    /// Version 3 has the sizes of the machine's state and of the disk in every entry.
    fn find_incomplete(&mut self, mend: bool) {
        let short = |entry: &Snapshot| entry.fields.extra_size < LEAST_EXTRA;
        let entries = (0..).zip(&self.snapshots.entries);
        let incomplete: Vec<u32> = entries.filter(|(_, entry)| short(entry)).map(|(n, _)| n).collect();
        let asked_for = self.geometry.version >= 3;
        for n in incomplete.into_iter().filter(|_| asked_for) {
            let line = format!("snapshot table entry {n} is incomplete");
            match mend {
                true => self.mended_later(1, &format!("Repairing {line}")),
                false => {
                    self.snapshots.wrong += 1;
                    self.tell(&format!("ERROR {line}"));
                }
            }
        }
    }

    fn too_long(&mut self, rest: u32, mend: bool) -> Result<()> {
        if !mend {
            return Err(self.refuse(
                "ERROR failed to read the snapshot table: Snapshot table is too big",
                Some(format!("You can force-remove all {rest} overhanging snapshots with qemu-img check -r all")),
                "File too large",
            ));
        }
        self.mended_later(
            u64::from(rest),
            &format!("Discarding {rest} overhanging snapshots (snapshot table is too big)"),
        );
        Ok(())
    }

    /// A table that cannot be read.
    fn refuse(&mut self, what: &str, hint: Option<String>, cause: &str) -> Error {
        self.findings.error(what);
        if let Some(hint) = hint {
            self.findings.line(&hint);
        }
        Error::corrupt(cause)
    }

    fn mended_later(&mut self, findings: u64, line: &str) {
        self.snapshots.mended += findings;
        self.tell(line);
    }

    /// Writes the table anew, if that is what it needs: beside the old one, then the header changes over.
    pub(super) fn write_snapshots(&mut self) -> Result<()> {
        self.report.corruptions += self.snapshots.wrong;
        if self.snapshots.mended == 0 {
            return Ok(());
        }
        match self.renew_snapshots() {
            Ok(true) => self.report.corruptions_fixed += self.snapshots.mended,
            Ok(false) => self.report.corruptions += self.snapshots.mended,
            Err(error) => {
                self.tell(&format!("ERROR failed to update snapshot table: {}", error.message()));
                return Err(Error::corrupt("Input/output error"));
            }
        }
        Ok(())
    }

    /// Leaves the table as it is, with all that is wrong with it.
    pub(super) fn leave_snapshots(&mut self) {
        self.report.corruptions += self.snapshots.wrong + self.snapshots.mended;
    }

    /// Whether there was room for it.
    fn renew_snapshots(&mut self) -> Result<bool> {
        let driver = self.driver;
        let disk = driver.header().fields.size;
        let mut bytes = Vec::new();
        for snapshot in &self.snapshots.entries {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            snapshot.append(&mut bytes, disk)?;
        }
        let count = u32::try_from(self.snapshots.entries.len()).map_err(|_| Error::corrupt("too many snapshots"))?;
        driver.tables.forget(0, u64::MAX);
        let mut alloc = driver.lock_alloc();
        let missing = driver.learn_metadata_but_snapshots(self.snapshots.at, self.snapshots.bytes)?;
        alloc.learned = true;
        // Where nothing can be given out, though it is counted as free: a table that says it is longer than the file is
        // not counted. What comes behind all that is there is free in any case.
        let old = self.geometry.cluster_of(self.snapshots.at);
        if self.snapshots.at < self.file && driver.refcount(old)? == 0 {
            let end = ClusterIndex(self.file.div_ceil(self.geometry.cluster_size()));
            driver.forget_behind(self.geometry.offset_of(end));
            alloc.cursor = Cursor::at(end);
        }
        // As far as that can grow: by the table, and by new refcounts of all.
        let needed = (bytes.len() as u64 >> self.geometry.cluster_bits) + 8 + 2 * driver.refcount_table().len;
        let near = self.missing.is_some_and(|first| first.since(self.clusters()) < needed);
        if (missing.is_some() || near) && !bytes.is_empty() {
            // Behind the end of the file it would make up for what is missing.
            let Some(room) = self.room_in_file((bytes.len() as u64).div_ceil(self.geometry.cluster_size()))? else {
                self.tell("ERROR no room for a new snapshot table within the file, which lacks something");
                return Ok(false);
            };
            alloc.cursor = Cursor::at(room);
        }
        let at = if bytes.is_empty() { 0 } else { driver.put(&mut alloc, SNAPSHOT_TABLE, &bytes)? };
        driver.tables.write_back()?;
        self.flush()?;
        driver.update_header(|header| {
            header.fields.snapshots_offset = at;
            header.fields.nb_snapshots = count;
        })?;
        self.flush()?;
        let (geometry, old) = (self.geometry, &self.snapshots);
        // As far as it was counted.
        let past = old.at.saturating_add(old.bytes).saturating_sub(self.file);
        if old.bytes == 0 || past >= geometry.cluster_size() {
            return self.flush().map(|()| true);
        }
        let table = old.clusters(&geometry);
        let (first, clusters) = (table.start, table.end.since(table.start));
        let mut free = 0;
        for cluster in first.run(clusters).filter(|cluster| !old.crowded.contains(cluster)) {
            // The others have as many references as a refcount can tell without the table.
            free += driver.lower(cluster, 1)?.len() as u64;
        }
        driver.tables.write_back()?;
        self.flush()?;
        if free < clusters {
            // It was said to reach into what others use, which have it for themselves now.
            driver.tables.forget(0, u64::MAX);
            self.check_marks()?;
        }
        Ok(true)
    }

    /// So many free clusters in a row within the file, in which no table lies, whatever refcounts say.
    fn room_in_file(&self, clusters: u64) -> Result<Option<ClusterIndex>> {
        let (driver, geometry) = (self.driver, self.geometry);
        let mut start = ClusterIndex(0);
        loop {
            start = Counts(driver).find_free(start, clusters)?;
            let end = start + clusters;
            if end > self.clusters() {
                return Ok(None);
            }
            let (first, last) = (geometry.refcount_of(start).0, geometry.refcount_of(start + (clusters - 1)).0);
            let counted = driver.block_of(first)?.is_some() && driver.block_of(last)?.is_some();
            if counted && driver.occupied(geometry.offset_of(start), geometry.offset_of(end)).is_none() {
                return Ok(Some(start));
            }
            start = start + 1;
        }
    }
}
