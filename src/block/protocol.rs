//! What is known of a protocol without a file: its name, how it is spelt, opened and created. A protocol gives
//! bytes under a name; what is in them is for a format to say.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::options::{CreateOptions, OptionSpec};
use super::{OptionTree, Result, Secrets};
use crate::storage::outgoing::Outgoing;
use crate::storage::staging::Staging;
use crate::storage::{CacheMode, Storage};

/// What a name says to a protocol.
#[derive(Debug, Clone, Default)]
pub struct Spelt {
    /// The name as the protocol knows it. It need not be text, which options are.
    pub path: Option<OsString>,
    /// Options that stand in the name.
    pub options: OptionTree,
}

impl Spelt {
    /// A path and nothing else.
    pub fn path(path: OsString) -> Self {
        Self { path: Some(path), options: OptionTree::new() }
    }
}

/// What a protocol is given to open something.
pub struct FileRequest<'a> {
    /// What [`Protocol::take_name`] gave.
    pub path: Option<OsString>,
    /// The options that are the protocol's own: it takes out those it knows; what is left is refused.
    pub options: &'a mut OptionTree,
    /// For reading and writing.
    pub write: bool,
    /// What the page cache does.
    pub cache: CacheMode,
    /// `aio=native` where the options do not say.
    pub native_aio: bool,
    /// Whether the space of what is made zeros, or is discarded, is kept.
    pub keep_space: bool,
    /// The secrets that options may name.
    pub secrets: &'a Secrets,
    /// What answers may not be followed elsewhere (`--untrusted`).
    pub untrusted: bool,
}

/// What a protocol has opened.
pub struct OpenedFile {
    /// The bytes.
    pub storage: Arc<dyn Storage>,
    /// The name that opens it again with nothing else, if there is one.
    pub path: Option<OsString>,
    /// The folder of the name means something: names in the image are relative to it. `false` for what is no file of the
    /// host.
    pub based: bool,
    /// The options that open it again, beside the protocol's name.
    pub strong: Map<String, Value>,
    /// Permissions are to be taken on it. `false` for what is no file of the host.
    pub locking: bool,
}

/// What is known of a protocol: one static each.
pub trait Protocol: Sync + fmt::Debug {
    /// Its name among the drivers.
    fn name(&self) -> &'static str;

    /// What names of it start with, before a colon.
    fn prefix(&self) -> &'static str {
        self.name()
    }

    /// What names of it may start with instead: then all of such a name is given to [`Self::plain`].
    fn schemes(&self) -> &'static [&'static str] {
        &[]
    }

    /// Whether it is the protocol for what lies under a plain path. The first of the table that says so is taken;
    /// `false` for one that only a prefix names.
    fn takes(&self, path: &Path) -> bool;

    /// What `PREFIX:rest` says; `rest` is all that stands behind the first colon.
    fn spelt(&self, rest: &OsStr) -> Result<Spelt>;

    /// What a name says that does not start with the protocol's, given to it by `-f` or `driver`.
    fn plain(&self, name: &OsStr) -> Result<Spelt>;

    /// Whether it makes connections.
    fn is_remote(&self) -> bool {
        false
    }

    /// Files of this host that it reads without being told by a name: who asks. Where there are none, they are not read.
    fn credentials(&self) -> Vec<PathBuf> {
        Vec::new()
    }

    /// Whether what has come of a file is kept in a temporary one.
    fn keeps_what_comes(&self) -> bool {
        false
    }

    /// Takes the name from where it stands: `path`, or an option. Refused here, before options that all nodes have
    /// are judged, where there must be one.
    fn take_name(&self, path: Option<OsString>, options: &mut OptionTree) -> Result<Option<OsString>>;

    /// Opens it.
    fn open(&self, request: FileRequest<'_>) -> Result<OpenedFile>;

    /// Able to take whole files from front to back, and no other way.
    fn sending(&self) -> Option<&'static dyn SendFile> {
        None
    }

    /// Able to make new files.
    fn creating(&self) -> Option<&'static dyn CreateFile>;
}

/// Able to take whole files from front to back.
pub trait SendFile: Sync + fmt::Debug {
    /// Takes a file of so many bytes, or fewer; it is there when it is complete. `options` are what its name says.
    fn send(&self, options: &OptionTree, len: u64) -> Result<Box<dyn Outgoing>>;
}

/// Able to make new files.
pub trait CreateFile: Sync {
    /// The options that a new file takes beside the format's own.
    fn options(&self) -> &'static [OptionSpec];

    /// Refuses, before anything is made, what cannot be. `preallocates`: `preallocation` is the format's to do.
    fn check(&self, path: &Path, options: &CreateOptions, preallocates: bool) -> Result<()>;

    /// Whether a new file may share blocks with others, where the host can.
    fn may_share(&self, options: &CreateOptions) -> bool {
        let _ = options;
        true
    }

    /// Makes an empty file, or takes what can only be there already. `secondary`: not the one that the image is
    /// named by.
    fn create(
        &self,
        path: &Path,
        options: &CreateOptions,
        secondary: bool,
        staging: &Staging,
    ) -> Result<Arc<dyn Storage>>;
}
