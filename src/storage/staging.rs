//! New files that appear whole or not at all.
//!
//! A [`Staging`] makes files that have no name yet; [`Staging::commit`] gives them their names when all of them
//! are complete. Dropped before that, nothing is left, and an older file of the same name is as it was.
//!
//! How a file comes to its name is decided when it is made (`Naming`, in `make`): linked where nothing was; renamed
//! over an older regular file, which stays locked until then and whose owner, mode, flags and attributes are kept; or
//! written in place, where the file itself must stay: devices, hard links, mount points, files behind loop devices,
//! folders that we cannot write to. A symbolic link stays one: what it points at is made or replaced. The names are
//! given in `publish`.
//!
//! Invariants: what has a name before it is complete is hidden and clearly temporary ([`super::temporary`]), except
//! what is written in place, which has no header until it is complete and is empty again if it is not committed, and what the host's policy lets have no
//! other name, which is removed. Of an image in several files the one that holds the header is never there together
//! with another image's data. A name that somebody else gave meanwhile is never taken away.

mod head;
mod make;
mod publish;
mod steps;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, fchown};
use std::path::{Path, PathBuf, absolute};
use std::sync::{Arc, Mutex, MutexGuard};

use self::head::HeadLast;
pub use self::make::stays_until_replaced;
use super::file::HostFile;
use super::host_part::HostPart;
use super::temporary::TemporaryName;
use super::writeback::{LITTLE, Writeback};
use super::{CacheMode, Error, FileKind, Preallocation, Result, Storage, error, host};

/// What a new file shall be like.
#[derive(Debug, Clone, Copy, Default)]
pub struct CreateHow {
    /// Blocks are overwritten in place (btrfs).
    pub nocow: bool,
    /// The extent size hint (XFS): `None` for the reference's default of 1 MiB, 0 for none. Means nothing, and does
    /// no harm, on other file systems.
    pub extent_size_hint: Option<u64>,
    /// A part of an image: gets its name before the one that holds the header.
    pub secondary: bool,
    /// Whose owner and permissions it gets; `None` for those of any new file.
    pub like: Option<Like>,
}

/// The owner and the permissions of a file.
#[derive(Debug, Clone, Copy)]
pub struct Like {
    owner: (u32, u32),
    mode: u32,
}

impl Like {
    /// Those of the file at `path`, if there is one.
    pub fn file(path: &Path) -> Option<Self> {
        let meta = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
        Some(Self { owner: (meta.uid(), meta.gid()), mode: meta.mode() & 0o777 })
    }
}

const DEFAULT_HINT: u64 = 1 << 20;

/// What is brought to stable storage before names are given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// Nothing: the user does not want it.
    Never,
    /// What takes the place of older files; what is new where the wait is short, [`LITTLE`] bytes at most.
    #[default]
    Replacing,
    /// Everything, and the names.
    Always,
}

/// Files under construction.
#[derive(Debug)]
pub struct Staging {
    cache: CacheMode,
    durability: Durability,
    writeback: Writeback,
    files: Mutex<Vec<Staged>>,
    /// What is there already, and no file of the host.
    remote: Mutex<Vec<Arc<dyn Storage>>>,
    /// What was made, and is no file of the host.
    made: Mutex<Vec<Arc<dyn Made>>>,
    notices: Mutex<Vec<String>>,
    /// What the new bytes come from.
    sources: Vec<Source>,
}

/// A file that is read meanwhile.
#[derive(Debug, Clone)]
pub struct Source {
    /// What it is called.
    pub name: String,
    /// What its bytes lie in ([`HostFile::lies_in`]).
    pub lies_in: Vec<HostPart>,
}

impl Source {
    /// Refuses to write over one of these, under whichever name: to the file `name`, whose bytes lie in `places`.
    pub fn spare<'a>(sources: impl IntoIterator<Item = &'a Self>, places: &[HostPart], name: &str) -> Result<()> {
        let is_there = |source: &&Self| source.lies_in.iter().any(|part| places.iter().any(|place| place.meets(part)));
        match sources.into_iter().find(is_there) {
            Some(source) => Err(Error::Other(format!(
                "'{name}' would be written in place, and '{}', which is read, is the same file",
                source.name
            ))),
            None => Ok(()),
        }
    }
}

