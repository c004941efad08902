//! How an image is named: a plain file name, `file:NAME`, `json:{...}`, or a tree of options.

use std::ffi::OsString;

use serde_json::{Map, Value};

/// Options of a node as a tree: `driver`, `file`, `backing`, ... Values are what the user gave.
pub type OptionTree = Map<String, Value>;

/// How an image is named.
#[derive(Debug, Clone, PartialEq)]
pub enum ImageRef {
    /// As typed: a file name, perhaps with a protocol, perhaps `json:{...}`.
    Name(OsString),
    /// A tree of options (`--image-opts`).
    Tree(OptionTree),
}

impl ImageRef {
    /// A plain name.
    pub fn name(name: impl Into<OsString>) -> Self {
        Self::Name(name.into())
    }
}
