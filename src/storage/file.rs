//! Regular files and devices of the host.
//!
//! Invariants: no cursor is used (`pread`/`pwrite` alone), so all methods may run at once on disjoint ranges; a
//! file keeps the locks it was opened with until it is dropped or [`HostFile::lock`] changes them. Under `O_DIRECT`
//! any offset, length and buffer will do: see [`super::direct`].
//!
//! Lock order: `locks`, `growth`; neither is held while the other is taken. `growth` is held shared by every write
//! and alone by the step that makes a file longer, which must not cut off what a write has just appended.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::direct::Direct;
use super::host_part::{HostPart, parts_of};
use super::kind::FileKind;
use super::lock::{self, Access};
use super::reserve::Reserve;
use super::writeback::{Track, Writeback};
use super::{CacheMode, Error, Identity, Result, host};

/// How a file is opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct FileHow {
    /// For reading and writing.
    pub write: bool,
    /// What the page cache does.
    pub cache: CacheMode,
    /// The permissions taken and shared with other programs.
    pub access: Access,
    /// Space is never given back: what is punched keeps it, what is discarded stays.
    pub keep_space: bool,
}

/// The flags of `open(2)` that a cache mode asks for.
pub(super) fn cache_flags(cache: CacheMode, write: bool) -> OFlag {
    let mut flags = OFlag::O_CLOEXEC;
    if cache.direct() {
        flags |= OFlag::O_DIRECT;
    }
    if cache.write_through() && write {
        flags |= OFlag::O_DSYNC;
    }
    flags
}

/// An open file or device.
#[derive(Debug)]
pub struct HostFile {
    pub(super) file: Arc<File>,
    name: String,
    pub(super) kind: FileKind,
    pub(super) identity: Identity,
    pub(super) cache: CacheMode,
    pub(super) direct: Option<Direct>,
    locks: Mutex<Access>,
    pub(super) growth: RwLock<()>,
    pub(super) reserve: Option<Box<Reserve>>,
    pub(super) track: Option<Track>,
    pub(super) keep_space: bool,
}

impl HostFile {
    /// Opens what is there under that name, and locks it.
    pub fn open(path: &Path, how: &FileHow) -> Result<Self> {
        let name = path.to_string_lossy();
        if name.is_empty() {
            return Err(Error::Other("The 'file' block driver requires a file name".to_owned()));
        }
        let mut this = Self::from_file(open(path, "open", how.write, how.cache)?, how.cache, &name)?;
        this.keep_space = how.keep_space;
        this.check_end()?;
        if how.write && this.kind == FileKind::BlockDevice && host::is_read_only(&this.file) {
            return Err(Error::Step { what: "The device is not writable", cause: Errno::EACCES.into() });
        }
        this.lock(how.access)?;
        Ok(this)
    }

    /// Takes a file that is open already, in that cache mode; `name` is for messages. No lock is taken.
    pub fn from_file(file: File, cache: CacheMode, name: &str) -> Result<Self> {
        let meta = file.metadata()?;
        let kind = meta.file_type();
        let kind = if kind.is_file() {
            FileKind::Regular
        } else if kind.is_block_device() {
            FileKind::BlockDevice
        } else if kind.is_char_device() {
            FileKind::CharDevice
        } else {
            return Err(Error::WrongKind { driver: "file", name: name.to_owned(), wanted: "a regular file" });
        };
        if kind != FileKind::Regular {
            // It was set so that opening could not hang; reading and writing shall wait.
            let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
            fcntl(&file, FcntlArg::F_SETFL(flags & !OFlag::O_NONBLOCK))?;
        }
        let direct = if cache.direct() { Some(Direct::new(&file, kind)?) } else { None };
        Ok(Self {
            file: Arc::new(file),
            name: name.to_owned(),
            kind,
            identity: Identity { device: meta.dev(), inode: meta.ino() },
            cache,
            direct,
            locks: Mutex::default(),
            growth: RwLock::default(),
            reserve: None,
            track: None,
            keep_space: false,
        })
    }

