//! Checks a copy-on-write file: that the sectors which its bitmap says are there lie in the file, and that the bitmap
//! names none past the disk's end. The bitmap and the data cannot overlap: both places come from the disk's size.

use super::{CowDriver, CowLayout};
use crate::block::check::Tally;
use crate::block::error::Context;
use crate::block::{BlockDriver, Check, CheckReport, Findings, Fix, Result};

impl Check for CowDriver {
    fn check(&self, _fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let storage = &*self.files[0].storage;
        let length = storage.len().context("Could not get the size of the file")?.next_multiple_of(512);
        let mut tally = Tally::new(findings);
        let CowLayout { size, sector, bitmap, bits, data, .. } = self.layout;
        tally.report.total_clusters = size.div_ceil(sector);
        tally.report.image_end = bitmap + bits.div_ceil(8);
        let mut tables = self.tables.lock().unwrap_or_else(|e| e.into_inner());
        let mut first = 0;
        while first < bits {
            let (there, count) = tables.bit_run(storage, bitmap, first, bits - first)?;
            let count = count.max(1);
            if there {
                let last = first + count - 1;
                let end = data.saturating_add((last + 1).saturating_mul(sector).min(self.virtual_size()));
                tally.report.allocated_clusters += count;
                tally.report.image_end = tally.report.image_end.max(end.min(length));
                if end > length {
                    tally.wrong(format!("sectors {first} to {last} lie past the end of the file"));
                }
            }
            first += count;
        }
        // Of a bitmap's last byte.
        let rest = bits.next_multiple_of(8) - bits;
        if rest > 0 && tally.report.total_clusters == bits {
            let (there, count) = tables.bit_run(storage, bitmap, bits, rest)?;
            if there || count < rest {
                tally.wrong("the bitmap has sectors past the end of the disk");
            }
        }
        Ok(tally.report)
    }
}
