//! How much is written into the page cache at once.
//!
//! Large writes get large pages, and are the fastest as long as the kernel has such pages at hand. Where memory is mostly
//! page cache it has none of 2 MiB, and makes them by moving others: copying 950 MiB by one thread took 0.46 to 3.1 s in
//! pieces of 2 MiB, 0.25 to 0.35 s in pieces of 1 MiB, 0.26 to 0.32 s in pieces of 256 KiB and 0.28 to 0.40 s in pieces of
//! 128 KiB (nine runs each in turn, kernel 6.18, 1.4 of 24 GiB free; by two threads 0.15 to 0.25 s in pieces of 1 MiB). With
//! memory free, pieces of 1 MiB are as fast as those of 2 MiB and a fifth faster than those of 256 KiB.
//!
//! A piece of 1 MiB at a place that is a multiple of that gets one page of 1 MiB, for which the same holds as for those of
//! 2 MiB: 1400 MiB at such places took 0.31 to 2.2 s (ten runs, 5 of 24 GiB free). A write that begins there begins with
//! half a piece, so that no piece behind it does: a copy to parallels, all of whose clusters lie so, 1.1 to 1.7 s before,
//! 0.4 s since.
//!
//! Invariant: what is written, and where, does not depend on any of this.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The most that is written by one call.
const PIECE: usize = 1 << 20;

/// Writes all of `buf` at `at`.
pub fn write_all_at(file: &File, at: u64, buf: &[u8]) -> io::Result<()> {
    let (mut at, mut left) = (at, buf);
    while !left.is_empty() {
        let most = if at.is_multiple_of(PIECE as u64) { PIECE / 2 } else { PIECE };
        let (piece, behind) = left.split_at(most.min(left.len()));
        file.write_all_at(piece, at)?;
        (at, left) = (at.saturating_add(piece.len() as u64), behind);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_pieces_are_written() {
        let bytes: Vec<u8> = (0..3 << 20).map(|i: u32| (i / 1000) as u8).collect();
        for at in [0, 777, 1 << 20, (5 << 20) + 4096] {
            let file = tempfile::tempfile().unwrap();
            write_all_at(&file, at, &bytes).unwrap();
            let mut read = vec![1; bytes.len()];
            file.read_exact_at(&mut read, at).unwrap();
            assert!(read == bytes);
            assert_eq!(file.metadata().unwrap().len(), at + bytes.len() as u64);
        }
    }
}
