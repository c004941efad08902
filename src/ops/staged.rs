//! A new image that is copied to: open already, and to be seen under its name once it is complete.
//!
//! Invariant: what fails leaves no file, and an older one of that name as it was.

use std::sync::Arc;

use super::copy::{Sharing, TargetFacts};
use super::create::{self, NewImage};
use super::read_from::{files_of, is_among};
use crate::block::error::Context;
use crate::block::{BlockDriver, Error, ExtentKind, GuestOffset, MadeFiles, Node, OpenHow, Opener, Purpose, Result};
use crate::storage::staging::{Durability, Staging};
use crate::storage::{self, CacheMode, Storage};

/// See the module.
pub struct StagedTarget {
    staging: Staging,
    node: Arc<Node>,
    files: MadeFiles,
    cache: CacheMode,
    name: String,
    sharing: Sharing,
}

impl StagedTarget {
    /// Makes it, of what `sources` hold. `cache` is what the user says, if that is said; `doing` is what is told of a
    /// failure.
    pub fn make(
        new: &NewImage,
        sources: &[Arc<Node>],
        cache: Option<CacheMode>,
        opener: &Opener<'_>,
        doing: fn(&NewImage) -> String,
    ) -> Result<Self> {
        let mode = cache.unwrap_or(CacheMode::Unsafe);
        let below = new.stands_on(opener);
        if is_among(&new.places(opener), &files_of(below.as_slice())) {
            let error = Error::invalid("Trying to create an image with the same filename as the backing file");
            return Err(error.context(doing(new)).about(new.shown()));
        }
        let read: Vec<_> = sources.iter().cloned().chain(below).collect();
        let staging = Staging::new(mode, durability(cache)).sparing(files_of(&read));
        let (node, files) = create::create_open(new, &staging, opener, mode, doing)?;
        if new.ids.cid.is_some() {
            node.driver().keep_content_id();
        }
        // Space that was asked for is its own.
        let own = new.options.text("preallocation").is_some_and(|mode| matches!(mode, "falloc" | "full"));
        let sharing = match create::may_share(opener.drivers(), new) {
            _ if own => Sharing::Never,
            true => Sharing::Always,
            false => Sharing::IfAsked,
        };
        Ok(Self { staging, node, files, cache: mode, name: new.shown(), sharing })
    }

    /// The image.
    pub fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// What is known of it before the first byte is copied.
    pub fn facts(&self) -> Result<TargetFacts> {
        // A new file is a hole. A device holds whatever it held: what the format maps already is not zeros, nor is a
        // hole of the host where data is encrypted. What others can see must not be mapped before it is filled.
        let unnamed = self.staging.is_unseen();
        let holes_are_zeros = self.staging.is_blank() && self.node.driver().cipher().is_none();
        let blank = holes_are_zeros || stores_nothing(self.node.driver())?;
        let reads_zero = self.node.backing().is_none() && blank;
        let sharing = match self.sharing {
            Sharing::Always if !unnamed => Sharing::IfAsked,
            sharing => sharing,
        };
        Ok(TargetFacts { unnamed, reads_zero, blank, sharing, ..TargetFacts::default() })
    }

    /// Opens it again as it lies in its files, to be read; it is closed.
    pub fn read_again(self, new: &NewImage, opener: &Opener<'_>) -> Result<Self> {
        let Self { node, files, cache, .. } = self;
        drop(node);
        let format = Some(new.format.name().to_owned());
        let how = OpenHow { format, purpose: Purpose::ReadBack, cache, ..OpenHow::default() };
        let node = opener.open_made(&new.name, files.clone(), &how)?;
        Ok(Self { node, files, ..self })
    }

    /// Its first file without a name, if all has gone well: it goes with what is given.
    pub fn keep_unnamed(self, done: Result<()>) -> Result<Arc<dyn Storage>> {
        let Self { staging, node, files, .. } = self;
        done.map_err(|error| no_room_for_both(error, &staging))?;
        let file = files.main.clone();
        drop((node, files));
        Ok(file)
    }

    /// Gives it its name, if all has gone well.
    pub fn finish(self, done: Result<()>) -> Result<()> {
        let Self { staging, node, files, name, .. } = self;
        done.map_err(|error| no_room_for_both(error, &staging))?;
        drop((node, files));
        staging.commit().with_context(|| format!("Could not create '{name}'"))
    }
}

/// What of a new image is on stable storage when it appears. `unsafe` is the default, but only what the user says is
/// taken by the word.
fn durability(cache: Option<CacheMode>) -> Durability {
    match cache {
        None => Durability::Replacing,
        Some(CacheMode::Unsafe) => Durability::Never,
        Some(_) => Durability::Always,
    }
}

/// Whether a layer's tables name no data at all.
fn stores_nothing(driver: &dyn BlockDriver) -> Result<bool> {
    let (mut at, size) = (0, driver.virtual_size());
    while at < size {
        let extent = driver.extent(GuestOffset(at), size - at)?;
        if !matches!(extent.kind, ExtentKind::Unallocated(_) | ExtentKind::Zero(_)) || extent.len == 0 {
            return Ok(false);
        }
        at = at.saturating_add(extent.len);
    }
    Ok(true)
}

/// Where an older file stays until it is replaced, the disk may be too small for both.
fn no_room_for_both(error: Error, staging: &Staging) -> Error {
    let full = error.storage().is_some_and(storage::Error::is_full);
    match staging.replaces().filter(|_| full) {
        Some(older) => error.hint(format!(
            "The older '{older}' stays until the new one is complete, and there is not room for both: -n writes to it \
             in place."
        )),
        None => error,
    }
}
