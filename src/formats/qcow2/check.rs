//! Checking: what the tables refer to against what the refcounts say, and all that a table can have wrong.
//!
//! One check goes through the image in the reference's order, for its findings are lines in an order: the snapshot
//! table (`snapshots.rs`); everything that refers to clusters, counted (`count.rs`); the counts against the refcounts
//! (`compare.rs`); the marks of entries whose cluster is theirs alone (`marks.rs`). What has to be mended is mended in
//! that order too, each step in the file before the next one relies on it:
//!
//! 1. entries of zeroed clusters that cannot be, which lose their place: from then on it is a leak;
//! 2. refcounts: where they are, or, where a cluster in use has none or a refcount block cannot be used, all of them
//!    anew in room that nothing refers to, to which the header changes over once they are written (`repair.rs`). Where
//!    the file lacks something, it must not grow over that: without room before it they are mended where they are, or
//!    nothing more is;
//! 3. marks, whose refcounts are right by then;
//! 4. the snapshot table, written anew beside the old one;
//! 5. the dirty bit and the corrupt bit, if nothing is wrong any more.
//!
//! Tables are read from the file, past the cache, and changed there: nothing is cached for them afterwards. Memory is
//! that of the counts (`references.rs`), of one table, and of a window of refcount blocks.
//!
//! Source: specification, sections "Header", "Host cluster management", "Cluster mapping", "Snapshots", "Bitmaps". The
//! texts are the reference's.

mod compare;
mod count;
mod marks;
mod snapshots;

pub use snapshots::readable as readable_snapshots;

use crate::block::check::{Check, CheckReport, Findings, Fix};
use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::storage::Storage;

use super::Qcow2Driver;
use super::geometry::{ClusterIndex, Geometry};
use super::guard::Survey;
use super::layout::{self, ENTRY};
use super::references::References;

use compare::Settling;
use snapshots::SnapshotTable;

impl Check for Qcow2Driver {
    fn check(&self, fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        Checker::new(self, fix, findings)?.run()
    }
}

/// A check that is under way.
struct Checker<'a> {
    driver: &'a Qcow2Driver,
    geometry: Geometry,
    fix: Fix,
    findings: &'a dyn Findings,
    /// The length of the image file.
    file: u64,
    report: CheckReport,
    /// The refcounts cannot be mended where they are.
    rebuild: bool,
    /// Not even for want of room: a block cannot be used, or there is none where one is needed.
    unusable: bool,
    /// The first cluster of which the file lacks something that is nowhere else.
    missing: Option<ClusterIndex>,
    /// Lines told so far.
    lines: u64,
    snapshots: SnapshotTable,
    /// Clusters that leaked and are free now, as runs: the first, and how many.
    freed: Vec<(ClusterIndex, u64)>,
    /// Where tables are, once that had to be known.
    places: Option<Survey<'a>>,
}

impl<'a> Checker<'a> {
    fn new(driver: &'a Qcow2Driver, fix: Fix, findings: &'a dyn Findings) -> Result<Self> {
        let file = driver.file().storage.len().context("Could not get file size")?;
        Ok(Self {
            driver,
            geometry: driver.geometry,
            fix,
            findings,
            file,
            report: CheckReport::default(),
            rebuild: false,
            unusable: false,
            missing: None,
            lines: 0,
            snapshots: SnapshotTable::default(),
            freed: Vec::new(),
            places: None,
        })
    }

    fn run(mut self) -> Result<CheckReport> {
        self.driver.tables.forget(0, u64::MAX);
        self.read_snapshots()?;
        let count = self.count(self.fix.corruptions())?;
        let Some(settled) = self.settle_refcounts(count.references, &count.cut)? else {
            // What is free cannot be told, nor which marks are right.
            self.leave_snapshots();
            self.driver.tables.forget(0, u64::MAX);
            return Ok(self.report);
        };
        if !(settled.alone && count.all_marked && self.is_clean()) {
            self.check_marks()?;
        }
        self.write_snapshots()?;
        self.clear_flags()?;
        self.driver.tables.forget(0, u64::MAX);
        self.give_back()?;
        Ok(self.report)
    }

    /// Gives the host the space of what leaked. Not where anything else was wrong: it may be what is missing there.
    fn give_back(&mut self) -> Result<()> {
        if self.freed.is_empty() || !self.is_clean() || self.report.corruptions_fixed > 0 {
            return Ok(());
        }
        self.flush()?;
        for (first, count) in std::mem::take(&mut self.freed) {
            // An offer, which the host need not take.
            let _ = self.storage().discard(self.geometry.offset_of(first), count << self.geometry.cluster_bits);
        }
        Ok(())
    }

