//! How a file under construction is made: what is there already decides.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf, absolute};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::geteuid;

use super::head::HeadLast;
use super::{Durability, Naming, Source, Staged, Staging};
use crate::storage::file::{self, HostFile, cache_flags};
use crate::storage::lock::{self, Access};
use crate::storage::temporary::TemporaryName;
use crate::storage::{CacheMode, Error, FileKind, Result, Storage, host};

/// What a new file's permissions are, less the umask.
const MODE: u32 = 0o644;
/// What they are while it is hidden.
const HIDDEN: u32 = 0o600;

/// A file that nobody knows of yet.
struct Unnamed {
    file: File,
    /// The name it has on a file system without unnamed files.
    temporary: Option<TemporaryName>,
}

impl Staging {
    pub(super) fn make(&self, path: &Path, secondary: bool) -> Result<Staged> {
        let failed = |cause: io::Error| named("create", path, cause);
        let full = match path.as_os_str().is_empty() {
            true => return Err(failed(Errno::ENOENT.into())),
            false => absolute(path).map_err(failed)?,
        };
        // A name that is given between two looks is looked at again.
        for _ in 0..8 {
            let old = match open_existing(path, self.cache) {
                Ok(old) => Some(old),
                Err(error) if error.errno() == Some(Errno::ENOENT) => None,
                Err(error) => return Err(error),
            };
            let target = follow(&full).map_err(failed)?;
            match (old, target) {
                (None, Some(target)) => {
                    let claim = claim(&target, path)?;
                    if fs::symlink_metadata(&target).is_err() {
                        return self.make_new(path, full, target, claim, secondary);
                    }
                }
                (None, None) => return Err(failed(Errno::ENOENT.into())),
                (Some(old), target) => return self.make_over_old(path, full, target, old, secondary),
            }
        }
        Err(failed(Errno::EEXIST.into()))
    }

    fn make_new(
        &self,
        path: &Path,
        full: PathBuf,
        target: PathBuf,
        claim: Option<File>,
        secondary: bool,
    ) -> Result<Staged> {
        let failed = |cause: io::Error| named("create", path, cause);
        match unnamed(&target, self.cache) {
            Ok(Unnamed { file, temporary }) => {
                // Its permissions are those that a file made with its own name would have.
                let mode = temporary.as_ref().map(|_| MODE & !host::umask());
                let way = Naming::Link { _claim: claim };
                self.staged(file, Parts { path, full, target, way, temporary, mode, secondary })
            }
            Err(cause) if is_policy(&cause) => {
                let made = create_new(&target, MODE, cache_flags(self.cache, true));
                let file = made.map_err(|cause| failed(without_direct(cause, self.cache)))?;
                let temporary = Some(TemporaryName::adopt(&target));
                let way = Naming::VeryName;
                self.staged(file, Parts { path, full, target, way, temporary, mode: None, secondary })
            }
            Err(cause) => Err(failed(cause)),
        }
    }

    fn make_over_old(
        &self,
        path: &Path,
        full: PathBuf,
        target: Option<PathBuf>,
        old: HostFile,
        secondary: bool,
    ) -> Result<Staged> {
        if let Some(target) = target
            && let Some((unnamed, mode)) =
                replacement(&old, &target, self.cache).map_err(|cause| named("create", path, cause))?
        {
            let Unnamed { file, temporary } = unnamed;
            let way = Naming::Replace { old };
            return self.staged(file, Parts { path, full, target, way, temporary, mode, secondary });
        }
        self.spare(&old, path)?;
        let mut old = old;
        self.track(&mut old, true);
        let storage = Arc::new(old);
        let head =
            (storage.kind() == FileKind::Regular && !secondary).then(|| Arc::new(HeadLast::new(storage.clone())));
        let (way, target, temporary, mode) = (Naming::InPlace, full.clone(), None, None);
        Ok(Staged { path: full, target, storage, head, way, temporary, mode, secondary, committed: false })
    }

