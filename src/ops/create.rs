//! Making new images: what is wanted is checked and completed first ([`Wanted::decide`]), then made, whole or not
//! at all ([`create`]).

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::ids::{IdChoice, ImageIds};
use super::read_from::{files_of, is_among};
use crate::block::error::Context;
use crate::block::protocol::{CreateFile, Protocol};
use crate::block::{
    Child, Create, CreateFiles, CreateOptions, CreateRequest, Driver, Drivers, Error, ErrorKind, Format, ImageRef,
    MadeFiles, Named, Node, Notice, OpenHow, Opener, OptionTree, OptionValue, Purpose, Related, Result, format, name,
};
use crate::storage::staging::{Durability, Staging};
use crate::storage::{self, CacheMode, Identity, Preallocation, Storage};

/// What a new image goes to: a format, or a protocol in its place, and a protocol by the name.
#[derive(Clone, Copy)]
pub struct Target {
    /// The format.
    pub format: &'static dyn Format,
    /// Its ability to be created.
    pub create: &'static dyn Create,
    /// What makes files of that name, unless the format is a protocol; nothing where no name was given.
    files: Option<&'static dyn CreateFile>,
}

impl Target {
    /// The format, or protocol, with that name, and the protocol of that file name.
    pub fn find(drivers: &Drivers, format: &str, name: Option<&OsStr>) -> Result<Self> {
        let format = match drivers.find(format) {
            Some(Driver::Filter(_)) => return Err(no_format(format)),
            Some(Driver::Protocol(_)) => drivers.bytes(format).ok_or_else(|| no_format(format))?,
            _ => format::find(drivers.formats, format)?,
        };
        let files = name.map(|name| place(drivers, name)).transpose()?.map(|place| place.maker);
        let create = format.creating().ok_or_else(|| no_format(format.name()))?;
        Ok(Self { format, create, files })
    }

    /// All options that a new image takes here, none given yet.
    pub fn options(&self) -> CreateOptions {
        CreateOptions::new(&[self.create.options(), self.files.map_or(&[], |files| files.options())])
    }
}

/// What is asked for.
pub struct Wanted<'a> {
    /// The image's name, as typed.
    pub name: &'a OsStr,
    /// Format and protocol.
    pub target: Target,
    /// The guest's disk size, where it was given beside the options.
    pub size: Option<u64>,
    /// Options, with what was given.
    pub options: CreateOptions,
    /// The backing file, where it was named beside the options.
    pub backing: Option<OsString>,
    /// Its format, likewise.
    pub backing_format: Option<String>,
    /// Take the backing file's word unseen.
    pub backing_unseen: bool,
    /// What is said of the image's ids.
    pub ids: IdChoice,
}

/// A new image, decided.
pub struct NewImage {
    /// Its name, as typed.
    pub name: OsString,
    /// Its format.
    pub format: &'static dyn Format,
    /// The guest's disk size, not rounded yet.
    pub size: u64,
    /// All options.
    pub options: CreateOptions,
    /// What is said of its ids.
    pub ids: IdChoice,
}

impl NewImage {
    /// Its name, as it is shown.
    pub fn shown(&self) -> String {
        self.name.to_string_lossy().into_owned()
    }

    /// What it will stand on, opened to be looked at; nothing where that cannot be had: who needs it will tell.
    pub fn stands_on(&self, opener: &Opener<'_>) -> Option<Arc<Node>> {
        let path = beside(&self.name, self.options.name("backing_file")?);
        let format = self.options.text("backing_fmt").map(str::to_owned);
        let how = OpenHow { format, purpose: Purpose::Look, force_share: true, ..OpenHow::default() };
        opener.open_named(&ImageRef::name(path), &how).ok()
    }

    /// The files that are there under its names.
    pub fn places(&self, opener: &Opener<'_>) -> Vec<Identity> {
        places(opener.drivers(), self.format, &self.name, &self.options)
    }

    /// What is being done, for errors of a conversion.
    pub fn converting(&self) -> String {
        format!("{}: error while converting {}", self.name.to_string_lossy(), self.format.name())
    }

    /// The same for a copy of blocks.
    pub fn creating_output(&self) -> String {
        format!("{}: error while creating output image", self.name.to_string_lossy())
    }
}

