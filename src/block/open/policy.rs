//! What an image may make us open. What the user types is always allowed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::Opener;
use crate::block::error::Context;
use crate::block::{Error, ErrorKind, Result, name};
use crate::storage;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Policy {
    /// Whatever it names, as the reference does.
    #[default]
    Follow,
    /// Nothing but these files: an image that names another one is refused.
    Refuse(Allowed),
}

/// Files, and folders with all that is in them. Symbolic links are followed before it is looked where a file is, so a
/// link in a folder that is allowed allows nothing outside.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Allowed {
    resolved: Vec<PathBuf>,
}

impl Allowed {
    /// Allows a file, or a folder, that is there.
    pub fn add(&mut self, path: &Path) -> Result<()> {
        let resolved = std::fs::canonicalize(path).map_err(storage::Error::from);
        self.resolved.push(resolved.with_context(|| format!("Could not find '{}'", path.display()))?);
        Ok(())
    }

    fn holds(&self, path: &Path) -> bool {
        std::fs::canonicalize(path).is_ok_and(|path| self.resolved.iter().any(|allowed| path.starts_with(allowed)))
    }
}

impl Policy {
    /// Allows a file whose name the user has typed; one that is not there allows nothing.
    pub(super) fn allow_typed(&mut self, path: &Path) {
        if let Self::Refuse(allowed) = self {
            allowed.resolved.extend(std::fs::canonicalize(path).ok().filter(|path| !path.is_dir()));
        }
    }
}

impl Opener<'_> {
    /// Refuses, where the policy says so, to open what an image names; `path` is what the name comes to, seen from
    /// the image. Only files can be allowed.
    pub fn may_open(&self, image: &str, named: &str, path: Option<&OsStr>) -> Result<()> {
        self.may_open_file(image, named, path.filter(|path| name::protocol(path).is_none()))
    }

    /// The same for a name that is never taken for a protocol.
    pub fn may_open_file(&self, image: &str, named: &str, path: Option<&OsStr>) -> Result<()> {
        let Policy::Refuse(allowed) = &self.policy else { return Ok(()) };
        if path.map(Path::new).is_some_and(|path| allowed.holds(path)) {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Forbidden,
            format!("'{image}' names the file '{named}', and an untrusted image may name none that is not allowed"),
        ))
    }
}
