//! How much room a file system has for new files.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::statfs::{EXT4_SUPER_MAGIC, TMPFS_MAGIC, statfs};

use super::host::XFS;

/// Room on a file system that keeps what is written as it is: no byte takes less than a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes that are free, those kept for root with them.
    pub free: u64,
    /// Files may share what they hold, if they lie on this device.
    pub shared_on: Option<u64>,
}

/// The room in a folder. `None` where that is not known, or where data may take less room than it has bytes (file
/// systems that compress).
pub fn of_folder(folder: &Path) -> Option<Room> {
    let facts = statfs(folder).ok()?;
    let kind = facts.filesystem_type();
    let shares = kind == XFS;
    if facts.blocks() == 0 || !(shares || kind == EXT4_SUPER_MAGIC || kind == TMPFS_MAGIC) {
        return None;
    }
    let free = facts.blocks_free().checked_mul(u64::try_from(facts.block_size()).ok()?)?;
    let device = std::fs::metadata(folder).ok()?.dev();
    Some(Room { free, shared_on: shares.then_some(device) })
}
