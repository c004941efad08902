//! Checks a VHDX: both headers and region tables, the log, and that every entry of the BAT says something that can be,
//! and names blocks in the file that nothing else lies over.
//!
//! Mended is what is there twice or has one answer: a header or region table from the other one, a log by its replay,
//! blocks behind the last one that nothing names by cutting them off. A block that is lost is not: what belongs there is
//! not known, and then the end of the file is left as it is.

use zerocopy::IntoBytes;

use super::VhdxDriver;
use super::headers::Headers;
use super::layout::{BlockState, HEADERS, MIB, REGION_TABLES};
use super::regions::RegionTable;
use super::state::VhdxState;
use crate::block::check::Tally;
use crate::block::error::Context;
use crate::block::{Check, CheckReport, Findings, Fix, Result};
use crate::formats::claims::Claims;
use crate::storage::{Preallocation, Storage};

/// What a look at the whole image came to.
#[derive(Debug, Default)]
struct VhdxLook {
    /// Something of the image is not where it is said to be, or in two places.
    lost: bool,
    /// The end of the last thing that is named.
    end: u64,
    /// There are blocks.
    blocks: bool,
}

impl Check for VhdxDriver {
    fn check(&self, fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let mut state = self.state();
        let mut tally = Tally::new(findings);
        let storage = self.storage();
        self.settle_log(&mut state, fix, &mut tally)?;
        let headers = copies(Headers::both(storage)?.map(|header| header.map(|h| h.as_bytes().to_vec())));
        let tables = [RegionTable::read(storage, 0)?, RegionTable::read(storage, 1)?];
        let tables = copies(tables.map(|table| table.map(|table| table.bytes().to_vec())));
        for (what, places, copies) in [("header", HEADERS, headers), ("region table", REGION_TABLES, tables)] {
            for (n, at) in places.into_iter().enumerate() {
                let Some(other) = copies[n].as_ref() else { continue };
                tally.wrong(format!("{what} {} is damaged", n + 1));
                if fix.corruptions() && self.replayed.as_ref().is_none_or(|file| !file.is_pending()) {
                    tally.repairing(format!("{what} {}", n + 1));
                    storage.flush().context("Could not flush")?;
                    storage.write_at(at, other).with_context(|| format!("Could not write the VHDX {what}"))?;
                    storage.flush().context("Could not flush")?;
                    tally.mended(1);
                }
            }
        }
        state.forget();
        let look = self.look_at_blocks(&mut state, &mut tally)?;
        let length = storage.len().context("Could not get the size of the file")?;
        let leaked = length.saturating_sub(look.end) / self.block;
        // Where a block is lost, what nothing names may be that block.
        if leaked > 0 && look.blocks && !look.lost && !storage.facts().fixed_len {
            tally.leaked(leaked, format!("{leaked} blocks behind the last one"));
            if fix.leaks() {
                storage.flush().context("Could not flush")?;
                storage.set_len(look.end, Preallocation::Off).context("Could not shorten the file")?;
                storage.flush().context("Could not flush")?;
                tally.gave_back();
            }
        }
        Ok(tally.report)
    }
}

/// For each of two copies that is damaged, the other one.
fn copies([first, second]: [Option<Vec<u8>>; 2]) -> [Option<Vec<u8>>; 2] {
    match (first, second) {
        (Some(first), None) => [None, Some(first)],
        (None, Some(second)) => [Some(second), None],
        _ => [None, None],
    }
}

impl VhdxDriver {
    /// Replays what is in the log, if that is allowed.
    fn settle_log(&self, state: &mut VhdxState, fix: Fix, tally: &mut Tally<'_>) -> Result<()> {
        if !state.headers.has_log() {
            return Ok(());
        }
        let Some(file) = self.replayed.as_ref().filter(|file| file.is_pending()) else {
            // Nothing in it has to be done.
            return if fix.is_asked_for() { state.headers.clear_log(self.storage()) } else { Ok(()) };
        };
        tally.wrong("the log holds changes that are not in their places");
        if fix.is_asked_for() {
            tally.repairing("the image by its log");
            file.settle().context("Could not replay the log")?;
            state.headers.clear_log(self.storage())?;
            tally.mended(1);
        }
        Ok(())
    }

