//! New files that appear whole or not at all.
//!
//! A [`Staging`] makes files that have no name yet; [`Staging::commit`] gives them their names when all of them
//! are complete. Dropped before that, nothing is left, and an older file of the same name is as it was.
//!
//! How a file comes to its name is decided when it is made (`Way`): linked where nothing was; renamed over an
//! older regular file, which stays locked until then and whose owner, mode and attributes are kept; or written in
//! place, where the file itself must stay: devices, hard links, mount points, folders that we cannot write to.
//! A symbolic link stays one: what it points at is made or replaced.
//!
//! Invariant: what has a name before it is complete is hidden and clearly temporary ([`super::temporary`]), except
//! what is written in place; that is empty again if it is not committed.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf, absolute};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag};
use nix::unistd::{geteuid, linkat};

use super::file::{self, HostFile, cache_flags};
use super::lock::Access;
use super::temporary::{TemporaryName, replace};
use super::{CacheMode, Error, Identity, Kind, Preallocation, Result, Storage, error, host};

/// What a new file shall be like.
#[derive(Debug, Clone, Copy, Default)]
pub struct CreateHow {
    /// Blocks are overwritten in place (btrfs).
    pub nocow: bool,
    /// The extent size hint (XFS): `None` for the reference's default of 1 MiB, 0 for none. Means nothing, and does
    /// no harm, on other file systems.
    pub extent_size_hint: Option<u64>,
    /// A part of an image: gets its name before the files that are not.
    pub secondary: bool,
}

const DEFAULT_HINT: u64 = 1 << 20;

/// Files under construction.
#[derive(Debug)]
pub struct Staging {
    cache: CacheMode,
    files: Mutex<Vec<Staged>>,
    notices: Mutex<Vec<String>>,
}

/// How a file comes to its name.
#[derive(Debug)]
enum Way {
    /// Nothing was there.
    Link,
    /// By rename over that file, which is held open for its lock.
    Replace { _old: HostFile },
    /// It has its name already.
    InPlace,
}

#[derive(Debug)]
struct Staged {
    /// As asked for, absolute.
    path: PathBuf,
    /// Where symbolic links lead, absolute.
    target: PathBuf,
    storage: Arc<HostFile>,
    way: Way,
    /// The name it has meanwhile, on a file system without unnamed files.
    temporary: Option<TemporaryName>,
    secondary: bool,
    committed: bool,
}

impl Drop for Staged {
    fn drop(&mut self) {
        if !self.committed && matches!(self.way, Way::InPlace) && self.storage.kind() == Kind::Regular {
            // Half an image must not look like one. There is nobody left to tell of a failure.
            let _ = self.storage.set_len(0, Preallocation::Off);
        }
    }
}

