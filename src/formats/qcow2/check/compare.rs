//! The refcounts, block by block, against what was counted.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use crate::block::{Result, number};

use super::super::geometry::ClusterIndex;
use super::super::layout;
use super::super::layout::REFCOUNT_OFFSET_MASK;
use super::super::refcount;
use super::super::references::References;
use super::Checker;

/// What is done about a refcount that is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settling {
    /// It is told.
    Tell,
    /// It is put right if it is too high or, if `corruptions` are mended too, too low; otherwise told.
    Mend { corruptions: bool },
}

/// Where the refcounts of a block are.
enum BlockPlace {
    /// There is no block: they are all 0.
    Nowhere,
    /// There.
    At(u64),
    /// Nowhere that can be read: in no cluster, or past all that a file can have.
    Misplaced(u64),
}

/// The refcount table, and the blocks that were read.
pub(super) struct Refcounts {
    table: Vec<u8>,
    /// `None` for one that cannot be read.
    blocks: Vec<Option<Vec<u8>>>,
    /// Where in `blocks` one is, by its index.
    slots: HashMap<u64, usize>,
    /// The one that was looked at last: its index, and where it is.
    last: Option<(u64, usize)>,
    held: u64,
}

/// What a window of refcount blocks holds at most, in bytes.
const WINDOW: u64 = 16 << 20;

/// Runs of clusters that are given back to the host at most.
const MOST_FREED: usize = 1 << 20;

