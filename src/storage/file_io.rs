//! The bytes of a host's file or device by position: what [`Storage`] asks of it.
//!
//! What each way of zeroing and each preallocation does is decided in `sparse.rs`.

use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::direct::Direct;
use super::file::HostFile;
use super::kind::{FileKind, read_full};
use super::{Event, Facts, HostExtent, Preallocation, Result, Storage, Zeroing, host, pieces, sparse};

/// Requests in flight that suit what has a queue of its own: the device, or what is behind it, sorts them.
const QUEUE: u32 = 8;

/// Whether a range lies where a file can have bytes at all.
fn addressable(at: u64, len: usize) -> bool {
    at.checked_add(len as u64).is_some_and(|end| i64::try_from(end).is_ok())
}

fn seek(host: &HostFile, at: u64, whence: Whence) -> std::result::Result<u64, Errno> {
    let at = i64::try_from(at).map_err(|_| Errno::ENXIO)?;
    lseek(host.file.as_fd(), at, whence).map(|to| u64::try_from(to).unwrap_or(0))
}

impl Storage for HostFile {
    fn len(&self) -> Result<u64> {
        match self.kind {
            FileKind::BlockDevice => host::device_size(&self.file),
            _ => Ok(self.file.metadata()?.len()),
        }
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        if !addressable(at, buf.len()) {
            buf.fill(0);
            return Ok(());
        }
        match &self.direct {
            Some(direct) => direct.read_at(&self.file, at, buf),
            None => read_full(&self.file, at, buf),
        }
    }

    fn write_at(&self, at: u64, buf: &[u8]) -> Result<()> {
        if !addressable(at, buf.len()) {
            return Err(Errno::EFBIG.into());
        }
        let _shared = self.growth.read().unwrap_or_else(|e| e.into_inner());
        match &self.direct {
            Some(direct) => direct.write_at(&self.file, at, buf),
            None => {
                if let Some(reserve) = &self.reserve {
                    reserve.before_write(&self.file, at, buf.len());
                }
                pieces::write_all_at(&self.file, at, buf)?;
                if let Some(track) = &self.track {
                    track.wrote(at, buf.len());
                }
                Ok(())
            }
        }
    }

    fn extent(&self, at: u64, max: u64) -> Result<HostExtent> {
        if self.kind != FileKind::Regular {
            let len = self.len()?;
            return Ok(match len.checked_sub(at) {
                Some(left) if left > 0 => HostExtent::data(max.min(left)),
                _ => HostExtent::hole(max),
            });
        }
        let data = match seek(self, at, Whence::SeekData) {
            Ok(data) => data,
            // Nothing but a hole, or nothing at all, up to the end and past it.
            Err(Errno::ENXIO) => return Ok(HostExtent::hole(max)),
            Err(_) => return Ok(HostExtent::data(max)),
        };
        if data > at {
            return Ok(HostExtent::hole(max.min(data - at)));
        }
        let hole = seek(self, at, Whence::SeekHole).unwrap_or(u64::MAX);
        let len = if hole > at { max.min(hole - at) } else { max };
        Ok(HostExtent::data(len))
    }

    fn zero(&self, at: u64, len: u64, how: Zeroing) -> Result<()> {
        let how = if self.keep_space && how == Zeroing::Punch { Zeroing::Allocate } else { how };
        sparse::zero(self, at, len, how)
    }

    fn discard(&self, at: u64, len: u64) -> Result<()> {
        if self.keep_space { Ok(()) } else { sparse::discard(self, at, len) }
    }

    fn set_len(&self, len: u64, fill: Preallocation) -> Result<()> {
        sparse::set_len(self, len, fill)
    }

    fn flush(&self) -> Result<()> {
        if !self.cache.flushes() {
            return Ok(());
        }
        match self.file.sync_data() {
            Err(e) if self.kind == FileKind::CharDevice && e.raw_os_error() == Some(Errno::EINVAL as i32) => Ok(()),
            other => Ok(other?),
        }
    }

    fn allocated(&self) -> Result<Option<u64>> {
        Ok(Some(self.file.metadata()?.blocks().saturating_mul(512)))
    }

    fn facts(&self) -> Facts {
        let regular = self.kind == FileKind::Regular;
        Facts {
            resize_refusal: None,
            fixed_len: !regular,
            new_reads_zero: regular,
            alignment: self.direct.as_ref().map_or(1, Direct::alignment),
            best_request: self.direct.as_ref().map(Direct::best_request),
            parallel: (self.direct.is_some() || !regular).then_some(QUEUE),
            identity: Some(self.identity),
            offload: true,
            addressed: true,
            ordered: false,
            by_run: false,
        }
    }

    fn host(&self) -> Option<&HostFile> {
        Some(self)
    }

    fn announce(&self, _event: Event) {}
}
