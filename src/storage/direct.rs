//! `O_DIRECT` for callers that know nothing of alignment.
//!
//! Whole aligned blocks pass by the page cache, through an aligned buffer where the caller's is not. The unaligned
//! edges of a write, and unaligned reads, go through a second, buffered open of the same file: so the file keeps
//! its exact length, and two writes that share a block do not undo each other.
//!
//! Invariant: the unit is at least a page, so a page of the cache is never partly written from both sides; the
//! kernel then keeps the two ways coherent.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::kind::{FileKind, read_full};
use super::{Result, host};

/// Largest piece that is copied through an aligned buffer.
const PIECE: usize = 1 << 20;
/// Aligned buffers that are kept for the next use.
const KEPT: usize = 16;

/// What `O_DIRECT` needs beside the file itself.
#[derive(Debug)]
pub struct Direct {
    unit: usize,
    buffered: File,
    spare: Mutex<Vec<Vec<u8>>>,
}

impl Direct {
    /// For a file that was opened with `O_DIRECT`.
    pub fn new(file: &File, kind: FileKind) -> Result<Self> {
        let same = format!("/proc/self/fd/{}", file.as_raw_fd());
        // What is only read stays so: whoever watches the file must not see a writer.
        let flags = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL)?);
        let write = flags & OFlag::O_ACCMODE != OFlag::O_RDONLY;
        let buffered = OpenOptions::new().read(true).write(write).open(&same)?;
        let unit = host::direct_unit(file, kind).max(host::page_size()).max(4096).next_power_of_two();
        Ok(Self { unit, buffered, spare: Mutex::default() })
    }

    /// What offsets, lengths and buffers should be multiples of, to be fast.
    pub fn alignment(&self) -> u32 {
        u32::try_from(self.unit).unwrap_or(4096)
    }

    /// The largest piece that passes in one system call whatever the caller's buffer.
    pub fn best_request(&self) -> u32 {
        u32::try_from(PIECE.max(self.unit)).unwrap_or(u32::MAX)
    }

    fn is_aligned(&self, pointer: *const u8, len: usize) -> bool {
        (pointer as usize).is_multiple_of(self.unit) && len.is_multiple_of(self.unit)
    }

    /// The lengths of the head before the first boundary and of the aligned middle; the rest is the tail.
    fn split(&self, at: u64, len: usize) -> (usize, usize) {
        let unit = self.unit as u64;
        let head = usize::try_from(at.next_multiple_of(unit) - at).unwrap_or(len).min(len);
        (head, (len - head) / self.unit * self.unit)
    }

    /// Runs `work` on an aligned buffer of `len` bytes (a multiple of the unit, at most [`PIECE`]).
    fn with_buffer(&self, len: usize, work: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        let mut buffer = self.spare().pop().unwrap_or_default();
        buffer.resize(buffer.len().max(len + self.unit), 0);
        let skip = buffer.as_ptr().align_offset(self.unit).min(self.unit);
        let done = match buffer.get_mut(skip..skip + len) {
            Some(aligned) => work(aligned),
            None => Err(io::Error::from(io::ErrorKind::OutOfMemory).into()),
        };
        let mut spare = self.spare();
        if spare.len() < KEPT {
            spare.push(buffer);
        }
        done
    }

    fn spare(&self) -> std::sync::MutexGuard<'_, Vec<Vec<u8>>> {
        self.spare.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// See [`super::Storage::read_at`].
    pub fn read_at(&self, file: &File, at: u64, buf: &mut [u8]) -> Result<()> {
        let (head, middle) = self.split(at, buf.len());
        let (head, rest) = buf.split_at_mut(head);
        let (middle, tail) = rest.split_at_mut(middle);
        read_full(&self.buffered, at, head)?;
        let mut at = at + head.len() as u64;
        for piece in middle.chunks_mut(PIECE.max(self.unit)) {
            if self.is_aligned(piece.as_ptr(), piece.len()) {
                self.read_blocks(file, at, piece)?;
            } else {
                self.with_buffer(piece.len(), |aligned| {
                    self.read_blocks(file, at, aligned)?;
                    piece.copy_from_slice(aligned);
                    Ok(())
                })?;
            }
            at += piece.len() as u64;
        }
        read_full(&self.buffered, at, tail)
    }

    /// Reads whole blocks; the file may end within one.
    fn read_blocks(&self, file: &File, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while let Some(left) = buf.get_mut(done..).filter(|left| !left.is_empty()) {
            match file.read_at(left, at + done as u64) {
                Ok(n) if n > 0 && n.is_multiple_of(self.unit) => done += n,
                // A short piece: the end, or less than a block at a time. The other way knows which.
                Ok(n) => return read_full(&self.buffered, at + (done + n) as u64, left.split_at_mut(n).1),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// See [`super::Storage::write_at`].
    pub fn write_at(&self, file: &File, at: u64, buf: &[u8]) -> Result<()> {
        let (head, middle) = self.split(at, buf.len());
        let (head, rest) = buf.split_at(head);
        let (middle, tail) = rest.split_at(middle);
        self.write_edge(file, at, head)?;
        let mut at = at + head.len() as u64;
        for piece in middle.chunks(PIECE.max(self.unit)) {
            if self.is_aligned(piece.as_ptr(), piece.len()) {
                file.write_all_at(piece, at)?;
            } else {
                self.with_buffer(piece.len(), |aligned| {
                    aligned.copy_from_slice(piece);
                    Ok(file.write_all_at(aligned, at)?)
                })?;
            }
            at += piece.len() as u64;
        }
        self.write_edge(file, at, tail)
    }

    fn write_edge(&self, file: &File, at: u64, edge: &[u8]) -> Result<()> {
        if edge.is_empty() {
            return Ok(());
        }
        self.buffered.write_all_at(edge, at)?;
        if host::is_synchronous(file) {
            self.buffered.sync_data()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::file::{FileHow, HostFile};
    use crate::storage::{CacheMode, Storage};

    /// Any offset, length and buffer, against the same writes to a vector.
    #[test]
    fn any_alignment_will_do() {
        for cache in [CacheMode::None, CacheMode::Directsync] {
            // Not where temporary files usually are: that may be a file system without O_DIRECT.
            let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            let path = dir.path().join("a");
            std::fs::write(&path, b"").unwrap();
            let file = HostFile::open(&path, &FileHow { write: true, cache, ..FileHow::default() }).unwrap();
            assert!(file.facts().alignment >= 512);
            let mut model = Vec::new();
            let mut random = fastrand::Rng::with_seed(7);
            for round in 0..60 {
                let at = random.usize(0..3 << 20);
                let len = if round % 3 == 0 { random.usize(0..2 << 20) } else { random.usize(0..9000) };
                let at = if round % 4 == 0 { at / 4096 * 4096 } else { at };
                let bytes: Vec<u8> = (0..len + 1).map(|_| random.u8(..)).collect();
                let bytes = &bytes[1..];
                if model.len() < at + len && len > 0 {
                    model.resize(at + len, 0);
                }
                model[at..at + len].copy_from_slice(bytes);
                file.write_at(at as u64, bytes).unwrap();
                assert_eq!(file.len().unwrap(), model.len() as u64, "the exact length");
                let from = random.usize(0..4 << 20);
                let mut got = vec![9; random.usize(0..100_000)];
                file.read_at(from as u64, &mut got).unwrap();
                let mut expected = model.get(from..).unwrap_or_default().to_vec();
                expected.resize(got.len(), 0);
                assert!(got == expected, "read {} at {from}", got.len());
            }
            assert!(std::fs::read(&path).unwrap() == model);
        }
    }

    #[test]
    fn what_is_read_has_no_writer() {
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"text").unwrap();
        for write in [false, true] {
            let file = OpenOptions::new().read(true).write(write).open(&path).unwrap();
            let direct = Direct::new(&file, FileKind::Regular).unwrap();
            assert_eq!(direct.buffered.write_at(b"T", 0).is_ok(), write);
        }
    }
}
