//! The one way to an open image: names, relative paths, probing, locks, backing chains, and the policy that says
//! what an image may make us open.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::error::Context;
use super::format::{self, Child, Format, OpenRequest, Related};
use super::node::Origin;
use super::{Error, ImageRef, Node, OptionTree, Result};
use crate::storage::file::{HostFile, OpenHow as FileHow};
use crate::storage::lock::Access;
use crate::storage::staging::Staging;
use crate::storage::{CacheMode, Identity, Storage};

/// What an image may make us open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Whatever it names, as the reference does.
    #[default]
    Follow,
    /// Nothing: an image that names another file is refused.
    Refuse,
}

/// How an image is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenHow {
    /// The format of the top layer; `None` to probe.
    pub format: Option<String>,
    /// For reading and writing (the top layer alone).
    pub write: bool,
    /// Without its backing file.
    pub no_backing: bool,
    /// Only the header will be looked at.
    pub look_only: bool,
    /// Bear others that write meanwhile (`-U`).
    pub force_share: bool,
    /// Nobody may write to any layer meanwhile, whatever its format (the sources of `convert`).
    pub exclusive: bool,
    /// What the page cache does.
    pub cache: CacheMode,
}

impl OpenHow {
    /// The permissions that a layer takes, but for what is particular to its format.
    fn access(&self) -> Access {
        match (self.force_share, self.write, self.look_only) {
            (true, _, true) => Access::NONE,
            (true, ..) => Access::SHARED,
            (_, true, _) => Access::WRITE,
            (_, _, true) => Access::LOOK,
            _ => Access::READ,
        }
    }
}

/// Opens images.
#[derive(Debug)]
pub struct Opener<'a> {
    formats: &'a [&'static dyn Format],
    policy: Policy,
    staging: Option<&'a Staging>,
    notices: Mutex<Vec<String>>,
}

impl<'a> Opener<'a> {
    /// An opener that knows these formats (raw last).
    pub fn new(formats: &'a [&'static dyn Format], policy: Policy) -> Self {
        Self { formats, policy, staging: None, notices: Mutex::default() }
    }

    /// The same, but files under construction are found by their future names.
    pub fn with_staging(mut self, staging: &'a Staging) -> Self {
        self.staging = Some(staging);
        self
    }

    /// The formats it knows.
    pub fn formats(&self) -> &'a [&'static dyn Format] {
        self.formats
    }

    /// Lines for the user that came up while opening, since the last call.
    pub fn take_notices(&self) -> Vec<String> {
        std::mem::take(&mut self.notices.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Opens an image with its backing chain.
    pub fn open(&self, image: &ImageRef, how: &OpenHow) -> Result<Arc<Node>> {
        self.open_in(image, how, &mut HashSet::new())
    }

    fn open_in(&self, image: &ImageRef, how: &OpenHow, seen: &mut HashSet<Identity>) -> Result<Arc<Node>> {
        let ImageRef::Name(name) = image else {
            return Err(Error::unsupported("option trees"));
        };
        let shown = name.to_string_lossy().into_owned();
        let path = PathBuf::from(shown.strip_prefix("file:").unwrap_or(&shown));
        // What is locked depends on the format, which is not known yet.
        let storage = self.open_file(&path, how, Access::NONE).with_context(|| format!("Could not open '{shown}'"))?;
        if let Some(identity) = storage.identity()
            && !seen.insert(identity)
        {
            return Err(Error::invalid(format!("Backing file '{shown}' creates an infinite loop.")));
        }
        let format = match &how.format {
            Some(name) => format::find(self.formats, name)?,
            None => self.probe(&*storage, &shown)?,
        };
        let access = how.access();
        let access = if format.name() == "raw" && !how.exclusive { access.of_raw() } else { access };
        storage.lock(access).with_context(|| format!("Could not open '{shown}'"))?;
        let mut options = OptionTree::new();
        let related = Beside { opener: self, image: &path, how };
        let driver = format
            .open(OpenRequest {
                file: Child { role: "file".to_owned(), name: shown.clone(), storage },
                options: &mut options,
                write: how.write,
                look_only: how.look_only,
                related: &related,
            })
            .with_context(|| format!("Could not open '{shown}'"))?;
        let backing = match driver.backing() {
            Some(backing) if !how.no_backing => {
                if self.policy == Policy::Refuse {
                    return Err(Error::new(
                        super::Kind::Forbidden,
                        format!("'{shown}' names a backing file, which the policy forbids to open"),
                    ));
                }
                let below = OpenHow { format: backing.format.clone(), write: false, ..how.clone() };
                let name = beside(&path, &backing.name);
                Some(self.open_in(&ImageRef::name(name), &below, seen).context("Could not open backing file")?)
            }
            _ => None,
        };
        let origin = Origin { path: Some(name.clone()), ..Origin::default() };
        Ok(Arc::new(Node::new(driver, backing, shown).with_origin(origin)))
    }

    fn open_file(&self, path: &Path, how: &OpenHow, access: Access) -> crate::storage::Result<Arc<dyn Storage>> {
        if let Some(storage) = self.staging.and_then(|staging| staging.find(path)) {
            return Ok(storage);
        }
        Ok(Arc::new(HostFile::open(path, &FileHow { write: how.write, cache: how.cache, access })?))
    }

    fn probe(&self, storage: &dyn Storage, name: &str) -> Result<&'static dyn Format> {
        let mut head = vec![0; 2048];
        storage
            .read_at(0, &mut head)
            .with_context(|| format!("Could not read image for determining its format '{name}'"))?;
        let best = self.formats.iter().copied().max_by_key(|format| format.probe(&head, name));
        best.ok_or_else(|| Error::invalid("no formats"))
    }
}

/// A name found in an image is relative to the image's own folder.
fn beside(image: &Path, name: &str) -> PathBuf {
    match image.parent() {
        Some(folder) => folder.join(name),
        None => PathBuf::from(name),
    }
}

struct Beside<'a> {
    opener: &'a Opener<'a>,
    image: &'a Path,
    how: &'a OpenHow,
}

impl Related for Beside<'_> {
    fn open(&self, role: &str, name: &str) -> Result<Child> {
        let path = beside(self.image, name);
        let shown = path.to_string_lossy().into_owned();
        let access = match (self.how.exclusive, role) {
            (false, "data-file") => self.how.access().of_data_file(),
            _ => self.how.access(),
        };
        let storage =
            self.opener.open_file(&path, self.how, access).with_context(|| format!("Could not open '{shown}'"))?;
        Ok(Child { role: role.to_owned(), name: shown, storage })
    }
}
