//! How much is written into the page cache at once.
//!
//! Large writes get large pages, and are the fastest as long as the kernel has such pages at hand. Where memory is mostly
//! page cache it has none of 2 MiB, and makes them by moving others: copying 950 MiB by one thread took 0.46 to 3.1 s in
//! pieces of 2 MiB, 0.25 to 0.35 s in pieces of 1 MiB, 0.26 to 0.32 s in pieces of 256 KiB and 0.28 to 0.40 s in pieces of
//! 128 KiB (nine runs each in turn, kernel 6.18, 1.4 of 24 GiB free; by two threads 0.15 to 0.25 s in pieces of 1 MiB). With
//! memory free, pieces of 1 MiB are as fast as those of 2 MiB and a fifth faster than those of 256 KiB.
//!
//! Invariant: what is written, and where, does not depend on any of this.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The most that is written by one call.
const PIECE: usize = 1 << 20;

/// Writes all of `buf` at `at`.
pub fn write_all_at(file: &File, at: u64, buf: &[u8]) -> io::Result<()> {
    let mut at = at;
    for piece in buf.chunks(PIECE) {
        file.write_all_at(piece, at)?;
        at = at.saturating_add(piece.len() as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_pieces_are_written() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3 << 20).map(|i: u32| (i / 1000) as u8).collect();
        write_all_at(&file, 777, &bytes).unwrap();
        let mut read = vec![1; bytes.len()];
        file.read_exact_at(&mut read, 777).unwrap();
        assert!(read == bytes);
        assert_eq!(file.metadata().unwrap().len(), 777 + bytes.len() as u64);
    }
}