/// What was made where there are no hidden names: others can see it before it is complete.
pub trait Made: std::fmt::Debug + Send + Sync {
    /// It is complete.
    fn keep(&self) -> Result<()>;

    /// It is of no use: it goes.
    fn retract(&self);
}

/// How a file comes to its name.
#[derive(Debug)]
enum Naming {
    /// Nothing was there. The claim keeps others off the name.
    Link { _claim: Option<File> },
    /// In the place of that file, which is held open for its lock.
    Replace { old: HostFile },
    /// It has its name already, and must not lose it.
    InPlace,
    /// It has its name already, because the host's policy lets it have no other.
    VeryName,
}

#[derive(Debug)]
struct Staged {
    /// As asked for, absolute.
    path: PathBuf,
    /// Where symbolic links lead, absolute.
    target: PathBuf,
    storage: Arc<HostFile>,
    /// Keeps back the beginning of a header that is written in place.
    head: Option<Arc<HeadLast>>,
    way: Naming,
    /// The name it has meanwhile, where it has one.
    temporary: Option<TemporaryName>,
    /// The permissions it will have, where it has others while it is hidden.
    mode: Option<u32>,
    secondary: bool,
    committed: bool,
}

impl Drop for Staged {
    fn drop(&mut self) {
        let untouched = self.head.as_ref().is_some_and(|head| !head.has_begun());
        if !self.committed && self.in_place() && !untouched {
            // Half an image must not look like one. There is nobody left to tell of a failure.
            let _ = self.storage.set_len(0, Preallocation::Off);
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let made = self.made.get_mut().unwrap_or_else(|e| e.into_inner());
        made.drain(..).for_each(|made| made.retract());
    }
}

impl Staging {
    /// Nothing yet. Files will be made with that cache mode.
    pub fn new(cache: CacheMode, durability: Durability) -> Self {
        let (writeback, files, remote, made, notices) = Default::default();
        Self { cache, durability, writeback, files, remote, made, notices, sources: Vec::new() }
    }

    /// The same, and none of those files is written in place, or emptied.
    pub fn sparing(mut self, sources: Vec<Source>) -> Self {
        self.sources = sources;
        self
    }

    /// A new, empty file that will be called `path`. A device is opened as it is.
    pub fn create(&self, path: &Path) -> Result<Arc<dyn Storage>> {
        self.create_with(path, &CreateHow::default())
    }

    /// The same, in detail. Errors carry the whole text (`Could not create 'a': ...`).
    pub fn create_with(&self, path: &Path, how: &CreateHow) -> Result<Arc<dyn Storage>> {
        if let Some(storage) = self.find(path) {
            storage.set_len(0, Preallocation::Off)?;
            return Ok(storage);
        }
        let hint = how.extent_size_hint.unwrap_or(DEFAULT_HINT);
        let hint = u32::try_from(hint).map_err(|_| Error::Other("Extent size hint is too large".to_owned()))?;
        let mut staged = self.make(path, how.secondary)?;
        if let Some(like) = how.like {
            staged.take_after(like)?;
        }
        if staged.storage.kind() == FileKind::Regular {
            if how.nocow {
                host::set_nocow(staged.storage.file());
            }
            // The default is only tried; what the user asked for is missed.
            if let Err(Error::Io(cause)) = host::set_extent_size_hint(staged.storage.file(), hint)
                && how.extent_size_hint.is_some_and(|asked| asked > 0)
            {
                let text = format!("Failed to set extent size hint: {}", error::strerror(&cause));
                self.notices.lock().unwrap_or_else(|e| e.into_inner()).push(text);
            }
        }
        self.add(staged)
    }

    /// Takes what is there already, and is no file of the host: it is written in place, and holds whatever it held.
    pub fn take_remote(&self, storage: Arc<dyn Storage>) -> Arc<dyn Storage> {
        self.remote.lock().unwrap_or_else(|e| e.into_inner()).push(storage.clone());
        storage
    }

