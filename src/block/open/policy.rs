//! What an image may make us open. What the user types is always allowed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use super::Opener;
use crate::block::error::Context;
use crate::block::{Error, ErrorKind, Result, name};
use crate::storage::{self, HostFile, Storage};

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

    fn covers(&self, resolved: &Path) -> bool {
        self.resolved.iter().any(|allowed| resolved.starts_with(allowed))
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
        let allowed = || path.is_some_and(|path| std::fs::canonicalize(path).is_ok_and(|path| self.allows(&path)));
        if self.policy == Policy::Follow || allowed() { Ok(()) } else { Err(forbidden(image, named)) }
    }

    /// Whether an image may be looked for what belongs to it beside it: where it may name nothing there is nothing to find.
    pub(super) fn may_search(&self) -> bool {
        let made = || self.made.lock().unwrap_or_else(PoisonError::into_inner);
        match &self.policy {
            Policy::Follow => true,
            Policy::Refuse(allowed) => !allowed.resolved.is_empty() || !made().is_empty(),
        }
    }

    /// Whether images may name a file.
    fn allows(&self, resolved: &Path) -> bool {
        let made = || self.made.lock().unwrap_or_else(PoisonError::into_inner);
        match &self.policy {
            Policy::Follow => true,
            Policy::Refuse(allowed) => allowed.covers(resolved) || made().iter().any(|made| made == resolved),
        }
    }

    /// The same of a file that is open: what a name leads to can change after it was looked at.
    fn allows_open(&self, file: &HostFile) -> bool {
        file.whereabouts().is_ok_and(|path| self.allows(&path))
    }

    /// Refuses, where the policy says so, what was opened for an image: its name was allowed, but may have led
    /// elsewhere by then.
    pub(super) fn may_keep(&self, image: &str, named: &str, storage: &dyn Storage) -> Result<()> {
        match &self.policy {
            Policy::Refuse(_) if !storage.host().is_some_and(|file| self.allows_open(file)) => {
                Err(forbidden(image, named))
            }
            _ => Ok(()),
        }
    }
}

fn forbidden(image: &str, named: &str) -> Error {
    Error::new(
        ErrorKind::Forbidden,
        format!("'{image}' names the file '{named}', and an untrusted image may name none that is not allowed"),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::symlink;

    use super::*;
    use crate::block::{Drivers, NO_SECRETS};
    use crate::storage::file::FileHow;

    #[test]
    fn it_is_the_open_file_that_is_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir(at("in")).unwrap();
        for name in ["in/base", "out"] {
            std::fs::write(at(name), name).unwrap();
        }
        let mut allowed = Allowed::default();
        allowed.add(&at("in")).unwrap();
        let drivers = Drivers { formats: &[], protocols: &[], filters: &[] };
        let opener = Opener::new(&drivers, Policy::Refuse(allowed), &NO_SECRETS);
        let opens = |name: &str| opener.allows_open(&HostFile::open(&at(name), &FileHow::default()).unwrap());
        assert!(opener.may_open_file("image", "base", Some(at("in/base").as_os_str())).is_ok() && opens("in/base"));
        // Between the look and the opening it becomes a link to something else.
        std::fs::remove_file(at("in/base")).unwrap();
        symlink(at("out"), at("in/base")).unwrap();
        assert!(!opens("in/base"));
    }
}
