//! What is known of a filter without an image: its name, how it is spelt, how it is put over what lies below. A filter
//! stands between a format and its file, or over an image, and changes no byte: it may fail, delay or watch.

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
    /// The name of what lies below.
    pub below: OsString,
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
    /// The image whose disk the bytes are, if they are one's, and whether its format stores compressed units.
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
    /// Opens what lies below. Called once.
    pub below: &'a mut dyn FnMut() -> Result<Below>,
    /// The objects that options name.
    pub objects: &'a Secrets,
}

/// What is known of a filter: one static each.
pub trait Filter: Sync + fmt::Debug {
    /// Its name among the drivers.
    fn name(&self) -> &'static str;

    /// The name of its one child, as in `image.filename`: `image` or `file`.
    fn role(&self) -> &'static str;

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
