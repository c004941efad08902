//! Copying some blocks of a disk: from the first that is not skipped to the last that counts.
//!
//! Every byte is written, zeros too. What comes from a pipe, or goes to one, is `pipe`'s.

pub mod pipe;

use std::sync::Arc;

use super::copy::{self, CopyOptions, Joined, Silent};
use super::staged::StagedTarget;
use crate::block::{Node, Result};

/// Which blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks {
    /// The length of a block in bytes, at least 1.
    pub len: u64,
    /// How many are read, skipped ones and all; `None`: to the end.
    pub count: Option<u64>,
    /// How many of these are not copied.
    pub skip: u64,
}

/// Part of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskPart {
    /// Where it starts, in bytes.
    pub from: u64,
    /// Its length in bytes.
    pub len: u64,
    /// It would start past the end of what there is.
    pub past_end: bool,
}

impl Blocks {
    /// All of a disk.
    pub const ALL: Blocks = Blocks { len: 1, count: None, skip: 0 };

    /// What they are of a disk of `size` bytes.
    pub fn of(&self, size: u64) -> DiskPart {
        let end = self.count.map_or(size, |count| size.min(count.saturating_mul(self.len)));
        match self.skip.checked_mul(self.len).filter(|from| *from <= end) {
            Some(from) => DiskPart { from, len: end - from, past_end: false },
            None => DiskPart { from: end, len: 0, past_end: true },
        }
    }
}

/// Copies a part of a disk to a new image, and gives that its name.
pub fn copy(source: &Arc<Node>, part: DiskPart, target: StagedTarget) -> Result<()> {
    let options = CopyOptions { sparse: 0, ..CopyOptions::default() };
    let source = Joined::part(source, part.from, part.len);
    let copied = target.facts().and_then(|facts| copy::copy(&source, target.node(), &options, facts, &Silent));
    let closed = copied.and_then(|()| target.node().driver().close());
    target.finish(closed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_from_the_start_of_the_disk() {
        let part = |len, count, skip| {
            let part = Blocks { len, count, skip }.of(1_000_448);
            (part.from, part.len, part.past_end)
        };
        assert_eq!(part(512, None, 0), (0, 1_000_448, false));
        assert_eq!(part(512, Some(3), 1), (512, 1024, false));
        assert_eq!(part(999, Some(3), 1), (999, 1998, false));
        assert_eq!(part(512, None, 1953), (999_936, 512, false));
        assert_eq!(part(512, None, 1954), (1_000_448, 0, false));
        assert_eq!(part(512, None, 1955), (1_000_448, 0, true));
        assert_eq!(part(512, Some(3), 5), (1536, 0, true));
        assert_eq!(part(512, Some(0), 0), (0, 0, false));
        assert_eq!(part(512, Some(u64::MAX), u64::MAX), (1_000_448, 0, true));
    }
}
