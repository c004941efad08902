//! What kind of thing an open file is, and the reading that all kinds have in common.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::Result;

/// What kind of thing an open file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file: grows and shrinks, may have holes.
    Regular,
    /// A block device: fixed size, discard and zero-out by ioctl.
    BlockDevice,
    /// A character device; nothing but reading and writing is asked of it.
    CharDevice,
}

/// Fills `buf` from `at`; what lies past the end reads as zeros.
pub(super) fn read_full(file: &File, at: u64, buf: &mut [u8]) -> Result<()> {
    let mut left = buf;
    let mut at = at;
    while !left.is_empty() {
        match file.read_at(left, at) {
            Ok(0) => break,
            Ok(n) => {
                let n = n.min(left.len());
                left = left.split_at_mut(n).1;
                at = at.saturating_add(n as u64);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    left.fill(0);
    Ok(())
}