    fn look_at_blocks(&self, state: &mut VhdxState, tally: &mut Tally<'_>) -> Result<VhdxLook> {
        let storage = self.storage();
        let length = storage.len().context("Could not get the size of the file")?;
        let mut look = VhdxLook::default();
        let (log, log_length) = state.headers.log();
        let mut tables = vec![(0, MIB), (log, log_length)];
        tables.extend(RegionTable::find(storage)?.all()?.iter().map(|region| (region.offset, region.length)));
        for (at, len) in &tables {
            let end = at.saturating_add(*len);
            if end > length {
                tally.wrong(format!("log or region at offset {at} lies past the end of the file"));
                look.lost = true;
            } else {
                look.end = look.end.max(end);
            }
        }
        self.each_block(state, storage, |block, found| {
            let (what, at, wanted, all) = match found {
                Found::Block(BlockState::Full(at), wanted) => (format!("block {block}"), at, wanted, self.block),
                Found::Block(BlockState::Partial(at), _) if self.parent.is_some() => {
                    (format!("block {block}"), at, self.block, self.block)
                }
                Found::Block(state, _) => {
                    let state = if let BlockState::Invalid(state) = state { state } else { 7 };
                    tally.wrong(format!("block {block} is in state {state}, which it cannot be in"));
                    look.lost = true;
                    return;
                }
                Found::Bitmap(at) => (format!("sector bitmap of block {block}"), at, MIB, MIB),
                Found::NoBitmap => {
                    tally.wrong(format!("sector bitmap of block {block} is missing"));
                    look.lost = true;
                    return;
                }
            };
            let at = at.saturating_mul(MIB);
            if at.saturating_add(wanted) > length {
                tally.wrong(format!("{what} at offset {at} lies past the end of the file"));
                look.lost = true;
            } else {
                look.end = look.end.max(at + all);
                look.blocks = true;
            }
        })?;
        for mut claims in Claims::windows(look.end) {
            for (at, len) in &tables {
                claims.claim(*at, *len);
            }
            self.each_block(state, storage, |block, found| {
                let (at, len) = match found {
                    Found::Block(BlockState::Full(at) | BlockState::Partial(at), _) => (at, self.block),
                    Found::Bitmap(at) => (at, MIB),
                    _ => return,
                };
                let at = at.saturating_mul(MIB);
                if at < look.end && !claims.claim(at, len) {
                    tally.wrong(format!("block {block} at offset {at} overlaps what else is there"));
                    look.lost = true;
                }
            })?;
        }
        Ok(look)
    }

    /// Gives `see` all that the BAT names, and what it says that cannot be.
    fn each_block(&self, state: &mut VhdxState, storage: &dyn Storage, mut see: impl FnMut(u64, Found)) -> Result<()> {
        let shape = state.shape();
        let (mut block, blocks, unit) = (0, shape.blocks(), state.unit());
        let mut bitmap = None;
        while block < blocks {
            if shape.has_parent && block.is_multiple_of(shape.chunk()) {
                bitmap = state.raw_bitmap(storage, block)?;
                if let Some(found) = bitmap {
                    see(block, found.map_or(Found::Block(BlockState::Invalid(7), 0), Found::Bitmap));
                }
            }
            let left =
                (blocks - block).min(if shape.has_parent { shape.chunk() - block % shape.chunk() } else { blocks });
            let (found, count) = state.run(storage, block, left)?;
            match found {
                BlockState::NotPresent | BlockState::Zero => {}
                BlockState::Full(first) => {
                    for n in 0..count {
                        let start = (block + n) * shape.block;
                        // What lies past the end of the disk need not be there.
                        let wanted = shape.block.min(shape.size - start);
                        see(block + n, Found::Block(BlockState::Full(first.saturating_add(n * unit)), wanted));
                    }
                }
                other => {
                    if matches!(other, BlockState::Partial(_)) && bitmap.is_none() && shape.has_parent {
                        see(block, Found::NoBitmap);
                    }
                    see(block, Found::Block(other, shape.block));
                }
            }
            block += count;
        }
        Ok(())
    }
}

/// What the BAT says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// Of a payload block, of which so many bytes have to be there.
    Block(BlockState, u64),
    /// Of a sector bitmap block: its mebibyte.
    Bitmap(u64),
    /// A partly present block without one.
    NoBitmap,
}