    /// Takes what was just made, and is no file of the host. It reads as zeros, and is kept or retracted with the rest.
    pub fn add_made(&self, made: Arc<dyn Made>) {
        self.made.lock().unwrap_or_else(|e| e.into_inner()).push(made);
    }

    fn has_remote(&self) -> bool {
        !self.remote.lock().unwrap_or_else(|e| e.into_inner()).is_empty()
    }

    /// A new, empty file in place of the one at `path`, which the caller has open and locked as `held`. `None` if
    /// `path` is not that file, or the file itself has to stay.
    pub fn replace(&self, path: &Path, held: &dyn Storage) -> Result<Option<Arc<dyn Storage>>> {
        self.make_over(path, held)?.map(|staged| self.add(staged)).transpose()
    }

    fn add(&self, staged: Staged) -> Result<Arc<dyn Storage>> {
        let storage = staged.storage();
        let mut files = self.files();
        if staged.in_place() && staged.secondary {
            // Data that is written over in place must not be seen under the older header.
            let sync = self.durability != Durability::Never;
            for staged in files.iter().filter(|staged| !staged.secondary) {
                if let Naming::Replace { old } = &staged.way {
                    self.spare(old, &staged.path)?;
                }
            }
            files.iter().filter(|staged| !staged.secondary).try_for_each(|staged| staged.drop_older_header(sync))?;
            staged.storage.set_len(0, Preallocation::Off)?;
        }
        files.push(staged);
        Ok(storage)
    }

    /// Whether a file with that name is under construction.
    pub fn has(&self, path: &Path) -> bool {
        self.find(path).is_some()
    }

    fn find(&self, path: &Path) -> Option<Arc<dyn Storage>> {
        let path = absolute(path).ok()?;
        let is_it = |staged: &&Staged| staged.path == path || staged.target == path;
        self.files().iter().find(is_it).map(Staged::storage)
    }

    /// Whether nobody else can see any of the files before they are complete.
    pub fn is_unseen(&self) -> bool {
        let hidden = |staged: &Staged| matches!(staged.way, Naming::Link { .. } | Naming::Replace { .. });
        let seen = !self.made.lock().unwrap_or_else(|e| e.into_inner()).is_empty();
        !seen && !self.has_remote() && self.files().iter().all(hidden)
    }

    /// Whether every file is a new one, so that what was not written reads as zeros.
    pub fn is_blank(&self) -> bool {
        !self.has_remote() && self.files().iter().all(|staged| staged.storage.kind() == FileKind::Regular)
    }

    /// An older file that stays until it is replaced, where all such files take room that the new ones lack: at least
    /// half as much as those have taken so far.
    pub fn replaces(&self) -> Option<String> {
        let files = self.files();
        let space = |file: &HostFile| file.allocated().ok().flatten().unwrap_or(0);
        let old = |staged: &Staged| match &staged.way {
            Naming::Replace { old } => space(old),
            _ => 0,
        };
        let sum = |of: &dyn Fn(&Staged) -> u64| files.iter().map(of).fold(0, u64::saturating_add);
        if sum(&old).saturating_mul(2) < sum(&|staged| space(&staged.storage)) {
            return None;
        }
        files.iter().filter(|staged| old(staged) > 0).max_by_key(|staged| old(staged)).map(|most| most.shown())
    }

