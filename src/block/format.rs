//! What is known of a format without an image: its name, how to recognise, open and create it.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::{Context, Operation, Place};
use super::opener::Notice;
use super::options::{CreateOptions, OptionSpec};
use super::{BlockDriver, Effort, Error, Extent, ExtentKind, GuestOffset, HostOffset, HostPlace, OptionTree, Result};
use crate::storage::Storage;

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
        Place { operation, file: self.name.clone(), guest, host: Some(host) }
    }

    /// Returns once everything written to it is on stable storage.
    pub fn flush(&self) -> Result<()> {
        self.storage.flush().with_context(|| format!("{}: could not flush", self.name))
    }
}

/// The backing file as a header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingRef {
    /// The name, as written there.
    pub name: String,
    /// The format, if written there.
    pub format: Option<String>,
    /// What a file in the image's folder is looked for as where there is none of that name, in this order.
    pub elsewhere: Vec<OsString>,
}

/// Opens the other files of a layer. The only way for a driver to a file that it was not given.
pub trait Related {
    /// Opens `name` (as found in the image, relative to the image) for the part `role`, writable if the image is.
    fn open(&self, role: &str, name: &OsStr) -> Result<Child>;

    /// Something that the user should know, though the image can be opened.
    fn notice(&self, notice: Notice) {
        let _ = notice;
    }
}

/// For unit tests: there are no other files.
#[cfg(test)]
#[derive(Debug)]
pub struct Alone;

#[cfg(test)]
impl Related for Alone {
    fn open(&self, _role: &str, name: &OsStr) -> Result<Child> {
        Err(Error::invalid(name.to_string_lossy()))
    }
}

/// What a driver is given to open a layer.
pub struct OpenRequest<'a> {
    /// The file that holds the header.
    pub file: Child,
    /// The user's options for this layer that are the format's own: the driver takes out those it knows; what
    /// is left is refused.
    pub options: &'a mut OptionTree,
    /// For reading and writing.
    pub write: bool,
    /// Only the header will be looked at: no keys are needed and related files may be missing.
    pub look_only: bool,
    /// The way to related files.
    pub related: &'a dyn Related,
}

/// Where identifiers and times come from: random and now, or fixed ones if the output is to be reproducible.
pub trait Ids: fmt::Debug + Sync {
    /// Seconds since the epoch.
    fn seconds(&self) -> u64;
    /// A version 4 UUID. `purpose` tells several of one image apart.
    fn uuid(&self, purpose: &str) -> [u8; 16];
    /// 32 random bits. `purpose` tells several of one image apart.
    fn word(&self, purpose: &str) -> u32;
}

/// Makes the files of a new image.
pub trait CreateFiles {
    /// The main file's name, as typed.
    fn name(&self) -> &str;
    /// Makes the file that carries the image's own name: empty, or a device as it is. Called once.
    fn main(&self) -> Result<Arc<dyn Storage>>;
    /// Makes a file beside it (`name` relative to the main file's folder, or absolute).
    fn beside(&self, name: &str) -> Result<Arc<dyn Storage>>;
}

/// Makes files while an image is resized.
pub trait ResizeFiles {
    /// Bytes of the disk that the backing file covers: what it holds past the old end must not show.
    fn covered(&self) -> u64 {
        0
    }

    /// Makes a file beside the main one. It has no name yet; one that is taken is refused.
    fn beside(&self, name: &str) -> Result<Arc<dyn Storage>>;
    /// Gives the files made so far their names, then makes `main` the content of the main file: all of it, or none.
    /// After an error there are no new names. `None` where the main file has to stay as it is (a hard link, an
    /// image in an image): the others have their names, it is as it was.
    fn commit(&self, main: &[u8]) -> Result<Option<Arc<dyn Storage>>>;
}

/// For images that lie where no files can be made.
#[derive(Debug, Clone, Copy)]
pub struct NoFiles;

impl ResizeFiles for NoFiles {
    fn beside(&self, name: &str) -> Result<Arc<dyn Storage>> {
        Err(Error::unsupported(format!("The file '{name}' cannot be made here")))
    }

    fn commit(&self, _main: &[u8]) -> Result<Option<Arc<dyn Storage>>> {
        Ok(None)
    }
}

/// What a new image shall be.
pub struct CreateRequest<'a> {
    /// The guest's disk size in bytes, as asked for.
    pub size: u64,
    /// All `-o` options, checked against [`Create::options`] and the protocol's.
    pub options: &'a CreateOptions,
    /// Makes the files.
    pub files: &'a dyn CreateFiles,
    /// Makes identifiers and times.
    pub ids: &'a dyn Ids,
    /// The way to the backing file's bytes, for a format that writes down what its backing file is.
    pub related: &'a dyn Related,
}

/// Able to be created.
pub trait Create: Sync {
    /// The format's own options, in the order of the `Formatting` line.
    fn options(&self) -> &'static [OptionSpec];

    /// Whether `-c` means anything.
    fn compresses(&self) -> bool {
        false
    }

    /// How the options say that data is to be encoded, which the image itself does not keep. `compress` says whether
    /// compression was asked for; options that would have no effect are refused.
    fn effort(&self, options: &CreateOptions, compress: bool) -> Result<Effort> {
        let _ = (options, compress);
        Ok(Effort::default())
    }

    /// Makes the image: complete, closed, all zeros or all backing file.
    fn create(&self, request: &CreateRequest<'_>) -> Result<()>;

    /// Whether a backing file can be named.
    fn has_backing(&self) -> bool {
        self.options().iter().any(|option| option.name == "backing_file")
    }
}

/// What is known of a format without an image: one static each.
pub trait Format: Sync + fmt::Debug {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// How sure we are, from the first 512 bytes and the file's name, that it is this format: 0 to 100.
    fn probe(&self, head: &[u8], name: &str) -> u32;

    /// Options that change what the guest sees: where they are given, a plain name does not name the image.
    fn strong_options(&self) -> &'static [&'static str] {
        &[]
    }

    /// Opens a layer.
    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>>;

    /// Able to be created.
    fn creating(&self) -> Option<&dyn Create> {
        None
    }

    /// Whether its driver answers `Unallocated` at all (can have a backing file).
    fn layered(&self) -> bool {
        self.creating().is_some_and(|create| create.has_backing())
    }
}

/// The format with that name.
pub fn find(formats: &[&'static dyn Format], name: &str) -> Result<&'static dyn Format> {
    formats
        .iter()
        .copied()
        .find(|format| format.name() == name)
        .ok_or_else(|| Error::invalid(format!("Unknown file format '{name}'")))
}
