//! How much is written into the page cache at once.
//!
//! Large writes get pages as large as the call, and are the fastest as long as the kernel has such pages at hand: 700 MiB
//! took 0.20 s in pieces of 2 MiB and 0.31 s in pieces of 256 KiB. Under a hypervisor that takes back free memory (free
//! page reporting) it is the large ones that are gone, and each has to be fetched again: eight runs in turn of
//! `dd if=SOURCE of=x bs=2M`, and `bs=256K`, on such a machine of two cores (kernel 6.18), busy with other work, took 0.7
//! to 4.0 s, and 0.65 to 1.1 s. No fixed size serves both, so writing starts with large pieces and goes on with small ones
//! once large ones turn out slow.
//!
//! Invariant: what is written, and where, does not depend on any of this.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const LARGE: usize = 2 << 20;
const SMALL: usize = 256 << 10;

/// A mebibyte takes 0.2 ms, twice that where another thread writes to the same file; 2 ms if its page is gone.
const SLOW_MEBIBYTE: Duration = Duration::from_micros(750);

/// A piece may be slow for other reasons.
const STRIKES: u32 = 3;

/// Chooses for one file.
#[derive(Debug, Default)]
pub struct Pieces {
    slow: AtomicU32,
}

impl Pieces {
    fn size(&self) -> usize {
        if self.slow.load(Ordering::Relaxed) < STRIKES { LARGE } else { SMALL }
    }

    fn took(&self, bytes: usize, time: Duration) {
        if bytes > SMALL && time.as_secs_f64() * f64::from(1 << 20) > SLOW_MEBIBYTE.as_secs_f64() * bytes as f64 {
            self.slow.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Writes all of `buf` at `at`.
    pub fn write_all_at(&self, file: &File, at: u64, buf: &[u8]) -> io::Result<()> {
        let (mut at, mut left) = (at, buf);
        while !left.is_empty() {
            let (piece, rest) = left.split_at(self.size().min(left.len()));
            let start = Instant::now();
            file.write_all_at(piece, at)?;
            self.took(piece.len(), start.elapsed());
            at = at.saturating_add(piece.len() as u64);
            left = rest;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_get_small_when_large_ones_are_slow() {
        let pieces = Pieces::default();
        pieces.took(LARGE, SLOW_MEBIBYTE);
        pieces.took(4096, SLOW_MEBIBYTE * 9);
        pieces.took(LARGE, SLOW_MEBIBYTE * 3);
        pieces.took(LARGE / 2, SLOW_MEBIBYTE * 2);
        assert_eq!(pieces.size(), LARGE);
        pieces.took(LARGE, SLOW_MEBIBYTE * 3);
        assert_eq!(pieces.size(), SMALL);
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3 << 20).map(|i: u32| (i / 1000) as u8).collect();
        pieces.write_all_at(&file, 777, &bytes).unwrap();
        let mut read = vec![1; bytes.len()];
        file.read_exact_at(&mut read, 777).unwrap();
        assert!(read == bytes);
        assert_eq!(file.metadata().unwrap().len(), 777 + bytes.len() as u64);
    }
}
