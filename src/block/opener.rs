//! The one way to an open image: backing chains, and the policy that says what an image may make us open. One
//! layer of a chain is opened by [`layer`](super::layer).
//!
//! Invariants: a chain is opened and closed link by link, never by recursion; recursion into images inside images
//! is capped; a file is locked before its header is believed.

use std::ffi::{OsStr, OsString};
use std::sync::{Arc, Mutex};

use super::generic::{Names, Settings};
use super::keys::as_text;
use super::layer::{Ask, Below, Layer, MadeFiles};
use super::name::{self, OptionTree};
use super::{Drivers, Error, ImageRef, Kind, Node, Result};
use crate::storage::lock::Access;
use crate::storage::{CacheMode, Identity};

/// What an image may make us open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Whatever it names, as the reference does.
    #[default]
    Follow,
    /// Nothing: an image that names another file is refused.
    Refuse,
}

/// How an image is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenHow {
    /// The format of the top layer; `None` to probe.
    pub format: Option<String>,
    /// For reading and writing (the top layer alone).
    pub write: bool,
    /// Without its backing file.
    pub no_backing: bool,
    /// Only the header will be looked at.
    pub look_only: bool,
    /// Bear others that write meanwhile (`-U`).
    pub force_share: bool,
    /// Nobody may write to any layer meanwhile, whatever its format (the sources of `convert`).
    pub exclusive: bool,
    /// What the page cache does.
    pub cache: CacheMode,
    /// Read on, with a warning, where a layer was made on another backing file than the one that is there.
    pub salvage: bool,
}

impl OpenHow {
    /// The permissions that a node with these settings takes, but for what is particular to its format.
    pub(super) fn access(&self, settings: &Settings) -> Access {
        match (settings.force_share, settings.write, self.look_only) {
            (true, _, true) => Access::NONE,
            (true, ..) => Access::SHARED,
            (_, true, _) => Access::WRITE,
            (_, _, true) => Access::LOOK,
            _ => Access::READ,
        }
    }
}

/// Something to tell the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A line as it is.
    Line(String),
    /// A warning, to be marked as one.
    Warning(String),
}

/// Opens images.
#[derive(Debug)]
pub struct Opener<'a> {
    pub(super) drivers: &'a Drivers,
    policy: Policy,
    notices: Mutex<Vec<Notice>>,
}

/// What is known while one image is opened.
#[derive(Debug, Default)]
pub(super) struct Trail {
    /// Names given to nodes.
    pub names: Names,
    /// Layers with a backing file that were met.
    seen: Vec<(Identity, &'static str)>,
    /// How many images we are inside of.
    pub depth: usize,
}

impl<'a> Opener<'a> {
    /// An opener that knows these drivers.
    pub fn new(drivers: &'a Drivers, policy: Policy) -> Self {
        Self { drivers, policy, notices: Mutex::default() }
    }

    /// The drivers it knows.
    pub fn drivers(&self) -> &'a Drivers {
        self.drivers
    }

