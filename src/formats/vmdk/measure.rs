//! How large the files of a vmdk become, all together.
//!
//! What the descriptor beside its extents takes depends on their names and the content id, which nobody knows yet: it is
//! counted with the longest ones, and is the only part of an image without compression that is not exact. A compressed
//! grain is counted with the most that it may take.

use super::Vmdk;
use super::create::{SPLIT, SparseLayout, Subformat, Words, decide_size, extent_line, subformat, tables};
use super::descriptor::NewDescriptor;
use super::grain;
use super::layout::{GRAIN_SECTORS, GT_SECTORS, GrainMarker, HOSTED_GTES, SECTOR, Sectors};
use crate::block::Result;
use crate::block::measure::{Measure, MeasureRequest, Measured};

/// The longest name of a file.
const LONGEST_NAME: usize = 255;

/// Bytes of the descriptor of such extents, with the longest names.
fn descriptor_bytes(request: &MeasureRequest<'_>, subformat: &Subformat, size: u64, extents: &[u64]) -> Result<u64> {
    let Words { adapter, hardware, tools } = Words::of(request.options)?;
    let name = "n".repeat(LONGEST_NAME);
    let line = |size: &u64| {
        let (start, end) = extent_line(subformat, *size);
        start + &name + end
    };
    let lines: String = extents.iter().map(line).collect();
    let text = NewDescriptor {
        cid: u32::MAX,
        parent_cid: u32::MAX,
        create_type: subformat.name,
        parent: request.options.name("backing_file").filter(|name| !name.is_empty()),
        extents: lines.as_bytes(),
        hardware,
        size,
        adapter,
        tools,
    };
    Ok(text.text().len() as u64)
}

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
        let beside = split || flat;
        let descriptor = if beside { descriptor_bytes(request, &subformat, size, &extents)? } else { 0 };
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
