//! What bitmaps still have to be told: runs of the disk that were written, a bounded number of them.

use std::collections::BTreeMap;

/// Most runs that are kept before they are entered in the bitmaps.
pub(super) const MOST_RUNS: usize = 4096;

/// What bitmaps still have to be told.
#[derive(Debug, Default)]
pub struct Dirty {
    /// Whether those that follow were marked as in use.
    pub(super) begun: bool,
    /// The finest granularity of those that follow; `None` if none does.
    pub(super) grain: Option<u8>,
    /// What was written: where each run starts and ends.
    pub(super) runs: BTreeMap<u64, u64>,
    /// Whether there are bitmaps that are not in the directory.
    pub(super) added: bool,
}

impl Dirty {
    /// A range was written.
    pub(super) fn add(&mut self, start: u64, end: u64) {
        let (mut start, mut end) = (start, end);
        while let Some((at, until)) = self.runs.range(..=end).next_back().map(|(at, until)| (*at, *until)) {
            if until < start {
                break;
            }
            self.runs.remove(&at);
            (start, end) = (start.min(at), end.max(until));
        }
        self.runs.insert(start, end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_touch_become_one() {
        let mut dirty = Dirty::default();
        for (start, end) in [(10, 20), (30, 40), (20, 22), (50, 60), (5, 6)] {
            dirty.add(start, end);
        }
        let runs = |dirty: &Dirty| dirty.runs.iter().map(|(a, b)| (*a, *b)).collect::<Vec<_>>();
        assert_eq!(runs(&dirty), [(5, 6), (10, 22), (30, 40), (50, 60)]);
        dirty.add(21, 50);
        dirty.add(0, 7);
        assert_eq!(runs(&dirty), [(0, 7), (10, 60)]);
    }
}
