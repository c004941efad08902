//! Regular files and devices of the host.
//!
//! Invariants: no cursor is used (`pread`/`pwrite` alone), so all methods may run at once on disjoint ranges; a
//! file keeps the locks it was opened with until it is dropped.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::{Whence, lseek};

use super::lock::{self, Access};
use super::{CacheMode, Error, HostExtent, Identity, Kind, Preallocation, Result, Storage, Zeroing, sparse};

/// How a file is opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenHow {
    /// For reading and writing.
    pub write: bool,
    /// What the page cache does.
    pub cache: CacheMode,
    /// The permissions taken and shared with other programs.
    pub access: Access,
}

/// An open file or device.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    kind: Kind,
    identity: Identity,
    cache: CacheMode,
    alignment: u32,
}

impl HostFile {
    /// Opens what is there under that name, and locks it.
    pub fn open(path: &Path, how: &OpenHow) -> Result<Self> {
        let mut flags = OFlag::O_CLOEXEC;
        if how.cache.direct() {
            flags |= OFlag::O_DIRECT;
        }
        if how.cache.write_through() && how.write {
            flags |= OFlag::O_DSYNC;
        }
        // A pipe must not hang us before we know that it is one.
        flags |= OFlag::O_NONBLOCK;
        let file = OpenOptions::new().read(true).write(how.write).custom_flags(flags.bits()).open(path)?;
        let this = Self::from_file(file, how.cache, &path.to_string_lossy())?;
        lock::take(this.file.as_fd(), how.access)?;
        Ok(this)
    }

    /// Takes a file that is open already; `name` is for messages. No lock is taken.
    pub fn from_file(file: File, cache: CacheMode, name: &str) -> Result<Self> {
        let meta = file.metadata()?;
        let kind = meta.file_type();
        let kind = if kind.is_file() {
            Kind::Regular
        } else if kind.is_block_device() {
            Kind::BlockDevice
        } else if kind.is_char_device() {
            Kind::CharDevice
        } else {
            return Err(Error::WrongKind { driver: "file", name: name.to_owned(), wanted: "a regular file" });
        };
        let alignment = if cache.direct() { sparse::direct_alignment(&file, kind) } else { 1 };
        Ok(Self { file, kind, identity: Identity { device: meta.dev(), inode: meta.ino() }, cache, alignment })
    }

    /// The open file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn seek(&self, at: u64, whence: Whence) -> std::result::Result<u64, Errno> {
        let at = i64::try_from(at).map_err(|_| Errno::ENXIO)?;
        lseek(self.file.as_fd(), at, whence).map(|to| u64::try_from(to).unwrap_or(0))
    }
}

impl Storage for HostFile {
    fn len(&self) -> Result<u64> {
        match self.kind {
            Kind::BlockDevice => sparse::device_size(&self.file),
            _ => Ok(self.file.metadata()?.len()),
        }
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], at + done as u64) {
                Ok(0) => {
                    buf[done..].fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        Ok(self.file.write_all_at(buf, at)?)
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        if self.kind != Kind::Regular {
            return Ok(HostExtent { len: max, data: true });
        }
        let data = match self.seek(at, Whence::SeekData) {
            Ok(data) => data,
            // Nothing but a hole, or nothing at all, up to the end and past it.
            Err(Errno::ENXIO) => return Ok(HostExtent { len: max, data: false }),
            Err(_) => return Ok(HostExtent { len: max, data: true }),
        };
        if data > at {
            return Ok(HostExtent { len: max.min(data - at), data: false });
        }
        let hole = self.seek(at, Whence::SeekHole).unwrap_or(u64::MAX);
        let len = if hole > at { max.min(hole - at) } else { max };
        Ok(HostExtent { len, data: true })
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        sparse::zero(self, &self.file, at, len, how)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        sparse::discard(&self.file, self.kind, at, len)
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        sparse::set_len(self, &self.file, len, fill)
    }

    fn flush(&self) -> Result<()> {
        if !self.cache.flushes() {
            return Ok(());
        }
        match self.file.sync_data() {
            Err(e) if self.kind == Kind::CharDevice && e.raw_os_error() == Some(Errno::EINVAL as i32) => Ok(()),
            other => Ok(other?),
        }
    }

    fn kind(&self) -> Kind {
        self.kind
    }

    fn alignment(&self) -> u32 {
        self.alignment
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(Some(self.file.metadata()?.blocks() * 512))
    }

    fn identity(&self) -> Option<Identity> {
        Some(self.identity)
    }
}
