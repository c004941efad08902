//! Getting bytes from file to file without passing them through this program: sharing them (`FICLONERANGE`), which
//! writes nothing, or having the kernel copy them (`copy_file_range(2)`).

use std::io;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::sys::statfs::{BTRFS_SUPER_MAGIC, fstatfs};

use super::host::{self, XFS};
use super::{FileKind, HostFile, Result, Storage};

/// What the host may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// Have both files share the bytes.
    Share,
    /// The same, or else copy them.
    ShareOrCopy,
}

/// Gives a range of `to` the bytes of one of `from`, and says how many of the first ones are there now: whole blocks, if
/// they are shared. Nothing where the host has no way to do it at all: both must be files of the host, and the file
/// systems must agree. Whatever is not there is the caller's to write, and some of it may be written already.
pub fn offload(
    from: &dyn Storage,
    from_at: u64,
    to: &dyn Storage,
    to_at: u64,
    len: u64,
    how: Offload,
) -> Result<Option<u64>> {
    if !(from.facts().offload && to.facts().offload) {
        return Ok(None);
    }
    let (Some(source), Some(target)) = (from.host(), to.host()) else { return Ok(None) };
    // A step that makes the target longer must not cut off what is appended here.
    let _shared = target.growth.read().unwrap_or_else(|e| e.into_inner());
    let shared = share(source, from_at, target, to_at, len)?;
    match (shared, how) {
        (Some(done), Offload::Share) => Ok(Some(done)),
        (None, Offload::Share) => Ok(None),
        (shared, Offload::ShareOrCopy) => {
            let done = shared.unwrap_or(0);
            // The kernel would take what is not aligned, which is slow, or not at all, past its cache.
            let cached = source.direct.is_none() && target.direct.is_none();
            let copied = cached && copy(source, from_at + done, target, to_at + done, len - done)?;
            Ok(copied.then_some(len).or(shared.filter(|done| *done > 0)))
        }
    }
}

/// Whether the kernel has a way to copy from the one to the other, or there is none to say that it has not: of an image
/// within an image that is not asked.
pub fn can_copy(from: &dyn Storage, to: &dyn Storage) -> bool {
    if !(from.facts().offload && to.facts().offload) {
        return false;
    }
    let (Some(source), Some(target)) = (from.host(), to.host()) else { return true };
    // No byte is copied, but whether any could be is looked at.
    copy_file_range(source.file(), Some(&mut 0), target.file(), Some(&mut 0), 0).is_ok()
}

/// Whether files of that file's file system can share bytes: so do XFS and Btrfs. What is made there has its data where
/// that is possible.
pub fn can_share(file: &HostFile) -> bool {
    let kind = fstatfs(file.file()).map(|facts| facts.filesystem_type());
    kind.is_ok_and(|kind| kind == XFS || kind == BTRFS_SUPER_MAGIC)
}

/// Shares the whole blocks at the start of a range; none where source and target lie differently in theirs.
fn share(source: &HostFile, from_at: u64, target: &HostFile, to_at: u64, len: u64) -> Result<Option<u64>> {
    if source.kind() != FileKind::Regular || target.kind() != FileKind::Regular {
        return Ok(None);
    }
    let block = source.file().metadata()?.blksize().max(target.file().metadata()?.blksize()).max(1);
    let whole = len / block * block;
    if whole == 0 || !from_at.is_multiple_of(block) || !to_at.is_multiple_of(block) {
        return Ok(Some(0));
    }
    // Whatever is wrong, writing the bytes is a way, or will tell.
    let shared = host::share_range(source.file(), from_at, whole, target.file(), to_at);
    Ok(shared.is_ok().then_some(whole))
}

/// Has the kernel copy `len` bytes. False, with the target perhaps partly written, where it has no way to do it.
fn copy(source: &HostFile, from_at: u64, target: &HostFile, to_at: u64, len: u64) -> Result<bool> {
    let mut done = 0;
    while done < len {
        let offset = |at: u64| i64::try_from(at + done).map_err(|_| io::Error::from(Errno::EFBIG));
        let (mut source_at, mut target_at) = (offset(from_at)?, offset(to_at)?);
        let wanted = usize::try_from(len - done).unwrap_or(usize::MAX).min(1 << 30);
        match copy_file_range(source.file(), Some(&mut source_at), target.file(), Some(&mut target_at), wanted) {
            // The source ends here: what lies past it reads as zeros, which is for the caller to write.
            Ok(0) => return Ok(false),
            Ok(n) => {
                target.copied(to_at + done, n);
                done += n as u64;
            }
            Err(Errno::EINTR) => {}
            Err(Errno::ENOSPC | Errno::EDQUOT | Errno::EIO | Errno::EFBIG) if done > 0 => return Ok(false),
            Err(errno @ (Errno::ENOSPC | Errno::EDQUOT | Errno::EIO | Errno::EFBIG)) => return Err(errno.into()),
            // EXDEV, EINVAL, EOPNOTSUPP, ENOSYS, EPERM, ETXTBSY, ...: another way must be taken.
            Err(_) => return Ok(false),
        }
    }
    Ok(true)
}
