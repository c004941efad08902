//! Checks the block map of a VDI image, and mends it.
//!
//! Every entry has a block of its own, inside the file; the blocks in use are the first ones, and the header's counter
//! says how many they are. What the reference looks at is told in its words.
//!
//! Mended is what loses nothing: two guest blocks that share one of the file get one each, blocks behind the counter
//! move below it, the counter follows, what nothing names behind the last block is cut off. A block is copied before its
//! entry changes, and the counter is never below a block in use: a stop leaves at worst a block that nothing names.
//! Where an entry leads nowhere nothing is mended, because what belongs there is not known.

use super::VdiDriver;
use super::layout::{HEADER_BYTES, HostBlock, MapEntry};
use super::map::{VdiSpace, VdiState};
use crate::block::check::Tally;
use crate::block::error::Context;
use crate::block::io::move_stored;
use crate::block::{Check, CheckReport, Findings, Fix, GuestOffset, HostPlace, Result};
use crate::formats::one_file::Tables;
use crate::storage::Preallocation;

/// What a walk of the map came to.
#[derive(Debug, Default)]
struct VdiLook {
    /// Something leads nowhere.
    lost: bool,
    /// Guest blocks that have a block of the file.
    allocated: u64,
    /// Blocks of the file that are named.
    named: VdiSpace,
}

impl Check for VdiDriver {
    fn check(&self, fix: Fix, findings: &dyn Findings) -> Result<CheckReport> {
        let mut state = self.state();
        let mut tally = Tally::new(findings);
        let look = self.look(&mut state, &mut tally)?;
        if look.lost {
            return Ok(tally.report);
        }
        let mut top = look.named.top;
        if fix.corruptions() && tally.report.corruptions > 0 {
            tally.repairing("block map");
            top = look.allocated;
            self.mend_map(&mut state, look)?;
            tally.mended(tally.report.corruptions);
        }
        if fix.leaks() && tally.report.corruptions == 0 {
            self.cut(&state, top)?;
            tally.gave_back();
        }
        Ok(tally.report)
    }
}

impl VdiDriver {
    fn look(&self, state: &mut VdiState, tally: &mut Tally<'_>) -> Result<VdiLook> {
        let storage = self.storage();
        let mut look = VdiLook::default();
        let blocks = state.header.blocks();
        let (map, data) = (u64::from(state.header.map_offset()), u64::from(state.header.data_offset()));
        if map < HEADER_BYTES as u64 || state.map_end() > data {
            tally.wrong(format!("header, block map at {map} and blocks at {data} overlap"));
            look.lost = true;
        }
        let length = storage.len().context("Could not get the size of the file")?;
        if state.map_end() > length {
            tally.wrong(format!("block map at {map} lies past the end of the file at {length}"));
            look.lost = true;
            return Ok(look);
        }
        let mut block = 0;
        while block < u64::from(blocks) {
            let (first, count) = state.run(storage, block, u64::from(blocks) - block)?;
            if let MapEntry::At(first) = first {
                for (block, host) in (block..block + count).zip((first.0..).map(HostBlock)) {
                    let HostBlock(entry) = host;
                    if entry >= u64::from(blocks) {
                        tally.wrong(format!("block index {block} too large, is {entry}"));
                        look.lost = true;
                        continue;
                    }
                    look.allocated += 1;
                    if !look.named.mark(host) {
                        tally.wrong(format!("block index {entry} also used by {entry}"));
                    }
                    // What lies past the end of the disk need not be there.
                    let wanted = self.block.min(self.virtual_size().saturating_sub(block * self.block));
                    if (state.host(host) + wanted).get() > length {
                        tally.wrong(format!("block index {block} lies past the end of the file, is {entry}"));
                        look.lost = true;
                    }
                }
            }
            block += count;
        }
        let counter = u64::from(state.header.allocated());
        if counter != look.allocated {
            tally.wrong(format!("allocated blocks mismatch, is {}, should be {counter}", look.allocated));
        } else if look.named.top > counter && !look.lost {
            let last = look.named.top - 1;
            tally.wrong(format!("block index {last} in use, allocated blocks are {counter}"));
        }
        let there = length.saturating_sub(data) / self.block;
        let leaked = there.saturating_sub(look.named.top.max(counter));
        // Where something is lost, what nothing names may be that.
        if leaked > 0 && !look.lost && !storage.facts().fixed_len {
            tally.leaked(leaked, format!("{leaked} blocks at the end of the file"));
        }
        Ok(look)
    }

    /// Gives every guest block one of its own among the first ones.
    fn mend_map(&self, state: &mut VdiState, look: VdiLook) -> Result<()> {
        let storage = self.storage();
        let VdiLook { allocated, mut named, .. } = look;
        let (mut seen, mut free) = (VdiSpace::default(), HostBlock(0));
        if u64::from(state.header.allocated()) < allocated {
            state.write_counter(storage, allocated)?;
        }
        let (mut block, blocks) = (0, u64::from(state.header.blocks()));
        while block < blocks {
            let (first, count) = state.run(storage, block, blocks - block)?;
            if let MapEntry::At(first) = first {
                for (block, host) in (block..block + count).zip((first.0..).map(HostBlock)) {
                    let own = seen.mark(host);
                    if own && host < HostBlock(allocated) {
                        continue;
                    }
                    free = named.free_from(free);
                    named.mark(free);
                    self.move_block(state, block, host, free)?;
                }
            }
            block += count;
        }
        state.write_counter(storage, allocated)
    }

    /// Copies a guest block to another place in the file, where nothing is, and names the copy.
    fn move_block(&self, state: &mut VdiState, block: u64, from: HostBlock, to: HostBlock) -> Result<()> {
        let storage = self.storage();
        let (from, target) = (state.host(from), state.host(to));
        let end = (target + self.block).get();
        if !storage.facts().fixed_len && storage.len().context("Could not get the size of the file")? < end {
            storage.set_len(end, Preallocation::Off).context("Could not extend the file")?;
        }
        let guest = GuestOffset(block * self.block);
        move_stored(self, HostPlace { file: 0, at: from }, HostPlace { file: 0, at: target }, guest, self.block)
            .context("Could not move a block")?;
        state.set(storage, block, MapEntry::At(to))?;
        state.write_tables(storage)
    }

    /// Cuts off what lies behind the first `top` blocks.
    fn cut(&self, state: &VdiState, top: u64) -> Result<()> {
        let storage = self.storage();
        let end = state.host(HostBlock(top)).get();
        if !storage.facts().fixed_len && storage.len().context("Could not get the size of the file")? > end {
            storage.flush().context("Could not flush")?;
            storage.set_len(end, Preallocation::Off).context("Could not shorten the file")?;
        }
        storage.flush().context("Could not flush")
    }
}