    /// Refuses to write over, or empty, what is still to be read.
    pub(super) fn spare(&self, old: &HostFile, path: &Path) -> Result<()> {
        if self.sources.is_empty() || old.kind() == FileKind::CharDevice {
            return Ok(());
        }
        Source::spare(&self.sources, &old.lies_in(), &path.to_string_lossy())
    }

    /// See [`Staging::replace`].
    pub(super) fn make_over(&self, path: &Path, held: &dyn Storage) -> Result<Option<Staged>> {
        let failed = |cause: io::Error| named("replace", path, cause);
        let full = absolute(path).map_err(failed)?;
        let Ok(file) = file::open(path, "replace", false, self.cache) else { return Ok(None) };
        let old = HostFile::from_file(file, self.cache, &path.to_string_lossy())?;
        if held.facts().identity != Some(old.identity()) {
            return Ok(None);
        }
        let Some(target) = follow(&full).map_err(failed)? else { return Ok(None) };
        let Some((unnamed, mode)) = replacement(&old, &target, self.cache).map_err(failed)? else { return Ok(None) };
        let Unnamed { file, temporary } = unnamed;
        let way = Naming::Replace { old };
        self.staged(file, Parts { path, full, target, way, temporary, mode, secondary: false }).map(Some)
    }

    /// Has the writes to a file counted. Where the end will wait for it in any case, its write-back starts early: that
    /// costs a quarter of the CPU time of a plain conversion, which a new file for which nobody waits has no use for.
    fn track(&self, file: &mut HostFile, over_older: bool) {
        match self.durability {
            Durability::Never => {}
            Durability::Replacing => file.track_writes(&self.writeback, over_older),
            Durability::Always => file.track_writes(&self.writeback, true),
        }
    }

    fn staged(&self, file: File, from: Parts<'_>) -> Result<Staged> {
        let Parts { path, full, target, way, temporary, mode, secondary } = from;
        let mut storage = HostFile::from_file(file, self.cache, &path.to_string_lossy())?;
        self.track(&mut storage, matches!(way, Naming::Replace { .. }));
        let storage = Arc::new(storage);
        Ok(Staged { path: full, target, storage, head: None, way, temporary, mode, secondary, committed: false })
    }
}

/// A [`Staged`] but for its storage.
struct Parts<'a> {
    path: &'a Path,
    full: PathBuf,
    target: PathBuf,
    way: Naming,
    temporary: Option<TemporaryName>,
    mode: Option<u32>,
    secondary: bool,
}

pub(super) fn named(doing: &'static str, path: &Path, cause: io::Error) -> Error {
    Error::File { doing, name: path.to_string_lossy().into_owned(), cause }
}

/// Keeps others that follow the same rule off a name that nobody has yet, until the file is closed. `None` where that
/// cannot be asked; the name itself is looked at again when it is given.
fn claim(target: &Path, path: &Path) -> Result<Option<File>> {
    let (Ok(folder), Some(name)) = (File::open(folder_of(target)), target.file_name()) else { return Ok(None) };
    lock::claim(&folder, name, &path.to_string_lossy())?;
    Ok(Some(folder))
}

/// Opens and locks what is there already, with the reference's texts for what cannot be written.
fn open_existing(path: &Path, cache: CacheMode) -> Result<HostFile> {
    let name = path.to_string_lossy();
    let is_device = fs::metadata(path).is_ok_and(|meta| !meta.is_file() && !meta.is_dir() && meta.rdev() != 0);
    if is_device {
        let how = file::FileHow { write: true, cache, access: Access::WRITE.of_raw(), ..file::FileHow::default() };
        return HostFile::open(path, &how).map_err(|cause| Error::Existing(cause.into()));
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

pub(super) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        Some(_) => Path::new("."),
        None => Path::new("/"),
    }
}

/// Whether it is the host's policy that refuses: access rights, or a profile that names the files it allows.
pub(super) fn is_policy(error: &io::Error) -> bool {
    matches!(errno(error), Errno::EACCES | Errno::EPERM)
}

pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

pub(super) fn create_new(path: &Path, mode: u32, flags: OFlag) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(mode).custom_flags(flags.bits()).open(path)
}

