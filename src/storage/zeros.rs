//! Finding zeros, and not writing them where the file reads as zeros already.
//!
//! A unit of an image is written as a whole, and may hold little but zeros. Where it lies in a hole of its file, which it
//! does in a new one, they are there before they are written.
//!
//! Invariants: what the file reads as, and how long it gets, is the same as if all were written; only a plain file of the
//! host is asked where its holes are, so whatever wants to see the bytes pass sees them.

use super::{FileKind, HostFile, HostKind, Result, Storage};

/// Bytes that are looked at in one go; the inner loop is left to the vector unit.
const LANE: usize = 256;

/// What the processor fetches at once.
const CACHE_LINE: usize = 64;

/// Whether all bytes are zero, at the speed of memory.
pub fn is_zero(buf: &[u8]) -> bool {
    // Most data shows itself at once in its first bytes, and nothing else of it need be fetched.
    if buf.first_chunk::<CACHE_LINE>().is_some_and(|line| line.iter().fold(0, |all, byte| all | byte) != 0) {
        return false;
    }
    let (lanes, rest) = buf.as_chunks::<LANE>();
    lanes.iter().all(|lane| lane.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// What is looked at for zeros in a buffer that is written: hosts keep no smaller holes.
const PAGE: usize = 4096;

/// What of a run is written in any case, so that the file is as long as it would be.
pub const END: u64 = PAGE as u64;

/// How many of the `len` zeros that are to be written at `at` are there already, because the file has a hole there.
pub fn are_there(file: &dyn Storage, at: u64, len: u64) -> Result<u64> {
    let plain = |host: &HostFile| host.kind() == FileKind::Regular && host.direct.is_none();
    let plain = file.facts().offload && file.host().is_some_and(plain);
    if !plain || len == 0 {
        return Ok(0);
    }
    let found = file.extent(at, len)?;
    Ok(if found.kind == HostKind::Hole { found.len.min(len) } else { 0 })
}

/// Writes `bytes` at `at`, but for runs of at least `least` zeros that are there already.
pub fn write_around(file: &dyn Storage, at: u64, bytes: &[u8], least: usize) -> Result<()> {
    let last = bytes.len().saturating_sub(PAGE);
    let (mut from, mut next) = (0, 0);
    while next + least <= last {
        let zeros: usize = bytes[next..last].chunks(PAGE).take_while(|page| is_zero(page)).map(<[u8]>::len).sum();
        let asked = if zeros >= least { zeros } else { 0 };
        let there = usize::try_from(are_there(file, at + next as u64, asked as u64)?).unwrap_or(0);
        if there >= least {
            if from < next {
                file.write_at(at + from as u64, &bytes[from..next])?;
            }
            from = next + there;
        }
        next += zeros.max(PAGE);
    }
    file.write_at(at + from as u64, &bytes[from..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::HostFile;
    use crate::storage::file::FileHow;

    #[test]
    fn every_byte_counts() {
        let mut buf = vec![0; 5000];
        assert!(is_zero(&buf) && is_zero(&[]));
        for at in [0, 1, 255, 256, 2499, 4864, 4998, 4999] {
            buf[at] = 1;
            assert!(!is_zero(&buf), "byte {at}");
            buf[at] = 0;
        }
    }

    #[test]
    fn zeros_are_written_but_where_there_is_a_hole() {
        const LEAST: usize = 65536;
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("a");
        let mut rng = fastrand::Rng::with_seed(3);
        for round in 0..60 {
            // Data here and there, in a hole between what other workers have written.
            let mut bytes = vec![0; rng.usize(1..600_000)];
            for _ in 0..rng.usize(0..4) {
                let at = rng.usize(0..bytes.len());
                let end = (at + rng.usize(1..9000)).min(bytes.len());
                bytes[at..end].fill(5);
            }
            std::fs::write(&path, vec![7; 4096]).unwrap();
            let file = HostFile::open(&path, &FileHow { write: true, ..FileHow::default() }).unwrap();
            let at = [4096, 8192 + rng.u64(0..4096)][round % 2];
            if round % 3 == 0 {
                file.write_at(at + 600_000, &[7; 4096]).unwrap();
            }
            if round % 4 == 0 {
                file.write_at(at, &vec![9; bytes.len().min(300_000)]).unwrap();
            }
            write_around(&file, at, &bytes, LEAST).unwrap();
            let mut got = vec![1; bytes.len()];
            file.read_at(at, &mut got).unwrap();
            assert!(got == bytes, "round {round}");
            assert!(file.len().unwrap() >= at + bytes.len() as u64, "round {round}: as long as if all were written");
        }
        let file = HostFile::open(&path, &FileHow { write: true, ..FileHow::default() }).unwrap();
        file.set_len(0, crate::storage::Preallocation::Off).unwrap();
        let mut bytes = vec![0; 1 << 20];
        bytes[500_000] = 1;
        write_around(&file, 0, &bytes, LEAST).unwrap();
        assert_eq!(file.allocated().unwrap(), Some(2 * 4096), "the data, and the end");
    }
}
