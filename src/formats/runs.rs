//! Runs of a file's bytes (or sectors): whether what the tables of an image name overlaps.
//!
//! Invariant: runs that follow on each other are one, so memory grows with how scattered an image is, not with its
//! size.

/// Where it starts and where it ends.
pub type ByteRun = (u64, u64);

/// Runs kept as they come before they are first put in order.
const AT_ONCE: usize = 1 << 16;

/// Runs in any order.
#[derive(Debug)]
pub struct Runs {
    runs: Vec<ByteRun>,
    /// How many to have before they are put in order again.
    full: usize,
    overlapping: bool,
}

impl Default for Runs {
    fn default() -> Self {
        Self { runs: Vec::new(), full: AT_ONCE, overlapping: false }
    }
}

impl Runs {
    /// Takes one more in.
    pub fn add(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len);
        match self.runs.last_mut() {
            _ if len == 0 => {}
            Some((_, last)) if *last == start => *last = end,
            _ => self.runs.push((start, end)),
        }
        if self.runs.len() >= self.full {
            self.order();
            self.full = AT_ONCE.max(self.runs.len().saturating_mul(2));
        }
    }

    /// Whether two that were taken in have something in common, as far as is known.
    pub fn is_overlapping(&self) -> bool {
        self.overlapping
    }

    fn order(&mut self) {
        self.runs.sort_unstable();
        let overlapping = &mut self.overlapping;
        self.runs.dedup_by(|next, run| {
            let joined = next.0 <= run.1;
            *overlapping |= next.0 < run.1;
            if joined {
                run.1 = run.1.max(next.1);
            }
            joined
        });
    }

    /// In the order of the file; `None` if two overlap.
    pub fn disjoint(mut self) -> Option<Vec<ByteRun>> {
        self.order();
        (!self.overlapping).then_some(self.runs)
    }

    /// In the order of the file, overlapping or not.
    pub fn merged(mut self) -> Vec<ByteRun> {
        self.order();
        self.runs
    }
}

/// Whether a run touches one of those, which are disjoint and in order.
pub fn overlaps(runs: &[ByteRun], (start, end): ByteRun) -> bool {
    let index = runs.partition_point(|(_, other_end)| *other_end <= start);
    runs.get(index).is_some_and(|(other_start, _)| *other_start < end)
}

#[cfg(test)]
mod tests {
    use super::{AT_ONCE, Runs, overlaps};

    fn runs(list: &[(u64, u64)]) -> Runs {
        let mut runs = Runs::default();
        for (start, len) in list {
            runs.add(*start, *len);
        }
        runs
    }

    #[test]
    fn runs_that_overlap_are_found() {
        assert_eq!(runs(&[(5, 2), (8, 3), (0, 1), (1, 4)]).disjoint(), Some(vec![(0, 7), (8, 11)]));
        assert_eq!(runs(&[(5, 2), (0, 6)]).disjoint(), None);
        assert_eq!(runs(&[(5, 2), (5, 2)]).disjoint(), None);
        assert_eq!(runs(&[(5, 2), (0, 6), (9, 1), (u64::MAX, 5)]).merged(), [(0, 7), (9, 10), (u64::MAX, u64::MAX)]);
        let known = [(2, 4), (8, 10)];
        for (run, expected) in [((0, 2), false), ((1, 3), true), ((4, 8), false), ((9, 20), true), ((10, 11), false)] {
            assert_eq!(overlaps(&known, run), expected, "{run:?}");
        }
    }

    #[test]
    fn a_dense_file_is_one_run_in_whatever_order_it_comes() {
        let mut runs = Runs::default();
        for n in (0..4 * AT_ONCE as u64).rev() {
            runs.add(n * 8, 8);
            assert!(runs.runs.len() <= AT_ONCE);
        }
        runs.add(17, 1);
        assert_eq!(runs.merged(), [(0, 32 * AT_ONCE as u64)]);
    }
}