    /// Warnings that came up, since the last call.
    pub fn take_notices(&self) -> Vec<String> {
        std::mem::take(&mut self.notices.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Gives every file its name: the secondary ones first, the one that was made first last. What is to be on stable
    /// storage by then is there before the first name is given.
    pub fn commit(self) -> Result<()> {
        if self.cache.flushes() {
            self.remote.lock().unwrap_or_else(|e| e.into_inner()).iter().try_for_each(|storage| storage.flush())?;
        }
        self.made.lock().unwrap_or_else(|e| e.into_inner()).iter().try_for_each(|made| made.keep())?;
        let mut files = std::mem::take(&mut *self.files());
        files.reverse();
        files.sort_by_key(|staged| !staged.secondary);
        let named = |cause: io::Error| match files.last() {
            Some(staged) => Error::File { doing: "write", name: staged.shown(), cause },
            None => cause.into(),
        };
        // What was lost on the way to the disk is not told again by a sync.
        let behind = self.writeback.finish().map_err(named)?;
        let replaces = files.iter().any(|staged| matches!(staged.way, Naming::Replace { .. }) || staged.in_place());
        let durable = self.durability == Durability::Always || (self.durability != Durability::Never && replaces);
        let sync = durable || (self.durability != Durability::Never && behind <= LITTLE);
        // What is written in place loses its older header when nothing else can fail any more.
        for staged in files.iter().filter(|staged| staged.head.is_none()) {
            staged.settle(sync, self.cache)?;
        }
        for staged in &files {
            if let Some(head) = &staged.head {
                head.reserve().map_err(|error| staged.failed(error))?;
                staged.settle(sync, self.cache)?;
            }
        }
        publish::publish(&mut files, durable)?;
        self.made.lock().unwrap_or_else(|e| e.into_inner()).clear();
        Ok(())
    }

    fn files(&self) -> MutexGuard<'_, Vec<Staged>> {
        self.files.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Staged {
    /// The bytes, as whoever makes them sees them.
    fn storage(&self) -> Arc<dyn Storage> {
        match &self.head {
            Some(head) => head.clone(),
            None => self.storage.clone(),
        }
    }

    fn in_place(&self) -> bool {
        matches!(self.way, Naming::InPlace) && self.storage.kind() == FileKind::Regular
    }

    /// What it is to take the place of is no image any more; not after a power cut either, if `sync` says so.
    fn drop_older_header(&self, sync: bool) -> Result<()> {
        let file = match (&self.way, &self.head) {
            (Naming::Replace { old }, _) => {
                old.set_len(0, Preallocation::Off)?;
                old
            }
            (_, Some(head)) => {
                head.begin()?;
                &*self.storage
            }
            _ => return Ok(()),
        };
        if sync { file.sync().map_err(|error| self.failed(error)) } else { Ok(()) }
    }

    fn shown(&self) -> String {
        self.target.to_string_lossy().into_owned()
    }

    /// What is written in place gets its header.
    fn finish_head(&self, sync: bool) -> Result<()> {
        let Some(head) = &self.head else { return Ok(()) };
        head.finish().and_then(|()| if sync { self.storage.sync() } else { Ok(()) }).map_err(|error| self.failed(error))
    }

    /// Gives a new file the owner, as far as we may, and the permissions of another one.
    fn take_after(&mut self, like: Like) -> Result<()> {
        if !matches!(self.way, Naming::Link { .. } | Naming::VeryName) {
            return Ok(());
        }
        let (file, (user, group)) = (self.storage.file(), like.owner);
        let given = fchown(file, Some(user), Some(group)).or_else(|_| fchown(file, None, Some(group)));
        // Another group gets what everybody gets.
        let mode = if given.is_ok() { like.mode } else { like.mode & (0o707 | (like.mode & 0o007) << 3) };
        if self.mode.is_none() {
            return host::set_mode(file, mode).map_err(|cause| self.failed(cause.into()));
        }
        self.mode = Some(mode);
        Ok(())
    }

    fn failed(&self, error: Error) -> Error {
        match error {
            Error::Io(cause) => Error::File { doing: "write", name: self.shown(), cause },
            other => other,
        }
    }

    /// It is what it will be, and on stable storage if `sync` says so; a device follows the cache mode.
    fn settle(&self, sync: bool, cache: CacheMode) -> Result<()> {
        if let Some(mode) = self.mode {
            if let Naming::Replace { old } = &self.way {
                host::copy_attributes(old.file(), self.storage.file());
            }
            host::set_mode(self.storage.file(), mode).map_err(|cause| self.failed(cause.into()))?;
        }
        let sync = if self.storage.kind() == FileKind::Regular { sync } else { cache.flushes() };
        if sync { self.storage.sync().map_err(|error| self.failed(error)) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests;
