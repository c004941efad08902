//! What has to hold of a sparse extent before its length is changed: nothing lies over anything else, and nothing past
//! the end of the file, where new tables are going to be. One damaged number in a header is enough for a resize to
//! write over guest data, or to show it where there was none.

use crate::block::error::Context;
use crate::block::{Error, Result};

use super::grain::{read_whole, short_last};
use super::layout::*;
use super::sparse::Sparse;
use super::stream::directory_marker;
use super::tables::Grain;

/// Compressed grains whose markers are compared with their places.
const MARKERS: usize = 1024;

/// A run of sectors in the file: where it starts and where it ends.
type Run = (u64, u64);

/// Refuses an extent in whose file something overlaps. `text` is where the descriptor lies in the same file, and its
/// length, in bytes.
pub fn check(sparse: &Sparse, text: Option<(u64, u64)>) -> Result<()> {
    let refused = |what: &str| Error::corrupt(format!("{}: {what}; a resize could destroy data", sparse.name));
    let failed = || format!("{}: could not get the length", sparse.name);
    let file_end = sparse.storage.len().with_context(failed)?.div_ceil(SECTOR);
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
    metadata.add(0, 1);
    if let Some((at, len)) = text {
        metadata.add(at / SECTOR, len.div_ceil(SECTOR));
    }
    let gd_sectors = (state.gd.len() as u64 * 4).div_ceil(SECTOR);
    match &state.stream {
        Some(stream) => {
            // Two markers, the directory and the footer between them, and the end of the stream.
            let tail = 1 + gd_sectors + 3;
            let told = directory_marker(&*sparse.storage, gd_at)?;
            if told != Some(gd_sectors) || stream.tail_at.checked_add(tail) != Some(file_end) || state.rgd.is_some() {
                return Err(refused("the grain directory is not where that of a stream is"));
            }
            metadata.add(stream.tail_at, tail);
        }
        None if compressed && has_footer(sparse, file_end)? => {
            return Err(refused("it has a footer, and the header does not say so"));
        }
        None => metadata.add(gd_at, gd_sectors),
    }
    if let Some(rgd) = &state.rgd {
        metadata.add(rgd_at, gd_sectors);
        if state.gd.iter().zip(rgd).any(|(a, b)| (*a == 0) != (*b == 0)) {
            return Err(refused("the two grain directories do not agree"));
        }
    }
    for directory in [Some(&state.gd), state.rgd.as_ref()].into_iter().flatten() {
        for table in directory.iter().filter(|table| **table != 0) {
            metadata.add((*table).into(), sparse.shape.table_sectors());
        }
    }
    let metadata = metadata.sorted().ok_or_else(|| refused("its header, descriptor and grain tables overlap"))?;
    if metadata.last().is_some_and(|(_, end)| *end > file_end) {
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
            let len = if compressed { 1 } else { sparse.shape.grain_sectors() };
            grains.add(sector, len);
            newest = Some((grain, sector));
            if compressed && looked_at < MARKERS {
                looked_at += 1;
                let failed = || format!("{}: could not read a grain marker", sparse.name);
                let marker: GrainMarker = read(&*sparse.storage, sector * SECTOR).with_context(failed)?;
                if marker.sector.get() != grain * sparse.shape.grain_sectors() {
                    return Err(refused("grains are not what their markers say"));
                }
            }
        }
        grain += 1;
    }
    // A grain that is not whole is known to be the last one by the capacity alone.
    if let Some((grain, sector)) =
        newest.filter(|(grain, _)| compressed && *grain != state.capacity * SECTOR / sparse.shape.grain)
        && read_whole(sparse, sector)?.1 < sparse.shape.grain
    {
        return Err(refused(&format!("grain {grain} is stored as if the disk ended in it")));
    }
    if state.stream.is_some() && short_last(sparse, &mut state, header.capacity.get() * SECTOR)?.is_some() {
        return Err(Error::unsupported("The last grain is stored as far as the disk goes alone; convert the image"));
    }
    let end = state.next;
    drop(state);
    let grains = match compressed {
        true => grains.merged(),
        false => grains.sorted().ok_or_else(|| refused("grains overlap"))?,
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
fn has_footer(sparse: &Sparse, file_end: u64) -> Result<bool> {
    let Some(at) = file_end.checked_sub(2) else { return Ok(false) };
    let footer: SparseHeader = read(&*sparse.storage, at * SECTOR).context("Could not read the footer")?;
    Ok(footer.magic == *MAGIC)
}

/// Runs as they come; those that follow on each other are one.
#[derive(Debug, Default)]
struct Runs(Vec<Run>);

impl Runs {
    fn add(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len);
        match self.0.last_mut() {
            _ if len == 0 => {}
            Some((_, last)) if *last == start => *last = end,
            _ => self.0.push((start, end)),
        }
    }

    /// In the order of the file; `None` if two overlap.
    fn sorted(mut self) -> Option<Vec<Run>> {
        self.0.sort_unstable();
        let disjoint = self.0.windows(2).all(|pair| matches!(pair, [(_, end), (next, _)] if end <= next));
        disjoint.then_some(self.0)
    }

    /// In the order of the file, overlapping or not.
    fn merged(mut self) -> Vec<Run> {
        self.0.sort_unstable();
        self.0.dedup_by(|next, run| {
            let joined = next.0 <= run.1;
            if joined {
                run.1 = run.1.max(next.1);
            }
            joined
        });
        self.0
    }
}

/// Whether a run touches one of those, which are disjoint and in order.
fn overlaps(runs: &[Run], (start, end): Run) -> bool {
    let index = runs.partition_point(|(_, other_end)| *other_end <= start);
    runs.get(index).is_some_and(|(other_start, _)| *other_start < end)
}

#[cfg(test)]
mod tests {
    use super::{Runs, overlaps};

    fn runs(list: &[(u64, u64)]) -> Runs {
        let mut runs = Runs::default();
        for (start, len) in list {
            runs.add(*start, *len);
        }
        runs
    }

    #[test]
    fn runs_that_overlap_are_found() {
        assert_eq!(runs(&[(5, 2), (7, 3), (0, 1), (1, 4)]).sorted(), Some(vec![(0, 5), (5, 10)]));
        assert_eq!(runs(&[(5, 2), (0, 6)]).sorted(), None);
        assert_eq!(runs(&[(5, 2), (5, 2)]).sorted(), None);
        assert_eq!(runs(&[(5, 2), (0, 6), (9, 1), (u64::MAX, 5)]).merged(), [(0, 7), (9, 10), (u64::MAX, u64::MAX)]);
        let known = [(2, 4), (8, 10)];
        for (run, expected) in [((0, 2), false), ((1, 3), true), ((4, 8), false), ((9, 20), true), ((10, 11), false)] {
            assert_eq!(overlaps(&known, run), expected, "{run:?}");
        }
    }
}