impl Wanted<'_> {
    /// Checks what can be checked before anything is made. The size comes from the backing file if need be.
    pub fn decide(mut self, opener: &Opener<'_>) -> Result<NewImage> {
        let format = self.target.format.name();
        if let Some(own) = self.options.given_encoding() {
            return Err(Error::invalid(format!("'{own}' is for convert: an image without data does not keep it")));
        }
        if let Some(size) = self.size {
            if self.options.given("size").is_some() {
                return Err(Error::invalid("The image size must be specified only once"));
            }
            self.options.set("size", OptionValue::Size(size))?;
        }
        if let Some(backing) = self.backing.take() {
            self.options
                .set("backing_file", OptionValue::Name(backing))
                .map_err(|_| Error::unsupported(format!("Backing file not supported for file format '{format}'")))?;
        }
        if let Some(backing_format) = self.backing_format.take() {
            self.options.set("backing_fmt", OptionValue::Text(backing_format)).map_err(|_| {
                Error::unsupported(format!("Backing file format not supported for file format '{format}'"))
            })?;
        }
        if let Some(backing) = self.options.name("backing_file").map(OsStr::to_owned) {
            self.look_at_backing(&backing, opener)?;
        }
        // The reference takes 2^64 - 1 for "no size" too.
        let size = self.options.number("size").filter(|size| *size != u64::MAX);
        let sizeless = self.target.format.creating().is_some_and(|create| !create.has_size(&self.options));
        if sizeless && size.is_none() {
            self.options.set("size", OptionValue::Size(u64::MAX))?;
        }
        let size = size.or(sizeless.then_some(u64::MAX));
        let size = size.ok_or_else(|| Error::invalid("Image creation needs a size parameter"))?;
        if !sizeless {
            opener.bound(&self.name.to_string_lossy(), size)?;
        }
        let format = self.target.format;
        Ok(NewImage { name: self.name.to_owned(), format, size, options: self.options, ids: self.ids })
    }

    fn look_at_backing(&mut self, backing: &OsStr, opener: &Opener<'_>) -> Result<()> {
        if backing.is_empty() {
            return Err(Error::invalid("Expected backing file name, got empty string"));
        }
        let itself = || Error::invalid("Error: Trying to create an image with the same filename as the backing file");
        let path = beside(self.name, backing);
        let places = places(opener.drivers(), self.target.format, self.name, &self.options);
        let at = identity(opener.drivers(), &path);
        if backing == self.name || at.is_some_and(|at| places.contains(&at)) {
            return Err(itself());
        }
        let no_format = || Error::invalid("Backing file specified without backing format");
        let backing_format = self.options.text("backing_fmt").map(str::to_owned);
        if self.backing_unseen {
            return backing_format.map(|_| ()).ok_or_else(no_format);
        }
        let how =
            OpenHow { format: backing_format.clone(), purpose: Purpose::Look, force_share: true, ..OpenHow::default() };
        let node = opener
            .open_named(&ImageRef::name(path), &how)
            .map_err(|error| error.hint("Could not open backing image."))?;
        if backing_format.is_none() {
            let format = node.driver().format();
            let error = no_format().hint(format!("Detected format of {format}."));
            return Err(error.advise(format!("-F {format} names it, where that is right")));
        }
        if is_among(&places, &files_of(std::slice::from_ref(&node))) {
            return Err(itself());
        }
        if self.options.number("size").is_none() {
            self.options.set("size", OptionValue::Size(node.virtual_size()))?;
        }
        Ok(())
    }
}

/// What makes files under a name.
struct NewFilePlace {
    protocol: &'static str,
    maker: &'static dyn CreateFile,
    /// The name that they have for it.
    path: PathBuf,
}

impl NewFilePlace {
    fn of(protocol: &dyn Protocol, path: PathBuf) -> Result<Self> {
        let maker = protocol.creating().ok_or_else(|| no_creation(protocol.name()))?;
        Ok(Self { protocol: protocol.name(), maker, path })
    }
}

fn no_format(driver: &str) -> Error {
    Error::unsupported(format!("Format driver '{driver}' does not support image creation"))
}

