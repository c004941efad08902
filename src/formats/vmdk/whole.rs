//! What has to hold of a sparse extent before anything is placed in it: all that its tables name lies in the file. New
//! grains go to the file's end, where entries of a file that was cut off point already.
//!
//! Directories and tables are walked once, front to back; tables in a hole of the file are not read.

use crate::block::error::Context;
use crate::block::{Error, FileEnd, Result};

use super::grain::longest;
use super::layout::*;
use super::sparse::Sparse;
use super::tables::{Grain, read_entries};

/// Tables that follow on each other in the file and are read at once.
const AT_ONCE: usize = 128;

/// Refuses, before the first change, an extent whose tables name what its file lacks; has new grains go behind
/// everything that is named.
pub fn check(sparse: &Sparse) -> Result<()> {
    let mut state = sparse.state();
    if state.whole {
        return Ok(());
    }
    let (shape, storage) = (sparse.shape, &*sparse.storage);
    let named = |error: Error| error.naming(&sparse.name);
    let end = storage.len().with_context(|| format!("{}: could not get the length", sparse.name))?;
    let (file, table_sectors) = (FileEnd::default(), shape.table_sectors());
    for directory in [Some(&state.gd), state.rgd.as_ref()].into_iter().flatten() {
        for table in directory.iter().filter(|table| **table != 0) {
            let at = Sectors::from(*table).bytes();
            file.require(storage, "a grain table", at, table_sectors.bytes()).map_err(named)?;
        }
    }
    // The tail of a stream is written over.
    let behind = state.stream.as_ref().map_or(Sectors::holding(end), |stream| stream.tail_at);
    let (mut index, mut newest) = (0, Sectors(0));
    let gtes = usize::try_from(shape.gtes).unwrap_or(usize::MAX).max(1);
    let row = usize::try_from(table_sectors.bytes() / 4).unwrap_or(usize::MAX).max(gtes);
    while index < state.gd.len() {
        let empty = state.empty_tables(sparse, index as u64, (state.gd.len() - index) as u64)?;
        if empty > 0 {
            index += usize::try_from(empty).unwrap_or(usize::MAX);
            continue;
        }
        let start = Sectors::from(state.gd[index]);
        let follows = |(n, table): (usize, &u32)| Sectors::from(*table) == start + table_sectors * n as u64;
        let count = state.gd[index..].iter().take(AT_ONCE).enumerate().take_while(|next| follows(*next)).count();
        let entries = read_entries(storage, &sparse.name, "a grain table", start.bytes(), (count * row) as u64)?;
        for (table, entries) in entries.chunks(row).enumerate() {
            let first = (index + table) as u64 * shape.gtes;
            for (grain, entry) in (first..).zip(entries.iter().take(gtes)).filter(|(_, entry)| **entry != 0) {
                let Grain::At(sector) = shape.grain_of(*entry) else { continue };
                // What lies past the end of the disk is nobody's.
                let used = state.capacity.bytes().saturating_sub(grain * shape.grain).min(shape.grain);
                let least = if shape.compressed { used.min(1) } else { used };
                if sector.bytes().saturating_add(least) > end {
                    return Err(named(Error::truncated("a grain", sector.bytes(), end)));
                }
                if used > 0 && sector >= behind {
                    return Err(named(Error::corrupt("grains lie behind the grain directory of the stream")));
                }
                newest = if used > 0 { newest.max(sector) } else { newest };
            }
        }
        index += count.max(1);
    }
    if newest != Sectors(0) {
        let len = match (shape.compressed, shape.markers) {
            (false, _) => shape.grain,
            (true, false) => SECTOR,
            (true, true) => {
                let marker: GrainMarker = read(storage, &sparse.name, "a grain marker", newest.bytes())?;
                let len = size_of::<GrainMarker>() as u64 + u64::from(marker.bytes.get()).min(longest(shape.grain));
                if newest.bytes().saturating_add(len) > end {
                    return Err(named(Error::truncated("a grain", newest.bytes(), end)));
                }
                len
            }
        };
        state.next = state.next.max(newest + Sectors::holding(len));
    }
    state.whole = true;
    Ok(())
}
