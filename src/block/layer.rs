//! Opening one layer: from a flat tree of options, or a name and such a tree, to a driver.

use std::ffi::{OsStr, OsString};
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value};

use super::bare::Bare;
use super::error::Context;
use super::format::{Child, OpenRequest, Related};
use super::generic::{Names, Settings};
use super::keys::{as_text, take_text};
use super::name::{self, OptionTree, first_key, take_below};
use super::node::Origin;
use super::opener::{Notice, Opener, Trail};
use super::over::{HEAD, NodeStorage, ProbedRaw};
use super::protocol::{FileRequest, Protocol, Spelt};
use super::{BlockDriver, Driver, Error, Format, Kind, Node, OpenHow, Result, foreign};
use crate::storage::{self, Identity, Storage};

/// Images in images in images: nobody needs as many.
const DEEPEST: usize = 32;

/// What is to be opened.
#[derive(Debug)]
pub(super) struct Ask {
    /// By that name, perhaps with a protocol.
    pub path: Option<OsString>,
    /// With these options.
    pub options: OptionTree,
    /// And what the parent, or the command, has settled.
    pub settings: Settings,
    /// In these files, not in what is found by that name.
    pub made: Option<MadeFiles>,
}

/// Files of an image, by the names that are written in it.
pub type MadeBeside = Vec<(String, Arc<dyn Storage>)>;

/// The files of an image that has just been made, which have no names yet.
#[derive(Debug)]
pub struct MadeFiles {
    /// The one that the image will be named by.
    pub main: Arc<dyn Storage>,
    /// The protocol that made it.
    pub protocol: &'static str,
    /// The name that it will have for the protocol.
    pub path: OsString,
    /// The others, by the names that are written in the image.
    pub beside: MadeBeside,
}

/// What the user says of the layer below.
#[derive(Debug)]
pub(super) enum Below {
    /// There shall be none.
    Nothing,
    /// What the header names, or with these options. A reference to a node is under the key "".
    Given(OptionTree),
}

/// An opened layer.
pub(super) struct Layer {
    pub driver: Box<dyn BlockDriver>,
    pub origin: Origin,
    pub settings: Settings,
    pub below: Below,
    /// The backing file is not the one that the header names.
    overridden: bool,
}

impl Layer {
    /// Its name, as far as it can be told without what is below.
    pub fn name(&self) -> String {
        shown(&self.origin)
    }

    /// Which file it is in, and its format.
    pub fn identity(&self) -> Option<(Identity, &'static str)> {
        let identity = match self.origin.inner.first() {
            Some((_, node)) => node.identity()?.0,
            None => self.driver.files().first()?.storage.facts().identity?,
        };
        Some((identity, self.driver.format()))
    }

    /// On top of that.
    pub fn on(mut self, backing: Option<Arc<Node>>) -> Node {
        if self.overridden {
            let tree = backing.as_ref().map_or(Value::Null, |node| Value::Object(node.origin().tree.clone()));
            self.origin.tree.insert("backing".to_owned(), tree);
            self.origin.path = None;
        }
        let name = shown(&self.origin);
        Node::new(self.driver, backing, name).with_origin(self.origin)
    }
}

/// A plain name if there is one, else the tree.
fn shown(origin: &Origin) -> String {
    match &origin.path {
        Some(path) => path.to_string_lossy().into_owned(),
        None => format!("json:{}", name::to_json(&Value::Object(origin.tree.clone()))),
    }
}

/// The error for a reference to a node; `alone` if nothing else was said of it.
pub(super) fn no_such_node(name: &str, alone: bool) -> Error {
    match alone {
        true => Error::new(Kind::NotFound, format!("Cannot find device='{name}' nor node-name='{name}'")),
        false => Error::invalid("Cannot reference an existing block device with additional options or a new filename"),
    }
}

