//! How large the files of a vmdk become, all together.
//!
//! What the descriptor beside its extents takes depends on their names: it is counted with the longest ones, and is the
//! only part of an image without compression that is not exact. A compressed grain is counted with the most that it may
//! take.

use super::Vmdk;
use super::create::{SPLIT, SparseLayout, Subformat, decide_size, subformat, tables};
use super::grain;
use super::layout::{GRAIN_SECTORS, GT_SECTORS, GrainMarker, HOSTED_GTES, SECTOR, Sectors};
use crate::block::Result;
use crate::block::measure::{Measure, MeasureRequest, Measured};

/// Bytes of a descriptor without the lines of its extents: its own lines, and room for what the options put there.
const DESCRIPTOR: u64 = 4096;
/// The longest line of an extent: the longest name, numbers and words.
const EXTENT_LINE: u64 = 255 + 64;

impl Measure for Vmdk {
    fn measure(&self, request: &MeasureRequest<'_>) -> Result<Measured> {
        let subformat = subformat(request.options)?;
        let size = decide_size(&subformat, request.size)?;
        let stored = request.stored;
        let Subformat { split, flat, compressed, .. } = subformat;
        let extents: Vec<u64> = match split {
            true => (0..size.div_ceil(SPLIT)).map(|n| SPLIT.min(size - n * SPLIT)).collect(),
            false => vec![size],
        };
        let descriptor = if split || flat { DESCRIPTOR + extents.len() as u64 * EXTENT_LINE } else { 0 };
        let grain = GRAIN_SECTORS.bytes();
        let (required, fully_allocated) = if flat {
            // An empty one has its first sector.
            let bytes: u64 = extents.iter().map(|size| (*size).max(SECTOR)).sum();
            (bytes, bytes)
        } else if compressed {
            let unit = (size_of::<GrainMarker>() as u64 + grain::longest(grain)).next_multiple_of(SECTOR);
            let span = grain * u64::from(HOSTED_GTES);
            let directory = (4 * tables(size)).next_multiple_of(SECTOR);
            // Header and descriptor; then directory, footer, their markers and the last one.
            let fixed = grain + directory + 4 * SECTOR;
            let bytes = |grains: u64, tables: u64| fixed + grains * unit + tables * (Sectors(1) + GT_SECTORS).bytes();
            (bytes(stored(grain)?, stored(span)?), bytes(size.div_ceil(grain), size.div_ceil(span)))
        } else {
            let overhead: u64 = extents.iter().map(|size| SparseLayout::overhead(*size).bytes()).sum();
            (overhead + stored(grain)? * grain, overhead + size.div_ceil(grain) * grain)
        };
        let (required, fully_allocated) = (descriptor + required, descriptor + fully_allocated);
        Ok(Measured { required, fully_allocated, bitmaps: None })
    }
}
