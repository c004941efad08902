//! Holes of the host under clusters that the tables call data: what `preallocation=metadata` leaves.
//!
//! To ask the host about every cluster costs more than it gains in an image that was filled by writing. So it is asked
//! where the file takes a tenth, and two clusters, less space than the clusters that have a refcount: the reference's
//! measure, found by trying. Only in an image that is not written to, and whose clusters lie in the image file as the guest wrote them.

use crate::block::{Extent, ExtentKind, GuestOffset, Result, StoredWord};

use super::Qcow2Driver;
use super::refcount;

impl Qcow2Driver {
    /// The run at `at`, as tables and host say.
    pub(super) fn extent_on_host(&self, at: GuestOffset, max: u64) -> Result<Extent> {
        let extent = self.map(at, max)?;
        match extent.kind {
            ExtentKind::Data(place) if self.has_host_holes() => self.file().stored_extent(at, place, extent.len),
            _ => Ok(extent),
        }
    }

    /// Whether zeros at `at` are data by the tables.
    pub(super) fn word_on_host(&self, at: GuestOffset) -> Result<StoredWord> {
        let data = self.has_host_holes() && matches!(self.map(at, 1)?.kind, ExtentKind::Data(_));
        Ok(if data { StoredWord::Both } else { StoredWord::Layer })
    }

    fn has_host_holes(&self) -> bool {
        // What cannot be found out is as if there were none: whoever reads what is wrong will say so.
        *self.host_holes.get_or_init(|| {
            !self.write && !self.external && !self.encrypted && self.find_host_holes().unwrap_or_default()
        })
    }

    fn find_host_holes(&self) -> Result<bool> {
        let file = &self.file().storage;
        let (Some(allocated), length) = (file.allocated()?, file.len()?) else { return Ok(false) };
        let cluster = self.geometry.cluster_size();
        let there = allocated / cluster;
        let enough = (there.saturating_mul(10) / 9).max(there.saturating_add(2));
        if length.div_ceil(cluster) < enough {
            return Ok(false);
        }
        let (table, per_block) = (self.refcount_table(), self.geometry.refcounts_per_block());
        let order = self.geometry.refcount_order;
        let mut used = 0u64;
        for index in 0..table.len / super::layout::ENTRY {
            if used >= enough {
                break;
            }
            let Some(block) = self.block_of(index)? else { continue };
            let mut from = 0;
            while from < block.len {
                let (bytes, found) = self.tables.view(block, from, |bytes| {
                    let counts = ((bytes.len() as u64 * 8) >> order).min(per_block);
                    let counts = usize::try_from(counts).unwrap_or(usize::MAX);
                    let used = (0..counts).filter(|n| refcount::get(order, bytes, *n) != 0).count();
                    (bytes.len() as u64, used as u64)
                })?;
                from = from.saturating_add(bytes.max(1));
                used = used.saturating_add(found);
            }
        }
        Ok(used >= enough)
    }
}
