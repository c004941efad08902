//! Checks a Bochs disk: that the extents which its catalog names lie in the file, each in a place of its own. What the
//! bitmaps say cannot be wrong: any bits are possible.

use super::BochsDriver;
use super::layout::{HEADER_BYTES, SECTOR};
use crate::block::check::Tally;
use crate::block::error::Context;
use crate::block::{Check, CheckReport, Findings, Fix, Result};
use crate::formats::table::TableCache;

impl Check for BochsDriver {
    fn check(&self, _fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let storage = &*self.files[0].storage;
        let length = storage.len().context("Could not get the size of the file")?.next_multiple_of(SECTOR);
        let mut tables = self.tables.lock().unwrap_or_else(|e| e.into_inner());
        let mut tally = Tally::new(findings);
        if self.catalog < HEADER_BYTES as u64 {
            tally.wrong("the catalog overlaps the header");
        }
        // As many as the catalog has entries at most, whose number is bounded.
        let (mut named, mut previous) = (Vec::new(), None);
        tally.report.total_clusters = self.size.div_ceil(self.extent);
        for index in 0..tally.report.total_clusters {
            let Some(at) = self.extent_at(&mut tables, index)? else { continue };
            tally.report.allocated_clusters += 1;
            let stride = self.bitmap + self.extent;
            tally.report.fragmented_clusters += u64::from(previous.is_some_and(|previous| previous + stride != at));
            previous = Some(at);
            named.push((at, index));
            let end = at + stride;
            tally.report.image_end = tally.report.image_end.max(end.min(length));
            let lost =
                end > length && (at + self.bitmap > length || self.written_end(&mut tables, at, index)? > length);
            if lost {
                tally.wrong(format!("extent {index} at offset {at} lies past the end of the file"));
            }
        }
        named.sort_unstable();
        for pair in named.windows(2) {
            if let [(at, first), (again, second)] = pair
                && at == again
            {
                tally.wrong(format!("extents {first} and {second} are both at offset {at}"));
            }
        }
        Ok(tally.report)
    }
}

impl BochsDriver {
    /// Where the last sector of an extent ends that is there.
    fn written_end(&self, tables: &mut TableCache, at: u64, index: u64) -> Result<u64> {
        let sectors = self.extent.min(self.size - index * self.extent) / SECTOR;
        let (mut next, mut last) = (0, 0);
        while next < sectors {
            let (there, count) = tables.bit_run(&*self.files[0].storage, at, next, sectors - next)?;
            next += count.max(1);
            if there {
                last = next;
            }
        }
        Ok(at + self.bitmap + last * SECTOR)
    }
}
