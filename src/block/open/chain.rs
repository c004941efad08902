//! Backing chains, opened link by link, never by recursion.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use super::layer::{Ask, Below, OpenedLayer};
use super::settings::Settings;
use super::{OpenHow, Opener, Trail};
use crate::block::keys::as_text;
use crate::block::node::Origin;
use crate::block::{BackingRef, Error, ImageRef, Node, Notice, OptionTree, Purpose, Result, name};
use crate::storage::{CacheMode, Storage};

impl Opener<'_> {
    /// What the name of an image asks for.
    pub(super) fn ask(&self, image: &ImageRef, how: &OpenHow) -> Result<Ask> {
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
        let settings = Settings::new(how.purpose, how.force_share, how.cache).with_native_aio(how.native_aio);
        Ok(Ask { path, options, settings, made: None })
    }

    /// Opens a layer and everything below it.
    pub(super) fn chain(&self, ask: Ask, how: &OpenHow, trail: &mut Trail) -> Result<Arc<Node>> {
        let mut layers: Vec<OpenedLayer> = Vec::new();
        let mut next = Some(ask);
        while let Some(ask) = next.take() {
            let named = ask.path.as_ref().map(|path| path.to_string_lossy().into_owned());
            let opened = match (self.layer(ask, how, trail), named) {
                (Err(error), Some(name)) => Err(error.about(name)),
                (opened, _) => opened,
            };
            let (layer, below) = match opened.and_then(|layer| {
                let below = self.below(&layer, trail).map_err(|error| error.about(layer.name()))?;
                Ok((layer, below))
            }) {
                Ok(opened) => opened,
                Err(error) => return Err(in_chain(error, layers.len())),
            };
            layers.push(layer);
            next = below;
        }
        let mut node: Option<Arc<Node>> = None;
        let mut fresh = Vec::new();
        while let Some(layer) = layers.pop() {
            let depth = layers.len();
            if let Some(below) = &node {
                let accepted = self.accept(&layer, below, how).map_err(|error| error.about(layer.name()));
                accepted.map_err(|error| in_chain(error, depth))?;
            }
            if let Some(key) = layer.key.clone() {
                fresh.push((key, layer.origin.base.clone(), layer.layer.clone()));
            }
            node = Some(Arc::new(layer.on(node)));
        }
        // Not before the chain is complete: one that leads into itself meets its own locks.
        fresh.into_iter().for_each(|(key, base, layer)| self.held.add(key, base, &layer));
        node.ok_or_else(|| Error::invalid("Must specify either driver or file"))
    }

    /// Opens the image's own layer alone, on top of what is open already.
    pub fn open_on(&self, image: &ImageRef, how: &OpenHow, backing: Option<Arc<Node>>) -> Result<Arc<Node>> {
        let alone = OpenHow { no_backing: true, ..how.clone() };
        let open = || {
            let layer = self.layer(self.ask(image, how)?, &alone, &mut Trail::default())?;
            let mut next = backing.as_ref();
            while let Some(below) = next {
                if layer.identity().is_some_and(|identity| below.identity() == Some(identity)) {
                    return Err(Error::invalid(format!("Backing file '{}' creates an infinite loop.", layer.name())));
                }
                next = below.backing();
            }
            backing.as_ref().map_or(Ok(()), |below| self.accept(&layer, below, how))?;
            Ok(layer.on(None))
        };
        let node = open().map_err(|error| error.context(format!("Could not open '{}'", image.shown())))?;
        Ok(Arc::new(node.on(backing)))
    }

    /// The chain with the layer so many steps below `top` open for writing. That layer is opened again and takes over
    /// the locks of the one that was open for reading, with nobody between; whoever has others in the way is told
    /// before anything changes. The chain that was must not be read any more: it knows nothing of what is written.
    pub fn open_lower(&self, top: &Arc<Node>, depth: usize, cache: CacheMode) -> Result<Arc<Node>> {
        let mut above = Vec::new();
        let mut lower = top;
        for _ in 0..depth {
            above.push(lower);
            lower = lower.backing().ok_or_else(|| Error::invalid("Image does not have a backing file"))?;
        }
        if lower.driver().writing().is_some() {
            return Ok(top.clone());
        }
        let origin = lower.origin();
        let (path, mut options) = match &origin.path {
            Some(path) => (Some(path.clone()), OptionTree::new()),
            None => (None, name::flatten(origin.tree.clone())),
        };
        options.retain(|key, _| !key.starts_with("backing."));
        options.shift_remove("backing");
        options.insert("driver".to_owned(), lower.driver().format().into());
        let ask = Ask { path, options, settings: Settings::new(Purpose::Write, false, cache), made: None };
        let how = OpenHow { no_backing: true, purpose: Purpose::Write, cache, ..OpenHow::default() };
        let probed_raw = lower.layer().is_probed_raw();
        let mut trail = Trail { instead: files_of(lower), probed_raw, ..Trail::default() };
        let opened = self.layer(ask, &how, &mut trail)?;
        self.held.forget(lower.layer());
        let origin = Origin { inner: opened.origin.inner, ..origin.clone() };
        let node = Node::of(opened.layer, lower.backing().cloned(), lower.name().to_owned()).with_origin(origin);
        Ok(above.into_iter().rev().fold(Arc::new(node), |below, node| Arc::new(node.over(Some(below)))))
    }

    /// Refuses a backing layer that is not the one that the layer was made on, or warns.
    fn accept(&self, layer: &OpenedLayer, below: &Node, how: &OpenHow) -> Result<()> {
        match layer.driver().accept_backing(below.driver()) {
            Err(error) if how.salvage => {
                self.notice(Notice::Warning(format!("{}: {}", layer.name(), error.message())));
                Ok(())
            }
            other => other,
        }
    }

    /// What lies below a layer, if that is to be opened.
    fn below(&self, layer: &OpenedLayer, trail: &mut Trail) -> Result<Option<Ask>> {
        let named = layer.driver().backing();
        trail.named = None;
        let options = match &layer.below {
            Below::Nothing => return Ok(None),
            Below::Given(options) => options.clone(),
        };
        if named.is_none() && options.is_empty() {
            return Ok(None);
        }
        if let (Some(named), false) = (named, layer.own || options.contains_key("file.filename")) {
            let path = self.path_of(layer, named);
            let shown = named.name.to_string_lossy();
            self.may_open(&layer.name(), &shown, path.as_deref())?;
            trail.named = Some((layer.name(), shown.into_owned()));
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

    fn ask_below(&self, layer: &OpenedLayer, mut options: OptionTree) -> Result<Ask> {
        let settings = layer.settings.below();
        let reference = options.shift_remove("").as_ref().and_then(as_text);
        if let Some(reference) = reference {
            return Err(super::layer::no_such_node(&reference, options.is_empty()));
        }
        let mut path = None;
        if let Some(named) = layer.driver().backing()
            && !options.contains_key("file.filename")
        {
            let full = self.path_of(layer, named).ok_or_else(|| {
                let (shown, name) = (layer.name(), named.name.display());
                Error::invalid(format!("Cannot tell where the backing file '{name}' of '{shown}' is"))
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
        } else if let Some(format) = layer.driver().backing().and_then(|named| named.format.as_ref())
            && !options.contains_key("driver")
        {
            options.insert("driver".to_owned(), format.clone().into());
        }
        Ok(Ask { path, options, settings, made: None })
    }

    /// What the name of a layer's backing file comes to: as it is written, or, where nothing is there, as it is looked for
    /// elsewhere. The host is not asked where nothing may come of it.
    fn path_of(&self, layer: &OpenedLayer, named: &BackingRef) -> Option<OsString> {
        let base = layer.origin.base.as_deref();
        if !self.may_search() {
            return name::beside(base, &named.name);
        }
        let there = |name: &OsString| Path::new(name).symlink_metadata().is_ok();
        match name::find_beside(base, &named.name) {
            Some(full) if there(&full) => Some(full),
            as_named => {
                let mut elsewhere = named.elsewhere.iter().filter_map(|name| name::find_literally_beside(base, name));
                elsewhere.find(there).or(as_named)
            }
        }
    }
}

/// The files of a layer, and of the images that it lies in.
fn files_of(node: &Node) -> Vec<Arc<dyn Storage>> {
    let mut files: Vec<_> = node.driver().files().iter().map(|child| child.storage.clone()).collect();
    for (_, inner) in &node.origin().inner {
        files.extend(files_of(inner));
    }
    files
}

/// An error that came up so many layers down.
fn in_chain(error: Error, depth: usize) -> Error {
    match depth {
        0 => error,
        _ => error.context(vec!["Could not open backing file"; depth].join(": ")),
    }
}
