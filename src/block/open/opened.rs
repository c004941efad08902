//! The bytes of a layer, opened or just made, before a driver reads them.

use std::ffi::OsString;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::block::{Child, Node, OptionTree};
use crate::storage::Storage;
use crate::storage::lock::Access;

/// Files of an image, by the names that are written in it.
pub type MadeBeside = Vec<(OsString, Arc<dyn Storage>)>;

/// The files of an image that has just been made, which have no names yet.
#[derive(Debug, Clone)]
pub struct MadeFiles {
    /// The one that the image will be named by.
    pub main: Arc<dyn Storage>,
    /// The protocol that made it.
    pub protocol: &'static str,
    /// The name that it will have for the protocol.
    pub path: OsString,
    /// The others, by the names that are written in the image.
    pub beside: MadeBeside,
    /// The options by which the image is opened.
    pub options: OptionTree,
}

/// The file of a layer, and where it came from.
pub(super) struct Opened {
    pub child: Child,
    pub tree: Map<String, Value>,
    pub path: Option<OsString>,
    /// Names found in the image are relative to it.
    pub base: Option<OsString>,
    /// What the user calls it.
    pub node_name: Option<String>,
    pub inner: Option<Arc<Node>>,
    pub locking: bool,
    /// Permissions beside those that the layer takes.
    pub access: Access,
}

impl MadeFiles {
    /// The main one as if it had been opened by its name, and the others.
    pub(super) fn opened(self) -> (Opened, MadeBeside) {
        let name = self.path.to_string_lossy().into_owned();
        let tree = Map::from_iter([
            ("driver".to_owned(), Value::from(self.protocol)),
            ("filename".to_owned(), Value::from(name.clone())),
        ]);
        let child = Child { role: "file".to_owned(), name, driver: self.protocol, storage: self.main };
        let (path, base) = (Some(self.path.clone()), Some(self.path));
        let opened =
            Opened { child, tree, path, base, node_name: None, inner: None, locking: true, access: Access::NONE };
        (opened, self.beside)
    }
}
