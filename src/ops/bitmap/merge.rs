//! The bits of a bitmap that are set in any of some others, whatever one bit stands for in them.
//!
//! A bit of a coarser bitmap sets all that stand for the same bytes, one of a finer one that in whose bytes it lies.
//!
//! Memory is some pieces of a bitmap. A bitmap that says more than its file can hold is not merged, so that a small file
//! does not become a large one.

use std::cell::Cell;

use crate::block::driver::{BitmapInfo, Bitmaps, MakeBits};
use crate::block::{Error, Node, Result};

/// Bytes of a bitmap that are read at a time.
const PIECE: u64 = 2 << 20;

/// See the module.
pub struct MergedBits<'a> {
    granularity_bits: u8,
    /// How many bits there are.
    count: u64,
    sources: Vec<SourceBits<'a>>,
}

struct SourceBits<'a> {
    bitmaps: &'a dyn Bitmaps,
    index: usize,
    granularity_bits: u8,
    count: u64,
    /// How many bytes may still be read of its file.
    budget: Cell<u64>,
}

fn count(info: &BitmapInfo) -> u64 {
    info.disk.div_ceil(1 << info.granularity_bits)
}

impl<'a> MergedBits<'a> {
    /// None set, for a bitmap like that.
    pub fn none(info: &BitmapInfo) -> Self {
        Self { granularity_bits: info.granularity_bits, count: count(info), sources: Vec::new() }
    }

    /// Those too that are set in the image's bitmap at that place.
    pub fn add(&mut self, node: &'a Node, index: usize, info: &BitmapInfo) -> Result<()> {
        let driver = node.driver();
        let bitmaps = driver.bitmaps().ok_or_else(|| Error::unsupported("Operation not supported"))?;
        let file = driver.files().iter().map(|file| file.storage.len()).next().transpose()?.unwrap_or(0);
        let (granularity_bits, count) = (info.granularity_bits, count(info));
        self.sources.push(SourceBits { bitmaps, index, granularity_bits, count, budget: Cell::new(file) });
        Ok(())
    }
}

impl MakeBits for MergedBits<'_> {
    fn fill(&self, at: u64, bits: &mut [u8]) -> Result<()> {
        let first = at * 8;
        let end = self.count.min(first + bits.len() as u64 * 8);
        for source in &self.sources {
            if let Some(finer) = self.granularity_bits.checked_sub(source.granularity_bits) {
                let last = source.count.min(end << finer);
                source.runs(first << finer, last, |from, to| {
                    fill_run(bits, (from >> finer) - first, ((to - 1) >> finer) - first + 1);
                })?;
            } else {
                let coarser = source.granularity_bits - self.granularity_bits;
                let last = source.count.min(((end - 1) >> coarser) + 1);
                source.runs(first >> coarser, last, |from, to| {
                    let (from, to) = ((from << coarser).max(first), (to << coarser).min(end));
                    fill_run(bits, from - first, to - first);
                })?;
            }
        }
        Ok(())
    }
}

impl SourceBits<'_> {
    /// The runs of set bits from `first` on, below `end`: where each starts and ends.
    fn runs(&self, first: u64, end: u64, mut act: impl FnMut(u64, u64)) -> Result<()> {
        let (mut byte, last) = (first / 8, end.div_ceil(8));
        let mut piece = Vec::new();
        while byte < last {
            let len = PIECE.min(last - byte);
            piece.resize(usize::try_from(len).unwrap_or(0), 0);
            let read = self.bitmaps.read(self.index, byte, &mut piece)?;
            let left = self.budget.get().checked_sub(read);
            self.budget.set(left.ok_or_else(|| Error::corrupt("Bitmaps share their place in the file"))?);
            let start = byte * 8;
            set_runs(&piece, &mut |from, to| {
                let (from, to) = ((start + from).max(first), (start + to).min(end));
                if from < to {
                    act(from, to);
                }
            });
            byte += len;
        }
        Ok(())
    }
}

/// The runs of set bits in some bytes: where each starts and ends, counted from the first byte's lowest bit.
fn set_runs(bytes: &[u8], act: &mut dyn FnMut(u64, u64)) {
    let mut start = None;
    for (at, byte) in (0u64..).step_by(8).zip(bytes) {
        match (byte, start) {
            (0, None) | (0xff, Some(_)) => {}
            (0, Some(from)) => {
                act(from, at);
                start = None;
            }
            _ => {
                for bit in 0..8 {
                    match (byte >> bit & 1, start) {
                        (1, None) => start = Some(at + bit),
                        (0, Some(from)) => {
                            act(from, at + bit);
                            start = None;
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    if let Some(from) = start {
        act(from, bytes.len() as u64 * 8);
    }
}

/// Sets the bits from `from` on, below `to`.
fn fill_run(bits: &mut [u8], from: u64, to: u64) {
    let (mut bit, whole) = (from, to & !7);
    while bit < to {
        let byte = usize::try_from(bit / 8).unwrap_or(usize::MAX);
        if bit % 8 == 0 && bit < whole {
            let end = usize::try_from(whole / 8).unwrap_or(usize::MAX);
            if let Some(bytes) = bits.get_mut(byte..end) {
                bytes.fill(0xff);
            }
            bit = whole;
        } else {
            if let Some(byte) = bits.get_mut(byte) {
                *byte |= 1 << (bit % 8);
            }
            bit += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_found_and_filled() {
        let runs = [(0, 3), (7, 9), (15, 40), (47, 48), (50, 51), (63, 64)];
        let mut bits = [0; 8];
        runs.iter().for_each(|(from, to)| fill_run(&mut bits, *from, *to));
        let set = |bit: u64| bits[(bit / 8) as usize] >> (bit % 8) & 1 == 1;
        assert!((0..64).all(|bit| set(bit) == runs.iter().any(|(from, to)| (*from..*to).contains(&bit))));
        let mut found = Vec::new();
        set_runs(&bits, &mut |from, to| found.push((from, to)));
        assert_eq!(found, runs);
    }
}
