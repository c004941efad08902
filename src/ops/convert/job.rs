//! The conversion itself: from opened sources to an image that is there, or is not.
//!
//! Invariant: nothing is changed before everything that can be refused has been refused.

use std::sync::Arc;

use super::{Conversion, bitmaps};
use crate::block::error::Context;
use crate::block::{BlockDriver, Error, ExtentKind, GuestOffset, ImageRef, Node, OpenHow, Opener, Purpose, Result};
use crate::ops::copy::{self, Above, Joined, Observer, TargetFacts};
use crate::ops::create::{self, NewImage};
use crate::storage::staging::{Durability, Staging};
use crate::storage::{self, CacheMode, Identity};

fn identity(node: &Node) -> Option<Identity> {
    node.driver().files().first().and_then(|child| child.storage.facts().identity)
}

/// How many layers of the source lie above the target's backing file: those that have to be copied. One where it
/// is not in the source's chain: then it must be a copy of what lies below the top layer.
fn layers_above(source: &Node, backing: &Node) -> usize {
    let wanted = identity(backing);
    let mut node = source.backing();
    let mut depth = 1;
    while let Some(below) = node {
        if wanted.is_some() && identity(below) == wanted {
            return depth;
        }
        node = below.backing();
        depth += 1;
    }
    1
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

/// What lies above the target's backing file, where it has one and was asked for it.
fn above(sources: &[Arc<Node>], target: &Node, blank: bool) -> Option<Above> {
    let (Some(source), Some(backing)) = (sources.first(), target.backing()) else { return None };
    let layers = layers_above(source, backing);
    Some(Above { layers, backing_len: backing.virtual_size(), blank_past: blank })
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

/// Opens the target, and converts.
pub struct Job<'a> {
    /// What was decided.
    pub conversion: &'a Conversion,
    /// How the target is cached, where the user says so.
    pub cache: Option<CacheMode>,
    /// Receives progress and warnings.
    pub observer: &'a dyn Observer,
}

impl Job<'_> {
    /// How the target is cached.
    fn cache(&self) -> CacheMode {
        self.cache.unwrap_or(CacheMode::Unsafe)
    }

    /// What of a new image is on stable storage when it appears. `unsafe` is the default, but only what the user says
    /// is taken by the word.
    fn durability(&self) -> Durability {
        match self.cache {
            None => Durability::Replacing,
            Some(CacheMode::Unsafe) => Durability::Never,
            Some(_) => Durability::Always,
        }
    }

    /// To a new image. It appears when it is complete.
    pub fn to_new(&self, new: &NewImage, opener: &Opener<'_>) -> Result<()> {
        let staging = Staging::new(self.cache(), self.durability());
        let target = create::create_open(new, &staging, opener, self.cache())?;
        // A new file is a hole. A device holds whatever it held: what the format maps already is not zeros, nor is a
        // hole of the host where data is encrypted. What others can see must not be mapped before it is filled.
        let unnamed = staging.is_unseen();
        let holes_are_zeros = staging.is_blank() && target.driver().cipher().is_none();
        let blank = holes_are_zeros || stores_nothing(target.driver())?;
        let reads_zero = target.backing().is_none() && blank;
        let facts = TargetFacts { unnamed, reads_zero, blank };
        self.run(&target, facts).map_err(|error| no_room_for_both(error, &staging))?;
        drop(target);
        staging.commit().with_context(|| format!("Could not create '{}'", new.name.to_string_lossy()))
    }

    /// To an image that is there.
    pub fn to_existing(&self, image: &ImageRef, how: &OpenHow, opener: &Opener<'_>) -> Result<()> {
        let how = OpenHow { purpose: Purpose::Write, cache: self.cache(), ..how.clone() };
        let target = opener.open(image, &how)?;
        let facts = TargetFacts { reads_zero: self.conversion.target_is_zero, ..TargetFacts::default() };
        let done = self.run(&target, facts);
        if done.is_err() {
            // What was written so far is kept in an image that opens, and marks that all went well are not set; the
            // first error is the one to tell.
            let _ = target.driver().flush();
        }
        done
    }

    fn run(&self, target: &Node, facts: TargetFacts) -> Result<()> {
        let Conversion { sources, copy: options, .. } = self.conversion;
        if options.compress && target.driver().cipher().is_some() {
            // Compressed units would lie there for everybody to read.
            return Err(Error::invalid("Compression and encryption not supported at the same time"));
        }
        let above = if self.conversion.backed { above(sources, target, facts.blank) } else { None };
        let source = Joined::new(sources, above);
        let bitmaps = sources.first().filter(|_| self.conversion.bitmaps);
        bitmaps.map_or(Ok(()), |source| bitmaps::check(source, target))?;
        copy::copy(&source, target, options, facts, self.observer)?;
        bitmaps.map_or(Ok(()), |source| bitmaps::copy(source, target))?;
        target.driver().close()
    }
}
