//! The files that a layer is made of, where they end, and how they change when an image is resized.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::{Context, Operation, Place, PlacePart};
use super::{Error, Extent, ExtentKind, GuestOffset, HostOffset, HostPlace, Result};
use crate::storage::{Event, Storage};

/// A file that a layer is made of.
#[derive(Debug, Clone)]
pub struct Child {
    /// What it is to the layer: `file`, `data-file`, `extents.0`.
    pub role: String,
    /// Its name, as it is shown.
    pub name: String,
    /// The name of the driver that gives its bytes.
    pub driver: &'static str,
    /// Its bytes.
    pub storage: Arc<dyn Storage>,
}

/// Where a file ends that nobody cuts: it is asked for its length only where something lies past what is known.
#[derive(Debug, Default)]
pub struct FileEnd(AtomicU64);

impl FileEnd {
    /// Where the file ends, if that is before `wanted`; else some offset from there on.
    pub fn reach(&self, file: &dyn Storage, wanted: u64) -> Result<u64> {
        let known = self.0.load(Ordering::Relaxed);
        if wanted <= known {
            return Ok(known);
        }
        let end = file.len().context("Could not get the length of the file")?;
        self.0.store(end, Ordering::Relaxed);
        Ok(end)
    }

    /// Refuses a table of `len` bytes that does not lie in the file, which counts in whole sectors.
    pub fn require(&self, file: &dyn Storage, what: &str, at: u64, len: u64) -> Result<()> {
        let wanted = at.saturating_add(len);
        let end = self.reach(file, wanted)?;
        if end.checked_next_multiple_of(512).is_some_and(|end| end < wanted) {
            Err(Error::truncated(what, at, end))
        } else {
            Ok(())
        }
    }
}

#[allow(clippy::len_without_is_empty)]
impl Child {
    /// What lies there as it is: data, or a hole.
    pub fn extent(&self, start: GuestOffset, place: HostPlace, max: u64) -> Result<Extent> {
        let host = self.storage.extent(place.at.get(), max).at(|| self.doing(Operation::Status, start, place.at))?;
        let kind = if host.is_zero() { ExtentKind::Zero(Some(place)) } else { ExtentKind::Data(place) };
        Ok(Extent { start, len: host.len, kind })
    }

    /// The same where the disk does not end with the file: what lies past its end is data that is missing.
    pub fn stored_extent(&self, start: GuestOffset, place: HostPlace, max: u64) -> Result<Extent> {
        let mut extent = self.extent(start, place, max)?;
        if matches!(extent.kind, ExtentKind::Zero(_)) {
            let doing = || self.doing(Operation::Status, start, place.at);
            match self.storage.len().at(doing)?.saturating_sub(place.at.get()) {
                0 => extent.kind = ExtentKind::Data(place),
                there => extent.len = extent.len.min(there),
            }
        }
        Ok(extent)
    }

    /// What was being done, should it fail.
    pub(super) fn doing(&self, operation: Operation, guest: GuestOffset, host: HostOffset) -> Place {
        Place { operation, file: self.name.clone(), part: PlacePart::Guest(guest), host: Some(host) }
    }

    /// Its length in bytes.
    pub fn len(&self) -> Result<u64> {
        self.storage.len().with_context(|| format!("{}: could not get the length of the file", self.name))
    }

    /// Returns once everything written to it is on stable storage.
    pub fn flush(&self) -> Result<()> {
        self.storage.announce(Event::FLUSH_TO_DISK);
        let done = self.storage.flush().with_context(|| format!("{}: could not flush", self.name));
        done.map_err(|error| error.about(&*self.name))
    }
}

/// The backing file as a header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingRef {
    /// The name, as written there: bytes, which need not be text.
    pub name: OsString,
    /// The format, if written there.
    pub format: Option<String>,
    /// What a file in the image's folder is looked for as where there is none of that name, in this order.
    pub elsewhere: Vec<OsString>,
}

/// Makes files while an image is resized.
pub trait ResizeFiles {
    /// Bytes of the disk that the backing file covers: what it holds past the old end must not show.
    fn covered(&self) -> u64 {
        0
    }

    /// Makes a file beside the main one. It has no name yet; one that is taken is refused.
    fn beside(&self, name: &OsStr) -> Result<Arc<dyn Storage>>;
    /// Gives the files made so far their names, then makes `main` the content of the main file: all of it, or none.
    /// After an error there are no new names. `None` where the main file has to stay as it is (a hard link, an
    /// image in an image): the others have their names, it is as it was.
    fn commit(&self, main: &[u8]) -> Result<Option<Arc<dyn Storage>>>;
}

/// For images that lie where no files can be made.
#[derive(Debug, Clone, Copy)]
pub struct NoFiles;

impl ResizeFiles for NoFiles {
    fn beside(&self, name: &OsStr) -> Result<Arc<dyn Storage>> {
        Err(Error::unsupported(format!("The file '{}' cannot be made here", name.display())))
    }

    fn commit(&self, _main: &[u8]) -> Result<Option<Arc<dyn Storage>>> {
        Ok(None)
    }
}
