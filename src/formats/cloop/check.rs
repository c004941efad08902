//! Checks a compressed loop device: that its blocks lie in the file in order, behind the table of their offsets, and that
//! each is the zlib stream of a whole block, by that stream's own checksum.

use super::layout::{HEADER_BYTES, OFFSET_BYTES};
use super::{CloopDriver, LARGEST_PACKED};
use crate::block::check::Tally;
use crate::block::error::Context;
use crate::block::{Check, CheckReport, Findings, Fix, Result};
use crate::codec::deflate::{self, Wrap};

impl Check for CloopDriver {
    fn check(&self, _fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let storage = &*self.files[0].storage;
        let length = storage.len().context("Could not get the size of the file")?;
        let mut tally = Tally::new(findings);
        let table_end = HEADER_BYTES as u64 + (self.blocks + 1) * OFFSET_BYTES;
        let (mut packed, mut plain) = (Vec::new(), vec![0; usize::try_from(self.block).unwrap_or(0)]);
        tally.report.total_clusters = self.blocks;
        for index in 0..self.blocks {
            let (start, end) = self.offsets(index)?;
            let wrong = if end < start {
                Some(format!("ends at offset {end}, before it starts at {start}"))
            } else if start < table_end {
                Some(format!("at offset {start} overlaps the table of offsets"))
            } else if end > length {
                Some(format!("at offset {start} lies past the end of the file"))
            } else if end - start > LARGEST_PACKED.min(2 * self.block) {
                Some(format!("at offset {start} has a compressed size of {} bytes", end - start))
            } else {
                packed.resize(usize::try_from(end - start).unwrap_or(0), 0);
                storage.read_at(start, &mut packed).context("Could not read the image")?;
                tally.report.image_end = tally.report.image_end.max(end);
                deflate::decode(Wrap::Zlib, &packed, &mut plain)
                    .err()
                    .map(|error| format!("at offset {start}: {error}"))
            };
            if let Some(wrong) = wrong {
                tally.wrong(format!("block {index} {wrong}"));
            }
            tally.report.allocated_clusters += 1;
            tally.report.compressed_clusters += 1;
            tally.report.fragmented_clusters += 1;
        }
        Ok(tally.report)
    }
}
