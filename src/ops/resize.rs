//! Changing the size of the guest's disk: decided and checked first, so that what is refused changes nothing.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::block::error::Context;
use crate::block::io::Scratch;
use crate::block::{Error, ErrorKind, ExtentKind, GuestOffset, Node, Resize, ResizeFiles, Result, name};
use crate::storage::lock::Access;
use crate::storage::staging::{CreateHow, Durability, Like, Staging};
use crate::storage::{self, CacheMode, Preallocation, Storage};

/// The size that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NewSize {
    /// That many bytes.
    Absolute(u64),
    /// That many bytes more.
    More(u64),
    /// That many bytes less.
    Less(u64),
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Give the disk that many bytes.
    Resize(u64),
    /// Nothing: data would be lost, and nobody said that it may be.
    WouldShrink,
}

/// The size that an image of that size shall have. Sizes are positive and fit a file offset.
fn target(current: u64, new: NewSize) -> Result<u64> {
    let size = match new {
        NewSize::Absolute(size) => Some(size),
        NewSize::More(bytes) => current.checked_add(bytes),
        NewSize::Less(bytes) => current.checked_sub(bytes),
    };
    size.filter(|size| *size > 0 && i64::try_from(*size).is_ok())
        .ok_or_else(|| Error::invalid("New image size must be positive"))
}

/// Decides, and refuses what cannot be done. Changes nothing.
pub fn decide(node: &Node, new: NewSize, fill: Preallocation, may_shrink: bool) -> Result<Decision> {
    let current = node.virtual_size();
    let size = target(current, new)?;
    if size <= current && fill != Preallocation::Off {
        return Err(Error::invalid("Preallocation can only be used for growing images"));
    }
    if size < current && !may_shrink {
        return Ok(Decision::WouldShrink);
    }
    let covered = node.backing().map_or(0, |below| below.virtual_size()).min(size);
    let resizing = resizing(node)?;
    // What a longer backing file makes of a refusal goes first.
    resizing.check(size, fill).or_else(|error| match covered > current {
        true => resizing.check_over(size, fill, covered).and(Err(error)),
        false => Err(error),
    })?;
    Ok(Decision::Resize(size))
}

fn resizing(node: &Node) -> Result<&dyn Resize> {
    node.driver().resizing().ok_or_else(|| Error::unsupported("Image format driver does not support resize"))
}

/// Gives the disk that many bytes. New ones read as zeros, whatever a longer backing file holds there; where the format
/// encrypts all that it holds (luks), as whatever zeros of the file are decrypted to.
pub fn resize(node: &Node, size: u64, fill: Preallocation) -> Result<()> {
    resize_naming(node, size, fill).map(drop)
}

/// The same; gives the names of the files that the image has got beside those that it had.
pub fn resize_naming(node: &Node, size: u64, fill: Preallocation) -> Result<Vec<PathBuf>> {
    resize_unnamed(node, size, fill).map_err(|error| naming_file(node, error))
}

/// The host's reason alone does not say which file it is about. (A size that no file can have is the user's: the
/// reference names no file there, which is known beside the text.)
pub(super) fn naming_file(node: &Node, error: Error) -> Error {
    match error.storage() {
        Some(storage::Error::Io(_) | storage::Error::Step { .. }) if error.file().is_none() => match error.kind {
            ErrorKind::TooLarge | ErrorKind::Invalid => error.about(node.name()),
            _ => error.context(node.name()),
        },
        _ => error,
    }
}

