//! The conversion itself: from opened sources to an image that is there, or is not.
//!
//! Invariant: nothing is changed before everything that can be refused has been refused.

use std::sync::Arc;

use super::{Conversion, bitmaps};
use crate::block::error::{Operation, Place, PlacePart};
use crate::block::{Error, ErrorKind, GuestOffset, ImageRef, Node, OpenHow, Opener, Purpose, Result};
use crate::crypto::Digest;
use crate::ops::checksum::{self, Copied};
use crate::ops::copy::{self, Above, CopyOptions, GuestDigest, Joined, Observer, TargetFacts};
use crate::ops::create::NewImage;
use crate::ops::read_from::spare;
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
    /// To a new image. It appears when it is complete. The digest of what was copied, if there was to be one.
    pub fn to_new(&self, new: &NewImage, opener: &Opener<'_>) -> Result<Option<Digest>> {
        let target = StagedTarget::make(new, &self.conversion.sources, self.cache, opener, NewImage::converting)?;
        let copied = target.facts().and_then(|facts| self.run(target.node(), facts));
        let digest = match copied {
            Ok(digest) => digest,
            Err(error) => return target.finish(Err(error)).map(|()| None),
        };
        let target = if self.conversion.proof.verify { target.read_again(new, opener)? } else { target };
        let verified = if self.conversion.proof.verify { self.verify(target.node(), digest) } else { Ok(()) };
        target.finish(verified)?;
        Ok(digest)
    }

    /// To an image that is there, whose size comes with the digest.
    pub fn to_existing(&self, image: &ImageRef, how: &OpenHow, opener: &Opener<'_>) -> Result<(Option<Digest>, u64)> {
        let cache = self.cache.unwrap_or(CacheMode::Unsafe);
        let target = opener.open(image, &OpenHow { purpose: Purpose::Write, cache, ..how.clone() })?;
        spare(&self.conversion.sources, &target).map_err(|error| error.about(target.name()))?;
        let facts = TargetFacts { reads_zero: self.conversion.target_is_zero, ..TargetFacts::default() };
        let done = self.run(&target, facts);
        if done.is_err() {
            // What was written so far is kept in an image that opens, and marks that all went well are not set; the
            // first error is the one to tell.
            let _ = target.driver().flush();
        }
        let (digest, size) = (done?, target.virtual_size());
        if self.conversion.proof.verify {
            drop(target);
            let again = opener.open(image, &OpenHow { purpose: Purpose::ReadBack, cache, ..how.clone() })?;
            self.verify(&again, digest)?;
        }
        Ok((digest, size))
    }

    /// Whether the target, opened again, holds what was copied; behind that a new image is zeros.
    pub(super) fn verify(&self, target: &Arc<Node>, digest: Option<Digest>) -> Result<()> {
        self.observer.phase("verify");
        let Conversion { sources, copy: options, new, .. } = self.conversion;
        let Some(digest) = digest else { return Ok(()) };
        let copied = Copied { sources, target, alone: new.is_some(), salvaged: options.salvage };
        if copied.holds(digest, self.observer)? {
            return Ok(());
        }
        let error = Error::new(ErrorKind::Mismatch, "what was read back is not what was written");
        Err(match copied.first_difference()? {
            Some(at) => error.at(Place {
                operation: Operation::Read,
                file: target.name().to_owned(),
                part: PlacePart::Guest(GuestOffset(at)),
                host: None,
            }),
            // It is what the sources hold by now.
            None => error.naming(target.name()).about(target.name()),
        })
    }

    /// What makes the digest of the sources on the way, if there is to be one.
    pub(super) fn digest(&self) -> Option<GuestDigest> {
        let Conversion { sources, copy: options, proof, .. } = self.conversion;
        proof.kind().map(|kind| GuestDigest::new(Joined::new(sources, None), kind, options.salvage))
    }

    /// The digest of all that was copied, which is refused where another one is expected.
    pub(super) fn checked(&self, digest: Option<GuestDigest>) -> Result<Option<Digest>> {
        let Conversion { sources, proof, .. } = self.conversion;
        let digest = digest.map(GuestDigest::finish).transpose()?;
        if let (Some(digest), Some(expected)) = (digest, proof.expected) {
            checksum::check(sources.first().map_or("", |source| source.name()), digest, expected)?;
        }
        Ok(digest)
    }

    pub(super) fn run(&self, target: &Node, facts: TargetFacts) -> Result<Option<Digest>> {
        self.run_with(target, facts, &self.conversion.copy, self.observer, self.digest())
    }

    /// The same, done and seen otherwise.
    pub(super) fn run_with(
        &self,
        target: &Node,
        facts: TargetFacts,
        options: &CopyOptions,
        observer: &dyn Observer,
        digest: Option<GuestDigest>,
    ) -> Result<Option<Digest>> {
        let Conversion { sources, .. } = self.conversion;
        if options.compress && target.driver().cipher().is_some() {
            // Compressed units would lie there for everybody to read.
            return Err(Error::invalid("Compression and encryption not supported at the same time"));
        }
        let above = if self.conversion.backed { above(sources, target, facts.blank) } else { None };
        let source = Joined::new(sources, above);
        let bitmaps = sources.first().filter(|_| self.conversion.bitmaps);
        bitmaps.map_or(Ok(()), |source| bitmaps::check(source, target))?;
        copy::copy_with(&source, target, options, facts, observer, digest.as_ref())?;
        let digest = self.checked(digest)?;
        bitmaps.map_or(Ok(()), |source| bitmaps::copy(source, target))?;
        target.driver().close()?;
        Ok(digest)
    }
}
