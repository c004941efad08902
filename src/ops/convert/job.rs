//! The conversion itself: from opened sources to an image that is there, or is not.
//!
//! Invariant: nothing is changed before everything that can be refused has been refused.

use std::sync::Arc;

use super::{Conversion, bitmaps};
use crate::block::{Error, ImageRef, Node, OpenHow, Opener, Purpose, Result};
use crate::ops::copy::{self, Above, Joined, Observer, TargetFacts};
use crate::ops::create::NewImage;
use crate::ops::staged::StagedTarget;
use crate::storage::{CacheMode, Identity};

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

/// What lies above the target's backing file, where it has one and was asked for it.
fn above(sources: &[Arc<Node>], target: &Node, blank: bool) -> Option<Above> {
    let (Some(source), Some(backing)) = (sources.first(), target.backing()) else { return None };
    let layers = layers_above(source, backing);
    Some(Above { layers, backing_len: backing.virtual_size(), blank_past: blank })
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
    /// To a new image. It appears when it is complete.
    pub fn to_new(&self, new: &NewImage, opener: &Opener<'_>) -> Result<()> {
        let target = StagedTarget::make(new, self.cache, opener, NewImage::converting)?;
        let done = target.facts().and_then(|facts| self.run(target.node(), facts));
        target.finish(done)
    }

    /// To an image that is there.
    pub fn to_existing(&self, image: &ImageRef, how: &OpenHow, opener: &Opener<'_>) -> Result<()> {
        let how = OpenHow { purpose: Purpose::Write, cache: self.cache.unwrap_or(CacheMode::Unsafe), ..how.clone() };
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