    /// What images may make it open.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// What came up while opening, since the last call.
    pub fn take_notices(&self) -> Vec<Notice> {
        std::mem::take(&mut self.notices.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Something that came up, to be told by whoever asks for it.
    pub fn notice(&self, notice: Notice) {
        self.notices.lock().unwrap_or_else(|e| e.into_inner()).push(notice);
    }

    /// Opens an image with its backing chain.
    pub fn open(&self, image: &ImageRef, how: &OpenHow) -> Result<Arc<Node>> {
        self.open_named(image, how).map_err(|error| error.context(format!("Could not open '{}'", image.shown())))
    }

    /// The same for an image that is being talked of: errors do not begin with its name.
    pub fn open_named(&self, image: &ImageRef, how: &OpenHow) -> Result<Arc<Node>> {
        self.ask(image, how).and_then(|ask| self.chain(ask, how, &mut Trail::default()))
    }

    /// Opens an image that has just been made, in its files, which nobody can find by name yet, with its backing chain.
    pub fn open_made(&self, name: &OsStr, made: MadeFiles, how: &OpenHow) -> Result<Arc<Node>> {
        let image = ImageRef::name(name);
        let ask = self.ask(&image, how).map(|ask| Ask { made: Some(made), ..ask });
        ask.and_then(|ask| self.chain(ask, how, &mut Trail::default()))
            .map_err(|error| error.context(format!("Could not open '{}'", image.shown())))
    }

    /// Refuses, where the policy says so, to open what an image names.
    pub fn may_open(&self, image: &str, named: &str) -> Result<()> {
        match self.policy {
            Policy::Follow => Ok(()),
            Policy::Refuse => Err(Error::new(
                Kind::Forbidden,
                format!("'{image}' names the file '{named}', and an untrusted image may name none"),
            )),
        }
    }

    /// What the name of an image asks for.
    fn ask(&self, image: &ImageRef, how: &OpenHow) -> Result<Ask> {
        let (path, mut options) = match image {
            ImageRef::Tree(tree, _) => (None, tree.clone()),
            ImageRef::Name(name) => match name::json_text(name) {
                Some(text) => (None, name::parse_json(&text)?),
                None => (Some(name.clone()), OptionTree::new()),
            },
        };
        if let Some(format) = &how.format {
            options.insert("driver".to_owned(), format.clone().into());
        }
        let settings = Settings::new(how.write, how.force_share, how.cache);
        Ok(Ask { path, options, settings, made: None })
    }

    /// Opens a layer and everything below it.
    pub(super) fn chain(&self, ask: Ask, how: &OpenHow, trail: &mut Trail) -> Result<Arc<Node>> {
        let mut layers: Vec<Layer> = Vec::new();
        let mut next = Some(ask);
        while let Some(ask) = next.take() {
            let (layer, below) = match self.layer(ask, how, trail).and_then(|layer| {
                let below = self.below(&layer, trail)?;
                Ok((layer, below))
            }) {
                Ok(opened) => opened,
                Err(error) => return Err(in_chain(error, layers.len())),
            };
            layers.push(layer);
            next = below;
        }
        let mut node: Option<Arc<Node>> = None;
        while let Some(layer) = layers.pop() {
            let depth = layers.len();
            if let Some(below) = &node {
                match layer.driver.accept_backing(below.driver()).map_err(|error| in_chain(error, depth)) {
                    Err(error) if how.salvage => {
                        self.notice(Notice::Warning(format!("{}: {}", layer.name(), error.message())));
                    }
                    other => other?,
                }
            }
            node = Some(Arc::new(layer.on(node)));
        }
        node.ok_or_else(|| Error::invalid("Must specify either driver or file"))
    }

    /// What lies below a layer, if that is to be opened.
    fn below(&self, layer: &Layer, trail: &mut Trail) -> Result<Option<Ask>> {
        let named = layer.driver.backing();
        let options = match &layer.below {
            Below::Nothing => return Ok(None),
            Below::Given(options) => options.clone(),
        };
        if named.is_none() && options.is_empty() {
            return Ok(None);
        }
        if let Some(named) = named {
            self.may_open(&layer.name(), &named.name)?;
        }
        if let Some(identity) = layer.identity() {
            if trail.seen.contains(&identity) {
                let text = format!("Backing file '{}' creates an infinite loop.", layer.name());
                return Err(Error::invalid(text));
            }
            trail.seen.push(identity);
        }
        self.ask_below(layer, options).map(Some).map_err(|error| in_chain(error, 1))
    }

    fn ask_below(&self, layer: &Layer, mut options: OptionTree) -> Result<Ask> {
        let settings = layer.settings.for_reading();
        let reference = options.shift_remove("").as_ref().and_then(as_text);
        if let Some(reference) = reference {
            return Err(super::layer::no_such_node(&reference, options.is_empty()));
        }
        let mut path = None;
        if let Some(named) = layer.driver.backing()
            && !options.contains_key("file.filename")
        {
            let base = layer.origin.base.as_deref();
            let there = |name: &OsString| std::path::Path::new(name).symlink_metadata().is_ok();
            let as_named = name::beside(base, named.name.as_ref());
            let elsewhere = || named.elsewhere.iter().filter_map(|name| name::literally_beside(base, name)).find(there);
            let full = match as_named {
                Some(full) if there(&full) => Some(full),
                other => elsewhere().or(other),
            };
            let full = full.ok_or_else(|| {
                let shown = layer.name();
                Error::invalid(format!("Cannot tell where the backing file '{}' of '{shown}' is", named.name))
            })?;
            if let Some(format) = &named.format
                && !options.contains_key("driver")
            {
                options.insert("driver".to_owned(), format.clone().into());
            }
            match name::json_text(&full) {
                Some(text) => {
                    for (key, value) in name::parse_json(&text)? {
                        options.entry(key).or_insert(value);
                    }
                }
                None => path = Some(full),
            }
        } else if let Some(format) = layer.driver.backing().and_then(|named| named.format.as_ref())
            && !options.contains_key("driver")
        {
            options.insert("driver".to_owned(), format.clone().into());
        }
        Ok(Ask { path, options, settings, made: None })
    }
}

/// An error that came up so many layers down.
fn in_chain(error: Error, depth: usize) -> Error {
    match depth {
        0 => error,
        _ => error.context(vec!["Could not open backing file"; depth].join(": ")),
    }
}
