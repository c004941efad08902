//! What has to hold of a sparse extent before its length is changed: nothing lies over anything else, and nothing past
//! the end of the file, where new tables are going to be. One damaged number in a header is enough for a resize to
//! write over guest data, or to show it where there was none.

use crate::block::error::Context;
use crate::block::{Error, Result};
use crate::formats::runs::{Runs, overlaps};

use super::grain::{read_whole, short_last};
use super::layout::*;
use super::sparse::Sparse;
use super::stream::directory_marker;
use super::tables::Grain;

/// Compressed grains whose markers are compared with their places.
const MARKERS: usize = 1024;

/// Refuses an extent in whose file something overlaps. `text` is where the descriptor lies in the same file, and its
/// length, in bytes.
pub fn check(sparse: &Sparse, text: Option<(u64, u64)>) -> Result<()> {
    let refused = |what: &str| Error::corrupt(format!("{}: {what}; a resize could destroy data", sparse.name));
    let failed = || format!("{}: could not get the length", sparse.name);
    let file_end = Sectors::holding(sparse.storage.len().with_context(failed)?);
    let mut state = sparse.state();
    let Some(header) = state.header else { return Ok(()) };
    let (gd_at, rgd_at) = (header.gd_at.get(), header.rgd_at.get());
    if gd_at == GD_AT_END {
        return Err(refused("the grain directory is at the end of the file, and no grain is compressed"));
    }
    let compressed = sparse.shape.compressed;
    if compressed != header.has(FLAG_COMPRESSED) || compressed != header.has(FLAG_MARKERS) {
        return Err(refused("its header contradicts itself on compression"));
    }
    let mut metadata = Runs::default();
    metadata.add(0, SECTOR);
    if let Some((at, len)) = text {
        metadata.add(at, len);
    }
    let gd_sectors = Sectors::holding(state.gd.len() as u64 * 4);
    match &state.stream {
        Some(stream) => {
            // Two markers, the directory and the footer between them, and the end of the stream.
            let tail = gd_sectors + Sectors(4);
            let told = directory_marker(&*sparse.storage, &sparse.name, gd_at)?;
            if told != Some(gd_sectors) || stream.tail_at + tail != file_end || state.rgd.is_some() {
                return Err(refused("the grain directory is not where that of a stream is"));
            }
            metadata.add(stream.tail_at.bytes(), tail.bytes());
        }
        None if compressed && has_footer(sparse, file_end)? => {
            return Err(refused("it has a footer, and the header does not say so"));
        }
        None => metadata.add(gd_at.bytes(), gd_sectors.bytes()),
    }
    if let Some(rgd) = &state.rgd {
        metadata.add(rgd_at.bytes(), gd_sectors.bytes());
        if state.gd.iter().zip(rgd).any(|(a, b)| (*a == 0) != (*b == 0)) {
            return Err(refused("the two grain directories do not agree"));
        }
    }
    for directory in [Some(&state.gd), state.rgd.as_ref()].into_iter().flatten() {
        for table in directory.iter().filter(|table| **table != 0) {
            metadata.add(Sectors::from(*table).bytes(), sparse.shape.table_sectors().bytes());
        }
    }
    let metadata = metadata.disjoint().ok_or_else(|| refused("its header, descriptor and grain tables overlap"))?;
    if metadata.last().is_some_and(|(_, end)| *end > file_end.bytes()) {
        return Err(refused("grain tables lie past the end of the file"));
    }
    let (mut grains, mut grain, mut looked_at, mut newest) = (Runs::default(), 0, 0, None);
    let (last, gtes) = (state.gd.len() as u64 * sparse.shape.gtes, sparse.shape.gtes);
    while grain < last {
        if grain.is_multiple_of(gtes) {
            let empty = state.empty_tables(sparse, grain / gtes, (last - grain) / gtes)?;
            if empty > 0 {
                grain += empty * gtes;
                continue;
            }
        }
        if let Grain::At(sector) = state.grain(sparse, grain)? {
            // To read how long each compressed grain is would be to read the whole file; their starts tell enough.
            let len = if compressed { SECTOR } else { sparse.shape.grain };
            grains.add(sector.bytes(), len);
            newest = Some((grain, sector));
            if compressed && looked_at < MARKERS {
                looked_at += 1;
                let marker: GrainMarker = read(&*sparse.storage, &sparse.name, "a grain marker", sector.bytes())?;
                if marker.sector.get() != sparse.shape.grain_sectors() * grain {
                    return Err(refused("grains are not what their markers say"));
                }
            }
        }
        grain += 1;
    }
    // A grain that is not whole is known to be the last one by the capacity alone.
    if let Some((grain, sector)) =
        newest.filter(|(grain, _)| compressed && *grain != state.capacity.bytes() / sparse.shape.grain)
        && read_whole(sparse, sector)?.1 < sparse.shape.grain
    {
        return Err(refused(&format!("grain {grain} is stored as if the disk ended in it")));
    }
    if state.stream.is_some() && short_last(sparse, &mut state, header.capacity.get().bytes())?.is_some() {
        return Err(Error::unsupported("The last grain is stored as far as the disk goes alone; convert the image"));
    }
    let end = state.next.bytes();
    drop(state);
    let grains = match compressed {
        true => grains.merged(),
        false => grains.disjoint().ok_or_else(|| refused("grains overlap"))?,
    };
    if grains.iter().any(|run| overlaps(&metadata, *run)) {
        return Err(refused("grains lie in its header, descriptor or grain tables"));
    }
    match grains.last() {
        Some((_, last)) if *last > end => Err(refused("grains lie past the end of the file")),
        _ => Ok(()),
    }
}

/// Whether the file ends as a stream does.
fn has_footer(sparse: &Sparse, file_end: Sectors) -> Result<bool> {
    let Some(at) = file_end.before().and_then(Sectors::before) else { return Ok(false) };
    let footer: SparseHeader = read(&*sparse.storage, &sparse.name, "the footer", at.bytes())?;
    Ok(footer.magic == *MAGIC)
}
