//! The conversion itself: from opened sources to an image that is there, or is not.
//!
//! Invariant: nothing is changed before everything that can be refused has been refused.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::{Conversion, WayOut, bitmaps};
use crate::block::error::{Context, Operation, Place, PlacePart};
use crate::block::{
    Error, ErrorKind, GuestOffset, ImageRef, MadeFiles, Node, OpenHow, Opener, OptionTree, Purpose, Result,
};
use crate::crypto::Digest;
use crate::ops::checksum::{self, Copied};
use crate::ops::copy::{self, Above, CopyOptions, GuestDigest, Joined, Observer, TargetFacts};
use crate::ops::create::NewImage;
use crate::ops::staged::StagedTarget;
use crate::storage::in_order::InOrder;
use crate::storage::outgoing::Outgoing;
use crate::storage::temporary::large_file;
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

/// What lies above the target's backing file, where it has one and was asked for it.
fn above(sources: &[Arc<Node>], target: &Node, blank: bool) -> Option<Above> {
    let (Some(source), Some(backing)) = (sources.first(), target.backing()) else { return None };
    let layers = layers_above(source, backing);
    Some(Above { layers, backing_len: backing.virtual_size(), blank_past: blank })
}

/// What is read at once from a temporary file.
const PIECE: usize = 1 << 20;

fn writing(new: &NewImage) -> String {
    format!("{}: error while writing", new.name.to_string_lossy())
}

/// Sees to it that nobody waits at a sink for one who has failed.
struct Ending<'a> {
    observer: &'a dyn Observer,
    sink: &'a InOrder,
}

