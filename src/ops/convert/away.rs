//! To what takes a file from front to back alone: a pipe, an object of a store.
//!
//! An image whose data have their places when it is made ([`FileOrder::Laid`]), or that is written as it lies
//! ([`FileOrder::Appended`]), goes there as it is read. Of others the tables come first, and are known last: the disk is
//! gone through twice, the first time into a file that keeps all but the disk's data, in memory ([`Job::plan`]). What
//! that is no way for (see there) is kept in a temporary file first.
//!
//! Invariant: the bytes are those of the file that a conversion to a path makes.

use std::path::PathBuf;
use std::sync::Arc;

use super::room::is_far;
use super::{Job, WayOut};
use crate::block::error::Context;
use crate::block::{
    Error, ErrorKind, ExtentKind, FileOrder, GuestOffset, ImageRef, MadeFiles, Node, OpenHow, Opener, OptionTree,
    Purpose, Result,
};
use crate::crypto::Digest;
use crate::ops::copy::{self, CopyOptions, Joined, Observer, Taking, TargetFacts};
use crate::ops::create::{self, NewImage};
use crate::ops::staged::StagedTarget;
use crate::storage::arranged::{Arranged, DiskRun, FilePlan};
use crate::storage::in_order::InOrder;
use crate::storage::outgoing::Outgoing;
use crate::storage::paged::PagedMemory;
use crate::storage::temporary::{hidden, large_folder};
use crate::storage::trailing::Trailing;
use crate::storage::{self, CacheMode, Storage};

/// What is read at once from a temporary file.
const PIECE: usize = 1 << 20;

/// Bytes of a file beside the disk's data that are kept in memory: the tables of 1.6 TiB in clusters of 64 KiB.
const MOST_KEPT: u64 = 256 << 20;

/// Runs of data whose places are kept in memory.
const MOST_RUNS: usize = 4 << 20;

fn writing(new: &NewImage) -> String {
    format!("{}: error while writing", new.name.to_string_lossy())
}

/// Shows how far the first look at the disk is. What is wrong with it is told by the second.
struct Looking<'a>(&'a dyn Observer);

impl Observer for Looking<'_> {
    fn wants_progress(&self) -> bool {
        self.0.wants_progress()
    }

    fn progress(&self, done: u64, total: u64) {
        self.0.progress(done, total);
    }

    fn is_cancelled(&self) -> bool {
        self.0.is_cancelled()
    }
}

