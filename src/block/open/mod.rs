//! The one way to an open image: `chain` opens what lies below a layer, `layer` one layer, `nested` an image that
//! another lies in, `filtered` a filter and what it is before, `related` the other files of a layer, `side` those of
//! them that options alone name; `probe` finds out formats, `settings` takes what any node takes, `policy` says what an
//! image may make us open, and `held` finds what is open already.
//!
//! Invariants: a chain is opened and closed link by link, never by recursion; recursion into images inside images
//! is capped; a file is locked before its header is believed.

mod chain;
mod filtered;
mod held;
mod layer;
mod nested;
mod no_disk;
mod opened;
mod policy;
mod probe;
mod related;
mod settings;
mod side;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use held::HeldLayers;
use layer::Ask;
pub use opened::MadeFiles;
pub use policy::{Allowed, Policy, files_named};
use settings::Names;

use super::{Drivers, Error, ErrorKind, ImageRef, Node, Notice, Purpose, Result, Secrets};
use crate::storage::lock::Access;
use crate::storage::{self, CacheMode, Identity, Storage};

/// How an image is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenHow {
    /// The format of the top layer; `None` to probe.
    pub format: Option<String>,
    /// What for (the top layer; those below are read, or looked at).
    pub purpose: Purpose,
    /// Without its backing file.
    pub no_backing: bool,
    /// Allow other writers (`-U`).
    pub force_share: bool,
    /// Nobody may write to any layer meanwhile, whatever its format (the sources of `convert`).
    pub exclusive: bool,
    /// What the page cache does.
    pub cache: CacheMode,
    /// The kernel is to be asked for `aio=native` where nothing else is said.
    pub native_aio: bool,
    /// Read on, with a warning, where a layer was made on another backing file than the one that is there.
    pub salvage: bool,
}

/// Opens images.
#[derive(Debug)]
pub struct Opener<'a> {
    pub(super) drivers: &'a Drivers,
    policy: Policy,
    /// Files that were made for images, which may name them.
    made: Mutex<Vec<PathBuf>>,
    /// The largest disk that is opened.
    largest: Option<u64>,
    secrets: &'a Secrets,
    notices: Mutex<Vec<Notice>>,
    held: HeldLayers,
}

/// What is known while one image is opened.
#[derive(Debug, Default)]
pub(super) struct Trail {
    /// Names given to nodes.
    pub names: Names,
    /// Layers with a backing file that were met.
    seen: Vec<(Identity, &'static str)>,
    /// The image that names what is opened now, and how, where the policy had to allow it.
    named: Option<(String, String)>,
    /// How many images we are inside of.
    pub depth: usize,
    /// Files of the layer that is opened again: they give up their locks to what is opened.
    pub instead: Vec<Arc<dyn Storage>>,
    /// The layer that is opened again was taken for raw because nothing else fits.
    pub probed_raw: bool,
}

impl Trail {
    /// Takes the permissions on a file.
    fn lock(&self, storage: &dyn Storage, access: Access) -> Result<()> {
        lock(storage, access, &self.instead).map_err(|error| {
            let identity = storage.facts().identity;
            match self.seen.iter().any(|(seen, _)| Some(*seen) == identity) {
                true => error.advise("its backing files lead back to it: they are an infinite loop"),
                false => error,
            }
        })
    }
}

/// Takes the permissions on a file, from the one of `instead` that it is.
fn lock(storage: &dyn Storage, access: Access, instead: &[Arc<dyn Storage>]) -> Result<()> {
    let identity = storage.facts().identity;
    let same = |old: &&Arc<dyn Storage>| identity.is_some() && old.facts().identity == identity;
    match instead.iter().find(same) {
        Some(old) => storage::lock_after(storage, &**old, access)?,
        None => storage::lock(storage, access)?,
    }
    Ok(())
}

impl<'a> Opener<'a> {
    /// An opener that knows these drivers and these secrets.
    pub fn new(drivers: &'a Drivers, policy: Policy, secrets: &'a Secrets) -> Self {
        let (made, notices) = (Mutex::default(), Mutex::default());
        Self { drivers, policy, made, largest: None, secrets, notices, held: HeldLayers::default() }
    }

    /// The drivers it knows.
    pub fn drivers(&self) -> &'a Drivers {
        self.drivers
    }

    /// The secrets it knows.
    pub fn secrets(&self) -> &'a Secrets {
        self.secrets
    }

    /// What images may make it open.
    pub fn policy(&self) -> Policy {
        self.policy.clone()
    }

    /// The same, but images may name that file too: the user has typed its name.
    pub fn allowing(mut self, path: &Path) -> Self {
        self.policy.allow_typed(self.drivers, path.as_os_str());
        self
    }

    /// Images may name that file from now on: it was made for one of them.
    pub fn allow_made(&self, path: &Path) {
        let path = std::fs::canonicalize(path);
        self.made.lock().unwrap_or_else(PoisonError::into_inner).extend(path);
    }

    /// The same, but no disk that is larger is read or written.
    pub fn limited_to(self, largest: Option<u64>) -> Self {
        Self { largest, ..self }
    }

    /// What came up while opening, since the last call.
    pub fn take_notices(&self) -> Vec<Notice> {
        std::mem::take(&mut self.notices.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Something that came up, to be told by whoever asks for it.
    pub fn notice(&self, notice: Notice) {
        self.notices.lock().unwrap_or_else(|e| e.into_inner()).push(notice);
    }

    /// Opens an image with its backing chain.
    pub fn open(&self, image: &ImageRef, how: &OpenHow) -> Result<Arc<Node>> {
        self.open_named(image, how)
            .map_err(|error| error.context(format!("Could not open '{}'", image.shown())).about(image.shown()))
    }

    /// The same for an image that is being talked of: errors do not begin with its name.
    pub fn open_named(&self, image: &ImageRef, how: &OpenHow) -> Result<Arc<Node>> {
        let node = self.ask(image, how).and_then(|ask| self.chain(ask, how, &mut Trail::default()))?;
        let mut layers = std::iter::successors(Some(&*node), |node| node.backing().map(|below| &**below));
        if how.purpose != Purpose::Look {
            layers.try_for_each(|node| self.bound(node.name(), node.virtual_size()))?;
        }
        Ok(node)
    }

    /// Refuses a disk that is larger than it may be, be it there or still to be made.
    pub fn bound(&self, name: &str, size: u64) -> Result<()> {
        match self.largest {
            Some(largest) if size > largest => Err(Error::new(
                ErrorKind::TooLarge,
                format!("the disk of '{name}' has {size} bytes, and may have {largest}"),
            )
            .about(name)
            .advise("--max-size says how large a disk may be")),
            _ => Ok(()),
        }
    }

    /// Opens an image that has just been made, in its files, which nobody can find by name yet, with its backing chain.
    pub fn open_made(&self, name: &OsStr, mut made: MadeFiles, how: &OpenHow) -> Result<Arc<Node>> {
        let image = ImageRef::name(name);
        let options = std::mem::take(&mut made.options);
        let ask = self.ask(&image, how).map(|mut ask| {
            ask.options.extend(options);
            Ask { made: Some(made), ..ask }
        });
        ask.and_then(|ask| self.chain(ask, how, &mut Trail::default()))
            .map_err(|error| error.context(format!("Could not open '{}'", image.shown())).about(image.shown()))
    }
}