fn no_creation(driver: &str) -> Error {
    Error::unsupported(format!("Protocol driver '{driver}' does not support image creation"))
}

fn place(drivers: &Drivers, name: &OsStr) -> Result<NewFilePlace> {
    let (protocol, spelt) = match drivers.of_name(name)? {
        Named::Protocol(protocol, spelt) => (protocol, spelt),
        Named::Filter(filter, _) => return Err(no_creation(filter.name())),
    };
    let path = PathBuf::from(spelt.path.unwrap_or_default());
    NewFilePlace::of(protocol, path)
}

/// Where the main file of an image goes: its format may say so.
fn main_place(drivers: &Drivers, format: &dyn Format, name: &OsStr) -> Result<NewFilePlace> {
    let Some(protocol) = drivers.protocol(format.name()) else { return place(drivers, name) };
    // What is wrong with the name is told by what would make the file.
    let spelt = drivers.spelt(protocol, name).map_or_else(|_| Some(name.to_owned()), |spelt| spelt.path);
    NewFilePlace::of(protocol, spelt.unwrap_or_default().into())
}

/// Where the main file of a new image will lie, if it is one of the host.
pub fn path_of_new(drivers: &Drivers, new: &NewImage) -> Option<PathBuf> {
    main_place(drivers, new.format, &new.name).ok().map(|place| place.path).filter(|path| !path.as_os_str().is_empty())
}

/// Whether the main file of a new image may share blocks with others.
pub fn may_share(drivers: &Drivers, new: &NewImage) -> bool {
    main_place(drivers, new.format, &new.name).is_ok_and(|place| place.maker.may_share(&new.options))
}

/// The files that are there under the names of an image and of its data file.
fn places(drivers: &Drivers, format: &dyn Format, image: &OsStr, options: &CreateOptions) -> Vec<Identity> {
    let main = main_place(drivers, format, image).ok().and_then(|place| identity_of(&place.path));
    let data = options.name("data_file").and_then(|name| identity(drivers, &beside(image, name)));
    main.into_iter().chain(data).collect()
}

/// Which file a name stands for, if it is a regular one that is there.
fn identity(drivers: &Drivers, name: &OsStr) -> Option<Identity> {
    let Named::Protocol(_, spelt) = drivers.of_name(name).ok()? else { return None };
    identity_of(Path::new(&spelt.path?))
}

fn identity_of(path: &Path) -> Option<Identity> {
    let meta = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file)?;
    Some(Identity { device: meta.dev(), inode: meta.ino() })
}

/// A name written in the image, as it is found from here.
fn beside(image: &OsStr, name: impl AsRef<OsStr>) -> OsString {
    let name = name.as_ref();
    name::beside(Some(image), name).unwrap_or_else(|| name.into())
}

/// Makes an image: whole, or nothing of it. Returns warnings.
pub fn create(new: &NewImage, opener: &Opener<'_>) -> Result<Vec<String>> {
    let staging = Staging::new(CacheMode::Unsafe, Durability::Always);
    make(new, &staging, opener)
        .map_err(|error| if error.kind == ErrorKind::TooLarge { too_large(new) } else { error })
        .map_err(|error| error.about(new.shown()))?;
    let warnings = staging.take_notices();
    staging.commit()?;
    Ok(warnings)
}

/// Makes an image in `staging`, and hands it back open, with its files, by which it can be opened again. Those files get their names when that is committed. `doing`
/// says what is being done, should it fail.
pub fn create_open(
    new: &NewImage,
    staging: &Staging,
    opener: &Opener<'_>,
    cache: CacheMode,
    doing: fn(&NewImage) -> String,
) -> Result<(Arc<Node>, MadeFiles)> {
    let made = make(new, staging, opener).with_context(|| doing(new)).map_err(|error| error.about(new.shown()));
    staging.take_notices().into_iter().for_each(|text| opener.notice(Notice::Warning(text)));
    let how =
        OpenHow { format: Some(new.format.name().to_owned()), purpose: Purpose::Write, cache, ..OpenHow::default() };
    let made = made?;
    Ok((opener.open_made(&new.name, made.clone(), &how)?, made))
}

