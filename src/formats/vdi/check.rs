//! Checks the block map of a VDI image.
//!
//! Every entry has a block of its own, inside the file; the header's counter says how many there are. What the
//! reference looks at is told in its words.

use super::VdiDriver;
use super::layout::{DISCARDED, HEADER_BYTES};
use crate::block::error::Context;
use crate::block::{Check, CheckReport, Findings, Fix, Result};

/// Which blocks of the file are named by the map, a bit each: at most as many as the map has entries.
#[derive(Debug, Default)]
struct NamedBlocks(Vec<u64>);

impl NamedBlocks {
    /// Marks one; false if it was marked before.
    fn mark(&mut self, index: u32) -> bool {
        let (word, bit) = (index as usize / 64, 1 << (index % 64));
        if word >= self.0.len() {
            self.0.resize(word + 1, 0);
        }
        let new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        new
    }
}

impl Check for VdiDriver {
    fn mends(&self) -> bool {
        false
    }

    fn check(&self, _fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let storage = self.storage();
        let mut state = self.state();
        let mut report = CheckReport::default();
        let mut wrong = |text: String| {
            findings.line(&format!("ERROR: {text}"));
            report.corruptions += 1;
        };
        let blocks = state.header.blocks();
        let (map, data) = (u64::from(state.header.map_offset()), u64::from(state.header.data_offset()));
        if map < HEADER_BYTES as u64 || map + u64::from(blocks) * 4 > data {
            wrong(format!("header, block map at {map} and blocks at {data} overlap"));
        }
        let length = storage.len().context("Could not get the size of the file")?;
        if state.map_end() > length {
            wrong(format!("block map at {map} lies past the end of the file at {length}"));
            return Ok(report);
        }
        let mut named = NamedBlocks::default();
        let (mut block, mut allocated) = (0u64, 0u64);
        while block < u64::from(blocks) {
            let (first, count) = state.run(storage, block, u64::from(blocks) - block)?;
            if first < DISCARDED {
                for (block, entry) in (block..block + count).zip(first..) {
                    if entry >= blocks {
                        wrong(format!("block index {block} too large, is {entry}"));
                        continue;
                    }
                    allocated += 1;
                    if !named.mark(entry) {
                        wrong(format!("block index {entry} also used by {entry}"));
                    }
                    let wanted = self.block.min(self.virtual_size().saturating_sub(block * self.block));
                    let end = state.host(entry) + wanted;
                    if end > length.next_multiple_of(512) {
                        wrong(format!("block index {block} lies past the end of the file at {length}, is {entry}"));
                    }
                }
            }
            block += count;
        }
        let counter = state.header.allocated();
        if u64::from(counter) != allocated {
            wrong(format!("allocated blocks mismatch, is {allocated}, should be {counter}"));
        }
        Ok(report)
    }
}
