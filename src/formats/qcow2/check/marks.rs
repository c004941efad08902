//! The marks of entries: set where the cluster has one reference, this entry's, and nowhere else.
//!
//! The active tables alone: those of snapshots are never written through, so nobody looks at their marks.

use crate::block::check::Fix;
use crate::block::{Error, Result};

use super::super::guard::Survey;
use super::super::layout::{COMPRESSED, COPIED, ENTRY, MAX_L1_BYTES, OFFSET_MASK};
use super::super::walk::{Found, MetadataPart, Visitor};
use super::Checker;
use super::compare::Refcounts;

impl Checker<'_> {
    pub(super) fn check_marks(&mut self) -> Result<()> {
        let mend = match self.fix {
            Fix::Nothing => false,
            // With space alone to be given back, marks are mended only where nothing else is wrong.
            Fix::Leaks => self.is_clean(),
            Fix::All => true,
        };
        let mut refcounts = self.refcounts()?;
        let fields = self.driver.header().fields;
        let l1 = fields.l1_table_offset;
        let mut table = Vec::new();
        self.each_word(l1, u64::from(fields.l1_size), |checker, index, word| {
            let l2 = word & OFFSET_MASK;
            if l2 == 0 {
                return Ok(());
            }
            // A table whose own refcount cannot be read is left alone, with all that it names.
            let Some(count) = checker.refcount_of(&mut refcounts, checker.geometry.cluster_of(l2))? else {
                return Ok(());
            };
            if let Some(word) = checker.l1_mark(count, index, word, mend) {
                let at = l1 + index * ENTRY;
                checker.driver.file().write_metadata("L1 table", at, &word.to_be_bytes())?;
            }
            checker.l2_marks(&mut refcounts, l2, mend, &mut table)
        })?;
        self.flush_if(mend)
    }

    fn flush_if(&self, wrote: bool) -> Result<()> {
        if wrote { self.flush() } else { Ok(()) }
    }

    /// The entry with the mark that it ought to have, if it has another and that is mended.
    fn l1_mark(&mut self, count: u64, index: u64, word: u64, mend: bool) -> Option<u64> {
        if (count == 1) == (word & COPIED != 0) {
            return None;
        }
        self.wrong_or_mended(
            mend,
            &format!("OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={word:x} refcount={count}"),
        );
        mend.then_some(word ^ COPIED)
    }

    fn l2_marks(&mut self, refcounts: &mut Refcounts, at: u64, mend: bool, table: &mut Vec<u8>) -> Result<()> {
        if at >= self.file {
            return Ok(());
        }
        let geometry = self.geometry;
        self.read(at, geometry.cluster_size(), table)?;
        let entry = usize::try_from(geometry.l2_entry()).unwrap_or(8);
        let mut changed: Option<(usize, usize)> = None;
        for from in (0..table.len()).step_by(entry) {
            let Some(bytes) = table.get_mut(from..from + 8).and_then(|bytes| bytes.first_chunk_mut::<8>()) else {
                break;
            };
            let word = u64::from_be_bytes(*bytes);
            let offset = word & OFFSET_MASK;
            let placed = offset != 0 || self.driver.external && word & COPIED != 0;
            if word & COMPRESSED != 0 || !placed {
                continue;
            }
            // A data file has no refcounts: each of its clusters is one entry's.
            let count = match self.driver.external {
                true => Some(1),
                false => self.refcount_of(refcounts, geometry.cluster_of(offset))?,
            };
            let Some(count) = count.filter(|count| (*count == 1) != (word & COPIED != 0)) else { continue };
            self.wrong_or_mended(mend, &format!("OFLAG_COPIED data cluster: l2_entry={word:x} refcount={count}"));
            if mend {
                *bytes = (word ^ COPIED).to_be_bytes();
                changed = Some((changed.map_or(from, |(first, _)| first), from + 8));
            }
        }
        let Some((from, to)) = changed else { return Ok(()) };
        self.may_write_l2(at)?;
        let part = table.get(from..to).unwrap_or(&[]);
        self.driver.file().write_metadata("L2 table", at + from as u64, part)
    }

    /// Refuses to write an L2 table where another one lies: a mark there would be a change to that.
    pub(super) fn may_write_l2(&mut self, at: u64) -> Result<()> {
        if self.places.is_none() {
            self.driver.tables.forget(0, u64::MAX);
            let mut survey = Sane(Survey::new(self.driver, 0)?);
            self.driver.walk(&mut survey)?;
            self.places = Some(survey.0);
        }
        let what = self.places.as_ref().and_then(|places| places.other_than_l2(at, self.geometry.cluster_size()));
        let Some(what) = what else { return Ok(()) };
        self.mark_corrupt(&format!("Preventing invalid write on metadata (overlaps with {what})"));
        self.tell("ERROR: Could not write L2 table; metadata overlap check failed: Input/output error");
        Err(Error::corrupt("Input/output error"))
    }
}

/// Where tables are; but no L1 table of a snapshot that cannot be one.
struct Sane<'a>(Survey<'a>);

impl Visitor for Sane<'_> {
    fn found(&mut self, found: &Found) -> Result<()> {
        let aligned = self.0.geometry().in_cluster(found.at) == 0;
        if found.part == MetadataPart::InactiveL1 && !(aligned && found.len <= MAX_L1_BYTES) {
            return Ok(());
        }
        self.0.found(found)
    }

    fn contents(&self, _tables: u64) -> bool {
        false
    }

    fn too_many(&self) -> Result<()> {
        Ok(())
    }
}