/// Adds what a name says to what was said by options, which rule.
fn add(options: &mut OptionTree, more: OptionTree) {
    for (key, value) in more {
        options.entry(key).or_insert(value);
    }
}

/// The file of a layer, and where it came from.
struct Opened {
    child: Child,
    tree: Map<String, Value>,
    path: Option<OsString>,
    /// Names found in the image are relative to it.
    base: Option<OsString>,
    inner: Option<Arc<Node>>,
    locking: bool,
}

impl MadeFiles {
    /// The main one as if it had been opened by its name, and the others.
    fn opened(self) -> (Opened, MadeBeside) {
        let name = self.path.to_string_lossy().into_owned();
        let tree = Map::from_iter([
            ("driver".to_owned(), Value::from(self.protocol)),
            ("filename".to_owned(), Value::from(name.clone())),
        ]);
        let child = Child { role: "file".to_owned(), name, driver: self.protocol, storage: self.main };
        let (path, base) = (Some(self.path.clone()), Some(self.path));
        (Opened { child, tree, path, base, inner: None, locking: true }, self.beside)
    }
}

impl Opener<'_> {
    /// Opens one layer.
    pub(super) fn layer(&self, ask: Ask, how: &OpenHow, trail: &mut Trail) -> Result<Layer> {
        let Ask { path, mut options, settings, made } = ask;
        let driver = match options.shift_remove("driver") {
            Some(Value::String(name)) => Some(name),
            _ => None,
        };
        let format = match driver.as_deref().map(|name| (name, self.drivers.find(name))) {
            Some((_, Some(Driver::Protocol(protocol)))) => {
                return self.bare(protocol, path, options, settings, how, trail);
            }
            Some((_, Some(Driver::Format(format)))) => Some(format),
            Some((name, None)) => return Err(Error::invalid(format!("Unknown driver '{name}'"))),
            None => None,
        };
        let (settings, claims) = settings.take(&mut options);
        let below = self.below_options(&mut options, how)?;
        let (file, made) = match made {
            Some(made) => made.opened(),
            None => (self.file_of(path, &mut options, driver.is_some(), &settings, how, trail)?, Vec::new()),
        };
        claims.settle(&mut trail.names)?;
        let probed = format.is_none();
        let format = match format {
            Some(format) => format,
            None => self.probe(&*file.child.storage, &file.child.name)?,
        };
        let raw = format.name() == "raw";
        if file.locking {
            let access = how.access(&settings);
            storage::lock(&*file.child.storage, if raw && !how.exclusive { access.of_raw() } else { access })?;
        }
        let mut child = file.child;
        if raw && probed && settings.write {
            self.warn_of_probed_raw(&mut child);
        }
        let mut tree = Map::new();
        tree.insert("driver".to_owned(), format.name().into());
        for key in format.strong_options() {
            if let Some(value) = options.get(*key) {
                tree.insert((*key).to_owned(), value.clone());
            }
        }
        let plain = tree.len() == 1 && file.inner.is_none();
        tree.insert("file".to_owned(), Value::Object(file.tree));
        let origin = Origin {
            path: file.path.clone().filter(|_| plain),
            base: file.base,
            tree,
            protocol: false,
            inner: file.inner.into_iter().map(|node| ("file".to_owned(), node)).collect(),
        };
        let given = match &below {
            Below::Given(options) if !format.layered() && !options.is_empty() => {
                return Err(Error::unsupported("Driver doesn't support backing files"));
            }
            Below::Given(options) => options.contains_key("file.filename"),
            Below::Nothing => false,
        };
        let beside = Beside {
            opener: self,
            image: origin.base.as_deref(),
            how,
            settings,
            locking: file.locking,
            given: Mutex::new(take_below(&mut options, DATA_FILE)),
            made,
        };
        if let Some(reference) = take_text(&mut options, DATA_FILE) {
            return Err(no_such_node(&reference, true));
        }
        let request = OpenRequest {
            file: child,
            options: &mut options,
            write: settings.write,
            look_only: how.look_only,
            related: &beside,
        };
        let driver = format.open(request)?;
        let left = beside.given.into_inner().unwrap_or_else(|e| e.into_inner());
        if !left.is_empty() && !how.look_only {
            return Err(Error::invalid("'data-file' can only be set for images with an external data file"));
        }
        if let Some(key) = first_key(&options) {
            let text = format!("Block format '{}' does not support the option '{key}'", format.name());
            return Err(Error::invalid(text));
        }
        settings.may_write()?;
        let named = driver.backing().is_some();
        let overridden = !how.no_backing && (given || (named && matches!(below, Below::Nothing)));
        let below = if how.no_backing { Below::Nothing } else { below };
        Ok(Layer { driver, origin, settings, below, overridden })
    }

    /// Takes what is said of the layer below.
    fn below_options(&self, options: &mut OptionTree, how: &OpenHow) -> Result<Below> {
        match options.get("backing") {
            Some(Value::Null) => {
                options.shift_remove("backing");
                return Ok(Below::Nothing);
            }
            Some(Value::String(text)) if text.is_empty() => {
                options.shift_remove("backing");
                self.notice(Notice::Warning(
                    r#"Use of "backing": "" is deprecated; use "backing": null instead"#.to_owned(),
                ));
                return Ok(Below::Nothing);
            }
            _ => {}
        }
        if how.no_backing {
            return Ok(Below::Given(OptionTree::new()));
        }
        let mut below = take_below(options, "backing");
        if let Some(reference) = options.shift_remove("backing") {
            below.insert(String::new(), reference);
        }
        Ok(Below::Given(below))
    }

    /// A bare file as an image.
    fn bare(
        &self,
        protocol: &'static dyn Protocol,
        path: Option<OsString>,
        mut options: OptionTree,
        settings: Settings,
        how: &OpenHow,
        trail: &mut Trail,
    ) -> Result<Layer> {
        if path.is_some() && options.contains_key("filename") {
            return Err(Error::invalid("Can't specify 'file' and 'filename' options at the same time"));
        }
        let spelt = self.spelt(protocol, path)?;
        add(&mut options, spelt.options);
        let (opened, settings) = self.bytes(protocol, spelt.path, options, settings, "file", &mut trail.names)?;
        if opened.locking {
            let access = how.access(&settings);
            storage::lock(&*opened.child.storage, if how.exclusive { access } else { access.of_raw() })?;
        }
        let driver = Box::new(Bare::open(protocol.name(), opened.child, settings.write)?);
        let origin =
            Origin { path: opened.path, base: opened.base, tree: opened.tree, protocol: true, inner: Vec::new() };
        Ok(Layer { driver, origin, settings, below: Below::Nothing, overridden: false })
    }

    /// The file that a format lies in: a file of the host, or another image.
    fn file_of(
        &self,
        path: Option<OsString>,
        options: &mut OptionTree,
        known: bool,
        parent: &Settings,
        how: &OpenHow,
        trail: &mut Trail,
    ) -> Result<Opened> {
        let mut below = take_below(options, "file");
        if let Some(Value::String(reference)) = options.shift_remove("file") {
            return Err(no_such_node(&reference, below.is_empty() && path.is_none()));
        }
        let empty = below.is_empty() && path.is_none();
        if empty && known {
            return Err(Error::invalid("A block device must be specified for \"file\""));
        }
        let must = || Error::invalid("Must specify either driver or file");
        if empty {
            return Err(must());
        }
        let driver = match below.shift_remove("driver") {
            Some(Value::String(name)) => Some(name),
            _ => None,
        };
        let (protocol, path) = match (path, driver) {
            (Some(name), None) => {
                let (protocol, spelt) = self.drivers.of_name(&name)?;
                add(&mut below, spelt.options);
                (protocol, spelt.path)
            }
            (path, Some(driver)) => match self.drivers.protocol(&driver) {
                Some(protocol) => {
                    let spelt = self.spelt(protocol, path)?;
                    add(&mut below, spelt.options);
                    (protocol, spelt.path)
                }
                None => return self.nested(driver, path, below, parent, how, trail),
            },
            (None, None) => {
                let name = below.get("filename").and_then(|value| value.as_str()).ok_or_else(must)?;
                (self.drivers.of_path(OsStr::new(name))?, None)
            }
        };
        Ok(self.bytes(protocol, path, below, *parent, "file", &mut trail.names)?.0)
    }

    fn nested(
        &self,
        driver: String,
        path: Option<OsString>,
        mut options: OptionTree,
        settings: &Settings,
        how: &OpenHow,
        trail: &mut Trail,
    ) -> Result<Opened> {
        if trail.depth >= DEEPEST {
            return Err(Error::invalid("Images are nested too deeply"));
        }
        options.insert("driver".to_owned(), driver.into());
        trail.depth += 1;
        let ask = Ask { path, options, settings: *settings, made: None };
        let how = OpenHow { no_backing: false, look_only: false, ..how.clone() };
        let node = self.chain(ask, &how, trail);
        trail.depth -= 1;
        let node = node?;
        let origin = node.origin();
        let child = Child {
            role: "file".to_owned(),
            name: node.name().to_owned(),
            driver: node.driver().format(),
            storage: Arc::new(NodeStorage::new(node.clone())),
        };
        let (tree, base) = (origin.tree.clone(), origin.base.clone());
        Ok(Opened { child, tree, path: None, base, inner: Some(node), locking: false })
    }

    /// What a name says to a protocol that was chosen by its own name.
    fn spelt(&self, protocol: &'static dyn Protocol, name: Option<OsString>) -> Result<Spelt> {
        name.map_or(Ok(Spelt::default()), |name| self.drivers.spelt(protocol, &name))
    }

    /// What a protocol gives, with the options of its node.
    fn bytes(
        &self,
        protocol: &'static dyn Protocol,
        path: Option<OsString>,
        mut options: OptionTree,
        parent: Settings,
        role: &str,
        names: &mut Names,
    ) -> Result<(Opened, Settings)> {
        let (settings, claims) = parent.take(&mut options);
        let path = protocol.take_name(path, &mut options)?;
        claims.settle(names)?;
        let opened = protocol.open(FileRequest {
            path,
            options: &mut options,
            write: settings.write,
            cache: settings.cache(),
        })?;
        if let Some(key) = first_key(&options) {
            let name = protocol.name();
            return Err(Error::invalid(format!("Block protocol '{name}' doesn't support the option '{key}'")));
        }
        settings.may_write()?;
        let mut tree = Map::new();
        tree.insert("driver".to_owned(), protocol.name().into());
        tree.extend(opened.strong);
        let name = match &opened.path {
            Some(path) => path.to_string_lossy().into_owned(),
            None => format!("json:{}", name::to_json(&Value::Object(tree.clone()))),
        };
        let child = Child { role: role.to_owned(), name, driver: protocol.name(), storage: opened.storage };
        let base = opened.path.clone().filter(|_| opened.based);
        Ok((Opened { child, tree, path: opened.path, base, inner: None, locking: opened.locking }, settings))
    }

    /// Finds out the format by the first bytes.
    fn probe(&self, storage: &dyn Storage, name: &str) -> Result<&'static dyn Format> {
        let formats = self.drivers.formats;
        let raw = formats.last().copied().ok_or_else(|| Error::invalid("no formats"))?;
        let text = || format!("Could not determine image format of '{name}'");
        if storage.len().with_context(text)? == 0 {
            return Ok(raw);
        }
        let mut head = [0; HEAD];
        storage.read_at(0, &mut head).context("Could not read image for determining its format")?;
        let mut best = (raw, raw.probe(&head, name));
        for format in formats.iter().copied() {
            let score = format.probe(&head, name);
            if score > best.1 {
                best = (format, score);
            }
        }
        if let Some(other) = foreign::of(&head).filter(|_| best.0.name() == raw.name()) {
            return Err(Error::unsupported(format!(
                "Image is in {other} format, which is not supported (the format raw takes its bytes as they are)"
            )));
        }
        Ok(best.0)
    }

    fn warn_of_probed_raw(&self, child: &mut Child) {
        for line in [
            format!("WARNING: Image format was not specified for '{}' and probing guessed raw.", child.name),
            "         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.".to_owned(),
            "         Specify the 'raw' format explicitly to remove the restrictions.".to_owned(),
        ] {
            self.notice(Notice::Line(line));
        }
        let formats = self.drivers.formats.iter().copied().filter(|format| format.name() != "raw").collect();
        let storage = child.storage.clone();
        child.storage = Arc::new(ProbedRaw { storage, formats, name: child.name.clone() });
    }
}

