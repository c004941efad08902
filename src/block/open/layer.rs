//! Opening one layer: from a flat tree of options, or a name and such a tree, to a driver.

use std::ffi::{OsStr, OsString};
use std::sync::{Arc, Mutex};

use serde_json::{Map, Value};

use super::held::Key;
use super::opened::{MadeFiles, Opened};
use super::related::{Beside, DATA_FILE};
use super::settings::{Names, Settings};
use super::{OpenHow, Opener, Policy, Trail};
use crate::block::bare::Bare;
use crate::block::keys::take_text;
use crate::block::name::{self, first_key, take_below};
use crate::block::node::Origin;
use crate::block::protocol::{FileRequest, Protocol, Spelt};
use crate::block::{
    BlockDriver, Child, Driver, Error, ErrorKind, Layer, Named, Node, Notice, OpenRequest, OptionTree, Purpose, Result,
};
use crate::storage::Identity;
use crate::storage::lock::Access;

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

/// What the user says of the layer below.
#[derive(Debug)]
pub(super) enum Below {
    /// There shall be none.
    Nothing,
    /// What the header names, or with these options. A reference to a node is under the key "".
    Given(OptionTree),
}

/// A layer, and what is known of it until what lies below it is open too.
pub(super) struct OpenedLayer {
    pub layer: Arc<Layer>,
    /// By which it is found when it is asked for again.
    pub key: Option<Key>,
    pub origin: Origin,
    pub settings: Settings,
    pub below: Below,
    /// The image has just been made: what it names, the user has typed.
    pub own: bool,
    /// The backing file is not the one that the header names.
    overridden: bool,
}

impl OpenedLayer {
    /// With nothing below it.
    pub fn new(layer: Arc<Layer>, key: Option<Key>, origin: Origin, settings: Settings, own: bool) -> Self {
        Self { layer, key, origin, settings, below: Below::Nothing, own, overridden: false }
    }

    /// With that below it; `given`: by the user's word.
    fn above(mut self, below: Below, given: bool, how: &OpenHow) -> Self {
        if !how.no_backing {
            self.overridden = given || (self.driver().backing().is_some() && matches!(below, Below::Nothing));
            self.below = below;
        }
        self
    }

    pub fn driver(&self) -> &dyn BlockDriver {
        self.layer.driver()
    }

    /// Its name, as far as it can be told without what is below.
    pub fn name(&self) -> String {
        shown(&self.origin)
    }

    /// Which file it is in, and its format.
    pub fn identity(&self) -> Option<(Identity, &'static str)> {
        let identity = match self.origin.inner.first() {
            Some((_, node)) => node.identity()?.0,
            None => self.driver().files().first()?.storage.facts().identity?,
        };
        Some((identity, self.driver().format()))
    }

    /// On top of that.
    pub fn on(mut self, backing: Option<Arc<Node>>) -> Node {
        if self.overridden {
            let tree = backing.as_ref().map_or(Value::Null, |node| Value::Object(node.origin().tree.clone()));
            self.origin.tree.insert("backing".to_owned(), tree);
            self.origin.path = None;
        }
        let name = shown(&self.origin);
        Node::of(self.layer, backing, name).with_origin(self.origin)
    }
}

/// A plain name if there is one, else the tree.
pub(super) fn shown(origin: &Origin) -> String {
    match &origin.path {
        Some(path) => path.to_string_lossy().into_owned(),
        None => format!("json:{}", name::to_json(&Value::Object(origin.tree.clone()))),
    }
}

/// The error for a reference to a node; `alone` if nothing else was said of it.
pub(super) fn no_such_node(name: &str, alone: bool) -> Error {
    match alone {
        true => Error::new(ErrorKind::NotFound, format!("Cannot find device='{name}' nor node-name='{name}'")),
        false => Error::invalid("Cannot reference an existing block device with additional options or a new filename"),
    }
}

/// Adds what a name says to what was said by options, which rule.
pub(super) fn add(options: &mut OptionTree, more: OptionTree) {
    for (key, value) in more {
        options.entry(key).or_insert(value);
    }
}

