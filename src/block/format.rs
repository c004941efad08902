//! What is known of a format without an image: its name, how to recognise, open and create it.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::sync::Arc;

use super::measure::Measure;
use super::nearest::nearest;
use super::notice::Notice;
use super::options::{CreateOptions, OptionSpec};
use super::{BlockDriver, Child, Effort, Error, OptionTree, Purpose, Result, Secrets};
use crate::storage::Storage;

/// Opens the other files of a layer. The only way for a driver to a file that it was not given.
pub trait Related {
    /// Opens `name` (as found in the image, relative to the image) for the part `role`, writable if the image is.
    fn open(&self, role: &str, name: &OsStr) -> Result<Child>;

    /// The name by which that file would be opened, as it is shown.
    fn shown(&self, name: &OsStr) -> String {
        name.to_string_lossy().into_owned()
    }

    /// The name of a file beside the image that ends so and starts as `is` says, of which it sees the first 512 bytes.
    fn sibling(&self, end: &str, is: &dyn Fn(&[u8]) -> bool) -> Option<OsString> {
        let _ = (end, is);
        None
    }

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
    /// The file that was named: where the header is, unless one of the others holds it.
    pub file: Child,
    /// The other files that options have named: of those that the format lists as [`Format::side_files`].
    pub side_files: Vec<Child>,
    /// The user's options for this layer that are the format's own: the driver takes out those it knows; what
    /// is left is refused.
    pub options: &'a mut OptionTree,
    /// What it is opened for.
    pub purpose: Purpose,
    /// Where keys are that the options name.
    pub secrets: &'a Secrets,
    /// The way to related files.
    pub related: &'a dyn Related,
}

/// Where identifiers and times come from: random and now, or fixed ones if the output is to be reproducible.
pub trait Ids: fmt::Debug + Sync {
    /// Seconds since the epoch.
    fn seconds(&self) -> u64;
    /// Whether they are the same at every run: then all else has to be, too.
    fn are_fixed(&self) -> bool;
    /// A version 4 UUID. `purpose` tells several of one image apart.
    fn uuid(&self, purpose: &str) -> [u8; 16];
    /// 32 random bits. `purpose` tells several of one image apart.
    fn word(&self, purpose: &str) -> u32;
}

/// Makes the files of a new image.
pub trait CreateFiles {
    /// The main file's path, without the protocol that may stand before it.
    fn name(&self) -> &OsStr;
    /// Makes the file that carries the image's own name: empty, or a device as it is. Called once.
    fn main(&self) -> Result<Arc<dyn Storage>>;
    /// Makes a file beside it. `name` is a path, however it is spelt: relative to the main file's folder, or absolute.
    fn beside(&self, name: &OsStr) -> Result<Arc<dyn Storage>>;
    /// Makes a file that the user named: from the working directory on, perhaps with a protocol. Gives the name that
    /// the image has for it.
    fn named(&self, name: &OsStr) -> Result<(Arc<dyn Storage>, OsString)>;
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
    /// Where keys are that the options name.
    pub secrets: &'a Secrets,
    /// The way to the backing file's bytes, for a format that writes down what its backing file is.
    pub related: &'a dyn Related,
}

/// In which order a new image's file comes to be, where it is written to from its first guest byte to its last one by
/// one: what it takes to write it from front to back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileOrder {
    /// All but the data of the disk is there when it is made, and so are their places.
    Laid,
    /// Each write makes final what lies before it.
    Appended,
    /// What lies before data is known when all data are: there is no telling before where these will lie.
    Planned,
}

/// Able to be created.
pub trait Create: Sync {
    /// The format's own options, in the order of the `Formatting` line.
    fn options(&self) -> &'static [OptionSpec];

    /// Whether `-c` means anything.
    fn compresses(&self) -> bool {
        false
    }

    /// Whether all data of an image with these options is stored compressed, asked for or not.
    fn always_compresses(&self, options: &CreateOptions) -> bool {
        let _ = options;
        false
    }

    /// Whether an image with these options is encrypted.
    fn encrypts(&self, options: &CreateOptions) -> bool {
        let _ = options;
        false
    }

    /// How the options say that data is to be encoded, which the image itself does not keep. `compress` says whether
    /// compression was asked for; options that would have no effect are refused.
    fn effort(&self, options: &CreateOptions, compress: bool) -> Result<Effort> {
        let _ = (options, compress);
        Ok(Effort::default())
    }

