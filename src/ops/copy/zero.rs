//! Zero detection: which parts of what was read need not be written.
//!
//! Invariants: whatever is reported as zero reads as zeros; a zero run is reported only if it starts and ends at
//! a multiple of the step or at an end of the buffer, and, unless it lies at an end, is at least as long as wanted.
//! (What is left out at the ends does not cut one write into two, so it may be short.)

use crate::storage::zeros::is_zero;

/// The smallest thing that is looked at.
pub const SECTOR: u64 = 512;

/// Which zeros are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparsePolicy {
    /// The shortest run of zeros that is left out; 0: none ever.
    least: u64,
    /// What the ends of such a run are multiples of.
    step: u64,
}

impl SparsePolicy {
    /// Leaves out runs of at least `least` bytes (a multiple of 512; 0 for none).
    pub fn new(least: u64) -> Self {
        let step = if least == 0 { SECTOR } else { 1 << least.ilog2() };
        Self { least, step: step.max(SECTOR) }
    }

    /// Whether nothing is left out.
    pub fn off(self) -> bool {
        self.least == 0
    }

    /// Cuts `buf`, whose first byte is at the guest's `at`, into runs: calls `found(start, len, is_data)` with
    /// offsets into `buf`, in order, alternating.
    pub fn runs(self, at: u64, buf: &[u8], mut found: impl FnMut(usize, usize, bool)) {
        if self.off() {
            if !buf.is_empty() {
                found(0, buf.len(), true);
            }
            return;
        }
        // The run that is being collected, and the zeros after a data run that may be too few to matter.
        let (mut start, mut data) = (0, false);
        let mut zeros: Option<usize> = None;
        let mut pos = 0;
        while pos < buf.len() {
            let to_step = self.step - (at + pos as u64) % self.step;
            let end = pos.saturating_add(usize::try_from(to_step).unwrap_or(usize::MAX)).min(buf.len());
            if is_zero(&buf[pos..end]) {
                zeros.get_or_insert(pos);
            } else {
                if let Some(from) = zeros.take()
                    && (from == 0 || (pos - from) as u64 >= self.least)
                {
                    if data {
                        found(start, from - start, true);
                    }
                    found(from, pos - from, false);
                    start = pos;
                }
                data = true;
            }
            pos = end;
        }
        let end = zeros.unwrap_or(pos);
        if data && end > start {
            found(start, end - start, true);
        }
        if let Some(from) = zeros {
            found(from, pos - from, false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(least: u64, at: u64, buf: &[u8]) -> Vec<(usize, usize, bool)> {
        let mut out = Vec::new();
        SparsePolicy::new(least).runs(at, buf, |start, len, data| out.push((start, len, data)));
        out
    }

    #[test]
    fn runs_are_aligned_and_long_enough() {
        let mut buf = vec![0; 5 * 4096];
        buf[4096] = 1;
        assert_eq!(runs(4096, 0, &buf), [(0, 4096, false), (4096, 4096, true), (8192, 3 * 4096, false)]);
        assert_eq!(runs(8192, 0, &buf), [(0, 8192, true), (8192, 3 * 4096, false)]);
        buf[4 * 4096] = 1;
        assert_eq!(runs(12288, 0, &buf), [(0, 5 * 4096, true)]);
        assert_eq!(runs(12288, 16384, &buf[..4 * 4096]), [(0, 8192, true), (8192, 8192, false)]);
        assert_eq!(runs(0, 0, &buf), [(0, buf.len(), true)]);
        assert_eq!(runs(4096, 0, &buf[..4096]), [(0, 4096, false)]);
        assert_eq!(runs(4096, 0, &[]), []);
    }

    #[test]
    fn runs_cover_the_buffer_and_keep_every_byte() {
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..200 {
            let mut buf = vec![0u8; 512 * rng.usize(1..100)];
            for _ in 0..rng.usize(0..6) {
                let at = rng.usize(0..buf.len());
                buf[at] = 1;
            }
            let least = 512 * rng.u64(0..20);
            let mut next = 0;
            for (start, len, data) in runs(least, 512 * rng.u64(0..30), &buf) {
                assert_eq!(start, next);
                assert!(data || is_zero(&buf[start..start + len]));
                next = start + len;
            }
            assert_eq!(next, buf.len());
        }
    }
}