    /// Refuses what is no file with bytes by position, and says that it is empty: most of those in `/proc`.
    fn check_end(&self) -> Result<()> {
        let seems_empty = || self.kind == FileKind::Regular && self.file.metadata().is_ok_and(|meta| meta.len() == 0);
        let end = || (&*self.file).seek(SeekFrom::End(0));
        match seems_empty().then(end) {
            Some(Err(cause)) => Err(Error::Step { what: "Could not refresh total sector count", cause }),
            _ => Ok(()),
        }
    }

    /// Its writes are counted; `early` starts their write-back while it is being written. (Under `O_DIRECT` there is
    /// none to start, and where every write waits for stable storage it is over each time.)
    pub(super) fn track_writes(&mut self, writeback: &Writeback, early: bool) {
        if self.kind == FileKind::Regular && !self.cache.direct() && !self.cache.write_through() {
            self.track = Some(writeback.track(self.file.clone(), early));
            self.reserve = Some(Box::new(Reserve::of(&self.file)));
        }
    }

    /// The kernel has written that much there, from another file.
    pub(super) fn copied(&self, at: u64, len: usize) {
        if let Some(track) = &self.track {
            track.wrote(at, len);
        }
    }

    /// Returns once everything written is on stable storage, whatever the cache mode.
    pub fn sync(&self) -> Result<()> {
        match self.file.sync_all() {
            Err(e) if self.kind == FileKind::CharDevice && e.raw_os_error() == Some(Errno::EINVAL as i32) => Ok(()),
            other => Ok(other?),
        }
    }

    /// The open file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where the file that is open is now, whatever its name leads to by now; an error where that cannot be told.
    pub fn whereabouts(&self) -> Result<PathBuf> {
        Ok(std::fs::read_link(format!("/proc/self/fd/{}", self.file.as_raw_fd()))?)
    }

    /// Its name, as it is shown.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What kind of thing it is.
    pub fn kind(&self) -> FileKind {
        self.kind
    }

    /// Which file it is.
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// What its bytes lie in.
    pub fn lies_in(&self) -> Vec<HostPart> {
        parts_of(&self.file)
    }

    /// The host's extent size hint (XFS), where there is one.
    pub fn extent_size_hint(&self) -> Option<u64> {
        host::extent_size_hint(&self.file)
    }

    /// Goes to other permissions than those it was opened with; on failure it keeps those it has.
    pub fn lock(&self, access: Access) -> Result<()> {
        let mut held = self.locks.lock().unwrap_or_else(|e| e.into_inner());
        lock::change(self.file.as_fd(), *held, access, &self.name)?;
        *held = access;
        Ok(())
    }

    /// Takes permissions on a file that `old`, which is going to be closed, has open too. Nobody can come between, and
    /// on failure `old` has what it had.
    pub fn lock_after(&self, old: &HostFile, access: Access) -> Result<()> {
        let was = *old.locks.lock().unwrap_or_else(|e| e.into_inner());
        old.lock(access)?;
        let taken = lock::take_with(self.file.as_fd(), access);
        if taken.is_ok() {
            *self.locks.lock().unwrap_or_else(|e| e.into_inner()) = access;
        }
        old.lock(was)?;
        taken
    }

    /// Makes a regular file at least that long; the new part is a hole.
    pub(super) fn grow(&self, len: u64) -> Result<()> {
        let _alone = self.growth.write().unwrap_or_else(|e| e.into_inner());
        if self.kind == FileKind::Regular && self.file.metadata()?.len() < len {
            self.file.set_len(len)?;
        }
        Ok(())
    }
}