/// The same in one file that is there, empty, and keeps its name: what would have several is refused.
pub fn create_in(
    new: &NewImage,
    file: Arc<dyn Storage>,
    opener: &Opener<'_>,
    doing: fn(&NewImage) -> String,
) -> Result<(Arc<Node>, MadeFiles)> {
    let files = OneFile { name: &new.name, file };
    let made = fill(new, &files, opener).with_context(|| doing(new)).map_err(|error| error.about(new.shown()));
    let (main, path, options) = (files.file.clone(), new.name.clone(), made?);
    let made = MadeFiles { main, protocol: "file", path, beside: Vec::new(), options };
    let format = Some(new.format.name().to_owned());
    let how = OpenHow { format, purpose: Purpose::Write, cache: CacheMode::Unsafe, ..OpenHow::default() };
    Ok((opener.open_made(&new.name, made.clone(), &how)?, made))
}

/// Makes the files of an image.
fn make(new: &NewImage, staging: &Staging, opener: &Opener<'_>) -> Result<MadeFiles> {
    let format = new.format.name();
    let create = new.format.creating().ok_or_else(|| no_format(format))?;
    let place = main_place(opener.drivers(), new.format, &new.name)?;
    let files = Files {
        drivers: opener.drivers(),
        place: &place,
        options: &new.options,
        own_preallocation: create.preallocates(),
        staging,
        main: Mutex::default(),
        made: Mutex::default(),
    };
    let options = fill(new, &files, opener)?;
    let main = files.main.into_inner().unwrap_or_else(PoisonError::into_inner);
    let main = main.ok_or_else(|| Error::invalid(format!("'{format}' makes no file")))?;
    if main.host().is_some_and(|file| file.kind() == storage::FileKind::CharDevice) {
        was_taken(new, &*main)?;
    }
    let beside = files.made.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(MadeFiles { main, protocol: place.protocol, path: place.path.into_os_string(), beside, options })
}

/// Makes an image in what `files` makes. Gives the options by which it is opened.
fn fill(new: &NewImage, files: &dyn CreateFiles, opener: &Opener<'_>) -> Result<OptionTree> {
    let format = new.format.name();
    let create = new.format.creating().ok_or_else(|| no_format(format))?;
    if let Some(backing_format) = new.options.text("backing_fmt")
        && opener.drivers().find(backing_format).is_none()
    {
        // The reference's own name for the key.
        return Err(Error::invalid(format!("Parameter 'backing-fmt' does not accept value '{backing_format}'")));
    }
    let mode = new.options.text("preallocation").and_then(Preallocation::parse);
    if let Some(mode @ (Preallocation::Falloc | Preallocation::Full)) = mode.filter(|_| create.grows(&new.options)) {
        let mode = mode.name();
        let text =
            format!("Unsupported preallocation mode: {mode} (this kind of {format} image grows as it is written to)");
        return Err(Error::unsupported(text));
    }
    if new.ids.reproducible && create.encrypts(&new.options) {
        return Err(Error::invalid("an encrypted image is not reproducible: its keys have to be random"));
    }
    let ids = ImageIds::of(&new.shown(), new.size, new.ids)?;
    let request = CreateRequest {
        size: new.size,
        options: &new.options,
        files,
        ids: &ids,
        secrets: opener.secrets(),
        related: &BackingBytes { image: &new.name, opener },
    };
    create.create(&request).map_err(|error| new.options.advising(error))?;
    if let Some(unused) = ids.unused() {
        return Err(Error::unsupported(format!("An image of format '{format}' has no {unused}")));
    }
    Ok(create.open_options(&new.options))
}

/// Whether a device that may be none for data (`/dev/null`) holds the header that it was given.
fn was_taken(new: &NewImage, main: &dyn Storage) -> Result<()> {
    let mut head = [0; 512];
    main.read_at(0, &mut head)?;
    if new.format.probe(&head, "") > 0 {
        return Ok(());
    }
    Err(Error::invalid(format!("Image is not in {} format", new.format.name())))
}

/// The words of `create` alone: `convert` shows the driver's own.
fn too_large(new: &NewImage) -> Error {
    let format = new.format.name();
    let clusters = new.options.number("cluster_size").is_some_and(|size| size > 0);
    let advice = if clusters { " (try using a larger cluster size)" } else { "" };
    Error::new(ErrorKind::TooLarge, format!("The image size is too large for file format '{format}'{advice}"))
}

