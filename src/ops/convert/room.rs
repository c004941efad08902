//! Whether there is room for a new image: told before anything is written, where it is plain that there is not.
//!
//! What reads as zeros may take no room, so what the source stores is an upper bound of what the target takes. It is a
//! lower one only where zeros are written out. Elsewhere some blocks of what is stored are read: by Hoeffding's inequality
//! the share of blocks that are not zeros is less than the share seen minus `MARGIN` with a probability below 10⁻⁹.
//! Nothing is read where all of the disk has room.
//!
//! A compressed image, one with a backing file, one that is written in place, and file systems that compress or share
//! are left to their luck.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Conversion;
use crate::block::io::Scratch;
use crate::block::{Drivers, GuestOffset, MapCursor, Node};
use crate::ops::create::{NewImage, path_of_new};
use crate::storage::zeros::is_zero;
use crate::storage::{room, staging};

/// Blocks that are read.
const SAMPLES: u64 = 256;
/// How far the share that was seen may be above the true one.
const MARGIN: f64 = 0.2;
/// Bytes of a block: the runs of zeros that are left out are no shorter.
const BLOCK: u64 = 4096;
/// Runs of the source's map that are looked at.
const MOST_RUNS: usize = 100_000;

/// A new image that does not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LackOfRoom {
    /// Bytes that it takes at the least.
    pub needed: u64,
    /// Bytes that there are.
    pub free: u64,
    /// Where.
    pub folder: PathBuf,
    /// There would be enough were the older file written in place; it stays until the new one is complete.
    pub without_older: bool,
}

/// What is lacking for the new image, if that is plain.
pub fn lacking(conversion: &Conversion, new: &NewImage, drivers: &Drivers) -> Option<LackOfRoom> {
    let options = &new.options;
    let always = new.format.creating().is_some_and(|create| create.always_compresses(options));
    if conversion.copy.compress || always || conversion.backed || options.makes_file() {
        return None;
    }
    let path = path_of_new(drivers, new)?;
    let (folder, held) = folder_of(&path)?;
    let room = room::of_folder(&folder)?;
    let disk: u64 = conversion.sources.iter().map(|source| source.virtual_size()).sum();
    if disk <= room.free {
        return None;
    }
    let in_place = room.free.saturating_add(held);
    let enough = if held > 0 && staging::stays_until_replaced(&path) { room.free } else { in_place };
    if disk <= enough {
        return None;
    }
    let needed = if matches!(options.text("preallocation"), Some("falloc" | "full")) {
        disk
    } else if conversion.sources.iter().any(|source| may_share(source, room.shared_on)) {
        return None;
    } else if conversion.copy.sparse == 0 {
        disk
    } else {
        at_least(&conversion.sources, enough)?
    };
    let without_older = enough < needed && needed <= in_place;
    (needed > enough).then_some(LackOfRoom { needed, free: room.free, folder, without_older })
}

/// Where a new file will lie, and how many bytes an older file of that name has, over which it may be written.
fn folder_of(path: &Path) -> Option<(PathBuf, u64)> {
    let old = std::fs::symlink_metadata(path).ok().map(|_| std::fs::metadata(path));
    let target = match &old {
        Some(_) => path.canonicalize().ok()?,
        None => std::path::absolute(path).ok()?,
    };
    let held = match old.transpose().ok()? {
        Some(meta) if !meta.is_file() => return None,
        Some(meta) => meta.blocks().saturating_mul(512),
        None => 0,
    };
    Some((target.parent()?.to_owned(), held))
}

/// Whether the host may let two files share what it copies.
fn may_share(source: &Node, shared_on: Option<u64>) -> bool {
    let mut layers = std::iter::successors(Some(source), |node| node.backing().map(|below| &**below));
    shared_on.is_some_and(|device| {
        layers.any(|node| {
            let identities = node.driver().files().iter().map(|file| file.storage.facts().identity);
            identities.flatten().any(|identity| identity.device == device)
        })
    })
}

/// Whether it is, in part, no file of this host: blocks from all over it would cost more than they tell.
pub(super) fn is_far(source: &Node) -> bool {
    let mut layers = std::iter::successors(Some(source), |node| node.backing().map(|below| &**below));
    layers.any(|node| node.driver().files().iter().any(|file| file.storage.facts().identity.is_none()))
}

/// How many bytes the target takes at least, if that is more than `enough`.
fn at_least(sources: &[Arc<Node>], enough: u64) -> Option<u64> {
    if sources.iter().any(|source| is_far(source)) {
        return None;
    }
    let mut runs: Vec<(&Node, u64, u64)> = Vec::new();
    let mut stored = 0u64;
    for node in sources {
        let (mut cursor, size, mut at) = (MapCursor::new(node), node.virtual_size(), 0u64);
        while at < size {
            let run = cursor.map(GuestOffset(at), size - at).ok()?;
            if !run.is_zero() {
                if runs.len() == MOST_RUNS {
                    return None;
                }
                runs.push((node, at, run.len));
                stored = stored.saturating_add(run.len);
            }
            at = at.saturating_add(run.len);
        }
    }
    if bound(stored, SAMPLES) <= enough {
        return None;
    }
    // The same blocks every time.
    let mut rng = fastrand::Rng::with_seed(stored);
    let (mut block, mut scratch, mut full) = (vec![0; BLOCK as usize], Scratch::default(), 0);
    for _ in 0..SAMPLES {
        let mut at = rng.u64(0..stored);
        let (node, start, len) = runs.iter().find(|(_, _, len)| {
            let found = at < *len;
            at -= if found { 0 } else { *len };
            found
        })?;
        let from = start + at / BLOCK * BLOCK;
        let n = usize::try_from(BLOCK.min(start + len - from)).ok()?;
        // What cannot be read is told by the copy.
        node.read(GuestOffset(from), block.get_mut(..n)?, &mut scratch).ok()?;
        full += u64::from(!is_zero(block.get(..n)?));
    }
    Some(bound(stored, full)).filter(|needed| *needed > enough)
}

/// What of the stored bytes is not zeros at the least, where so many samples were not.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn bound(stored: u64, full: u64) -> u64 {
    (stored as f64 * (full as f64 / SAMPLES as f64 - MARGIN).max(0.0)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_the_share_that_was_seen_less_the_margin() {
        assert_eq!(bound(1000, SAMPLES), 800);
        assert_eq!(bound(1000, SAMPLES / 2), 300);
        assert_eq!(bound(1000, SAMPLES / 8), 0);
    }
}
