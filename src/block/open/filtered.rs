//! A filter over what lies below it: as the file of a format, or as an image of its own.
//!
//! Invariant: filters over filters are capped, like images in images.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::layer::{Ask, OpenedLayer, add, no_such_node, shown};
use super::nested::DEEPEST;
use super::opened::Opened;
use super::settings::Settings;
use super::{OpenHow, Opener, Trail};
use crate::block::bare::Bare;
use crate::block::filter::{Below, Filter, FilterRequest, Lower};
use crate::block::keys::as_text;
use crate::block::name::{self, first_key, take_below};
use crate::block::node::Origin;
use crate::block::{Child, Error, Layer, Node, OptionTree, Result};
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
        let Origin { tree, path, base, node_name, .. } = origin.clone();
        let node = Node::new(Box::new(driver), None, shown(&origin)).with_origin(origin);
        let name = node.name().to_owned();
        let child = Child { role: role.to_owned(), name, driver: node.driver().format(), storage };
        Opened { child, tree, path, base, node_name, inner: Some(Arc::new(node)), locking, access }
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
        let mut names = Vec::new();
        if let Some(name) = path {
            let wrapped = self.drivers.wrapped(filter, &name)?;
            add(&mut options, wrapped.options);
            names = wrapped.below;
        }
        let mut wanted = Vec::new();
        let mut listed = Vec::new();
        for child in filter.children() {
            match child {
                Lower::Bytes(role) | Lower::Image(role) => {
                    let image = matches!(child, Lower::Image(_));
                    let below = take_below(&mut options, role);
                    let reference = options.shift_remove(*role).as_ref().and_then(as_text);
                    let path = names.iter().position(|(named, _)| named == role).map(|at| names.swap_remove(at).1);
                    wanted.push(ChildOptions { role: (*role).to_owned(), image, path, below, reference });
                }
                Lower::Images(list) => {
                    let all = take_list(&mut options, list)?;
                    listed.extend(all.iter().map(|wanted| wanted.role.clone()));
                    wanted.extend(all);
                }
            }
        }
        let node_name = claims.settle(&mut trail.names)?;
        let alone = filter.children().len() == 1 && listed.is_empty();
        let mut opened: Vec<(Opened, Arc<Node>)> = Vec::new();
        trail.depth += 1;
        let mut open_below = |role: &str| {
            let missing = || Error::invalid(format!("A block device must be specified for \"{role}\""));
            let at = wanted.iter().position(|wanted| wanted.role == role).ok_or_else(missing)?;
            let ChildOptions { image, mut path, mut below, reference, .. } = wanted.swap_remove(at);
            if let Some(reference) = &reference {
                return Err(no_such_node(reference, below.is_empty() && path.is_none()));
            }
            if below.is_empty() && path.is_none() {
                return Err(missing());
            }
            if let Some(text) = path.as_deref().and_then(name::json_text) {
                add(&mut below, name::parse_json(&text)?);
                path = None;
            }
            let file = match (image, below.contains_key("driver"), &path) {
                (true, false, None) => return Err(Error::invalid("Must specify either driver or file")),
                (true, false, Some(_)) => {
                    let ask = Ask { path, options: below, settings, made: None };
                    self.nested(role, ask, how, trail)?
                }
                _ => self.bytes_of(role, path, below, &settings, how, trail)?,
            };
            if !alone && file.locking {
                let wanted = settings.access();
                let wanted = if how.exclusive { wanted } else { wanted.of_raw() };
                trail.lock(&*file.child.storage, wanted)?;
            }
            let node = match &file.inner {
                Some(node) => node.clone(),
                None => Arc::new(bare_node(&file, &settings)?),
            };
            let path = node.origin().path.clone();
            let child = file.child.clone();
            let compresses = |image: &Arc<Node>| {
                let format = self.drivers.format(image.beneath_filters().driver().format());
                format.and_then(|format| format.creating()).is_some_and(|create| create.compresses())
            };
            let image = file.inner.clone().map(|image| (image.clone(), compresses(&image)));
            opened.push((file, node));
            Ok(Below { child, path, write: settings.purpose.writes(), cache: settings.cache(), image })
        };
        let request = FilterRequest { options: &mut options, below: &mut open_below, listed, objects: self.secrets };
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
        let mut tree = Map::from_iter([("driver".to_owned(), Value::from(filter.name()))]);
        tree.extend(done.strong);
        for child in filter.children() {
            let of = |wanted: &str| opened.iter().find(|(file, _)| file.child.role == wanted);
            match child {
                Lower::Bytes(role) | Lower::Image(role) => {
                    let value = of(role).map_or(Value::Null, |(file, _)| Value::Object(file.tree.clone()));
                    tree.insert((*role).to_owned(), value);
                }
                Lower::Images(list) => {
                    let all = opened.iter().map(|(file, _)| Value::Object(file.tree.clone())).collect();
                    tree.insert((*list).to_owned(), Value::Array(all));
                }
            }
        }
        let inner = opened.iter().map(|(file, node)| (file.child.role.clone(), node.clone())).collect();
        let file = opened.into_iter().next().ok_or_else(|| Error::invalid("a filter over nothing"))?.0;
        let below = Child { storage: done.storage.clone(), ..file.child };
        let driver = Bare::open(filter.name(), below, settings.purpose.writes())?;
        let (path, base) = (done.path, file.base);
        let origin = Origin { path, base, tree, node_name, protocol: false, filter: alone, inner };
        let access = done.access.and(file.access);
        let locking = alone && file.locking;
        Ok(Over { driver, origin, storage: done.storage, settings, locking, access })
    }
}

/// What is said of one that lies below.
struct ChildOptions {
    role: String,
    /// An image, whose format must be said or found out.
    image: bool,
    path: Option<OsString>,
    below: OptionTree,
    reference: Option<String>,
}

/// What is said of those of a list, which are counted from 0 on.
fn take_list(options: &mut OptionTree, list: &str) -> Result<Vec<ChildOptions>> {
    let wrong = || Error::invalid(format!("Option {list} is not a valid array"));
    let mut all = take_below(options, list);
    let index = |key: &String| key.split('.').next().and_then(|index| index.parse::<usize>().ok());
    let indexes: Option<BTreeSet<usize>> = all.keys().map(index).collect();
    let indexes = indexes.ok_or_else(wrong)?;
    if indexes.iter().copied().ne(0..indexes.len()) {
        return Err(wrong());
    }
    let take = |index: usize| {
        let key = index.to_string();
        let below = take_below(&mut all, &key);
        let reference = all.shift_remove(&key).as_ref().and_then(as_text);
        ChildOptions { role: format!("{list}.{index}"), image: true, path: None, below, reference }
    };
    Ok(indexes.into_iter().map(take).collect())
}

/// A file that a filter is before, as a node: to be shown.
fn bare_node(file: &Opened, settings: &Settings) -> Result<Node> {
    let child = Child { role: "file".to_owned(), ..file.child.clone() };
    let driver = Bare::open(file.child.driver, child, settings.purpose.writes())?;
    let (path, base, tree) = (file.path.clone(), file.base.clone(), file.tree.clone());
    let node_name = file.node_name.clone();
    let origin = Origin { path, base, tree, node_name, protocol: true, filter: false, inner: Vec::new() };
    Ok(Node::new(Box::new(driver), None, file.child.name.clone()).with_origin(origin))
}