fn without_direct(cause: io::Error, cache: CacheMode) -> io::Error {
    match cache.direct() && errno(&cause) == Errno::EINVAL {
        true => io::Error::other("filesystem does not support O_DIRECT"),
        false => cause,
    }
}

/// A file without a name in the folder of `target`, or with a temporary one where the file system has no others.
fn unnamed(target: &Path, cache: CacheMode) -> io::Result<Unnamed> {
    let flags = cache_flags(cache, true);
    if Path::new("/proc/self/fd").exists() {
        let flags = (flags | OFlag::O_TMPFILE).bits();
        let mut options = OpenOptions::new();
        match options.read(true).write(true).mode(MODE).custom_flags(flags).open(folder_of(target)) {
            Ok(file) => return Ok(Unnamed { file, temporary: None }),
            // A policy that knows names alone.
            Err(e) if is_policy(&e) => {}
            // This file system has no unnamed files (or has no O_DIRECT: the other way will tell).
            Err(e) if matches!(errno(&e), Errno::EOPNOTSUPP | Errno::EISDIR | Errno::EINVAL | Errno::ENOSYS) => {}
            Err(e) => return Err(e),
        }
    }
    let made = TemporaryName::beside(target, |name| {
        create_new(name, HIDDEN, flags).map_err(|cause| without_direct(cause, cache))
    })?;
    Ok(Unnamed { file: made.0, temporary: Some(made.1) })
}

/// Whether a file that is there would stay as it is, beside a new one, until that takes its place. It is not locked.
pub fn stays_until_replaced(path: &Path) -> bool {
    let cache = CacheMode::Writeback;
    let (Ok(full), Ok(file)) = (absolute(path), file::open(path, "replace", false, cache)) else { return false };
    let (Ok(old), Ok(Some(target))) = (HostFile::from_file(file, cache, &path.to_string_lossy()), follow(&full)) else {
        return false;
    };
    replacement(&old, &target, cache).is_ok_and(|new| new.is_some())
}

/// The file that will replace `old`, with its owner, flags and attributes, and its permissions, unless those are to be
/// given when it is not hidden any more; `None` if `old` has to be written in place.
fn replacement(old: &HostFile, target: &Path, cache: CacheMode) -> io::Result<Option<(Unnamed, Option<u32>)>> {
    let meta = old.file().metadata()?;
    let (folder, named) = match (fs::metadata(folder_of(target)), fs::symlink_metadata(target)) {
        (Ok(folder), Ok(named)) => (folder, named),
        _ => return Ok(None),
    };
    let mine = geteuid().is_root() || [meta.uid(), folder.uid()].contains(&geteuid().as_raw());
    let can = old.kind() == FileKind::Regular
        && meta.nlink() == 1
        && (named.dev(), named.ino()) == (meta.dev(), meta.ino())
        && folder.dev() == meta.dev()
        && !host::is_mount_point(old.file())
        && !host::is_in_use_as_device(old.identity())
        // Others' files cannot be renamed over in a sticky folder.
        && (folder.mode() & 0o1000 == 0 || mine);
    if !can {
        return Ok(None);
    }
    let new = match unnamed(target, cache) {
        Ok(made) => made,
        Err(e) if is_policy(&e) || errno(&e) == Errno::EROFS => return Ok(None),
        Err(e) => return Err(e),
    };
    let has = new.file.metadata()?;
    if (has.uid(), has.gid()) != (meta.uid(), meta.gid())
        && fchown(&new.file, Some(meta.uid()), Some(meta.gid())).is_err()
    {
        return Ok(None);
    }
    host::copy_flags(old.file(), &new.file);
    let mode = meta.mode() & 0o7777;
    if new.temporary.is_some() {
        // Access lists, like the mode, are for the end.
        return Ok(Some((new, Some(mode))));
    }
    host::copy_attributes(old.file(), &new.file);
    new.file.set_permissions(fs::Permissions::from_mode(mode))?;
    Ok(Some((new, None)))
}
