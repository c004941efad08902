//! Reserving the blocks of a new file right before its bytes are written.
//!
//! ext4 books each block of a hole that is written to on its own, as one to be placed later; a third of a large write
//! is that. One `fallocate(2)` for the whole range costs a few microseconds and leaves the write nothing to book: copying
//! 950 MiB within the page cache took 0.15 s in place of 0.24 s (one thread, kernel 6.18, best of four). XFS has no such
//! cost and gains nothing; Btrfs would store what is reserved uncompressed; a tmpfs would clear the pages first. Blocks
//! that are placed at once lie in more runs (4 MiB each in that copy, when two threads write) than those that are placed
//! together later, so a file is let grow a little first: small ones stay in one run.
//!
//! Invariant: what is written, where, and how many blocks it takes does not depend on any of this: only what is going to be
//! written is reserved, and where that fails the write is left to say why.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, fstatfs};

/// A call costs as much as it saves in a write of about this size, in bytes.
const LEAST: usize = 64 << 10;

/// Bytes that are written to a file before any are reserved.
const AFTER: u64 = 32 << 20;

/// Whether, for one file.
#[derive(Debug, Default)]
pub struct Reserve {
    pays: AtomicBool,
    written: AtomicU64,
}

impl Reserve {
    /// For a file whose blocks are mostly holes yet.
    pub fn of(file: &File) -> Self {
        let pays = fstatfs(file.as_fd()).is_ok_and(|system| system.filesystem_type() == EXT4_SUPER_MAGIC);
        Self { pays: AtomicBool::new(pays), written: AtomicU64::new(0) }
    }

    /// `len` bytes are going to be written at `at`.
    pub fn before_write(&self, file: &File, at: u64, len: usize) {
        if !self.pays.load(Ordering::Relaxed) {
            return;
        }
        let before = self.written.fetch_add(len as u64, Ordering::Relaxed);
        if len < LEAST || before < AFTER {
            return;
        }
        let (Ok(at), Ok(len)) = (i64::try_from(at), i64::try_from(len)) else { return };
        if fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, at, len).is_err() {
            self.pays.store(false, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    /// Wherever the file lies: the same bytes, the same length, no more blocks.
    #[test]
    fn a_reserved_file_is_as_long_and_as_large_as_what_is_written() {
        for folder in [env!("CARGO_MANIFEST_DIR"), "/dev/shm"] {
            let file = tempfile::tempfile_in(folder).unwrap();
            let reserve = Reserve { written: AtomicU64::new(AFTER), ..Reserve::of(&file) };
            let bytes = vec![5u8; 300_000];
            for at in [4096u64, 1 << 20] {
                reserve.before_write(&file, at, bytes.len());
                assert!(file.metadata().unwrap().len() <= at, "it does not grow before it is written");
                file.write_all_at(&bytes, at).unwrap();
            }
            file.sync_all().unwrap();
            let meta = file.metadata().unwrap();
            assert_eq!(meta.len(), (1 << 20) + 300_000);
            assert!(meta.blocks() * 512 <= 2 * 300_000 + 6 * 4096, "{folder}: {}", meta.blocks());
            let mut read = vec![0; 300_000];
            file.read_exact_at(&mut read, 1 << 20).unwrap();
            assert!(read == bytes);
        }
    }

    #[test]
    fn nothing_is_asked_for_little_and_nothing_again_after_a_refusal() {
        let (file, _other_end) = std::os::unix::net::UnixStream::pair().unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(file));
        let reserve = Reserve { pays: AtomicBool::new(true), written: AtomicU64::new(0) };
        reserve.before_write(&file, 0, AFTER as usize);
        reserve.before_write(&file, 0, LEAST - 1);
        assert!(reserve.pays.load(Ordering::Relaxed), "too little to ask");
        reserve.before_write(&file, 0, LEAST);
        assert!(!reserve.pays.load(Ordering::Relaxed));
    }
}
