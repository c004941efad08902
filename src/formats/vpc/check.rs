//! Checks a VHD: both footers, the dynamic header's checksum, the block allocation table, and that everything it
//! names lies in the file and over nothing else. What the bitmaps say cannot be wrong: any bits are possible.
//!
//! Source: *Virtual Hard Disk Image Format Specification* 1.0, "Dynamic Hard Disk Image", "Block Allocation Table and
//! Data Blocks".
//!
//! Mended is what is there twice: a footer from its copy. The copy at the start comes first, so one of the two is whole
//! at every moment; the one at the end is written behind the last block before the file is cut behind it. Where a block
//! is lost the end of the file is left as it is, for those who still look for the block's data.

use std::sync::atomic::Ordering;

use super::dynamic::Dynamic;
use super::fixed::Fixed;
use super::layout::{self, DynamicHeader, FOOTER_BYTES, Footer, HEADER, HEADER_BYTES};
use super::table::VpcState;
use crate::block::check::Tally;
use crate::block::error::Context;
use crate::block::{Check, CheckReport, Findings, Fix, Result};
use crate::formats::claims::Claims;
use crate::formats::one_file::Tables;
use crate::formats::runs::Runs;

/// Bytes of a footer.
const FOOTER: u64 = FOOTER_BYTES as u64;

/// What a look at the whole image came to.
#[derive(Debug, Default)]
struct VpcLook {
    /// The copy at the start is not whole.
    bad_front: bool,
    /// The footer at the end is not whole, or not what its copy is.
    bad_end: bool,
    /// Tables or blocks lie over each other.
    overlap: bool,
    /// Blocks lie past the end of the file.
    lost: bool,
}

impl Check for Fixed {
    fn check(&self, _fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let mut tally = Tally::new(findings);
        let (size, end) = (self.size.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        if end < size {
            tally.wrong(format!("{end} bytes of data before the footer, which says that the disk has {size}"));
        }
        tally.report.image_end = end + FOOTER;
        Ok(tally.report)
    }
}

impl Check for Dynamic {
    fn check(&self, fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let mut state = self.state();
        let mut tally = Tally::new(findings);
        let look = self.look(&mut state, &mut tally)?;
        if look.overlap {
            return Ok(tally.report);
        }
        if look.bad_front && fix.corruptions() {
            tally.repairing("footer's copy at the start");
            state.write_front(self.storage())?;
            tally.mended(1);
        }
        let mend_end = look.bad_end && fix.corruptions();
        let cut = tally.report.leaks > 0 && fix.leaks();
        let whole = fix.corruptions() || !(look.bad_front || look.bad_end);
        if (mend_end || cut) && whole && !look.lost {
            if mend_end {
                tally.repairing("footer at the end");
                tally.mended(1);
            }
            self.write_end(&mut state)?;
            tally.gave_back();
        }
        Ok(tally.report)
    }
}

impl Dynamic {
    fn look(&self, state: &mut VpcState, tally: &mut Tally<'_>) -> Result<VpcLook> {
        let storage = self.storage();
        let length = storage.len().context("Could not get the size of the file")?;
        let mut look = VpcLook::default();
        self.look_at_footers(state, length, &mut look, tally)?;
        let mut raw = [0; HEADER_BYTES];
        self.files[0].read_metadata(HEADER, state.footer.data_offset(), &mut raw)?;
        if !DynamicHeader::parse(raw).is_some_and(|header| header.is_sound()) {
            tally.wrong("checksum of the dynamic header is wrong");
        }
        self.look_at_blocks(state, length, &mut look, tally)?;
        let (stride, end) = (state.stride(), (state.free + FOOTER).get());
        tally.report.image_end = end;
        let leaked = length.saturating_sub(end) / stride;
        // Where a block is lost, what nothing names may be that block.
        if leaked > 0 && !look.lost && !look.overlap && !storage.facts().fixed_len {
            tally.leaked(leaked, format!("{leaked} blocks behind the last one"));
        }
        Ok(look)
    }

    fn look_at_footers(&self, state: &VpcState, length: u64, look: &mut VpcLook, tally: &mut Tally<'_>) -> Result<()> {
        let storage = self.storage();
        let footer_at = |at: Option<u64>| -> Result<Option<Footer>> {
            let Some(at) = at else { return Ok(None) };
            let mut raw = [0; FOOTER_BYTES];
            self.files[0].read_metadata(layout::FOOTER, at, &mut raw)?;
            Ok(Footer::parse(raw))
        };
        let sound = |footer: &Option<Footer>| footer.as_ref().is_some_and(Footer::is_sound);
        let front = footer_at(Some(0))?;
        // Virtual PC before 2004 wrote one byte less; on a device the footer is behind the last block.
        let places = match storage.facts().fixed_len {
            true => [Some(state.free.get()), None],
            false => [length.checked_sub(FOOTER), length.checked_sub(FOOTER - 1)],
        };
        let mut end = footer_at(places[0])?;
        if end.is_none() {
            end = footer_at(places[1])?;
        }
        let fault = |footer: &Option<Footer>| if footer.is_some() { "damaged" } else { "missing" };
        if !sound(&front) {
            look.bad_front = true;
            tally.wrong(format!("copy of the footer at the start is {}", fault(&front)));
        }
        if !sound(&end) {
            look.bad_end = true;
            tally.wrong(format!("footer at the end of the file is {}", fault(&end)));
        } else if sound(&front) && front != end {
            look.bad_end = true;
            tally.wrong("footer at the end of the file and its copy at the start differ");
        }
        Ok(())
    }

    fn look_at_blocks(
        &self,
        state: &mut VpcState,
        length: u64,
        look: &mut VpcLook,
        tally: &mut Tally<'_>,
    ) -> Result<()> {
        let storage = self.storage();
        let (metadata, stride) = (state.metadata(), state.stride());
        let mut runs = Runs::default();
        metadata.iter().for_each(|range| runs.add(range.start, range.end.saturating_sub(range.start)));
        if runs.disjoint().is_none() {
            tally.wrong("dynamic header and block allocation table overlap");
            look.overlap = true;
        }
        let end = length.checked_next_multiple_of(512).unwrap_or(length);
        let blocks = self.virtual_size().div_ceil(state.block());
        let (mut allocated, mut fragmented, mut previous) = (0, 0, None);
        state.each(storage, |block, at| {
            if block < blocks {
                allocated += 1;
                fragmented += u64::from(previous.is_some_and(|previous| previous + stride != at));
                previous = Some(at);
            }
            if (at + stride).get() > end {
                tally.wrong(format!("block {block} at offset {} lies past the end of the file", at.get()));
                look.lost = true;
            }
        })?;
        let report = &mut tally.report;
        (report.total_clusters, report.allocated_clusters, report.fragmented_clusters) =
            (blocks, allocated, fragmented);
        for mut claims in Claims::windows(state.free.get().min(end)) {
            for range in &metadata {
                claims.claim(range.start, range.end.saturating_sub(range.start));
            }
            state.each(storage, |block, at| {
                if (at + stride).get() <= end && !claims.claim(at.get(), stride) {
                    look.overlap = true;
                    tally.wrong(format!("block {block} at offset {} overlaps what else is there", at.get()));
                }
            })?;
        }
        Ok(())
    }

    /// Makes the footer the last thing in the file.
    fn write_end(&self, state: &mut VpcState) -> Result<()> {
        let storage = self.storage();
        let free = state.free;
        state.move_footer(free);
        state.write_tables(storage)?;
        storage.flush().context("Could not flush")
    }
}