impl Opener<'_> {
    /// Opens one layer.
    pub(super) fn layer(&self, ask: Ask, how: &OpenHow, trail: &mut Trail) -> Result<OpenedLayer> {
        let Ask { path, mut options, settings, made } = ask;
        let own = made.is_some();
        let driver = match options.shift_remove("driver") {
            Some(Value::String(name)) => Some(name),
            _ => None,
        };
        let format = match driver.as_deref().map(|name| (name, self.drivers.find(name))) {
            Some((name, Some(Driver::Protocol(protocol)))) => match self.drivers.bytes(name).filter(|_| own) {
                Some(bytes) => Some(bytes),
                None => return self.bare(protocol, path, options, settings, how, trail),
            },
            Some((_, Some(Driver::Filter(filter)))) => {
                let ask = Ask { path, options, settings, made: None };
                return self.filtered(filter, ask, how, trail)?.into_layer(how, trail);
            }
            Some((_, Some(Driver::Format(format)))) => Some(format),
            Some((name, None)) => {
                let error = Error::invalid(format!("Unknown driver '{name}'"));
                return Err(match self.drivers.meant(name) {
                    Some(meant) => error.advise(format!("did you mean '{meant}'?")),
                    None => error,
                });
            }
            None => None,
        };
        let (settings, claims) = settings.take(&mut options);
        let below = self.below_options(&mut options, how)?;
        let (file, made) = match made {
            Some(made) => made.opened(),
            None => (self.file_of(path, &mut options, driver.is_some(), &settings, how, trail)?, Vec::new()),
        };
        let node_name = claims.settle(&mut trail.names)?;
        let probed = format.is_none();
        let format = match format {
            Some(format) => format,
            None => self.probe(&*file.child.storage, &file.child.name, settings.purpose.writes())?,
        };
        let raw = format.name() == "raw";
        let key = Key::of(&file, format.name(), &options, settings, how);
        let found = key.as_ref().and_then(|key| self.held.find(key, file.base.as_ref()));
        if file.locking && found.is_none() {
            let access = settings.access();
            let plain = raw || self.drivers.protocol(format.name()).is_some();
            let access = if plain && !how.exclusive { access.of_raw() } else { access };
            trail.lock(&*file.child.storage, access.and(file.access))?;
        }
        let mut child = file.child;
        if raw && probed && settings.purpose.writes() {
            self.warn_of_probed_raw(&child);
        }
        let probed_raw = raw && (probed || trail.probed_raw);
        if probed_raw && settings.purpose.writes() {
            self.guard_probed_raw(&mut child);
        }
        let mut tree = Map::new();
        tree.insert("driver".to_owned(), format.name().into());
        for key in format.strong_options() {
            if let Some(value) = options.get(*key) {
                tree.insert((*key).to_owned(), value.clone());
            }
        }
        let side =
            if found.is_none() { self.side_files(format, &mut options, &settings, how, trail)? } else { Vec::new() };
        // Side files make no difference to the reference, which names such an image by its own file alone.
        let plain = tree.len() == 1;
        tree.insert("file".to_owned(), Value::Object(file.tree));
        let mut inner: Vec<_> = file.inner.into_iter().map(|node| ("file".to_owned(), node)).collect();
        let mut side_files = Vec::new();
        for file in side {
            let role = file.child.role.clone();
            tree.insert(role.clone(), Value::Object(file.tree));
            inner.extend(file.inner.map(|node| (role, node)));
            side_files.push(file.child);
        }
        let path = file.path.clone().filter(|_| plain);
        let origin = Origin { path, base: file.base, tree, node_name, protocol: false, filter: false, inner };
        let given = match &below {
            Below::Given(options) if !format.layered() && !options.is_empty() => {
                return Err(Error::unsupported("Driver doesn't support backing files"));
            }
            Below::Given(options) => options.contains_key("file.filename"),
            Below::Nothing => false,
        };
        if let Some(layer) = found {
            return Ok(OpenedLayer::new(layer, key, origin, settings, own).above(below, given, how));
        }
        let beside = Beside {
            opener: self,
            image: origin.base.as_deref(),
            how,
            settings,
            locking: file.locking,
            instead: &trail.instead,
            given: Mutex::new(take_below(&mut options, DATA_FILE)),
            own,
            made,
        };
        if let Some(reference) = take_text(&mut options, DATA_FILE) {
            return Err(no_such_node(&reference, true));
        }
        if settings.purpose.writes() && !format.writable() {
            return Err(Error::invalid("Image is read-only"));
        }
        let request = OpenRequest {
            file: child,
            side_files,
            options: &mut options,
            purpose: settings.purpose,
            secrets: self.secrets,
            related: &beside,
        };
        let driver = format.open(request)?;
        let left = beside.given.into_inner().unwrap_or_else(|e| e.into_inner());
        if !left.is_empty() && !settings.purpose.only_looks() {
            return Err(Error::invalid("'data-file' can only be set for images with an external data file"));
        }
        if let Some(key) = first_key(&options) {
            let text = format!("Block format '{}' does not support the option '{key}'", format.name());
            return Err(Error::invalid(text));
        }
        settings.may_write()?;
        let layer = Layer::new(driver).with_manner(settings.manner()).with_probed_raw(probed_raw);
        let layer = if settings.purpose == Purpose::Commit { layer.only_read() } else { layer };
        Ok(OpenedLayer::new(Arc::new(layer), key, origin, settings, own).above(below, given, how))
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
    ) -> Result<OpenedLayer> {
        if path.is_some() && options.contains_key("filename") {
            return Err(Error::invalid("Can't specify 'file' and 'filename' options at the same time"));
        }
        let spelt = self.spelt(protocol, path)?;
        add(&mut options, spelt.options);
        let (opened, settings) = self.bytes(protocol, spelt.path, options, settings, "file", &mut trail.names)?;
        self.keep(&opened, trail)?;
        if opened.locking {
            let access = settings.access();
            trail.lock(&*opened.child.storage, if how.exclusive { access } else { access.of_raw() })?;
        }
        let driver = Bare::open(protocol.name(), opened.child, settings.purpose.writes())?;
        let Opened { path, base, tree, node_name, .. } = opened;
        let origin = Origin { path, base, tree, node_name, protocol: true, filter: false, inner: Vec::new() };
        let layer = Layer::new(Box::new(driver)).with_manner(settings.manner());
        Ok(OpenedLayer::new(Arc::new(layer), None, origin, settings, false))
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
        let below = take_below(options, "file");
        if let Some(Value::String(reference)) = options.shift_remove("file") {
            return Err(no_such_node(&reference, below.is_empty() && path.is_none()));
        }
        let empty = below.is_empty() && path.is_none();
        if empty && known {
            return Err(Error::invalid("A block device must be specified for \"file\""));
        }
        if empty {
            return Err(Error::invalid("Must specify either driver or file"));
        }
        self.bytes_of("file", path, below, parent, how, trail)
    }

    /// What gives a node its bytes: a file, a filter before one, or another image.
    pub(super) fn bytes_of(
        &self,
        role: &str,
        path: Option<OsString>,
        mut below: OptionTree,
        parent: &Settings,
        how: &OpenHow,
        trail: &mut Trail,
    ) -> Result<Opened> {
        let driver = match below.shift_remove("driver") {
            Some(Value::String(name)) => Some(name),
            _ => None,
        };
        let (protocol, path) = match (path, driver) {
            (Some(name), None) => match self.drivers.of_name(&name)? {
                Named::Protocol(protocol, spelt) => {
                    add(&mut below, spelt.options);
                    (protocol, spelt.path)
                }
                Named::Filter(filter, _) => {
                    let ask = Ask { path: Some(name), options: below, settings: *parent, made: None };
                    return Ok(self.filtered(filter, ask, how, trail)?.into_file(role));
                }
            },
            (path, Some(driver)) => match self.drivers.find(&driver) {
                Some(Driver::Protocol(protocol)) => {
                    let spelt = self.spelt(protocol, path)?;
                    add(&mut below, spelt.options);
                    (protocol, spelt.path)
                }
                Some(Driver::Filter(filter)) => {
                    let ask = Ask { path, options: below, settings: *parent, made: None };
                    return Ok(self.filtered(filter, ask, how, trail)?.into_file(role));
                }
                _ => {
                    below.insert("driver".to_owned(), driver.into());
                    let ask = Ask { path, options: below, settings: *parent, made: None };
                    return self.nested(role, ask, how, trail);
                }
            },
            (None, None) => {
                let name = below.get("filename").and_then(|value| value.as_str());
                let name = name.ok_or_else(|| Error::invalid("Must specify either driver or file"))?;
                (self.drivers.of_path(OsStr::new(name))?, None)
            }
        };
        let (opened, _) = self.bytes(protocol, path, below, *parent, role, &mut trail.names)?;
        self.keep(&opened, trail)?;
        Ok(opened)
    }

    /// Refuses what an image named, if it is not what the policy allowed.
    fn keep(&self, opened: &Opened, trail: &Trail) -> Result<()> {
        match &trail.named {
            Some((image, named)) => self.may_keep(image, named, &*opened.child.storage),
            None => Ok(()),
        }
    }

    /// What a name says to a protocol that was chosen by its own name.
    fn spelt(&self, protocol: &'static dyn Protocol, name: Option<OsString>) -> Result<Spelt> {
        name.map_or(Ok(Spelt::default()), |name| self.drivers.spelt(protocol, &name))
    }

    /// What a protocol gives, with the options of its node.
    pub(super) fn bytes(
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
        let node_name = claims.settle(names)?;
        let opened = protocol.open(FileRequest {
            path,
            options: &mut options,
            write: settings.purpose.writes(),
            cache: settings.cache(),
            native_aio: settings.native_aio,
            keep_space: settings.manner().keep_space,
            secrets: self.secrets,
            untrusted: self.policy != Policy::Follow,
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
        let (path, locking) = (opened.path, opened.locking);
        Ok((Opened { child, tree, path, base, node_name, inner: None, locking, access: Access::NONE }, settings))
    }
}
