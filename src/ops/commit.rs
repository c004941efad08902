//! What an overlay stores moves into a layer below it, which then shows by itself what was shown through the overlay.
//!
//! Data goes into the lower layer and is flushed, only then is the overlay emptied: read through the overlay the disk
//! is the same at every moment.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::Arc;

use super::copy::{self, Above, CopyOptions, Joined, Observer, TargetFacts};
use super::{resize, written};
use crate::block::error::Context;
use crate::block::{Error, Node, Opener, Result, name};
use crate::storage::{CacheMode, Preallocation};

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Commit {
    /// How many layers below the top the one is that gets the data; at least 1.
    pub depth: usize,
    /// The overlay keeps what it stores.
    pub keep: bool,
    /// At most that many bytes a second.
    pub rate: Option<u64>,
    /// How the lower layer is cached.
    pub cache: CacheMode,
}

/// How many layers below the top the one with that name is: as a header gives it, or another way to the same file from
/// that image on.
pub fn depth_of(top: &Node, base: &OsStr) -> Result<usize> {
    let (mut node, mut depth) = (top, 0);
    while let Some(below) = node.backing() {
        depth += 1;
        let named = node.driver().backing().is_some_and(|backing| backing.name == base)
            || below.origin().path.is_none() && below.name().as_bytes() == base.as_encoded_bytes();
        let real = |path: PathBuf| std::fs::canonicalize(path).ok();
        let wanted = name::find_beside(node.origin().base.as_deref(), base).map(PathBuf::from).and_then(real);
        let same = || below.origin().path.clone().map(PathBuf::from).and_then(real);
        if named || wanted.is_some_and(|path| same() == Some(path)) {
            return Ok(depth);
        }
        node = below;
    }
    let (base, top) = (base.display(), top.name());
    Err(Error::invalid(format!("Did not find '{base}' in the backing chain of '{top}'")))
}

/// The layer that many steps down.
fn layer(top: &Arc<Node>, depth: usize) -> Result<&Arc<Node>> {
    let mut node = top;
    for _ in 0..depth {
        node = node.backing().ok_or_else(no_backing)?;
    }
    Ok(node)
}

fn no_backing() -> Error {
    Error::invalid("Image does not have a backing file")
}

/// Does it. `top` must not be read any more: it knows nothing of what is written below it.
pub fn commit(opener: &Opener<'_>, top: &Arc<Node>, commit: &Commit, observer: &dyn Observer) -> Result<()> {
    layer(top, commit.depth.max(1))?;
    let mut chain = opener.open_lower(top, commit.depth, commit.cache)?;
    if let Some(made) = grow(&chain, commit.depth).context(FAILED)? {
        // It may have got further files, which it may name from now on.
        made.iter().for_each(|path| opener.allow_made(path));
        drop(chain);
        chain = opener.open_lower(top, commit.depth, commit.cache)?;
    }
    if layer(&chain, commit.depth)?.driver().content_id().is_some() {
        chain = opener.open_lower(&chain, commit.depth.saturating_sub(1), commit.cache)?;
    }
    move_down(&chain, commit, observer)
}

const FAILED: &str = "Block job failed";

/// Makes the lower layer as long as the top one, and gives the names of the files that it got for that. Nothing if it is.
pub fn grow(chain: &Arc<Node>, depth: usize) -> Result<Option<Vec<PathBuf>>> {
    let (base, size) = (layer(chain, depth)?, chain.virtual_size());
    if base.virtual_size() >= size {
        return Ok(None);
    }
    let resizing = base.driver().resizing().ok_or_else(|| Error::unsupported("Operation not supported"))?;
    resizing.check(size, Preallocation::Off)?;
    resize::resize_naming(base, size, Preallocation::Off).map(Some)
}

/// Moves the data to the lower layer, which is open for writing and long enough, and empties the top one.
pub fn move_down(chain: &Arc<Node>, commit: &Commit, observer: &dyn Observer) -> Result<()> {
    tell_child(chain, commit.depth)?;
    let base = layer(chain, commit.depth)?;
    let options = CopyOptions { rate: commit.rate, ..CopyOptions::default() };
    let above = Above { layers: commit.depth, backing_len: base.virtual_size(), blank_past: false };
    let source = Joined::new(std::slice::from_ref(chain), Some(above));
    let copied = copy::copy(&source, base, &options, TargetFacts::default(), observer);
    written::close(base, copied).context(FAILED)?;
    if let (false, Some(emptying)) = (commit.keep, chain.driver().emptying()) {
        emptying.make_empty().with_context(|| format!("Could not empty '{}'", chain.name()))?;
    }
    chain.driver().close()
}

/// Where a layer remembers what its backing file is, the one right above the lower layer, which is open for writing,
/// gets to know that this one is about to change. (Two files cannot change at once: stopped between the two, it is
/// refused until a rebase of the name alone says that all is well. Other overlays are refused from here on.)
fn tell_child(chain: &Arc<Node>, depth: usize) -> Result<()> {
    let (base, child) = (layer(chain, depth)?, layer(chain, depth.saturating_sub(1))?);
    let was = base.driver().content_id();
    base.writing()?.begin()?;
    if base.driver().content_id() == was || child.driver().content_id().is_none() {
        return Ok(());
    }
    base.driver().flush()?;
    child.driver().backing_change().map_or(Ok(()), |change| change.follow(base.driver()))
}