impl Checker<'_> {
    pub(super) fn refcounts(&self) -> Result<Refcounts> {
        let place = self.driver.refcount_table();
        let mut table = Vec::new();
        self.read(place.at, place.len, &mut table)?;
        Ok(Refcounts { table, blocks: Vec::new(), slots: HashMap::new(), last: None, held: 0 })
    }

    fn block_place(&self, refcounts: &Refcounts, index: u64) -> BlockPlace {
        let word = usize::try_from(index).ok().and_then(|index| layout::word(&refcounts.table, index.checked_mul(8)?));
        match word.unwrap_or(0) & REFCOUNT_OFFSET_MASK {
            0 => BlockPlace::Nowhere,
            at if !self.geometry.places(at, self.geometry.cluster_size()) => BlockPlace::Misplaced(at),
            at => BlockPlace::At(at),
        }
    }

    /// A cluster's refcount; `None` if its block cannot be read.
    pub(super) fn refcount_of(&mut self, refcounts: &mut Refcounts, cluster: ClusterIndex) -> Result<Option<u64>> {
        let (index, at) = self.geometry.refcount_of(cluster);
        let slot = match refcounts.last {
            Some((last, slot)) if last == index => slot,
            _ => self.block_slot(refcounts, index)?,
        };
        refcounts.last = Some((index, slot));
        let block = refcounts.blocks.get(slot).and_then(Option::as_ref);
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        Ok(block.map(|block| refcount::get(self.geometry.refcount_order, block, at)))
    }

    fn block_slot(&mut self, refcounts: &mut Refcounts, index: u64) -> Result<usize> {
        if let Some(slot) = refcounts.slots.get(&index) {
            return Ok(*slot);
        }
        let block = match self.block_place(refcounts, index) {
            BlockPlace::Nowhere => Some(Vec::new()),
            BlockPlace::Misplaced(at) => {
                self.misplaced(at, index);
                None
            }
            BlockPlace::At(at) => {
                let mut block = Vec::new();
                self.read(at, self.geometry.cluster_size(), &mut block)?;
                Some(block)
            }
        };
        let len = block.as_ref().map_or(0, |block| block.len() as u64) + 64;
        if refcounts.held + len > WINDOW {
            refcounts.blocks.clear();
            refcounts.slots.clear();
            refcounts.held = 0;
        }
        refcounts.held += len;
        refcounts.blocks.push(block);
        refcounts.slots.insert(index, refcounts.blocks.len() - 1);
        Ok(refcounts.blocks.len() - 1)
    }

    /// Compares all of them.
    pub(super) fn compare(&mut self, references: &References, settling: Settling) -> Result<()> {
        let refcounts = self.refcounts()?;
        let (order, per_block) = (self.geometry.refcount_order, self.geometry.refcounts_per_block());
        let clusters = self.clusters_in_use(references);
        let (mut block, mut counts) = (Vec::new(), Vec::new());
        let mut highest = ClusterIndex(0);
        let mut first = ClusterIndex(0);
        while first < clusters {
            let end = clusters.min(first + per_block);
            let (index, _) = self.geometry.refcount_of(first);
            let place = self.block_place(&refcounts, index);
            match place {
                BlockPlace::Misplaced(at) => {
                    self.unreadable(first, end, at, index);
                    first = end;
                    continue;
                }
                BlockPlace::Nowhere => block.clear(),
                BlockPlace::At(at) => self.read(at, self.geometry.cluster_size(), &mut block)?,
            }
            counts.clear();
            counts.resize(usize::try_from(end.since(first)).unwrap_or(0), 0u32);
            for (cluster, count) in references.range(first, end) {
                if let Some(slot) = usize::try_from(cluster.since(first)).ok().and_then(|at| counts.get_mut(at)) {
                    *slot = count;
                }
            }
            let mut changed: Option<(usize, usize)> = None;
            for (at, should) in counts.iter().enumerate() {
                let (is, should) = (refcount::get(order, &block, at), u64::from(*should));
                if is > 0 || should > 0 {
                    highest = first + at as u64;
                }
                self.unusable |= should > 0 && block.is_empty();
                if is != should && self.settle(highest, is, should, settling) && !block.is_empty() {
                    refcount::set(order, &mut block, at, should);
                    let byte = (at << order) / 8;
                    changed = Some((changed.map_or(byte, |(from, _)| from), byte + 8));
                }
            }
            if let (Some((from, to)), BlockPlace::At(at)) = (changed, place) {
                // Whole sectors, for those are written or not.
                let (from, to) = (from / 512 * 512, to.next_multiple_of(512).min(block.len()));
                let part = block.get(from..to).unwrap_or(&[]);
                self.driver.file().write_metadata("refcount block", at + from as u64, part)?;
            }
            first = end;
        }
        self.report.image_end = self.geometry.offset_of(highest + 1);
        Ok(())
    }

    /// Tells of a refcount that is wrong, and whether it is put right.
    fn settle(&mut self, cluster: ClusterIndex, is: u64, should: u64, settling: Settling) -> bool {
        let leak = is > should;
        let mend = match settling {
            Settling::Tell => false,
            Settling::Mend { corruptions } => leak || corruptions,
        };
        self.rebuild |= is == 0;
        let report = &mut self.report;
        let (count, word) = match (leak, mend) {
            (true, true) => (&mut report.leaks_fixed, "Repairing"),
            (false, true) => (&mut report.corruptions_fixed, "Repairing"),
            (true, false) => (&mut report.leaks, "Leaked"),
            (false, false) => (&mut report.corruptions, "ERROR"),
        };
        *count += 1;
        if leak && mend && should == 0 {
            let has_room = self.freed.len() < MOST_FREED;
            match self.freed.last_mut() {
                Some((first, n)) if *first + *n == cluster => *n += 1,
                _ if has_room => self.freed.push((cluster, 1)),
                _ => {}
            }
        }
        self.tell(&format!("{word} cluster {cluster} refcount={is} reference={should}"));
        mend
    }

    /// Tells, the first time, of a block that is in no cluster.
    fn misplaced(&mut self, at: u64, index: u64) {
        let aligned = self.geometry.in_cluster(at) == 0;
        if !aligned && !self.driver.told_corrupt.swap(true, Ordering::Relaxed) {
            let what = format!("Refblock offset {at:#x} unaligned (reftable index: {})", number::prefixed(index));
            if self.fix.is_asked_for() {
                self.mark_corrupt(&what);
            } else {
                self.tell(&format!(
                    "qcow2: Image is corrupt: {what}; further non-fatal corruption events will be suppressed"
                ));
            }
        }
    }

    fn unreadable(&mut self, first: ClusterIndex, end: ClusterIndex, at: u64, index: u64) {
        self.misplaced(at, index);
        for cluster in first.run(end.since(first)) {
            self.report.check_errors += 1;
            self.tell(&format!("Can't get refcount for cluster {cluster}: Input/output error"));
        }
    }
}
