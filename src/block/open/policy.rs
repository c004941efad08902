//! What an image may make us open. What the user types is always allowed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use super::Opener;
use crate::block::error::Context;
use crate::block::{Drivers, Error, ErrorKind, Result, name};
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
    /// Allows a file, or a folder, that is there; or the files of a name that is spelt `file:` or `json:`.
    pub fn add(&mut self, drivers: &Drivers, name: &OsStr) -> Result<()> {
        let shown = name.display();
        let files = match Path::new(name).exists() {
            true => Some(vec![PathBuf::from(name)]),
            false => files_named(drivers, name),
        };
        let files = files.ok_or_else(|| Error::invalid(format!("'{shown}' names other things than files")))?;
        for path in files {
            let resolved = std::fs::canonicalize(&path).map_err(storage::Error::from);
            self.resolved.push(resolved.with_context(|| format!("Could not find '{}'", path.display()))?);
        }
        Ok(())
    }

    fn covers(&self, resolved: &Path) -> bool {
        self.resolved.iter().any(|allowed| resolved.starts_with(allowed))
    }
}

impl Policy {
    /// Allows the files of a name that the user has typed; those that are not there allow nothing.
    pub(super) fn allow_typed(&mut self, drivers: &Drivers, name: &OsStr) {
        if let Self::Refuse(allowed) = self {
            let literally = Path::new(name).exists().then(|| PathBuf::from(name));
            let files = literally.into_iter().chain(files_named(drivers, name).unwrap_or_default());
            let found = files.filter_map(|path| std::fs::canonicalize(path).ok());
            allowed.resolved.extend(found.filter(|path| !path.is_dir()));
        }
    }
}

/// The files that a name stands for: a path, spelt `file:` or not, or those of a tree (`json:`). Nothing where it may lead to
/// anything else, such as a server.
pub fn files_named(drivers: &Drivers, name: &OsStr) -> Option<Vec<PathBuf>> {
    let Some(text) = name::json_text(name) else {
        return match name::protocol(name) {
            None => Some(vec![name.into()]),
            Some((prefix, path)) => (prefix == "file").then(|| vec![path.into()]),
        };
    };
    let mut files = Vec::new();
    for (key, value) in name::parse_json(&text).ok()? {
        let Some(value) = value.as_str() else { continue };
        match key.rsplit('.').next() {
            Some("driver") if value == "file" || drivers.format(value).is_some() => {}
            Some("filename") => files.extend(files_named(drivers, OsStr::new(value))?),
            _ => return None,
        }
    }
    (!files.is_empty()).then_some(files)
}

impl Opener<'_> {
    /// Refuses, where the policy says so, to open what an image names; `path` is what the name comes to, seen from
    /// the image. Only files can be allowed, however they are spelt.
    pub fn may_open(&self, image: &str, named: &str, path: Option<&OsStr>) -> Result<()> {
        self.may_open_files(image, named, path.and_then(|path| files_named(self.drivers, path)))
    }

    /// The same for a name that is never taken for a protocol.
    pub fn may_open_file(&self, image: &str, named: &str, path: Option<&OsStr>) -> Result<()> {
        self.may_open_files(image, named, path.map(|path| vec![path.into()]))
    }

    fn may_open_files(&self, image: &str, named: &str, files: Option<Vec<PathBuf>>) -> Result<()> {
        let allowed = |path: &PathBuf| std::fs::canonicalize(path).is_ok_and(|path| self.allows(&path));
        let all = |files: Vec<PathBuf>| self.may_search() && files.iter().all(allowed);
        match self.policy == Policy::Follow || files.is_some_and(all) {
            true => Ok(()),
            false => Err(forbidden(image, named)),
        }
    }

    /// Whether images may name whatever they like.
    pub fn follows(&self) -> bool {
        self.policy == Policy::Follow
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
    .advise("--allow DIR_OR_FILE says what images may name")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::symlink;

    use super::*;
    use crate::block::NO_SECRETS;
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
        let drivers = Drivers { formats: &[], protocols: &[], bytes: &[], filters: &[] };
        allowed.add(&drivers, at("in").as_os_str()).unwrap();
        let opener = Opener::new(&drivers, Policy::Refuse(allowed), &NO_SECRETS);
        let opens = |name: &str| opener.allows_open(&HostFile::open(&at(name), &FileHow::default()).unwrap());
        assert!(opener.may_open_file("image", "base", Some(at("in/base").as_os_str())).is_ok() && opens("in/base"));
        // Between the look and the opening it becomes a link to something else.
        std::fs::remove_file(at("in/base")).unwrap();
        symlink(at("out"), at("in/base")).unwrap();
        assert!(!opens("in/base"));
    }
}
