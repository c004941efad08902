//! What is known of a filter without an image: its name, how it is spelt, how it is put over what lies below. A filter
//! stands between a format and its file, or over an image, and what is read through it is what was written through it. It
//! may fail, delay, watch or compare, and decide how what passes is stored: compressed, or with room behind it.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::{Child, Error, Node, OptionTree, Result, Secrets};
use crate::storage::lock::Access;
use crate::storage::{CacheMode, Storage};

/// What a name says to a filter.
#[derive(Debug, Clone)]
pub struct Wrapped {
    /// The names of what lies below, and what each is to the filter.
    pub below: Vec<(&'static str, OsString)>,
    /// Options that stand in the name.
    pub options: OptionTree,
}

/// What lies below a filter.
pub struct Below {
    /// Its bytes.
    pub child: Child,
    /// The name that opens it again with nothing else, if there is one.
    pub path: Option<OsString>,
    /// It is written to.
    pub write: bool,
    /// What the page cache does.
    pub cache: CacheMode,
    /// The image whose disk the bytes are, if they are one's, and whether its format, or that of the image below the
    /// filters that it is, stores compressed units.
    pub image: Option<(Arc<Node>, bool)>,
}

/// A filter over what lies below it.
pub struct Filtered {
    /// The bytes as they are seen through it.
    pub storage: Arc<dyn Storage>,
    /// The name that opens it again with nothing else, if there is one.
    pub path: Option<OsString>,
    /// The options that open it again, beside the filter's name and what lies below.
    pub strong: Map<String, Value>,
    /// Permissions on what lies below, beside those that its users take.
    pub access: Access,
}

/// What a filter is given to open something.
pub struct FilterRequest<'a> {
    /// Its options: it takes out those it knows; what is left is refused.
    pub options: &'a mut OptionTree,
    /// Opens one of those that lie below, by what it is to the filter. Called once for each.
    pub below: &'a mut dyn FnMut(&str) -> Result<Below>,
    /// Those that were given of a list: `children.0`, `children.1`.
    pub listed: Vec<String>,
    /// The objects that options name.
    pub objects: &'a Secrets,
}

/// What lies below a filter, by its name in options: `image` in `image.filename`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lower {
    /// Bytes: without a driver those of a file.
    Bytes(&'static str),
    /// An image: a name alone is enough to find its format out.
    Image(&'static str),
    /// Any number of images, counted from 0: `children` in `children.0.filename`.
    Images(&'static str),
}

/// What is known of a filter: one static each.
pub trait Filter: Sync + fmt::Debug {
    /// Its name among the drivers.
    fn name(&self) -> &'static str;

    /// What lies below, and its name in options: the first is the one whose place `map` shows.
    fn children(&self) -> &'static [Lower];

    /// Whether names may start with its name.
    fn has_prefix(&self) -> bool {
        false
    }

    /// What `NAME:rest` says; `rest` is all that stands behind the first colon.
    fn spelt(&self, _rest: &OsStr) -> Result<Wrapped> {
        Err(Error::invalid(format!("Unknown protocol '{}'", self.name())))
    }

    /// Puts it over what [`FilterRequest::below`] opens.
    fn open(&self, request: FilterRequest<'_>) -> Result<Filtered>;
}