impl Job<'_> {
    /// From front to back. The digest of what was copied, if there was to be one.
    pub fn away(&self, new: &NewImage, way: &WayOut, opener: &Opener<'_>) -> Result<Option<Digest>> {
        let digest = self.send(new, way, opener)?;
        if self.conversion.proof.verify {
            let format = Some(new.format.name().to_owned());
            let how = OpenHow { format, purpose: Purpose::ReadBack, ..OpenHow::default() };
            self.verify(&opener.open(&ImageRef::name(&new.name), &how)?, digest)?;
        }
        Ok(digest)
    }

    fn send(&self, new: &NewImage, way: &WayOut, opener: &Opener<'_>) -> Result<Option<Digest>> {
        let order = new.format.creating().map(|create| create.file_order(&new.options));
        let plan = match order {
            Some(FileOrder::Appended) => return self.append(new, way, opener),
            Some(FileOrder::Laid) => self.plan(new, opener, false)?,
            Some(FileOrder::Planned) if self.may_look_twice(new) => self.plan(new, opener, true)?,
            _ => None,
        };
        match plan {
            Some(plan) => self.arrange(new, way, plan, opener),
            None => self.by_file(new, way, opener),
        }
    }

    /// Whether it is cheap to go through the disk twice, and all that is found the first time is where its data go: what
    /// is encoded, encrypted, or in part left to a backing file is not told by the disk alone.
    fn may_look_twice(&self, new: &NewImage) -> bool {
        let plain = new.format.creating().is_some_and(|create| !create.encrypts(&new.options));
        let near = !self.conversion.sources.iter().any(|source| is_far(source));
        plain && near && !self.conversion.copy.compress && !self.conversion.backed
    }

    /// Makes the image but for the disk's data. `look`: their places follow from what they are. Nothing where they would
    /// not lie in their order, or where that is more than is kept in memory.
    fn plan(&self, new: &NewImage, opener: &Opener<'_>, look: bool) -> Result<Option<FilePlan>> {
        let kept = Arc::new(PagedMemory::new(MOST_KEPT));
        let made = create::create_in(new, kept.clone(), opener, NewImage::converting);
        let filled = made.and_then(|(target, files)| {
            if look {
                self.observer.phase("plan");
                self.look(new, &target)?;
            }
            drop(target);
            let format = Some(new.format.name().to_owned());
            let how = OpenHow { format, purpose: Purpose::ReadBack, ..OpenHow::default() };
            opener.open_made(&new.name, files, &how)
        });
        let target = match filled {
            Err(_) if kept.is_full() => return Ok(None),
            filled => filled?,
        };
        let Some(runs) = self.runs(&target)? else { return Ok(None) };
        drop(target);
        if look {
            self.observer.phase("convert");
        }
        let len = kept.len()?;
        Ok(Some(FilePlan { kept, runs, len }))
    }

    /// Goes through the disk, and keeps nothing of it.
    fn look(&self, new: &NewImage, target: &Node) -> Result<()> {
        if new.ids.cid.is_some() {
            target.driver().keep_content_id();
        }
        let facts = TargetFacts { taking: Taking::Nothing, ..new_file(target) };
        let options = CopyOptions { rate: None, ..self.conversion.copy.clone() };
        self.run_with(target, facts, &options, &Looking(self.observer), None).map(drop)
    }

    /// Where the disk's data lie, if they lie in order.
    fn runs(&self, target: &Node) -> Result<Option<Vec<DiskRun>>> {
        let total: u64 = self.conversion.sources.iter().map(|source| source.virtual_size()).sum();
        let (total, mut at, mut end) = (total.min(target.virtual_size()), 0, 0);
        let mut runs: Vec<DiskRun> = Vec::new();
        while at < total {
            let extent = target.driver().extent(GuestOffset(at), total - at)?;
            let len = extent.len.min(total - at);
            let place = match extent.kind {
                ExtentKind::Data(place) | ExtentKind::Zero(Some(place)) => Some(place),
                ExtentKind::Zero(None) | ExtentKind::Unallocated(_) => None,
                ExtentKind::Compressed(_) => return Ok(None),
            };
            if let Some(place) = place {
                let file = place.at.get();
                if place.file != 0 || file < end || runs.len() == MOST_RUNS {
                    return Ok(None);
                }
                match runs.last_mut() {
                    Some(last) if last.disk + last.len == at && end == file => last.len += len,
                    _ => runs.push(DiskRun { disk: at, file, len }),
                }
                end = file.saturating_add(len);
            }
            at = at.saturating_add(len.max(1));
        }
        Ok(Some(runs))
    }

    /// The disk from front to back, its data in their places.
    fn arrange(&self, new: &NewImage, way: &WayOut, plan: FilePlan, opener: &Opener<'_>) -> Result<Option<Digest>> {
        let sink = way.open(plan.len).with_context(|| writing(new))?;
        let size = self.conversion.sources.iter().map(|source| source.virtual_size()).sum();
        let file = Arc::new(InOrder::new(Box::new(Arranged::new(sink, plan)), size));
        let (path, options) = (new.name.clone(), OptionTree::new());
        let made = MadeFiles { main: file.clone(), protocol: "file", path, beside: Vec::new(), options };
        // The disk as it is.
        let format = opener.drivers().formats.last().map(|format| format.name().to_owned());
        let how = OpenHow { format, purpose: Purpose::Write, cache: CacheMode::Unsafe, ..OpenHow::default() };
        let disk = opener.open_made(&new.name, made, &how)?;
        let facts = TargetFacts { taking: Taking::InOrder, ..TargetFacts::default() };
        let digest = self.digest();
        let source = Joined::new(&self.conversion.sources, None);
        let copied = copy::copy_with(&source, &disk, &self.conversion.copy, facts, self.observer, digest.as_ref());
        // What was expected is known before anybody can see it.
        let digest = copied.and_then(|()| self.checked(digest)).inspect_err(|_| file.abandon())?;
        match file.complete().with_context(|| writing(new))? {
            true => Ok(digest),
            false => Err(Error::new(ErrorKind::Io, format!("{}: not all of it was written", new.name.display()))),
        }
    }

    /// As it is written.
    fn append(&self, new: &NewImage, way: &WayOut, opener: &Opener<'_>) -> Result<Option<Digest>> {
        // What cannot be compressed becomes a little longer.
        let most = new.size.saturating_add(new.size / 64).saturating_add(1 << 20);
        let sink = way.open(most).with_context(|| writing(new))?;
        let file = Arc::new(Trailing::new(sink));
        let written = create::create_in(new, file.clone(), opener, NewImage::converting).and_then(|(target, _)| {
            if new.ids.cid.is_some() {
                target.driver().keep_content_id();
            }
            file.begin();
            self.run(&target, TargetFacts { taking: Taking::InOrder, ..new_file(&target) })
        });
        let digest = written.inspect_err(|_| file.abandon())?;
        file.complete().with_context(|| writing(new))?;
        Ok(digest)
    }

    /// By way of a temporary file.
    fn by_file(&self, new: &NewImage, way: &WayOut, opener: &Opener<'_>) -> Result<Option<Digest>> {
        let shown = new.name.to_string_lossy();
        // A backing file is named from where the image lies; what lies nowhere is where we are. The name is never given.
        let folder = if self.conversion.backed { PathBuf::from(".") } else { large_folder() };
        let there = folder.metadata().map_err(storage::Error::from);
        there.with_context(|| format!("Could not keep what goes to '{shown}' in a temporary file"))?;
        let path = hidden(&folder.join("pipe"));
        let (format, options) = (new.format, new.options.clone());
        let kept = NewImage { name: path.into_os_string(), format, size: new.size, options, ids: new.ids };
        let target = StagedTarget::make(&kept, &self.conversion.sources, self.cache, opener, NewImage::converting)?;
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
        let file = target.keep_unnamed(done)?;
        let len = file.len()?;
        let mut sink = way.open(len).with_context(|| writing(new))?;
        self.send_file(&*file, len, &mut *sink).with_context(|| writing(new))?;
        Ok(digest)
    }

    /// What a file holds.
    fn send_file(&self, file: &dyn Storage, len: u64, sink: &mut dyn Outgoing) -> Result<()> {
        let (mut at, mut piece) = (0, vec![0; PIECE]);
        while at < len {
            if self.observer.is_cancelled() {
                return Err(Error::new(ErrorKind::Io, "it was ended"));
            }
            let n = usize::try_from(len - at).map_or(PIECE, |left| left.min(PIECE));
            file.read_at(at, &mut piece[..n])?;
            sink.put(&piece[..n])?;
            at += n as u64;
        }
        Ok(sink.complete()?)
    }
}

/// What is known of an image that has just been made in a file of nobody else.
fn new_file(target: &Node) -> TargetFacts {
    TargetFacts { unnamed: true, reads_zero: target.backing().is_none(), blank: true, ..TargetFacts::default() }
}