impl Staging {
    /// Nothing yet. Files will be made with that cache mode.
    pub fn new(cache: CacheMode) -> Self {
        Self { cache, files: Mutex::default(), notices: Mutex::default() }
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
        let staged = Staged::new(path, self.cache, how.secondary)?;
        if staged.storage.kind() == Kind::Regular {
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
        let storage = staged.storage.clone();
        self.files().push(staged);
        Ok(storage)
    }

    /// A new, empty file in place of the one at `path`, which the caller has open and locked as `held`. `None` if
    /// `path` is not that file, or the file itself has to stay.
    pub fn replace(&self, path: &Path, held: &dyn Storage) -> Result<Option<Arc<dyn Storage>>> {
        let failed = |cause: io::Error| named("replace", path, cause);
        let full = absolute(path).map_err(failed)?;
        let Ok(file) = File::open(path) else { return Ok(None) };
        let old = HostFile::from_file(file, self.cache, &path.to_string_lossy())?;
        if held.facts().identity != Some(old.identity()) {
            return Ok(None);
        }
        let Some(target) = follow(&full).map_err(failed)? else { return Ok(None) };
        let Some((file, temporary)) = replacement(&old, &target, self.cache).map_err(failed)? else { return Ok(None) };
        let storage = Arc::new(HostFile::from_file(file, self.cache, &path.to_string_lossy())?);
        let way = Way::Replace { _old: old };
        let kept = storage.clone();
        self.files().push(Staged { path: full, target, storage, way, temporary, secondary: false, committed: false });
        Ok(Some(kept))
    }

    /// The file under construction with that name, if there is one.
    pub fn find(&self, path: &Path) -> Option<Arc<dyn Storage>> {
        let path = absolute(path).ok()?;
        let is_it = |staged: &&Staged| staged.path == path || staged.target == path;
        self.files().iter().find(is_it).map(|staged| staged.storage.clone() as Arc<dyn Storage>)
    }

    /// Warnings that came up, since the last call.
    pub fn take_notices(&self) -> Vec<String> {
        std::mem::take(&mut self.notices.lock().unwrap_or_else(|e| e.into_inner()))
    }

    /// Gives every file its name: the secondary ones first, the one that was made first last. Everything is on
    /// stable storage before that, unless the cache mode says otherwise.
    pub fn commit(self) -> Result<()> {
        let mut files = std::mem::take(&mut *self.files());
        files.reverse();
        files.sort_by_key(|staged| !staged.secondary);
        for staged in &files {
            staged.storage.flush()?;
        }
        for index in 0..files.len() {
            let (named, rest) = files.split_at_mut(index);
            let Some(staged) = rest.first_mut() else { break };
            if let Err(error) = staged.commit(self.cache.flushes()) {
                // All or none: but what was replaced is gone.
                named.iter().filter(|staged| matches!(staged.way, Way::Link)).for_each(Staged::take_name);
                return Err(error);
            }
        }
        Ok(())
    }

    fn files(&self) -> MutexGuard<'_, Vec<Staged>> {
        self.files.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Staged {
    fn new(path: &Path, cache: CacheMode, secondary: bool) -> Result<Self> {
        let failed = |cause: io::Error| named("create", path, cause);
        let full = match path.as_os_str().is_empty() {
            true => return Err(failed(Errno::ENOENT.into())),
            false => absolute(path).map_err(failed)?,
        };
        let old = match open_existing(path, cache) {
            Ok(old) => Some(old),
            Err(error) if error.errno() == Some(Errno::ENOENT) => None,
            Err(error) => return Err(error),
        };
        let staged = |target, storage, way, temporary| Self {
            path: full.clone(),
            target,
            storage: Arc::new(storage),
            way,
            temporary,
            secondary,
            committed: false,
        };
        let target = follow(&full).map_err(failed)?;
        match (old, target) {
            (None, Some(target)) => {
                let (file, temporary) = unnamed(&target, cache).map_err(failed)?;
                let storage = HostFile::from_file(file, cache, &path.to_string_lossy())?;
                Ok(staged(target, storage, Way::Link, temporary))
            }
            (None, None) => Err(failed(Errno::ENOENT.into())),
            (Some(old), target) => {
                if let Some(target) = target
                    && let Some((file, temporary)) = replacement(&old, &target, cache).map_err(failed)?
                {
                    let storage = HostFile::from_file(file, cache, &path.to_string_lossy())?;
                    return Ok(staged(target, storage, Way::Replace { _old: old }, temporary));
                }
                if old.kind() == Kind::Regular {
                    old.set_len(0, Preallocation::Off)?;
                }
                Ok(staged(full.clone(), old, Way::InPlace, None))
            }
        }
    }

    fn commit(&mut self, flush: bool) -> Result<()> {
        let failed = |cause: io::Error| named("create", &self.target, cause);
        match self.way {
            Way::InPlace => {}
            _ => {
                // A link never takes a name away from another file; a rename does.
                let linked = match (&self.way, &self.temporary) {
                    (Way::Link, None) => link(&self.storage, &self.target),
                    _ => Err(Errno::EEXIST),
                };
                match (linked, &mut self.temporary) {
                    (Err(Errno::EEXIST), Some(temporary)) => temporary.rename(&self.target).map_err(failed)?,
                    (Err(Errno::EEXIST), None) => replace(self.storage.file(), &self.target).map_err(failed)?,
                    (other, _) => other.map_err(|errno| failed(errno.into()))?,
                }
                if flush && let Ok(folder) = File::open(folder_of(&self.target)) {
                    // The name shall last too; a file system that cannot promise it says so here, to no use.
                    let _ = folder.sync_all();
                }
            }
        }
        self.committed = true;
        Ok(())
    }
}

impl Staged {
    /// Takes the name away again, if it still means this file.
    fn take_name(&self) {
        let is_it = fs::symlink_metadata(&self.target)
            .is_ok_and(|meta| self.storage.identity() == Identity { device: meta.dev(), inode: meta.ino() });
        if is_it {
            // The error that is being told matters more.
            let _ = fs::remove_file(&self.target);
        }
    }
}

fn named(doing: &'static str, path: &Path, cause: io::Error) -> Error {
    Error::File { doing, name: path.to_string_lossy().into_owned(), cause }
}

/// Opens and locks what is there already, with the reference's texts for what cannot be written.
fn open_existing(path: &Path, cache: CacheMode) -> Result<HostFile> {
    let name = path.to_string_lossy();
    let is_device = fs::metadata(path).is_ok_and(|meta| !meta.is_file() && !meta.is_dir() && meta.rdev() != 0);
    let device = |cause: Error| {
        Error::Other(format!(
            "Protocol driver 'host_device' does not support creating new images, so an existing image must be \
             selected as the target; however, opening the given target as an existing image failed: {cause}"
        ))
    };
    if is_device {
        let how = file::OpenHow { write: true, cache, access: Access::WRITE.of_raw() };
        return HostFile::open(path, &how).map_err(device);
    }
    let open = file::open(path, "create", true, cache)?;
    let old = HostFile::from_file(open, cache, &name).map_err(|error| match error {
        Error::WrongKind { .. } => Error::Step { what: "Could not resize file", cause: Errno::EINVAL.into() },
        other => other,
    })?;
    old.lock(Access::CREATE)?;
    Ok(old)
}

/// Where symbolic links lead; `None` if that is not a name that a file could take (`/proc/self/fd/1`).
fn follow(path: &Path) -> io::Result<Option<PathBuf>> {
    let mut path = path.to_owned();
    // The kernel's own limit.
    for _ in 0..40 {
        if path.starts_with("/proc") || path.starts_with("/dev/fd") {
            return Ok(None);
        }
        if path.as_os_str().as_bytes().ends_with(b"/") {
            return Err(Errno::EISDIR.into());
        }
        match fs::read_link(&path) {
            Ok(to) => path = folder_of(&path).join(to),
            // Not a link, or nothing at all.
            Err(_) => return Ok(path.file_name().is_some().then_some(path)),
        }
    }
    Err(Errno::ELOOP.into())
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        Some(_) => Path::new("."),
        None => Path::new("/"),
    }
}

/// A file without a name in the folder of `target`, or with a temporary one where the file system has no others.
fn unnamed(target: &Path, cache: CacheMode) -> io::Result<(File, Option<TemporaryName>)> {
    let flags = cache_flags(cache, true);
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o644);
    if Path::new("/proc/self/fd").exists() {
        let open = |flags: OFlag| options.clone().custom_flags(flags.bits()).open(folder_of(target));
        match open(flags | OFlag::O_TMPFILE) {
            Ok(file) => return Ok((file, None)),
            // This file system has no unnamed files (or has no O_DIRECT: the other way will tell).
            Err(e) if matches!(errno(&e), Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL | Errno::ENOSYS) => {}
            Err(e) => return Err(e),
        }
    }
    let made = TemporaryName::beside(target, |name| {
        options.clone().create_new(true).custom_flags(flags.bits()).open(name).map_err(|cause| {
            match cache.direct() && errno(&cause) == Errno::EINVAL {
                true => io::Error::other("filesystem does not support O_DIRECT"),
                false => cause,
            }
        })
    })?;
    Ok((made.0, Some(made.1)))
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// The file that will replace `old`, with its owner, mode and attributes; `None` if `old` has to be written in place.
fn replacement(old: &HostFile, target: &Path, cache: CacheMode) -> io::Result<Option<(File, Option<TemporaryName>)>> {
    let meta = old.file().metadata()?;
    let (folder, named) = match (fs::metadata(folder_of(target)), fs::symlink_metadata(target)) {
        (Ok(folder), Ok(named)) => (folder, named),
        _ => return Ok(None),
    };
    let mine = geteuid().is_root() || [meta.uid(), folder.uid()].contains(&geteuid().as_raw());
    let can = old.kind() == Kind::Regular
        && meta.nlink() == 1
        && (named.dev(), named.ino()) == (meta.dev(), meta.ino())
        && folder.dev() == meta.dev()
        && !host::is_mount_point(old.file())
        // Others' files cannot be renamed over in a sticky folder.
        && (folder.mode() & 0o1000 == 0 || mine);
    if !can {
        return Ok(None);
    }
    let (file, temporary) = match unnamed(target, cache) {
        Ok(made) => made,
        Err(e) if matches!(errno(&e), Errno::EACCES | Errno::EPERM | Errno::EROFS) => return Ok(None),
        Err(e) => return Err(e),
    };
    let new = file.metadata()?;
    if (new.uid(), new.gid()) != (meta.uid(), meta.gid()) && fchown(&file, Some(meta.uid()), Some(meta.gid())).is_err()
    {
        return Ok(None);
    }
    file.set_permissions(fs::Permissions::from_mode(meta.mode() & 0o7777))?;
    host::copy_attributes(old.file(), &file);
    Ok(Some((file, temporary)))
}

/// Gives an unnamed file a name that is free.
fn link(storage: &HostFile, name: &Path) -> std::result::Result<(), Errno> {
    let from = format!("/proc/self/fd/{}", storage.file().as_raw_fd());
    linkat(AT_FDCWD, from.as_str(), AT_FDCWD, name, AtFlags::AT_SYMLINK_FOLLOW)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn refusal(path: &Path) -> String {
        Staging::new(CacheMode::Unsafe).create(path).unwrap_err().to_string()
    }

    #[test]
    fn a_new_file_appears_at_commit_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let staging = Staging::new(CacheMode::Writeback);
        let file = staging.create(&path).unwrap();
        file.write_at(0, b"new").unwrap();
        assert!(names(dir.path()).is_empty());
        assert_eq!(staging.find(&path).unwrap().len().unwrap(), 3);
        assert!(staging.find(&dir.path().join("b")).is_none());
        staging.commit().unwrap();
        assert_eq!(names(dir.path()), ["a"]);
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn dropped_leaves_things_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, b"old").unwrap();
        let staging = Staging::new(CacheMode::Unsafe);
        staging.create(&path).unwrap().write_at(0, b"half").unwrap();
        staging.create(&dir.path().join("b")).unwrap().write_at(0, b"half").unwrap();
        drop(staging);
        assert_eq!(names(dir.path()), ["a"]);
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn names_are_given_to_all_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("gone")).unwrap();
        let staging = Staging::new(CacheMode::Unsafe);
        staging.create(&at("gone/main")).unwrap();
        for name in ["a", "b"] {
            let how = CreateHow { secondary: true, ..CreateHow::default() };
            staging.create_with(&at(name), &how).unwrap();
        }
        fs::remove_dir_all(at("gone")).unwrap();
        staging.commit().unwrap_err();
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn a_file_in_use_is_replaced_by_who_holds_it() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["a", "b"] {
            fs::write(at(name), b"old").unwrap();
        }
        symlink("a", at("soft")).unwrap();
        let how = file::OpenHow { write: true, access: Access::WRITE, ..file::OpenHow::default() };
        let held = HostFile::open(&at("a"), &how).unwrap();
        let staging = Staging::new(CacheMode::Writeback);
        assert!(staging.replace(&at("b"), &held).unwrap().is_none(), "another file");
        staging.replace(&at("soft"), &held).unwrap().unwrap().write_at(0, b"new").unwrap();
        assert_eq!(fs::read(at("a")).unwrap(), b"old");
        staging.commit().unwrap();
        assert_eq!((fs::read(at("a")).unwrap(), fs::read(at("soft")).unwrap()), (b"new".to_vec(), b"new".to_vec()));
        assert_eq!(names(dir.path()), ["a", "b", "soft"]);
    }

    #[test]
    fn an_older_file_keeps_mode_and_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        fs::write(&path, b"old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let inode = fs::metadata(&path).unwrap().ino();
        let staging = Staging::new(CacheMode::Writeback);
        staging.create(&path).unwrap().write_at(0, b"new").unwrap();
        let again = Staging::new(CacheMode::Unsafe).create(&path).unwrap_err();
        assert_eq!(again.to_string(), "Failed to get \"resize\" lock", "held until commit");
        staging.commit().unwrap();
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((fs::read(&path).unwrap().as_slice(), meta.mode() & 0o7777), (b"new".as_slice(), 0o600));
        assert_ne!(meta.ino(), inode);
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn links_stay_links() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), b"old").unwrap();
        symlink("file", at("soft")).unwrap();
        symlink("nothing", at("dangling")).unwrap();
        fs::write(at("hard"), b"old").unwrap();
        fs::hard_link(at("hard"), at("hard2")).unwrap();
        let staging = Staging::new(CacheMode::Unsafe);
        for name in ["soft", "dangling", "hard"] {
            staging.create(&at(name)).unwrap().write_at(0, b"new").unwrap();
            assert!(staging.find(&at(name)).is_some());
        }
        staging.commit().unwrap();
        for name in ["soft", "file", "dangling", "nothing", "hard", "hard2"] {
            assert_eq!(fs::read(at(name)).unwrap(), b"new", "{name}");
        }
        assert_eq!(fs::read_link(at("soft")).unwrap(), Path::new("file"));
        assert_eq!(fs::read_link(at("dangling")).unwrap(), Path::new("nothing"));
        assert_eq!(fs::metadata(at("hard")).unwrap().nlink(), 2);
        // Written in place and given up: no half image.
        Staging::new(CacheMode::Unsafe).create(&at("hard")).unwrap().write_at(0, b"half").unwrap();
        assert_eq!(fs::read(at("hard2")).unwrap(), b"");
    }

    #[test]
    fn refusals_have_the_references_texts() {
        let dir = tempfile::tempdir().unwrap();
        let d = dir.path().to_string_lossy().into_owned();
        nix::unistd::mkfifo(&dir.path().join("f"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        symlink("l", dir.path().join("l")).unwrap();
        assert_eq!(refusal(dir.path()), format!("Could not create '{d}': Is a directory"));
        assert_eq!(refusal(Path::new("")), "Could not create '': No such file or directory");
        let cases = [
            ("no/x", "No such file or directory"),
            ("f/x", "Not a directory"),
            ("l", "Too many levels of symbolic links"),
            ("x/", "Is a directory"),
        ];
        for (name, reason) in cases {
            let name = format!("{d}/{name}");
            assert_eq!(refusal(Path::new(&name)), format!("Could not create '{name}': {reason}"));
        }
        assert_eq!(refusal(&dir.path().join("f")), "Could not resize file: Invalid argument");
        let long = format!("{d}/{}", "a".repeat(256));
        assert_eq!(refusal(Path::new(&long)), format!("Could not create '{long}': File name too long"));
        let how = CreateHow { extent_size_hint: Some(1 << 33), ..CreateHow::default() };
        let error = Staging::new(CacheMode::Unsafe).create_with(&dir.path().join("h"), &how).unwrap_err();
        assert_eq!(error.to_string(), "Extent size hint is too large");
    }

    #[test]
    fn a_file_that_came_meanwhile_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let staging = Staging::new(CacheMode::Unsafe);
        staging.create(&path).unwrap().write_at(0, b"new").unwrap();
        fs::write(&path, b"other").unwrap();
        staging.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["a"]);
    }
}