impl Observer for Ending<'_> {
    fn wants_progress(&self) -> bool {
        self.observer.wants_progress()
    }

    fn progress(&self, done: u64, total: u64) {
        self.observer.progress(done, total);
    }

    fn is_cancelled(&self) -> bool {
        self.observer.is_cancelled()
    }

    fn failed(&self) {
        self.sink.give_up();
    }

    fn note(&self, line: &str) {
        self.observer.note(line);
    }

    fn warn(&self, text: &str) {
        self.observer.warn(text);
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
    /// To a new image. It appears when it is complete. The digest of what was copied, if there was to be one.
    pub fn to_new(&self, new: &NewImage, opener: &Opener<'_>) -> Result<Option<Digest>> {
        let target = StagedTarget::make(new, self.cache, opener, NewImage::converting)?;
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

    /// From front to back: a raw disk at once, what has another order by way of a temporary file.
    pub fn away(&self, new: &NewImage, way: &WayOut, opener: &Opener<'_>) -> Result<Option<Digest>> {
        let shown = new.name.to_string_lossy();
        if new.format.name() == "raw" {
            return self.raw_away(new, way, opener);
        }
        let name = large_file().map_err(storage::Error::from);
        let name = name.with_context(|| format!("Could not keep what goes to '{shown}' in a temporary file"))?;
        let path = name.path().unwrap_or(Path::new(""));
        let (format, options) = (new.format, new.options.clone());
        let kept = NewImage { name: path.into(), format, size: new.size, options, ids: new.ids };
        let target = StagedTarget::make(&kept, self.cache, opener, NewImage::converting)?;
        let done = match target.node().driver().files().len() {
            1 => target.facts().and_then(|facts| self.run(target.node(), facts)),
            _ => {
                let what = if way.is_pipe() { "is a pipe" } else { "is written from front to back" };
                Err(Error::unsupported(format!("'{shown}' {what}, and the image would have several files")))
            }
        };
        let (done, digest) = match done {
            Ok(digest) => (Ok(()), digest),
            Err(error) => (Err(error), None),
        };
        target.finish(done)?;
        let file = File::open(path).map_err(storage::Error::from)?;
        let len = file.metadata().map_err(storage::Error::from)?.len();
        let mut sink = way.open(len).with_context(|| writing(new))?;
        self.send(&file, len, &mut *sink).with_context(|| writing(new))?;
        Ok(digest)
    }

    /// What a file holds.
    fn send(&self, file: &File, len: u64, sink: &mut dyn Outgoing) -> Result<()> {
        let (mut at, mut piece) = (0, vec![0; PIECE]);
        while at < len {
            if self.observer.is_cancelled() {
                return Err(Error::new(ErrorKind::Io, "it was ended"));
            }
            let n = usize::try_from(len - at).map_or(PIECE, |left| left.min(PIECE));
            file.read_exact_at(&mut piece[..n], at).map_err(storage::Error::from)?;
            sink.put(&piece[..n])?;
            at += n as u64;
        }
        Ok(sink.complete()?)
    }

    fn raw_away(&self, new: &NewImage, way: &WayOut, opener: &Opener<'_>) -> Result<Option<Digest>> {
        let sink = way.open(new.size).with_context(|| writing(new))?;
        let sink = Arc::new(InOrder::new(sink, new.size));
        let (path, options) = (new.name.clone(), OptionTree::new());
        let made = MadeFiles { main: sink.clone(), protocol: "file", path, beside: Vec::new(), options };
        let how = OpenHow {
            format: Some(new.format.name().to_owned()),
            purpose: Purpose::Write,
            cache: CacheMode::Unsafe,
            ..OpenHow::default()
        };
        let target = opener.open_made(&new.name, made, &how)?;
        let ending = Ending { observer: self.observer, sink: &sink };
        // Zeros are bytes like others.
        let options = CopyOptions { sparse: 0, ..self.conversion.copy.clone() };
        let digest = self.digest();
        let source = Joined::new(&self.conversion.sources, None);
        let copied = copy::copy_with(&source, &target, &options, TargetFacts::default(), &ending, digest.as_ref());
        // What was expected is known before anybody can see it.
        let digest = copied.and_then(|()| self.checked(digest)).inspect_err(|_| sink.abandon())?;
        match sink.complete().with_context(|| writing(new))? {
            true => Ok(digest),
            false => Err(Error::new(ErrorKind::Io, format!("{}: not all of it was written", new.name.display()))),
        }
    }

    /// To an image that is there. The digest of what was copied, if there was to be one.
    pub fn to_existing(&self, image: &ImageRef, how: &OpenHow, opener: &Opener<'_>) -> Result<Option<Digest>> {
        let cache = self.cache.unwrap_or(CacheMode::Unsafe);
        let target = opener.open(image, &OpenHow { purpose: Purpose::Write, cache, ..how.clone() })?;
        let facts = TargetFacts { reads_zero: self.conversion.target_is_zero, ..TargetFacts::default() };
        let done = self.run(&target, facts);
        if done.is_err() {
            // What was written so far is kept in an image that opens, and marks that all went well are not set; the
            // first error is the one to tell.
            let _ = target.driver().flush();
        }
        let digest = done?;
        if self.conversion.proof.verify {
            drop(target);
            let again = opener.open(image, &OpenHow { purpose: Purpose::Read, cache, ..how.clone() })?;
            self.verify(&again, digest)?;
        }
        Ok(digest)
    }

    /// Whether the target, opened again, holds what was copied; behind that a new image is zeros.
    fn verify(&self, target: &Arc<Node>, digest: Option<Digest>) -> Result<()> {
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
    fn digest(&self) -> Option<GuestDigest> {
        let Conversion { sources, copy: options, proof, .. } = self.conversion;
        proof.kind().map(|kind| GuestDigest::new(Joined::new(sources, None), kind, options.salvage))
    }

    /// The digest of all that was copied, which is refused where another one is expected.
    fn checked(&self, digest: Option<GuestDigest>) -> Result<Option<Digest>> {
        let Conversion { sources, proof, .. } = self.conversion;
        let digest = digest.map(GuestDigest::finish).transpose()?;
        if let (Some(digest), Some(expected)) = (digest, proof.expected) {
            checksum::check(sources.first().map_or("", |source| source.name()), digest, expected)?;
        }
        Ok(digest)
    }

    fn run(&self, target: &Node, facts: TargetFacts) -> Result<Option<Digest>> {
        let Conversion { sources, copy: options, .. } = self.conversion;
        if options.compress && target.driver().cipher().is_some() {
            // Compressed units would lie there for everybody to read.
            return Err(Error::invalid("Compression and encryption not supported at the same time"));
        }
        let above = if self.conversion.backed { above(sources, target, facts.blank) } else { None };
        let source = Joined::new(sources, above);
        let bitmaps = sources.first().filter(|_| self.conversion.bitmaps);
        bitmaps.map_or(Ok(()), |source| bitmaps::check(source, target))?;
        let digest = self.digest();
        copy::copy_with(&source, target, options, facts, self.observer, digest.as_ref())?;
        let digest = self.checked(digest)?;
        bitmaps.map_or(Ok(()), |source| bitmaps::copy(source, target))?;
        target.driver().close()?;
        Ok(digest)
    }
}