    /// In which order an image with these options is written. `Planned` is true of all.
    fn file_order(&self, options: &CreateOptions) -> FileOrder {
        let _ = options;
        FileOrder::Planned
    }

    /// Able to tell how large an image becomes.
    fn measuring(&self) -> Option<&dyn Measure> {
        None
    }

    /// Makes the image's files: complete, all zeros or all backing file. They stay open, and [`Format::open`] opens the image in
    /// them.
    fn create(&self, request: &CreateRequest<'_>) -> Result<()>;

    /// The options by which an image that was made with these is opened: where its key is.
    fn open_options(&self, options: &CreateOptions) -> OptionTree {
        let _ = options;
        OptionTree::new()
    }

    /// Whether it takes `preallocation` for itself, which else is the protocol's to judge.
    fn preallocates(&self) -> bool {
        self.options().iter().any(|option| option.name == "preallocation")
    }

    /// Whether an image with these options has no room for the disk that could be reserved, though its file could be.
    fn grows(&self, options: &CreateOptions) -> bool {
        let _ = options;
        false
    }

    /// Whether an image with these options has a disk, whose size has to be known.
    fn has_size(&self, options: &CreateOptions) -> bool {
        let _ = options;
        true
    }

    /// Whether a backing file can be named.
    fn has_backing(&self) -> bool {
        self.options().iter().any(|option| option.name == "backing_file")
    }
}

/// How many bytes at the end of a file are looked at to find out a format.
pub const TRAILER_BYTES: u64 = 64 << 10;

/// The end of a file, as it is looked at to find out a format.
#[derive(Debug, Clone, Copy)]
pub struct Trailer<'a> {
    /// The last [`TRAILER_BYTES`], or fewer where the file is shorter.
    pub bytes: &'a [u8],
    /// The file's length.
    pub len: u64,
}

/// What is known of a format without an image: one static each.
pub trait Format: Sync + fmt::Debug {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// Other names that people have for it, in small letters; the usual ends of its files' names among them.
    fn also_called(&self) -> &'static [&'static str] {
        &[]
    }

    /// How sure we are, from the first 512 bytes and the file's name, that it is this format: 0 to 100. Raw says 1, one
    /// whose magic number is there says 100.
    fn probe(&self, head: &[u8], name: &str) -> u32;

    /// Whether the end of a file, of which no format has known the start, says that it is this format. Guest data can
    /// lie there too, so what is found this way is read, and written to only where the user names the format.
    fn probe_end(&self, end: &Trailer<'_>) -> bool {
        let _ = end;
        false
    }

    /// Whether its images can be opened to be written to at all.
    fn writable(&self) -> bool {
        true
    }

    /// Options that change what the guest sees: where they are given, a plain name does not name the image.
    fn strong_options(&self) -> &'static [&'static str] {
        &[]
    }

    /// The parts that files play which options alone may name, beside the one that is named by itself. They are opened
    /// as that one is.
    fn side_files(&self) -> &'static [&'static str] {
        &[]
    }

    /// Opens a layer.
    fn open(&self, request: OpenRequest<'_>) -> Result<Box<dyn BlockDriver>>;

    /// Able to be created.
    fn creating(&self) -> Option<&dyn Create> {
        None
    }

    /// The options that can be changed in an image that is there; none where none can.
    fn amend_options(&self) -> &'static [OptionSpec] {
        &[]
    }

    /// Whether its driver answers `Unallocated` at all (can have a backing file). A format with backing files that
    /// cannot be created says so itself.
    fn layered(&self) -> bool {
        self.creating().is_some_and(|create| create.has_backing())
    }
}

/// The format with that name.
pub fn find(formats: &[&'static dyn Format], name: &str) -> Result<&'static dyn Format> {
    formats.iter().copied().find(|format| format.name() == name).ok_or_else(|| {
        let error = Error::invalid(format!("Unknown file format '{name}'"));
        match meant(formats, name) {
            Some(meant) => error.advise(format!("did you mean '{meant}'?")),
            None => error,
        }
    })
}

/// The format that was probably meant by a name that is none.
pub fn meant(formats: &[&'static dyn Format], word: &str) -> Option<&'static str> {
    let called = formats.iter().find(|format| format.also_called().contains(&word.to_lowercase().as_str()));
    called.map(|format| format.name()).or_else(|| nearest(word, formats.iter().map(|format| format.name())))
}