fn resize_unnamed(node: &Node, size: u64, fill: Preallocation) -> Result<Vec<PathBuf>> {
    let old = node.virtual_size();
    own_the_end(node, old, size, fill)?;
    let files = FilesBeside { node, staging: Mutex::default(), made: Mutex::default() };
    resizing(node)?.resize_with(size, fill, &files)?;
    let covered = node.backing().map_or(0, |below| below.virtual_size()).min(size);
    if covered > old {
        node.write_zeroes(GuestOffset(old), covered - old, false, &mut Scratch::default())
            .context("Failed to zero out the new area")?;
    }
    node.driver().close()?;
    Ok(files.made.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Where a longer backing file shows in the unit in which the disk ends, that unit gets a place of its own: the driver
/// can then clear the rest of it before the size changes. What the driver refuses, it refuses before that.
fn own_the_end(node: &Node, old: u64, size: u64, fill: Preallocation) -> Result<()> {
    let covered = node.backing().map_or(0, |below| below.virtual_size()).min(size);
    let Some(last) = old.checked_sub(512).filter(|_| covered > old) else { return Ok(()) };
    let extent = node.driver().extent(GuestOffset(last), 512)?;
    let unit = node.writing().map_or(1, |writing| writing.fill_unit().max(1));
    if !matches!(extent.kind, ExtentKind::Unallocated(_)) || old.is_multiple_of(unit) {
        return Ok(());
    }
    resizing(node)?.check_over(size, fill, covered)?;
    let (mut sector, mut scratch) = ([0; 512], Scratch::default());
    node.read(GuestOffset(last), &mut sector, &mut scratch)?;
    node.write(GuestOffset(last), &sector, &mut scratch)
}

/// Makes files beside an image that is there, and replaces its own.
struct FilesBeside<'a> {
    node: &'a Node,
    /// What has no name yet.
    staging: Mutex<Option<Staging>>,
    /// The names of the files beside.
    made: Mutex<Vec<PathBuf>>,
}

impl FilesBeside<'_> {
    /// What the names of new files are relative to: the image's name, or, where that is a link, and the other files are
    /// beside what it leads to, that.
    fn base(&self) -> Option<OsString> {
        let base = self.node.origin().base.as_deref()?;
        let target = std::fs::canonicalize(base).ok()?;
        let folder = |path: &Path| path.parent().map(Path::to_owned);
        let mut others = self.node.driver().files().iter().skip(1).peekable();
        let there = others.peek().is_some() && others.all(|file| folder(Path::new(&file.name)) == folder(&target));
        Some(if there { target.into_os_string() } else { base.to_owned() })
    }

    fn staging(&self) -> MutexGuard<'_, Option<Staging>> {
        self.staging.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl ResizeFiles for FilesBeside<'_> {
    fn covered(&self) -> u64 {
        self.node.backing().map_or(0, |below| below.virtual_size())
    }

    fn beside(&self, name: &OsStr) -> Result<Arc<dyn Storage>> {
        let full = self.base().and_then(|base| name::literally_beside(Some(&base), name));
        let full =
            full.ok_or_else(|| Error::invalid(format!("Cannot tell where '{}' is to be made", name.display())))?;
        let path = PathBuf::from(full);
        if path.symlink_metadata().is_ok() {
            let shown = path.display();
            let text = format!("'{shown}' is there already, and would become a part of the image");
            let advice = "If a resize that was stopped has left it there, remove it and try again.";
            return Err(Error::invalid(text).hint(advice));
        }
        let neighbour = self.node.driver().files().last();
        let like = neighbour.and_then(|file| Like::file(Path::new(&file.name)));
        let how = CreateHow { secondary: true, like, ..CreateHow::default() };
        let made = self
            .staging()
            .get_or_insert_with(|| Staging::new(CacheMode::Writeback, Durability::Always))
            .create_with(&path, &how)?;
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push(path);
        Ok(made)
    }

    fn commit(&self, main: &[u8]) -> Result<Option<Arc<dyn Storage>>> {
        let staging = self.staging().take().unwrap_or_else(|| Staging::new(CacheMode::Writeback, Durability::Always));
        let mut new = None;
        if self.node.origin().inner.is_empty()
            && let Some(path) = self.node.origin().base.as_deref().map(PathBuf::from)
            && let Some(file) = self.node.driver().files().first()
            && let Some(storage) = staging.replace(&path, &*file.storage)?
        {
            storage.write_at(0, main).with_context(|| format!("Could not write '{}'", path.display()))?;
            new = Some(storage);
        }
        staging.commit()?;
        if let Some(storage) = &new {
            // The name means this file now. Who took the lock on it first may keep it: we are about to end.
            let _ = crate::storage::lock(&**storage, Access::WRITE);
        }
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_positive_and_fit() {
        assert_eq!(target(10, NewSize::Absolute(1)).ok(), Some(1));
        assert_eq!(target(10, NewSize::More(5)).ok(), Some(15));
        assert_eq!(target(10, NewSize::Less(9)).ok(), Some(1));
        for (current, new) in [
            (10, NewSize::Absolute(0)),
            (10, NewSize::Absolute(1 << 63)),
            (10, NewSize::Less(10)),
            (10, NewSize::Less(11)),
            (10, NewSize::Less(u64::MAX)),
            (10, NewSize::More(u64::MAX)),
            (10, NewSize::More(i64::MAX as u64 - 9)),
        ] {
            assert!(target(current, new).is_err(), "{current} {new:?}");
        }
    }
}
