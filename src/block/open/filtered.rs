//! A filter over what lies below it: as the file of a format, or as an image of its own.
//!
//! Invariant: filters over filters are capped, like images in images.

use std::ffi::OsString;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::layer::{Ask, OpenedLayer, add, no_such_node, shown};
use super::nested::DEEPEST;
use super::opened::Opened;
use super::settings::Settings;
use super::{OpenHow, Opener, Trail};
use crate::block::bare::Bare;
use crate::block::filter::{Below, Filter, FilterRequest};
use crate::block::keys::as_text;
use crate::block::name::{self, first_key, take_below};
use crate::block::node::Origin;
use crate::block::{Child, Error, Layer, Node, Result};
use crate::storage::Storage;
use crate::storage::lock::Access;

/// A filter, opened.
pub(super) struct Over {
    driver: Bare,
    origin: Origin,
    storage: Arc<dyn Storage>,
    settings: Settings,
    locking: bool,
    access: Access,
}

impl Over {
    /// As what a format lies in.
    pub fn into_file(self, role: &str) -> Opened {
        let Self { driver, origin, storage, locking, access, .. } = self;
        let (tree, path, base) = (origin.tree.clone(), origin.path.clone(), origin.base.clone());
        let node = Node::new(Box::new(driver), None, shown(&origin)).with_origin(origin);
        let name = node.name().to_owned();
        let child = Child { role: role.to_owned(), name, driver: node.driver().format(), storage };
        Opened { child, tree, path, base, inner: Some(Arc::new(node)), locking, access }
    }

    /// As an image without a format.
    pub fn into_layer(self, how: &OpenHow, trail: &Trail) -> Result<OpenedLayer> {
        let Self { driver, origin, storage, settings, locking, access } = self;
        if locking {
            let wanted = settings.access();
            let wanted = if how.exclusive { wanted } else { wanted.of_raw() };
            trail.lock(&*storage, wanted.and(access))?;
        }
        let layer = Layer::new(Box::new(driver)).with_manner(settings.manner());
        Ok(OpenedLayer::new(Arc::new(layer), None, origin, settings, false))
    }
}

impl Opener<'_> {
    /// Opens a filter and what lies below it.
    pub(super) fn filtered(
        &self,
        filter: &'static dyn Filter,
        ask: Ask,
        how: &OpenHow,
        trail: &mut Trail,
    ) -> Result<Over> {
        let Ask { path, mut options, settings, .. } = ask;
        if trail.depth >= DEEPEST {
            return Err(Error::invalid("Images are nested too deeply"));
        }
        let (settings, claims) = settings.take(&mut options);
        let mut path = path;
        if let Some(name) = path.take() {
            let wrapped = self.drivers.wrapped(filter, &name)?;
            add(&mut options, wrapped.options);
            path = Some(wrapped.below);
        }
        let mut below = take_below(&mut options, filter.role());
        let reference = options.shift_remove(filter.role()).as_ref().and_then(as_text);
        claims.settle(&mut trail.names)?;
        let mut opened: Option<(Opened, Arc<Node>)> = None;
        trail.depth += 1;
        let mut open_below = || {
            if let Some(reference) = &reference {
                return Err(no_such_node(reference, below.is_empty() && path.is_none()));
            }
            if below.is_empty() && path.is_none() {
                return Err(Error::invalid(format!("A block device must be specified for \"{}\"", filter.role())));
            }
            let mut named: Option<OsString> = path.take();
            if let Some(text) = named.as_deref().and_then(name::json_text) {
                add(&mut below, name::parse_json(&text)?);
                named = None;
            }
            let file = self.bytes_of(filter.role(), named, std::mem::take(&mut below), &settings, how, trail)?;
            let node = match &file.inner {
                Some(node) => node.clone(),
                None => Arc::new(bare_node(&file, &settings)?),
            };
            let path = node.origin().path.clone();
            let child = file.child.clone();
            let compresses = |image: &Arc<Node>| {
                let format = self.drivers.format(image.driver().format());
                format.and_then(|format| format.creating()).is_some_and(|create| create.compresses())
            };
            let image = file.inner.clone().map(|image| (image.clone(), compresses(&image)));
            opened = Some((file, node));
            Ok(Below { child, path, write: settings.purpose.writes(), cache: settings.cache(), image })
        };
        let request = FilterRequest { options: &mut options, below: &mut open_below, objects: self.secrets };
        let done = filter.open(request);
        trail.depth -= 1;
        let done = done?;
        if let Some(key) = first_key(&options) {
            let name = filter.name();
            return Err(Error::invalid(match filter.has_prefix() {
                true => format!("Block protocol '{name}' doesn't support the option '{key}'"),
                false => format!("Block format '{name}' does not support the option '{key}'"),
            }));
        }
        settings.may_write()?;
        let (file, node) = opened.ok_or_else(|| Error::invalid("a filter over nothing"))?;
        let mut tree = Map::from_iter([("driver".to_owned(), Value::from(filter.name()))]);
        tree.extend(done.strong);
        tree.insert(filter.role().to_owned(), Value::Object(file.tree));
        let below = Child { role: filter.role().to_owned(), storage: done.storage.clone(), ..file.child };
        let driver = Bare::open(filter.name(), below, settings.purpose.writes())?;
        let inner = vec![(filter.role().to_owned(), node)];
        let origin = Origin { path: done.path, base: file.base, tree, protocol: false, inner };
        let access = done.access.and(file.access);
        Ok(Over { driver, origin, storage: done.storage, settings, locking: file.locking, access })
    }
}

/// A file that a filter is before, as a node: to be shown.
fn bare_node(file: &Opened, settings: &Settings) -> Result<Node> {
    let child = Child { role: "file".to_owned(), ..file.child.clone() };
    let driver = Bare::open(file.child.driver, child, settings.purpose.writes())?;
    let (path, base, tree) = (file.path.clone(), file.base.clone(), file.tree.clone());
    let origin = Origin { path, base, tree, protocol: true, inner: Vec::new() };
    Ok(Node::new(Box::new(driver), None, file.child.name.clone()).with_origin(origin))
}