/// Opens a file by name without hanging on a pipe.
pub(super) fn open(path: &Path, doing: &'static str, write: bool, cache: CacheMode) -> Result<File> {
    let with = |flags: OFlag| {
        let flags = flags | OFlag::O_NONBLOCK;
        OpenOptions::new().read(true).write(write).custom_flags(flags.bits()).open(path)
    };
    let flags = cache_flags(cache, write);
    with(flags).map_err(|cause| {
        let direct = cache.direct() && cause.raw_os_error() == Some(Errno::EINVAL as i32);
        let cause = match direct && with(flags & !OFlag::O_DIRECT).is_ok() {
            true => io::Error::other("filesystem does not support O_DIRECT"),
            false => cause,
        };
        Error::File { doing, name: path.to_string_lossy().into_owned(), cause }
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::storage::{HostExtent, Storage, Zeroing};

    const RW: FileHow = FileHow { write: true, cache: CacheMode::Writeback, access: Access::NONE, keep_space: false };

    fn message(path: &Path, how: &FileHow) -> String {
        HostFile::open(path, how).map_or_else(|e| e.to_string(), |_| "ok".to_owned())
    }

    #[test]
    fn what_cannot_be_opened_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let read = FileHow::default();
        let d = dir.path().to_string_lossy().into_owned();
        assert_eq!(message(dir.path(), &read), format!("'file' driver requires '{d}' to be a regular file"));
        assert_eq!(message(dir.path(), &RW), format!("Could not open '{d}': Is a directory"));
        assert_eq!(message(Path::new(""), &read), "The 'file' block driver requires a file name");
        assert_eq!(message(&dir.path().join("x"), &read), format!("Could not open '{d}/x': No such file or directory"));
        nix::unistd::mkfifo(&dir.path().join("f"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        for how in [&read, &RW] {
            let expected = format!("'file' driver requires '{d}/f' to be a regular file");
            assert_eq!(message(&dir.path().join("f"), how), expected);
        }
        std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        assert_eq!(message(&dir.path().join("s"), &RW), format!("Could not open '{d}/s': No such device or address"));
        symlink("l", dir.path().join("l")).unwrap();
        let expected = format!("Could not open '{d}/l': Too many levels of symbolic links");
        assert_eq!(message(&dir.path().join("l"), &read), expected);
        let direct = FileHow { cache: CacheMode::None, ..read };
        let expected = "Could not open '/proc/cpuinfo': filesystem does not support O_DIRECT";
        assert_eq!(message(Path::new("/proc/cpuinfo"), &direct), expected);
        assert_eq!(HostFile::open(Path::new("/dev/null"), &RW).unwrap().kind(), FileKind::CharDevice);
    }

    #[test]
    fn reads_past_the_end_and_extents() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"abc").unwrap();
        let file = HostFile::open(&path, &RW).unwrap();
        let mut buf = [1; 5];
        file.read_at(1, &mut buf).unwrap();
        assert_eq!(&buf, b"bc\0\0\0");
        file.read_at(u64::MAX - 2, &mut buf).unwrap();
        assert_eq!(buf, [0; 5]);
        assert!(file.write_at(u64::MAX - 2, b"abcd").is_err());
        assert_eq!(file.extent(1 << 40, 7).unwrap(), HostExtent::hole(7));
        file.write_at(1 << 20, b"x").unwrap();
        assert!(!file.extent(0, 1 << 20).unwrap().is_zero());
        assert!(file.extent(65536, 1 << 16).unwrap().is_zero());
    }

    /// Zeroing that makes the file longer races with writes that do too: nothing written may be lost.
    #[test]
    fn growing_by_zeroing_does_not_cut_off_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"").unwrap();
        let file = Arc::new(HostFile::open(&path, &RW).unwrap());
        std::thread::scope(|scope| {
            for odd in [0, 1] {
                let file = &file;
                scope.spawn(move || {
                    for i in 0..500u64 {
                        let at = (i * 2 + odd) * 512;
                        match odd {
                            0 => file.zero(at, 512, Zeroing::Punch).unwrap(),
                            _ => file.write_at(at, &[7; 512]).unwrap(),
                        }
                    }
                });
            }
        });
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes.len(), 512_000);
        for (i, block) in bytes.chunks(512).enumerate() {
            assert!(block.iter().all(|b| *b == if i % 2 == 0 { 0 } else { 7 }), "block {i}");
        }
    }

    #[test]
    fn two_opens_in_one_process_conflict() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        std::fs::write(&path, b"").unwrap();
        let first = HostFile::open(&path, &FileHow { access: Access::WRITE, ..RW }).unwrap();
        let reader = FileHow { access: Access::READ, ..FileHow::default() };
        assert_eq!(message(&path, &reader), "Failed to get shared \"write\" lock");
        first.lock(Access::READ).unwrap();
        assert_eq!(message(&path, &reader), "ok");
    }
}