const DATA_FILE: &str = "data-file";

/// The way of a driver to the other files of its layer.
struct Beside<'a> {
    opener: &'a Opener<'a>,
    image: Option<&'a OsStr>,
    how: &'a OpenHow,
    settings: Settings,
    locking: bool,
    /// What the user says of the external data file.
    given: Mutex<OptionTree>,
    /// Files that were made together with the image, by the names that are written in it.
    made: MadeBeside,
}

impl Beside<'_> {
    /// Takes the permissions on a file of the layer.
    fn lock(&self, storage: &dyn Storage, role: &str, settings: &Settings) -> Result<()> {
        let access = self.how.access(settings);
        let access = match (self.how.exclusive, role) {
            (false, DATA_FILE) => access.of_data_file(),
            _ => access,
        };
        Ok(storage::lock(storage, access)?)
    }
}

impl Related for Beside<'_> {
    fn open(&self, role: &str, name: &OsStr) -> Result<Child> {
        let shown = name.to_string_lossy();
        if let Some((_, storage)) = self.made.iter().find(|(made, _)| OsStr::new(made) == name) {
            self.lock(&**storage, role, &self.settings)?;
            let path = name::literally_beside(self.image, name).unwrap_or_else(|| name.into());
            let driver = self.opener.drivers.of_path(&path)?.name();
            let name = path.to_string_lossy().into_owned();
            return Ok(Child { role: role.to_owned(), name, driver, storage: storage.clone() });
        }
        self.opener.may_open(&self.image.unwrap_or_default().to_string_lossy(), &shown)?;
        let mut given = match role {
            DATA_FILE => std::mem::take(&mut *self.given.lock().unwrap_or_else(|e| e.into_inner())),
            _ => OptionTree::new(),
        };
        let path = match given.get("filename").and_then(as_text) {
            Some(_) => None,
            None => Some(name::literally_beside(self.image, name).ok_or_else(|| {
                Error::invalid(format!("Cannot tell where the file '{shown}' is, because the image has no plain name"))
            })?),
        };
        let named = path.clone().or_else(|| given.get("filename").and_then(as_text).map(OsString::from));
        let driver = match given.shift_remove("driver") {
            Some(Value::String(driver)) => Some(driver),
            _ => None,
        };
        let protocol = match driver {
            None => self.opener.drivers.of_path(named.as_deref().unwrap_or_default())?,
            Some(driver) => self.opener.drivers.protocol(&driver).ok_or_else(|| {
                Error::unsupported(format!("The file '{shown}' must be a plain file, not '{driver}'"))
            })?,
        };
        let (opened, settings) =
            self.opener.bytes(protocol, path, given, self.settings, role, &mut Names::default())?;
        if self.locking && opened.locking {
            self.lock(&*opened.child.storage, role, &settings)?;
        }
        Ok(opened.child)
    }

    fn notice(&self, notice: Notice) {
        self.opener.notice(notice);
    }
}