/// Makes files for one image.
struct Files<'a> {
    drivers: &'a Drivers,
    place: &'a NewFilePlace,
    options: &'a CreateOptions,
    /// The format does its own preallocation, so the file's is none of it.
    own_preallocation: bool,
    staging: &'a Staging,
    /// What was made.
    main: Mutex<Option<Arc<dyn Storage>>>,
    /// The other files, by the names that are written in the image.
    made: Mutex<Vec<(OsString, Arc<dyn Storage>)>>,
}

impl Files<'_> {
    /// Makes a file beside the main one, which the image calls `written`.
    fn second(&self, place: NewFilePlace, written: &OsStr) -> Result<Arc<dyn Storage>> {
        if self.staging.has(&place.path) {
            let shown = place.path.display();
            return Err(Error::invalid(format!("'{shown}' cannot be two files of one image")));
        }
        // Preallocation is the main file's.
        place.maker.check(&place.path, self.options, true)?;
        let made = place.maker.create(&place.path, self.options, true, self.staging)?;
        self.made.lock().unwrap_or_else(PoisonError::into_inner).push((written.to_owned(), made.clone()));
        Ok(made)
    }
}

impl CreateFiles for Files<'_> {
    fn name(&self) -> &OsStr {
        self.place.path.as_os_str()
    }

    fn main(&self) -> Result<Arc<dyn Storage>> {
        let NewFilePlace { maker, path, .. } = self.place;
        maker.check(path, self.options, self.own_preallocation)?;
        let main = maker.create(path, self.options, false, self.staging)?;
        *self.main.lock().unwrap_or_else(PoisonError::into_inner) = Some(main.clone());
        Ok(main)
    }

    fn beside(&self, name: &OsStr) -> Result<Arc<dyn Storage>> {
        // Where it will be looked for: behind a link, beside what that leads to, if an older one is there.
        let path = name::find_literally_beside(Some(self.place.path.as_os_str()), name);
        let path = path.unwrap_or_else(|| name.into());
        self.second(NewFilePlace::of(self.drivers.of_path(&path)?, path.into())?, name)
    }

    fn named(&self, name: &OsStr) -> Result<(Arc<dyn Storage>, OsString)> {
        let place = place(self.drivers, name)?;
        let written = place.path.clone().into_os_string();
        Ok((self.second(place, &written)?, written))
    }
}

/// The one file of an image that has no other.
struct OneFile<'a> {
    name: &'a OsStr,
    file: Arc<dyn Storage>,
}

impl OneFile<'_> {
    fn another<T>(&self) -> Result<T> {
        let name = self.name.display();
        Err(Error::unsupported(format!("'{name}' takes one file, and the image would have several files")))
    }
}

impl CreateFiles for OneFile<'_> {
    fn name(&self) -> &OsStr {
        self.name
    }

    fn main(&self) -> Result<Arc<dyn Storage>> {
        Ok(self.file.clone())
    }

    fn beside(&self, _name: &OsStr) -> Result<Arc<dyn Storage>> {
        self.another()
    }

    fn named(&self, _name: &OsStr) -> Result<(Arc<dyn Storage>, OsString)> {
        self.another()
    }
}

/// The bytes of the backing file, for a format that writes down what it is.
struct BackingBytes<'a> {
    image: &'a OsStr,
    opener: &'a Opener<'a>,
}

impl Related for BackingBytes<'_> {
    fn open(&self, role: &str, name: &OsStr) -> Result<Child> {
        let plain = self.opener.drivers().formats.last().map(|format| format.name().to_owned());
        let how = OpenHow { format: plain, purpose: Purpose::Look, force_share: true, ..OpenHow::default() };
        let name = beside(self.image, name);
        let node = self.opener.open_named(&ImageRef::name(&name), &how)?;
        let child = node.driver().files().first().cloned();
        let child =
            child.ok_or_else(|| Error::unsupported(format!("'{}' has no file", PathBuf::from(name).display())))?;
        Ok(Child { role: role.to_owned(), ..child })
    }
}
