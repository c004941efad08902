//! Backing chains, opened link by link, never by recursion.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;

use super::layer::{Ask, Below, Layer};
use super::settings::Settings;
use super::{OpenHow, Opener, Trail};
use crate::block::keys::as_text;
use crate::block::{BackingRef, Error, ImageRef, Node, Notice, OptionTree, Result, name};

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
        let settings = Settings::new(how.purpose, how.force_share, how.cache);
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
        if let (Some(named), false) = (named, layer.own || options.contains_key("file.filename")) {
            let path = path_of(layer, named);
            self.may_open(&layer.name(), &named.name, path.as_deref())?;
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
        let settings = layer.settings.below();
        let reference = options.shift_remove("").as_ref().and_then(as_text);
        if let Some(reference) = reference {
            return Err(super::layer::no_such_node(&reference, options.is_empty()));
        }
        let mut path = None;
        if let Some(named) = layer.driver.backing()
            && !options.contains_key("file.filename")
        {
            let full = path_of(layer, named).ok_or_else(|| {
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

/// What the name of a layer's backing file comes to: as it is written, or, where nothing is there, as it is looked for
/// elsewhere.
fn path_of(layer: &Layer, named: &BackingRef) -> Option<OsString> {
    let base = layer.origin.base.as_deref();
    let there = |name: &OsString| Path::new(name).symlink_metadata().is_ok();
    match name::find_beside(base, named.name.as_ref()) {
        Some(full) if there(&full) => Some(full),
        as_named => {
            let mut elsewhere = named.elsewhere.iter().filter_map(|name| name::find_literally_beside(base, name));
            elsewhere.find(there).or(as_named)
        }
    }
}

/// An error that came up so many layers down.
fn in_chain(error: Error, depth: usize) -> Error {
    match depth {
        0 => error,
        _ => error.context(vec!["Could not open backing file"; depth].join(": ")),
    }
}
