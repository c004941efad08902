//! Patterns, and comparing files that are mostly holes.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::unistd::{Whence, lseek};

/// Bytes that no codec shrinks and that tell their place: seeded by `seed`.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes);
    bytes
}

/// Writes [`pattern`] into a file at an offset; the file is made where it is not there.
pub fn write_pattern(path: &Path, at: u64, seed: u64, len: usize) {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path).expect("open for pattern");
    file.write_all_at(&pattern(seed, len), at).expect("write pattern");
}

/// Where two files first differ (a shorter one is not filled up); holes are skipped, not read.
pub fn first_difference(a: &Path, b: &Path) -> Option<u64> {
    let (a, b) = (File::open(a).expect("open"), File::open(b).expect("open"));
    let len = |f: &File| f.metadata().expect("metadata").len();
    let (len_a, len_b) = (len(&a), len(&b));
    let end = len_a.min(len_b);
    let mut at = 0;
    let mut buf = (vec![0; 1 << 18], vec![0; 1 << 18]);
    while at < end {
        let next = next_data(&a, at).min(next_data(&b, at));
        if next >= end {
            break;
        }
        at = next;
        let n = usize::try_from((end - at).min(1 << 18)).expect("small");
        a.read_exact_at(&mut buf.0[..n], at).expect("read");
        b.read_exact_at(&mut buf.1[..n], at).expect("read");
        if buf.0[..n] != buf.1[..n] {
            let differs = buf.0[..n].iter().zip(&buf.1[..n]).position(|(x, y)| x != y).unwrap_or(0);
            return Some(at + differs as u64);
        }
        at += n as u64;
    }
    (len_a != len_b).then_some(end)
}

fn next_data(file: &File, at: u64) -> u64 {
    match lseek(file.as_fd(), i64::try_from(at).expect("offset"), Whence::SeekData) {
        Ok(next) => u64::try_from(next).expect("offset"),
        Err(nix::errno::Errno::ENXIO) => u64::MAX,
        Err(_) => at,
    }
}

/// Fails where the files differ, and says where.
pub fn assert_same_bytes(a: &Path, b: &Path) {
    if let Some(at) = first_difference(a, b) {
        panic!("{} and {} differ at byte {at} ({at:#x})", a.display(), b.display());
    }
}