    /// Compares the refcounts with the counts, and mends them as far as that is asked for. `None` if it was, and cannot
    /// be done.
    fn settle_refcounts(&mut self, mut references: References, cut: &References) -> Result<Option<Settled>> {
        let before = self.report;
        let alone = references.is_single();
        self.compare(&references, Settling::Tell)?;
        if self.rebuild && self.fix.corruptions() {
            if let Some(settled) = self.rebuild(&mut references, cut)? {
                return Ok(Some(settled));
            }
            if self.unusable {
                let at = self.geometry.offset_of(self.missing.unwrap_or(ClusterIndex::MAX));
                self.tell(&format!("ERROR no room for new refcounts before what the file lacks at offset {at:#x}"));
                return Ok(None);
            }
            self.rebuild = false;
        }
        if self.fix.is_asked_for() {
            if self.rebuild {
                self.tell("ERROR need to rebuild refcount structures");
                return Err(Error::corrupt("Input/output error"));
            }
            if self.report.leaks > 0 || self.report.corruptions > 0 {
                self.report = before;
                let how = Settling::Mend { corruptions: self.fix.corruptions() };
                self.compare(&references, how)?;
                self.flush()?;
            }
        }
        Ok(Some(Settled { alone: alone && self.report.leaks_fixed == 0 && self.report.corruptions_fixed == 0 }))
    }

    /// New refcounts, if there is room for them; then what only the old ones used is free.
    fn rebuild(&mut self, references: &mut References, cut: &References) -> Result<Option<Settled>> {
        let old = self.report;
        let end = self.missing.unwrap_or(ClusterIndex::MAX);
        if !super::repair::renew(self.driver, references, cut, end)? {
            return Ok(None);
        }
        self.tell("Rebuilding refcount structure");
        self.file = self.driver.file().storage.len().context("Could not get file size")?;
        (self.rebuild, self.unusable, self.places) = (false, false, None);
        self.report = CheckReport::default();
        let count = self.count(false)?;
        self.compare(&count.references, Settling::Mend { corruptions: false })?;
        self.flush()?;
        let new = self.report;
        self.report.corruptions_fixed = old.corruptions_fixed + old.corruptions.saturating_sub(new.corruptions);
        self.report.leaks_fixed = old.leaks.saturating_sub(new.leaks);
        Ok(Some(Settled { alone: false }))
    }

    /// New ones have to be made, elsewhere.
    fn give_up_refcounts(&mut self) {
        (self.rebuild, self.unusable) = (true, true);
    }

    /// Clears what says that something is wrong, if nothing is.
    fn clear_flags(&self) -> Result<()> {
        if !self.fix.is_asked_for() {
            return Ok(());
        }
        let (incompatible, stale) = {
            let header = self.driver.header();
            (header.fields.incompatible, header.is_stale())
        };
        let wrong = self.report.corruptions > 0 || self.report.check_errors > 0;
        let flags = if wrong { 0 } else { layout::DIRTY | layout::CORRUPT };
        if incompatible & flags == 0 && !stale {
            return Ok(());
        }
        self.driver.update_header(|header| {
            header.fields.incompatible &= !flags;
            header.clear_stale();
        })?;
        self.flush()
    }

    fn is_clean(&self) -> bool {
        let CheckReport { corruptions, leaks, check_errors, .. } = self.report;
        (corruptions, leaks, check_errors) == (0, 0, 0)
    }

    fn tell(&mut self, line: &str) {
        self.lines += 1;
        self.findings.line(line);
    }

    /// Tells of something that is wrong.
    fn wrong(&mut self, line: &str) {
        self.report.corruptions += 1;
        self.tell(line);
    }

    /// Tells of something that is wrong, or is mended at once.
    fn wrong_or_mended(&mut self, mend: bool, line: &str) {
        let (count, word) = match mend {
            true => (&mut self.report.corruptions_fixed, "Repairing"),
            false => (&mut self.report.corruptions, "ERROR"),
        };
        *count += 1;
        self.tell(&format!("{word} {line}"));
    }

    /// Marks the image as corrupt, until nothing is wrong any more.
    fn mark_corrupt(&mut self, what: &str) {
        // The error that goes with it is told here.
        let _ = self.driver.corrupt(String::new());
        self.tell(&format!("qcow2: Marking image as corrupt: {what}; further corruption events will be suppressed"));
    }

    fn storage(&self) -> &'a dyn Storage {
        &*self.driver.file().storage
    }

    fn flush(&self) -> Result<()> {
        self.storage().flush().context("Could not flush")
    }

    /// Reads a part of the image file; what lies past its end is zeros.
    fn read(&self, at: u64, len: u64, buf: &mut Vec<u8>) -> Result<()> {
        buf.clear();
        buf.resize(usize::try_from(len).map_err(|_| Error::corrupt("a table is too large"))?, 0);
        if at < self.file {
            self.driver.file().read_metadata("a table", at, buf)?;
        }
        Ok(())
    }

    /// Gives the entries of a table of words, from its first on, with their indices; those that are zero are left out.
    fn each_word(
        &mut self,
        at: u64,
        entries: u64,
        mut look: impl FnMut(&mut Self, u64, u64) -> Result<()>,
    ) -> Result<()> {
        const PIECE: u64 = 64 << 10;
        let mut piece = Vec::new();
        let mut first = 0;
        while first < entries {
            let from = at.saturating_add(first * ENTRY);
            if from >= self.file {
                return Ok(());
            }
            let n = (entries - first).min(PIECE / ENTRY);
            self.read(from, n * ENTRY, &mut piece)?;
            for (index, word) in (first..).zip(layout::words(&piece)) {
                if word != 0 {
                    look(self, index, word)?;
                }
            }
            first += n;
        }
        Ok(())
    }
}

/// What is known once the refcounts are what they can be.
struct Settled {
    /// No cluster has two references.
    alone: bool,
}
