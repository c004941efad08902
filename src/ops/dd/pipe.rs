//! Blocks that come from a pipe, or go to one: raw, from front to back, each byte once.
//!
//! Where a format needs to know the size first, or puts things in another order, a temporary file is in between.
//!
//! Invariant: what was copied before a failure is not taken for all of it: a file that is not complete does not appear,
//! and the reader of a pipe can only be told by the exit code.

use std::io::{Read, Take, Write};
use std::path::Path;

use super::{Blocks, DiskPart};
use crate::block::error::Context;
use crate::block::io::Scratch;
use crate::block::{Error, GuestOffset, Node, Result};
use crate::ops::lengths::{self, FileLengths};
use crate::ops::staged::StagedTarget;
use crate::storage::file::FileHow;
use crate::storage::temporary::{TemporaryName, large_file};
use crate::storage::zeros::is_zero;
use crate::storage::{self, HostFile, Preallocation, Storage};

/// Bytes that are moved at once.
const PIECE: usize = 1 << 20;

/// Raw disks have whole sectors.
const SECTOR: u64 = 512;

/// The blocks that are wanted of what a pipe gives: it has come to the first of them.
pub struct PipedBlocks<R> {
    bytes: Take<R>,
    name: String,
    /// The pipe ended before.
    pub past_end: bool,
}

impl<R: Read> PipedBlocks<R> {
    /// Takes, and forgets, what is skipped.
    pub fn find(mut pipe: R, name: &Path, blocks: &Blocks) -> Result<Self> {
        let name = name.to_string_lossy().into_owned();
        let end = blocks.count.map_or(u64::MAX, |count| count.saturating_mul(blocks.len));
        let from = blocks.skip.checked_mul(blocks.len).filter(|from| *from <= end);
        let passed = from.unwrap_or(end);
        let skipped = std::io::copy(&mut pipe.by_ref().take(passed), &mut std::io::sink());
        let skipped = skipped.map_err(storage::Error::from).with_context(|| reading(&name))?;
        let past_end = from.is_none() || skipped < passed;
        let left = if past_end { 0 } else { end - passed };
        Ok(Self { bytes: pipe.take(left), name, past_end })
    }

    /// Gives all of them, a piece at a time, each but the last a full one, and the last in whole sectors.
    fn pieces(mut self, mut take: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<u64> {
        let (mut at, mut buffer) = (0, Vec::with_capacity(PIECE));
        loop {
            buffer.clear();
            let read = self.bytes.by_ref().take(PIECE as u64).read_to_end(&mut buffer);
            let read = read.map_err(storage::Error::from).with_context(|| reading(&self.name))?;
            buffer.resize(read.next_multiple_of(SECTOR as usize), 0);
            if !buffer.is_empty() {
                take(at, &buffer)?;
            }
            at += buffer.len() as u64;
            if read < PIECE {
                return Ok(at);
            }
        }
    }

    /// Copies them to a new raw image, which is as long as they are, and gives that its name.
    pub fn to_raw(self, target: StagedTarget) -> Result<()> {
        let copied = match target.node().driver().files() {
            [file] => {
                let place = |at| format!("{}: error while writing at byte {at}", file.name);
                let copied = self.pieces(|at, piece| file.storage.write_at(at, piece).with_context(|| place(at)));
                copied.and_then(|len| file.storage.set_len(len, Preallocation::Off).with_context(|| place(len)))
            }
            _ => Err(Error::unsupported("what comes from a pipe goes to one file")),
        };
        target.finish(copied)
    }

    /// Copies them to another pipe.
    pub fn to_pipe(self, mut sink: impl Write, name: &Path) -> Result<()> {
        self.pieces(|at, piece| put(&mut sink, name, at, piece)).map(|_| ())
    }

    /// Copies them to a temporary file, in which zeros are holes.
    pub fn to_temporary(self) -> Result<TemporaryName> {
        let doing = || "Could not keep what the pipe gives in a temporary file".to_owned();
        let name = large_file().map_err(storage::Error::from).with_context(doing)?;
        let path = name.path().unwrap_or(Path::new(""));
        let file = HostFile::open(path, &FileHow { write: true, ..FileHow::default() }).with_context(doing)?;
        let len = self.pieces(|at, piece| match is_zero(piece) {
            true => Ok(()),
            false => file.write_at(at, piece).with_context(doing),
        })?;
        file.set_len(len, Preallocation::Off).with_context(doing)?;
        Ok(name)
    }
}

/// Copies part of a disk to a pipe.
pub fn to_pipe(source: &Node, part: DiskPart, mut sink: impl Write, name: &Path) -> Result<()> {
    let (mut scratch, mut buffer) = (Scratch::default(), vec![0; PIECE]);
    let (mut done, len) = (0, part.len.next_multiple_of(SECTOR));
    let lengths = FileLengths::of(lengths::layers(source))?;
    while done < len {
        let n = usize::try_from(len - done).map_or(PIECE, |left| left.min(PIECE));
        let wanted = usize::try_from(part.len - done).map_or(n, |left| left.min(n));
        let piece = &mut buffer[..n];
        piece[wanted..].fill(0);
        source.read(GuestOffset(part.from + done), &mut piece[..wanted], &mut scratch)?;
        put(&mut sink, name, done, piece)?;
        done += n as u64;
    }
    lengths.check()
}

fn put(sink: &mut impl Write, name: &Path, at: u64, piece: &[u8]) -> Result<()> {
    let written = sink.write_all(piece).map_err(storage::Error::from);
    written.with_context(|| format!("{}: error while writing at byte {at}", name.display()))
}

fn reading(name: &str) -> String {
    format!("{name}: error while reading")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_a_pipe_are_those_of_a_file() {
        let input: Vec<u8> = (0..3 * PIECE + 700).map(|n| (n / 512 * 7 + n) as u8).collect();
        let take = |len, count, skip| {
            let found = PipedBlocks::find(&input[..], Path::new("p"), &Blocks { len, count, skip }).unwrap();
            let (past_end, mut out) = (found.past_end, Vec::new());
            found.to_pipe(&mut out, Path::new("q")).unwrap();
            (out, past_end)
        };
        let padded = |from: usize, to: usize| {
            let mut bytes = input[from..to].to_vec();
            bytes.resize(bytes.len().next_multiple_of(512), 0);
            (bytes, false)
        };
        assert!(take(512, None, 0) == padded(0, input.len()));
        assert!(take(999, Some(3), 1) == padded(999, 2997));
        assert!(take(PIECE as u64, Some(2), 1) == padded(PIECE, 2 * PIECE));
        assert!(take(1 << 20, None, 3) == padded(3 * PIECE, input.len()));
        assert!(take(512, Some(3), 5) == (vec![], true));
        assert!(take(1 << 20, None, 4) == (vec![], true));
        assert!(take(512, Some(u64::MAX), u64::MAX) == (vec![], true));
    }
}
