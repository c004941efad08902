//! Laying out L2 tables and data clusters of a new image ahead of any write (`preallocation=`).
//!
//! One pass in guest order: each L2 table is written once, as a whole, when its clusters are known.

use std::sync::Arc;

use crate::block::error::Context;
use crate::block::{Error, HostOffset, Result};
use crate::storage::{Preallocation, Storage};

use super::entry::L2Entry;
use super::geometry::{ClusterIndex, Geometry};
use super::plan::Planner;

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Widths and sizes.
    pub geometry: Geometry,
    /// Virtual size in bytes.
    pub size: u64,
    /// Whether data goes to an external data file, at its guest offset.
    pub data_file: bool,
    /// The mode; not `Off`.
    pub fill: Preallocation,
}

/// The reference asks for data clusters in pieces of at most that many bytes, rounded down to clusters.
pub const PIECE: u64 = i32::MAX as u64;

/// Lays out everything. `file` is the image; what was planned before must have been written by the caller if it
/// lies beyond the file's end.
pub fn preallocate(planner: &mut Planner, file: &Arc<dyn Storage>, layout: &Layout) -> Result<()> {
    let geometry = layout.geometry;
    let clusters = layout.size.div_ceil(geometry.cluster_size());
    let tables = geometry.l1_entries_for(layout.size);
    let area = match layout.fill {
        Preallocation::Falloc | Preallocation::Full if !layout.data_file => {
            let extra = clusters.checked_add(tables).ok_or_else(|| Error::invalid("Image size is too large"))?;
            let first = planner.reserve_area(planner.plan.end(), extra)?;
            planner.take(first, clusters)?;
            planner.plan.out().finish()?;
            let start = geometry.offset_of(first);
            let end = geometry.offset_of(first + clusters);
            // What lies before the area is written first, so that the area is all that grows.
            file.set_len(start, Preallocation::Off).context("Could not resize file")?;
            file.set_len(end, layout.fill).context("Could not resize image: Failed to resize underlying file")?;
            Some(first)
        }
        _ => None,
    };
    let mut data_end = ClusterIndex(0);
    for table in 0..tables {
        let first = table * geometry.l2_entries();
        let count = geometry.l2_entries().min(clusters - first);
        let at = planner.allocate(1)?;
        let mut l2 = vec![0; usize::try_from(geometry.cluster_size()).unwrap_or(0)];
        let mut entries = l2.chunks_exact_mut(geometry.l2_entry() as usize);
        let mut done = 0;
        while done < count {
            let (host, n) = match area {
                // There a cluster is where the guest has it.
                _ if layout.data_file => (ClusterIndex(first + done), count - done),
                Some(start) => (start + first + done, count - done),
                None => {
                    let n = (count - done).min(PIECE >> geometry.cluster_bits);
                    (planner.allocate(n)?, n)
                }
            };
            for (cluster, entry) in host.run(n).zip(&mut entries) {
                // A subcluster bitmap stays zero: there is room, but nothing is allocated.
                entry[..8].copy_from_slice(&L2Entry::own(HostOffset(geometry.offset_of(cluster))).0.to_be_bytes());
            }
            done += n;
            data_end = host + n;
        }
        planner.plan.out().put(geometry.offset_of(at), &l2)?;
        planner.l1.push(at);
    }
    planner.plan.out().finish()?;
    let end = geometry.offset_of(data_end).saturating_sub(geometry.behind_last_subcluster(layout.size));
    if !layout.data_file && file.len().context("Could not get file size")? < end {
        file.set_len(end, Preallocation::Off).context("Could not resize file")?;
    }
    Ok(())
}
